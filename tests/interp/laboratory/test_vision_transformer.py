"""The vision transformer's study: its model written out, prunings by hand, rings counted, and the whole in small."""

from __future__ import annotations

import gzip
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm

from headscope.interp import HeadscopeError
from headscope.interp.laboratory.experiment import run_experiment
from headscope.interp.laboratory.experiments.vision_transformer import VisionTransformerStudy
from headscope.interp.laboratory.vision_transformer import pictures
from headscope.interp.laboratory.vision_transformer.model import Seen, VisionTransformer
from headscope.interp.laboratory.vision_transformer.pruning import MEASURES, changes, importance
from headscope.interp.laboratory.vision_transformer.reach import hops, maps, mean_hops, patterns, profile
from headscope.interp.sites import is_attached


@pytest.fixture
def model() -> VisionTransformer:
    """Two layers of two heads over 3 x 3 patches of 2 x 2 pixels, patterns far from uniform, in float64."""
    torch.manual_seed(0)
    made = VisionTransformer(6, 3, width=8, heads=2, layers=2, hidden=12, classes=3).double().eval()
    with torch.no_grad():
        for block in made.layers:
            block.attention.qkv.weight.mul_(4)
    return made


@pytest.fixture
def seen() -> Tensor:
    return torch.randn(5, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def written_out(model: VisionTransformer, picture: Tensor, zero: tuple[int, int, list[int]] | None = None) -> Seen:
    """One picture, loop by loop; the head of ``zero`` (layer, head, tokens) writes nothing at the tokens."""
    rows = [picture[2 * r : 2 * r + 2, 2 * c : 2 * c + 2].flatten() for r in range(3) for c in range(3)]
    x = torch.stack([model.cls, *(model.embed.weight @ row + model.embed.bias for row in rows)]) + model.places
    for number, block in enumerate(model.layers):
        a = layer_norm(x, (8,), block.before_attention.weight, block.before_attention.bias)
        q, k, v = (a @ block.attention.qkv.weight.T + block.attention.qkv.bias).chunk(3, -1)
        z = []
        for head in range(2):
            own = slice(4 * head, 4 * head + 4)
            z.append((q[:, own] @ k[:, own].T / 2).softmax(-1) @ v[:, own])
            if zero and zero[:2] == (number, head):
                z[-1][zero[2]] = 0
        x = x + torch.cat(z, 1) @ block.attention.out.weight.T + block.attention.out.bias
        m = layer_norm(x, (8,), block.before_mlp.weight, block.before_mlp.bias)
        m = gelu(m @ block.inward.weight.T + block.inward.bias)
        x = x + m @ block.outward.weight.T + block.outward.bias
    last = layer_norm(x[0], (8,), model.norm.weight, model.norm.bias)
    return Seen(model.head.weight @ last + model.head.bias, x[0])


def test_it_is_what_is_written_out(model: VisionTransformer, seen: Tensor) -> None:
    with torch.no_grad():
        found = model(seen)
        for index, picture in enumerate(seen):
            for got, wanted in zip(found, written_out(model, picture), strict=True):
                assert torch.allclose(got[index], wanted, atol=1e-12)
    with pytest.raises(HeadscopeError, match="28 pixels a side are not 5 whole patches"):
        VisionTransformer(28, 5)
    with pytest.raises(HeadscopeError, match="width 10 is not shared equally by 4 heads"):
        VisionTransformer(28, 7, width=10)


@pytest.mark.parametrize(("place", "tokens"), [("all", [*range(10)]), ("cls", [0]), ("patches", [*range(1, 10)])])
def test_pruned_heads_write_nothing_there(
    model: VisionTransformer, seen: Tensor, place: str, tokens: list[int]
) -> None:
    labels = torch.tensor([0, 1, 2, 0, 1])
    with torch.no_grad():
        found = importance(model, seen, labels)
        before = [written_out(model, one) for one in seen]
        for layer, head in np.ndindex(2, 2):
            after = [written_out(model, one, (layer, head, tokens)) for one in seen]
            for index in range(5):
                p, q = before[index].logits.softmax(-1), after[index].logits.softmax(-1)
                a, b, m = before[index].cls, after[index].cls, (p + q) / 2
                wanted = {
                    "drop": p[labels[index]] - q[labels[index]],
                    "divergence": ((p * (p / m).log()).sum() + (q * (q / m).log()).sum()) / 2,
                    "distance": 1 - a @ b / (a.norm() * b.norm()),
                    "flip": float(p.argmax() != q.argmax()),
                    "error": float(p.argmax() == labels[index]) - float(q.argmax() == labels[index]),
                }
                for name in MEASURES:
                    got = found[f"{place}.{name}"].trials[index, layer, head]
                    assert got == pytest.approx(float(wanted[name]), abs=1e-10), (name, layer, head)
    assert not is_attached(model)
    last = found["patches.distance"].trials[:, 1]
    assert np.abs(last).max() < 1e-12  # nothing after it reads patches
    assert found["cls.distance"].trials[:, 1].min() > 1e-6


def test_measures_of_known_predictions() -> None:
    """From (3/4, 1/4) to the opposite, and from certainty to the other one: the divergence is log 2 there."""
    odds = float(np.log(3))
    before = Seen(torch.tensor([[odds, 0.0], [80.0, 0.0]]), torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
    after = Seen(torch.tensor([[0.0, odds], [0.0, 80.0]]), torch.tensor([[0.0, 2.0], [3.0, 3.0]]))
    found = changes(before, after, torch.tensor([0, 1]))
    np.testing.assert_allclose(found["drop"], [0.5, -1], atol=1e-6)
    p = np.array([0.75, 0.25])
    np.testing.assert_allclose(found["divergence"], [(p * np.log(p / 0.5)).sum(), np.log(2)], atol=1e-6)
    np.testing.assert_allclose(found["distance"], [1, 0], atol=1e-7)
    assert found["flip"].tolist() == [1, 1] and found["error"].tolist() == [1, -1]


def test_rings_are_cut_at_the_border_and_sum_to_one() -> None:
    """Uniform attention over CLS and nine patches: a ring's mass is its mean size in tenths."""
    apart = hops(3)
    assert [int((apart[4] == k).sum()) for k in range(3)] == [1, 8, 0]  # the middle
    assert [int((apart[0] == k).sum()) for k in range(3)] == [1, 3, 5]  # a corner
    even = torch.full((2, 1, 1, 10, 10), 0.1)
    found = profile(even, 3)
    np.testing.assert_allclose(found["ring"][0, 0], [0.1, 40 / 90, 32 / 90], atol=1e-7)
    np.testing.assert_allclose(found["neighbour"][0, 0], [0.1, 0.1, 0.1], atol=1e-7)
    assert float(found["cls"][0, 0]) == pytest.approx(0.1)
    np.testing.assert_allclose(mean_hops(even, 3).mean, (40 + 2 * 32) / 81, atol=1e-7)


def test_a_head_that_looks_to_the_right(model: VisionTransformer, seen: Tensor) -> None:
    """Patches in the last column look at themselves, all others at their right neighbour, with a quarter on CLS."""
    made = torch.zeros(1, 1, 1, 10, 10)
    made[..., 0, 0] = 1
    for patch in range(9):
        made[..., 1 + patch, 0] = 0.25
        made[..., 1 + patch, 1 + (patch if patch % 3 == 2 else patch + 1)] = 0.75
    found = profile(made, 3)
    np.testing.assert_allclose(found["ring"][0, 0], [0.25, 0.5, 0], atol=1e-7)
    sizes = [3, 5, 3, 5, 8, 5, 3, 5, 3]
    wanted = np.mean([0.75 / n if patch % 3 < 2 else 0 for patch, n in enumerate(sizes)])
    np.testing.assert_allclose(found["neighbour"][0, 0], [0.25, wanted, 0], atol=1e-7)
    np.testing.assert_allclose(mean_hops(made, 3).mean, 2 / 3, atol=1e-7)
    with torch.no_grad():
        traced = patterns(model, seen)
    total = profile(traced, 3)
    assert traced.shape == (5, 2, 2, 10, 10)
    np.testing.assert_allclose(total["ring"].sum("hop") + total["cls"], 1, atol=1e-6)


def test_maps_are_pooled_patches() -> None:
    found = torch.rand(2, 1, 3, 29, 29)
    small = maps(found)
    assert small.dims == ("example", "layer", "head", "query_block", "key_block") and small.shape == (2, 1, 3, 14, 14)
    wanted = found[..., 1:, 1:].unfold(3, 2, 2).unfold(4, 2, 2).mean((-1, -2))
    np.testing.assert_allclose(small, wanted, atol=1e-6)
    np.testing.assert_array_equal(maps(torch.rand(2, 1, 3, 10, 10)).shape[3:], [9, 9])


def idx(path: Path, values: np.ndarray) -> None:
    head = struct.pack(">HBB", 0, 8, values.ndim) + struct.pack(f">{values.ndim}I", *values.shape)
    with gzip.open(path, "wb") as file:
        file.write(head + values.astype(np.uint8).tobytes())


def test_pictures_are_read_and_others_refused(tmp_path: Path) -> None:
    digits = pictures.load("digits")
    assert digits.train.shape == (1437, 8, 8) and digits.test.shape == (360, 8, 8) and digits.side == 8
    assert abs(float(digits.train.mean())) < 1e-5 and float(digits.train.std()) == pytest.approx(1, abs=1e-5)
    with pytest.raises(HeadscopeError, match="has no train-images-idx3-ubyte.gz: install Debian's"):
        pictures.load(str(tmp_path))
    made = np.arange(3 * 16).reshape(3, 4, 4)
    for images, labels in pictures.PARTS.values():
        idx(tmp_path / images, made)
        idx(tmp_path / labels, np.array([7, 0, 9]))
    found = pictures.load(str(tmp_path))
    pixels = torch.arange(48.0).reshape(3, 4, 4)
    assert torch.allclose(found.test, (pixels - pixels.mean()) / pixels.std())
    assert found.train_labels.tolist() == [7, 0, 9]
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(b"no")
    with pytest.raises(HeadscopeError, match="no gzipped IDX file of bytes"):
        pictures.load(str(tmp_path))
    idx(tmp_path / "train-labels-idx1-ubyte.gz", np.array([7, 0]))
    with pytest.raises(HeadscopeError, match="not square pictures with a label each"):
        pictures.load(str(tmp_path))


@pytest.mark.slow
def test_the_study_in_small(tmp_path: Path) -> None:
    """Digits are learned, heads differ, and CLS and patches are pruned apart."""
    small = replace(VisionTransformerStudy().quick(), steps=120, layers=2, pruned=120, mapped=20, codes=20)
    found = run_experiment(small, seeds=(0,), out=tmp_path, device="cpu")
    held = {claim.says: claim.held for claim in found.claims}
    assert [held[says] for says in held if says.startswith("Heads differ")] == [True]
    assert found.numbers["accuracy"][0] > 0.5  # chance is a tenth
    row = found.outcomes[0]["curves"]["heads"][0]
    assert np.shape(row["all.drop"]) == (2, 4) and np.abs(row["patches.distance"][1]).max() == 0
    rings = sum(np.array(row[f"ring.{hop}"]) for hop in range(4))
    np.testing.assert_allclose(rings + row["cls_mass"], 1, atol=5 * 5e-6)  # each is rounded to 5 places
    assert "Heads whose patterns look alike" in (tmp_path / "seed-0" / "patterns.html").read_text()
