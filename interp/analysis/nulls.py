"""What a method scores where there is nothing to find: on random weights, or with shuffled targets."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

from headscope.interp.errors import HeadscopeError
from headscope.interp.heads.base import HeadMethod
from headscope.interp.heads.discovery import discover
from headscope.interp.heads.targets import TargetMethod
from headscope.interp.models import load_model
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.results.scores import HeadScores

Kind = Literal["weights", "targets"]
QUANTILE = 0.95


@dataclass(frozen=True, eq=False, repr=False)
class Null:
    """A method's scores where there is nothing to find, one HeadScores a seed."""

    kind: Kind
    seeds: tuple[int, ...]
    scores: tuple[HeadScores, ...]

    def __repr__(self) -> str:
        return f"Null({self.scores[0].method!r:.40}, {self.kind}, {len(self.seeds)} seeds, highest {self.highest:.3g})"

    @property
    def highest(self) -> float:
        """The highest score of any head under any seed."""
        return float(np.nanmax([one.mean for one in self.scores]))

    @property
    def lowest(self) -> float:
        """The lowest score of any head under any seed."""
        return float(np.nanmin([one.mean for one in self.scores]))

    @property
    def quantile(self) -> float:
        """The score below which 95 % of the heads of all seeds lie."""
        return float(np.nanquantile([one.mean for one in self.scores], QUANTILE))

    def against(self, observed: HeadScores) -> dict[str, Any]:
        """How many heads of ``observed`` stand outside the null, as one row.

        ``above_quantile``: above 95 % of the null's heads (5 % of all would be by chance, ``by_chance``).
        ``above_highest``: above every head of every seed; ``below_lowest``: below every one, as trained heads are in
        entropy. ``heads``: with a score.
        """
        values = observed.mean[~np.isnan(observed.mean)]
        return {
            "method": observed.method,
            "null": self.kind,
            "seeds": len(self.seeds),
            "null_quantile": self.quantile,
            "null_highest": self.highest,
            "null_lowest": self.lowest,
            "above_quantile": int((values > self.quantile).sum()),
            "by_chance": (1 - QUANTILE) * len(values),
            "above_highest": int((values > self.highest).sum()),
            "below_lowest": int((values < self.lowest).sum()),
            "heads": len(values),
        }


def null(
    method: HeadMethod, lm: Any, kind: Kind = "weights", seeds: Sequence[int] = (0, 1, 2), *, progress: bool = True
) -> Null:
    """A method's scores, on the same samples, where there is nothing to find [OURS; papers differ in what they do].

    "weights": on ``random_twin`` of the model, one for every seed: what architecture, positions and the method itself
    give without any training. "targets" (methods with a ``target``: induction, previous and duplicate token): on the
    model as it is, while every query's target is another random key that it sees (``shuffled``): what a head puts on
    a key because it is there.

    What it does not show: random weights attend almost evenly, so that nearly anything learnt rises above them; a head
    that always looks as far back as the target lies beats shuffled targets without reading a token (take another
    ``length``). A method that keeps only trials which the model answers finds none on random weights, and says so.

    Args:
        method: a declaration, ``METHODS["induction"](samples=10)``.
        lm: load_model's result, or what load_model takes.
        kind: one of ``method.nulls``.
        seeds: one run each, of random weights or of random targets.
        progress: show a bar on a terminal.

    Raises:
        HeadscopeError: a method without this null, no seed, a model that cannot be built anew, or nothing to score.
    """
    if kind not in method.nulls or not seeds:
        raise HeadscopeError(
            f"{method.name} has no null of kind {kind!r} with {len(seeds)} seeds: "
            f"choose {' or '.join(repr(name) for name in method.nulls)}, and 1 seed or more"
        )
    lm = load_model(lm)
    found = []
    for seed in seeds:
        if kind == "targets":
            assert isinstance(method, TargetMethod)
            found += discover([replace(method, shuffled=seed)], lm, progress=progress)
        else:
            found += discover([method], random_twin(lm, seed), progress=progress)
    return Null(kind, tuple(seeds), tuple(found))


def random_twin(lm: Any, seed: int = 0) -> LanguageModel:
    """A model of the same configuration whose weights transformers has just initialised: nothing learnt.

    It has the model's class, precision, device and tokenizer; its name and revision say that it is random and from
    which seed, and nothing of the checkpoint is in it. The weights are drawn on the CPU, the same on every machine of
    one torch version, and torch's own random state stays as it was. A quantized model's twin is not quantized; that
    of a model in a bridge or a wrapper is plain.

    Raises:
        HeadscopeError: a model spread over several devices, or whose class cannot be built from its configuration.
    """
    lm = load_model(lm)
    inner: Any = lm.inner
    if len(getattr(inner, "hf_device_map", None) or ()) > 1:
        raise HeadscopeError(f"{lm.name} is spread over several devices: load it on one for a twin with random weights")
    config = copy.deepcopy(inner.config)
    for name in ("quantization_config", "_commit_hash"):
        if hasattr(config, name):
            delattr(config, name)
    told = f"random weights, seed {seed}"
    config.name_or_path = name = f"{lm.name} ({told})"
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = type(inner)._from_config(config, dtype=getattr(torch, lm.info.dtype))
    except (AttributeError, TypeError, ValueError) as error:
        raise HeadscopeError(f"no twin of {lm.name} can be built ({type(error).__name__}: {error})") from error
    made = model.to(lm.device).eval()
    return LanguageModel.wrap(made, lm.tokenizer, name=name, revision=told, processor=lm.processor)
