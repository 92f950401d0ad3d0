"""Direct logit attribution: how much each head writes, straight, towards a next token.

A head's output reaches the residual stream as W_O z, and the residual stream the logits through the final norm and the
unembedding. With the norm's scale frozen at what the whole residual stream made it (the usual linearisation, Elhage et
al. 2021, "A Mathematical Framework for Transformer Circuits"; nostalgebraist's logit lens), logits are a sum over
everything that was written, and a head's share is w . N(W_O z): w the token's unembedding row, N the norm with its
gain and centring, without its shift. What a head does through later layers is not in it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from headscope.interp.errors import HeadscopeError
from headscope.interp.models import load_model
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.models.placement import fetched
from headscope.interp.models.projections import output_projections
from headscope.interp.results.scores import HeadScores
from headscope.interp.runs.progress import track
from headscope.interp.runs.provenance import provenance
from headscope.interp.sites.compiled import uncompiled
from headscope.interp.sites.layout import stream_layers
from headscope.interp.sites.sizes import tower_size
from headscope.interp.sites.unwrap import takes
from headscope.interp.statistics import HeadOutput
from headscope.interp.tracing.recording import trace

Token = str | int
Seen = dict[nn.Module, tuple[Tensor, Tensor]]  # what went in, what came out


@dataclass(frozen=True, eq=False)
class _Path:
    """The way from the heads to the logits: one projection a layer, the final norm, the unembedding."""

    projections: list[nn.Module]
    norm: nn.Module
    unembedding: nn.Module
    device: torch.device
    dtype: torch.dtype

    def tokens(self, ids: Sequence[int]) -> Tensor:
        """The unembedding's rows (token, d_model), float32."""
        with fetched(self.unembedding) as head:
            weight: Any = head.weight
            rows: Tensor = weight.detach()[ids].float()
        return rows


def logit_attribution(
    lm: LanguageModel,
    texts: Sequence[str],
    targets: Sequence[Token],
    against: Sequence[Token] | None = None,
    *,
    batch_size: int = 16,
    progress: bool = True,
) -> HeadScores:
    """Each head's direct contribution to the logit of ``targets`` (minus that of ``against``) after each text.

    Args:
        lm: load_model's result, or what load_model takes.
        texts: prompts, read at their last token.
        targets: one token a text, an id or a string that is exactly one token (mind its leading space).
        against: tokens to compare with, as many; the difference cancels what raises all logits alike.

    Returns:
        Scores in units of logits (before a final softcap); a trial is a text.

    Raises:
        HeadscopeError: a target is not one token; or the model does not add W_O z to its residual stream (a norm or a
            factor in between, as in Gemma 2 and 3), so that heads have no direct share of the logits in this sense.
    """
    lm = load_model(lm)
    wanted = [_ids(lm, tokens) for tokens in (targets, against) if tokens is not None]
    if not texts or any(len(ids) != len(texts) for ids in wanted):
        raise HeadscopeError(f"give one target token a text: {len(texts)} texts, {len(targets)} targets")
    path = _find_path(lm)
    rows = path.tokens(wanted[0])
    rows = rows - path.tokens(wanted[1]) if against is not None else rows
    parts = [slice(first, first + batch_size) for first in range(0, len(texts), batch_size)]
    found = [_attribute(lm, path, texts[part], rows[part]) for part in track(parts, "logits", enabled=progress)]
    details = tuple({"example": i, "target": ids} for i, ids in enumerate(zip(*wanted, strict=True)))
    made = provenance(lm, prompts=texts, against=against is not None) | {"unit": "logits"}
    return HeadScores("logit_attribution", np.concatenate(found), made, None, details)


def _ids(lm: LanguageModel, tokens: Sequence[Token]) -> list[int]:
    found = []
    for token in tokens:
        tokenizer = None if isinstance(token, int) else lm.required_tokenizer()
        ids = [token] if tokenizer is None else tokenizer(token, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise HeadscopeError(f"{token!r} is {len(ids)} tokens of {lm.name}: name one token, or give its id")
        found.append(int(ids[0]))
    return found


def _attribute(lm: LanguageModel, path: _Path, texts: Sequence[str], rows: Tensor) -> NDArray[np.float64]:
    """Contributions (example, layer, head) towards the vocabulary rows (example, d_model)."""
    last: list[Tensor] = []
    ends = lm.encode(texts)["attention_mask"].sum(dim=1) - 1

    def keep(_: nn.Module, args: tuple[Any, ...]) -> None:
        last.append(args[0][torch.arange(len(texts), device=args[0].device), ends.to(args[0].device)])

    options = {"use_cache": False} if takes(lm.inner, "use_cache") else {}
    with trace(lm, [HeadOutput((-1,))]) as tracer:
        hook = path.norm.register_forward_pre_hook(keep)  # after trace has verified the model on inputs of its own
        try:
            lm(texts, **options)
        finally:
            hook.remove()
    z = torch.from_numpy(tracer.record["z"].to_numpy()[:, :, :, 0])
    shares = []
    with torch.no_grad():
        for layer, projection in enumerate(path.projections):
            written = _written(projection, z[:, layer], path)
            shares.append((_normed(path.norm, written, last[0]) * rows[:, None].to(last[0].device)).sum(-1).cpu())
    return torch.stack(shares, dim=1).double().numpy()


def _written(projection: nn.Module, z: Tensor, path: _Path) -> Tensor:
    """W_O z of every head by itself (example, head, d_model), from z (example, head, d_head); no bias."""
    count, heads, width = z.shape
    alone = torch.zeros(count, heads, heads, width)
    index = torch.arange(heads)
    alone[:, index, index] = z
    device = next(projection.parameters()).device
    x = alone.reshape(count, heads, heads * width).to(path.device if device.type == "meta" else device, path.dtype)
    written: Tensor = projection(x) - projection(torch.zeros_like(x[:1, :1]))
    return written.float()


def _normed(norm: nn.Module, written: Tensor, residual: Tensor) -> Tensor:
    """The norm's linear part at the scale it has on ``residual`` (example, d_model), applied to ``written``.

    A norm is shift + gain * (x or x - mean) / scale(x), and does not change where x is stretched. Its linear part is
    read off by feeding x stretched far above the norm's epsilon: no name or formula of a norm is assumed.
    """
    dtype = residual.dtype
    zero, flat = torch.zeros_like(residual[:1]), torch.ones_like(residual[:1])
    shift = norm(zero).float()
    centred = bool((norm(flat).float() - shift).abs().max() < 1e-3)

    def size(x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True) if centred else x
        return x.pow(2).mean(-1, keepdim=True).sqrt().clamp(min=1e-30)

    def direction(x: Tensor) -> Tensor:
        pointed: Tensor = norm((x * (1e3 / size(x))).to(dtype)).float() - shift
        return pointed

    whole = residual.float()
    far = direction(whole)
    shrink: Tensor = ((norm(residual).float() - shift) * far).sum(-1, keepdim=True) / far.pow(2).sum(-1, keepdim=True)
    written = written.to(whole.device)
    return direction(written) * size(written) * (shrink / size(whole))[:, None]


def _find_path(lm: LanguageModel) -> _Path:
    """Find the modules by watching one forward of four tokens, and check that heads add to the residual stream."""
    model = lm.inner
    names = output_projections(lm)
    head = lm.inner.get_output_embeddings()
    with uncompiled(), _watching(model) as seen, torch.no_grad():
        ids = torch.arange(1, 5, device=lm.device)[None] % lm.info.vocab_size
        model(input_ids=ids)
    if head is None or head not in seen:
        raise HeadscopeError(f"{lm.name} has no output embedding, so it has no logits to attribute")
    layers = stream_layers(model, tower_size(lm).tower)
    carriers = frozenset[nn.Module]().union(*(layer.carriers for layer in layers))
    modules = dict(model.named_modules())
    projections = [_whole(modules, attention, leaf, seen) for attention, leaf in names.items()]
    for attention, projection in zip(names, projections, strict=True):
        if projection not in carriers:
            raise HeadscopeError(
                f"{lm.name}: {attention} does not add its heads' outputs to the residual stream as they are (a norm or "
                "a factor comes between): direct logit attribution is not defined here; ablate heads instead"
            )
    stream = seen[layers[-1].module][1]
    norms = [m for m, (_, out) in seen.items() if _is_last(m, out, head, seen)]
    if len(norms) != 1 or not _close(seen[norms[0]][0], stream, stream):
        raise HeadscopeError(f"{lm.name}: no single norm stands between the last layer and the logits")
    return _Path(projections, norms[0], head, lm.device, lm.inner.dtype)


def _whole(modules: dict[str, nn.Module], attention: str, leaf: str, seen: Seen) -> nn.Module:
    """The outermost module of an attention module that reads what the projection ``leaf`` reads, and is linear in it.

    That is the projection itself or what stands around it: under LoRA the sum of ``base_layer`` and the adapter.
    """
    found, name = modules[leaf], leaf.rpartition(".")[0]
    while name.startswith(f"{attention}."):
        around = modules[name]
        if around not in seen or not torch.equal(seen[around][0], seen[found][0]) or not _linear(around, seen):
            break
        found, name = around, name.rpartition(".")[0]
    return found


def _linear(module: nn.Module, seen: Seen) -> bool:
    x, out = seen[module]
    with torch.no_grad():
        shift = module(torch.zeros_like(x))
        return _close(module(2 * x) - shift, 2 * (out - shift), out)


def _is_last(module: nn.Module, out: Tensor, head: nn.Module, seen: Seen) -> bool:
    """Whether a leaf gives what the unembedding reads."""
    leaf = not any(module.children()) and module is not head and not isinstance(module, nn.Dropout | nn.Identity)
    return leaf and out.shape == seen[head][0].shape and torch.equal(out, seen[head][0])


def _close(a: Tensor, b: Tensor, reference: Tensor) -> bool:
    return a.shape == b.shape and bool((a.float() - b.float()).norm() <= 0.02 * reference.float().norm())


@contextlib.contextmanager
def _watching(model: nn.Module) -> Iterator[Seen]:
    """What went into and came out of every module (batch, query, ·) in the forward passes inside the block."""
    seen: Seen = {}

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        into = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.ndim == 3), None)
        out = output[0] if isinstance(output, tuple) else output
        if into is not None and isinstance(out, Tensor) and out.ndim == 3:
            seen[module] = (into, out)

    hooks = [module.register_forward_hook(look, with_kwargs=True) for module in model.modules()]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
