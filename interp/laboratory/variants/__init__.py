"""Attention variants of the bench: one file each, and a line in ``VARIANTS``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from headscope.interp.registry import Registry

if TYPE_CHECKING:
    from headscope.interp.laboratory.variants.base import Variant

VARIANTS: Registry[Variant] = Registry(
    "attention variant",
    "variants",
    "headscope.interp.laboratory.variants",
    {
        "softmax": "softmax:Softmax",
        "sigmoid": "sigmoid:Sigmoid",
        "sigmoid_normed": "sigmoid:SigmoidNormed",
        "elu": "elu:Elu",
        "elu_normed": "elu:EluNormed",
        "kernel_elu": "kernel:KernelElu",
        "kernel_elu_normed": "kernel:KernelEluNormed",
        "kernel_identity": "signed:KernelIdentity",
        "kernel_identity_normed": "signed:KernelIdentityNormed",
        "kernel_mlp": "mlp:KernelMlp",
        "kernel_mlp_normed": "mlp:KernelMlpNormed",
        "key_bias": "biases:KeyBias",
        "key_value_bias": "biases:KeyValueBias",
        "value_bias": "biases:ValueBias",
        "differential": "differential:Differential",
        "grouped_differential": "grouped:GroupedDifferential",
        "shared_differential": "shared:SharedDifferential",
        "affine": "affine:Affine",
        "selective": "selective:Selective",
        "softplus": "softplus:SoftplusReweighted",
        "dual_triangle": "triangles:DualTriangle",
        "landmark": "landmark:Landmark",
        "core_context": "core_context:CoreContext",
        "fixed_scores": "deconstructed:FixedScores",
        "random_scores": "deconstructed:RandomScores",
        "no_mixing": "deconstructed:NoMixing",
    },
)

__all__ = ["VARIANTS"]
