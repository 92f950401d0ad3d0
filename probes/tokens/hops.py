"""Attention-hop paths: where and in which order concepts of a prompt rise in the stream, and how they lean on each
other, as one score."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headscope.interp.errors import HeadscopeError
from headscope.interp.models import load_model
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.models.placement import fetched
from headscope.interp.models.unembedding import final_modules
from headscope.probes.lenses.logit_lens import final_logits, streams
from headscope.probes.lenses.targets import token_ids

Array = NDArray[np.float64]
Definition = Literal["paper", "code", "lens"]
WEIGHTS = {"order": 0.4, "activation": 0.4, "causal": 0.2, "gap": 0.05, "final": 0.2}


@dataclass(frozen=True, eq=False)
class Concepts:
    """What a prompt's concepts do in one model.

    Attributes:
        names: of the concepts, ``ids`` their tokens.
        activation: (layer, position, concept) what the stream says of the concept, as ``concept_activations`` says.
        effect: (concept, concept) how much less a second concept is said where the token at the first one's peak is
            replaced, as ``concept_effects`` says.
    """

    names: tuple[str, ...]
    ids: tuple[int, ...]
    activation: Array
    effect: Array

    def peak(self, concept: int) -> tuple[int, int, float]:
        """Layer, position and size of a concept's largest activation; a size of 0: it is nowhere."""
        own = self.activation[:, :, concept]
        layer, position = np.unravel_index(int(own.argmax()), own.shape)
        return int(layer), int(position), float(own.max())


@dataclass(frozen=True)
class HopPath:
    """Concepts in an order, the (layer, position) of each one's peak, the path's ``score``, and what it is made of."""

    concepts: tuple[str, ...]
    peaks: tuple[tuple[int, int], ...]
    score: float
    parts: dict[str, float]


def concept_ids(lm: LanguageModel, concepts: Sequence[str]) -> tuple[int, ...]:
    """A concept's token: " c" where that is one, else "c" where that is, else the first piece of "c", as the authors'
    code picks it (concept_extraction.py)."""
    found = []
    for concept in concepts:
        spaced, plain = (
            lm.required_tokenizer()(text, add_special_tokens=False)["input_ids"] for text in (f" {concept}", concept)
        )
        if not plain:
            raise HeadscopeError(f"concept {concept!r} has no token: name a word")
        found.append(int(spaced[0] if len(spaced) == 1 else plain[0]))
    return tuple(found)


def concept_activations(lm: LanguageModel, prompt: str, ids: Sequence[int], definition: Definition = "paper") -> Array:
    """(layer, position, concept): what the stream behind each layer says of each, and 0 for less than 0.

    ``"paper"``: W_U h of the raw stream, without the final norm: a logit, which paper and code call a probability.
    ``"code"``: the same above 0.001, and nothing at the first token, so that positions count from the second.
    ``"lens"`` [OURS]: the probability that the logit lens gives, final norm and softmax included, for which the score's
    constants have a meaning. Where the first token's stream is hundreds of times as long as others, as in SmolLM2,
    every raw logit peaks there; early layers say the prompt's own tokens by either definition.
    """
    _check(definition)
    with streams(lm) as held, torch.no_grad():
        lm.model(**lm.encode(prompt))
    index = list(ids)
    if definition == "lens":
        read = final_logits(lm)
        with torch.no_grad():
            said: Array = np.stack([read(x[0]).softmax(-1)[:, index].double().cpu().numpy() for x in held[1:]])
        return said
    with fetched(final_modules(lm)[1]) as head, torch.no_grad():
        assert isinstance(head.weight, Tensor)
        rows = head.weight[index].detach().float()
        found = np.stack([(x[0].float().to(rows.device) @ rows.T).double().cpu().numpy() for x in held[1:]])
    if definition == "code":
        found = np.where(found > 0.001, found, 0.0)[:, 1:]
    positive: Array = np.maximum(found, 0.0)
    return positive


def concept_effects(
    lm: LanguageModel,
    prompt: str,
    ids: Sequence[int],
    positions: Sequence[int],
    replacement: int,
    definition: Definition = "paper",
) -> Array:
    """(concept, concept): what replacing the token at the first one's position takes from the second, at the end.

    ``"paper"`` and ``"lens"``: the difference of probabilities, softmax over the vocabulary. ``"code"``: of logits. Its
    replacements come from a fixed list (Dallas for Chicago, plus for minus), which no date matches, so that its effects
    on dates are all 0; ``replacement`` is one token for all, whatever the definition [OURS].
    """
    _check(definition)
    encoded = lm.encode(prompt)
    changed = encoded["input_ids"].repeat(1 + len(positions), 1)
    for row, position in enumerate(positions, 1):
        changed[row, position] = replacement
    with torch.no_grad():
        logits = lm.model(input_ids=changed).logits[:, -1].double()
    said = (logits.softmax(-1) if definition != "code" else logits)[:, list(ids)].cpu().numpy()
    effect: Array = said[0] - said[1:]
    return effect


def score_path(found: Concepts, order: Sequence[int], definition: Definition = "paper") -> HopPath:
    """The score of concepts in an order.

    Bhatia, Peyrard & Zhao 2025, "Date Fragments" (arXiv 2505.16088, Appendix A.2): S = a S_order + b S_activation + c
    S_causal - e S_gap + k S_final, with S_order = 0.7 [positions ascend] + 0.3 [layers ascend], S_activation = min(mean
    peak / 0.2, 1), S_gap = max(0, 1 - 0.1 mean gap of layers), S_final the last concept's peak. S_causal is the
    weighted mean of the links' effects, weights 0.5 to 1 along the path, times 0.5 + 0.5 rho, rho the share of links
    with a positive effect [OURS: the paper names it no further]. Their weights are not printed: those of the code, 0.4,
    0.4, 0.2, 0.05, 0.2, serve both [OURS].

    ``"code"`` (reasoning_analysis.py of gagan3012/llm-thought-tracing @ eff662f): S_gap is added, not subtracted, all
    is divided by the sum of the weights, a link's effect is weighted twice, and a missing link (no positive effect) is
    replaced by one from an earlier concept, over the distance. Its optional term for attention is left out. ``"lens"``:
    the paper's score of other activations.

    What it does not show: that the model reasons along the path; a raw logit of a middle layer is no belief.
    """
    _check(definition)
    peaks = [found.peak(concept) for concept in order]
    names = tuple(found.names[concept] for concept in order)
    where = tuple((layer, position) for layer, position, _ in peaks)
    layers, positions = (np.array([peak[i] for peak in peaks]) for i in (0, 1))
    size = np.array([peak[2] for peak in peaks])
    if (size <= 0).any():  # a path that misses a concept scores 0
        return HopPath(names, where, 0.0, {})
    gap = float(np.abs(np.diff(layers)).mean()) if len(order) > 1 else 0.0
    parts = {
        "order": 0.7 * bool((np.diff(positions) >= 0).all()) + 0.3 * bool((np.diff(layers) >= 0).all()),
        "activation": min(float(size.mean()) / 0.2, 1.0),
        "causal": _causal(found.effect, order, definition),
        "gap": max(0.0, 1 - 0.1 * gap),
        "final": float(size[-1]),
    }
    sign = {} if definition == "code" else {"gap": -1.0}
    score = sum(WEIGHTS[name] * sign.get(name, 1.0) * value for name, value in parts.items())
    return HopPath(names, where, score / (sum(WEIGHTS.values()) if definition == "code" else 1.0), parts)


def hop_paths(
    lm: LanguageModel,
    prompt: str,
    concepts: Sequence[str],
    answers: Sequence[str] = (),
    *,
    definition: Definition = "paper",
    replacement: str = " the",
) -> list[HopPath]:
    """Every order of ``concepts``, each followed by one of ``answers`` (if any), best first.

    Args:
        concepts: up to 6, such as the fragments of a date.
        answers: what the path ends with, such as "yes" and "no".
        replacement: one token, put in a concept's place to see what leans on it.

    Raises:
        HeadscopeError: no concepts or more than 6, or a replacement that is several tokens.
    """
    lm = load_model(lm)
    _check(definition)
    if not 0 < len(concepts) <= 6:
        raise HeadscopeError(f"give 1 to 6 concepts, whose orders are tried, not {len(concepts)}")
    names = (*concepts, *answers)
    ids, (blank,) = concept_ids(lm, names), token_ids(lm, [replacement])
    shown = concept_activations(lm, prompt, ids, definition)
    found = Concepts(names, ids, shown, np.zeros((len(ids), len(ids))))
    first = int(definition == "code")  # its positions begin at the second token
    at = [found.peak(i)[1] + first for i in range(len(ids))]
    found = Concepts(names, ids, shown, concept_effects(lm, prompt, ids, at, int(blank), definition))
    ends: list[tuple[int, ...]] = [(len(concepts) + i,) for i in range(len(answers))] or [()]
    orders = [(*some, *end) for some in itertools.permutations(range(len(concepts))) for end in ends]
    return sorted((score_path(found, order, definition) for order in orders), key=lambda path: -path.score)


def _causal(effect: Array, order: Sequence[int], definition: Definition) -> float:
    links = np.array([effect[a, b] for a, b in itertools.pairwise(order)])
    if not len(links):
        return 0.0
    weights = np.linspace(0.5, 1.0, len(links))
    rho = float((links > 0).mean())
    if definition != "code":
        return float((weights * links).sum() / weights.sum()) * (0.5 + 0.5 * rho)
    for j in range(1, len(order)):
        earlier: list[Any] = [effect[order[i], order[j]] / (j - i) for i in range(j - 1)]
        if links[j - 1] <= 0 and max(earlier, default=0.0) > 0:
            links[j - 1] = max(earlier)
    return float((weights * weights * links).sum() / weights.sum()) * (0.5 + 0.5 * rho)


def _check(definition: str) -> None:
    if definition not in get_args(Definition):
        raise HeadscopeError(f"definition is 'paper', 'code' or 'lens', not {definition!r:.40}")
