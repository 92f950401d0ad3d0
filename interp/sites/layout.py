"""Where a tower's layers read and write the residual stream, found by watching one short forward pass.

In a layer, module outputs w are taken one after the other where stream + w is what a later module reads, or what leaves
the layer; or two at once in a layer that adds attention and MLP together (GPT-NeoX, Phi). No name is assumed. A layer
where what is written does not add up (a factor or a norm on the stream, as in Granite or BERT) has no writers.

Two sums of the same terms differ by their roundings: at most 4 eps times the sum of the terms' sizes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from headscope.interp.errors import HeadscopeError
from headscope.interp.sites.compiled import uncompiled
from headscope.interp.sites.given import PreTrained
from headscope.interp.sites.huggingface.prompt import prompt
from headscope.interp.sites.huggingface.route import paused
from headscope.interp.sites.inputs import example_inputs
from headscope.interp.sites.sizes import attending
from headscope.interp.sites.towers import numbered, parse_name, selects, tower_of

SHORT = 12  # tokens of the pass that is watched


@dataclass(frozen=True, eq=False)
class StreamLayer:
    """One layer: its ``module``, the last module that holds each thing written, and every module that gives what
    attention writes (``carriers``). ``in_turn``: attention writes first, and the next part reads the stream after it.
    """

    layer: int
    module: nn.Module
    pattern: str
    writers: Mapping[str, nn.Module] = field(default_factory=dict)
    carriers: frozenset[nn.Module] = frozenset()
    in_turn: bool = False


_KNOWN: WeakKeyDictionary[nn.Module, dict[str, tuple[int, list[StreamLayer]]]] = WeakKeyDictionary()


def stream_layers(model: PreTrained, tower: str) -> list[StreamLayer]:
    """A tower's layers in order, attending or not, each with its writers.

    Raises:
        HeadscopeError: no layers stand one behind the other there, or they run on none of our inputs.
    """
    count = sum(1 for _ in model.modules())
    held = _KNOWN.setdefault(model, {})
    if tower not in held or held[tower][0] != count:
        modules = _modules(model, tower)
        held[tower] = count, _watched(model, modules)
    return held[tower][1]


def _modules(model: nn.Module, tower: str) -> dict[int, tuple[nn.Module, str]]:
    """The layers' modules by index: the outermost numbered module around each attention module, and its neighbours."""
    mine = {where for where in attending(model) if "*" in where and selects(tower, where, model)}
    places = [(name, where, layer) for name, _, where, layer in numbered(model) if where in mine]
    found: dict[str, int] = {}
    for name, where, layer in places:
        parts = name.split(".")
        above = [".".join(parts[: i + 1]) for i, part in enumerate(parts) if part.isdigit()]
        alike = [other for other, place, _ in places if place == where]
        path = next(at for at in above if sum(other.startswith(at + ".") for other in alike) == 1)
        found.setdefault(path, layer)
    lists = {path.rpartition(".")[0] for path in found}
    named = dict(model.named_modules())
    if len(lists) == 1:
        base = lists.pop()
        found = {f"{base}.{i}": i for i in range(len(list(named[base].children())))}
    return {
        layer: (named[path], parse_name(path, None)[0]) for path, layer in sorted(found.items(), key=lambda x: x[1])
    }


@dataclass(eq=False)
class _Event:
    module: nn.Module
    start: int
    end: int
    into: Tensor
    out: Tensor


class _Watch:
    """Sees the modules of one layer after the other run, and reads off its writers when it ends."""

    def __init__(self, model: nn.Module, modules: Mapping[int, tuple[nn.Module, str]]) -> None:
        self.layers = {module: (layer, pattern) for layer, (module, pattern) in modules.items()}
        self.attention = {
            module: "cross_attn_out" if tower_of(where, model) == "cross" else "attn_out"
            for _, module, where, layer in numbered(model)
            if layer in attending(model).get(where, {})
        }
        self.found: dict[int, StreamLayer] = {}
        self._clock, self._starts = itertools.count(), dict[nn.Module, int]()
        self._events: list[_Event] = []

    def begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._starts[module] = next(self._clock)
        if module in self.layers:
            self._events = []

    def end(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        into, out = stream_of(args, kwargs), output_of(output)
        if into is None or out is None:
            return
        event = _Event(module, self._starts[module], next(self._clock), into, out)
        if module not in self.layers:
            self._events.append(event)
            return
        layer, pattern = self.layers[module]
        if layer in self.found:
            raise HeadscopeError(f"layer {layer} of {pattern} runs more than once in a forward pass")
        self.found[layer] = self._read(event, layer, pattern)

    def _read(self, whole: _Event, layer: int, pattern: str) -> StreamLayer:
        calls = [event.module for event in self._events]
        events = [e for e in self._events if calls.count(e.module) == 1 and bool(e.out.any())]
        writes, in_turn = _in_turn(events, whole), True
        if not writes:
            writes, in_turn = _at_once(events, whole), False
        writers: dict[str, nn.Module] = {}
        after = whole.start
        for write in writes:
            inside = [e for e in self._events if e.module in self.attention and after < e.start and e.end <= write.end]
            last = write is writes[-1] and len(writes) > 1
            what = self.attention[inside[-1].module] if inside else "mlp_out" if last else ""
            if what:
                writers[what] = write.module
            after = write.end if in_turn else max(after, write.start)
        first = writes[0].module if writes else None
        in_turn = in_turn and len(writes) > 1 and first is writers.get("attn_out")
        heads = [w for w in writes if w.module is writers.get("attn_out")]
        carriers = frozenset(e.module for e in events for w in heads if _same(e.out, w.out))
        return StreamLayer(layer, whole.module, pattern, writers, carriers, in_turn)


def _in_turn(events: Sequence[_Event], whole: _Event) -> list[_Event]:
    """What is written one after the other; nothing where it does not add up to what leaves the layer."""
    stream, after = whole.into, whole.start
    writes: list[_Event] = []
    while True:
        ready = [e for e in events if e.end > after and e.out.shape == stream.shape]
        final = [e for e in ready if _adds(whole.out, stream, e.out)]
        if final:
            return [*writes, final[-1]]
        read = [
            (e, f) for e in ready for f in events if f.start > e.end and _adds(f.into, stream, e.out)
        ]  # (what is written, who reads the stream after it)
        if not read:
            return []
        by = min(f.start for _, f in read)
        write, reader = max((pair for pair in read if pair[1].start == by), key=lambda pair: pair[0].end)
        writes.append(write)
        stream, after = reader.into, write.end


def _at_once(events: Sequence[_Event], whole: _Event) -> list[_Event]:
    """Two parts that are added to the stream together, in the order in which they ended."""
    fits = [e for e in events if e.out.shape == whole.into.shape]
    rest = _wide(whole.out) - _wide(whole.into)
    for second in reversed(fits):
        for first in reversed(fits):
            if first.end < second.start and _close(rest, _wide(first.out) + _wide(second.out), whole.into, whole.out):
                if _adds(whole.out, whole.into, first.out, second.out):
                    return [first, second]
    return []


def _adds(total: Tensor, *terms: Tensor) -> bool:
    """Whether ``terms`` sum to ``total`` up to rounding."""
    if any(term.shape != total.shape for term in terms):
        return False
    zero = torch.zeros_like(_wide(total))
    sizes = sum((_wide(term).abs() for term in terms), zero)
    added = sum((_wide(term) for term in terms), zero)
    eps = max(torch.finfo(x.dtype).eps for x in (total, *terms))
    return bool(((_wide(total) - added).abs() <= 4 * eps * sizes).all())


def _wide(x: Tensor) -> Tensor:
    """In float32, or wider where it is: rounding a float64 stream to float32 is far more than its own eps."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _close(a: Tensor, b: Tensor, *scale: Tensor) -> bool:
    """A quick look at one row, before all of them are added up."""
    size = sum(float(x[0, -1].float().abs().amax()) for x in scale)
    return float((a[0, -1] - b[0, -1]).abs().amax()) <= 0.1 * size + 1e-6


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


def stream_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """What a module is given of the stream (batch, position, d_model)."""
    given = (*args[:1], kwargs.get("hidden_states"), *args[1:], *kwargs.values())
    return next((x for x in given if isinstance(x, Tensor) and x.dim() == 3 and x.is_floating_point()), None)


def output_of(output: Any) -> Tensor | None:
    """What a module gives to the stream."""
    out = output[0] if isinstance(output, tuple | list) and output else output
    return out if isinstance(out, Tensor) and out.dim() == 3 and out.is_floating_point() else None


def _watched(model: PreTrained, modules: Mapping[int, tuple[nn.Module, str]]) -> list[StreamLayer]:
    failure: Exception | None = None
    for give in (_text, example_inputs) if modules else ():
        watch = _Watch(model, modules)
        try:
            inputs = give(model)
            with _watching(watch), paused(model), uncompiled(), torch.no_grad():
                model(**inputs)
        except (HeadscopeError, RuntimeError, TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
            failure = error
            continue
        if watch.found:
            return [watch.found[layer] for layer in sorted(watch.found)]
    why = f": {str(failure).splitlines()[0][:120]}" if failure is not None and str(failure) else ""
    raise HeadscopeError(
        f"{type(model).__name__} shows no layers with a residual stream (batch, position, d_model) in this tower{why}"
    )


def _text(model: nn.Module) -> dict[str, Any]:
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        raise HeadscopeError("it does not read text")
    return {name: x[:, :SHORT] if isinstance(x, Tensor) else x for name, x in prompt(model).items()}


@contextmanager
def _watching(watch: _Watch) -> Iterator[None]:
    inner = {part for layer in watch.layers for part in layer.modules()}
    training = {part: part.training for part in inner}
    with ExitStack() as stack:
        for part in inner:
            part.training = False
            stack.callback(setattr, part, "training", training[part])
            stack.callback(part.register_forward_pre_hook(watch.begin, with_kwargs=True).remove)
            stack.callback(part.register_forward_hook(watch.end, with_kwargs=True).remove)
        yield
