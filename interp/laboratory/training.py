"""One training loop for every experiment: fixed steps, checkpoints to go on from, and a ``Watch`` that measures."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from headscope.interp.errors import HeadscopeError
from headscope.interp.laboratory.watch import Watch
from headscope.interp.runs.files import write_atomically
from headscope.interp.runs.journal import plain, require_same

Loss = Callable[[Any, int], Tensor]  # of the model and the step


def train(
    model: nn.Module,
    loss: Loss,
    optimizer: Optimizer,
    *,
    steps: int,
    watch: Watch,
    rate: Callable[[int], float] | None = None,
    clip: float | None = None,
    folder: Path | None = None,
    save_every: int = 1000,
    device: str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Train ``model`` for ``steps`` optimizer steps, and return the rows that ``watch`` recorded.

    A run goes on from ``folder`` where it was stopped, and gives what it would have given: ``loss`` draws its batch
    from the step's number (``generator(seed, step)``), never from a state.

    Args:
        model: trained where it stands, moved to ``device``.
        loss: of the model at a step, a scalar: it makes the batch and runs the model.
        optimizer: over the model's parameters.
        steps: optimizer steps.
        watch: what is measured before the first step, every ``watch.every`` steps, and after the last.
        rate: the factor of every learning rate at a step.
        clip: the largest norm of the whole gradient.
        folder: of checkpoints; None keeps none.
        save_every: steps between two checkpoints.
        device: ``"cpu"`` keeps a run there; None takes accelerate's choice (a GPU where there is one).
        settings: whatever else decides what is trained, JSON-able: checkpoints keep it.

    Raises:
        HeadscopeError: the loss is no number any more; the checkpoint is of other steps or settings.
    """
    accelerator = Accelerator(cpu=device == "cpu")
    model, optimizer = accelerator.prepare(model, optimizer)
    base = [group["lr"] for group in optimizer.param_groups]
    made = plain({"steps": steps, **(settings or {})})
    first, rows = _resume(accelerator, folder, made)
    for step in range(first, steps):
        if step % watch.every == 0:
            rows.append({"step": step, **watch.measure(model)})
        if rate is not None:
            for group, lr in zip(optimizer.param_groups, base, strict=True):
                group["lr"] = lr * rate(step)
        optimizer.zero_grad(set_to_none=True)
        value = loss(model, step)
        if not bool(torch.isfinite(value)):
            raise HeadscopeError(
                f"the loss at step {step} is {float(value.detach())}: a smaller learning rate may train"
            )
        accelerator.backward(value)
        if clip is not None:
            accelerator.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        if folder is not None and (step + 1) % save_every == 0 and step + 1 < steps:
            _save(accelerator, folder, step + 1, made, rows)
    rows.append({"step": steps, **watch.measure(model)})
    return rows


def generator(seed: int, step: int, device: torch.device | str = "cpu") -> torch.Generator:
    """The source of everything that is drawn at a step: the same after a resumed run."""
    mixed = (seed * 1_000_003 + step) * 2_654_435_761 % 2**63  # neighbours give unrelated streams
    return torch.Generator(device).manual_seed(mixed)


def _save(accelerator: Accelerator, folder: Path, step: int, made: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """A new folder, then the line that names it: a kill in between leaves the last one in force."""
    kept = folder / f"step-{step}"
    accelerator.save_state(str(kept))
    line = {"step": step, "settings": made, "rows": rows}
    write_atomically(folder / "training.json", json.dumps(line).encode())
    for old in folder.glob("step-*"):
        if old != kept:
            for file in old.iterdir():
                file.unlink()
            old.rmdir()


def _resume(accelerator: Accelerator, folder: Path | None, made: dict[str, Any]) -> tuple[int, list[dict[str, Any]]]:
    line = None if folder is None else folder / "training.json"
    if folder is None or line is None or not line.exists():
        return 0, []
    found = json.loads(line.read_text())
    require_same(line, found["settings"], made)
    accelerator.load_state(str(folder / f"step-{found['step']}"))
    return int(found["step"]), list(found["rows"])
