"""``headscope fit``: data in, an ordinary edit out, evaluated; bad data and a file that is there are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from headscope.interp.cli import main
from headscope.interp.models import load_model
from headscope.interventions import AddToHeads, AffineHeads, EvictKeys, load_intervention
from headscope.interventions.fitted import FITS

DATA: dict[str, list[dict[str, Any]]] = {
    "iti": [
        {"question": f"{i} and {i + 1}?", "choices": [f"{i} up", f"{i} down"], "labels": [1, 0]} for i in range(10)
    ],
    "lofit": [{"prompt": f"{i} and", "response": f" {i + 1} go"} for i in range(10)],
    "duo_attention": [{"prompt": f"{i} and more", "response": f" {i + 1} go"} for i in range(3)],
}
SETTINGS = {"iti": ("share=0.4", "alpha=3"), "lofit": ("top=3", "epochs=1", "offset_rate=0.1")}
SETTINGS |= {"duo_attention": ("sink=1", "recent=2", "keep_sink=1", "keep_recent=2", "updates=3")}
HEADS = {"iti": 3, "lofit": 3, "duo_attention": 4}


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    printed = capsys.readouterr()
    return int(stopped.value.code or 0), printed.out, printed.err


def test_every_fit_gives_an_edit_to_evaluate(capsys: pytest.CaptureFixture[str], model: str, tmp_path: Path) -> None:
    assert set(DATA) == set(FITS) and all(FITS[kind].source and FITS[kind].unit for kind in FITS)
    edits = []
    for kind, rows in DATA.items():
        data, out = tmp_path / f"{kind}.jsonl", tmp_path / "edits" / kind
        data.write_text("\n".join(map(json.dumps, rows)))
        options = [x for one in SETTINGS[kind] for x in ("--set", one)]
        command = ("fit", kind, "--model", model, "--data", str(data), "--out", str(out), *options)
        code, printed, err = run(capsys, *command, "--json")
        assert code == 0, err
        assert len(json.loads(printed)["heads"]) == HEADS[kind] and json.loads(printed)["file"] == str(out)
        code, _, err = run(capsys, *command)
        assert code == 2 and "is there already" in err and err.count("\n") == 1
        out.with_name(f"{kind}.json").unlink(), out.unlink()
        code, printed, err = run(capsys, *command)
        assert code == 0 and "heads" in printed and "saved:" in err
        edits += ["--with", str(out)]
    lm = load_model(model)
    assert [type(load_intervention(x, lm)) for x in edits[1::2]] == [AddToHeads, AffineHeads, EvictKeys]
    small = ("--set", "length=16", "--set", "passages=2", "--controls", "1", "--json")
    code, printed, err = run(capsys, "evaluate", "text_loss", "--model", model, *edits[2:4], *small)
    assert code == 0, err
    changed = [row["delta"] for row in json.loads(printed)["summary"] if row["kind"] == "intervention"]
    assert len(changed) == 1 and abs(changed[0]) > 1e-6


def test_what_is_refused_in_one_line(capsys: pytest.CaptureFixture[str], model: str, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a"}\n')
    for kind, options, words in (
        ("lofit", (), "row 1"),
        ("iti", (), "row 1"),
        ("nothing", (), "there is no fit 'nothing'"),
        ("lofit", ("--set", "lr=1"), "no setting 'lr'"),
        ("lofit", ("--set", "top=x"), "top must be a whole number"),
    ):
        out = ("--data", str(bad), "--out", str(tmp_path / "x"))
        code, _, err = run(capsys, "fit", kind, "--model", model, *out, *options)
        assert code == 2 and words in err and err.count("\n") == 1, err
    assert not (tmp_path / "x").exists()
