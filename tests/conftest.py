"""Shared fixtures: real models once per session, tiny random models by configuration."""

from __future__ import annotations

import os

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs a hub
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported: kernels run on the CPU


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M-Instruct in float32; every test leaves it as it found it."""
    from headscope.interp import load_model

    return load_model("smollm2-135m")


@pytest.fixture(scope="session")
def llava():
    """llava-smollm2, on the CPU in float32."""
    from headscope.interp import load_model

    return load_model("llava-smollm2", device="cpu")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long ones first, so that no process waits at the end for another's."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
