"""Copying heads: what they look at, they say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from headscope.interp.attention.call import AttentionCall
from headscope.interp.attention.handler import Handler
from headscope.interp.attention.stream import StreamCall
from headscope.interp.errors import HeadscopeError
from headscope.interp.heads.base import HeadMethod, Scored
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.models.projections import output_projections
from headscope.interp.models.unembedding import to_logits
from headscope.interp.prompts import sequences
from headscope.interp.prompts.sequences import Sample
from headscope.interp.prompts.tokens import bos_tokens, check_length
from headscope.interp.runs.journal import Trial
from headscope.interp.sites import attached
from headscope.interp.sites.layout import stream_layers
from headscope.interp.sites.sizes import tower_size
from headscope.interp.sites.unwrap import bare_model
from headscope.interp.statistics import Resid
from headscope.interp.tracing.recording import trace
from headscope.kernels.request import Reduced, Request


@dataclass(frozen=True, kw_only=True)
class Copying(HeadMethod):
    """Score heads by the share of tokens that they would name if they looked at nothing else: induction's copying half.

    The copying score of Wang et al. 2022, "Interpretability in the Wild" (arXiv 2211.00593, section 3.2), of what a
    head's OV matrix writes: the residual stream at a token after the first layer goes through the head's values and its
    part of the output projection (without that one's bias), then through the final norm and the unembedding; the token
    counts if it is itself among the ``top`` logits. The paper asks this of the names in its prompts and finds above
    95 % for name movers and below 20 % for the average head; here of random tokens, behind BOS [OURS], as
    ``induction`` reads: a head that scores high in both matches prefixes and copies what follows. Every layer, the
    first too, is given the same stream, behind its own norm.

    What it does not show: that the head ever looks at such a token, what it writes in context (the stream that it reads
    there is a later one), or copying that later layers carry out. The authors of the induction heads' own copying
    measure (arXiv 2209.11895) count how far logits are raised; that is another one.

    Args:
        length: random tokens in a sequence, all different.
        samples: sequences, each from a seed of its own; each is a trial.
        top: among how many of the highest logits the token has to be.
        bos: put the tokenizer's BOS token, if it has one, before the tokens (it is not scored).
    """

    name: ClassVar[str] = "copying"
    unit: ClassVar[str] = "share of tokens"
    range: ClassVar[tuple[float, float] | None] = (0.0, 1.0)
    source: ClassVar[str] = "arXiv 2211.00593"
    tests: ClassVar[str] = "heads/test_copying.py"
    reproduced: ClassVar[str] = (
        "the share of tokens named by the OV path against the model's own modules; a hand-made head copies, "
        "another names one token always; SmolLM2's induction heads copy more than twice as often as the mean "
        "head"
    )
    not_reproduced: ClassVar[str] = (
        "names in IOI prompts of GPT-2 small (above 95 % for name movers): no such weights without a hub"
    )

    length: int = 25
    samples: int = 4
    top: int = 5
    bos: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top < 1:
            raise HeadscopeError(f"top={self.top}: a token is among 1 logit or more")

    @property
    def resample_by(self) -> str | None:
        return "sample"

    def trials(self, lm: LanguageModel) -> Sequence[Trial]:
        return [sample.trial for sample in self._samples(lm)]

    def tokens(self, lm: LanguageModel, trial: Trial) -> tuple[int, int]:
        return 2 * (self.length + len(self._prefix(lm))), 0  # it is read twice

    def score(self, lm: LanguageModel, trial: Trial) -> Scored:
        words, prefix = self._samples(lm)[trial["sample"]].ids, self._prefix(lm)
        ids = torch.cat([torch.tensor(prefix).long(), words])[None]
        projections, logits = _projections(lm), to_logits(lm)
        place = Resid("resid_post", tuple(range(ids.shape[1])))
        with trace(lm, [place]) as tracer:
            lm.forward(ids, logits=1, cache=False)
        read = _Values(torch.from_numpy(tracer.record["resid_post"].sel(layer=0).to_numpy()))
        with attached(lm, read):
            lm.forward(ids, logits=1, cache=False)
        scores = np.full((lm.info.layers, lm.info.heads), np.nan)
        for layer, values in read.values.items():
            written = _written(projections[layer], values[0, :, len(prefix) :])
            scores[layer] = [_named(logits(one), words, self.top) for one in written]
        return scores, {"tokens": len(words)}

    def _prefix(self, lm: LanguageModel) -> list[int]:
        return bos_tokens(lm) if self.bos else []

    def _samples(self, lm: LanguageModel) -> list[Sample]:
        check_length(lm, self.length + len(self._prefix(lm)))
        return sequences.random_samples(lm, self.length, self.samples, self.seed)


class _Values(Handler):
    """Gives every layer the stream ``x`` (batch, position, d_model) to read, and keeps each query head's values."""

    streams = ("resid_pre",)

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self.values: dict[int, Tensor] = {}

    def stream(self, call: StreamCall) -> Tensor:
        return self.x.to(call.x.device, call.x.dtype).expand_as(call.x)

    def request(self, call: AttentionCall) -> Request | None:
        return Request(output=False)

    def observe(self, call: AttentionCall, reduced: Reduced) -> None:
        group = call.query.shape[1] // call.value.shape[1]
        self.values[call.layer] = call.value.detach().repeat_interleave(group, dim=1)


def _projections(lm: LanguageModel) -> list[nn.Module]:
    """Each layer's output projection.

    Raises:
        HeadscopeError: something stands between a projection and the residual stream.
    """
    model = bare_model(lm)
    modules = dict(model.named_modules())
    found = [modules[leaf] for leaf in output_projections(lm).values()]
    layers = stream_layers(model, tower_size(lm).tower)
    carriers = frozenset[nn.Module]().union(*(layer.carriers for layer in layers))
    if len(found) != lm.info.layers or not carriers.issuperset(found):
        raise HeadscopeError(
            f"{lm.name} does not add every layer's heads to the residual stream as they are (a norm or a factor comes "
            "between): what a head would write by itself is not defined here"
        )
    return found


def _written(projection: nn.Module, values: Tensor) -> Tensor:
    """What each head alone writes, (head, position, d_model), of values (head, position, d_value); no bias."""
    heads, count, width = values.shape
    alone = values.new_zeros(heads, count, heads, width)
    index = torch.arange(heads, device=values.device)
    alone[index, :, index] = values
    x = alone.flatten(2)  # heads side by side, as the projection reads them
    with torch.no_grad():
        found: Tensor = projection(x) - projection(torch.zeros_like(x[:1, :1]))
    return found


def _named(logits: Tensor, words: Tensor, top: int) -> float:
    """The share of positions whose own token is among the ``top`` of logits (position, vocabulary).

    Raises:
        HeadscopeError: logits that are not numbers.
    """
    if not bool(logits.isfinite().all()):
        raise HeadscopeError("what a head writes gives logits that are not numbers: check the model's weights")
    own = logits.gather(1, words.to(logits.device)[:, None])
    found: NDArray[np.bool_] = ((logits > own).sum(-1) < top).cpu().numpy()
    return float(found.mean())
