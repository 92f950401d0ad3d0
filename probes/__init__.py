"""What heads encode, what they write towards the next token, why they attend, and which of them carry a behaviour.

Linear probes with controls, lenses, shares of logits and scores, gradients of attention without maps, patching,
circuits.

Names are imported on first use (PEP 562), so that the command line starts without importing torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headscope.probes.attribution.composition import composition_scores as composition_scores
    from headscope.probes.attribution.eigen import eigen_scores as eigen_scores
    from headscope.probes.attribution.mlp_decomposition import mlp_decomposition as mlp_decomposition
    from headscope.probes.attribution.qk import qk_attribution as qk_attribution
    from headscope.probes.circuits.circuit import Circuit as Circuit
    from headscope.probes.circuits.circuit import compare_circuits as compare_circuits
    from headscope.probes.circuits.coloured import coloured_objects as coloured_objects
    from headscope.probes.circuits.evaluation import evaluate_circuit as evaluate_circuit
    from headscope.probes.circuits.evaluation import faithfulness_curve as faithfulness_curve
    from headscope.probes.circuits.figure import circuit_figure as circuit_figure
    from headscope.probes.circuits.finding import find_circuit as find_circuit
    from headscope.probes.circuits.finding import measure_edges as measure_edges
    from headscope.probes.circuits.ioi import ioi as ioi
    from headscope.probes.gradients.drop import saliency_drop as saliency_drop
    from headscope.probes.gradients.information_flow import information_flow as information_flow
    from headscope.probes.gradients.integrated import integrated_attention as integrated_attention
    from headscope.probes.gradients.saliency import attention_saliency as attention_saliency
    from headscope.probes.gradients.saliency import saliency_scores as saliency_scores
    from headscope.probes.gradients.saliency_map import saliency_map as saliency_map
    from headscope.probes.lenses.anchored import anchor_lens as anchor_lens
    from headscope.probes.lenses.anchored import anchored_neurons as anchored_neurons
    from headscope.probes.lenses.anchored import away_from_anchor as away_from_anchor
    from headscope.probes.lenses.attribution import logit_attribution as logit_attribution
    from headscope.probes.lenses.attribution import logit_shares as logit_shares
    from headscope.probes.lenses.logit_lens import logit_lens as logit_lens
    from headscope.probes.lenses.neurons import neuron_attribution as neuron_attribution
    from headscope.probes.lenses.recall import answer_shares as answer_shares
    from headscope.probes.lenses.recall import capitals as capitals
    from headscope.probes.lenses.recall import topic_ranks as topic_ranks
    from headscope.probes.lenses.spans import span_attribution as span_attribution
    from headscope.probes.lenses.tuned_lens import TunedLens as TunedLens
    from headscope.probes.lenses.tuned_lens import fit_tuned_lens as fit_tuned_lens
    from headscope.probes.linear.activations import head_outputs as head_outputs
    from headscope.probes.linear.dataset import Labelled as Labelled
    from headscope.probes.linear.dataset import load_labelled as load_labelled
    from headscope.probes.linear.dataset import subject_number as subject_number
    from headscope.probes.linear.dataset import truth as truth
    from headscope.probes.linear.heads import probe_activations as probe_activations
    from headscope.probes.linear.heads import probe_heads as probe_heads
    from headscope.probes.linear.layers import probe_layers as probe_layers
    from headscope.probes.linear.result import Directions as Directions
    from headscope.probes.linear.result import ProbeResult as ProbeResult
    from headscope.probes.patching.activation import patch_heads as patch_heads
    from headscope.probes.patching.activation import patch_places as patch_places
    from headscope.probes.patching.attribution import attribution_patching as attribution_patching
    from headscope.probes.patching.causal_trace import causal_trace as causal_trace
    from headscope.probes.patching.edges import edge_attribution as edge_attribution
    from headscope.probes.patching.knockout import attention_knockout as attention_knockout
    from headscope.probes.patching.pairs import Pairs as Pairs
    from headscope.probes.patching.path import path_effect as path_effect
    from headscope.probes.patching.path import path_patching as path_patching
    from headscope.probes.tokens.dates import date_pairs as date_pairs
    from headscope.probes.tokens.fragmentation import fragmentation as fragmentation
    from headscope.probes.tokens.hops import hop_paths as hop_paths

_HOME = {
    "Circuit": "circuits.circuit",
    "Directions": "linear.result",
    "Labelled": "linear.dataset",
    "Pairs": "patching.pairs",
    "ProbeResult": "linear.result",
    "TunedLens": "lenses.tuned_lens",
    "anchor_lens": "lenses.anchored",
    "anchored_neurons": "lenses.anchored",
    "answer_shares": "lenses.recall",
    "attention_knockout": "patching.knockout",
    "attention_saliency": "gradients.saliency",
    "attribution_patching": "patching.attribution",
    "away_from_anchor": "lenses.anchored",
    "capitals": "lenses.recall",
    "causal_trace": "patching.causal_trace",
    "circuit_figure": "circuits.figure",
    "coloured_objects": "circuits.coloured",
    "compare_circuits": "circuits.circuit",
    "composition_scores": "attribution.composition",
    "eigen_scores": "attribution.eigen",
    "date_pairs": "tokens.dates",
    "edge_attribution": "patching.edges",
    "evaluate_circuit": "circuits.evaluation",
    "faithfulness_curve": "circuits.evaluation",
    "find_circuit": "circuits.finding",
    "fit_tuned_lens": "lenses.tuned_lens",
    "fragmentation": "tokens.fragmentation",
    "head_outputs": "linear.activations",
    "hop_paths": "tokens.hops",
    "information_flow": "gradients.information_flow",
    "integrated_attention": "gradients.integrated",
    "ioi": "circuits.ioi",
    "load_labelled": "linear.dataset",
    "logit_attribution": "lenses.attribution",
    "logit_lens": "lenses.logit_lens",
    "logit_shares": "lenses.attribution",
    "measure_edges": "circuits.finding",
    "mlp_decomposition": "attribution.mlp_decomposition",
    "neuron_attribution": "lenses.neurons",
    "patch_heads": "patching.activation",
    "patch_places": "patching.activation",
    "path_effect": "patching.path",
    "path_patching": "patching.path",
    "probe_activations": "linear.heads",
    "probe_heads": "linear.heads",
    "probe_layers": "linear.layers",
    "qk_attribution": "attribution.qk",
    "saliency_drop": "gradients.drop",
    "saliency_map": "gradients.saliency_map",
    "saliency_scores": "gradients.saliency",
    "span_attribution": "lenses.spans",
    "subject_number": "linear.dataset",
    "topic_ranks": "lenses.recall",
    "truth": "linear.dataset",
}

__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(_HOME)
