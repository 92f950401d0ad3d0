"""Distances between the heads of two runs that were kept: the patterns at once, the streamed statistic, by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from headscope.interp import HeadscopeError, keep_attention, trace
from headscope.interp.heads.position.matching import match_heads, run_distances
from headscope.interp.laboratory.decoder import Decoder, Shape
from headscope.interp.laboratory.variants import VARIANTS
from headscope.interp.statistics import Divergence
from headscope.interp.tracing.reference_run import ReferenceRun
from headscope.kernels import reference

IDS = torch.randint(11, (3, 70), generator=torch.Generator().manual_seed(0))  # more rows than are held at a time


def decoder(seed: int, name: str = "softmax", layers: int = 2) -> Decoder:
    """A small decoder whose patterns are far from uniform."""
    torch.manual_seed(seed)
    made = Decoder(Shape(11, layers, 2, 16, 24, 70), VARIANTS[name])
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(6)
    return made


def kept(model: Decoder, ids: torch.Tensor = IDS) -> ReferenceRun:
    with keep_attention(model) as run, torch.no_grad():
        model(ids)
    return run


def test_heads_of_two_trainings_and_of_two_forms_of_attention() -> None:
    """Against whole maps in float64; a head of ``differential`` is two patterns. Rounding alone apart: 1e-12."""
    one, other = kept(decoder(0)), kept(decoder(1, "differential"))
    found = run_distances(one, other)
    assert found.dims == ("example", "layer", "head", "other") and found.shape == (3, 2, 2, 4)
    for layer, (a, b) in enumerate(zip(one.calls, other.calls, strict=True)):
        wide = [x.with_(query=x.query.double(), key=x.key.double(), value=x.value.double()) for x in (a, b)]
        p, r = (reference.pattern(x.inputs()).numpy() for x in wide)
        p, r = p[:, :, None], r[:, None]
        m = (p + r) / 2
        with np.errstate(divide="ignore", invalid="ignore"):
            js = [np.where(x > 0, x * np.log(x / m), 0).sum(-1) / 2 for x in (p, r)]
        np.testing.assert_allclose(found[:, layer], sum(js).mean(-1), atol=1e-12)
    assert 0.01 < float(found.min()) < float(found.max()) < np.log(2)


def test_checkpoints_head_by_head_are_the_streamed_statistic() -> None:
    """The diagonal is ``Divergence`` of the later run from the earlier one: float32, sums of 70 terms below log 2."""
    before, after = decoder(0), decoder(0)
    with torch.no_grad():
        after.layers[1].attention.q.weight.add_(0.3 * torch.randn(16, 16))
    run = kept(before)
    with trace(after, [Divergence(run)]) as tracer, torch.no_grad():
        after(IDS)
    streamed = tracer.record["js_divergence"].mean("query").transpose("example", "layer", "head").to_numpy()
    found = run_distances(run, kept(after)).to_numpy()
    np.testing.assert_allclose(np.diagonal(found, axis1=2, axis2=3), streamed, atol=1e-5)
    assert streamed[:, 0].max() < 1e-5 < 1e-2 < streamed[:, 1].min()
    same = match_heads(run_distances(run, run))
    assert (same["other"].to_numpy() == [0, 1]).all() and float(same["distance"].max()) < 1e-12


def test_runs_that_cannot_be_compared() -> None:
    one = kept(decoder(0))
    for other, said in (
        (kept(decoder(0, layers=1)), "of one 2 calls were kept, of the other 1"),
        (kept(decoder(0), IDS[:, :9]), r"of \(3, 70, 70\) and of \(3, 9, 9\)"),
        (kept(decoder(0, "key_bias")), r"of \(3, 70, 70\) and of \(3, 70, 71\)"),
        (ReferenceRun(None), "of the other 0"),
    ):
        with pytest.raises(HeadscopeError, match=said):
            run_distances(one, other)
