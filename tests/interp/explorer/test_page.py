"""The saved page, the widget's messages and the command, without a browser."""

from __future__ import annotations

import base64
import gzip
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headscope.interp import trace
from headscope.interp.cli import main
from headscope.interp.errors import HeadscopeError
from headscope.interp.explorer import Explorer, explore, record_run
from headscope.interp.explorer.assets import FOLDER, PARTS, script, style
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.results.scores import HeadScores
from headscope.interp.statistics import Entropy
from tests.interp.explorer.conftest import PROMPT


def read(page: Path) -> tuple[dict[str, Any], bytes]:
    """What a page says of itself, and its answers' bytes."""
    text = page.read_text(encoding="utf-8")
    parts = {
        name: base64.b64decode(body)
        for name, body in re.findall(r'<script type="application/[\w-]+" id="(\w+)">(.*?)</script>', text)
    }
    return json.loads(gzip.decompress(parts["head"])), parts["data"]


def test_a_page_holds_the_answers_that_it_names(lm: LanguageModel, tmp_path: Path) -> None:
    explorer = explore(lm, PROMPT, spans={"a </script><b>": (3, 9)}, title="a </title><script>alert(1)</script>")
    page = explorer.save(tmp_path / "page.html", heads="L1H2")
    text = page.read_text(encoding="utf-8")
    assert "alert(1)</script>" not in text and text.count("<script") == 3 and "</title><" not in text
    assert re.findall(r"(?:src|href|url\()\s*=?\s*[\"']?https?:", text) == [] and "default-src 'none'" in text
    head, data = read(page)
    assert all(done == of for done, of in head["contents"].values())
    assert head["open"]["runs"][0]["spans"][0]["name"] == "a </script><b>"
    for question in ("tile/0/1/2/mass/0/1/0", "tile/0/0/1/mass/1/0/0", "query/0/149"):
        facts, start, size = head["index"][question]
        packed = np.frombuffer(gzip.decompress(data[start : start + size]), np.uint8)
        kept = packed.reshape(2, -1).T.copy().view("<f2")[:, 0].astype(np.float64)
        whole = np.frombuffer(explorer.answers(question).data, "<f2").astype(np.float64)
        np.testing.assert_array_equal(np.isnan(kept), np.isnan(whole))
        known = ~np.isnan(whole)
        # 6 of 10 bits, rounded: 2**-7 of a value; below 2**-14 halves are evenly spaced, 16 of them apart here
        assert (np.abs(kept - whole)[known] <= np.maximum(whole[known] * 2.0**-7, 2.0**-21)).all()
        assert (kept[known] != whole[known]).any() and facts["rows"] > 0


def test_a_shorter_text_beside_and_no_negative_answer(lm: LanguageModel, tmp_path: Path) -> None:
    short = record_run(lm, PROMPT[:20])
    head, _ = read(Explorer(record_run(lm, PROMPT), short).save(tmp_path / "page.html"))
    assert {"query/0/149", f"query/1/{len(short.tokens) - 1}"} <= set(head["index"])
    with pytest.raises(HeadscopeError, match="generate is a whole number of at least 0, not -2"):
        record_run(lm, PROMPT, generate=-2)


def test_a_page_keeps_its_budget_and_says_what_it_leaves_out(lm: LanguageModel, tmp_path: Path) -> None:
    explorer = Explorer(record_run(lm, PROMPT), record_run(lm, PROMPT))
    size = explorer.save(tmp_path / "small.html", budget_mb=0.2).stat().st_size
    assert 150_000 < size <= 200_000
    head, _ = read(tmp_path / "small.html")
    assert any(done < of for done, of in head["contents"].values())
    with pytest.raises(HeadscopeError, match="the overview alone takes"):
        explorer.save(tmp_path / "no.html", budget_mb=0.01)
    with pytest.raises(HeadscopeError, match="holds no head L7H0"):
        explorer.save(tmp_path / "no.html", heads="L7H0")
    assert not (tmp_path / "no.html").exists()


def test_a_record_of_many_prompts_has_intervals_over_them(lm: LanguageModel) -> None:
    with trace(lm, [Entropy()]) as tracer:
        lm([PROMPT[:60], PROMPT[60:140], PROMPT[140:]])
    record = tracer.record
    explorer = explore(lm, PROMPT, record=record)
    found = {one["name"]: one for one in explorer.answers("open").facts["statistics"]}
    table, about = found["entropy (record)"]["tables"][0], found["entropy (record)"]["about"]
    each = record["entropy"].mean("query").to_numpy().reshape(3, -1)
    np.testing.assert_allclose(table["values"], each.mean(0), rtol=1e-4)
    assert "bootstrap" in about and table["n"] == [3] * 8 and found["entropy"]["about"].startswith("mean over queries")
    assert (np.array(table["low"]) <= each.mean(0)).all() and (np.array(table["low"]) >= each.min(0) - 1e-4).all()


def test_scores_stand_first_with_their_intervals(lm: LanguageModel) -> None:
    scores = HeadScores("mine", np.random.default_rng(0).random((12, 2, 4)))
    explorer = explore(lm, PROMPT, scores=scores)
    found = next(one for one in explorer.answers("open").facts["statistics"] if one["name"] == "mine")
    table = found["tables"][0]
    np.testing.assert_allclose(table["low"], scores.interval[0].ravel(), rtol=1e-4)
    assert found["scores"] and "95%" in found["about"] and table["n"] == [12] * 8
    with pytest.raises(HeadscopeError, match="give scores of the same model"):
        explore(lm, PROMPT, scores=HeadScores("other", np.zeros((3, 1, 4))))


def test_the_widget_answers_messages_and_survives_bad_ones(lm: LanguageModel) -> None:
    widget = explore(lm, "w1 w2 w3 w4").widget
    sent: list[Any] = []
    widget.send = lambda content, buffers=None: sent.append((content, buffers))
    widget._handle_custom_msg({"id": "a-1", "ask": ["tile/0/0/0/mass/0/0/0"]}, [])
    (content, buffers), *_ = sent
    assert content["id"] == "a-1" and content["facts"]["type"] == "f16" and len(buffers[0]) == 2 * 128 * 128
    for bad in ({}, {"ask": "open"}, "open", None):
        widget._handle_custom_msg(bad, [])
    assert len(sent) == 1
    widget._handle_custom_msg({"id": 2, "ask": ["tile/0/99/0/mass/0/0/0", "tile/0/0/0/mass/0/-3/0"]}, [])
    assert "holds no head" in sent[1][0]["error"] and "no such tile" in sent[2][0]["error"]


def test_what_is_shipped_is_one_module_that_loads_nothing() -> None:
    assert {path.name for path in FOLDER.iterdir()} == {*(f"{part}.js" for part in PARTS), "explorer.css"}
    code = script()
    assert code.count("export default") == 1 and not re.search(r"^\s*import\b|\bimport\(|\bfetch\(\"http", code, re.M)
    assert "innerHTML" not in code and "http" not in code + style() and "@import" not in style()


def test_the_command_writes_a_page(lm: LanguageModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "model"
    lm.model.save_pretrained(folder), lm.tokenizer.save_pretrained(folder)

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main(["explore", "--model", str(folder), *arguments])
        printed = capsys.readouterr()
        return int(stopped.value.code or 0), printed.out, printed.err

    out = tmp_path / "page.html"
    code, printed, err = run(
        "--prompt", "w1 w2 w3", "--beside", "w1 w2 w4", "--generate", "2", "-o", str(out), "--json"
    )
    assert code == 0, err
    assert json.loads(printed) == {"page": str(out), "bytes": out.stat().st_size, "tokens": 5}
    head, _ = read(out)
    assert [one["name"] for one in head["open"]["runs"]] == ["first prompt", "second prompt"]
    for bad in (["--prompt", "w1", "--text", "x"], ["--prompt", "w1", "--beside", "w2", "--with", "x"], []):
        code, _, err = run(*bad, "-o", str(out))
        assert code == 2 and err.count("\n") == 1
