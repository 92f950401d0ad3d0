"""One page that compares policies for a cache: what they lose, where, and how far they keep the same keys."""

from __future__ import annotations

from headscope.interp import plots
from headscope.interp.reports.page import Report
from headscope.interp.reports.readable import readable
from headscope.interp.results.cache import MEASURES, CacheLosses

SHOWN = ("policy", "budget", "recall", "ci_low_recall", "ci_high_recall", "error", "divergence", "kept", "needed")


def cache_page(found: CacheLosses) -> Report:
    """Curves over budgets, maps of heads and keys in common at each budget, and the table behind them."""
    page = Report("What a cache would lose", _of(found))
    return add_losses(page, found).provenance(found.provenance)


def add_losses(page: Report, found: CacheLosses) -> Report:
    """Add what ``cache_page`` shows."""
    page.text(
        "Each head's own attention, as the full model computes it, held against what it would be if only the kept keys "
        "were there. Recall: the share of its mass on kept keys. Error: |z - z'| / |z| of its output. Divergence: "
        "KL(kept || full) in nats. Kept: keys of the prompt that a row sees. Needed: how many of them hold 95 % of the "
        "mass on kept ones."
    )
    page.text(
        "What is lost in one layer does not reach the next here; an evaluation under the edit EvictKeys says that."
    )
    if found.few:
        page.text(found.few)
    for measure in MEASURES:
        if found.to_frame()[measure].notna().any():
            page.figure(plots.budget_curve(found, measure), f"{measure} by budget")
    for budget in found.budgets:
        page.figure(plots.policy_map(found, budget), f"recall of every head at {budget}")
    for budget in found.budgets:
        page.figure(plots.overlap_map(found, budget), f"keys in common at {budget}")
    caption = f"Means over layers, heads and prompts ({_of(found)})"
    return page.table(readable(found.to_frame()[list(SHOWN)]), caption)


def _of(found: CacheLosses) -> str:
    """Of which model and prompts."""
    model = (found.provenance.get("model") or {}).get("name", "")
    prompts = [int(one["prompt"]) for one in found.details]
    return f"{model}, {len(prompts)} prompts of {min(prompts)} to {max(prompts)} tokens"
