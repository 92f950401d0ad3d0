"""Measurements become tables and a picture: every number where it belongs, and nothing invented."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from headscope.kernels.benchmarks import launches, lengths, pages
from headscope.kernels.benchmarks.picture import GAP, HEIGHT, _spread, draw

SVG = "{http://www.w3.org/2000/svg}"


def result() -> dict[str, Any]:
    """Time like n squared and memory like n for ``ours``; a case that stops early, and one that failed."""
    sizes = [2048 << i for i in range(4)]
    rows: list[dict[str, Any]] = [
        {"what": "ours", "tokens": n, "ms": (n / 2048) ** 2, "extra bytes": n * 512} for n in sizes
    ]
    rows += [{"what": "eager <maps>", "tokens": n, "ms": 50.0, "extra bytes": 1 << 30} for n in sizes[:2]]
    rows += [{"what": "broken", "tokens": n, "error": "OutOfMemoryError"} for n in sizes]
    made = {"kind": "lengths", "machine": {"device": "A <GPU>", "torch": "2"}, "command": "python x"}
    return {**made, "rows": rows, "heads": 32, "d": 128}


def test_the_picture_is_wellformed_and_its_lines_are_straight_where_powers_are() -> None:
    root = ET.fromstring(draw(result()))
    texts = ["".join(node.itertext()) for node in root.iter(f"{SVG}text")]
    assert texts.count("ours") == 2 and texts.count("eager <maps>") == 2 and "broken" not in texts
    assert {"2k", "4k", "8k", "16k", "10 ms", "time", "memory beyond the inputs"} <= set(texts)
    lines = [node.get("d") or "" for node in root.iter(f"{SVG}path") if node.get("stroke-width") == "2"]
    points = [[tuple(map(float, point.split())) for point in line[1:].split("L")] for line in lines]
    assert [len(line) for line in points] == [4, 2, 4, 2]
    for line in (points[0], points[2]):
        slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in zip(line, line[1:], strict=False)]
        assert slopes[0] < 0 and slopes == pytest.approx([slopes[0]] * 3, rel=1e-2)  # coordinates have one decimal
    assert not [node for node in root.iter(f"{SVG}rect")]  # no background: both of GitHub's show through


def test_names_keep_apart_and_inside() -> None:
    for at in ({"a": 100.0, "b": 100.0, "c": 103.0}, {"a": 330.0, "b": 331.0, "c": 332.0, "d": 60.0}):
        heights = sorted(_spread(at).values())
        assert all(b - a >= GAP - 1e-9 for a, b in zip(heights, heights[1:], strict=False))
        assert heights[-1] <= HEIGHT - 44


def test_the_tables_of_the_readme_are_written_between_their_marks(tmp_path: Path) -> None:
    folder, readme = tmp_path / "results", tmp_path / "README.md"
    folder.mkdir()
    readme.write_text(f"before\n{pages.BEGIN}\nold\n{pages.END}\nafter\n")
    pages.rewrite(readme, folder)
    assert readme.read_text() == f"before\n{pages.BEGIN}\nNo result is committed yet.\n{pages.END}\nafter\n"
    pages.save(result(), folder, "lengths")
    (folder / "others.json").write_text(json.dumps({"times": []}))  # of gpu.py: no table here
    for _ in range(2):  # and again, from what was written
        pages.rewrite(readme, folder)
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| ours | 1.00 (1) | 4.00 (2) | 16.00 (4) | 64.00 (8) |" in text
    assert "| eager <maps> | 50.00 (1,024) | 50.00 (1,024) |  |  |" in text and "    python x\n" in text
    (picture,) = folder.glob("*.svg")
    assert f"](results/{picture.name})" in text


def test_ratios_and_differences_are_to_the_untraced_case() -> None:
    untraced = {"case": "untraced", "seconds": [10.0, 12.0, 11.0], "peak bytes": 30 << 30}
    passed = [{"passed": True}]
    rows = {"case": "rows", "seconds": [12.1], "peak bytes": 31 << 30, "record bytes": 1 << 29, "checks": passed}
    bad = {"case": "bad", "seconds": [11.0], "peak bytes": 30 << 30, "checks": [*passed, {"passed": False}]}
    cases = [untraced, rows, bad, {"case": "gone", "seconds": [], "error": "no memory"}]
    made = {"kind": "long context", "machine": {"device": "GPU"}, "command": "c", "shape": "8b", "cases": cases}
    text = pages.page({**made, "tokens": 1024, "chunk": 256})
    assert "| untraced | 11.00 | 1.00x | 30.00 | +0.00 |  |  |" in text
    assert "| rows | 12.10 | 1.10x | 31.00 | +1.00 | 0.50 | pass |" in text
    assert "| FAIL |" in text and "| gone | no memory |" in text and "in chunks of 256" in text


def test_lengths_are_measured_and_eager_stops_where_told(tmp_path: Path) -> None:
    arguments = ["--lengths", "32", "64", "--d", "16", "--longest-eager", "32", "--budget", "0.001"]
    path = lengths.main([*arguments, "--out", str(tmp_path)])
    assert path is not None
    rows = json.loads(path.read_text())["rows"]
    measured = {(row["what"], row["tokens"]) for row in rows if row["ms"] > 0 and math.isfinite(row["ms"])}
    ours = {"SDPA", "rows", "rows and output", "columns and lse"}
    assert {(what, n) for what in ours for n in (32, 64)} <= measured
    assert ("eager maps", 32) in measured and ("eager maps", 64) not in measured


def test_kernels_of_equal_calls_are_told_apart() -> None:
    """Two a call, whatever order they are told in; the gap before the first is the caller's."""
    calls = [10.0 * n for n in range(3)]
    started = [launches.Started("b", at + 3.0, at + 7.0) for at in calls]
    started += [launches.Started("a", at, at + 2.0) for at in calls]
    assert launches.launches(started, 3) == [("a", 0.0, 2.0), ("b", 1.0, 4.0)]
    with pytest.raises(ValueError, match="differ"):
        launches.launches(started[:-1], 3)
