"""Every allocation that promises nothing holds poison, so that a result nobody wrote cannot pass by luck."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch

# Triton decides when it is imported whether its kernels run on the CPU, in its interpreter.
CPU_ONLY = not torch.cuda.is_available()
TOO_LATE = CPU_ONLY and "triton.language" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1"
if CPU_ONLY:
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Another room's test may have imported triton first: then the kernels cannot run here."""
    if not TOO_LATE:
        return
    late = pytest.mark.skip(reason="triton was imported without TRITON_INTERPRET=1; set it for the whole run")
    for item in items:
        if "kernels" in item.path.parts and "triton" in item.nodeid:
            item.add_marker(late)


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def wrapper(*args: object, **kwargs: object) -> torch.Tensor:
        x = allocate(*args, **kwargs)
        return x.fill_(float("nan")) if x.is_floating_point() else x.fill_(99) if x.dtype != torch.bool else x

    return wrapper


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", _poisoned(torch.Tensor.new_empty))
    yield


@pytest.fixture(autouse=True)
def no_fallback() -> Iterator[None]:
    """No test passes because another engine answered; what did not compile or was recorded is forgotten after each."""
    from headscope.kernels import fallback, replay

    with warnings.catch_warnings():
        warnings.simplefilter("error", fallback.EngineWarning)
        yield
    fallback._FAILED.clear()
    replay.forget()


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """The tensors are tiny: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
