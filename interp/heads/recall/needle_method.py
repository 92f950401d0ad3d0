"""What methods share that let a model answer needle prompts: their settings, prompts and trials."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

from headscope.interp.errors import HeadscopeError
from headscope.interp.heads.base import HeadMethod
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts.haystack import Needles
from headscope.interp.prompts.needle import NeedlePrompts
from headscope.interp.runs.journal import Trial

Group = Literal["needle", "text"] | None


@dataclass(frozen=True, kw_only=True)
class NeedleMethod(HeadMethod):
    """Base of the methods whose trials are needle prompts, one for every needle, length and depth.

    Args:
        size: the prompts where lengths, depths or needles do not say otherwise. "small" [OURS], for a CPU: few short
            prompts (by default 600 and 1,000 tokens at depths 0, 50 and 100), because the authors' grid takes a
            SmolLM2-135M hours on two cores; it finds the strong heads, and says little of long contexts. "published":
            ten depths and those of the authors' 20 lengths from 1,000 to 50,000 that fit the model's context.
        lengths, depths, needles, haystack, chat, max_new_tokens, newline_stop, stem: as of ``NeedlePrompts``, which
            lists what differs from the authors' prompts; lengths, depths and needles are the size's where they are
            None. Needles are the first three bundled ones (headscope's own: the authors' three are other texts).
        threshold: the ROUGE-1 recall of the answer above which a trial counts.
        group: what the bootstrap draws as a whole: "needle" (all trials of a needle, so that the interval speaks of
            other needles; with three needles it is about their range: pass needles=10 for a better one), "text"
            (the depths of one needle and length: other placements of these needles), or None (every trial, too narrow).
    """

    SMALL: ClassVar[Mapping[str, Any]] = {"lengths": (600, 1000), "depths": (0, 50, 100), "needles": 3}
    PUBLISHED: ClassVar[Mapping[str, Any]] = {"lengths": None, "depths": 10, "needles": 3}

    size: Literal["small", "published"] = "small"
    lengths: Sequence[int] | None = None
    depths: int | Sequence[float] | None = None
    needles: Needles = None
    haystack: str | Path | None = None
    threshold: float = 0.5
    group: Group = "needle"
    chat: bool | None = None
    max_new_tokens: int = 50
    newline_stop: bool = False
    stem: Callable[[str], str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group not in ("needle", "text", None):
            raise HeadscopeError(f"group is 'needle', 'text' or None, not {self.group!r}")
        if self.size not in ("small", "published"):
            raise HeadscopeError(f"size is 'small' or 'published', not {self.size!r}")

    @property
    def resample_by(self) -> str | None:
        return self.group

    @cached_property
    def task(self) -> NeedlePrompts:
        """The prompts: the size's grid, after what is said of it."""
        own = {"lengths": self.lengths, "depths": self.depths, "needles": self.needles}
        grid = self.SMALL if self.size == "small" else self.PUBLISHED
        return NeedlePrompts(
            **{**grid, **{name: value for name, value in own.items() if value is not None}},
            haystack=self.haystack,
            chat=self.chat,
            max_new_tokens=self.max_new_tokens,
            newline_stop=self.newline_stop,
            stem=self.stem,
        )

    def trials(self, lm: LanguageModel) -> Sequence[Trial]:
        return [{**trial, "text": f"{trial['needle']} in {trial['length']}"} for trial in self.task.trials(lm)]

    def tokens(self, lm: LanguageModel, trial: Trial) -> tuple[int, int]:
        return trial["length"], self.max_new_tokens

    def parameters(self, lm: LanguageModel) -> dict[str, Any]:
        return {**self.task.parameters(lm), "threshold": self.threshold}
