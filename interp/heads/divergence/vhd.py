"""Vision-aware head divergence: how far a head's output moves when the picture is taken away."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from headscope.interp.heads.base import HeadMethod
from headscope.interp.heads.divergence.context_divergence import OutputDivergence
from headscope.interp.heads.vision.chats import ChatMethod
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts.vision import VisionPrompt


@dataclass(frozen=True, kw_only=True)
class VisionHeadDivergence(OutputDivergence, ChatMethod):
    """Score heads by the distance between their outputs with the picture and without it (VHD).

    He et al. 2025, "Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence" (arXiv 2412.13949,
    Eq. 4 to 7): the Euclidean norm of z with the picture minus z without, z (d_head) at the prompt's last position,
    which chooses the first generated token, before the output projection. The picture's tokens are taken out, not
    masked, so that positions close up. No code of theirs is to be had. ``zero_outliers``: a head's divergence is 0
    where it exceeds its layer's mean + standard deviation and so does the squared norm of its z without the picture,
    n - 1 in the deviation [OURS]; the paper chooses heads after that rule, by ``above_median`` of each layer.
    ``provenance["t_vhd"]``, where ``k`` is given: the mean of T-VHD, the sum over layers of the ``k`` largest
    divergences, before any zeroing [OURS: the paper does not say k].

    What it does not show: that the head uses what is seen: without the picture all later positions move and its
    attention goes elsewhere. z has another size in every layer and model: compare ranks, not values.
    """

    name: ClassVar[str] = "vhd"
    tests: ClassVar[str] = "heads/vision/test_methods.py"
    reproduced: ClassVar[str] = (
        "two untraced eager runs in float64, with the picture's tokens and without, of tiny models of nine families"
    )
    not_reproduced: ClassVar[str] = "the paper's models and CHAIR rates; no code of the authors is to be had"

    span: str = "image"

    def made(self, lm: LanguageModel) -> list[VisionPrompt]:
        """The chats of ``data``."""
        return [one.prompt for one in self.looks(lm)]

    def parameters(self, lm: LanguageModel) -> dict[str, Any]:
        return {**HeadMethod.parameters(self, lm), "prompts": self.digest(lm), "data": None}

    def summary(self, details: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {} if self.k is None else {"t_vhd": float(np.mean([one["t_vhd"] for one in details]))}
