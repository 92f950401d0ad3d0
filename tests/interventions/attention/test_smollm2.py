"""Sinks of a real model: removed, found by massive activations, and mass moved from them onto a span."""

from __future__ import annotations

import pytest
import torch

from headscope.interp.models import load_model
from headscope.interp.prompts import load_haystack, published_spans
from headscope.interp.statistics import SinkMass, SpanMass
from headscope.interp.tracing.recording import trace
from headscope.interventions import RedistributeSinks, ScaleSinks, apply


@pytest.mark.slow
def test_on_smollm2() -> None:
    lm = load_model("smollm2-135m")
    ids = torch.tensor([lm.required_tokenizer()(load_haystack(None)[:1000])["input_ids"][:56]])

    def traced(*edits):  # mean mass on the first token and on the span, of rows behind the span
        with torch.no_grad(), apply(lm, *edits), published_spans({"image": (0, 40)}):
            with trace(lm, [SinkMass(1), SpanMass({"span": (0, 40)})]) as tracer:
                loss = lm.model(ids, labels=ids).loss
        record = tracer.record.isel(query=slice(40, None))
        return record["sink_mass"].mean(("example", "head", "query")), float(loss)

    plain, loss = traced()
    assert float(plain.max()) > 0.5
    removed, without = traced(ScaleSinks())
    assert float(removed.max()) == 0.0 and without > loss
    edit = RedistributeSinks.found_in(lm, [load_haystack(None)])
    assert edit.layers and min(edit.layers) >= 2 and max(edit.layers) <= lm.info.layers - 2
    moved, _ = traced(edit.with_settings(least=0.0, rho=0.0, share=0.9))
    first = edit.layers[0]
    assert float(moved.sel(layer=first)) == pytest.approx(0.1 * float(plain.sel(layer=first)), rel=1e-3)
