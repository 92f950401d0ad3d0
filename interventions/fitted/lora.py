"""LoRA beside LoFiT: an adapter trained on the same rows by the same loop, on the model inside a block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch

from headscope.interp.errors import HeadscopeError
from headscope.interp.models import load_model
from headscope.interp.runs.provenance import provenance
from headscope.interp.sites.given import ModelLike
from headscope.interp.sites.gradients import frozen
from headscope.interventions.fitted.base import Data
from headscope.interventions.fitted.data import responses
from headscope.interventions.fitted.training import (
    Curve,
    Schedule,
    dpo_objective,
    reference_of,
    sft_objective,
    told,
    train,
)


@dataclass(frozen=True)
class Adapter:
    """What was trained: how many numbers, every update's loss, and where it came from."""

    trained: int
    curve: Curve
    provenance: dict[str, Any]


@contextmanager
def lora(
    model: ModelLike,
    data: Data,
    *,
    loss: Literal["sft", "dpo"] = "sft",
    rank: int = 8,
    alpha: float = 16.0,
    modules: Sequence[str] | None = None,
    rate: float = 1e-4,
    epochs: int = 5,
    batch: int = 8,
    beta: float = 0.5,
    end: bool = True,
    longest: int = 400,
    seed: int = 42,
    progress: bool = True,
) -> Iterator[Adapter]:
    """Inside the block the model wears an adapter that was trained on ``data``; after it, it is bitwise as it was.

    Low-rank adaptation (Hu et al. 2021, arXiv 2106.09685) by peft (extra ``evaluation``), the baseline of LoFiT: the
    same data, losses, optimiser, schedule and number of steps as ``LoFiT``'s second step, so that what differs is what
    is trained. An adapter is no edit of heads, and is gone after the block. The reference of DPO is the model itself,
    which an adapter is before its first step.

    Args:
        rank, alpha, modules: peft's r, lora_alpha and target_modules; by default rank 8, alpha 16 [OURS] and peft's
            choice for the architecture (a llama's q_proj and v_proj).
        loss, rate, epochs, batch, beta, end, longest, seed: as in ``LoFiT``.

    Raises:
        HeadscopeError: peft is not installed, data of another form, or modules that the model lacks.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise HeadscopeError("LoRA needs peft: pip install 'headscope[evaluation]'") from error
    lm = load_model(model)
    rows = responses(lm, data, loss, end=end, longest=longest)
    schedule = Schedule(rate, epochs, batch)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=None if modules is None else list(modules))
    with frozen(lm):
        reference = reference_of(lm, rows, batch) if loss == "dpo" else None
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            try:
                worn = get_peft_model(lm.inner, config)
            except ValueError as error:
                raise HeadscopeError(f"peft puts no adapter on {lm.name} ({error}); name its modules=") from error
        try:
            parameters = [p for p in worn.parameters() if p.requires_grad]
            for part in worn.modules():
                part.training = False
            objective = sft_objective(lm, rows) if reference is None else dpo_objective(lm, rows, reference, beta)
            curve = train(parameters, objective, len(rows), schedule, seed, what="LoRA", progress=progress)
            trained = sum(p.numel() for p in parameters)
            made = provenance(lm, seed=seed, loss=loss, rank=rank, alpha=alpha, modules=modules, beta=beta)
            yield Adapter(trained, curve, {**made, "steps": told(schedule, len(rows), trained)})
        finally:
            worn.unload()
