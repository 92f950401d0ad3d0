"""The explorer in a real browser: a saved page, and the live widget behind loopback HTTP (``browser.served``).

Its heads are made so that what must be seen is known: L0H0 looks at the token before, L0H1 at the first token. Colours
are compared with a tolerance of 3 of 255 a channel, for the rounding of 512 steps of a scale and of the screen.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from headscope.interp.attention.call import AttentionCall
from headscope.interp.benchmarks.browser import CHROMIUM, chromium, opened, served
from headscope.interp.explorer import Explorer, Run, record_run
from headscope.interp.explorer.kept import KeptLayer
from headscope.interp.models.language_model import LanguageModel
from headscope.kernels.masks import Mask
from tests.interp.explorer.conftest import PROMPT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed: apt-get install chromium"),
]
N = 300
YELLOW, PURPLE = (253, 231, 37), (68, 1, 84)
RED, BLUE, NEUTRAL = (103, 0, 31), (5, 48, 97), (247, 247, 247)
WAIT = "document.querySelector('.headscope-explorer')?.headscope?.open"


def made(name: str, *, turned: bool = False) -> Run:
    """A layer of two heads whose patterns are known; ``turned`` swaps them."""
    generator = torch.Generator().manual_seed(0)
    key = torch.randn(1, 2, N, 64, generator=generator).sign()
    before = torch.cat([key[:, :1, :1], key[:, :1, :-1]], 2)
    first = key[:, 1:, :1].expand(-1, -1, N, -1)
    query = torch.cat([before, first], 1)
    if turned:
        query, key = query.flip(1), key.flip(1)
    call = AttentionCall(query, key, key, Mask.causal(), 1.0, layer=0, module="layers.*")
    tokens = [f" word{i}" for i in range(N)]
    tokens[7], tokens[290] = "<img src=x onerror=alert(1)>", " needle"
    return Run(name, tokens, {0: KeptLayer(call)}, spans={"needle": [(290, 291)], "start": [(0, 10)]})


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as one:
        yield one


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, lm: LanguageModel) -> dict[str, Path]:
    """Pages: two made runs; a run of a model with an answer; one with a budget for little."""
    folder = tmp_path_factory.mktemp("pages")
    run = record_run(lm, PROMPT + " <img/src=x>", generate=5, spans={"middle": (40, 60)})
    return {
        "made": Explorer(made("plain"), made("turned", turned=True), title="made").save(folder / "made.html"),
        "model": Explorer(run, title="tiny <b>llama</b>").save(folder / "model.html"),
        "small": Explorer(made("plain"), title="small").save(folder / "small.html", budget_mb=0.12),
    }


def do(page: Any, code: str) -> Any:
    return page.evaluate(f"() => {{ const app = document.querySelector('.headscope-explorer').headscope; {code} }}")


def settle(page: Any) -> None:
    """Until every answer is there and drawn."""
    page.wait_for_function(
        "() => { const app = document.querySelector('.headscope-explorer').headscope; return app.source.idle && "
        "!app.drawing && !app.panes.some((pane) => pane.unfinished().length && !app.source.saved); }"
    )
    page.wait_for_timeout(120)


def colour(page: Any, pane: int, query: float, key: float) -> tuple[int, ...]:
    """The colour on the screen of a cell of the map of ``pane``, beside the number that may stand in its middle."""
    from PIL import Image

    place = f"one.pixel({key} + 0.2, {query} + 0.2)"
    code = f"const one = app.panes[{pane}], box = one.canvas.getBoundingClientRect(), [x, y] = {place};"
    x, y = do(page, f"{code} return [x + box.left, y + box.top];")
    shot = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    found: Any = shot.getpixel((int(x), int(y)))
    return tuple(found)


def like(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    return bool(np.abs(np.subtract(one, other)).max() <= 3)


def test_a_saved_page_opens_offline_and_shows_what_is_known(browser: Any, saved: dict[str, Path]) -> None:
    with opened(browser, saved["made"].as_uri(), offline=True) as page:
        page.wait_for_function(WAIT)
        do(page, "app.openHead([0, 0]);")
        settle(page)
        # far: a cell of 2 x 2 tokens holds the diagonal below; the mass of cells on it is 1/2 or 1
        assert do(page, "return app.panes.map((one) => one.run);") == [0, 1, 2]
        do(page, "app.view.centre(200, 200, 12, app.panes[0].size); app.draw();")
        settle(page)
        assert do(page, "return app.panes[0].shownLevel;") == 0
        assert like(colour(page, 0, 200, 199), YELLOW) and like(colour(page, 0, 201, 200), YELLOW)
        assert like(colour(page, 0, 200, 197), PURPLE) and like(colour(page, 0, 205, 200), PURPLE)
        assert like(colour(page, 1, 200, 199), PURPLE)  # there the head looks at the first token
        assert like(colour(page, 2, 200, 199), BLUE) and like(colour(page, 2, 205, 199), NEUTRAL)
        hidden = colour(page, 0, 200, 203)
        assert min(hidden) > 225 and not like(hidden, YELLOW)
        do(page, "app.view.centre(100, 0, 12, app.panes[0].size); app.draw();")
        settle(page)
        assert like(colour(page, 1, 100, 0), YELLOW) and like(colour(page, 2, 100, 0), RED)
        assert like(colour(page, 0, 100, 0), PURPLE)
        do(page, "app.whole();")
        settle(page)
        assert do(page, "return app.panes[0].shownLevel;") == 1
        far = colour(page, 1, 250, 0)
        assert like(far, YELLOW) and like(colour(page, 0, 250, 20), PURPLE)
        assert page.said == page.errors == [] and page.requests == [saved["made"].as_uri()]


def test_a_saved_page_is_used_by_pointer_and_keys(browser: Any, saved: dict[str, Path]) -> None:
    with opened(browser, saved["model"].as_uri(), offline=True) as page:
        page.wait_for_function(WAIT)
        assert page.locator(".crumb").first.inner_text() == "tiny <b>llama</b>"
        grid = page.locator("canvas.grid").first
        grid.hover(position={"x": 60, "y": 30})
        tip = page.locator(".tip").inner_text()
        assert "Layer 0, head" in tip and "entropy" in tip and "[" in tip and "80 %" in tip
        page.locator("thead th", has_text="sink mass").click()
        rows = page.locator("tbody tr")
        values = [float(x.replace("e−", "e-")) for x in rows.locator("td:nth-child(3)").all_inner_texts()]
        assert len(values) == 8 and values == sorted(values, reverse=True)
        rows.first.click()
        settle(page)
        assert do(page, "return app.screen;") == "map"
        canvas = page.locator("canvas.map")
        box = canvas.bounding_box()
        page.mouse.move(box["x"] + 200, box["y"] + 260)
        before = do(page, "return app.view.scale;")
        for _ in range(8):
            page.mouse.wheel(0, -120)
        settle(page)
        assert do(page, "return app.view.scale;") > 4 * before and do(page, "return app.panes[0].shownLevel;") == 0
        assert "query" in page.locator(".reading").inner_text() and "entropy" in page.locator(".reading").inner_text()
        x = do(page, "return app.view.x;")
        page.keyboard.press("ArrowRight")
        assert do(page, "return app.view.x;") > x
        page.keyboard.press("-")
        page.keyboard.press("]")
        settle(page)
        page.keyboard.press("/")
        page.keyboard.type("w4")
        found = page.locator(".found").inner_text()
        text = do(page, "return app.open.runs[0].tokens.join('');")
        assert found == f"{text.count('w4')} found" and text.count("w4") > 3
        page.keyboard.press("Enter")
        assert page.locator(".found").inner_text().startswith("1 of ")
        page.keyboard.press("Escape")
        page.mouse.click(box["x"] + 60, box["y"] + 300)  # a token of the left axis
        settle(page)
        assert do(page, "return app.screen;") == "token"
        page.locator(".token .chip", has_text="mean of each layer").click()
        page.keyboard.press("Escape")
        assert do(page, "return app.screen;") == "map"
        page.locator(".chip", has_text="answer").click()
        settle(page)
        assert do(page, "return app.line.answer.rows;") == 6
        page.keyboard.press("Escape")
        page.keyboard.press("Escape")
        assert do(page, "return app.screen;") == "heads"
        assert page.locator("img").count() == 0 and page.said == page.errors == []
        assert page.requests == [saved["model"].as_uri()]


def test_a_page_says_what_it_leaves_out(browser: Any, saved: dict[str, Path]) -> None:
    assert saved["small"].stat().st_size <= 120_000
    with opened(browser, saved["small"].as_uri(), offline=True) as page:
        page.wait_for_function(WAIT)
        page.locator(".foot summary").first.click()
        lines = page.locator(".foot li").all_inner_texts()
        assert any(line.startswith("whole maps of chosen heads: all of 2") for line in lines), lines
        assert any(": 0 of " in line or ": 1 of 2" in line for line in lines), lines
        do(page, "app.openHead([0, 0]); app.view.centre(200, 200, 20, app.panes[0].size); app.draw();")
        settle(page)
        assert "not in this file" in page.locator(".foot").inner_text()
        do(page, "app.openToken('query', 150);")
        settle(page)
        assert page.said == page.errors == []


def test_the_live_widget_asks_for_what_is_seen(browser: Any, lm: LanguageModel) -> None:
    explorer = Explorer(made("plain"), made("turned", turned=True), title="live", height=620)
    with served(explorer) as (address, asked), opened(browser, address) as page:
        page.wait_for_function(WAIT)
        assert page.locator(".headscope-explorer").count() == 2  # two views of one widget
        assert asked == ["open", "open"]
        do(page, "app.openHead([0, 0]);")
        settle(page)
        tiles = {one for one in asked if one.startswith("tile/")}
        assert tiles and all(one.split("/")[5] in ("2", "1") for one in tiles)  # level of the far view
        assert not any(int(one.split("/")[7]) > int(one.split("/")[6]) for one in tiles)  # none above the diagonal
        del asked[:]
        do(page, "app.view.centre(200, 199, 40, app.panes[0].size); app.draw();")
        settle(page)
        near = {one for one in asked if one.startswith("tile/")}
        assert {one.split("/")[5] for one in near} == {"0"} and len(near) <= 3 * 2
        assert like(colour(page, 0, 200, 199), YELLOW) and like(colour(page, 0, 200, 198), PURPLE)
        del asked[:]
        do(page, "app.view.centre(200, 199, 30, app.panes[0].size); app.draw();")
        settle(page)
        assert not [one for one in asked if one in near]  # what is at hand is not asked for again
        bytes_held = page.evaluate("() => globalThis[Symbol.for('headscope.recent')].bytes")
        assert 0 < bytes_held <= 32e6
        page.locator("canvas.map").first.click(position={"x": 200, "y": 250})
        for key, screen in (("]", "map"), ("+", "map"), ("Escape", "heads")):  # the focus stays in the widget
            page.keyboard.press(key)
            assert do(page, "return app.screen;") == screen
        assert do(page, "return app.head;") == [0, 1]
        page.keyboard.press("/")
        page.keyboard.type("needle")
        assert page.locator(".found").first.inner_text() == "1 found"
        do(page, "app.openHead([0, 0]); app.view.centre(200, 199, 30, app.panes[0].size); app.draw();")
        page.locator(".headscope-explorer").nth(1).locator("tbody tr").first.click()
        page.wait_for_timeout(300)
        assert page.locator(".headscope-explorer").nth(1).get_attribute("data-screen") == "map"
        page.evaluate("() => document.body.setAttribute('data-jp-theme-light', 'false')")
        page.wait_for_timeout(200)
        assert page.locator(".headscope-explorer").first.get_attribute("data-theme") == "dark"
        settle(page)
        assert max(colour(page, 0, 200, 205)) < 60
        page.evaluate("() => window.closing.forEach((close) => close())")
        assert page.said == page.errors == [] and all(url.startswith((address, "data:")) for url in page.requests)


def test_the_cache_is_bounded(browser: Any, lm: LanguageModel) -> None:
    explorer = Explorer(made("plain"), title="bounded")
    with served(explorer) as (address, _), opened(browser, address) as page:
        page.wait_for_function(WAIT)
        held, first, last = page.evaluate(
            "() => { const recent = globalThis[Symbol.for('headscope.recent')]; recent.limit = 1e6; "
            "for (let i = 0; i < 100; i++) recent.put(`x${i}`, i, 32768); "
            "return [recent.bytes, recent.get('x0') ?? null, recent.get('x99')]; }"
        )
        assert held <= 1e6 and first is None and last == 99
