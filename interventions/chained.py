"""Several handlers as one, in their order: what a composed intervention shows its parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.attention.handler import Handler
from headscope.interp.attention.stream import StreamCall


class Chained(Handler):
    """Shows ``parts`` what it is shown, one after the other, each the layers and places that concern it."""

    parts: Sequence[Handler]

    @property
    def streams(self) -> tuple[str, ...]:  # type: ignore[override]
        """Every place of the residual stream that one of them is shown."""
        return tuple(dict.fromkeys(place for part in self.parts for place in part.streams))

    @property
    def follows(self) -> tuple[str, ...]:  # type: ignore[override]
        """Every other tower that one of them follows."""
        return tuple(dict.fromkeys(tower for part in self.parts for tower in part.follows))

    def follow(self, call: AttentionCall) -> None:
        """A call of another tower, for the parts that follow one."""
        for part in self.parts:
            if part.follows:
                part.follow(call)

    def concerns(self, module: str, layer: int) -> bool:
        """The layers of any part."""
        return any(part.concerns(module, layer) for part in self.parts)

    def edit(self, call: AttentionCall) -> AttentionCall:
        """Every part's, in order."""
        for part in self._here(call):
            call = part.edit(call)
        return call

    def edit_output(self, call: AttentionCall, z: Tensor) -> Tensor:
        """Every part's, in order."""
        for part in self._here(call):
            z = part.edit_output(call, z)
        return z

    def stream(self, call: StreamCall) -> Tensor:
        """The stream after every part that is shown this place, in order."""
        for part in self.parts:
            if call.place in part.streams:
                call = replace(call, x=part.stream(call))
        return call.x

    def begin_forward(self, inputs: dict[str, Any]) -> None:
        """A pass begins for every part."""
        for part in self.parts:
            part.begin_forward(inputs)

    def fill_cache(self, cache: Any) -> None:
        """The pass leaves its keys in this cache."""
        for part in self.parts:
            part.fill_cache(cache)

    def end_forward(self) -> None:
        """It came to its end."""
        for part in self.parts:
            part.end_forward()

    def abort_forward(self) -> None:
        """It did not."""
        for part in self.parts:
            part.abort_forward()

    def finish(self) -> None:
        """The block ends."""
        for part in self.parts:
            part.finish()

    def _here(self, call: AttentionCall) -> list[Handler]:
        return [part for part in self.parts if part.concerns(call.module, call.layer)]
