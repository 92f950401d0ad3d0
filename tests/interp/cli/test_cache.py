"""``headscope discover cache``: from prompts to results, a page and a table; figures hold the numbers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from headscope.interp import plots
from headscope.interp.cli import main
from headscope.interp.errors import HeadscopeError
from headscope.interp.results.cache import CacheLosses
from headscope.interp.results.scores import find_all


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    printed = capsys.readouterr()
    return int(stopped.value.code or 0), printed.out, printed.err


def test_policies_are_compared(capsys: pytest.CaptureFixture[str], model: str, tmp_path: Path) -> None:
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"input_ids": list(range(5 + i, 60 + i))}) + "\n" for i in range(3)))
    out = tmp_path / "runs"
    asked = ["--policies", "snapkv,h2o,top_k", "--budgets", "8,0.5", "--data", str(data), "--out", str(out)]
    code, printed, err = run(
        capsys, "discover", "cache", "--model", model, *asked, "--set", "window=4", "--set", "answer=6", "--json"
    )
    assert code == 0, err
    rows = json.loads(printed)["losses"]
    assert [(r["policy"], r["budget"]) for r in rows] == [
        (p, b) for p in ("snapkv(window=4)", "h2o", "top_k") for b in ("8", "0.5")
    ]
    found = CacheLosses.load(out)
    assert rows[0]["recall"] == pytest.approx(found.mean()[0, 0].mean())
    assert rows[0]["kept"] == 8 >= rows[0]["needed"] > 0
    assert rows[0]["ci_low_recall"] is None and rows[0]["prompts"] == 3  # too few for an interval
    assert (out / "cache.html").stat().st_size > 1_000_000 and not find_all(out)
    config = json.loads((out / "discover-cache.config.json").read_text())
    assert config["settings"]["window"] == 4 and config["settings"]["answer"] == 6
    code, _, err = run(capsys, "report", str(out))
    page = (out / "report.html").read_text()
    assert code == 0 and "What a cache would lose" in page and "keys in common at 0.5" in page, err
    assert "3 prompts: no intervals" in page
    _figures_hold(found)


def test_the_table_says_what_was_kept_and_a_dry_run_what_would_be_refused(
    capsys: pytest.CaptureFixture[str], model: str, tmp_path: Path
) -> None:
    data = tmp_path / "prompts.jsonl"
    data.write_text(json.dumps({"input_ids": list(range(5, 60))}) + "\n")
    asked = ["discover", "cache", "--model", model, "--policies", "snapkv", "--data", str(data)]
    window = ["--set", "window=4", "--set", "answer=6"]
    code, printed, err = run(capsys, *asked, *window, "--budgets", "4")
    assert code == 0 and "kept" in printed and "1 prompt: no intervals" in err
    assert "warning: snapkv(window=4) at a budget of 4: it always keeps 4" in err and "survey.py" not in err
    for wrong, said in (
        (["--budgets", "3", *window], "always keeps 4 keys"),
        (["--budgets", "8"], "64 are the answer"),
    ):
        code, printed, err = run(capsys, *asked, *wrong, "--dry-run")
        assert (code, printed) == (2, "") and said in err


def _figures_hold(found: CacheLosses) -> None:
    curve = plots.budget_curve(found, "error")
    assert [trace.name for trace in curve.data] == list(found.policies)
    np.testing.assert_allclose(np.array(curve.data[1].y), found.mean("error")[1].mean((1, 2)))
    heat = plots.policy_map(found, "0.5").data[0]
    np.testing.assert_allclose(np.array(heat.z), found.mean()[:, 1].reshape(3, -1))
    common = plots.overlap_map(found).data[0]
    np.testing.assert_allclose(np.array(common.z, dtype=float), found.overlap[:, :, 0].mean(-1))
    assert len(plots.budget_curve(found, "needed").data) == 2  # top_k keeps no fixed keys
    for call in (lambda: plots.policy_map(found, "9"), lambda: plots.budget_curve(found, "loss")):
        with pytest.raises(HeadscopeError, match="choose"):
            call()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["discover", "sinks", "--policies", "snapkv"], "runs by itself"),
        (["discover", "cache", "--policies", "snapvk"], "did you mean 'snapkv'"),
        (["discover", "cache", "--policies", "knorm", "--set", "window=3"], "knorm has no setting 'window'"),
        (["discover", "cache", "--depths", "3"], "no --depths"),
        (["discover", "cache", "--data", "x.txt", "--samples", "3"], "takes --data, or --samples"),
        (["discover", "cache", "--policies", "h2o,h2o"], "each policy once"),
    ],
)
def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    code, _, err = run(capsys, *arguments, "--model", "nowhere")
    assert code == 2 and said in " ".join(err.split())
