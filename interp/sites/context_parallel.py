"""Context parallelism: one long text shared out over processes, every one of which reads two runs of its tokens.

Everything but attention works token by token, so that a process needs the residual stream of its own tokens alone; the
keys and values of one layer at a time are gathered from all (``headscope.interp.attention.split_rows``). Llama 3's
training does it so (Grattafiori et al. 2024, arXiv 2407.21783, 3.3.2); ring attention (Liu et al. 2023, arXiv
2310.01889) passes them on instead, which holds less of one layer and computes the same.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from headscope.interp.attention.handler import Handler
from headscope.interp.attention.split_rows import SplitRows
from headscope.interp.attention.whole import Group, Shares, gather, require_same
from headscope.interp.errors import HeadscopeError
from headscope.interp.sites import attached, is_attached, verify_once
from headscope.interp.sites.given import ModelLike, PreTrained
from headscope.interp.sites.huggingface.parallel import tensor_mesh
from headscope.interp.sites.huggingface.route import is_paused
from headscope.interp.sites.huggingface.state import Route
from headscope.interp.sites.huggingface.untraced import APART
from headscope.interp.sites.interrupts import block
from headscope.interp.sites.unwrap import bare_model, model_device, origin, takes

_TAKEN = {"input_ids", "attention_mask", "position_ids", "use_cache", "logits_to_keep", "return_dict"}
_BY_LENGTH = ("dynamic", "longrope")  # rotary embeddings whose frequencies depend on the largest position of a pass
_SHARP = 1e-4  # of the largest value: float32 sums in another order are within 1e-5 of it (tests/interp/parallel)
_JOINED = ("logits", "last_hidden_state")


@block
def context_parallel(model: ModelLike, group: Group = None) -> Iterator[None]:
    """Inside the block each process of ``group`` (all, by default) reads its share of the tokens of every text.

    Every process makes the same calls with the same whole texts, and has the same whole record and the same logits:

        with context_parallel(lm), trace(lm, "entropy", queries=Last(64)) as tracer:
            lm.forward(ids, logits=1)

    A process holds the activations of its tokens, and one layer's keys and values. Of 2n runs of one length process i
    reads runs i and 2n - 1 - i, so that under a causal mask all processes work alike (3.3.2 of the paper above).
    What an edit or a statistic reads beyond the reductions of a ``Request`` (z as a whole, block maps) is gathered, and
    then takes every process what it takes one.

    What is within it must be the same in every process: edits, statistics, and the order of passes. Enter it before
    ``trace`` and ``apply``.

    Args:
        model: load_model's result or a Hugging Face model, whole on every process.
        group: processes of ``torch.distributed``, which must have been started (``torchrun``) and initialised.

    Raises:
        HeadscopeError: no processes; a model that mixes tokens outside attention, as a short text then shows (in half
            precision a faint mixture does not show), or whose positions depend on the text's length; a trace or edits
            that are in force already; and, of a pass, padding, a ready-made mask, packed texts, a cache, gradients of
            edits, hidden states, and texts that differ between processes.
    """
    inner = bare_model(model)
    _check(model, inner)
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    verify_once(model)
    before = vars(inner).get("forward")
    with attached(model, _Everywhere(), verify=False) as route:
        if any(handler.inner.streams for handler in route.handlers):
            raise _no_stream(inner)
        try:
            inner.forward = _Shared(inner, inner.forward, route, group, rank, size).wrapped()
            _prove(inner)
            yield
        finally:
            route.rows = None
            if before is None:
                vars(inner).pop("forward", None)
            else:
                inner.forward = before


class _Everywhere(Handler):
    """Changes nothing, in every layer: no layer may attend to its own process's tokens alone."""


def _check(model: ModelLike, inner: PreTrained) -> None:
    kind = type(inner).__name__
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() < 2:
        raise HeadscopeError(
            "context_parallel shares a text out over processes, and this is one: start the program with torchrun and "
            "call torch.distributed.init_process_group first"
        )
    if origin(model) or getattr(inner.config, "is_encoder_decoder", False) or not takes(inner, "position_ids"):
        raise HeadscopeError(
            f"{kind} cannot be shared out over processes by tokens: give a Hugging Face model that reads one text and "
            "takes position_ids"
        )
    if tensor_mesh(inner) is not None:
        raise HeadscopeError(f"{kind} is under tensor parallelism (tp_size); use that or context_parallel, not both")
    if hasattr(inner.forward, "headscope_shared"):
        raise HeadscopeError(f"{kind} is in a context_parallel block already; leave that one first")
    if is_attached(model):
        raise HeadscopeError(f"{kind} is traced or edited already: enter context_parallel first, then trace and apply")
    for named in _rope_types(getattr(inner.config.get_text_config(), "rope_parameters", None)):
        if named in _BY_LENGTH:
            raise HeadscopeError(
                f"{kind} has {named!r} rotary embeddings, whose frequencies depend on the length that a process sees: "
                "trace it on one process"
            )
    if any(isinstance(part, nn.Conv1d) and part.kernel_size[0] > 1 for part in inner.modules()):
        raise _mixes(inner)


def _rope_types(given: Any) -> Iterator[str]:
    """The kinds of rotary embeddings in a configuration's ``rope_parameters``, of one kind of layer each or of all."""
    if isinstance(given, dict):
        yield str(given.get("rope_type", "default"))
        for part in given.values():
            yield from _rope_types(part)


def _mixes(inner: PreTrained, apart: str = "it has convolutions over tokens") -> HeadscopeError:
    return HeadscopeError(
        f"{type(inner).__name__} cannot be shared out over processes ({apart}): something beside softmax attention "
        "mixes its tokens; trace it on one process"
    )


def _no_stream(inner: PreTrained) -> HeadscopeError:
    return HeadscopeError(
        f"a process holds the residual stream of {type(inner).__name__} for its own tokens alone inside "
        "context_parallel; read or edit the stream on one process"
    )


class _Shared:
    """The forward pass of a model on this process's share of the tokens."""

    def __init__(
        self, model: PreTrained, forward: Callable[..., Any], route: Route, group: Group, rank: int, size: int
    ) -> None:
        self.model, self.forward, self.route = model, forward, route
        self.group, self.rank, self.size = group, rank, size

    def wrapped(self) -> Callable[..., Any]:
        """In place of the model's own ``forward``, with its signature."""

        @functools.wraps(self.forward)
        def forward(*args: Any, **kwargs: Any) -> Any:
            given = inspect.signature(self.forward).bind(*args, **kwargs).arguments
            given |= given.pop("kwargs", {})
            return self(**{name: value for name, value in given.items() if value is not None})

        forward.headscope_shared = True  # type: ignore[attr-defined]
        return forward

    def __call__(self, **given: Any) -> Any:
        if is_paused(self.model):  # a pass of our own, which no handler sees: every process reads all of it
            return self.forward(**given)
        wanted = given.pop("return_dict", getattr(self.model.config, "return_dict", True))
        ids, positions, keep = self._texts(given)
        if ids.shape[1] < 2 * self.size:
            return self.forward(**given, **({} if wanted else {"return_dict": False}))
        split = SplitRows(self.group, self.rank, _sizes(ids.shape[1], 2 * self.size))
        shares = split.shares
        kept = Shares.paired(_last_of(split.sizes, keep)) if keep else shares
        options: dict[str, Any] = {} if wanted else {"return_dict": True}
        if takes(self.model, "use_cache"):
            options["use_cache"] = False
        if keep:
            options["logits_to_keep"] = max(1, kept.sizes[self.rank])
        mine, at = (shares.of(x, 1, self.rank) for x in (ids, positions))
        if takes(self.model, "attention_mask"):  # without one transformers takes a gap in positions for two texts
            options["attention_mask"] = torch.ones_like(mine)
        self.route.rows = split
        try:
            output = self.forward(input_ids=mine, position_ids=at, **options)
        finally:
            self.route.rows = None
        for name in _JOINED:
            x = getattr(output, name, None)
            if isinstance(x, Tensor):
                held = kept if name == "logits" else shares  # the last rows of a process are those of its later run
                setattr(output, name, gather(x[:, x.shape[1] - held.sizes[self.rank] :], 1, held, self.group))
        return output if wanted else output.to_tuple()

    def _texts(self, given: dict[str, Any]) -> tuple[Tensor, Tensor, int]:
        """Token ids and positions (text, token) of a pass, and how many logits are kept: the same on every process.

        Raises:
            HeadscopeError: padding, a cache, another input or other texts on other processes.
        """
        more = [name for name, value in given.items() if name not in _TAKEN and value is not False]
        for name in ("output_hidden_states", "output_attentions"):
            more += [f"config.{name}"] if getattr(self.model.config, name, False) and name not in more else []
        ids, mask, keep = given.get("input_ids"), given.get("attention_mask"), given.get("logits_to_keep", 0)
        if more or ids is None or given.get("use_cache") is True and "past_key_values" in given:
            raise HeadscopeError(
                f"a pass inside context_parallel takes whole texts as input_ids, not {', '.join(more) or 'a cache'}; "
                "leave that out, or run it on one process (so does generation, whose cache would be in parts)"
            )
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2 and bool(mask.all())):
            raise HeadscopeError(
                "texts inside context_parallel are of one length, without padding and without a ready-made mask; give "
                "one at a time"
            )
        if isinstance(keep, bool) or not isinstance(keep, int) or keep < 0:
            raise HeadscopeError(f"logits_to_keep inside context_parallel is a number of last tokens, not {keep!r}")
        positions = given.get("position_ids", torch.arange(ids.shape[1], device=ids.device)[None])
        positions = positions.expand(ids.shape[0], -1)
        if bool((positions.diff(dim=1) != 1).any()):
            raise HeadscopeError(
                "position_ids inside context_parallel go up by one: packed texts, or a gap, are one process's to read"
            )
        require_same(self.group, ids, positions, torch.tensor([keep]), of="the processes of context_parallel")
        return ids, positions, keep


def _sizes(tokens: int, runs: int) -> tuple[int, ...]:
    """Tokens of each run: of one length, the first ones longer by one where it does not come out even."""
    return tuple(tokens // runs + (run < tokens % runs) for run in range(runs))


def _last_of(sizes: tuple[int, ...], keep: int) -> tuple[int, ...]:
    """How many of the last ``keep`` positions each run holds."""
    left = min(keep, sum(sizes))
    found = []
    for size in reversed(sizes):
        found.append(min(size, left))
        left -= found[-1]
    return tuple(reversed(found))


def _prove(model: PreTrained) -> None:
    """Hold a short text's output to that of one process.

    Raises:
        HeadscopeError: they differ: something beside attention mixes tokens (a recurrence, a convolution).
    """
    shared: Any = model.forward
    tokens = 8 * dist.get_world_size() + 1
    vocabulary = int(model.config.get_text_config().vocab_size)
    ids = torch.randint(3, vocabulary, (1, tokens), generator=torch.Generator().manual_seed(0)).to(model_device(model))
    with torch.no_grad():
        parts = _logits(shared(input_ids=ids))
        whole = _logits(shared.__wrapped__(input_ids=ids, use_cache=False))
    apart = float((parts.float() - whole.float()).abs().max())
    bound = _SHARP if whole.dtype in (torch.float32, torch.float64) else APART
    if not apart <= bound * max(1.0, float(whole.float().abs().max())):
        raise _mixes(model, f"its output is another by {apart:.2g} then")


def _logits(output: Any) -> Tensor:
    found: Tensor = next(x for name in _JOINED if isinstance(x := getattr(output, name, None), Tensor))
    return found
