"""Sweeps over data sets of prompts: ``sweep``, and what it batches, shares out and gives each example."""

from headscope.interp.sweeps.run import sweep

__all__ = ["sweep"]
