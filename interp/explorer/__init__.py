"""The explorer: every head of a model on one text, from a layer x head overview down to single tokens.

No query x key map is ever built or sent. Queries and keys are kept from one forward pass; tiles of the pattern are
computed from them when they are looked at, at the zoom at which they are looked at.
"""

from headscope.interp.explorer.explorer import Explorer, explore
from headscope.interp.explorer.run import Run, record_run

__all__ = ["Explorer", "Run", "explore", "record_run"]
