"""Change heads and re-evaluate. Names are imported on first use, so that importing the room does not import torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headscope.interp.results.evaluation import Evaluation as Evaluation
    from headscope.interventions.applying import apply as apply
    from headscope.interventions.attention.adapt_span import AdaptSpanLogits as AdaptSpanLogits
    from headscope.interventions.attention.calibrate import CalibrateAttention as CalibrateAttention
    from headscope.interventions.attention.decay_beyond_window import DecayBeyondWindow as DecayBeyondWindow
    from headscope.interventions.attention.emphasize_span import EmphasizeSpan as EmphasizeSpan
    from headscope.interventions.attention.emphasize_span import pasta as pasta
    from headscope.interventions.attention.evict import EvictKeys as EvictKeys
    from headscope.interventions.attention.force import ForcePattern as ForcePattern
    from headscope.interventions.attention.image_sinks import ScaleImageSinks as ScaleImageSinks
    from headscope.interventions.attention.knock_out import KnockOut as KnockOut
    from headscope.interventions.attention.paint import Paint as Paint
    from headscope.interventions.attention.prune import PruneTokens as PruneTokens
    from headscope.interventions.attention.prune import padded_patches as padded_patches
    from headscope.interventions.attention.raise_span import RaiseSpanLogits as RaiseSpanLogits
    from headscope.interventions.attention.raise_span import paint as paint
    from headscope.interventions.attention.raise_span import paint_tokens as paint_tokens
    from headscope.interventions.attention.recent import BoostRecent as BoostRecent
    from headscope.interventions.attention.scale_span import ScaleSpanLogits as ScaleSpanLogits
    from headscope.interventions.attention.scale_span import adaptive_factors as adaptive_factors
    from headscope.interventions.attention.sinks import ScaleSinks as ScaleSinks
    from headscope.interventions.attention.spotlight import SpotLight as SpotLight
    from headscope.interventions.attention.swap import SwapKeys as SwapKeys
    from headscope.interventions.attention.temperature import HeadTemperature as HeadTemperature
    from headscope.interventions.attention.visual import RedistributeSinks as RedistributeSinks
    from headscope.interventions.base import Composed as Composed
    from headscope.interventions.base import Intervention as Intervention
    from headscope.interventions.declared import Edit as Edit
    from headscope.interventions.decoding import DECODINGS as DECODINGS
    from headscope.interventions.decoding.guidance import Guidance as Guidance
    from headscope.interventions.decoding.sgrs import SaliencyRejection as SaliencyRejection
    from headscope.interventions.edits import EDITS as EDITS
    from headscope.interventions.evaluation.evaluate import evaluate as evaluate
    from headscope.interventions.evaluation.masking import masking as masking
    from headscope.interventions.exporting import export as export
    from headscope.interventions.fitted import FITS as FITS
    from headscope.interventions.fitted.base import Fit as Fit
    from headscope.interventions.fitted.iti import ITI as ITI
    from headscope.interventions.fitted.lofit import LoFiT as LoFiT
    from headscope.interventions.fitted.lora import lora as lora
    from headscope.interventions.head_edit import HeadEdit as HeadEdit
    from headscope.interventions.load import load_intervention as load_intervention
    from headscope.interventions.mechanisms.anchoring import study_anchor as study_anchor
    from headscope.interventions.mechanisms.repair import circuit_roles as circuit_roles
    from headscope.interventions.mechanisms.repair import force_heads as force_heads
    from headscope.interventions.mechanisms.suppression import study_suppression as study_suppression
    from headscope.interventions.neurons.value_vectors import EditValueVectors as EditValueVectors
    from headscope.interventions.outputs.ablate import AblateHeads as AblateHeads
    from headscope.interventions.outputs.add import AddToHeads as AddToHeads
    from headscope.interventions.outputs.affine import AffineHeads as AffineHeads
    from headscope.interventions.outputs.clamp import ClampHeads as ClampHeads
    from headscope.interventions.outputs.measuring import head_means as head_means
    from headscope.interventions.outputs.measuring import head_samples as head_samples
    from headscope.interventions.outputs.patch import PatchHeads as PatchHeads
    from headscope.interventions.outputs.project import ProjectHeads as ProjectHeads
    from headscope.interventions.outputs.reinforce import ReinforceHeads as ReinforceHeads
    from headscope.interventions.outputs.reinforce import reinforced_heads as reinforced_heads
    from headscope.interventions.outputs.scale import ScaleHeads as ScaleHeads
    from headscope.interventions.positions.concentric import ConcentricPositions as ConcentricPositions
    from headscope.interventions.positions.parallel import ParallelContexts as ParallelContexts
    from headscope.interventions.positions.pine import Pine as Pine
    from headscope.interventions.positions.rescale import RescaleRoPE as RescaleRoPE
    from headscope.interventions.positions.select import SelectContexts as SelectContexts
    from headscope.interventions.tasks import TASKS as TASKS
    from headscope.interventions.tasks.arithmetic import Arithmetic as Arithmetic
    from headscope.interventions.tasks.base import Task as Task
    from headscope.interventions.tasks.documents import DocumentsTask as DocumentsTask
    from headscope.interventions.tasks.embedding_position import EmbeddingPosition as EmbeddingPosition
    from headscope.interventions.tasks.facts import Facts as Facts
    from headscope.interventions.tasks.few_shot import FewShot as FewShot
    from headscope.interventions.tasks.lm_eval import LmEval as LmEval
    from headscope.interventions.tasks.multiple_choice import MultipleChoice as MultipleChoice
    from headscope.interventions.tasks.needle import NeedleTask as NeedleTask
    from headscope.interventions.tasks.text_kl import TextKL as TextKL
    from headscope.interventions.tasks.text_loss import TextLoss as TextLoss

_HOME = {
    "EDITS": "edits",
    "TASKS": "tasks",
    "AblateHeads": "outputs.ablate",
    "AdaptSpanLogits": "attention.adapt_span",
    "AddToHeads": "outputs.add",
    "AffineHeads": "outputs.affine",
    "ClampHeads": "outputs.clamp",
    "ScaleSinks": "attention.sinks",
    "CalibrateAttention": "attention.calibrate",
    "SwapKeys": "attention.swap",
    "EvictKeys": "attention.evict",
    "ForcePattern": "attention.force",
    "BoostRecent": "attention.recent",
    "DecayBeyondWindow": "attention.decay_beyond_window",
    "EmphasizeSpan": "attention.emphasize_span",
    "KnockOut": "attention.knock_out",
    "Paint": "attention.paint",
    "PruneTokens": "attention.prune",
    "ScaleImageSinks": "attention.image_sinks",
    "padded_patches": "attention.prune",
    "RaiseSpanLogits": "attention.raise_span",
    "ScaleSpanLogits": "attention.scale_span",
    "SpotLight": "attention.spotlight",
    "HeadTemperature": "attention.temperature",
    "RedistributeSinks": "attention.visual",
    "Composed": "base",
    "Edit": "declared",
    "FITS": "fitted",
    "DECODINGS": "decoding",
    "Guidance": "decoding.guidance",
    "SaliencyRejection": "decoding.sgrs",
    "Fit": "fitted.base",
    "ITI": "fitted.iti",
    "LoFiT": "fitted.lofit",
    "lora": "fitted.lora",
    "EditValueVectors": "neurons.value_vectors",
    "Evaluation": "evaluation",
    "HeadEdit": "head_edit",
    "Intervention": "base",
    "circuit_roles": "mechanisms.repair",
    "force_heads": "mechanisms.repair",
    "study_anchor": "mechanisms.anchoring",
    "study_suppression": "mechanisms.suppression",
    "NeedleTask": "tasks.needle",
    "Arithmetic": "tasks.arithmetic",
    "DocumentsTask": "tasks.documents",
    "EmbeddingPosition": "tasks.embedding_position",
    "Facts": "tasks.facts",
    "FewShot": "tasks.few_shot",
    "LmEval": "tasks.lm_eval",
    "MultipleChoice": "tasks.multiple_choice",
    "PatchHeads": "outputs.patch",
    "ConcentricPositions": "positions.concentric",
    "ParallelContexts": "positions.parallel",
    "Pine": "positions.pine",
    "RescaleRoPE": "positions.rescale",
    "SelectContexts": "positions.select",
    "ProjectHeads": "outputs.project",
    "ReinforceHeads": "outputs.reinforce",
    "reinforced_heads": "outputs.reinforce",
    "ScaleHeads": "outputs.scale",
    "Task": "tasks.base",
    "TextKL": "tasks.text_kl",
    "TextLoss": "tasks.text_loss",
    "apply": "applying",
    "evaluate": "evaluation.evaluate",
    "export": "exporting",
    "head_means": "outputs.measuring",
    "head_samples": "outputs.measuring",
    "load_intervention": "load",
    "masking": "evaluation.masking",
    "pasta": "attention.emphasize_span",
    "paint": "attention.raise_span",
    "paint_tokens": "attention.raise_span",
    "adaptive_factors": "attention.scale_span",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        module = import_module(f"{__name__}.{_HOME[name]}")
        return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
