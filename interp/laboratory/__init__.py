"""Where models are made that show a phenomenon: small, by committed recipes, and watched while they learn.

An **experiment** trains small models under a claim of a paper and says what held: a file in ``experiments/``, and a
line in ``EXPERIMENTS``. Its models are written on ``headscope.interp.attention.module.AttentionModule``, so that every
statistic and edit works on them. ``run_experiment`` runs one under several seeds, ``train`` is the one loop, and a
``Watch`` says what is measured on the way.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from headscope.interp.registry import Registry

if TYPE_CHECKING:
    from headscope.interp.laboratory.experiment import Experiment
    from headscope.interp.laboratory.experiment import run_experiment as run_experiment
    from headscope.interp.laboratory.training import train as train
    from headscope.interp.laboratory.watch import Watch as Watch

EXPERIMENTS: Registry[Experiment] = Registry(
    "experiment",
    "experiments",
    "headscope.interp.laboratory.experiments",
    {
        "abrupt_icl": "abrupt_icl:AbruptICL",
        "focusft": "focusft:FocuSFT",
        "linear_regression": "linear_regression:LinearRegression",
        "position_bias": "position_bias:PositionBias",
        "scan_and_snap": "scan_and_snap:ScanAndSnap",
        "sink_emergence": "sink_emergence:SinkEmergence",
        "variants": "variants:Variants",
        "vision_transformer": "vision_transformer:VisionTransformerStudy",
    },
)

_PUBLIC = {"run_experiment": "experiment", "train": "training", "Watch": "watch"}  # which need torch

__all__ = ["EXPERIMENTS", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
