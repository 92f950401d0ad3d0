"""Baking edits into weights: an ordinary Hugging Face checkpoint whose logits are the edited model's.

A head's output z reaches the stream through its columns W_h of the output projection alone, so that where an edit makes
z into M z + b, the projection of weights W_h M and a bias larger by W_h b does the same to every token. Edits in their
order multiply: M = M_2 M_1, b = M_2 b_1 + b_2. Products are taken in float64 and rounded once, to the weights'
precision.
"""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from headscope.interp.errors import HeadscopeError
from headscope.interp.models import LanguageModel, load_model
from headscope.interp.models.explained import quiet
from headscope.interp.models.projections import output_projections
from headscope.interp.runs.files import folder_of, writing
from headscope.interp.sites.given import Loadable
from headscope.interp.sites.sizes import tower_size
from headscope.interp.sites.towers import numbered, selects
from headscope.interventions.applying import apply, size
from headscope.interventions.base import Intervention, parts_of
from headscope.interventions.declared import Edit
from headscope.interventions.files import require_model
from headscope.interventions.head_edit import HeadEdit

Maps = dict[tuple[int, int], tuple[Tensor, Tensor]]  # (layer, head) -> M (width, width), b (width,), float64


def export(model: Loadable, edit: Intervention, out: str | Path) -> Path:
    """Write ``model`` with ``edit`` baked in to the folder ``out``: configuration, weights as safetensors, tokenizer.

    Baked are edits that make a head's z into M z + b at every position and in every phase: ``ScaleHeads``,
    ``AblateHeads`` (zero, mean), ``AddToHeads``, ``AffineHeads``, ``ProjectHeads``, ``ClampHeads`` at one value, of any
    strength, composed in any order. What was written is loaded again and compared with the edited model on a short
    text before it gets its name, so that ``out`` is right or not there.

    An offset needs a bias of the output projection. Where the model has none, it gets one if its configuration allows
    (``attention_bias``); other biases that this brings are zero.

    Raises:
        HeadscopeError: an edit that is no such map, by its name; a projection that is quantized, adapted or shared; no
            room for a bias; ``out`` holds something; or the checkpoint's logits are not the edited model's.
    """
    out, lm = folder_of(out), load_model(model)
    for part in parts_of(edit):
        require_model(part.made_for, lm, part.name)
    edit.check(*size(lm))
    if lm.inner.config.is_encoder_decoder or lm.inner.get_output_embeddings() is None:
        raise HeadscopeError(f"{lm.name} is no decoder-only language model, and only those are exported")
    leaves = projections(lm)
    maps = head_maps(edit, {layer: _width(leaf, heads) for layer, (_, leaf, heads) in leaves.items()})
    changed = {}
    for layer in sorted({layer for layer, _ in maps}):
        name, leaf, heads = leaves[layer]
        weight, bias = baked(leaf, heads, {head: held for (at, head), held in maps.items() if at == layer})
        changed[f"{name}.weight"] = weight
        if bias is not None:
            changed[f"{name}.bias"] = bias
    return _write(lm, edit, changed, out)


def head_maps(edit: Intervention, widths: Mapping[int, int]) -> Maps:
    """What ``edit`` does to the outputs of each head that it names; ``widths``: of the heads of every layer.

    Raises:
        HeadscopeError: a part that is no such map, or acts in some phases or at some positions only.
    """
    maps: Maps = {}
    for part in parts_of(edit):
        if not isinstance(part, HeadEdit):
            raise HeadscopeError(f"{part.name} cannot be baked into weights: it does not only map heads' outputs")
        if part.phased or part.positions is not None:
            where = f"during={part.during!r}" if part.phased else f"positions={part.positions!r}"
            raise HeadscopeError(f"{part.name} cannot be baked into weights: it acts with {where}, weights act always")
        for layer, heads in part.heads.by_layer().items():
            if layer not in widths:
                raise HeadscopeError(f"{part.name} names layer {layer}, whose output projection was not found")
            found = part.matrices(layer, widths[layer])
            if found is None:
                raise HeadscopeError(f"{part.name} cannot be baked into weights: it is no map z -> M z + b of a head")
            for head, m, b in zip(heads, *found, strict=True):
                _compose(maps, (layer, head), m, b, part)
    return maps


def _compose(maps: Maps, head: tuple[int, int], m: Tensor, b: Tensor, part: Edit) -> None:
    """``part``'s map of a head after those before it."""
    one = torch.eye(len(b), dtype=torch.float64)
    before, offset = maps.get(head, (one, torch.zeros_like(b)))
    m, b = one + part.strength * (m - one), part.strength * b
    maps[head] = m @ before, m @ offset + b


def projections(lm: LanguageModel) -> dict[int, tuple[str, nn.Module, int]]:
    """The output projection of every attending layer of the language tower: its name, the module, its heads.

    Raises:
        HeadscopeError: an architecture whose projections cannot be told, or weights that are not plain.
    """
    inner, found = lm.inner, tower_size(lm)
    layers = {name: layer for name, _, where, layer in numbered(inner) if selects(found.tower, where, inner)}
    modules = dict(inner.named_modules())
    leaves = {layers[name]: leaf for name, leaf in output_projections(lm).items() if name in layers}
    if len(set(leaves.values())) < len(leaves):
        raise HeadscopeError(f"{lm.name}: layers share one output projection, so no layer's heads can be changed alone")
    for leaf in leaves.values():
        plain = type(modules[leaf]) in (nn.Linear, Conv1D)
        if not plain or not modules[leaf].weight.is_floating_point() or modules[leaf].weight.is_meta:
            raise HeadscopeError(
                f"{leaf} is a {type(modules[leaf]).__name__} without plain weights: load the model unquantized, in one "
                "place, with its adapters merged"
            )
    heads = {layer: found.heads.get(layer) or lm.info.heads for layer in leaves}
    return {layer: (leaf, modules[leaf], heads[layer]) for layer, leaf in leaves.items()}


def _width(leaf: Any, heads: int) -> int:
    return int(leaf.weight.shape[0 if isinstance(leaf, Conv1D) else 1]) // heads


def baked(leaf: Any, heads: int, maps: Mapping[int, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor | None]:
    """The projection's weight, and its bias where it has or needs one, with the heads' maps inside."""
    transposed, width = isinstance(leaf, Conv1D), _width(leaf, heads)
    weight = leaf.weight.detach().double()
    weight = (weight.T if transposed else weight).clone()  # (d_model, heads * width)
    added = torch.zeros(weight.shape[0], dtype=torch.float64, device=weight.device)
    for head, (m, b) in maps.items():
        mine = slice(head * width, (head + 1) * width)
        added += weight[:, mine] @ b.to(weight.device)
        weight[:, mine] = weight[:, mine] @ m.to(weight.device)
    made = (weight.T if transposed else weight).to(leaf.weight.dtype).contiguous()
    if leaf.bias is None and not bool(added.any()):
        return made, None
    bias = added if leaf.bias is None else added + leaf.bias.detach().double()
    return made, bias.to(leaf.weight.dtype)


def _write(lm: LanguageModel, edit: Intervention, changed: dict[str, Tensor], out: Path) -> Path:
    """The checkpoint, in a folder beside ``out`` until it proved right."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise HeadscopeError(f"{out} is there already; choose an empty or a new folder")
    made = _with_weights(lm.inner, changed)
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        with writing(out), quiet():
            made.save_pretrained(folder)
            if lm.tokenizer is not None:
                lm.tokenizer.save_pretrained(folder)
        _check(lm, edit, folder)
        with writing(out):
            folder.chmod(0o755)
            folder.replace(out)  # over an empty folder, too
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return out


def _with_weights(inner: Any, changed: Mapping[str, Tensor]) -> Any:
    """A model of the same class with ``changed`` in place of its own weights, all others shared with ``inner``, to be
    saved, not run.

    Raises:
        HeadscopeError: a bias that the architecture has no room for, or weights that its class does not know.
    """
    held = inner.state_dict()
    config = copy.deepcopy(inner.config)
    missing = [name for name in changed if name not in held]
    if missing and getattr(config.get_text_config(), "attention_bias", None) is False:
        config.get_text_config().attention_bias = True
    with torch.device("meta"):
        made = type(inner)(config)
    shapes = {name: x.shape for name, x in made.state_dict().items()}
    new = shapes.keys() - held.keys()
    if held.keys() - shapes.keys() or not all(name.endswith(".bias") for name in new):
        raise HeadscopeError(f"{type(inner).__name__} holds other weights than its class makes; merge its adapters")
    if not new.issuperset(missing):
        raise HeadscopeError(
            f"this edit adds an offset to heads' outputs, which needs {missing[0]}; {type(inner).__name__} has no such "
            "bias and its configuration cannot give it one: export only what scales or removes, or apply the edit"
        )
    dtype = next(iter(changed.values())).dtype if changed else None
    zeros = {name: torch.zeros(shapes[name], dtype=dtype) for name in new}
    made.load_state_dict({**held, **zeros, **changed}, assign=True)
    made.tie_weights()
    if getattr(inner, "generation_config", None) is not None:
        made.generation_config = inner.generation_config
    return made


def _check(lm: LanguageModel, edit: Intervention, folder: Path) -> None:
    """Load the checkpoint and compare its logits on a few tokens with the edited model's.

    Weights that were rounded once to the unit u (2^-24 in float32) move a logit by some multiple of u times the layers'
    terms; a wrong or missing bias moves it by a share of its size. The square root of u stands between.

    Raises:
        HeadscopeError: they differ.
    """
    ids = torch.arange(1, 17)[None] % lm.info.vocab_size
    with apply(lm, edit):
        wanted = lm.forward(ids).logits.float().cpu()
    again = load_model(folder, dtype=lm.info.dtype, device=lm.device)
    found = again.forward(ids).logits.float().cpu()
    unit = torch.finfo(getattr(torch, lm.info.dtype)).eps / 2
    worst = float((found - wanted).abs().max() / wanted.abs().max())
    if not worst <= unit**0.5:
        raise HeadscopeError(
            f"the exported {lm.name} gives other logits than the edited model (by {worst:.1e} of the largest): this "
            "architecture cannot be exported; keep the edit as a file and apply it"
        )
