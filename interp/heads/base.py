"""What a head method is: a frozen declaration of settings that scores the heads of a model, one trial at a time.

``HeadMethod``: trials, and the score of one of them, however it is made (generation, patching). ``Measured``: samples,
the statistics to record of them, and how records become scores; several of these share forward passes. ``TargetMethod``
(in ``targets``): one function from token ids to the key that each query should look at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from headscope.interp.errors import HeadscopeError
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts.sequences import Sample
from headscope.interp.registry import check_numbers
from headscope.interp.runs.journal import Trial
from headscope.interp.runs.provenance import hash_texts
from headscope.interp.statistics import Statistic

T = TypeVar("T")
Text = str | Sequence[str]
# scores (layer, head), or None for a trial that is not kept, and what to remember about the trial
Scored = tuple[NDArray[np.float64] | None, dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class HeadMethod:
    """A published way to score the heads of a model: its fields are its settings, its docstring its page.

    Args:
        seed: of everything that is drawn.

    Class variables: ``name``, as in the registry; ``unit``, what a score is; ``range``, between which values it lies,
    if it does; ``higher_is_better``: whether a high score means more of what the method is named after; ``per``: whose
    value a score is, the head's own or its layer's, which all heads of the layer are given; ``reads``: "images" where
    it needs a model of images and text; ``source``: the paper (arXiv number or DOI); ``refused``: where it is not
    exact, and why; ``unkept``: why none of its trials may have been kept; ``nulls``: what its scores can be held
    against (``headscope.interp.analysis.null``). For the table of what was reproduced (``heads/README.md``): ``tests``,
    the file below ``tests/interp``; ``reproduced``, what is held to what there; ``not_reproduced``, what of the paper
    is not, and why.
    """

    name: ClassVar[str]
    unit: ClassVar[str] = ""
    range: ClassVar[tuple[float, float] | None] = None
    higher_is_better: ClassVar[bool] = True
    per: ClassVar[Literal["head", "layer"]] = "head"
    reads: ClassVar[Literal["text", "images"]] = "text"
    source: ClassVar[str] = ""
    refused: ClassVar[Mapping[str, str]] = {}
    tests: ClassVar[str] = ""
    reproduced: ClassVar[str] = ""
    not_reproduced: ClassVar[str] = ""
    unkept: ClassVar[str] = "the model may fail this task at these lengths (see the method's criterion)"
    nulls: ClassVar[tuple[str, ...]] = ("weights",)
    unlisted: ClassVar[tuple[str, ...]] = ()  # settings that change no number, only memory and time

    seed: int = 0

    def __post_init__(self) -> None:
        check_numbers(self, self.name)

    @property
    def resample_by(self) -> str | None:
        """The trial key whose equal values the bootstrap draws as a whole; None: every trial by itself."""
        return None

    def trials(self, lm: LanguageModel) -> Sequence[Trial]:
        """JSON-able descriptions of what is run, the same at every call."""
        raise NotImplementedError

    def score(self, lm: LanguageModel, trial: Trial) -> Scored:
        """Scores (layer, head) of one trial, None if it does not count, and what to remember of it."""
        raise NotImplementedError

    def tokens(self, lm: LanguageModel, trial: Trial) -> tuple[int, int]:
        """A trial's prompt tokens and generated tokens, for estimates."""
        raise NotImplementedError

    def parameters(self, lm: LanguageModel) -> dict[str, Any]:
        """The settings as results keep them and as a resumed run must have them: texts as hashes."""
        held = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("seed", *self.unlisted)}
        return {name: hash_texts(x) if name == "texts" and x is not None else x for name, x in held.items()}

    def summary(self, details: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Facts of the whole model, from what was remembered of the trials, for the provenance."""
        return {}


@dataclass(frozen=True, kw_only=True)
class Measured(HeadMethod):
    """A method that reads statistics of samples; methods that see the same samples share the forward passes over them.

    Args:
        samples: at most so many; each is a trial, and the intervals resample them.
        batch: samples in one forward pass; it changes nothing but memory and time.
    """

    unlisted: ClassVar[tuple[str, ...]] = ("batch",)

    samples: int = 20
    batch: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch < 1:
            raise HeadscopeError(f"batch={self.batch}: run at least 1 sample in a forward pass")

    @property
    def resample_by(self) -> str | None:
        return "sample"

    def prepare(self, lm: LanguageModel) -> list[Sample]:
        """The samples; the same at every call."""
        raise NotImplementedError

    def views(self, lm: LanguageModel, sample: Sample) -> tuple[Sample, ...]:
        """What is run of a sample: itself, or it with and without a span."""
        return (sample,)

    def statistics(self, samples: Sequence[Sample]) -> list[Statistic]:
        """What is recorded of a forward pass over ``samples``, which are of one length."""
        raise NotImplementedError

    def reduce(self, lm: LanguageModel, samples: Sequence[Sample], *records: xr.Dataset) -> list[Scored]:
        """A score for every sample, from one record a view."""
        raise NotImplementedError

    def trials(self, lm: LanguageModel) -> Sequence[Trial]:
        return [sample.trial for sample in self.prepare(lm)]


def per_model(method: HeadMethod, lm: LanguageModel, make: Callable[[], T], name: str = "") -> T:
    """What ``make`` gives, made once for a method's settings, a model (which is kept, so that its id stays its) and a
    ``name``."""
    held: dict[tuple[int, str], tuple[LanguageModel, Any]] = vars(method).setdefault("_per_model", {})
    if (id(lm), name) not in held:
        held[id(lm), name] = lm, make()
    found: T = held[id(lm), name][1]
    return found


def by_head(lm: LanguageModel, record: xr.Dataset, values: NDArray[Any]) -> NDArray[np.float64]:
    """``values`` (recorded layer, head, ...) by the model's own layer index, NaN in layers without attention.

    Raises:
        HeadscopeError: a value is not a number.
    """
    layers = record["layer"].to_numpy()
    broken = ~np.isfinite(values.reshape(len(layers), -1)).all(axis=1)
    if broken.any():
        raise HeadscopeError(
            f"the attention of layer {layers[broken][0]} of {lm.name} is not a number in {lm.info.dtype}: "
            "load it with dtype='float32', or check its weights"
        )
    full = np.full((lm.info.layers, *values.shape[1:]), np.nan)
    full[layers] = values
    return full
