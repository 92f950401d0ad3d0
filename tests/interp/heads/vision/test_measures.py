"""Attention to pictures, its trend, entropy, contrast and fall: against eager float64 weights, and by hand.

Tolerance: weights of float32 softmax are good to 1e-5 (see ``test_heads``), through two layers: 1e-4.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import xarray as xr
from PIL import Image

from headscope.interp import trace
from headscope.interp.errors import HeadscopeError
from headscope.interp.heads.vision.attention import debiased, image_attention, image_entropy, padding_mask
from headscope.interp.heads.vision.carve import carve, enlarged, kept_pixels
from headscope.interp.heads.vision.generating import attention_steps, falls, generated_attention, generated_maps
from headscope.interp.heads.vision.rings import order_table, ring_table
from headscope.interp.prompts.grids import ImageGrid
from headscope.interp.prompts.look import extended, look
from headscope.interp.prompts.vision_data import ask
from headscope.interp.results.picture_values import PictureValues
from headscope.interventions import apply
from headscope.interventions.attention.raise_span import RaiseSpanLogits

NEAR = 1e-4


@pytest.fixture(params=["llava", "idefics3"])
def some(request, vision_lm):
    return vision_lm(request.param)


def by_hand(values, box=None, size=(40, 40), **dims) -> PictureValues:
    """Values (..., row, column) on a grid of their own."""
    values = np.asarray(values, dtype=float)
    shape = values.shape[-2:]
    grid = ImageGrid(np.arange(shape[0] * shape[1]).reshape(shape), box or (0.0, 0.0, *map(float, size)), size)
    laid = xr.DataArray(values, {name: list(at) for name, at in dims.items()}, (*dims, "row", "column"))
    return PictureValues(laid, grid, np.zeros((size[1], size[0], 3), dtype=np.uint8))


def test_maps_are_what_rows_of_text_put_on_the_tokens(seeing, read) -> None:
    one, p = read[0], read[1]["pattern"]
    for maps in image_attention(seeing, [one.item]):
        want = p[:, :, one.end :].mean(2)
        np.testing.assert_allclose(maps.values, want[..., maps.grid.positions], rtol=0, atol=NEAR)
    assert want[..., one.tokens].max() > 100 * NEAR


def test_each_of_two_pictures_has_its_own_map(some, picture, dense) -> None:
    item = ask([picture(0), picture(1, 64, 40)], "Which?")
    one = look(some, item)
    p = dense(some, one.prompt.inputs)["pattern"]
    for rows, want in (("behind", p[:, :, one.end :].mean(2)), ("last", p[:, :, -1])):
        found = image_attention(some, [item], rows=rows)
        assert len(found) == len(one.grids) and {m.grid.image for m in found} == {0, 1}
        for maps in found:
            np.testing.assert_allclose(maps.values, want[..., maps.grid.positions], rtol=0, atol=NEAR)


def test_steps_of_an_answer_are_rows_of_the_whole_text(some, picture, dense) -> None:
    """One pass over prompt and answer, in float64: row end - 1 + t chooses token t."""
    item = ask(picture(0), "What is it?")
    one = look(some, item)
    maps = generated_maps(some, one, max_new_tokens=4)
    with torch.no_grad():
        ids = some.model.generate(**one.prompt.inputs, max_new_tokens=4, do_sample=False)[0, len(one.ids) :].tolist()
    p = dense(some, extended(one.prompt.inputs, ids))["pattern"]
    rows = p[:, :, len(one.ids) - 1 : len(one.ids) - 1 + len(ids)].transpose(2, 0, 1, 3)
    for each in maps:
        np.testing.assert_allclose(each.values, rows[..., each.grid.positions], rtol=0, atol=NEAR)
    table = generated_attention(some, [item], max_new_tokens=4)
    got = table[table["span"] == "image"].pivot(index="step", columns="layer", values="mass")
    np.testing.assert_allclose(got, rows[..., one.tokens].sum(-1).mean(-1), rtol=0, atol=NEAR)
    assert table.groupby(["step", "layer"])["share"].sum().to_numpy() == pytest.approx(1)
    own = dataclasses.replace(item, name="again")
    assert set(falls(generated_attention(some, [own, item], max_new_tokens=4))["n"]) == {2}


def test_falls_by_hand(vision_lm, picture) -> None:
    table = generated_attention(vision_lm("llava"), [ask(picture(0))], max_new_tokens=3)
    made = table.assign(mass=0.5 - 0.1 * table["step"] + 0.2 * table["layer"])
    found = falls(made)
    assert found["slope"].to_numpy() == pytest.approx([-0.1, -0.1]) and (found["falling"] == 1).all()
    assert falls(made, over="layer")["slope"].to_numpy() == pytest.approx(0.2)
    with pytest.raises(HeadscopeError, match="no span 'video': it has image"):
        falls(made, span="video")
    lm = vision_lm("llava")
    one = look(lm, ask(picture(0)))
    with trace(lm, "entropy") as tracer, torch.no_grad():
        lm.model.generate(**one.prompt.inputs, max_new_tokens=2, do_sample=False)
    with pytest.raises(HeadscopeError, match="holds no span_mass"):
        attention_steps(tracer.record)


def test_an_edit_may_name_the_picture(vision_lm, picture) -> None:
    lm, item = vision_lm("llava"), ask(picture(0))
    before = image_attention(lm, [item])[0].values
    with apply(lm, RaiseSpanLogits(span="image")):
        after = image_attention(lm, [item])[0].values
    assert float(after.sum()) > 1.1 * float(before.sum())


def test_entropy_is_of_the_map_alone() -> None:
    even, one = np.full((2, 2), 0.05), np.array([[0.3, 0.0], [0.0, 0.0]])
    found = image_entropy(by_hand([even, one, 0 * one], layer=(0, 1, 2)))
    np.testing.assert_allclose(found, [np.log(4), 0.0, np.nan])
    assert found.dims == ("layer",) and found.attrs["unit"] == "nats"


def test_a_planted_trend_comes_back_and_goes_away() -> None:
    """Two maps of one grid, 0.01 exp(1.2 x) with what is seen between them; a third of another grid has its own fit."""
    x = np.linspace(0, 1, 16).reshape(4, 4)
    bump = np.where(x == x[2, 1], 0.004, 0.0)
    maps = [by_hand([0.01 * np.exp(1.2 * x) + sign * bump], layer=(3,)) for sign in (1, -1)]
    other = by_hand([np.exp(-0.5 * np.linspace(0, 1, 6).reshape(2, 3))], layer=(3,))
    found, table = debiased([*maps, other], threshold=None)
    assert table["sigma"].to_numpy() == pytest.approx([1.2, -0.5], abs=1e-6)
    assert table["r2"].to_numpy() == pytest.approx(1) and table["after"].to_numpy() == pytest.approx(0, abs=1e-6)
    assert table["images"].tolist() == [2, 1] and table["grid"].tolist() == ["4 x 4", "2 x 3"]
    np.testing.assert_allclose(found[0].values[0], (0.01 * np.exp(1.2 * x) + bump) * np.exp(-1.2 * x), rtol=1e-6)
    np.testing.assert_allclose(found[2].values, 1.0, rtol=1e-6)
    with pytest.raises(HeadscopeError, match="maps of layers"):
        debiased([])


@pytest.mark.parametrize(("width", "height", "kept"), [(640, 480, 432), (480, 640, 432), (336, 336, 576)])
def test_padding_is_masked_as_the_authors_do(width: int, height: int, kept: int) -> None:
    """640 x 480 in a square keeps 18 of 24 rows under both of their thresholds (generate_pad_mask, executed)."""
    side = max(width, height)
    box = ((width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2)
    grid = ImageGrid(np.arange(576).reshape(24, 24), box, (width, height))
    assert padding_mask(grid, 0.5).sum() == padding_mask(grid, 0.01).sum() == kept
    masked, table = debiased([by_hand(np.ones((1, 24, 24)), box, (width, height), layer=(0,))])
    assert (masked[0].values > 0).sum() == kept and table["padding"][0] == pytest.approx(1 - kept / 576)
    assert table["on_padding"][0] == pytest.approx(1 - kept / 576)  # spread evenly


def test_rings_and_orders_by_hand() -> None:
    middle = np.zeros((5, 5))
    middle[2, 2] = 8
    maps = by_hand([[np.arange(25.0).reshape(5, 5)], [middle]], layer=(0, 1), head=(0,))
    table = ring_table([maps]).set_index(["layer", "ring"])
    assert table["cells"][0].tolist() == [16, 8, 1]  # as cca.py's table of rings, from the border in
    assert table["mass"][0].tolist() == [12, 12, 12] and table["mass"][1].tolist() == [0, 0, 8]
    assert table["lift"][1, 2] == pytest.approx(25)
    order = order_table([maps]).set_index("layer")
    assert order.loc[0, "raster"] == pytest.approx(1) and order.loc[0, "ring"] == pytest.approx(0, abs=1e-9)
    assert order.loc[1, "raster"] == pytest.approx(0, abs=1e-9) and order.loc[1, "ring"] > 0.2
    rings = ImageGrid(np.arange(576).reshape(24, 24), (0, 0, 1, 1), (1, 1)).rings
    assert np.bincount(rings.ravel()).tolist() == list(range(92, 0, -8))  # 92, 84 ... 4 of 24 x 24


def test_enlarging_is_pils_bilinear_and_lies_where_the_grid_does() -> None:
    values = np.random.default_rng(0).random((6, 9)).astype(np.float32)
    for size in ((96, 120), (4, 7)):
        want = np.asarray(Image.fromarray(values).resize(size[::-1], Image.Resampling.BILINEAR))
        found = enlarged(values, by_hand(values, size=size[::-1]).grid, size)
        np.testing.assert_allclose(found, want, rtol=0, atol=1e-5)  # float32 sums of a few terms below 1
    grid = by_hand(values, (10.0, -4.0, 40.0, 24.0), (50, 20)).grid
    placed = enlarged(values, grid, (20, 50))
    assert (placed[:, :10] == 0).all() and (placed[:, 40:] == 0).all()
    whole = np.asarray(Image.fromarray(values).resize((30, 28), Image.Resampling.BILINEAR))
    np.testing.assert_allclose(placed[:, 10:40], whole[4:24], rtol=0, atol=1e-5)


def test_components_are_kept_by_version() -> None:
    """Five components of 100 pixels above 0: sizes 1, 4, 2, 1, 1, sums 9, 4, 6, 5, 1; three stay at least."""
    values = np.zeros((10, 10))
    values[0, 0], values[0, 4], values[9, 9] = 9.0, 5.0, 1.0
    values[4:6, 4:6], values[8, 1:3] = 1.0, 3.0
    kept = {v: kept_pixels(values, v, 0.09) for v in ("v1", "v2", "v3", "v4")}
    assert kept["v1"].sum() == 9 and (kept["v1"] == (values > 0)).all()
    assert kept["v2"][4, 4] and kept["v2"][8, 1] and kept["v2"][0, 0] and kept["v2"].sum() == 7  # ties: the first
    assert kept["v4"][0, 0] and kept["v4"][8, 1] and kept["v4"][0, 4] and kept["v4"].sum() == 4
    assert (kept["v3"] == kept["v4"]).all()


def test_contrast_is_the_ratio_of_two_answers_attention(some, picture, dense) -> None:
    item = ask(picture(0, 64, 64), "Which colour?", boxes={"a": (0, 0, 9, 9)})
    found = carve(some, item, max_new_tokens=3, layers=[1])
    last, total = [], 0.0
    for text in ("Which colour?", "Write a general description of the image."):
        one = look(some, ask(picture(0, 64, 64), f"{text} Answer the question using a single word or phrase."))
        maps = [m for m in generated_maps(some, one, max_new_tokens=3, layers=[1]) if m.grid.image == 0]
        last.append(maps[-1].values.mean("head").isel(layer=0).to_numpy())
    for t, (a, b) in enumerate(zip(*last, strict=False)):
        total = total + (t + 1) * a / (b + 1e-8)
    np.testing.assert_allclose(found.contrast.values[0], total, rtol=1e-4)
    np.testing.assert_allclose(found.map, enlarged(total, found.contrast.grid, (64, 64)), rtol=1e-4)
    left, top, right, bottom = found.box
    assert found.mask[top:bottom, left:right].sum() == found.mask.sum() > 0
    assert min(found.refined().shape[:2]) in (63, 64) and found.contrast.boxes == {"a": (0, 0, 9, 9)}
    first = carve(some, item, version="v3", layers=[1])
    np.testing.assert_allclose(first.contrast.values[0], last[0][0] / (last[1][0] + 1e-8), rtol=1e-4)


def test_what_cannot_be_carved_gets_one_line(vision_lm, picture) -> None:
    lm = vision_lm("llava")
    with pytest.raises(HeadscopeError, match="choose v1 to v4"):
        carve(lm, ask(picture(0)), version="v5")
    with pytest.raises(HeadscopeError, match="rows='all'"):
        image_attention(lm, [ask(picture(0))], rows="all")
    two = ask(picture(0))
    with pytest.raises(HeadscopeError, match="has 2 texts"):
        carve(lm, dataclasses.replace(two, chat=[*two.chat, *two.chat]))
