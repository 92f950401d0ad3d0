"""A compiler that fails, in a kernel's place: what stands behind the kernel must answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from triton.runtime.errors import PTXASError


class Broken:
    """``kernel[grid](...)`` fails as ptxas does, or with ``error``; ``tried``: how often."""

    def __init__(self, error: Exception | None = None) -> None:
        self.tried, self.error = 0, error or PTXASError("`ptxas` failed with error code -11")

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self._fail

    def _fail(self, *_: Any, **__: Any) -> None:
        self.tried += 1
        raise self.error
