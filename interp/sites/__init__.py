"""Sites: where attention calls come from. ``attached`` picks the site for what it is given."""

from headscope.interp.sites.huggingface import attached, is_attached

__all__ = ["attached", "is_attached"]
