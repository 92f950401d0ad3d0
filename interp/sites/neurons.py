"""The last projection of a layer's MLP, whose input is what its neurons say and whose columns are their value vectors.

It is found by the names that transformers gives it. A mixture of experts has one an expert, or all in one tensor: there
is no such projection then, and a shared expert's is not all of what the layer writes.
"""

from __future__ import annotations

from torch import Tensor, nn

from headscope.interp.errors import HeadscopeError
from headscope.interp.sites.given import PreTrained
from headscope.interp.sites.layout import StreamLayer

NAMES = ("down_proj", "c_proj", "fc2", "dense_4h_to_h")
NESTED = "output.dense"  # BERT calls both of a layer's parts "output": the MLP's is not inside its attention


def down_projection(layer: StreamLayer, model: PreTrained) -> nn.Module:
    """The module that takes a layer's neurons (batch, position, neuron) and gives what its MLP writes.

    Raises:
        HeadscopeError: no such module, or several (a mixture of experts).
    """
    named = [(name, part) for name, part in layer.module.named_modules() if part is not layer.module]
    attention = [name for name, part in named if "att" in type(part).__name__.lower()]
    found: list[nn.Module] = [
        part
        for name, part in named
        if (name.rpartition(".")[2] in NAMES or name.endswith(NESTED))
        and isinstance(getattr(part, "weight", None), Tensor)
        and not any(name.startswith(f"{around}.") for around in attention)
    ]
    mixed = any("expert" in name for name, _ in named)
    if len(found) != 1 or mixed:
        what = "a mixture of experts" if mixed else f"{len(found) or 'no'} MLPs by the names that we know"
        raise HeadscopeError(
            f"layer {layer.layer} of {type(model).__name__} has {what}, so its neurons are not known: name other "
            "layers, or edit mlp_out of the residual stream"
        )
    down: nn.Module = found[0]
    return down


def value_vectors(module: nn.Module) -> Tensor:
    """The value vector of every neuron, (neuron, d_model), as a view of a down projection's weights.

    Raises:
        HeadscopeError: weights that are not there as numbers (quantized), or of another kind of module.
    """
    weight = module.weight
    kind = type(module).__name__
    if isinstance(weight, Tensor) and weight.dim() == 2 and weight.is_floating_point():
        if isinstance(module, nn.Linear):
            return weight.detach().T
        if kind == "Conv1D":
            return weight.detach()
    raise HeadscopeError(f"the value vectors of a {kind} cannot be read: load the model without quantization")
