"""Models that transformers spreads over processes: which of them hold heads of a layer, and what is refused.

Tensor parallelism (``DistributedConfig(tp_size=n)`` or ``tp_plan="auto"``, under torchrun) gives each process some
heads of every layer under local numbers. ``split_of`` gives them their own numbers back.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from headscope.interp.attention.call import AttentionCall
from headscope.interp.attention.split import Split
from headscope.interp.attention.split_heads import SplitHeads
from headscope.interp.attention.whole import require_same
from headscope.interp.errors import HeadscopeError
from headscope.interp.sites.huggingface.state import Route
from headscope.interp.sites.sizes import query_heads


def tensor_mesh(model: nn.Module) -> Any:
    """The one-dimensional mesh of the processes that hold parts of single layers of ``model``, or None."""
    if (getattr(model, "_tp_size", None) or 1) < 2:
        return None
    mesh: Any = getattr(model, "_device_mesh", None)
    if mesh is None or not mesh.mesh_dim_names:  # before transformers 5.18 a mesh for tensor parallelism has no names
        return mesh
    return mesh["tp"]


def require_whole_heads(model: nn.Module) -> None:
    """Refuse a model whose layers are split in a way that does not say who holds what.

    Raises:
        HeadscopeError: split by something else than transformers, its layers are on different processes, or its
            weights are in a form that transformers cannot run in parts.
    """
    kind, whole = type(model).__name__, getattr(model, "_device_mesh", None)
    if whole is not None and "pp" in (whole.mesh_dim_names or ()) and whole["pp"].size() > 1:
        raise HeadscopeError(
            f"{kind} has its layers on different processes (pp_size), so that none holds them all: load it with "
            "device_map='auto', or with tp_size under torchrun"
        )
    mesh = tensor_mesh(model)
    config: Any = model.config
    kv = getattr(config.get_text_config(), "num_key_value_heads", None) if mesh is not None else None
    if mesh is not None and kv is not None and kv % mesh.size():
        raise HeadscopeError(
            f"{kind} has {kv} key/value heads, which transformers does not share out over {mesh.size()} processes: "
            "take a tp_size that divides them"
        )
    if mesh is not None and getattr(model, "quantization_method", None) == "bitsandbytes":
        raise HeadscopeError(
            f"{kind} has bitsandbytes weights under tensor parallelism, which transformers splits and cannot run: "
            "quantize by torchao (TorchAoConfig), or load it on one process with device_map='auto'"
        )
    if mesh is None and _is_split(model):
        raise HeadscopeError(
            f"{kind} is split over devices by tensor parallelism (tp_plan) that transformers did not set up, so that "
            "nothing says which heads each holds: load it with from_pretrained(..., tp_plan='auto') under torchrun, or "
            "with device_map='auto'"
        )


def require_same_inputs(mesh: Any, inputs: dict[str, Any]) -> None:
    """Refuse a pass whose tokens differ between the processes that hold the heads: each would attend to other ones.

    Raises:
        HeadscopeError: in every process.
    """
    given = [inputs.get(name) for name in ("input_ids", "inputs_embeds", "attention_mask", "position_ids")]
    tensors = [x for x in given if isinstance(x, Tensor)]
    if tensors:
        require_same(mesh.get_group(), *tensors, of="the processes of one model under tensor parallelism")


def require_whole_places(model: nn.Module, places: tuple[str, ...]) -> None:
    """Refuse places in the layers where a process holds a part under local numbers: the stream is whole everywhere.

    Raises:
        HeadscopeError: neurons of a model under tensor parallelism, the stream of one under context_parallel.
    """
    if "mlp_post" in places and tensor_mesh(model) is not None:
        raise HeadscopeError(
            f"under tensor parallelism each process of {type(model).__name__} holds other neurons under the same "
            "numbers ('mlp_post'): load it with device_map='auto', or name a place of the residual stream"
        )
    if hasattr(model.forward, "headscope_shared"):
        raise HeadscopeError(
            f"inside context_parallel a process holds the residual stream of {type(model).__name__} for its own tokens "
            "alone: read or edit the stream on one process"
        )


def _is_split(model: nn.Module) -> bool:
    """Whether single layers are split over devices; FSDP puts their weights together before they run."""
    if (getattr(model, "_tp_size", None) or 1) > 1:
        return True
    sharded = any(type(weights).__name__ == "DTensor" for weights in model.parameters())
    return sharded and not any(type(part).__name__.startswith("FSDP") for part in model.modules())


def split_of(route: Route, module: nn.Module, mine: AttentionCall) -> Split | None:
    """How the call of which this process holds ``mine`` is shared out over processes; None: it is whole here.

    Raises:
        HeadscopeError: the heads here are no equal share of the layer's.
    """
    if route.rows is not None:
        return route.rows
    if route.heads is None:
        return None
    here, count, size = mine.query.shape[1], query_heads(module), route.heads.size()
    if count == here:
        return None  # the plan leaves this layer whole
    kv, kv_count = mine.key.shape[1], getattr(getattr(module, "config", None), "num_key_value_heads", None)
    if count != here * size or (kv == kv_count and kv > 1):
        raise HeadscopeError(
            f"layer {mine.layer} of {mine.module} has {here} query and {kv} key/value heads on this process, of "
            f"{count} and {kv_count} over {size} processes: take a tp_size that shares both out evenly"
        )
    return SplitHeads(route.heads.get_group(), route.heads.get_local_rank(), (here,) * size)
