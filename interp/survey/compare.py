"""A traced model against itself: logits without tracing, statistics from the weights of its own eager code."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor, nn

from headscope.interp.errors import HeadscopeError
from headscope.interp.sites.given import PreTrained
from headscope.interp.sites.huggingface import route as huggingface
from headscope.interp.sites.huggingface.state import Route
from headscope.interp.sites.huggingface.switch import implementations
from headscope.interp.sites.towers import tower_of
from headscope.interp.statistics import Entropy, KeyMass, LogSumExp, SinkMass, TopKeys
from headscope.interp.survey.eager import Weights, eager_weights
from headscope.interp.tracing.recording import trace

SAME = 1e-3  # of the output: two right computations differ by less, in a tiny model of usual weights
DISAGREE = 0.02  # of the output: more than rounding, between two implementations of one attention
STATISTICS = (LogSumExp(), Entropy(), SinkMass(2), TopKeys(1), KeyMass())


@dataclass(frozen=True)
class Compared:
    """What the comparison of one kind of modules gave: ``wrong`` and ``refused`` hold the reason, ``kinds``
    the layers of every record where there are several (``headscope.interp.tracing.layer_groups``)."""

    wrong: str | None = None
    refused: str | None = None
    kinds: tuple[list[int], ...] = ()
    eager: bool = False


def compare_model(
    model: PreTrained, inputs: dict[str, Tensor], modules: dict[str, list[int]], *, hard: bool = False
) -> dict[str, Compared]:
    """Trace all modules (with its layers), and compare.

    ``hard``: the inputs or weights are such that the model's own computations may part. Eager weights are then no
    yardstick where the eager output is another (PaliGemma's without token types), and the traced output may be twice
    as far from the untraced one as that is from float64's.
    """
    plain = run(model, inputs)
    weights, other = _eager(model, inputs)
    if hard and other is not None and _distance(plain, other, inputs) > SAME * _size(plain):
        weights = []
    rounding = _rounding(model, inputs, plain) if hard else 0.0
    return {
        module: _compare(model, inputs, module, layers, plain, weights, rounding) for module, layers in modules.items()
    }


def _compare(
    model: PreTrained,
    inputs: dict[str, Tensor],
    module: str,
    layers: list[int],
    plain: Tensor | None,
    weights: Weights,
    rounding: float,
) -> Compared:
    try:
        with trace(model, STATISTICS, tower=module) as tracer:
            traced = run(model, inputs)
        records = tracer.records
    except HeadscopeError as error:
        return Compared(refused=str(error))
    kinds = [record["layer"].to_numpy().tolist() for record in records]
    wrong = outputs_differ(plain, traced, inputs, rounding)
    if sorted(sum(kinds, [])) != sorted(set(layers)):
        wrong = wrong or f"layers {sorted(set(layers))} attend, the record has {kinds}"
    for record in records if weights else ():
        wrong = wrong or _compare_modules(model, record, weights, module, inputs)
    return Compared(wrong, kinds=tuple(kinds) if len(kinds) > 1 else (), eager=bool(weights))


def run(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor | None:
    """Logits, or the first floating-point tensor, of one pass."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # some models draw random numbers also in evaluation
        return _first_tensor(model(**inputs))


def _eager(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Weights, Tensor | None]:
    """Eager weights of one pass, and its output; none where the model cannot run eagerly."""
    try:
        with eager_weights(model) as seen:
            output = run(model, inputs)
    except Exception:  # whatever it is, the pattern tiles remain the yardstick
        return [], None
    return list(seen), output


def _compare_modules(
    model: PreTrained,
    record: xr.Dataset,
    weights: Weights,
    module: str,
    inputs: dict[str, Tensor],
) -> str | None:
    layers = record["layer"].to_numpy().tolist()
    route = Route(model, implementations(model))
    places = {place.name: place for place in huggingface.places(route).values()}
    calls: dict[int, list[Tensor]] = {}
    for name, p in weights:
        if name in places and places[name].module == module and places[name].layer in layers:
            calls.setdefault(places[name].layer, []).append(p)
    if sorted(calls) != layers:
        return f"eager attends in layers {sorted(calls)}, the record has {layers}"
    tower = tower_of(module, model)
    mask = inputs.get("attention_mask") if tower in ("language", "encoder", "cross") else None
    for layer, parts in calls.items():
        first = 0
        for p in parts:
            for b in range(p.shape[0]):
                wrong = _compare_example(
                    record.sel(layer=layer).isel(example=first + b), _unpadded(p[b], mask, b, cross=tower == "cross")
                )
                if wrong is not None:
                    return f"layer {layer}: {wrong}"
            first += p.shape[0]
        if first != record.sizes["example"]:
            return f"eager attends over {first} examples, the record has {record.sizes['example']}"
    return None


def _unpadded(p: Tensor, mask: Tensor | None, example: int, *, cross: bool) -> NDArray[np.float64]:
    """The rows and keys that are tokens; across two sequences (``cross``) the mask is of the keys alone."""
    whole: NDArray[np.float64] = p.double().numpy()
    if mask is None or mask.dim() != 2 or mask.shape[1] != p.shape[-1] or not cross and p.shape[-2] != p.shape[-1]:
        return whole
    at = mask[example].nonzero()[:, 0].numpy()
    return whole[:, :, at] if cross else whole[:, at][:, :, at]


def _compare_example(here: xr.Dataset, p: NDArray[np.float64]) -> str | None:
    """One example and layer: ``p`` (head, query, key) holds its real rows and keys. The bound follows the scores' size:
    a score s carries a relative error of eps, so p does of eps |s|; sums add one such error a key."""
    queries, keys = p.shape[1:]
    size = float(np.abs(np.nan_to_num(here["logsumexp"].to_numpy(), neginf=0, posinf=0)).max())
    bound = torch.finfo(torch.float32).eps * (64 + 16 * size) * keys
    wanted = {
        "entropy": -(p * np.log(np.where(p > 0, p, 1))).sum(-1),
        "sink_mass": p[..., :2].sum(-1),
        "top_mass": p.max(-1),
        "key_mass": p.sum(1),
    }
    seen = np.isfinite(here["logsumexp"].to_numpy()[:, :queries])  # eager gives a row that sees no key uniform weights
    for name, value in wanted.items():
        got = here[name].to_numpy()
        got = got[..., 0] if name == "top_mass" else got
        got = got[:, : value.shape[1]]
        if got.shape != value.shape:
            return f"{name} has shape {got.shape} for {value.shape}"
        if name == "key_mass":
            value, limit = (p * seen[..., None]).sum(1), bound * queries
        else:
            value, limit = np.where(seen, value, got), bound * (np.log(keys) + 1)
        difference = float(np.abs(got - value).max())
        if not difference <= limit:
            return f"{name} differs from eager's by {difference:.2g}, bound {limit:.2g}"
    return None


def outputs_differ(
    plain: Tensor | None, traced: Tensor | None, inputs: dict[str, Tensor], rounding: float = 0.0
) -> str | None:
    """Why two outputs are not one, padding left out; None where they are. ``rounding``: how far the untraced one is
    from exact, where that is known."""
    if plain is None or traced is None:
        return "the model returns nothing to compare"
    if plain.shape != traced.shape:
        return f"the output has shape {tuple(traced.shape)} traced, {tuple(plain.shape)} untraced"
    difference = _distance(plain, traced, inputs)
    limit = max(SAME * _size(plain), 2 * rounding)  # two computations, each as far from exact
    return None if difference <= limit else f"the output differs by {difference:.2g} when traced"


def _rounding(model: nn.Module, inputs: dict[str, Tensor], plain: Tensor | None) -> float:
    """How far the untraced output is from that of a copy in float64; 0 where that does not run, or is another."""
    try:
        whole = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
        far = _distance(plain, run(copy.deepcopy(model).double(), whole), inputs)
    except Exception:  # whatever it is, the usual bound remains
        return 0.0
    return far if far <= DISAGREE * _size(plain) else 0.0


def _distance(one: Tensor | None, other: Tensor | None, inputs: dict[str, Tensor]) -> float:
    """The largest difference of two outputs of one shape where no padding is; infinite for other shapes."""
    if one is None or other is None or one.shape != other.shape:
        return float("inf")
    mask = inputs.get("attention_mask")
    if mask is not None and mask.dim() == 2 and one.shape[:2] == mask.shape:
        one, other = one[mask.bool()], other[mask.bool()]
    return float((one.float() - other.float()).abs().max())


def _size(output: Tensor | None) -> float:
    return 1.0 if output is None else max(1.0, float(output.float().abs().max()))


def _first_tensor(output: Any) -> Tensor | None:
    """Logits, or the first floating-point tensor of what a model returns."""
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    parts = output.values() if isinstance(output, dict) else output if isinstance(output, tuple | list) else [output]
    for part in parts:
        if isinstance(part, Tensor) and part.is_floating_point() and part.dim() > 1:
            return part
        if isinstance(part, tuple | list | dict):
            inner = _first_tensor(part)
            if inner is not None:
                return inner
    return None
