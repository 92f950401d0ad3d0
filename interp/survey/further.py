"""What the sweep compares beside one padded forward pass; a comparison may also be refused, or not be for a model.

The yardsticks are not ours: the untraced model's logits and tokens, the weights of its own eager code, or a plain
hook on the module that reads the heads' outputs.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.attention.handler import Handler
from headscope.interp.errors import HeadscopeError
from headscope.interp.models.projections import output_projections
from headscope.interp.sites import attached, verify
from headscope.interp.sites.given import PreTrained
from headscope.interp.sites.huggingface import route as huggingface
from headscope.interp.sites.huggingface.state import Route
from headscope.interp.sites.huggingface.switch import implementations
from headscope.interp.sites.sizes import attending, tower_size
from headscope.interp.sites.towers import default_tower
from headscope.interp.statistics import Entropy, TopKeys
from headscope.interp.survey.compare import compare_model, outputs_differ, run
from headscope.interp.survey.eager import eager_weights
from headscope.interp.tracing.recording import trace

NEW = 3  # generated tokens
GAIN = 4.0  # of queries and of keys, so that scores are sixteen times as large
OPTIONAL = ("attention_mask", "mm_token_type_ids", "token_type_ids")
_READS = re.compile(r"(^|[._])(q|k|qkv|query|key|in|c_attn|Wqkv|query_key_value)(_?(proj|lin|b_proj))?\.weight$")
_WRITES = ("o_proj", "out_proj", "c_proj", "dense", "wo", "o")  # output projections
_SIZES = ("num_decoder_layers", "decoder_layers")


@dataclass(frozen=True)
class Outcome:
    """``name`` of a comparison; ``wrong`` or ``refused`` hold the reason."""

    name: str
    wrong: str | None = None
    refused: str | None = None

    def __str__(self) -> str:
        return f"{self.name}: {self.wrong}" if self.wrong else f"{self.name} (refused)" if self.refused else self.name


class _Zeroes(Handler):
    """What zero ablation is to a site: an edit of z."""

    def __init__(self, head: int) -> None:
        self.head = head

    def edit_output(self, call: AttentionCall, z: Tensor) -> Tensor:
        """``z`` (batch, head, query, d_value) without the head."""
        z = z.clone()
        z[:, self.head] = 0
        return z


class Inapplicable(Exception):
    """The model has nothing to compare here."""


def further(model: PreTrained, inputs: dict[str, Tensor], rebuilt: Callable[..., Any] | None = None) -> list[Outcome]:
    """Every comparison that is one for this model; ``rebuilt(**sizes)`` makes it with other sizes."""
    found = []
    for name, comparison in COMPARISONS.items():
        try:
            wrong = comparison(model, inputs, rebuilt)
            found.append(Outcome(name, wrong=wrong))
        except Inapplicable:
            continue
        except HeadscopeError as error:
            found.append(Outcome(name, refused=str(error)))
    return found


def without_optional(model: PreTrained, inputs: dict[str, Tensor], _: Any) -> str | None:
    """The same pass with the mask and the types of tokens left out."""
    rest = {name: value for name, value in inputs.items() if name not in OPTIONAL}
    if len(rest) == len(inputs):
        raise Inapplicable
    try:
        run(model, rest)
    except Exception as error:  # what is optional by its signature may be demanded by its code
        raise Inapplicable from error
    return _forward(model, rest, hard=True)


def large_logits(model: PreTrained, inputs: dict[str, Tensor], _: Any) -> str | None:
    """Weights that make queries and keys ``GAIN`` times as large."""
    sharp = copy.deepcopy(model)
    scaled = [p for name, p in sharp.named_parameters() if p.dim() > 1 and _READS.search(name)]
    if not scaled:
        raise Inapplicable
    with torch.no_grad():
        for parameter in scaled:
            parameter.mul_(GAIN)
    return _forward(sharp, inputs, hard=True)


def left_padded(model: PreTrained, inputs: dict[str, Tensor], _: Any) -> str | None:
    """Generation from prompts padded to the left: tokens, logits, and entropies against eager weights."""
    return _generation(model, inputs, slice(0, 4))


def right_padded(model: PreTrained, inputs: dict[str, Tensor], _: Any) -> str | None:
    """The same padded to the right, where padding comes to stand between tokens."""
    return _generation(model, inputs, slice(-4, None))


def edited(model: PreTrained, inputs: dict[str, Tensor], _: Any) -> str | None:
    """A head of the last layer that attends, zeroed by an edit and by a plain hook before its output projection."""
    tower = default_tower(set(verify(model, inputs).layers), model)
    return _edit(model, inputs, tower)


def unequal_depths(model: PreTrained, inputs: dict[str, Tensor], rebuilt: Callable[..., Any] | None) -> str | None:
    """A decoder one layer deeper than its encoder: every tower's record, and an edit of the decoder's last layer."""
    config: Any = model.config
    name = next((name for name in _SIZES if isinstance(getattr(config, name, None), int)), None)
    if rebuilt is None or name is None or not getattr(config, "is_encoder_decoder", False):
        raise Inapplicable
    deeper = rebuilt(**{name: getattr(config, name) + 1})
    return _forward(deeper, inputs) or _edit(deeper, inputs, "decoder") or _edit(deeper, inputs, "cross")


COMPARISONS: dict[str, Callable[[PreTrained, dict[str, Tensor], Any], str | None]] = {
    "optional inputs left out": without_optional,
    "large logits": large_logits,
    "generation padded left": left_padded,
    "generation padded right": right_padded,
    "edit": edited,
    "unequal depths": unequal_depths,
}


def _forward(model: PreTrained, inputs: dict[str, Tensor], *, hard: bool = False) -> str | None:
    found = verify(model, inputs)
    if not found.passed:
        raise HeadscopeError(found.problems[0] if found.problems else "its attention is not called")
    seen = compare_model(model, inputs, found.layers, hard=hard)
    wrong = [f"{module}: {one.wrong}" for module, one in seen.items() if one.wrong]
    refused = [f"{module}: {one.refused}" for module, one in seen.items() if one.refused]
    if refused and not wrong:
        raise HeadscopeError(refused[0])
    return wrong[0] if wrong else None


def _generation(model: Any, inputs: dict[str, Tensor], padding: slice) -> str | None:
    reads = {"input_ids", *OPTIONAL}
    causal = not getattr(model.config, "is_encoder_decoder", False) and set(inputs) <= reads
    if not causal or not getattr(model, "can_generate", lambda: False)() or "attention_mask" not in inputs:
        raise Inapplicable
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, padding] = 0
    prompts = {"input_ids": inputs["input_ids"], "attention_mask": mask}
    plain = _generate(model, prompts)
    with trace(model, [Entropy(), TopKeys(1)]) as tracer:
        traced = _generate(model, prompts)
    if not torch.equal(plain[0], traced[0]):
        return "other tokens are generated when traced"
    wrong = outputs_differ(plain[1], traced[1], {})
    records = tracer.records
    return wrong or next(filter(None, (_rows_differ(model, prompts, record) for record in records)), None)


def _generate(model: Any, prompts: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Tokens and logits (batch, step, vocabulary)."""
    options = {"min_new_tokens": NEW, "max_new_tokens": NEW, "do_sample": False, "num_beams": 1, "pad_token_id": 0}
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            found = model.generate(**prompts, **options, output_logits=True, return_dict_in_generate=True)
    except HeadscopeError:
        raise
    except Exception as error:  # a model that does not generate so, traced or not
        raise Inapplicable from error
    return found.sequences, torch.stack(found.logits, 1)


def _rows_differ(model: Any, prompts: dict[str, Tensor], record: Any) -> str | None:
    """Every row's entropy and largest weight against the eager weights of the same generation."""
    try:
        with eager_weights(model) as weights:
            _generate(model, prompts)
    except (HeadscopeError, Inapplicable):
        return None
    route = Route(model, implementations(model))
    places = {place.name: place for place in huggingface.places(route).values()}
    for layer in record["layer"].to_numpy().tolist():
        calls = [p for n, p in weights if n in places and (places[n].layer, places[n].module) == (layer, record.module)]
        for example, real in enumerate(prompts["attention_mask"].bool()):
            rows = [p[example].double() for p in calls]
            if not rows or rows[0].shape[1] != len(real):
                return f"layer {layer}: eager attends {len(rows)} times"
            rows[0] = rows[0][:, real]
            here = record.sel(layer=layer).isel(example=example)
            for name, wanted in _row_statistics(rows).items():
                got = here[name].to_numpy()
                got = got[..., 0] if name == "top_mass" else got
                difference = float(np.abs(got[:, : wanted.shape[1]] - wanted).max())
                if not difference <= 1e-3:
                    return f"layer {layer}: {name} differs from eager's by {difference:.2g} while generating"
    return None


def _row_statistics(rows: list[Tensor]) -> dict[str, Any]:
    entropy = [-(p * p.clamp(min=1e-300).log()).sum(-1) for p in rows]
    return {"entropy": torch.cat(entropy, 1).numpy(), "top_mass": torch.cat([p.amax(-1) for p in rows], 1).numpy()}


def _edit(model: Any, inputs: dict[str, Tensor], tower: str) -> str | None:
    size = tower_size(model, tower)
    if not size.heads or size.most_heads is None:
        raise Inapplicable
    layer = max(size.heads)
    head, name = (size.heads[layer] or 1) - 1, _projection(model, inputs, tower, layer)
    plain = run(model, inputs)
    with _zeroed(model.get_submodule(name), head, size.heads[layer] or 1):
        wanted = run(model, inputs)
    with attached(model, _Zeroes(head), tower=tower, layers=[layer]):
        found = run(model, inputs)
    if plain is None or wanted is None or torch.equal(plain, wanted):
        raise Inapplicable
    wrong = outputs_differ(wanted, found, inputs)
    return None if wrong is None else f"L{layer}H{head} zeroed: {wrong.removesuffix(' when traced')}"


def _projection(model: Any, inputs: dict[str, Tensor], tower: str, layer: int) -> str:
    route = Route(model, implementations(model))
    try:
        found = output_projections(model, inputs)
    except HeadscopeError:
        found = {}  # a gate before the projection, which leaves a zero a zero: the projection by its name
    for place in huggingface.places(route).values():
        if place.layer != layer or tower not in (place.module, place.tower) or place.module not in attending(model):
            continue
        children = dict(model.get_submodule(place.name).named_children())
        named = next((f"{place.name}.{name}" for name in _WRITES if name in children), None)
        if place.name in found or named is not None:
            return found.get(place.name) or str(named)
    raise Inapplicable


@contextmanager
def _zeroed(projection: PreTrained, head: int, heads: int) -> Iterator[None]:
    def zero(_: PreTrained, args: tuple[Any, ...]) -> tuple[Any, ...]:
        z = args[0].clone()
        z.unflatten(-1, (heads, -1))[..., head, :] = 0
        return (z, *args[1:])

    handle = projection.register_forward_pre_hook(zero)
    try:
        yield
    finally:
        handle.remove()
