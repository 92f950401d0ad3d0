"""The tokens whose logits are asked about, and the direction of the residual stream that raises them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from headscope.interp.errors import HeadscopeError
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.models.placement import fetched
from headscope.probes.paths.norms import FrozenNorm
from headscope.probes.paths.rows import Rows
from headscope.probes.paths.writers import LayerPath, Paths

Token = str | int


def token_ids(lm: LanguageModel, tokens: Sequence[Token]) -> list[int]:
    """Ids of tokens given as ids or as strings.

    Raises:
        HeadscopeError: a string that is several tokens.
    """
    found = []
    for token in tokens:
        tokenizer = None if isinstance(token, int) else lm.required_tokenizer()
        ids = [token] if tokenizer is None else tokenizer(token, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise HeadscopeError(f"{token!r} is {len(ids)} tokens of {lm.name}: name one token, or give its id")
        found.append(int(ids[0]))
    return found


def target_pairs(
    lm: LanguageModel, texts: Sequence[str], targets: Sequence[Token], against: Sequence[Token] | None
) -> list[tuple[int, ...]]:
    """(target,) or (target, other) of every text.

    Raises:
        HeadscopeError: not one target a text, or a target that is several tokens.
    """
    wanted = [token_ids(lm, tokens) for tokens in (targets, against) if tokens is not None]
    if not texts or any(len(ids) != len(texts) for ids in wanted):
        raise HeadscopeError(f"give one target token a text: {len(texts)} texts, {len(targets)} targets")
    return list(zip(*wanted, strict=True))


def unembedded(paths: Paths, pairs: Sequence[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
    """Rows of the unembedding (text, d_model), a target's less the other's, and of its bias (text,), in float32."""
    with fetched(paths.unembedding) as head:
        weight, bias = head.weight, getattr(head, "bias", None)
        assert isinstance(weight, Tensor)
        wide = torch.promote_types(weight.dtype, torch.float32)

        def of(table: Tensor) -> Tensor:
            first, *other = ([pair[i] for pair in pairs] for i in range(len(pairs[0])))
            row = table.detach()[first].to(wide)
            return row - table.detach()[other[0]].to(wide) if other else row

        u = of(weight)
        return u, of(bias) if isinstance(bias, Tensor) else u.new_zeros(len(pairs))


def in_stream(paths: Paths, found: Rows, u: Tensor) -> tuple[Tensor, Tensor]:
    """``u`` (text, d_model) behind the final norm as a direction of the stream at the first of the ``found`` rows, the
    norm's scale frozen, and what the norm's shift gives (text,)."""
    x = found.last[:, :1]
    norm = FrozenNorm.of(paths.norm, x)
    u = u.to(x.device)
    return norm.back(u[:, None], norm.scale(x))[:, 0], (norm.shift.reshape(-1) * u).sum(-1)


def before_heads(path: LayerPath, found: Rows, direction: Tensor) -> tuple[Tensor, Tensor]:
    """A stream's ``direction`` (text, d_model) as one of each head's z (text, head, d_value), the scale of a norm after
    attention frozen, and the share of what attention adds beside its heads (text,): biases, a norm's shift."""
    writer, width = path.attention, found.z[path.layer].shape[-1]
    assert writer is not None
    beside = torch.zeros(len(direction), dtype=direction.dtype, device=direction.device)
    if writer.norm is not None:
        x = found.mixed[path.layer][:, :1]
        norm = FrozenNorm.of(writer.norm, x)
        beside = (norm.shift.reshape(-1) * direction.to(x.device)).sum(-1)
        direction = norm.back(direction[:, None].to(x.device), norm.scale(x))[:, 0]
    beside = beside + (writer.bias(width).to(direction.device) * direction).sum(-1)
    return writer.back(direction, width).reshape(len(direction), path.heads, -1), beside
