"""``headscope compare`` and the comparison section of ``headscope report``, from files to tables, JSON and a page."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from headscope.interp.cli import main
from headscope.interp.results.scores import HeadScores

ATTACK = "<img src=x onerror=alert(1)>"


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    printed = capsys.readouterr()
    return int(stopped.value.code or 0), printed.out, printed.err


def scores(folder: Path, method: str, model: str = "one", layers: int = 6, **change: float) -> np.ndarray:
    """Scores of six trials in a folder; methods of one first letter have the same true scores."""
    rng = np.random.default_rng([ord(method[0]), layers])
    true = rng.random((1, layers, 5))
    trials = true + 0.02 * np.random.default_rng([len(method), len(model)]).standard_normal((6, layers, 5))
    trials[:, 2, 3] += change.get("change", 0.0)
    made = {"model": {"name": model, "revision": "r"}, "parameters": {"samples": 6}, "seed": 0, "unit": "mass"}
    HeadScores(method, trials, made, None, tuple({"sample": i, "kept": True} for i in range(6))).save(folder)
    return trials.mean(0)


def test_methods_on_one_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for method in ("induction", "induced", "sinks"):
        scores(tmp_path / "runs" / method[:4], method)
    out = tmp_path / "runs" / "compared"
    code, printed, err = run(capsys, "compare", str(tmp_path / "runs"), "--k", "5", "--out", str(out), "--json")
    document = json.loads(printed)
    assert (
        code == 0
        and "report:" in err
        and [one["method"] for one in document["runs"]] == ["induced", "induction", "sinks"]
    )
    rows = {(r["a"], r["b"], r["measure"], r["null"]): r for r in document["pairs"]}
    alike = rows["induced", "induction", "spearman", "within layers"]
    assert len(rows) == 3 * 2 * 2 and alike["observed"] > 0.9 and alike["p_holm"] < 0.01
    assert rows["induced", "sinks", "jaccard", "all heads"]["p_holm"] > 0.05
    for measure in ("jaccard", "spearman"):  # what agrees most comes first
        for null in ("within layers", "all heads"):
            shown = [r["observed"] for r in document["pairs"] if (r["measure"], r["null"]) == (measure, null)]
            assert len(shown) == 3 and shown == sorted(shown, reverse=True)
    assert [r["measure"] for r in document["pairs"]] == ["jaccard"] * 6 + ["spearman"] * 6
    assert len(document["shared"]["induced & induction"]) == alike["shared"] >= 3
    names = {
        "compare.json",
        "compare.html",
        *(f"compare_{n}.{e}" for n in ("pairs", "heads") for e in ("csv", "parquet")),
    }
    assert {path.name for path in out.iterdir()} == names
    assert len(pd.read_csv(out / "compare_heads.csv")) == 30
    page = (out / "compare.html").read_text()
    assert "Agreement of methods" in page and "split half pearson" in page
    # compared again, and reported: its own tables are no head scores
    code, printed, _ = run(capsys, "compare", str(tmp_path / "runs"), "--k", "5")
    assert code == 0 and "ranks by every method" in printed and "p (Holm)" in printed
    code, _, _ = run(capsys, "report", str(tmp_path / "runs"))
    page = (tmp_path / "runs" / "report.html").read_text()
    assert code == 0 and "Agreement of methods" in page and "Split-half reliability" in page


def test_one_method_on_two_models(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    before = scores(tmp_path / "a", "induction")
    after = scores(tmp_path / "b", "induction", "other", change=0.5)
    scores(tmp_path / "b", "sinks", "other")
    file = str(tmp_path / "a" / "induction.json")
    code, printed, err = run(capsys, "compare", file, str(tmp_path / "b"), "--out", str(tmp_path / "c"), "--json")
    told = json.loads(printed)["differences"][0]
    assert code == 0 and (told["from"], told["to"]) == (str(tmp_path / "a"), str(tmp_path / "b")) and told["paired"]
    assert (told["heads"][0]["layer"], told["heads"][0]["head"]) == (2, 3)
    assert told["heads"][0]["change"] == pytest.approx(after[2, 3] - before[2, 3])
    frame = pd.read_parquet(tmp_path / "c" / "compare_heads.parquet")
    assert len(frame) == 30 and frame.loc[0, "method"] == "induction" and frame["ci_low"].notna().all()
    assert "sinks is in one run alone" in json.loads(printed)["notes"][0]
    code, printed, err = run(capsys, "compare", file, str(tmp_path / "b"))
    printed, err = " ".join(printed.split()), " ".join(err.split())  # a terminal breaks lines anywhere
    assert (
        code == 0 and "paired over 6 trials" in printed and "would by" in printed and "sinks is in one run alone" in err
    )
    assert "The largest changes whose interval excludes 0" in (tmp_path / "c" / "compare.html").read_text()


def test_models_of_different_shapes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    scores(tmp_path / "a", "induction"), scores(tmp_path / "b", "induction", "other", layers=4)
    command = ("compare", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "c"))
    code, printed, err = run(capsys, *command)
    assert code == 0 and "by relative depth" in printed and "match_heads" in err and "at most" in err
    assert len(pd.read_csv(tmp_path / "c" / "compare_depth.csv")) == 8
    assert "By relative depth" in (tmp_path / "c" / "compare.html").read_text()


def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    scores(tmp_path / "a", "induction"), scores(tmp_path / "b", "sinks", "other")
    (tmp_path / "empty").mkdir()
    for arguments, says in (
        ((tmp_path / "a",), "fewer than two"),
        ((tmp_path / "a", tmp_path / "b"), "compare one method on two models"),
        ((tmp_path / "empty", tmp_path / "a"), "holds no head scores"),
        ((tmp_path / "nowhere.json", tmp_path / "a"), "does not exist"),
    ):
        code, out, err = run(capsys, "compare", *map(str, arguments), "--out", str(tmp_path / "c"))
        assert code == 2 and not out and err.startswith("error: ") and says in err and err.count("\n") == 1
    assert not (tmp_path / "c").exists()


def test_names_are_shown_literally(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for method in ("a", "b"):
        scores(tmp_path, method, ATTACK)
    code, _, _ = run(capsys, "compare", str(tmp_path), "--out", str(tmp_path / "c"))
    assert code == 0 and "<img" not in (tmp_path / "c" / "compare.html").read_text()
