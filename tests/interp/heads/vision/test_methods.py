"""vhd, visual_sinks and object_region against eager float64 runs of nine kinds of models with their own processors.

Tolerance: as in ``test_context_divergence``: float32 weights and outputs through two layers, 1e-4.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from headscope.interp import heads
from headscope.interp.errors import HeadscopeError
from headscope.interp.heads.vision.generating import generated_maps
from headscope.interp.heads.vision.object_region import auroc, region_table
from headscope.interp.heads.vision.sinks import LayerSinks, read_sinks
from headscope.interp.prompts.look import look
from headscope.interp.prompts.vision_data import ask

NEAR = 1e-4


def test_vhd_is_the_norm_of_what_the_picture_changes_in_z(seeing, dense, read) -> None:
    one, want = read
    scores = heads.vhd(seeing, data=[one.item], k=2, progress=False)
    kept = torch.ones(len(one.ids), dtype=torch.bool)
    kept[torch.from_numpy(one.tokens)] = False
    words = {
        name: x[:, kept] for name, x in one.prompt.inputs.items() if x.shape[:2] == (1, len(kept)) and x.dim() == 2
    }
    moved = want["z"][:, :, -1] - dense(seeing, words)["z"][:, :, -1]
    expected = np.linalg.norm(moved, axis=-1)
    np.testing.assert_allclose(scores.trials[0], expected, rtol=0, atol=NEAR * max(1.0, expected.max()))
    assert scores.provenance["t_vhd"] == pytest.approx(np.sort(expected, 1)[:, 2:].sum(), rel=1e-3)
    assert expected.max() > 100 * NEAR


def test_visual_sinks_are_phi_and_masses_of_the_rows_behind(seeing, read) -> None:
    """With the two largest dimensions of layer 1's own stream, and a tau that parts its image tokens."""
    one, want = read
    x = want["stream"][1]
    phi = np.abs(x) / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    dims = np.argsort(phi[one.tokens].max(0))[-2:].tolist()
    phi = phi[:, dims].max(-1)
    ordered = np.sort(phi[one.tokens])
    at = int(np.diff(ordered).argmax())
    tau = float((ordered[at] + ordered[at + 1]) / 2)
    image = np.zeros(len(one.ids), dtype=bool)
    image[one.tokens] = True
    sinks = image & (phi > tau)
    found = read_sinks(seeing, one, dims, {1: tau})
    rows = want["pattern"][:, :, one.end :]
    assert sinks.any() and found[1].sinks.tolist() == sinks.tolist() and not found[0].sinks.any()
    for layer, of in found.items():
        np.testing.assert_allclose(of.mass, rows[layer][..., image].sum(-1), rtol=0, atol=NEAR)
        np.testing.assert_allclose(of.received, rows[layer].mean((0, 1)), rtol=0, atol=NEAR)
    on = rows[1][..., sinks].sum(-1)
    np.testing.assert_allclose(found[1].on, on, rtol=0, atol=NEAR)
    np.testing.assert_allclose(found[1].score("sink_mass", 0.5, 0.2), on.mean(-1), rtol=0, atol=NEAR)
    told = found[1].told()
    assert told["phi_below"] < tau < told["phi_above"] and told["sinks"] == np.flatnonzero(sinks).tolist()
    received = rows[1].mean((0, 1))
    expected = received[sinks].mean() / received[image & ~sinks].mean()
    assert told["times"] == pytest.approx(expected, rel=1e-3)


def test_scores_of_a_known_layer() -> None:
    """Two heads, three rows: one looks at the picture past its sink in two rows of three, the other at the sink."""
    image, sinks = np.array([False, True, True, False]), np.array([False, True, False, False])
    mass = np.array([[0.5, 0.4, 0.1], [0.8, 0.8, 0.8]])
    on = np.array([[0.1, 0.2, 0.1], [0.8, 0.6, 0.8]])
    of = LayerSinks(3, 20.0, np.array([25.0, 30.0, 1.0, 1.0]), image, sinks, mass, on, np.array([0.5, 0.3, 0.1, 0.1]))
    assert of.score("centric", 0.5, 0.2) == pytest.approx([2 / 3, 0.0])
    assert of.score("ratio", 0.5, 0.2) == pytest.approx([(0.8 + 0.5) / 2, (0.25) / 3])
    assert of.score("sink_mass", 0.5, 0.2) == pytest.approx(on.mean(1))
    assert of.score("image_mass", 0.5, 0.2) == pytest.approx(mass.mean(1))
    told = of.told()
    assert told.pop("times") == pytest.approx(3.0)
    assert told == {"layer": 3, "tau": 20.0, "sinks": [1], "phi_below": 1.0, "phi_above": 30.0}
    blind = LayerSinks(3, None, None, image, np.zeros(4, bool), mass, 0 * on, np.ones(4))
    assert blind.score("centric", 0.5, 0.2).tolist() == [0, 0] and blind.told() == {
        "layer": 3,
        "tau": None,
        "sinks": [],
    }


def test_object_region_is_auroc_of_the_last_row(seeing, read) -> None:
    one, row = read[0], read[1]["pattern"][:, :, -1]
    box = one.item.boxes["thing"]
    scores = heads.object_region(seeing, data=[one.item], progress=False)
    pairs = [(g.positions.ravel(), g.covered(box).ravel()) for g in one.grids]
    covered = {int(p): c for positions, shares in pairs for p, c in zip(positions, shares, strict=True)}
    inside = np.array([covered[p] >= min(0.5, max(covered.values())) for p in sorted(covered)])
    values = row[..., sorted(covered)]
    a, b = values[..., inside, None], values[..., None, ~inside]
    expected = ((a > b) + 0.5 * (a == b)).mean((-1, -2))
    np.testing.assert_allclose(scores.trials[0], expected, rtol=0, atol=1.5 / (inside.sum() * (~inside).sum()))
    table = region_table(seeing, [one.item], level="head").set_index(["layer", "head"])
    assert len(table) == 8
    shares = np.array([covered[p] for p in sorted(covered)])
    for (layer, head), got in table.iterrows():
        own = values[layer, head]
        assert got["mass"] == pytest.approx((own * shares).sum(), abs=NEAR)
        if own.sum() > 100 * NEAR:  # a sliding window may leave nothing of the picture
            assert got["lift"] == pytest.approx((own * shares).sum() / own.sum() / shares.mean(), rel=1e-2)


def test_auroc_by_hand() -> None:
    inside = np.array([True, False, True, False])
    assert auroc(np.array([[3.0, 1.0, 2.0, 0.0], [0.0, 1.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]]), inside).tolist() == [
        1,
        0,
        0.5,
    ]


def test_what_cannot_be_read_gets_one_line(vision_lm, picture, grouped) -> None:
    lm = vision_lm("llava")
    for given, said in (
        ({"data": []}, "hold no chat"),
        ({"data": [[{"role": "user", "content": "Hello"}]]}, "chat 0 of the vision data holds no picture"),
        ({"data": "nowhere"}, "nowhere is no vision data"),
        ({"samples": 0}, "samples=0"),
    ):
        with pytest.raises(HeadscopeError, match=said):
            heads.vhd(lm, progress=False, **given)
    with pytest.raises(HeadscopeError, match="reads no pictures"):
        heads.vhd(grouped, progress=False)
    with pytest.raises(HeadscopeError, match="dimensions and tau together"):
        heads.visual_sinks(lm, tau=3.0)
    with pytest.raises(HeadscopeError, match="find no sink in a stream of"):
        read_sinks(lm, look(lm, ask(picture(0))), [0], {1: 1000.0})
    unseen = [ask(picture(0), boxes={"edge": (0, 0, 9, 40)}), ask(picture(0), boxes={"whole": (0, 0, 64, 40)})]
    with pytest.raises(
        HeadscopeError, match="none of 2 trials was kept.*of the boxes"
    ):  # cut off on the left; nothing beside it
        heads.object_region(lm, data=unseen, progress=False)
    with pytest.raises(HeadscopeError, match="of which the model sees a part"):
        region_table(lm, unseen)
    bare = [ask(picture(0))]
    for region in (lambda: heads.object_region(lm, data=bare, progress=False), lambda: region_table(lm, bare)):
        with pytest.raises(HeadscopeError, match='the data have no boxes.* "boxes": {"name": .left, top'):
            region()
    some = heads.object_region(lm, data=[*bare, ask(picture(0), boxes={"a": (16, 4, 40, 36)})], progress=False)
    assert some.provenance["note"] == "1 of 2 chats have no boxes and are left out"
    scores = heads.visual_sinks(lm, data=[ask(picture(0))], progress=False)
    assert (scores.mean == 0).all() and "no dimension of the stream" in scores.provenance["note"]


def test_one_item_or_one_chat_is_a_list_of_it(vision_lm, picture) -> None:
    lm, item = vision_lm("llava"), ask(picture(0), "What is it?")
    want = heads.vhd(lm, data=[item], k=2, progress=False)
    for one in (item, item.chat):
        assert (heads.vhd(lm, data=one, k=2, progress=False).mean == want.mean).all()
    with pytest.raises(HeadscopeError, match="max_new_tokens=0: generate at least 1"):
        generated_maps(lm, look(lm, item), max_new_tokens=0)
