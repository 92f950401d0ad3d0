"""The loop: resumed runs give what whole ones give, a watch changes nothing, and experiments say what held."""

from __future__ import annotations

import base64
import gzip
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from headscope.interp import HeadscopeError
from headscope.interp.laboratory.experiment import Bench, run_experiment
from headscope.interp.laboratory.training import generator, train
from headscope.interp.laboratory.watch import Watch
from headscope.interp.reports.laboratory import lab_page
from headscope.interp.results.findings import Findings
from tests.interp.laboratory.conftest import Copying, Small, loss

WATCH = Watch(every=4, numbers=lambda model: {"size": sum(p.abs().sum() for p in model.parameters())})


def made() -> tuple[Small, torch.optim.Optimizer]:
    torch.manual_seed(3)
    model = Small()
    return model, torch.optim.Adam(model.parameters(), 1e-2)


class Stop(Exception):
    pass


def stopping(model: torch.nn.Module, step: int) -> torch.Tensor:
    if step == 9:
        raise Stop
    return loss(model, step)


def test_a_run_that_was_stopped_goes_on(tmp_path: Path) -> None:
    settings = {"steps": 12, "watch": WATCH, "rate": lambda step: 1 / (1 + step), "clip": 0.5, "device": "cpu"}
    whole, adam = made()
    rows = train(whole, loss, adam, **settings)
    model, adam = made()
    with pytest.raises(Stop):
        train(model, stopping, adam, folder=tmp_path, save_every=3, **settings)
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-9"]
    model, adam = made()
    again = train(model, loss, adam, folder=tmp_path, save_every=3, **settings)
    assert again == rows and [row["step"] for row in rows] == [0, 4, 8, 12]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), model.parameters(), strict=True))
    for name, changed in (("steps", {"steps": 20}), ("seed", {"settings": {"seed": 1}})):
        with pytest.raises(HeadscopeError, match=rf"other settings \({name}\)"):
            train(model, loss, adam, folder=tmp_path, **(settings | changed))


def test_a_watch_changes_nothing() -> None:
    one, adam = made()
    train(one, loss, adam, steps=6, watch=Watch(every=100), device="cpu")
    other, adam = made()
    watch = Watch(every=1, inputs={"x": torch.randn(2, 5, 16)}, statistics=("entropy", "sink_mass"))
    rows = train(other, loss, adam, steps=6, watch=watch, device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert np.shape(rows[-1]["entropy"]) == (2, 4) and 0 < rows[-1]["sink_mass"][0][0] <= 1
    assert other.training


def test_a_loss_that_is_no_number_is_said() -> None:
    model, adam = made()
    with pytest.raises(HeadscopeError, match="loss at step 2 is nan"):
        train(model, lambda m, step: loss(m, step) * (torch.nan if step == 2 else 1), adam, steps=4, watch=WATCH)


@dataclass(frozen=True, kw_only=True)
class Stopped(Copying):
    """A copier whose training breaks off before any seed is finished."""

    stop: bool = True

    def run(self, bench: Bench) -> Mapping[str, float]:
        model, adam = made()
        fine = stopping if self.stop else loss
        bench.train("copier", model, fine, adam, steps=12, watch=WATCH, save_every=3)
        return {"loss": 0.0, "before": 1.0}


def test_a_seed_that_was_stopped_is_not_gone_on_with_under_other_settings(tmp_path: Path) -> None:
    """The journal has nothing to lose, and the checkpoint has."""
    with pytest.raises(Stop):
        run_experiment(Stopped(), out=tmp_path, device="cpu")
    with pytest.raises(HeadscopeError, match=r"other settings \(stop\)"):
        run_experiment(Stopped(stop=False), out=tmp_path, device="cpu")


def test_draws_depend_on_seed_and_step() -> None:
    drawn = {float(torch.rand(1, generator=generator(seed, step))) for seed in range(9) for step in range(-1, 99)}
    assert len(drawn) > 895  # of 900: float32 has 2^24 values between 0 and 1


def test_an_experiment_resumes_and_is_judged(tmp_path: Path) -> None:
    found = run_experiment(Copying(), seeds=(0, 1), out=tmp_path, device="cpu", command="headscope lab copying")
    assert found.verdicts()["held"].tolist() == ["yes"] and found.numbers["loss"].shape == (2,)
    assert found.curve("copier", "entropy")["step"].tolist() == [0, 5, 10, 15, 20, 25, 30] * 2
    more = run_experiment(Copying(), seeds=(0, 1, 2), out=tmp_path, device="cpu")
    assert more.outcomes[:2] == found.outcomes and len(set(more.numbers["loss"])) == 3
    kept = Findings.load(tmp_path / "findings.json")
    assert json.dumps(kept.outcomes) == json.dumps(more.outcomes) and kept.claims == more.claims
    assert "it learns" in lab_page(kept).save(tmp_path / "page.html").read_text()
    with pytest.raises(HeadscopeError, match="other settings"):
        run_experiment(Copying(steps=31), seeds=(0,), out=tmp_path, device="cpu")
    with pytest.raises(HeadscopeError, match="on cpu or cuda, not 'cuda:1'"):
        run_experiment(Copying(), device="cuda:1")
    with pytest.raises(HeadscopeError, match="different seeds"):
        run_experiment(Copying(), seeds=(1, 1))
    with pytest.raises(HeadscopeError, match="no curve 'copper'; choose copier"):
        kept.curve("copper", "entropy")


def test_a_label_with_one_row_is_a_map_of_heads(tmp_path: Path) -> None:
    rows = {"step": 9, "drop": [[0.1, 0.2], [0.3, None]], "drop.low": [[0, 0], [0, 0]], "drop.high": [[1, 1], [1, 1]]}
    curves = {"heads": [rows], "model": [{"step": 0, "loss": 1.0}, {"step": 9, "loss": 0.5}]}
    found = Findings("some", {}, (4,), [{"numbers": {"loss": 0.5}, "curves": curves}], [], {"device": "CPU"})
    page = lab_page(found).save(tmp_path / "page.html").read_text()
    packed = re.findall(r'id="data-\d+">([^<]+)<', page)
    first, second = (json.loads(gzip.decompress(base64.b64decode(one))) for one in packed)
    assert first["layout"]["title"]["text"] == "drop of heads, seed 4" and first["data"][0]["type"] == "heatmap"
    assert "interval [0, 1]" in first["data"][0]["text"][0][0] and "drop.low of" not in page
    assert second["layout"]["title"]["text"] == "Loss of model"
