"""Kinds of heads by how far sparse patterns move their outputs: MInference's search, output form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.attention.handler import Handler
from headscope.interp.cache.budget import Budget
from headscope.interp.cache.classes import Candidate, best_patterns, columns_and_slashes, stream
from headscope.interp.cache.reading import Reading
from headscope.interp.cache.rows.block_sparse import BlockSparse
from headscope.interp.errors import HeadscopeError
from headscope.interp.models import load_model
from headscope.interp.results.minference import HeadPatterns
from headscope.interp.runs.progress import track
from headscope.interp.sites import attached
from headscope.interp.sites.given import Loadable
from headscope.interp.sweeps.batches import Prompts
from headscope.kernels.kept import Keep, differing
from headscope.kernels.request import Reduced, Request

MINFERENCE_OUTPUT: tuple[Candidate, ...] = (
    stream(100, 800),
    *(
        columns_and_slashes(*sizes)
        for sizes in ((30, 800), (100, 800), (100, 750), (500, 700), (3500, 100), (1000, 4096))
    ),
    (("block_sparse", 10, 1), BlockSparse(block=64), Budget(keys=6400)),
)


class _Differing(Handler):
    """Counts, at every layer's call of one text, the entries of heads' outputs that candidates change."""

    only_reads = True

    def __init__(self, candidates: Sequence[Candidate], above: float, scaled: bool) -> None:
        self.candidates, self.above, self.scaled = candidates, above, scaled
        self.counts: dict[int, Tensor] = {}  # (candidate, head)

    def request(self, call: AttentionCall) -> Request:
        """The lse of the rows, in the layer's own pass."""
        return Request(lse=True)

    def observe(self, call: AttentionCall, reduced: Reduced) -> None:
        """One layer's counts."""
        stop = torch.full((1,), call.query.shape[2], device=call.query.device)
        reading = Reading(call if self.scaled else call.with_(scale=1.0), stop)
        keeps: list[Keep] = [policy.keeps(reading, [budget])[0] for _, policy, budget in self.candidates]
        found = differing(call.inputs(), call.value, keeps, self.above, lse=reduced.lse)
        self.counts[call.layer] = torch.stack([one[0].double().sum(-1) for one in found]).cpu()


def search_patterns_by_output(
    lm: Loadable,
    prompts: Any,
    *,
    candidates: Sequence[Candidate] = MINFERENCE_OUTPUT,
    above: float = 5e-3,
    scaled: bool = False,
    progress: bool = True,
) -> HeadPatterns:
    """The sparse pattern that changes fewest entries of each head's output: MInference's classes, output form.

    ``search_pattern_v2`` of Jiang et al. 2024 (arXiv 2407.02490; ``minference_forward.py:229-276`` @ fb56c917): a
    candidate's score is the number of entries (row, dimension) of the head's output that are off by more than
    ``above``, the lowest is the head's, the first of equals. They read one text; the mean over several is taken here. A
    number that depends on the size of values is no share: compare candidates within a head. What differs: distances are
    those that were chosen, where their kernel takes blocks of 64 x 64, and their block-sparse pattern is listed as
    (10, 1), though it takes 100 blocks.

    Args:
        lm: load_model's result, or what load_model takes.
        prompts: texts, or sequences of token ids.
        candidates: the authors' eight.
        above: how far an entry is off.
        scaled: columns and distances are estimated from the model's own pattern; False, as in their code, from one
            whose scores are not scaled. Outputs are the model's own either way.

    Raises:
        HeadscopeError: no candidate, or a model that cannot be traced exactly.
    """
    if not candidates:
        raise HeadscopeError("give at least one candidate pattern")
    lm = load_model(lm)
    given = Prompts(lm, prompts)
    score = np.full((len(given), len(candidates), lm.info.layers, lm.info.heads), np.nan)
    for i in track(range(len(given)), "patterns", enabled=progress):
        handler = _Differing(candidates, above, scaled)
        with attached(lm, handler), torch.no_grad():
            lm.forward(given.batch([i])["input_ids"], logits=1)
        for layer, counts in handler.counts.items():
            score[i, :, layer, : counts.shape[1]] = counts.numpy()
    return best_patterns(score.mean(0), [name for name, _, _ in candidates], lowest=True)
