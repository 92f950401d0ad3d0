"""What methods share that let a model answer needle prompts: their settings, prompts and trials."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

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
        lengths, depths, needles, haystack, chat, max_new_tokens, newline_stop, stem: as of ``NeedlePrompts``, which
            lists what differs from the authors' prompts; by default the first three bundled needles (headscope's own:
            the authors' three are other texts), ten depths and those of the authors' 20 lengths that fit the model's
            context.
        threshold: the ROUGE-1 recall of the answer above which a trial counts.
        group: what the bootstrap draws as a whole: "needle" (all trials of a needle, so that the interval speaks of
            other needles; with three needles it is about their range: pass needles=10 for a better one), "text"
            (the depths of one needle and length: other placements of these needles), or None (every trial, too narrow).
    """

    lengths: Sequence[int] | None = None
    depths: int | Sequence[float] = 10
    needles: Needles = None
    haystack: str | Path | None = None
    threshold: float = 0.5
    group: Group = "needle"
    chat: bool | None = None
    max_new_tokens: int = 50
    newline_stop: bool = False
    stem: Callable[[str], str] | None = None

    def __post_init__(self) -> None:
        if self.group not in ("needle", "text", None):
            raise HeadscopeError(f"group is 'needle', 'text' or None, not {self.group!r}")

    @property
    def resample_by(self) -> str | None:
        return self.group

    @cached_property
    def task(self) -> NeedlePrompts:
        """The prompts."""
        return NeedlePrompts(
            lengths=self.lengths,
            depths=self.depths,
            needles=self.needles,
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
