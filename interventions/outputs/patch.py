"""Activation patching of heads: z taken from another prompt, put at the positions that are meant in this one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.errors import HeadscopeError
from headscope.interp.models import load_model
from headscope.interp.prompts.boundary import known_boundary
from headscope.interp.results.headset import HeadSet
from headscope.interp.sites.given import ModelLike
from headscope.interp.statistics.spans import Span, by_example
from headscope.interventions.head_tables import D_HEAD, TableEdit
from headscope.interventions.outputs.measuring import Text, head_outputs
from headscope.interventions.phases import Rows, token_positions


@dataclass(frozen=True, eq=False)
class PatchHeads(TableEdit):
    """Give the outputs z of ``heads`` the values that they had in another prompt: z'[p_j] = z_source[j].

    Interchange intervention (Geiger et al. 2021, arXiv 2106.02997), activation patching (Zhang and Nanda 2023, arXiv
    2309.16042; heads' outputs as in Wang et al. 2022, arXiv 2211.00593). ``PatchHeads.from_prompt`` records the source.

    ``positions`` says where in the edited prompt the source's rows go, in their order: one span for all examples, one
    an example, or a published one by name. Every span has as many tokens as the source has rows, else the prompt is
    refused; an example without a span ([]) is left as it is. Positions count from an example's first token, so padding
    and a prefix in a cache are no matter. Rows of generated tokens are never patched. A prompt read in pieces by hand
    has to say where it ends (``prompt_boundary``); ``generate`` says it.

    Later heads and MLPs are computed anew from what is patched, so the effect is direct and indirect together (no path
    patching). What it does not show: that the heads matter in the prompt alone; the source prompt is half of the
    result. Corrupt it in the one respect that is asked about.

    Args:
        z: (layer, head, position, d_head), or (chosen head, position, d_head) in the order of ``heads``.
        length: of the source prompt in tokens, where ``positions`` are the source's own: a prompt of another length is
            refused. None: positions were mapped.
        prompt: the source's text, for the record; with it alone ``headscope intervene`` records z.
        taken: where in the source z was taken, if not at ``positions``; likewise.
    """

    z: Tensor = field()
    _: KW_ONLY
    length: int | None = None
    prompt: str = ""
    taken: Any = None

    source: ClassVar[str] = "arXiv 2106.02997, 2211.00593, 2309.16042"
    unit: ClassVar[str] = "share of z replaced"
    refused: ClassVar[Mapping[str, str]] = {"cross-attention": "it goes by positions"}
    phases: ClassVar[tuple[str, ...]] = ("always", "prefill")
    tables: ClassVar[Mapping[str, tuple[str, ...]]] = {"z": ("position", D_HEAD)}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.positions is None:
            raise HeadscopeError("PatchHeads needs positions=(first, stop), where in the prompt z goes")

    @property
    def bounded(self) -> bool:
        """It goes by the prompt's length."""
        return True

    @classmethod
    def from_prompt(
        cls,
        model: ModelLike,
        prompt: Text,
        heads: HeadSet | str | Sequence[Any],
        span: Any = None,
        *,
        to: Any = None,
        **settings: Any,
    ) -> PatchHeads:
        """The edit with z as ``prompt`` gives it now (inside ``apply``: as the edited model gives it), of all heads, so
        that ``with_heads`` patches others with their own.

        Args:
            model: load_model's result, or a bare Hugging Face model with ``prompt`` as token ids.
            prompt: a text, or token ids; special tokens as the tokenizer adds them.
            heads: those to patch.
            span: which of its tokens, one pair or several (None: all).
            to: ``positions`` in the edited prompt, as many tokens. None: those of ``span``, in prompts of equal length.
            settings: ``during`` and ``strength``.

        Raises:
            HeadscopeError: the prompt has no such tokens, or a text came with a model without tokenizer.
        """
        if named := sorted({"positions", "z", "length", "taken", "prompt"} & set(settings)):
            raise HeadscopeError(f"PatchHeads.from_prompt takes span= and to=, and measures {', '.join(named)} itself")
        lm = load_model(model)
        ids = lm.encode(prompt)["input_ids"] if isinstance(prompt, str) else torch.tensor([list(prompt)])
        length = int(ids.shape[1])
        pairs = [(0, length)] if span is None else [pair for row in by_example(span) for pair in row]
        for first, stop in pairs:
            if not 0 <= first < stop <= length:
                raise HeadscopeError(f"the source prompt has tokens 0 to {length - 1}, no span ({first}, {stop})")
        z = head_outputs(lm, ids, [at for first, stop in pairs for at in range(first, stop)])
        mapped = {"positions": to, "taken": pairs} if to is not None else {"positions": [pairs], "length": length}
        return cls(HeadSet.of(heads), z, prompt=prompt if isinstance(prompt, str) else "", **mapped, **settings)

    @classmethod
    def measured(cls, model: ModelLike, given: dict[str, Any], texts: Sequence[str]) -> dict[str, Any]:
        """For a ``prompt`` without z: z at ``taken`` of it, or at ``positions`` where they are the same (None: all)."""
        if "z" in given or "prompt" not in given or "heads" not in given:
            return {}
        span, to = given.get("taken", given.get("positions")), given.get("positions") if "taken" in given else None
        made = cls.from_prompt(model, str(given["prompt"]), given["heads"], span, to=to)
        return {name: getattr(made, name) for name in ("z", "length", "positions", "taken")}

    def rows(self, call: AttentionCall) -> Rows:
        """Those of the prompt at the positions; none in a pass over generated tokens."""
        known, offset = known_boundary(), call.mask.query_offset
        alone = offset > 0 and call.query.shape[2] == 1
        if alone if known is None else known.padded and offset >= max(known.lengths):
            return slice(0, 0)
        return super().rows(call)

    def write(self, call: AttentionCall, z: Tensor, heads: list[int]) -> Tensor:
        """The source's rows where they belong."""
        source = self.table("z", call)  # (chosen head, position, d_head)
        at = token_positions(call, "PatchHeads")
        if call.query.shape[2] > 1 or not call.mask.query_offset:
            self._check_prompts(call)
        held, row = places(by_example(self.positions), at)
        return torch.where(held[:, None, :, None], source[:, row].transpose(0, 1), z.to(source.dtype))

    def _check_prompts(self, call: AttentionCall) -> None:
        """Refuse prompts that are too short, or not as long as the source.

        Raises:
            HeadscopeError: names both lengths.
        """
        lengths, spans, count = prompt_lengths(call), by_example(self.positions), self.z.shape[-2]
        for i in range(max(len(lengths), len(spans))):
            length, pairs = lengths[i % len(lengths)], spans[i % len(spans)]
            size = sum(max(stop - first, 0) for first, stop in pairs)
            named = {at for first, stop in pairs for at in range(first, min(stop, first + count))}
            if size and (size != count or len(named) != count):
                raise HeadscopeError(f"z has {count} positions, but the spans {pairs} have {size}, or overlap")
            if self.length not in (None, length):
                raise HeadscopeError(
                    f"z was taken from a prompt of {self.length} tokens, this one has {length}: say which positions go "
                    "where with PatchHeads.from_prompt(..., span, to=positions)" + _PIECES
                )
            if named and not 0 <= min(named) <= max(named) < length:
                raise HeadscopeError(f"positions {pairs} are not all in this prompt of {length} tokens" + _PIECES)


_PIECES = "; of a prompt that is read in pieces, say where it ends with prompt_boundary"


def prompt_lengths(call: AttentionCall) -> list[int]:
    """The tokens of each example's prompt, or one number for all, without padding.

    Raises:
        HeadscopeError: a piece of a prompt whose end nobody told.
    """
    mask, known = call.mask, known_boundary()
    start = [0] if mask.start is None else mask.start.tolist()
    if known is not None and not known.padded:
        return list(known.lengths)
    if known is not None:
        stop = list(known.lengths)
    elif mask.query_offset:
        raise HeadscopeError("PatchHeads does not know where this prompt ends" + _PIECES)
    else:
        stop = [call.query.shape[2]] if mask.end is None else mask.end.clamp(max=call.query.shape[2]).tolist()
    count = max(len(start), len(stop))
    return [stop[i % len(stop)] - start[i % len(start)] for i in range(count)]


def places(spans: Sequence[Sequence[Span]], at: Tensor) -> tuple[Tensor, Tensor]:
    """Which positions ``at`` (batch or 1, query) the spans hold, bool, and each one's place in its example's: both
    (batch or 1, query)."""
    widest = max(1, *(len(pairs) for pairs in spans))
    bounds = torch.tensor([[*pairs, *[(0, 0)] * (widest - len(pairs))] for pairs in spans], device=at.device)
    first, size = bounds[..., 0], bounds[..., 1] - bounds[..., 0]  # (batch or 1, pair)
    before = size.cumsum(1) - size
    held, place = torch.zeros_like(at, dtype=torch.bool), torch.zeros_like(at)
    for k in range(widest):
        beyond = at - first[:, k, None]
        here = (beyond >= 0) & (beyond < size[:, k, None])
        held, place = held | here, torch.where(here, before[:, k, None] + beyond, place)
    return held, place
