"""Where the tower that reads or writes text stands in a pass, which the queries of its cross-attention do not say."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.errors import HeadscopeError
from headscope.kernels.masks import Mask


class DecoderPosition:
    """Remembers the mask of the text tower's self-attention in the pass that runs."""

    def __init__(self) -> None:
        self._mask: Mask | None = None
        self._padding: Tensor | None = None

    def begin(self, inputs: dict[str, Any]) -> None:
        """A pass on these inputs begins."""
        self._mask = None
        padding = inputs.get("attention_mask")
        self._padding = padding if isinstance(padding, Tensor) and padding.dim() == 2 else None

    def see(self, call: AttentionCall) -> None:
        """A call of the text tower.

        Raises:
            HeadscopeError: its mask hides the padding that the pass was given.
        """
        self._mask = call.mask
        if not call.dense or call.mask.start is not None or call.mask.end is not None:
            return
        padding, self._padding = self._padding, None  # asked here and once: on a card it waits for what runs there
        if padding is not None and not bool(padding.all()):
            raise HeadscopeError(
                "this model makes a dense mask of its own from the padding, which hides where examples begin and "
                "end; trace prompts of one length, or one at a time"
            )

    def offset(self) -> int:
        """The position of the first query: the queries of cross-attention are the decoder's.

        Raises:
            HeadscopeError: the decoder is padded.
        """
        if self._mask is None:
            return 0
        if self._mask.start is not None or self._mask.end is not None:
            raise HeadscopeError("cross-attention of a padded decoder is not recorded; trace one example at a time")
        return self._mask.query_offset
