"""Guidance by a stream without the image: what the image makes likelier is made likelier still."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from headscope.interp.errors import HeadscopeError
from headscope.interp.models import load_model
from headscope.interp.prompts.decoding import check_finite, stop_tokens
from headscope.interp.sites.before import own_passes
from headscope.interp.sites.given import ModelLike
from headscope.interventions.decoding.base import Decoding
from headscope.interventions.prompts import Prompts


@dataclass(frozen=True, kw_only=True, repr=False)
class Guidance(Decoding):
    """Choose the largest of gamma (l_img - l_txt) + l_txt, the logarithms with and without a span of the prompt.

    The classifier-free guidance of PAI (Liu et al. 2024, arXiv 2407.21771), which PAINT runs too (Arif et al. 2025,
    arXiv 2501.12206; modPAI/CFG.py @ c5ee7da). Two streams with caches of their own read the prompt and the same
    without ``span`` (its tokens taken out, what follows moves up) and then the same chosen tokens. l are log-softmax;
    tokens with l_img below log ``cut`` + max l_img are ruled out. ``gamma`` 1 is l_img itself, without a cut, so the
    unguided greedy choice. Edits in force act on the stream with the span alone, from its first pass on (the authors'
    loop leaves that pass unedited by mistake). Greedy; each token takes two passes.

    What it does not show: that what is raised is in the image; it is what the image adds to the words.

    Args:
        gamma: 1.1 is the run script's, 2 the arguments' default.
        cut: share of the largest probability below which a token cannot be chosen; 0 rules none out.
        span: what the second stream lacks: positions, or a published name.
    """

    kind: ClassVar[str] = "guidance"
    unit: ClassVar[str] = "gamma"
    source: ClassVar[str] = "arXiv 2407.21771, 2501.12206; hasanar1f/llava-hallunication-fix @ c5ee7da"

    gamma: float = 1.1
    cut: float = 0.1
    span: Any = "image"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not math.isfinite(self.gamma) or self.gamma < 0 or not 0 <= self.cut < 1:
            raise HeadscopeError("guidance: gamma is at least 0, cut a share from 0 up to 1")

    def guided(self, seen: Tensor, blind: Tensor) -> Tensor:
        """What tokens are chosen by, (prompt, vocabulary), from the logits of both streams."""
        image = seen.double().log_softmax(-1)
        if self.gamma == 1:
            return image
        text = blind.double().log_softmax(-1)
        guided = self.gamma * (image - text) + text
        least = image.amax(-1, keepdim=True) + (math.log(self.cut) if self.cut else -math.inf)
        return guided.masked_fill(image < least, -torch.inf)

    @torch.no_grad()
    def continued(self, model: ModelLike, prompts: Prompts, most: int) -> list[list[int]]:
        """Greedy tokens of every prompt."""
        lm = load_model(model)
        image, text = _Stream(lm.inner, prompts), _Stream(lm.inner, prompts.without(self.span))
        stops, rows, new = stop_tokens(lm), [list[int]() for _ in prompts.ids], None
        while len(rows[0]) < most:
            seen = image.read(new)
            with own_passes(model):
                blind = text.read(new)
            for logits in (seen, blind):
                check_finite(lm, logits)
            new = self.guided(seen, blind).argmax(-1)[:, None]
            for row, token in zip(rows, new[:, 0].tolist(), strict=True):
                row.append(token)
            if all(stops & set(row) for row in rows):
                break
        return [_until(row, stops) for row in rows]


class _Stream:
    """One stream of a batch: its cache, and where its next tokens stand."""

    def __init__(self, model: Any, prompts: Prompts) -> None:
        self.model, self.prompts, self.cache = model, prompts, None
        self.mask = prompts.mask.long()
        self.behind: Any = 0  # how far the next token stands from its place, of images in several dimensions

    def read(self, new: Tensor | None) -> Tensor:
        """Logits (prompt, vocabulary) after the prompts (None), or after one more token of each."""
        inputs: dict[str, Any] = self.prompts.inputs()
        if new is not None:
            self.mask = torch.nn.functional.pad(self.mask, (0, 1), value=1)
            at = self.mask.sum(-1, keepdim=True) - 1 + self.behind
            inputs = {"input_ids": new, "attention_mask": self.mask, "past_key_values": self.cache}
            inputs["position_ids"] = at if self.prompts.placed else at.expand(3, -1, -1)
        output = self.model(**inputs, use_cache=True)
        self.cache = output.past_key_values
        if new is None and not self.prompts.placed and self.prompts.media:
            self.behind = getattr(self.model, "base_model", self.model).rope_deltas  # of the prompt that was read last
        logits: Tensor = output.logits[:, -1]
        return logits


def _until(row: list[int], stops: frozenset[int]) -> list[int]:
    """A row up to the first token that ends a text."""
    end = next((i for i, token in enumerate(row) if token in stops), len(row) - 1)
    return row[: end + 1]
