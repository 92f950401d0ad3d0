"""Plotly figures of what headscope measures; every function returns a ``plotly.graph_objects.Figure``."""

from headscope.interp.plots.blocks import block_map
from headscope.interp.plots.cache import budget_curve, overlap_map, policy_map
from headscope.interp.plots.comparison import agreement_map, score_scatter
from headscope.interp.plots.doses import dose_response
from headscope.interp.plots.learning import learning_curve
from headscope.interp.plots.maps import head_map, ranked, statistic_map
from headscope.interp.plots.pattern import pattern
from headscope.interp.plots.patterns import pattern_map
from headscope.interp.plots.picture import on_picture
from headscope.interp.plots.profile import statistic_profile
from headscope.interp.plots.prompt import head_on_prompt
from headscope.interp.plots.style import show_token
from headscope.interp.plots.tasks import evaluation, needle_grid

__all__ = [
    "agreement_map",
    "block_map",
    "budget_curve",
    "dose_response",
    "evaluation",
    "head_map",
    "head_on_prompt",
    "learning_curve",
    "needle_grid",
    "on_picture",
    "overlap_map",
    "pattern",
    "pattern_map",
    "policy_map",
    "ranked",
    "score_scatter",
    "show_token",
    "statistic_map",
    "statistic_profile",
]
