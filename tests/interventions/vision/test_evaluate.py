"""A task of pictures with edits and decodings that choose for every prompt: one trial at a time, and in batches."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from headscope.interp.cli import main
from headscope.interp.models import load_model
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.registry import make
from headscope.interventions import (
    TASKS,
    AdaptSpanLogits,
    Guidance,
    PruneTokens,
    ReinforceHeads,
    SaliencyRejection,
    ScaleHeads,
    evaluate,
)
from headscope.interventions.tasks.vision import VisionTask, left_padding

QUESTIONS = ("What is it?", "Why?", "Which one is it?")
EDITS = [
    ReinforceHeads(layers=(0, 1, 2), factor=4.0),
    PruneTokens([(1, 0), (2, 3)], layer=1, keep=2),
    AdaptSpanLogits(threshold=0.5, unsure=3.0, sure=0.1),
    Guidance(gamma=4.0),
    SaliencyRejection(layers=(1,), candidates=3),
]


@dataclass(frozen=True, kw_only=True)
class Letters(VisionTask):
    """How many letters an answer has."""

    name: ClassVar[str] = "letters"
    metric: ClassVar[str] = "letters"
    max_new_tokens: int = 3

    def trials(self, lm: LanguageModel) -> list[dict[str, Any]]:
        return [{"seed": seed, "question": question} for seed, question in enumerate(QUESTIONS)]

    def chat(self, lm: LanguageModel, trial: dict[str, Any]) -> list[dict[str, Any]]:
        pixels = np.random.default_rng(trial["seed"]).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        picture = {"type": "image", "image": Image.fromarray(pixels)}
        return [{"role": "user", "content": [picture, {"type": "text", "text": trial["question"]}]}]

    def grade(self, lm: LanguageModel, trial: dict[str, Any], response: str) -> dict[str, Any]:
        return {"score": float(len(response))}


def test_batches_are_trials_by_themselves(vlm: LanguageModel, processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vlm, "processor", processor)
    passes: list[int] = []
    found = {}
    for batch in (1, 2):
        passes.clear()
        hook = vlm.model.register_forward_hook(lambda *_: passes.append(1))
        result = evaluate(vlm, Letters(batch=batch), EDITS, controls=1, progress=False)
        hook.remove()
        found[batch] = result.trials, len(passes)
    one, two = found[1][0], found[2][0]
    assert one["response"].tolist() == two["response"].tolist() and found[2][1] < found[1][1]
    conditions = one.drop_duplicates("condition")
    assert list(conditions["control"]) == ["", "", "random choice", "", "random heads", "random choice", "", "", ""]
    answers = one.groupby("condition", sort=False)["response"].apply(tuple)
    assert sum(answers != answers["no edit"]) >= 6 and "note" not in one


@pytest.mark.parametrize("name", ["hallucination", "pope", "spatial"])
def test_tasks_on_scenes(vlm: LanguageModel, processor: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """What every task promises, for those about pictures: JSON-able trials, the same at every call; the unedited
    model's scores; results that are written, and say what is summarised."""
    monkeypatch.setattr(vlm, "processor", processor)
    task = make(TASKS[name], name, {"samples": 1, "max_new_tokens": 2})
    assert json.loads(json.dumps(task.trials(vlm))) == task.trials(vlm)
    result = evaluate(vlm, task, [ScaleHeads([(0, 1)], factor=-3.0)], controls=1, progress=False)
    unedited, *others = result.summary().to_dict("records")
    assert len(others) == 2 and unedited["n"] == len(task.trials(vlm)) and 0 <= unedited["mean"] <= 1
    assert {one["condition"] for one in result.details} == {row["condition"] for row in [unedited, *others]}


def run(*arguments: str) -> None:
    with pytest.raises(SystemExit) as done:
        main(list(arguments))
    assert done.value.code in (0, None)


def test_on_the_command_line(
    vlm: LanguageModel, processor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """A saved checkpoint with its own processor; edits are built, saved and evaluated by name."""
    module = ModuleType("letters_task")
    module.Letters = Letters  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "letters_task", module)
    monkeypatch.setitem(TASKS.places, "letters", "letters_task:Letters")
    folder = tmp_path / "model"
    vlm.model.save_pretrained(folder)
    processor.save_pretrained(folder)
    assert left_padding(load_model(folder)).tokenizer.padding_side == "left"
    settings = {"reinforce-heads": "layers=[0,1]", "prune-tokens": "layer=1", "guidance": "gamma=2.0"}
    files: list[str] = []
    for kind, setting in settings.items():
        files += ["--with", str(tmp_path / kind)]
        run("intervene", kind, "--model", str(folder), "--set", setting, "--out", files[-1])
    capsys.readouterr()
    run("evaluate", "letters", "--model", str(folder), *files, "--controls", "1", "--json", "--set", "batch=3")
    summary = json.loads(capsys.readouterr().out)["summary"]
    assert [row["kind"] for row in summary] == ["baseline", *["intervention", "control"] * 2, "intervention"]
    assert torch.is_grad_enabled()
