"""What heads give on reference texts: means and samples of z, for ablations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from headscope.interp.errors import HeadscopeError
from headscope.interp.models import load_model
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.sites.given import ModelLike
from headscope.interp.statistics import HeadOutput
from headscope.interp.tracing.recording import trace
from headscope.interventions.applying import size

Text = str | Sequence[int]


def head_outputs(lm: LanguageModel, ids: Tensor, positions: Sequence[int]) -> Tensor:
    """The heads' outputs at ``positions`` of one text, float32 (layer, head, position, d_head); layers without
    attention have zeros. ``ids`` (1, length)."""
    with trace(lm, [HeadOutput(tuple(positions))]) as tracer:
        lm.forward(ids, logits=1)
    z = tracer.record["z"].isel(example=0).transpose("layer", "head", "position", "d_head")
    found = torch.zeros(size(lm)[0], *z.shape[1:])
    found[z["layer"].to_numpy().tolist()] = torch.from_numpy(z.to_numpy().astype("float32"))
    return found


def head_means(model: ModelLike, texts: Sequence[Text], *, tokenizer: Any = None) -> Tensor:
    """Each head's mean output over every token of ``texts``: float32 (layer, head, d_head), for mean ablation.

    Layers without attention have zeros.

    Args:
        model: load_model's result, or a bare Hugging Face model (with ``tokenizer``, unless texts are token ids).
        texts: strings, or token ids.

    Raises:
        HeadscopeError: no text, or a text for a model without tokenizer.
    """
    lm = load_model(model, tokenizer=tokenizer)
    total, count = torch.zeros(()), 0
    for ids in _read(lm, texts, "head_means"):
        length = ids.shape[1]
        total = total + head_outputs(lm, ids, range(length)).double().sum(2)
        count += length
    return (total / count).float()


def head_samples(
    model: ModelLike, texts: Sequence[Text], *, samples: int = 64, seed: int = 0, tokenizer: Any = None
) -> Tensor:
    """Each head's output at ``samples`` tokens of ``texts``, drawn once for all heads: float32 (layer, head, sample,
    d_head), for resample ablation. Layers without attention have zeros.

    Tokens are drawn without replacement and evenly among the texts, the first of each text left out (as a sink its z
    is unlike the others'); fewer are given where the texts hold fewer.

    Args:
        model: load_model's result, or a bare Hugging Face model (with ``tokenizer``, unless texts are token ids).
        texts: strings, or token ids: other texts than those that the ablated model is asked about.
        samples: how many; a sample takes layers x heads x d_head numbers.
        seed: of the draw.

    Raises:
        HeadscopeError: no text, a text for a model without tokenizer, or no text of two tokens.
    """
    if samples < 1:
        raise HeadscopeError(f"head_samples needs at least one sample, not {samples}")
    lm = load_model(model, tokenizer=tokenizer)
    read = list(_read(lm, texts, "head_samples"))
    generator = torch.Generator().manual_seed(seed)
    drawn = [(1 + torch.randperm(max(ids.shape[1] - 1, 0), generator=generator)).tolist() for ids in read]
    shares = _shares([len(one) for one in drawn], samples)
    found = [head_outputs(lm, ids, sorted(one[:n])) for ids, one, n in zip(read, drawn, shares, strict=True) if n]
    if not found:
        raise HeadscopeError("head_samples leaves out every text's first token, and these texts have no other")
    return torch.cat(found, 2)


def _read(lm: LanguageModel, texts: Sequence[Text], who: str) -> Iterator[Tensor]:
    if isinstance(texts, str) or not len(texts):
        raise HeadscopeError(f"{who} needs at least one text as a list")
    if not all(len(text) for text in texts):
        raise HeadscopeError(f"{who} was given an empty text; leave it out")
    for text in texts:
        yield lm.encode([text])["input_ids"] if isinstance(text, str) else torch.tensor([list(text)], device=lm.device)


def _shares(sizes: Sequence[int], wanted: int) -> list[int]:
    """How many to take of each, so that they are ``wanted`` together, as evenly as the sizes allow."""
    taken = [0] * len(sizes)
    for _ in range(min(wanted, sum(sizes))):
        open_ones = [i for i, size in enumerate(sizes) if taken[i] < size]
        taken[min(open_ones, key=lambda i: taken[i])] += 1
    return taken
