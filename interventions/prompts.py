"""The prompts of a pass as inputs of their own, whole or without a span: what edits read that are made for each prompt.

Rows are packed to the right, so that the last column is every prompt's last token, whatever the padding was.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from headscope.interp.errors import HeadscopeError
from headscope.interp.prompts.boundary import known_boundary
from headscope.interp.sites.before import before_passes, real_tokens
from headscope.interp.sites.given import ModelLike
from headscope.interp.sites.inputs import media_tokens
from headscope.interp.sites.unwrap import bare_model, takes
from headscope.interp.statistics.spans import members

# of a pass, not of its prompts
_OF_PASS = ("past_key_values", "use_cache", "cache_position", "position_ids", "labels", "logits_to_keep", "return_dict")


@dataclass(frozen=True, eq=False)
class Prompts:
    """Prompts as a model reads them: token ``ids`` and ``mask`` (prompt, position), padded on the left.

    ``tables`` is what else has a value a token; ``media`` what does not (pictures), and ``media_ids`` the tokens where
    these stand; ``placed``: whether positions are given with them, or the model makes its own (of images, in several
    dimensions)."""

    ids: Tensor
    mask: Tensor
    tables: dict[str, Tensor]
    media: dict[str, Any]
    media_ids: tuple[int, ...]
    placed: bool

    @classmethod
    def of(cls, model: ModelLike, inputs: dict[str, Any], who: str) -> Prompts | None:
        """The prompts that a pass on these inputs begins with; None where it continues a cache.

        Raises:
            HeadscopeError: ``who`` is told inputs without token ids, or a prompt in several passes.
        """
        if _filled(inputs.get("past_key_values")):
            return None
        inner = bare_model(model)
        ids = inputs.get("input_ids")
        if ids is None:
            raise HeadscopeError(f"{who} reads the prompt before the model does: give token ids, not embeddings")
        real = real_tokens(inputs.get("attention_mask"), ids)
        rest = {name: x for name, x in inputs.items() if name not in (*_OF_PASS, "input_ids", "attention_mask")}
        tables = {name: x for name, x in rest.items() if isinstance(x, Tensor) and x.shape[:2] == ids.shape}
        media = {name: x for name, x in rest.items() if name not in tables and isinstance(x, Tensor | Mapping)}
        tokens = tuple(sorted(set(media_tokens(inner.config).values())))
        placed = takes(inner, "position_ids") and not hasattr(getattr(inner, "base_model", inner), "get_rope_index")
        return cls(ids, real, tables, media, tokens, placed)._kept(_of_prompt(real, who))

    def without(self, span: Any) -> Prompts:
        """The prompts with the tokens of a span taken out: what follows moves up, and pictures go with their tokens.

        Raises:
            HeadscopeError: a prompt without such tokens or of nothing else; a span that holds some pictures and leaves
                others, whose inputs nobody can part.
        """
        at = torch.where(self.mask, self.mask.cumsum(-1) - 1, -1)
        gone = members(span, at, len(self.ids)) & self.mask
        if not bool((gone.any(-1) & (self.mask & ~gone).any(-1)).all()):
            raise HeadscopeError(f"every prompt needs tokens in the span {str(span)!r:.60} and tokens beside it")
        pictured = torch.isin(self.ids, torch.tensor(self.media_ids, device=self.ids.device)) & self.mask
        left, taken = bool((pictured & ~gone).any()), bool((pictured & gone).any())
        if left and taken and self.media:
            raise HeadscopeError("the span holds some of the prompts' pictures and not others; take out all, or none")
        return replace(self, media={} if taken else self.media)._kept(self.mask & ~gone)

    def beside(self, other: Prompts) -> Prompts:
        """These prompts and ``other``, the same with less of each, as one batch, these first."""
        width = max(self.ids.shape[1], other.ids.shape[1])
        one, two = self._padded(width), other._padded(width)
        media = {name: _twice(x) if name in other.media else x for name, x in self.media.items()}
        tables = {name: torch.cat([x, two.tables[name]]) for name, x in one.tables.items()}
        ids, mask = torch.cat([one.ids, two.ids]), torch.cat([one.mask, two.mask])
        return replace(self, ids=ids, mask=mask, tables=tables, media=media)

    def inputs(self) -> dict[str, Any]:
        """What ``model(**inputs)`` takes."""
        own: dict[str, Any] = {"input_ids": self.ids, "attention_mask": self.mask.long(), **self.tables, **self.media}
        if self.placed or not self.media:
            at = (self.mask.cumsum(-1) - 1).clamp(min=0)
            own["position_ids"] = at if self.placed else at.expand(3, -1, -1)
        return own

    def one(self, index: int) -> dict[str, Any]:
        """What the model takes of one prompt, without padding.

        Raises:
            HeadscopeError: pictures of several prompts that are not one each.
        """
        count, real = len(self.ids), self.mask[index]
        shared = [x for x in self.media.values() if not isinstance(x, Tensor) or len(x) != count]
        if shared and count > 1:
            raise HeadscopeError("nobody can part the pictures of these prompts: give one picture each, or one prompt")
        media = {name: x[index : index + 1] if count > 1 else x for name, x in self.media.items()}
        tables = {name: x[index : index + 1, real] for name, x in self.tables.items()}
        ids = self.ids[index : index + 1, real]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **tables, **media}

    def _kept(self, keep: Tensor) -> Prompts:
        """The tokens ``keep`` alone, packed to the right."""
        width = int(keep.sum(-1).max())
        order = keep.int().argsort(dim=1, stable=True)[:, keep.shape[1] - width :]
        mask = keep.gather(1, order)
        tables = {}
        for name, x in self.tables.items():
            at = order.reshape(*order.shape, *[1] * (x.dim() - 2)).expand(*order.shape, *x.shape[2:])
            tables[name] = x.gather(1, at) * mask.reshape(*order.shape, *[1] * (x.dim() - 2)).to(x.dtype)
        plain = next(i for i in range(len(self.media_ids) + 1) if i not in self.media_ids)
        return replace(self, ids=torch.where(mask, self.ids.gather(1, order), plain), mask=mask, tables=tables)

    def _padded(self, width: int) -> Prompts:
        """The same in more columns."""
        more = width - self.ids.shape[1]
        plain = next(i for i in range(len(self.media_ids) + 1) if i not in self.media_ids)
        pad = torch.nn.functional.pad
        tables = {name: pad(x, (*[0] * 2 * (x.dim() - 2), more, 0)) for name, x in self.tables.items()}
        return replace(self, ids=pad(self.ids, (more, 0), value=plain), mask=pad(self.mask, (more, 0)), tables=tables)


class ReadsPrompts:
    """The first base of edits that are made anew for each prompt: before the model reads one, ``read`` is given it, and
    may run passes of its own."""

    name: str

    @contextmanager
    def around(self, model: ModelLike) -> Iterator[None]:
        """Inside the block every prompt is read before the model reads it."""
        if self.neutral:  # type: ignore[attr-defined]
            yield
            return

        def before(inputs: dict[str, Any]) -> None:
            prompts = Prompts.of(model, inputs, self.name)
            if prompts is not None:
                self.read(model, prompts)

        with before_passes(model, before, self.name):
            yield

    def read(self, model: ModelLike, prompts: Prompts) -> None:
        """Find what these prompts ask for, and hold it until the next ones."""
        raise NotImplementedError


def next_positions(model: ModelLike, mask: Tensor, count: int) -> Tensor:
    """Where the last ``count`` tokens of ``mask`` (prompt, position) stand, which continue a cache; in a model that
    places images in several dimensions, behind the prompt that it read last."""
    at = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, mask.shape[1] - count :]
    inner: Any = bare_model(model)
    holder = getattr(inner, "base_model", inner)
    if not hasattr(holder, "get_rope_index"):
        return at
    behind = getattr(holder, "rope_deltas", None)
    return (at if behind is None else at + behind.to(at.device)).expand(3, -1, -1)


def held_for(found: Tensor | None, batch: int, who: str) -> Tensor:
    """What was found of each prompt, (prompt, ...), for a pass over ``batch`` examples.

    Raises:
        HeadscopeError: nothing was, or of another number of prompts.
    """
    if found is None or len(found) != batch:
        raise HeadscopeError(
            f"{who} saw another prompt than the one that this pass continues (read before the block, or by a part of "
            "the model): read each prompt inside the block, by the whole model, one after the other"
        )
    return found


def _twice(media: Any) -> Any:
    """Pictures, or what a vision tower made of them, for two rows of prompts with the same ones."""
    if isinstance(media, Tensor):
        return torch.cat([media, media])
    if isinstance(media, list | tuple):
        return [*media, *media]
    if isinstance(media, Mapping):
        made = {name: _twice(x) for name, x in media.items()}
        return made if type(media) is dict else type(media)(**made)
    return media


def _filled(cache: Any) -> bool:
    return cache is not None and (not hasattr(cache, "get_seq_length") or int(cache.get_seq_length()) > 0)


def _of_prompt(real: Tensor, who: str) -> Tensor:
    """Which real tokens of a pass are the prompts', (prompt, position).

    Raises:
        HeadscopeError: not all of a prompt is there.
    """
    known = known_boundary()
    if known is None:
        return real
    if len(known.lengths) not in (1, len(real)):
        raise HeadscopeError(f"the boundaries of {len(known.lengths)} prompts are given, but the batch has {len(real)}")
    ends = torch.tensor(known.lengths, device=real.device).expand(len(real))
    count = torch.arange(1, real.shape[1] + 1, device=real.device).expand_as(real) if known.padded else real.cumsum(-1)
    if bool((count[:, -1] < ends).any()):
        raise HeadscopeError(f"{who} reads a prompt whole, and this one comes in several passes: read it in one")
    return real & (count <= ends[:, None])
