"""How much a text's embedding depends on what stands where."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import pandas as pd
import torch
from torch import Tensor

from headscope.interp.errors import HeadscopeError
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts import load_haystack, load_needles, prompt_boundary, published_spans
from headscope.interp.prompts.haystack import sentence_ends
from headscope.interp.prompts.spans import text_span
from headscope.interp.runs.journal import Trial
from headscope.interp.runs.provenance import hash_texts
from headscope.interventions.tasks.base import Task, check_among, check_least

LEAST = 20  # characters of a sentence; shorter ones go with the one before them


@dataclass(frozen=True)
class EmbeddingPosition(Task):
    """Cosine between the embedding of a text and that of the text with one sentence removed, inserted or moved, for
    every place of it.

    Lee, Goel & Ramchandran 2024 remove text, or insert irrelevant text, at a place and compare embeddings by their
    cosine: it falls most at the beginning. Here a sentence at a time, in passages of consecutive sentences of prose
    [OURS]: "remove" leaves out the sentence at a place, "insert" sets one of another text before it, or at the end, and
    "move" takes the sentence at a place to the text's beginning (from there, to its end). An embedding is of the last
    layer: the mean over all tokens, the first token or the last one. Encoders and decoders alike.

    Beside the mean cosine: that at every place, ``spread``, the largest less the smallest, and ``first - last``. Where
    place does not matter they are 0; the cosine itself has no better direction, for a text without a sentence is
    another text.

    Both texts are read under an edit. The changed text publishes ``sentence``, what was inserted or moved, and with
    "remove" nothing. What it does not show: sentences differ in what they say and how long they are, so that a place's
    mean over few passages holds these too.

    Args:
        passages: how many.
        sentences: of each.
        change: "remove", "insert" or "move".
        pool: "mean", "first" or "last".
        text: where the passages are from (None: the bundled novel).
    """

    passages: int = 4
    sentences: int = 6
    change: str = "remove"
    pool: str = "mean"
    text: str | None = None

    name: ClassVar[str] = "embedding_position"
    metric: ClassVar[str] = "cosine"
    unit: ClassVar[str] = "cosine to the unchanged text"
    higher_is_better: ClassVar[bool | None] = None
    source: ClassVar[str] = "after Lee, Goel & Ramchandran 2024, arXiv 2412.15241"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, passages=1, sentences=2)
        check_among(self, change=("remove", "insert", "move"), pool=("mean", "first", "last"))

    @cached_property
    def loaded(self) -> list[list[str]]:
        """The passages, as lists of sentences, evenly spread over the text.

        Raises:
            HeadscopeError: a text with too few sentences.
        """
        every = _sentences(load_haystack(None) if self.text is None else self.text)
        step = len(every) // self.passages
        if step < self.sentences:
            raise HeadscopeError(
                f"{self.name}: the text has {len(every)} sentences, and {self.passages} passages of {self.sentences} "
                "are asked for: give a longer text, or ask for less"
            )
        return [every[i * step : i * step + self.sentences] for i in range(self.passages)]

    def parameters(self, lm: LanguageModel) -> dict[str, Any]:
        """The settings, and the passages by their SHA-256."""
        return super().parameters(lm) | {"passages_sha256": hash_texts([" ".join(one) for one in self.loaded])}

    def trials(self, lm: LanguageModel) -> list[Trial]:
        """Every passage and ``place``, from 0; one more at the end for an insertion."""
        places = self.sentences + (self.change == "insert")
        return [
            {"group": number, "passage": number, "place": place}
            for number in range(self.passages)
            for place in range(places)
        ]

    def changed(self, trial: Trial) -> tuple[str, str | None]:
        """The changed text, and the sentence in it that the change brought, if any."""
        own, place = list(self.loaded[trial["passage"]]), trial["place"]
        if self.change == "insert":
            new = load_needles()[trial["passage"] % 3].needle
            return " ".join([*own[:place], new, *own[place:]]), new
        taken = own.pop(place)
        if self.change == "remove":
            return " ".join(own), None
        return " ".join([*own, taken] if place == 0 else [taken, *own]), taken

    def tokens(self, lm: LanguageModel, trial: Trial) -> tuple[int, int]:
        """The tokens of both texts; nothing is generated."""
        texts = (" ".join(self.loaded[trial["passage"]]), self.changed(trial)[0])
        return sum(int(lm.encode(text)["input_ids"].shape[1]) for text in texts), 0

    def run(self, lm: LanguageModel, trial: Trial) -> dict[str, Any]:
        """Compare both embeddings: score is their cosine."""
        text, brought = self.changed(trial)
        spans = {} if brought is None else {"sentence": text_span(lm.required_tokenizer(), text, brought)}
        whole = self.embed(lm, " ".join(self.loaded[trial["passage"]]))
        with published_spans(spans):
            other = self.embed(lm, text)
        return {"score": float(torch.nn.functional.cosine_similarity(whole, other, dim=0))}

    def embed(self, lm: LanguageModel, text: str) -> Tensor:
        """The text's embedding (d_model,), float64.

        Raises:
            HeadscopeError: a model that gives no hidden states, or a text that is too long.
        """
        inputs = lm.encode(text)
        with torch.no_grad(), prompt_boundary(int(inputs["input_ids"].shape[1])):
            output = lm.model(**inputs, output_hidden_states=True)
        states = getattr(output, "hidden_states", None)
        if states is None:
            raise HeadscopeError(f"{self.name}: {lm.name} gives no hidden states; use an encoder or a language model")
        last: Tensor = states[-1][0].double()
        return {"mean": last.mean(0), "first": last[0], "last": last[-1]}[self.pool]

    def summarise(self, trials: pd.DataFrame) -> dict[str, float]:
        """The cosine at every place, from 1, and how far places lie apart."""
        each = trials.groupby("place")["score"].mean()
        found = {f"cosine at {int(place) + 1}": float(value) for place, value in each.items()}
        ends = float(each.iloc[0] - each.iloc[-1])
        return found | {"spread": float(each.max() - each.min()), "first - last": ends}


def _sentences(text: str) -> list[str]:
    """The sentences of a text, on one line each."""
    found: list[str] = []
    begin = 0
    for end in sentence_ends(text):
        sentence = " ".join(text[begin:end].split())
        begin = end
        if len(sentence) < LEAST and found:
            found[-1] = f"{found[-1]} {sentence}"
        elif sentence:
            found.append(sentence)
    return found
