"""Values over a picture: where cells, marks and boxes are drawn, and what the slider shows."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from headscope.interp import plots
from headscope.interp.errors import HeadscopeError
from headscope.interp.heads.vision.attention import image_attention
from headscope.interp.prompts.grids import ImageGrid
from headscope.interp.prompts.vision_data import ask
from headscope.interp.reports.page import Report
from headscope.interp.results.picture_values import PictureValues


def values(layers=3, box=(10.0, -10.0, 70.0, 50.0), name="<b>a", **more) -> PictureValues:
    """Two rows and three columns over a picture of 80 x 40 pixels: cropped left and right, padded above and below."""
    grid = ImageGrid(np.arange(6).reshape(2, 3) + 5, box, (80, 40))
    x = xr.DataArray(
        np.arange(layers * 6.0).reshape(layers, 2, 3), {"layer": range(layers)}, ("layer", "row", "column")
    )
    return PictureValues(x, grid, np.zeros((40, 80, 3), dtype=np.uint8), name=name, **more)


def test_cells_lie_where_their_tokens_come_from() -> None:
    fig = plots.on_picture(values(boxes={"car": (20.0, 5.0, 40.0, 15.0)}).mark({1: [5, 10]}))
    heat, marks = fig.data[2], fig.data[3]  # of layer 1
    assert list(heat.x) == [10, 30, 50, 70] and list(heat.y) == [-10, 20, 50]  # pixels upwards from the lower edge
    assert heat.z.tolist() == [[9, 10, 11], [6, 7, 8]] and heat.text[1][0] == "row 0, column 0<br>token 5"
    assert list(marks.x) == [20, 60] and list(marks.y) == [35, 5]
    assert not len(fig.data[1].x) and [one.visible for one in fig.data] == [True, True, False, False, False, False]
    picture, shape = fig.layout.images[0], fig.layout.shapes[0]
    assert (picture.x, picture.y, picture.sizex, picture.sizey) == (0, 40, 80, 40)
    assert picture.source.startswith("data:image/png;base64,")
    assert (shape.x0, shape.x1, shape.y0, shape.y1) == (20, 40, 35, 25) and shape.label.text == "car"
    assert list(fig.layout.yaxis.range) == [-10, 50] and list(fig.layout.xaxis.range) == [0, 80]
    steps = fig.layout.sliders[0].steps
    assert [s.label for s in steps] == ["0", "1", "2"]
    assert steps[1].args[0]["visible"] == [False, False, True, True, False, False]
    named = plots.on_picture(values(), labels=["A", " <b>", "c"]).layout.sliders[0]
    assert [s.label for s in named.steps] == ["0 A", "1 ·&lt;b&gt;", "2 c"]
    assert "&lt;b&gt;a" in fig.layout.annotations[0].text and "2 x 3 tokens" in fig.layout.annotations[0].text


def test_before_and_after_share_their_colours() -> None:
    before, after = values(), values(name="b")
    after = PictureValues(-2 * after.values, after.grid, after.picture)
    fig = plots.on_picture([before, after], names=["before", "after"])
    assert [one.zmax for one in fig.data[::2]] == [10, 10, 22, 22, 34, 34]
    assert [one.zmin for one in fig.data[::2]][:2] == [-10, -10] and fig.data[2].showscale is False
    whole = plots.on_picture([before, after], common=True)
    assert {one.zmax for one in whole.data[::2]} == {34}
    alone = plots.on_picture(values(1).sel(layer=0))
    assert not alone.layout.sliders and len(alone.data) == 2


def test_a_report_shows_pictures_of_tiles(vision_lm, picture, tmp_path) -> None:
    """Both grids of Idefics' picture side by side; a large picture is reduced."""
    maps = image_attention(vision_lm("idefics3"), [ask(picture(0, 900, 1200))])
    assert [one.grid.view for one in maps] == ["whole", "tiles"]
    fig = plots.on_picture([one.mean() for one in maps])
    assert "2 x 2 tokens, whole picture" in fig.layout.annotations[0].text
    assert "4 x 4 tokens, tiles of the picture" in fig.layout.annotations[1].text
    assert fig.layout.images[0].source.startswith("data:image/jpeg") and fig.layout.images[0].sizex == 1200
    page = Report("Pictures").figure(fig, "Attention").save(tmp_path / "report.html")
    assert page.stat().st_size > len(fig.layout.images[0].source) / 2


def test_what_cannot_be_drawn_gets_one_line() -> None:
    one = values()
    wide = PictureValues(one.values.expand_dims(head=2), one.grid, one.picture)
    for given, said in (
        ([], "no values to draw"),
        (wide, r"take .mean\('head'\)"),
        ([one, values(2)], "need the same layers"),
        (PictureValues(one.values * np.nan, one.grid, one.picture), "NaN everywhere"),
    ):
        with pytest.raises(HeadscopeError, match=said):
            plots.on_picture(given)
    with pytest.raises(HeadscopeError, match="2 labels for a slider of 3 positions"):
        plots.on_picture(one, labels=["a", "b"])
    with pytest.raises(HeadscopeError, match="do not end on the grid"):
        PictureValues(one.values[..., :2], one.grid, one.picture)
    with pytest.raises(HeadscopeError, match="have no layers"):
        one.mean("layer").mark({0: [5]})
    with pytest.raises(HeadscopeError, match="no values at"):
        one.sel(layer=9)
