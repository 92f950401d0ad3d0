"""Results that were damaged or changed: every outcome is a report or one line, and never another number."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from headscope.interp.errors import HeadscopeError
from headscope.interp.records.record import save_record
from headscope.interp.reports.results import Results
from headscope.interp.results.evaluation import Evaluation
from headscope.interp.results.scores import HeadScores
from headscope.interp.runs.journal import Journal
from headscope.interp.runs.sealed import SEAL, sealed, sha256

VALUES: tuple[Any, ...] = (None, True, -1, 0, 10**30, 0.5, float("nan"), "", "x", "../../x", [], [None], {}, {"a": 1})
CONFIG = {"method": "sinks", "seed": 0}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one result of each kind."""
    folder = tmp_path_factory.mktemp("results") / "whole"
    rng = np.random.default_rng(0)
    details = tuple({"length": 100 * (i % 2), "depth": 50.0, "recall": 0.5, "kept": True} for i in range(4))
    made = {"model": {"name": "m", "revision": None}, "seed": 0, "trials": 4, "kept": 4}
    HeadScores("induction", rng.random((4, 2, 3)), made, np.array([0, 0, 1, 1]), details).save(folder)
    kinds = {"no edit": "baseline", "ablated": "intervention", "random (seed 0)": "control"}
    rows = [
        {
            "task": "needle",
            "condition": name,
            "kind": kind,
            "of": "ablated" if kind == "control" else "",
            "trial": trial,
        }
        | {"score": rng.random(), "length": 100, "depth": 50.0 * trial}
        for name, kind in kinds.items()
        for trial in range(3)
    ]
    Evaluation.from_rows(rows, {"needle": "recall"}, made).save(folder / "evaluation")
    record = xr.Dataset(
        {"entropy": (("example", "layer", "head", "query"), rng.random((2, 2, 3, 4)).astype(np.float32))},
        {"example": [0, 1], "layer": [0, 1], "head": [0, 1, 2], "query": np.arange(4)},
    )
    save_record(record, folder / "record")
    journal = Journal(folder / "sinks.trials.jsonl", CONFIG)
    for trial in range(3):
        journal.add(trial, {"scores": [[0.5]], "details": {}})
    (folder / "discover-induction.config.json").write_text(json.dumps({"settings": {"model": "m"}}))
    return folder


def read(folder: Path) -> tuple[dict[str, Any], dict[int, Any]]:
    """All numbers of a folder, through the report and the journal."""
    results = Results.find(folder)
    results.report(None, None).save(folder / "report.html")
    (folder / "report.html").unlink()
    held = {place: found.trials.tobytes() for place, found in results.scores.items()}
    held |= {place: found.trials.to_json() for place, found in results.evaluations.items()}
    held |= {place: found["entropy"].to_numpy().tobytes() for place, found in results.records.items()}
    return held, Journal(folder / "sinks.trials.jsonl", CONFIG).entries


def places(document: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of a JSON document."""
    keys = list(document) if isinstance(document, dict) else range(len(document)) if isinstance(document, list) else ()
    for key in keys:
        yield document, key
        yield from places(document[key])


def mutated(document: Any, rng: np.random.Generator) -> Any:
    """A copy with one value replaced, deleted or doubled."""
    document = copy.deepcopy(document)
    everywhere = list(places(document))
    container, key = everywhere[rng.integers(len(everywhere))]
    how = rng.integers(4)
    if how == 0:
        del container[key]
    elif how == 1 and isinstance(container, list):
        container.append(container[key])
    else:
        container[key] = copy.deepcopy(VALUES[rng.integers(len(VALUES))])
    return document


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """The bytes with one flipped, cut off, or taken out."""
    at = int(rng.integers(max(1, len(data))))
    flipped = data[:at] + bytes([data[at] ^ (1 << int(rng.integers(8)))]) + data[at + 1 :] if data else b"x"
    return (flipped, data[:at], data[:at] + data[at + 1 :])[rng.integers(3)]


def outcome(folder: Path, numbers: Any) -> str:
    try:
        found = read(folder)
    except HeadscopeError as error:
        assert "\n" not in str(error)
        return "refused"
    return "same" if found == numbers else "other"


FILES = (
    *("induction.json", "induction.parquet", "evaluation/evaluation.json", "evaluation/evaluation.parquet"),
    *("record/record.json", "sinks.trials.jsonl", "discover-induction.config.json"),
)


@pytest.mark.parametrize("name", FILES)
def test_damaged_bytes_are_refused_or_harmless(whole: Path, tmp_path: Path, name: str) -> None:
    """Never another number; a journal that lost its end runs those trials again."""
    folder = Path(shutil.copytree(whole, tmp_path / "r"))
    numbers = read(folder)
    data, rng = (folder / name).read_bytes(), np.random.default_rng(1)
    for _ in range(20):
        (folder / name).write_bytes(damaged(data, rng))
        found = outcome(folder, numbers)
        if name.endswith("jsonl") and found == "other":
            kept = Journal(folder / name, CONFIG).entries
            assert len(kept) < 3 and all(numbers[1][trial] == result for trial, result in kept.items())
        else:
            assert found in ("refused", "same")
        (folder / name).write_bytes(data)
    assert outcome(folder, numbers) == "same"


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".json")])
@pytest.mark.parametrize("resealed", [False, True])
def test_changed_json_is_refused(whole: Path, tmp_path: Path, name: str, resealed: bool) -> None:
    """Values of other types and sizes at every place; with a checksum made anew (a forgery) still no raw exception."""
    folder = Path(shutil.copytree(whole, tmp_path / "r"))
    numbers = read(folder)
    document, rng = json.loads((folder / name).read_text()), np.random.default_rng(2)
    for _ in range(20):
        changed = mutated(document, rng)
        if resealed and isinstance(changed, dict):
            changed.pop(SEAL, None)
            (folder / name).write_bytes(sealed(changed))
        else:
            (folder / name).write_text(json.dumps(changed))
        found = outcome(folder, numbers)
        assert resealed or "config" in name or found == "refused" or changed == document
    (folder / name).write_text(json.dumps(document, indent=3))  # laid out anew, nothing changed
    assert outcome(folder, numbers) == "same"


def test_a_table_in_another_order_is_not_read_as_other_heads(whole: Path, tmp_path: Path) -> None:
    """The same rows sorted by score; then with a checksum made anew."""
    folder = Path(shutil.copytree(whole, tmp_path / "r"))
    rows = pd.read_parquet(folder / "induction.parquet").sort_values("score")
    rows.to_parquet(folder / "induction.parquet", index=False)
    with pytest.raises(HeadscopeError, match="not the file that it was written with"):
        HeadScores.load(folder / "induction.json")
    document = json.loads((folder / "induction.json").read_text())
    document.pop(SEAL)
    document["files"]["induction.parquet"] = sha256((folder / "induction.parquet").read_bytes())
    (folder / "induction.json").write_bytes(sealed(document))
    with pytest.raises(HeadscopeError, match="rows are not in the order trial, layer, head"):
        HeadScores.load(folder / "induction.json")
