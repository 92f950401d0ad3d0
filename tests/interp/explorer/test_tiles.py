"""Tiles, edges and views against the dense pattern: the definition in float64, and the untouched model's own weights.

Tolerance of weights from float32 scores: a score of size s has an error of about eps (d + |s|), which exp makes a
relative one of the weight; lse adds eps log n. With d = 16 and |s| below 30 it is 64 eps of a weight, and of a sum of
weights as much of the sum. Halves on their way to the page add 2**-11 of a value, and 2**-25 to the smallest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from headscope.interp.attention.call import AttentionCall
from headscope.interp.errors import HeadscopeError
from headscope.interp.explorer import Run, record_run, views
from headscope.interp.explorer.answers import DIFFERENCE, Answers
from headscope.interp.explorer.kept import KeptLayer, example_of
from headscope.interp.explorer.tiles import SIDE, Place, Tiles, top_level
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts.vision_data import ask
from headscope.interp.survey.tiny import tiny_model
from headscope.interventions import ScaleSinks, apply
from headscope.kernels import reference
from headscope.kernels.masks import Mask
from headscope.kernels.redistribution import Redistribution
from tests.interp.explorer.conftest import PROMPT, eager

BOUND = 64 * float(np.finfo(np.float32).eps)
HALF = 2.0**-11
N = 300  # more than two tiles a side


def call(**changes: object) -> AttentionCall:
    torch.manual_seed(1)
    query, key = torch.randn(1, 4, N, 16) * 2, torch.randn(1, 2, N, 16)
    made = AttentionCall(query, key, key, Mask.causal(), 16**-0.5, layer=0, module="layers.*")
    return made.with_(**changes)


CALLS = {
    "causal with grouped heads": call(),
    "window": call(mask=Mask.causal(window=50)),
    "softcap": call(softcap=3.0),
    "sink logits": call(sinks=torch.tensor([1.0, -2.0, 0.5, 3.0])),
    "both ways": call(mask=Mask.full()),
    "a bias that takes keys away": call(
        key_bias=torch.where(torch.arange(N) % 7 == 3, -torch.inf, 0.5)[None, None].float()
    ),
    "mass moved": call(redistribution=Redistribution(torch.arange(N) < 1)),
    "left padding": call(mask=replace(Mask.causal(), start=torch.tensor([37]))),
    "right padding": call(mask=replace(Mask.causal(), end=torch.tensor([251]))),
}


def dense(of: AttentionCall) -> np.ndarray:
    """(head, query, key) in float64, without the padding."""
    wide = of.with_(query=of.query.double(), key=of.key.double(), value=of.key.double())
    if of.redistribution is not None:
        from headscope.kernels.redistribution import dense as moved

        scores = wide.inputs()
        p = moved(reference.pattern(scores), of.redistribution)
    else:
        p = reference.pattern(wide.inputs())
    start = 0 if of.mask.start is None else int(of.mask.start)
    stop = N if of.mask.end is None else int(of.mask.end)
    return np.asarray(p[0, :, start:stop, start:stop].numpy())


def whole(tiles: Tiles, head: int, level: int, pool: str, count: int, *, finer: int = 0) -> np.ndarray:
    """A level of a map put together from its tiles."""
    across = -(-count // (SIDE << level))
    cells = -(-count // (1 << level))
    rows = []
    for i in range(across):
        made = []
        for j in range(across):
            tile = tiles.tile(0, head, Place(level, i, j), pool)
            for _ in range(finer):
                tile = tiles.tile(0, head, Place(level, i, j), pool, finer=True)
            made.append(tile.cells)
        rows.append(np.concatenate(made, 1))
    return np.concatenate(rows)[:cells, :cells]


def pooled(p: np.ndarray, width: int, pool: str) -> np.ndarray:
    """The definition of a far view, written out: (query, key) to blocks."""
    fold, at = np.maximum if pool == "max" else np.add, np.arange(0, len(p), width)
    cells = fold.reduceat(fold.reduceat(p, at, 0), at, 1)
    return cells if pool == "max" else cells / np.diff([*at, len(p)])[:, None]


@pytest.mark.parametrize("name", CALLS)
def test_every_level_is_the_dense_map_pooled(name: str) -> None:
    kept = KeptLayer(example_of(CALLS[name], 0))
    p = dense(CALLS[name])
    tiles, count = Tiles({0: kept}), p.shape[1]
    assert kept.queries == count and top_level(count) == (2 if count > 256 else 1)
    for head, level, pool in [(0, 0, "mass"), (3, 0, "mass"), (3, 1, "mass"), (1, 1, "max"), (2, 2, "mass")]:
        found, expected = whole(tiles, head, level, pool, count), pooled(p[head], 1 << level, pool)
        seen = ~np.isnan(found)
        assert (expected[~seen] == 0).all() and seen.any() and (expected[seen] > 0).any()
        assert np.abs(found - expected)[seen].max() <= BOUND * max(1.0, expected.max())
        other = pooled(p[head - 1], 1 << level, pool)
        assert np.abs(found - other)[seen].max() > 1000 * BOUND  # another head's map would be noticed
    assert np.isnan(tiles.tile(0, 0, Place(0, 5, 0)).cells).all()  # beyond the text


@pytest.mark.parametrize("pool", ["mass", "max"])
@pytest.mark.parametrize("name", ["causal with grouped heads", "window", "mass moved"])
def test_an_estimate_says_so_and_becomes_exact(name: str, pool: str) -> None:
    kept = KeptLayer(example_of(CALLS[name], 0))
    tiles = Tiles({0: kept}, work=9_000)  # of 90,000 weights, of which a window hides half of the columns
    first = tiles.tile(0, 1, Place(2, 0, 0), pool)
    assert not first.exact and (first.rows, first.of) == (1, 4)
    p = dense(CALLS[name])[1]
    rows = p[2::4]  # the middle row of every block
    parts = np.add.reduceat(rows, range(0, N, 4), 1) if pool == "mass" else np.maximum.reduceat(rows, range(0, N, 4), 1)
    seen = ~np.isnan(first.cells[:75, :75])
    assert np.abs(first.cells[:75, :75] - parts)[seen].max() <= BOUND
    done = tiles.tile(0, 1, Place(2, 0, 0), pool, finer=True)
    assert done.rows == 2
    for _ in range(2):
        done = tiles.tile(0, 1, Place(2, 0, 0), pool, finer=True)
    assert done.exact
    expected = pooled(p, 4, pool)
    assert np.abs(done.cells[:75, :75] - expected)[seen].max() <= BOUND
    assert np.abs(first.cells[:75, :75] - expected)[seen].max() > 100 * BOUND
    assert tiles.tile(0, 1, Place(2, 0, 0), pool).exact  # asked again, nothing is lost


def test_rows_whose_lse_is_unknown_are_computed_alone() -> None:
    kept = KeptLayer(CALLS["sink logits"])
    Tiles({0: kept}).tile(0, 1, Place(0, 1, 0))
    known = ~kept.lse.isnan()
    assert known[1, 128:256].all() and known.sum() == 128


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3_text", "gpt_oss", "mistral"])
def test_a_recorded_run_has_the_models_own_weights(name: str) -> None:
    model = tiny_model(name)
    ids = torch.randint(3, model.config.vocab_size, (40,), generator=torch.Generator().manual_seed(2)).tolist()
    run = record_run(LanguageModel.wrap(model), ids)
    truth = eager(model, ids)
    answers = Answers([run])
    for layer, kept in run.layers.items():
        for head in range(kept.heads):
            cells = run.tiles.tile(layer, head, Place(0, 0, 0)).cells[:40, :40]
            expected = truth[layer][head, :, :40]
            seen = ~np.isnan(cells)
            assert (expected[~seen] == 0).all()
            assert np.abs(cells - expected)[seen].max() <= BOUND
            facts, data = answers(f"tile/0/{layer}/{head}/mass/0/0/0")
            sent = np.frombuffer(data, "<f2").reshape(SIDE, SIDE)[:40, :40]
            assert np.abs(sent - expected)[seen].max() <= BOUND + HALF and facts["rows"] == facts["of"]
    assert not any(hasattr(one, "headscope") for one in model.modules())


def test_edges_are_the_records_and_the_weights_statistics(lm: LanguageModel) -> None:
    run = record_run(lm, PROMPT, spans={"middle": (40, 60)})
    p = np.stack(eager(lm.model, lm.encode(PROMPT)["input_ids"][0].tolist()))
    answers = Answers([run])
    logs = np.log(np.where(p > 0, p, 1.0))
    definition = {"entropy": -(p * logs).sum(-1), "sink_mass": p[..., :4].sum(-1), "key_mass": p.sum(-2)}
    assert {one["name"] for one in answers("open").facts["edges"]} >= set(definition)
    for name, expected in definition.items():
        for layer, head in [(0, 1), (1, 3)]:
            fine = np.frombuffer(answers(f"edge/0/{layer}/{head}/{name}/0/0").data, "<f4")
            np.testing.assert_array_equal(fine, run.records[0][name].isel(example=0).sel(layer=layer, head=head))
            np.testing.assert_allclose(fine, expected[layer, head], atol=BOUND * 150)
            coarse = np.frombuffer(answers(f"edge/0/{layer}/{head}/{name}/1/0").data, "<f4")
            blocks = [expected[layer, head, i : i + 2].mean() for i in range(0, 150, 2)]
            np.testing.assert_allclose(coarse, blocks, atol=BOUND * 150)
    table = {one["name"]: one["tables"][0] for one in answers("open").facts["statistics"]}
    np.testing.assert_allclose(table["entropy"]["values"], definition["entropy"].mean(-1).ravel(), rtol=1e-4)
    np.testing.assert_allclose(table["span_mass middle"]["values"], p[..., 40:60].sum(-1).mean(-1).ravel(), rtol=1e-4)
    low = np.quantile(definition["entropy"], 0.1, axis=-1).ravel()
    np.testing.assert_allclose(table["entropy"]["low"], low, rtol=1e-4)


def test_a_token_is_seen_from_both_sides(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(views, "CELLS", 64)  # three tokens a cell
    run = record_run(lm, PROMPT)
    p = np.stack(eager(lm.model, lm.encode(PROMPT)["input_ids"][0].tolist())).reshape(8, 150, 150)
    found = views.looks_from(run.layers, 77)
    assert found.width == 3 and found.cells.shape == (8, 50)
    np.testing.assert_allclose(found.cells, p[:, 77].reshape(8, 50, 3).sum(-1), atol=BOUND)
    np.testing.assert_array_equal(found.top[:, 0], p[:, 77].argmax(-1))
    seen = views.looks_at(run.layers, 20)
    np.testing.assert_allclose(seen.cells, p[:, :, 20].reshape(8, 50, 3).max(-1), atol=BOUND)
    np.testing.assert_allclose(seen.mass[:, 0], p[:, :, 20].max(-1), atol=BOUND)
    for question in ("query/0/150", "key/0/-1", "tile/0/0/4/mass/0/0/0", "tile/0/9/0/mass/0/0/0", "edge/0/0/0/no/0/0"):
        with pytest.raises(HeadscopeError):
            Answers([run])(question)
    for question in (
        "tile/0/0/0/mass/40/0/0",
        "tile/0/0/0/mass/0/-1/0",
        "tile/0/0/0/sum/0/0/0",
        "edge/0/0/0/entropy/0/9",
    ):
        with pytest.raises(HeadscopeError):
            Answers([run])(question)
    for question in ("nothing/0", "tile/0", "tile/1/0/0/mass/0/0/0", "", "tile/2/0/0/mass/0/0/0", "answer/0/0/0"):
        with pytest.raises(HeadscopeError):
            Answers([run])(question)


def test_an_answer_is_a_time_line(lm: LanguageModel) -> None:
    run = record_run(lm, PROMPT, generate=6, spans={"first": (0, 10)})
    assert run.prompt_length == 150 and len(run.tokens) == 156
    ids = lm.encode(PROMPT)["input_ids"]
    made = lm.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    assert run.tokens[150:] == [lm.tokenizer.decode([i]) for i in made[0, 150:].tolist()]
    p = np.stack(eager(lm.model, made[0].tolist()))
    facts, data = Answers([run])("answer/0/1/2")
    sent = np.frombuffer(data, "<f2").reshape(facts["rows"], facts["columns"])
    assert facts["rows"] == 7 and facts["width"] == 1
    np.testing.assert_allclose(sent, p[1, 2, 149:], atol=BOUND + HALF)
    np.testing.assert_allclose(np.array(facts["masses"])[:, 0], p[1, 2, 149:, :10].sum(-1), atol=1e-4)


def test_a_difference_is_the_difference_of_the_dense_maps(lm: LanguageModel) -> None:
    words = PROMPT.split()
    first, second = record_run(lm, PROMPT), record_run(lm, " ".join(words[:70] + words[71:] + words[:1]))
    answers = Answers([first, second])
    p, q = (np.stack(eager(lm.model, lm.encode(t)["input_ids"][0].tolist())) for t in (PROMPT, " ".join(second.tokens)))
    for level, pool in [(0, "mass"), (1, "mass"), (1, "max")]:
        sent = np.frombuffer(answers(f"tile/{DIFFERENCE}/1/3/{pool}/{level}/0/0").data, "<f2").reshape(SIDE, SIDE)
        expected = (pooled(q[1, 3], 1 << level, pool) - pooled(p[1, 3], 1 << level, pool))[:SIDE, :SIDE]
        part = sent[: len(expected), : len(expected)]
        seen = ~np.isnan(part)
        assert np.abs(part - expected)[seen].max() <= 2 * BOUND + HALF and np.abs(expected).max() > 0.02
    own = np.frombuffer(answers(f"edge/{DIFFERENCE}/0/1/entropy/0/0").data, "<f4")
    np.testing.assert_allclose(own[:70], 0, atol=1e-4)  # alike up to there
    assert np.abs(own[70:]).max() > 0.01
    looks = np.frombuffer(answers(f"query/{DIFFERENCE}/149").data, "<f2").reshape(8, 150)
    np.testing.assert_allclose(looks, (q - p)[:, :, 149].reshape(8, 150), atol=2 * BOUND + HALF)
    shorter = record_run(lm, " ".join(words[:20]))
    assert not Answers([first, shorter]).compared
    with pytest.raises(HeadscopeError, match="no difference"):
        Answers([first, shorter])(f"tile/{DIFFERENCE}/0/0/mass/0/0/0")


def test_a_run_under_an_edit_is_the_edited_models(lm: LanguageModel) -> None:
    plain = record_run(lm, PROMPT)
    with apply(lm, ScaleSinks("L1H2")):
        edited = record_run(lm, PROMPT)
    p, q = (run.layers[1].weights(torch.arange(150), slice(0, 150)).double() for run in (plain, edited))
    expected = p[2].clone()
    expected[1:, 0] = 0  # the first row sees the sink alone
    expected[1:] /= expected[1:].sum(-1, keepdim=True)
    assert (q[2] - expected).abs().max() <= BOUND / (1 - p[2, 1:, 0].max()) and (q[1] - p[1]).abs().max() <= BOUND
    cells = np.frombuffer(Answers([plain, edited])(f"tile/{DIFFERENCE}/1/2/mass/0/0/0").data, "<f2")
    change = (q - p)[2, :SIDE, :SIDE].numpy()
    seen = ~np.isnan(cells.reshape(SIDE, SIDE))
    assert np.abs(cells.reshape(SIDE, SIDE) - change)[seen].max() <= BOUND + HALF
    entropy = torch.special.entr(q[2]).sum(-1)
    np.testing.assert_allclose(edited.records[0]["entropy"].sel(layer=1, head=2)[0], entropy, atol=1e-4)


def test_a_picture_shows_the_weights_of_its_tokens(
    vision_lm: Callable[..., LanguageModel], picture: Callable[..., Any]
) -> None:
    run = record_run(vision_lm("llava"), ask(picture(0), "What is it?"))
    (grid,) = run.grids
    facts, data = Answers([run])(f"picture/0/1/1/{len(run.tokens) - 1}")
    row = run.layers[1].weights(torch.tensor([len(run.tokens) - 1]), slice(0, len(run.tokens)))[1, 0].numpy()
    np.testing.assert_array_equal(np.frombuffer(data, "<f4").reshape(facts["shapes"][0]), row[grid.positions])
    places = [at for first, stop in run.spans["image"] for at in range(first, stop)]
    assert sorted(grid.positions.ravel()) == places and row[places].max() > 0
    assert Answers([run])("open").facts["runs"][0]["pictures"][0].startswith("data:image/jpeg;base64,")


def test_what_cannot_be_explored_is_refused(lm: LanguageModel) -> None:
    with pytest.raises(HeadscopeError, match="reads two sequences"):
        record_run(LanguageModel.wrap(tiny_model("t5", "encoder-decoder")), [3, 4, 5])
    with pytest.raises(HeadscopeError, match="lies beyond the text"):
        record_run(lm, "w1 w2 w3", spans={"far": (10, 12)})
    with pytest.raises(HeadscopeError):
        record_run(lm, [], layers=[0])
    kept = KeptLayer(CALLS["window"])
    with pytest.raises(HeadscopeError, match="one whole text"):
        Run("run", ["a", "b"], {0: kept})
    with pytest.raises(HeadscopeError, match="no layer was kept"):
        Run("run", ["a"], {})
