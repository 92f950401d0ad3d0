"""Weights that are no softmax of the scores: w = f(score), with and without a row's sum divided out."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from headscope.interp.laboratory.variants.base import Variant
from headscope.kernels.score_edits import ScoreEdit

LEAST = 1e-30  # stands for a weight of 0, whose logarithm has no gradient


class Weights(Variant):
    """Base of the variants whose weights w >= 0 are a function of the score: a subclass writes ``log_weight``.

    w / sum w is exactly the softmax of log w, which is how the layer attends. Without normalisation (``normed`` False)
    z is that times the row's total, z = (sum_j w_j) sum_j (w_j / sum w) v_j. What is traced is then the normalised
    share, as in the metric of Gu et al. 2024; it does not show how much a row reads in all, which no longer is 1. An
    edit changes the shares and leaves the total.
    """

    normed: ClassVar[bool] = True

    def log_weight(self, score: Tensor, head: Tensor) -> Tensor:
        """log w of scores (element by element); ``head`` broadcasts to them."""
        raise NotImplementedError

    def mix(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        edit = ScoreEdit(lambda s, b, h, i, j: self.log_weight(s, h))
        z = self.see(q, k, v, edit)
        return z if self.normed else z * self.totals(q, k, edit)

    def totals(self, q: Tensor, k: Tensor, edit: ScoreEdit) -> Tensor:
        """The row totals sum_j w_j (batch, head, query, 1), of ``edit``'s log w, from a dense map."""
        return self.scores(q, k, edit).exp().sum(-1, keepdim=True)
