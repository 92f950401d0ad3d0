"""What heads encode and do: linear probes on their outputs, what they write towards the next token, patching.

Names are imported on first use (PEP 562), so that the command line starts without importing torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headscope.probes.circuits.circuit import Circuit as Circuit
    from headscope.probes.circuits.circuit import compare_circuits as compare_circuits
    from headscope.probes.circuits.coloured import coloured_objects as coloured_objects
    from headscope.probes.circuits.evaluation import evaluate_circuit as evaluate_circuit
    from headscope.probes.circuits.evaluation import faithfulness_curve as faithfulness_curve
    from headscope.probes.circuits.figure import circuit_figure as circuit_figure
    from headscope.probes.circuits.finding import find_circuit as find_circuit
    from headscope.probes.circuits.finding import measure_edges as measure_edges
    from headscope.probes.circuits.ioi import ioi as ioi
    from headscope.probes.lenses.attribution import logit_attribution as logit_attribution
    from headscope.probes.linear.activations import head_outputs as head_outputs
    from headscope.probes.linear.dataset import Labelled as Labelled
    from headscope.probes.linear.dataset import load_labelled as load_labelled
    from headscope.probes.linear.dataset import subject_number as subject_number
    from headscope.probes.linear.dataset import truth as truth
    from headscope.probes.linear.heads import probe_activations as probe_activations
    from headscope.probes.linear.heads import probe_heads as probe_heads
    from headscope.probes.linear.result import Directions as Directions
    from headscope.probes.linear.result import ProbeResult as ProbeResult
    from headscope.probes.patching.activation import patch_heads as patch_heads
    from headscope.probes.patching.activation import patch_places as patch_places
    from headscope.probes.patching.attribution import attribution_patching as attribution_patching
    from headscope.probes.patching.causal_trace import causal_trace as causal_trace
    from headscope.probes.patching.pairs import Pairs as Pairs
    from headscope.probes.patching.path import path_effect as path_effect
    from headscope.probes.patching.path import path_patching as path_patching

_HOME = {
    "Circuit": "circuits.circuit",
    "Directions": "linear.result",
    "Labelled": "linear.dataset",
    "Pairs": "patching.pairs",
    "ProbeResult": "linear.result",
    "attribution_patching": "patching.attribution",
    "causal_trace": "patching.causal_trace",
    "circuit_figure": "circuits.figure",
    "coloured_objects": "circuits.coloured",
    "compare_circuits": "circuits.circuit",
    "evaluate_circuit": "circuits.evaluation",
    "faithfulness_curve": "circuits.evaluation",
    "find_circuit": "circuits.finding",
    "head_outputs": "linear.activations",
    "ioi": "circuits.ioi",
    "load_labelled": "linear.dataset",
    "logit_attribution": "lenses.attribution",
    "measure_edges": "circuits.finding",
    "patch_heads": "patching.activation",
    "patch_places": "patching.activation",
    "path_effect": "patching.path",
    "path_patching": "patching.path",
    "probe_activations": "linear.heads",
    "probe_heads": "linear.heads",
    "subject_number": "linear.dataset",
    "truth": "linear.dataset",
}

__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(_HOME)
