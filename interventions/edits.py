"""Every published edit by name. To add one: a file in the folder of its kind, and a line here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from headscope.interp.registry import Registry

if TYPE_CHECKING:
    from headscope.interventions.base import Intervention

EDITS: Registry[Intervention] = Registry(
    "edit",
    "edits",
    "headscope.interventions",
    {
        "ablate_heads": "outputs.ablate:AblateHeads",
        "scale_heads": "outputs.scale:ScaleHeads",
        "add_to_heads": "outputs.add:AddToHeads",
        "affine_heads": "outputs.affine:AffineHeads",
        "project_heads": "outputs.project:ProjectHeads",
        "clamp_heads": "outputs.clamp:ClampHeads",
        "reinforce_heads": "outputs.reinforce:ReinforceHeads",
        "patch_heads": "outputs.patch:PatchHeads",
        "edit_value_vectors": "neurons.value_vectors:EditValueVectors",
        "scale_sinks": "attention.sinks:ScaleSinks",
        "calibrate_attention": "attention.calibrate:CalibrateAttention",
        "redistribute_sinks": "attention.visual:RedistributeSinks",
        "scale_image_sinks": "attention.image_sinks:ScaleImageSinks",
        "prune_tokens": "attention.prune:PruneTokens",
        "swap_keys": "attention.swap:SwapKeys",
        "force_pattern": "attention.force:ForcePattern",
        "boost_recent": "attention.recent:BoostRecent",
        "knock_out": "attention.knock_out:KnockOut",
        "emphasize_span": "attention.emphasize_span:EmphasizeSpan",
        "spotlight": "attention.spotlight:SpotLight",
        "scale_span_logits": "attention.scale_span:ScaleSpanLogits",
        "adapt_span_logits": "attention.adapt_span:AdaptSpanLogits",
        "raise_span_logits": "attention.raise_span:RaiseSpanLogits",
        "paint": "attention.paint:Paint",
        "head_temperature": "attention.temperature:HeadTemperature",
        "decay_beyond_window": "attention.decay_beyond_window:DecayBeyondWindow",
        "evict_keys": "attention.evict:EvictKeys",
        "pine": "positions.pine:Pine",
        "rescale_rope": "positions.rescale:RescaleRoPE",
        "concentric_positions": "positions.concentric:ConcentricPositions",
        "parallel_contexts": "positions.parallel:ParallelContexts",
        "select_contexts": "positions.select:SelectContexts",
    },
)
