"""What the tracer keeps of a layer's statistics: large ones of rows leave a GPU while later layers compute."""

from __future__ import annotations

import torch
from torch import Tensor

LARGE = 1 << 20  # bytes; what is smaller stays until it is read, for a copy costs a launch and decoding makes many


def owned(value: Tensor) -> Tensor:
    """``value`` without the larger tensor that it may be a view of, which the record would keep in memory, and without
    what a backward pass needs."""
    value = value.detach() if value.requires_grad else value
    held = value.untyped_storage().nbytes()
    return value.clone(memory_format=torch.contiguous_format) if held > value.nbytes else value


def in_host_memory(values: list[Tensor]) -> list[Tensor]:
    """``values`` in host memory: all copies are sent before the first is waited for."""
    copies = HostCopies()
    sent = [copies.send(value) for value in values]
    copies.wait()
    return [value.cpu() for value in sent]


class HostCopies:
    """Copies on their way to host memory, which may be read after ``wait``."""

    def __init__(self) -> None:
        self._events: dict[torch.device, torch.cuda.Event] = {}

    def send(self, value: Tensor) -> Tensor:
        """The copy of ``value`` in pinned host memory, not there yet; ``value`` itself if it is small or no GPU's."""
        if not value.is_cuda or value.nbytes < LARGE:
            return value
        stream = torch.cuda.current_stream(value.device)
        copy = value.to("cpu", non_blocking=True)  # torch pins the memory, and keeps it until the copy is done
        event = self._events.setdefault(value.device, torch.cuda.Event())  # type: ignore[no-untyped-call]
        event.record(stream)
        return copy

    def wait(self) -> None:
        """Wait until every copy that was sent is there."""
        for event in self._events.values():
            event.synchronize()
        self._events.clear()
