"""A report is one offline file that shows what it was given, literally."""

from __future__ import annotations

import base64
import gzip
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from plotly.offline import get_plotlyjs

from headscope.interp.errors import HeadscopeError
from headscope.interp.reports.page import LIMIT, Report
from headscope.interp.reports.results import Results
from headscope.interp.results.scores import HeadScores

ATTACK = "</script><img src=x onerror=alert(1)>"


class Page(HTMLParser):
    """Elements, attributes and visible text of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] not in ("script", "style"):
            self.words.append(data)

    def unpack(self, name: str) -> str:
        packed = re.search(rf'<script type="application/gzip" id="{name}">([A-Za-z0-9+/=]+)</script>', self.source)
        assert packed, name
        return gzip.decompress(base64.b64decode(packed[1])).decode()


@pytest.fixture
def figure() -> go.Figure:
    fig = go.Figure(go.Heatmap(z=np.arange(6.0).reshape(2, 3), text=[[ATTACK] * 3] * 2))
    return fig.update_layout(height=321)


def test_a_report_holds_its_figures_and_the_library(tmp_path, figure) -> None:
    path = Report("Heads", "of a model").text("One.\n\nTwo.").figure(figure, "A map.").save(tmp_path / "new" / "r.html")
    page = Page(path)
    assert page.unpack("plotly") == get_plotlyjs()
    assert json.loads(page.unpack("data-1")) == json.loads(figure.to_json())
    plot = next(attrs for _, attrs in page.tags if attrs.get("class") == "plot")
    assert plot["data-from"] == "data-1" and plot["style"] == "min-height:321px"
    assert [word for word in page.words if word in ("One.", "Two.")] == ["One.", "Two."]
    assert path.stat().st_size < 2_200_000 < LIMIT
    assert [entry.name for entry in path.parent.iterdir()] == ["r.html"]


def test_a_report_requests_nothing(tmp_path, figure) -> None:
    page = Page(Report("T").figure(figure, "One.").figure(figure, "Two.").save(tmp_path / "r.html"))
    for tag, attrs in page.tags:
        assert tag not in ("link", "iframe", "img", "object", "embed", "base")
        assert "src" not in attrs
        assert (attrs.get("href") or "#").startswith("#")
    assert "http://" not in page.source and "https://" not in page.source and "url(" not in page.source
    policy = next(attrs["content"] for _, attrs in page.tags if "http-equiv" in attrs)
    assert policy is not None and policy.startswith("default-src 'none'")


def test_every_string_is_escaped(tmp_path, figure) -> None:
    frame = pd.DataFrame({ATTACK: [ATTACK, "b"], "n": [1, 2]})
    report = Report(ATTACK, ATTACK).heading(ATTACK).text(ATTACK).table(frame, ATTACK).figure(figure, ATTACK)
    page = Page(report.provenance({ATTACK: ATTACK, "nested": {"a": [ATTACK]}}).save(tmp_path / "r.html"))
    assert "<img" not in page.source and "onerror" not in {name for _, attrs in page.tags for name in attrs}
    assert "".join(page.words).count(ATTACK) >= 10
    assert sum(tag == "script" for tag, _ in page.tags) == 3  # plotly, one figure, the page's own


def test_tables_align_and_format_numbers(tmp_path) -> None:
    frame = pd.DataFrame(
        {
            "name": ["a", None],
            "score": [0.123456, np.nan],
            "share": np.array([0.5, 1], np.float32),
            "n": [12, 3],
            "ok": [True, False],
        }
    )
    page = Page(Report("T").table(frame, "Scores", {"share": ".0%"}).save(tmp_path / "r.html"))
    assert '<td>a</td><td class="number">0.1235</td><td class="number">50%</td>' in page.source
    assert '<td class="number">12</td><td>True</td>' in page.source
    assert '<td>–</td><td class="number">–</td>' in page.source
    assert '<th scope="col" class="number">score</th>' in page.source and "plotly" not in page.source
    empty = Page(Report("T").table(frame.head(0), "None").save(tmp_path / "e.html"))
    assert "no rows" in empty.words


def test_bad_tables_are_named() -> None:
    frame = pd.DataFrame({"name": ["a"], "score": [1.0]})
    for bad, formats, message in (
        (frame[[]], None, "no columns"),
        (frame, {"rank": "d"}, "no column 'rank'"),
        (frame, {"name": ".3f"}, "'.3f' does not fit column 'name'"),
    ):
        with pytest.raises(HeadscopeError, match=message):
            Report("T").table(bad, "Scores", formats)


def test_contents_link_to_every_entry(tmp_path, figure) -> None:
    report = Report("T").heading("First").figure(figure, "A map.").table(pd.DataFrame({"a": [1]}), "Numbers.")
    page = Page(report.save(tmp_path / "r.html"))
    targets = [attrs["href"] for tag, attrs in page.tags if tag == "a"]
    assert targets == ["#section-1", "#figure-1", "#table-1"]
    assert {target.removeprefix("#") for target in targets if target} <= {attrs.get("id") for _, attrs in page.tags}
    assert "Figure 1. A map." in page.words


def test_long_contents_are_sections_with_the_rest_folded(tmp_path) -> None:
    report = Report("T").heading("First")
    for at in range(20):
        report.table(pd.DataFrame({"a": [at]}), f"Numbers {at}.")
    source = Page(report.heading("Last").save(tmp_path / "r.html")).source
    first, folded = source.split("<details><summary>Figures and tables", 1)
    assert "#section-2" in first and "#table-1" not in first and folded.count('href="#table-') == 20


def test_provenance_is_folded_at_the_end_and_adds_up(tmp_path) -> None:
    report = Report("T").text("x").provenance({"model": "m", "seed": 0}).provenance({"seed": 1, "versions": {"a": "1"}})
    source = Page(report.save(tmp_path / "r.html")).source
    assert "<dt>model</dt><dd>m</dd><dt>seed</dt><dd>1</dd>" in source
    assert source.index("<details>") > source.index("<p>x</p>") and "&quot;a&quot;: &quot;1&quot;" in source


def test_a_report_is_the_same_bytes_again(tmp_path, figure) -> None:
    pages = [Report("T").figure(figure, "A").save(tmp_path / name).read_bytes() for name in ("a.html", "b.html")]
    assert pages[0] == pages[1]


def test_lone_surrogates_do_not_stop_a_report(tmp_path) -> None:
    assert "\\udc80" in Report("T").text("\udc80").save(tmp_path / "r.html").read_text(encoding="utf-8")


def test_a_report_past_the_limit_is_refused_and_nothing_is_written(tmp_path) -> None:
    noise = np.random.default_rng(0).random(700_000)
    report = Report("T").figure(go.Figure(go.Scattergl(y=noise)), "Noise")
    with pytest.raises(HeadscopeError, match="more than 6"):
        report.save(tmp_path / "r.html")
    assert not list(tmp_path.iterdir())


def test_an_empty_report_and_an_unwritable_path_are_errors(tmp_path) -> None:
    with pytest.raises(HeadscopeError, match="empty"):
        Report("T").save(tmp_path / "r.html")
    with pytest.raises(HeadscopeError, match="cannot write"):
        Report("T").text("x").save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_scores_beyond_shares_have_no_count_above_a_tenth(tmp_path) -> None:
    HeadScores("induction", np.array([[[0.05, 0.2, 0.7]]])).save(tmp_path)
    HeadScores("logit_attribution", np.array([[[-1.0, 2.0, 0.5]]])).save(tmp_path)
    rows = {row["method"]: row for row in Results.find(tmp_path).summary()}
    assert rows["induction"]["heads_above_0.1"] == 2 and rows["logit_attribution"]["heads_above_0.1"] is None
    page = Page(Results.find(tmp_path).report(None, None).save(tmp_path / "r.html"))
    assert "logit attribution" in page.words and "heads above 0.1" in page.words and "–" in page.words
    assert "logit_attribution" not in [word for word in page.words if "{" not in word][: page.words.index("Provenance")]


def test_a_page_follows_the_readers_colours(tmp_path, figure) -> None:
    source = Report("T").figure(figure, "A map.").save(tmp_path / "r.html").read_text()
    assert "color-scheme: light dark" in source and source.count("prefers-color-scheme: dark") == 2
