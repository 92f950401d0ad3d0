"""What every registered task promises. A new task joins by its line in TASKS and one in ``EXAMPLES``."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from headscope.interp.errors import HeadscopeError
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts import load_haystack, load_needles
from headscope.interp.prompts.boundary import Boundary, known_boundary
from headscope.interp.registry import make, settings
from headscope.interp.runs.estimate import dry_run
from headscope.interp.statistics import spans
from headscope.interventions import AblateHeads, Intervention, ScaleHeads, apply, evaluate
from headscope.interventions.tasks import TASKS
from headscope.interventions.tasks.base import Task, prepares

# name -> (settings for a tiny model, the spans that its prompts publish, another value of every field)
EXAMPLES: dict[str, tuple[dict[str, Any], set[str], dict[str, Any]]] = {
    "needle": (
        {"lengths": [260], "depths": [0, 60], "needles": ["train", "prize"], "max_new_tokens": 4},
        {"needle", "answer", "question"},
        {
            "lengths": [280],
            "depths": 3,
            "needles": 1,
            "haystack": None,
            "paraphrased": True,
            "chat": False,
            "max_new_tokens": 3,
            "newline_stop": True,
            "stem": str.lower,
            "grouped": True,
        },
    ),
    "text_loss": (
        {"passages": 2, "length": 16},
        {"passage"},
        {"passages": 3, "length": 17, "text": "Some other text that is long enough to be read. " * 9},
    ),
    "text_kl": (
        {"passages": 2, "length": 16},
        {"passage"},
        {"passages": 3, "length": 17, "text": "Some other text that is long enough to be read. " * 9},
    ),
}
NAMES = list(EXAMPLES)


@pytest.fixture(scope="module")
def reader() -> LanguageModel:
    """A tiny llama that reads bytes and common pieces."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, special_tokens=["<eos>"])
    needles = [" ".join([n.needle, n.question]) for n in load_needles(10)]
    inner.train_from_iterator([load_haystack()[:20_000], *needles], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<eos>")
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2)
    config = LlamaConfig(vocab_size=600, num_hidden_layers=2, initializer_range=0.3, eos_token_id=0, **sizes)
    return LanguageModel.wrap(LlamaForCausalLM(config).eval(), tokenizer, name="tiny", revision="seed 0")


def made(name: str) -> Task:
    return make(TASKS[name], name, EXAMPLES[name][0])


def test_every_task_has_an_example() -> None:
    assert set(EXAMPLES) == set(TASKS)
    for name in TASKS:
        cls = TASKS[name]
        assert cls.name == name and cls.metric and cls.unit and cls.source and cls.higher_is_better in (True, False)
        assert all(one.meaning for one in settings(cls).values()), "a setting that no docstring explains"


@pytest.mark.parametrize("name", NAMES)
def test_trials_are_plain_and_the_same_every_time(reader: LanguageModel, name: str) -> None:
    task = made(name)
    trials = task.trials(reader)
    assert len(trials) > 1 and json.loads(json.dumps(trials)) == trials == made(name).trials(reader)
    for trial in trials:
        prompt, new = task.tokens(reader, trial)
        assert prompt > 0 and new >= 0
        ready = task.prepare(reader, trial)
        result = task.run(reader, ready)
        assert isinstance(result["score"], float) and json.loads(json.dumps(result)) == result
        assert task.run(reader, ready) == result, "a trial is not repeatable"


def test_a_needle_may_be_a_group(reader: LanguageModel) -> None:
    """Of its trials at all lengths and depths; they are otherwise the same."""
    task = made("needle")
    grouped = replace(task, grouped=True)
    trials = grouped.trials(reader)
    assert [trial.pop("group") for trial in trials] == ["train"] * 2 + ["prize"] * 2
    assert trials == task.trials(reader)
    summary = evaluate(reader, [grouped], progress=False).summary()
    assert list(summary["n"]) == [4] and list(summary["groups"]) == [2]


@pytest.mark.parametrize("name", NAMES)
def test_parameters_tell_settings_apart(reader: LanguageModel, name: str) -> None:
    task = made(name)
    kept = task.parameters(reader)
    assert json.loads(json.dumps(kept)) == kept == made(name).parameters(reader)
    others = EXAMPLES[name][2]
    assert set(others) == {field.name for field in fields(task)}, "give another value of every field"
    for field, value in others.items():
        if value != getattr(task, field):
            assert replace(task, **{field: value}).parameters(reader) != kept, field


class Looks(Intervention):
    """Sees at every attention call which spans are published and where the prompt ends."""

    name = "looks"

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.ends: set[Any] = set()

    def edit(self, call: Any) -> Any:
        self.names |= set(spans._PUBLISHED.get())
        self.ends.add(known_boundary())
        return call


@pytest.mark.parametrize("name", NAMES)
def test_prompts_publish_their_spans_and_their_end(reader: LanguageModel, name: str) -> None:
    task, looks = made(name), Looks()
    for trial in task.trials(reader):
        ready = task.prepare(reader, trial)
        with apply(reader, looks):
            task.run(reader, ready)
    assert looks.names == EXAMPLES[name][1]
    assert looks.ends == {Boundary((task.tokens(reader, trial)[0],)) for trial in task.trials(reader)}
    assert not spans._PUBLISHED.get() and known_boundary() is None, "something is published after the task"


@pytest.mark.parametrize("name", NAMES)
def test_it_is_evaluated(reader: LanguageModel, name: str, tmp_path: Any) -> None:
    """Under an edit, with the estimate's passes; an edit that does nothing changes no score."""
    task = made(name)
    count = len(task.trials(reader))
    edits = [AblateHeads([(0, 1), (1, 2)]), ScaleHeads([(0, 1)], 3.0, strength=0.0)]
    with dry_run() as work:
        evaluate(reader, [task], edits, controls=1)
    assert len(work.passes) == count * (1 + 2 * 2 + prepares(task))
    result = evaluate(reader, [task], edits, controls=1, out=tmp_path, progress=False)
    assert result.higher_is_better == {name: TASKS[name].higher_is_better}
    scores = result.scores(name)
    assert list(scores.index) == list(range(count))
    assert (scores[edits[1].name] == scores["no edit"]).all()
    assert {name} == set(result.metrics) and result.provenance["parameters"]["tasks"][name]


@pytest.mark.parametrize("name", NAMES)
def test_bad_settings_are_refused_with_one_line(name: str) -> None:
    with pytest.raises(HeadscopeError, match=f"{name} has no setting 'colour'; it takes") as refused:
        make(TASKS[name], name, {"colour": 1})
    assert "\n" not in str(refused.value)
