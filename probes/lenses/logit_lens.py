"""The logit lens: what the residual stream would say at every layer, were it read there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from headscope.interp.errors import HeadscopeError
from headscope.interp.models import load_model
from headscope.interp.models.info import text_config
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.models.unembedding import final_modules
from headscope.interp.runs.provenance import provenance
from headscope.interp.sites.given import Loadable
from headscope.interp.sites.layout import output_of, stream_layers, stream_of
from headscope.interp.sites.sizes import tower_size
from headscope.probes.lenses.targets import Token, token_ids

Array = NDArray[np.float64]
Translate = Callable[[Tensor, int], Tensor]  # the stream (row, d_model) at a depth -> what the final norm is given
HELD = 1 << 25  # logits held at a time


@dataclass(frozen=True, eq=False)
class LensReading:
    """What every depth of the stream says at every position read. Depth 0 enters the first layer; depth n leaves layer
    n - 1; the last depth is the model itself.

    Attributes:
        positions: (position,) counted from the text's first token.
        entropy: (depth, position) of the lens' next-token distribution, in nats.
        kl: (depth, position) KL(model || lens), in nats: 0 at the last depth.
        top: (depth, position) the most probable token.
        log_p: (depth, position) log-probability of the target, in nats; NaN without one.
        rank: (depth, position) how many tokens are more probable than the target; -1 without one.
        target: (position,) the token asked about: the one given, or each position's next; -1 for none.
    """

    positions: NDArray[np.int64]
    entropy: Array
    kl: Array
    top: NDArray[np.int64]
    log_p: Array
    rank: NDArray[np.int64]
    target: NDArray[np.int64]
    provenance: dict[str, Any] = field(default_factory=dict)

    def to_frame(self) -> pd.DataFrame:
        """A tidy table, one row a depth and position."""
        depth, at = np.indices(self.entropy.shape)
        names = ("entropy", "kl", "top", "log_p", "rank")
        held = {name: getattr(self, name).ravel() for name in names}
        where = {"depth": depth.ravel(), "position": self.positions[at.ravel()], "target": self.target[at.ravel()]}
        return pd.DataFrame({**where, **held})


def logit_lens(
    model: Loadable,
    text: str,
    target: Token | None = None,
    *,
    positions: Sequence[int] | None = None,
    translate: Translate | None = None,
) -> LensReading:
    """Read the residual stream of one text at every depth through the final norm and the unembedding.

    nostalgebraist 2020, "interpreting GPT: the logit lens" (LessWrong): softmax(W_U N(x_l)), the final norm applied
    with the scale of x_l itself. A final softcap or factor of the model's logits (Gemma 2, Cohere, Granite) is applied
    as the model applies it, so that the last depth is the model's own distribution.

    What it does not show: what the model "believes" at a layer. Early layers may hold the answer in another basis than
    the last one's, which reads as noise here; ``TunedLens`` learns that change of basis.

    Args:
        model: load_model's result, or what it takes.
        text: one prompt.
        target: a token, an id or a string that is one; None: at each position the text's next token (the last has
            none).
        positions: from the first token, or from the end where negative; None: all. Logits are computed some rows at a
            time and never all kept.
        translate: what to do to the stream first (``TunedLens.translate``).

    Raises:
        HeadscopeError: no single norm before the unembedding; a change of logits after it that we do not know; a
            position that the text does not have.
    """
    lm = load_model(model)
    encoded = lm.encode(text)
    ids = encoded["input_ids"][0]
    at = _places(positions, len(ids))
    with streams(lm) as held:
        output = lm.model(**encoded)
    said = output.logits
    finish = _finish(lm, held[-1][0], said[0])
    if target is None:
        following = torch.cat([ids[1:].cpu(), torch.tensor([-1])])[at]
    else:
        following = torch.full((len(at),), token_ids(lm, [target])[0])
    rows = [x[0, at.to(x.device)] for x in held]
    entropy, kl, top, log_p, rank = _read(rows, finish, following, translate)
    made = provenance(lm, prompts=[text], lens="logit" if translate is None else "translated")
    return LensReading(at.numpy(), entropy, kl, top, log_p, rank, following.numpy(), made)


@contextmanager
def streams(lm: LanguageModel) -> Iterator[list[Tensor]]:
    """The stream (batch, position, d_model) at every depth of the forward pass inside the block, without gradients."""
    layers = stream_layers(lm.inner, tower_size(lm).tower)
    held: list[Tensor] = []

    def enter(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = stream_of(args, kwargs)
        assert x is not None
        held.append(x.detach())

    def leave(_: Any, args: Any, output: Any) -> None:
        x = output_of(output)
        assert x is not None
        held.append(x.detach())

    with ExitStack() as stack, torch.no_grad():
        stack.callback(layers[0].module.register_forward_pre_hook(enter, with_kwargs=True).remove)
        for layer in layers:
            stack.callback(layer.module.register_forward_hook(leave).remove)
        yield held


def final_logits(lm: LanguageModel) -> Callable[[Tensor], Tensor]:
    """From vectors (row, d_model) that the final norm is given to the logits that the model says, softcap included.

    Raises:
        HeadscopeError: as ``logit_lens``.
    """
    with streams(lm) as held:
        ids = torch.arange(1, 9, device=lm.device)[None] % lm.info.vocab_size
        said = lm.model(input_ids=ids).logits
    return _finish(lm, held[-1][0], said[0])


def _finish(lm: LanguageModel, last: Tensor, said: Tensor) -> Callable[[Tensor], Tensor]:
    norm, head = final_modules(lm)

    def read(x: Tensor) -> Tensor:
        logits: Tensor = head(norm(x.to(last)))
        return logits

    few = slice(max(0, len(last) - 8), None)
    with torch.no_grad():
        raw, own = _wide(read(last[few])), _wide(said[few]).to(last.device)
    config = text_config(lm.inner.config)
    cap = getattr(config, "final_logit_softcapping", None)
    factor = float((raw.to(own) * own).sum() / raw.to(own).pow(2).sum())
    ways: list[Callable[[Tensor], Tensor]] = [lambda x: x, lambda x: x * factor]
    if cap is not None:
        ways.append(lambda x: cap * torch.tanh(x / cap))
    room = 16 * torch.finfo(said.dtype).eps * float(own.abs().max())
    for way in ways:
        if float((way(raw).to(own) - own).abs().max()) <= room:
            return lambda x, way=way: way(_wide(read(x)))  # type: ignore[misc]
    raise HeadscopeError(
        f"{lm.name} changes its logits after the unembedding by more than a factor or a softcap that we know, or reads "
        "its stream in another way: a lens would not end at what the model says"
    )


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _places(positions: Sequence[int] | None, length: int) -> Tensor:
    wanted = list(range(length)) if positions is None else [p + length if p < 0 else p for p in positions]
    if not wanted or min(wanted) < 0 or max(wanted) >= length:
        raise HeadscopeError(f"positions {list(positions or ())} do not all exist in a text of {length} tokens")
    return torch.tensor(wanted)


@torch.no_grad()
def _read(
    rows: list[Tensor], finish: Callable[[Tensor], Tensor], target: Tensor, translate: Translate | None
) -> tuple[NDArray[Any], ...]:
    """Entropy, KL, top token, log p and rank, each (depth, position), of the stream's rows (position, d_model)."""
    size = max(1, HELD // finish(rows[-1][:1]).shape[-1])
    parts = []
    for first in range(0, len(target), size):
        part = slice(first, first + size)
        own = finish(rows[-1][part]).log_softmax(-1)
        here = []
        for depth, x in enumerate(rows):
            last = depth == len(rows) - 1
            x = x[part] if translate is None or last else translate(x[part], depth)
            here.append(_numbers(own if last else finish(x).log_softmax(-1), own, target[part]))
        parts.append([torch.stack(each).cpu() for each in zip(*here, strict=True)])
    entropy, kl, top, log_p, rank = (torch.cat(each, 1) for each in zip(*parts, strict=True))
    return entropy.double().numpy(), kl.double().numpy(), top.numpy(), log_p.double().numpy(), rank.numpy()


def _numbers(lens: Tensor, own: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """Of log-probabilities (row, vocabulary) of the lens and of the model itself."""
    p, target = lens.exp(), target.to(lens.device)
    none = target < 0
    said = lens.gather(-1, target.clamp(min=0)[:, None])
    kl = torch.nan_to_num(own.exp() * (own - lens.to(own)), nan=0.0).sum(-1)
    rank = (lens > said).sum(-1).masked_fill(none, -1)
    return -torch.special.xlogy(p, p).sum(-1), kl, lens.argmax(-1), said[:, 0].masked_fill(none, torch.nan), rank
