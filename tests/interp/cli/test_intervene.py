"""``headscope intervene`` for every registered edit: built from ``--set``, saved, read, described, evaluated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from headscope.interp.cli import main
from headscope.interp.models import load_model
from headscope.interp.registry import settings
from headscope.interventions import load_intervention
from headscope.interventions.edits import EDITS

HEADS = "L0H1,L1H3"
VISUAL = ("span=[0,4]", "dimensions=[0,1,2]", "tau=1.2", "layers=[0,1]", "rho=0.1", "share=0.9", "least=0.1")
# edit -> its settings as the command line gives them; TENSORS stands for a file of tensors by name
SETTINGS: dict[str, tuple[str, ...]] = {
    "ablate_heads": ("how=resample", "seed=4"),
    "scale_heads": ("factor=-0.5",),
    "add_to_heads": ("vectors=TENSORS:heads", "during=prefill"),
    "affine_heads": ("A=TENSORS:heads", "v=TENSORS:heads"),
    "project_heads": ("directions=TENSORS:heads", "strength=0.5"),
    "clamp_heads": ("directions=TENSORS:heads", "low=-0.25", "high=0.25"),
    "patch_heads": ("prompt=one two three four", "taken=[1,3]", "positions=[0,2]"),
    "edit_value_vectors": ("neurons=[[0,3],[1,7]]", "factor=0", "add=TENSORS:stream"),
    "scale_sinks": ("sinks=[0,2]", "factor=0.5", "renormalise=false"),
    "calibrate_attention": ("beta=0", "threshold=0.05"),
    "redistribute_sinks": VISUAL,
    "scale_image_sinks": VISUAL[:4],
    "swap_keys": ("first=[0,1]", "second=[4,5]"),
    "force_pattern": ("onto=[[[0,1],[2,4]]]", "layers=1"),
    "boost_recent": ("beta=1", "previous=all"),
    "knock_out": ("span=[0,2]", "positions=[5,9]"),
    "emphasize_span": ("span=[1,3]", "outside=0.01"),
    "spotlight": ("span=[1,3]", "target=0.6"),
    "scale_span_logits": ("span=[1,4]", "factor=2", "at=all"),
    "raise_span_logits": ("span=passage", "amount=0.9"),
    "head_temperature": ("temperature=[0.5,2]",),
    "decay_beyond_window": ("window=2", "factor=0.1", "bands=[[4,5,0.5]]"),
    "pine": ("documents=[[1,4],[4,7]]",),
    "rescale_rope": ("linear=2", "truncate=40"),
    "concentric_positions": ("span=[1,5]", "grid=[2,2]"),
    "parallel_contexts": ("contexts=[[1,4],[4,7]]", "mode=HR"),
    "select_contexts": ("contexts=[[1,3],[3,5],[5,7]]", "keep=1", "top=2"),
}


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    """What a command prints as JSON."""
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--json"])
    printed = capsys.readouterr()
    assert not stopped.value.code, printed.err
    return json.loads(printed.out)


# they act on what follows a prompt or on its picture, and prose has neither: tests/interventions/vision, test_evict.py
BEHIND_A_PROMPT = {"reinforce_heads", "prune_tokens", "adapt_span_logits", "paint", "evict_keys"}


def test_every_edit_is_built_saved_read_and_described(
    capsys: pytest.CaptureFixture[str], model: str, tmp_path: Path
) -> None:
    assert set(SETTINGS) | BEHIND_A_PROMPT == set(EDITS)
    save_file({"heads": torch.randn(2, 4, 8), "stream": torch.randn(32)}, tmp_path / "some.safetensors")
    lm = load_model(model)
    saved = []
    for kind, given in SETTINGS.items():
        heads = ("--heads", HEADS) if "heads" in settings(EDITS[kind]) else ()
        options = [x for one in given for x in ("--set", one.replace("TENSORS", str(tmp_path / "some.safetensors")))]
        out = tmp_path / f"{kind}.edit"
        printed = run(capsys, "intervene", kind, "--model", model, *heads, "--out", str(out), *options)
        edit = load_intervention(out, lm)
        assert type(edit) is EDITS[kind] and printed == {"file": str(out), **json.loads(json.dumps(edit.describe()))}
        assert not heads or [f"L{a}H{b}" for a, b in edit.heads or ()] == HEADS.split(",")
        assert load_intervention(edit.save(tmp_path / "again", lm), lm) == edit
        saved.append(out)
    small = ("--set", "length=16", "--set", "passages=2", "--controls", "1")
    command = ("evaluate", "text_loss", "--model", model, *small)
    rows = run(capsys, *command, *(x for out in saved for x in ("--with", str(out))))["summary"]
    changed = {row["condition"]: row["delta"] for row in rows if row["kind"] == "intervention"}
    assert len(changed) == len(SETTINGS) and all(abs(delta) > 1e-6 for delta in changed.values()), changed
