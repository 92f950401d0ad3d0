"""One page that compares policies for a cache: what they lose, where, and how far they keep the same keys."""

from __future__ import annotations

from headscope.interp import plots
from headscope.interp.reports.page import Report
from headscope.interp.results.cache import MEASURES, CacheLosses

SHOWN = ("policy", "budget", "recall", "ci_low_recall", "ci_high_recall", "error", "divergence", "needed")


def cache_page(found: CacheLosses) -> Report:
    """Curves over budgets, a map of heads for each budget, keys in common, and the table behind them."""
    made = found.provenance
    model = (made.get("model") or {}).get("name", "")
    prompts = [int(one["prompt"]) for one in found.details]
    page = Report(
        "What a cache would lose", f"{model}, {len(prompts)} prompts of {min(prompts)} to {max(prompts)} tokens"
    )
    page.text(
        "Each head's own attention, as the full model computes it, held against what it would be if only the kept keys "
        "were there. Recall: the share of its mass on kept keys. Error: |z - z'| / |z| of its output. Divergence: "
        "KL(kept || full) in nats. Needed: how many kept keys hold 95 % of the mass on kept ones."
    )
    page.text(
        "What is lost in one layer does not reach the next here; an evaluation under the edit EvictKeys says that."
    )
    for measure in MEASURES:
        if found.to_frame()[measure].notna().any():
            page.figure(plots.budget_curve(found, measure), f"{measure} by budget")
    page.heading("Head by head")
    for budget in found.budgets:
        page.figure(plots.policy_map(found, budget), f"recall of every head at {budget}")
    page.heading("Agreement")
    page.figure(plots.overlap_map(found), f"keys in common at {found.budgets[0]}")
    page.heading("Numbers")
    return page.table(found.to_frame()[list(SHOWN)], "Means over layers, heads and prompts").provenance(made)
