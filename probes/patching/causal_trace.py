"""Causal tracing of factual recall: where a clean state, restored in a run whose subject is noised, brings the answer
back."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import torch
from torch import Tensor

from headscope.interp.errors import HeadscopeError
from headscope.interp.models import load_model
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.registry import check_counts
from headscope.interp.runs.progress import track
from headscope.interp.statistics.spans import Span
from headscope.probes.lenses.targets import Token, token_ids
from headscope.probes.patching.activation import numbers
from headscope.probes.patching.pairs import Pairs, answer_probability, measure
from headscope.probes.patching.places import Change, Place, Places, chunks, in_turn, in_window, layers_of, put

WINDOWED = ("mlp_out", "attn_out")


def causal_trace(
    lm: LanguageModel,
    prompt: str,
    subject: Span,
    answer: Token | None = None,
    place: str = "resid_post",
    *,
    window: int | None = None,
    noise: float = 3.0,
    samples: int = 10,
    together: int = 4,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """How much of the answer's probability a clean state restores, by layer and position.

    Meng et al. 2022, "Locating and Editing Factual Associations in GPT" (arXiv 2202.05262, Section 2.1 and Appendix B):
    the embeddings of the subject's tokens get Gaussian noise of ``noise`` times sigma, and in that run the states of
    one token are set to the clean run's: the residual stream of one layer, or what MLPs (``"mlp_out"``) or attention
    (``"attn_out"``) add in a window of 10 layers around it, layers l - 5 to l + 4 as in their code. The indirect effect
    is P(answer) restored - P(answer) noised, means over ``samples`` draws that every state shares.

    What differs: sigma is the standard deviation of what enters the first layer at this subject's tokens, not that of
    all subjects of CounterFact (which is not at hand); noise is added there as well, behind GPT-2's positions.

    What it does not show: where a fact is stored. Restoring a state says that the answer can be rebuilt from it, and
    depends on the noise (Zhang and Nanda 2023), and edits elsewhere work as well (Hase et al. 2023, arXiv 2301.04213).

    Args:
        lm: load_model's result, or what load_model takes.
        subject: (first, stop), its tokens in the prompt (``prompts.spans`` finds them), special tokens counted.
        answer: a token; None: what the model says to the clean prompt.
        window: layers restored together; None: 10 for MLPs and attention, 1 for the stream.
        together: states in a pass, each with a copy of the samples.

    Returns:
        columns ``layer``, ``position``, ``token``, ``in_subject``, ``effect``; ``attrs`` hold ``clean`` and ``noised``,
        the probabilities of the answer, ``answer`` and ``unit``.

    Raises:
        HeadscopeError: no such tokens, or a place that the architecture does not have.
    """
    check_counts(1, window=window, samples=samples)
    lm = load_model(lm)
    ids: Tensor = lm.encode(prompt)["input_ids"].cpu()
    length = ids.shape[1]
    first, stop = subject
    if not 0 <= first < stop <= length:
        raise HeadscopeError(f"the prompt has tokens 0 to {length - 1}, no subject ({first}, {stop})")
    clean = Places(keep=("resid_pre", place))
    one = _alone(ids, 0, 1)
    said = measure(lm, one, ids, clean, lambda logits, _: logits.argmax(-1).float())
    target = int(said[0, 0]) if answer is None else token_ids(lm, [answer])[0]
    rows, before = _alone(ids, target, samples), min(layers_of(clean.kept, "resid_pre"))
    entering = clean.kept["resid_pre", before]
    sigma = entering[0, first:stop].float().std()
    drawn = torch.randn(samples, stop - first, entering.shape[-1], generator=torch.Generator().manual_seed(seed))
    noised = entering.repeat(samples, 1, 1)
    noised[:, first:stop] += (noise * sigma * drawn.to(sigma.device)).to(noised)
    full = numbers(measure(lm, replace(one, answers=torch.tensor([target])), ids, Places(), answer_probability)).mean()
    width = (10 if place in WINDOWED else 1) if window is None else window
    layers = layers_of(clean.kept, place)
    states: list[tuple[int | None, int]] = [(None, 0), *((layer, at) for layer in layers for at in range(length))]
    found: list[float] = []
    for some in track(chunks(states, together), "causal trace", enabled=progress):
        copies = len(some)
        changes: dict[Place, Change] = {("resid_pre", before): _instead(noised.repeat(copies, 1, 1))}
        for near in layers:
            inside = [
                (c, at) for c, (layer, at) in enumerate(some) if layer is not None and in_window(layer, near, width)
            ]
            if inside:
                given = clean.kept[place, near].expand(samples, -1, -1)
                puts = [put(given, rows.where(at), copies, [(c, None)]) for c, at in inside]
                changes[place, near] = in_turn([*([changes[place, near]] if (place, near) in changes else []), *puts])
        found += (
            numbers(measure(lm, rows, rows.clean, Places(changes), answer_probability, copies=copies)).mean(1).tolist()
        )
    low, restored = found[0], found[1:]
    words = lm.required_tokenizer().convert_ids_to_tokens(ids[0].tolist())
    frame = pd.DataFrame(
        [
            {
                "layer": layer,
                "position": at,
                "token": words[at],
                "in_subject": first <= at < stop,
                "effect": value - low,
            }
            for (layer, at), value in zip(states[1:], restored, strict=True)
        ]
    )
    frame.attrs |= {"unit": "probability", "clean": float(full), "noised": low, "answer": target}
    return frame


def _alone(ids: Tensor, answer: int, count: int) -> Pairs:
    """One prompt, so many times."""
    same, many = ids.repeat(count, 1), torch.full((count,), answer)
    return Pairs(same, same, torch.full((count,), ids.shape[1]), many, many, torch.zeros(count, dtype=torch.long))


def _instead(given: Tensor) -> Change:
    return lambda x: given.to(x)
