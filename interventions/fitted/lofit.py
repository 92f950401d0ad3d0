"""LoFiT: localised fine-tuning of heads' outputs. First which heads, then an offset for each of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from headscope.interp.errors import HeadscopeError
from headscope.interp.heads.causal.gates import Tokens
from headscope.interp.models import load_model
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.results.headset import HeadSet
from headscope.interp.results.scores import HeadScores
from headscope.interp.runs.provenance import provenance
from headscope.interp.sites.given import ModelLike
from headscope.interp.sites.gradients import frozen
from headscope.interventions.applying import apply, size
from headscope.interventions.fitted.base import Data, Fit, Fitted, every_head, how_many
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
from headscope.interventions.outputs.affine import AffineHeads
from headscope.interventions.outputs.measuring import head_outputs

Rows = Sequence[tuple[Tokens, ...]]
PRESETS: dict[str, dict[str, Any]] = {  # the authors' settings, by what they tuned them for
    "mquake": {"loss": "sft", "scale_rate": 5e-3, "penalty": 1e-3, "offset_rate": 1e-2, "top": 32},
    "truthfulqa": {"loss": "dpo", "scale_rate": 5e-3, "penalty": 5e-4, "offset_rate": 1e-2, "top": 32},
    "clutrr": {"loss": "sft", "scale_rate": 5e-4, "penalty": 5e-3, "offset_rate": 1e-2, "top": 32},
    "truthfulqa-gemma-7b": {"loss": "dpo", "scale_rate": 5e-3, "penalty": 5e-4, "offset_rate": 2e-2, "top": 16},
    "mquake-gemma-7b": {"loss": "sft", "scale_rate": 5e-3, "penalty": 5e-4, "offset_rate": 8e-3, "top": 16},
}


@dataclass(frozen=True, kw_only=True)
class LoFiT(Fit):
    """Choose heads by how far scalings of their outputs want to move, then train an offset for each: LoFiT.

    Yin et al. 2024 (arXiv 2406.01563, Section 3; ``lofit_trainer.py``). Every head's output is z' = (1 + A) * z + v,
    at every position, the model frozen. Step 1 trains A of all heads, from N(0, 0.001^2), on the task's loss + lambda *
    the sum of |A|; heads are ranked by the 2-norm of their A, ties in the model's order. Step 2 starts anew with A = 0
    and trains v of the first ``top`` of them, without the penalty. What comes out is an ``AffineHeads`` of v. AdamW,
    a rate that falls in a line to 0, gradients clipped to norm 1, batches of 8, 5 epochs. The loss is the mean negative
    log-likelihood of response tokens (``"sft"``, rows {"prompt", "response"}) or DPO's (``"dpo"``, rows {"prompt",
    "chosen", "rejected"}).

    What differs: the order of examples and the draws of the starts are our own; dropout is off [OURS]; prompt and
    response are tokenised apart; nothing is truncated, a longer row is refused; accelerate is not used, since what is
    trained is a table or two on one device (a model spread over several gets its rows moved). The rates are of models
    of 7 billion parameters, where 32 heads are 3 % of 1,024: on a small model take ``share=0.03125``, and expect that
    rates need tuning.

    What it does not show: that the chosen heads do the task in the unedited model; they are where an edit of it is
    easily learned. Compare with ``heads`` drawn at random, and with LoRA (``headscope.interventions.fitted.lora``).

    Args:
        preset: whose settings stand where none are given: "mquake", "truthfulqa", "clutrr" (Llama-2-7B),
            "truthfulqa-gemma-7b" or "mquake-gemma-7b".
        loss: "sft" or "dpo".
        scale_rate: learning rate of step 1.
        penalty: lambda of step 1.
        offset_rate: learning rate of step 2.
        top: how many heads step 2 trains.
        share: the same as a share of all heads, cut to a whole number; it goes before ``top``.
        heads: train these heads and leave step 1 out.
        epochs: of each step.
        batch: rows of an update.
        clip: the gradient's norm is brought down to it.
        beta: of DPO.
        reference: of DPO: "initial", the model with the tiny draw that training starts from, which is what the
            authors' code amounts to (TRL computes the reference after it), or "unedited".
        spread: standard deviation of the start.
        end: the end-of-text token closes every response, and is learned with it, where the tokenizer has one.
        longest: tokens of a row at most.
    """

    name: ClassVar[str] = "lofit"
    unit: ClassVar[str] = "2-norm of A"
    source: ClassVar[str] = "arXiv 2406.01563"

    preset: str = "mquake"
    loss: Literal["sft", "dpo"] | None = None
    scale_rate: float | None = None
    penalty: float | None = None
    offset_rate: float | None = None
    top: int | None = None
    share: float | None = None
    heads: Any = None
    epochs: int = 5
    batch: int = 8
    clip: float = 1.0
    beta: float = 0.5
    reference: Literal["initial", "unedited"] = "initial"
    spread: float = 1e-3
    end: bool = True
    longest: int = 400

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.preset not in PRESETS:
            raise HeadscopeError(f"lofit: there is no preset {self.preset!r}; take {', '.join(PRESETS)}")
        for field, known in (("loss", ("sft", "dpo", None)), ("reference", ("initial", "unedited"))):
            if getattr(self, field) not in known:
                raise HeadscopeError(f"lofit: {field} is {known[0]!r} or {known[1]!r}, not {getattr(self, field)!r}")
        if self.heads is not None and (self.top is not None or self.share is not None):
            raise HeadscopeError("lofit: heads are given, so that top or share have nothing to choose: leave them out")
        tuned = self.tuned
        positive = {**tuned, "epochs": self.epochs, "batch": self.batch, "clip": self.clip, "spread": self.spread}
        for field, value in positive.items():
            if field not in ("loss", "penalty") and not value > 0:
                raise HeadscopeError(f"lofit: {field} must be above 0, not {value!r}")
        if tuned["penalty"] < 0:
            raise HeadscopeError(f"lofit: penalty is 0 or more, not {tuned['penalty']!r}")

    @property
    def tuned(self) -> Mapping[str, Any]:
        """Loss, rates, penalty and top, after ``preset``."""
        own = {name: getattr(self, name) for name in PRESETS[self.preset]}
        return {**PRESETS[self.preset], **{name: value for name, value in own.items() if value is not None}}

    def schedule(self, rate: float) -> Schedule:
        """How a step is trained."""
        return Schedule(rate, self.epochs, self.batch, clip=self.clip)

    def fit(self, model: ModelLike, data: Data, *, progress: bool = True) -> LoFiTResult:
        """Offsets (an ``AffineHeads``) for the heads that the data choose, or for ``heads``.

        Raises:
            HeadscopeError: data of another form, more heads than there are, or a loss that is not a number.
        """
        lm, tuned = load_model(model), self.tuned
        rows = responses(lm, data, tuned["loss"], end=self.end, longest=self.longest)
        every, norms, curves = every_head(lm), None, {}
        given = None if self.heads is None else HeadSet.of(self.heads)
        count = how_many("lofit", tuned["top"], self.share, len(every)) if given is None else len(given)
        with frozen(lm):
            if given is None:
                scales, curves["scales"] = self._step(lm, rows, HeadSet(tuple(every)), scaling=True, progress=progress)
                norms = _norms(scales, size(lm))
                given = norms.top(count)
            edit, curves["offsets"] = self._step(lm, rows, given, scaling=False, progress=progress)
        assert edit.v is not None
        width = edit.v.shape[-1]
        trained = {step: (len(every) if step == "scales" else count) * width for step in curves}
        rates = {"scales": tuned["scale_rate"], "offsets": tuned["offset_rate"]}
        steps = {step: told(self.schedule(rates[step]), len(rows), trained[step]) for step in curves}
        texts = [_words(row) for row in rows]
        made = provenance(lm, seed=self.seed, prompts=texts, **self._told(tuned))
        return LoFiTResult(edit=edit, provenance={**made, "steps": steps}, norms=norms, curves=curves, trained=trained)

    def _told(self, tuned: Mapping[str, Any]) -> dict[str, Any]:
        """Every setting as it was used: of given heads, nothing of the step that was left out."""
        used = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "seed"} | {**tuned}
        if self.heads is not None:
            return {k: x for k, x in used.items() if k not in ("top", "share", "scale_rate", "penalty")} | {
                "heads": [list(head) for head in HeadSet.of(self.heads)]
            }
        return used

    def _step(
        self, lm: LanguageModel, rows: Rows, heads: HeadSet, *, scaling: bool, progress: bool
    ) -> tuple[AffineHeads, Curve]:
        """One of the two: a table of ``heads``, by place, from its draw to its end."""
        tuned = self.tuned
        ids = torch.tensor([[*rows[0][0][0], *rows[0][0][1]]])
        width = head_outputs(lm, ids, (-1,)).shape[-1]
        drawn = torch.randn(len(heads), width, generator=torch.Generator().manual_seed(self.seed)) * self.spread
        table = drawn.to(lm.device, torch.promote_types(lm.inner.dtype, torch.float32)).requires_grad_(True)
        unedited = None
        if tuned["loss"] == "dpo" and self.reference == "unedited":
            unedited = reference_of(lm, rows, self.batch)
        with apply(lm, _affine(heads, scaling, table), grad=True):
            objective = sft_objective(lm, rows)
            if tuned["loss"] == "dpo":
                reference = reference_of(lm, rows, self.batch) if unedited is None else unedited
                objective = dpo_objective(lm, rows, reference, self.beta)
            curve = train(
                [table],
                objective,
                len(rows),
                self.schedule(tuned["scale_rate" if scaling else "offset_rate"]),
                self.seed,
                penalty=tuned["penalty"] if scaling else 0.0,
                what=f"LoFiT, {'scales of all heads' if scaling else f'offsets of {len(heads)} heads'}",
                progress=progress,
            )
        return _affine(heads, scaling, table.detach().cpu().clone()), curve


@dataclass(frozen=True, kw_only=True, eq=False)
class LoFiTResult(Fitted):
    """Offsets of chosen heads, and how they were chosen.

    Attributes:
        norms: the 2-norm of every head's A after step 1 (one trial, so without interval); None where heads were given.
        curves: by step ("scales", "offsets"), every update's ``loss``, ``penalty``, ``gradient``
            and ``rows``.
        trained: numbers that each step trained.
    """

    norms: HeadScores | None
    curves: dict[str, Curve]
    trained: dict[str, int]

    @property
    def heads(self) -> HeadSet:
        """The heads that have offsets, first the one whose A was largest."""
        assert self.edit.heads is not None
        return self.edit.heads

    def summary(self) -> dict[str, Any]:
        """Heads, numbers trained, first and last epoch's mean loss of each step."""
        found: dict[str, Any] = {"heads": [list(head) for head in self.heads], "trained": self.trained["offsets"]}
        for step, curve in self.curves.items():
            epoch = max(1, len(curve) // self.provenance["steps"][step]["epochs"])
            ends = {"first": curve[:epoch], "last": curve[-epoch:]}
            found |= {f"{step}_loss_{end}": _mean(part) for end, part in ends.items()}
        return found

    def record(self) -> dict[str, Any]:
        """With the curves, and every head's norm."""
        norms = None if self.norms is None else self.norms.mean.tolist()
        return {**super().record(), "trained": self.trained, "norms": norms, "curves": self.curves}


def _affine(heads: HeadSet, scaling: bool, table: Tensor) -> AffineHeads:
    return AffineHeads(heads, A=table) if scaling else AffineHeads(heads, v=table)


def _norms(scales: AffineHeads, shape: tuple[int, int]) -> HeadScores:
    """The 2-norm of each head's A (layer, head), NaN where there is no head."""
    found = np.full(shape, np.nan)
    table: Tensor = scales.A.double()  # type: ignore[union-attr]
    for (layer, head), row in zip(scales.heads, table, strict=True):
        found[layer, head] = float(row.norm())
    return HeadScores("lofit", found[None])


def _mean(part: Curve) -> float:
    """The mean loss of an epoch's rows."""
    return float(np.average([x["loss"] for x in part], weights=[x["rows"] for x in part]))


def _words(row: tuple[Tokens, ...]) -> str:
    """A row's tokens as a text, for the data's hash."""
    return repr([[list(x), list(y)] for x, y in row])
