"""Evaluation beside no edit and random heads."""

from headscope.interp.results.evaluation import Evaluation as Evaluation
