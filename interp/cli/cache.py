"""``headscope discover cache``: what policies for a cache lose at budgets, over prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from headscope.interp.cli.app import Run

BUDGETS, POLICIES_ASKED = "128,256,512", "snapkv,h2o,keydiff,streaming_llm,oracle,top_k"


def discover_cache(
    run: Run, policies: str | None, budgets: str | None, data: Path | None, given: dict[str, Any]
) -> None:
    """Measure the policies and print what they lose; with ``--out``, results and a page.

    Settings (``given["set"]``) are those of ``lose`` (answer, at, first, layers) and of the policies that have them.
    A dry run goes through ``lose`` as far as its work, so that it refuses what the run would.
    Without ``data``, prompts are passages of the bundled prose, ``--samples`` (8) of ``--lengths`` (1,088) tokens.
    """
    from headscope.interp.cache import POLICIES, lose
    from headscope.interp.cli import console
    from headscope.interp.cli.settings import assignments, numbers
    from headscope.interp.cli.trace import read_prompts
    from headscope.interp.errors import HeadscopeError
    from headscope.interp.plots.style import interval_text
    from headscope.interp.prompts import sequences
    from headscope.interp.registry import make, shared_out
    from headscope.interp.runs import estimate

    names = [name.strip() for name in (policies or POLICIES_ASKED).split(",") if name.strip()]
    POLICIES.check(names)
    if len(set(names)) < len(names):
        raise HeadscopeError(f"--policies names each policy once; got {','.join(names)}")
    named = {option for option in ("depths", "text", "lengths", "samples") if given.get(option) is not None}
    if named & ({"depths", "text"} if data is None else named):
        raise HeadscopeError("discover cache takes --data, or --samples and --lengths, and no --depths or --text")
    settings = assignments(given.get("set") or ())
    own: dict[str, Any] = {key: settings.pop(key) for key in ("answer", "at", "first", "layers") if key in settings}
    classes = {name: POLICIES[name] for name in names}
    shares = shared_out(classes, settings)
    chosen = [make(cls, name, shares[name]) for name, cls in classes.items()]
    asked = [each for each in (budgets or BUDGETS).split(",") if each.strip()]
    lm = run.load()
    prompts: list[Any] = []
    if data is not None:
        prompts = read_prompts([], data)
    else:
        lengths = [1088] if given.get("lengths") is None else numbers(given["lengths"], int, "--lengths")
        samples = 8 if given.get("samples") is None else given["samples"]
        if len(lengths) != 1:  # passages of several lengths begin alike, and are no trials of their own
            raise HeadscopeError("discover cache takes passages of one length: --lengths 1088")
        prompts += [one.ids for one in sequences.first_windows(lm, None, lengths[0], samples)]
    if run.dry:
        with estimate.dry_run() as work:
            lose(lm, chosen, asked, prompts, out=run.out, **own)
        return run.show_estimate(lm, work)
    found = lose(lm, chosen, asked, prompts, out=run.out, **own)
    shown: dict[str, Any] = {"policies": names, "budgets": asked, "data": data, **own, **settings}
    run.save_config("discover cache", shown)
    if run.out is not None:
        from headscope.interp.reports.cache import cache_page

        console.note(f"page: {cache_page(found).save(run.out / 'cache.html')}")
    rows = found.to_frame().to_dict("records")
    if run.as_json:
        return console.show_json({"losses": rows, "provenance": found.provenance})
    table = [
        {
            "policy": row["policy"],
            "budget": row["budget"],
            "recall": row["recall"],
            "interval": interval_text(row["ci_low_recall"], row["ci_high_recall"]) or "-",
            "error of z": row["error"],
            "divergence": row["divergence"],
            "kept": row["kept"],
            "needed": row["needed"],
        }
        for row in rows
    ]
    if found.few:
        console.note(found.few)
    console.show_rows(table, f"what policies lose: means over heads and {found.prompts} prompts", False)
