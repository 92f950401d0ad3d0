"""Edits that read sums over keys, which keep no gradient."""

from __future__ import annotations

from headscope.interp.attention.call import AttentionCall
from headscope.interp.errors import HeadscopeError
from headscope.kernels.attention import wants_gradient


def require_no_gradient(call: AttentionCall, what: str) -> None:
    """Refuse where a gradient would flow through an edit that takes sums of the pattern for constants.

    Raises:
        HeadscopeError: names ``what`` it is.
    """
    if wants_gradient(call.inputs(), call.value):
        raise HeadscopeError(f"{what} keeps no gradient: use it without grad=True, or other settings")
