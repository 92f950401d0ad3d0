"""What every registered task promises. A new task joins by its line in TASKS and one in ``EXAMPLES``."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest

from headscope.interp.errors import HeadscopeError
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts.boundary import Boundary, known_boundary
from headscope.interp.registry import make, settings
from headscope.interp.runs.estimate import dry_run
from headscope.interp.statistics import spans
from headscope.interventions import AblateHeads, Evaluation, Intervention, ScaleHeads, apply, evaluate
from headscope.interventions.tasks import TASKS
from headscope.interventions.tasks.base import Task, prepares

FOLDER = Path(mkdtemp())
QUESTION = {"question": "Which is red?", "options": ["a rose", "snow"], "answer": "A"}
ASKED = {
    "question": "Who is old?",
    "answer": "Ada",
    "documents": ["Ada is old.", "Bo is young.", "Cy is tall."],
    "gold": 0,
}


def lines(name: str, *rows: dict[str, Any]) -> str:
    """A file of JSON lines."""
    path = FOLDER / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def harness_task(name: str, count: int) -> str:
    """A task of lm-evaluation-harness: questions of two options, as a YAML file (JSON is YAML)."""
    data = lines(
        f"{name}.jsonl", *[{"ask": f"{n} is", "options": ["one", "two", "four"], "gold": n} for n in range(count)]
    )
    made = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": data}},
        "test_split": "test",
        "fewshot_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{ask}}",
        "doc_to_choice": "{{options}}",
        "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")],
    }
    path = FOLDER / f"{name}.yaml"
    path.write_text(json.dumps(made))
    return str(path)


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
            "beyond": True,
        },
    ),
    "text_loss": (
        {"passages": 2, "length": 16},
        {"passage"},
        {
            "passages": 3,
            "length": 17,
            "text": "Some other text that is long enough to be read. " * 9,
            "written": True,
        },
    ),
    "text_kl": (
        {"passages": 2, "length": 16},
        {"passage"},
        {
            "passages": 3,
            "length": 17,
            "text": "Some other text that is long enough to be read. " * 9,
            "written": True,
        },
    ),
    "multiple_choice": (
        {"questions": 2},
        {"question", "options", "anchor", "gold_letter"}
        | {f"{kind}_{place}" for kind in ("letter", "option") for place in range(4)},
        {
            "data": lines("questions.jsonl", QUESTION, QUESTION),
            "questions": 3,
            "orders": 2,
            "scoring": "cloze",
            "normalise": "sum",
            "listed": True,
            "chat": True,
            "seed": 1,
        },
    ),
    "documents": (
        {"questions": 2, "documents": 3, "max_new_tokens": 3},
        {"documents", "document_0", "document_1", "document_2", "gold", "question"},
        {
            "data": lines("documents.jsonl", ASKED, ASKED),
            "questions": 1,
            "documents": 2,
            "chat": True,
            "max_new_tokens": 2,
            "seed": 1,
        },
    ),
    "arithmetic": (
        {"digits": (1, 3), "problems": 1, "examples": 2},
        {"examples", "question"},
        {"digits": (2,), "forms": ("plain",), "problems": 2, "examples": 1, "example_digits": (1,), "seed": 1},
    ),
    "facts": (
        {"questions": 3, "max_new_tokens": 2},
        {"context", "fact", "question"},
        {
            "where": "memory",
            "questions": 2,
            "people": 3,
            "data": None,
            "max_new_tokens": 3,
            "seed": 1,
        },
    ),
    "few_shot": (
        {"classes": 2, "shots": 1, "queries": 3},
        {"examples", "example_0", "example_1", "query"},
        {
            "data": lines("texts.jsonl", *[{"text": f"t{n}", "label": str(n % 2)} for n in range(8)]),
            "classes": 3,
            "shots": 2,
            "queries": 2,
            "labels": "abstract",
            "seed": 1,
        },
    ),
    "embedding_position": (
        {"passages": 2, "sentences": 3, "change": "insert"},
        {"sentence"},
        {
            "passages": 1,
            "sentences": 2,
            "change": "move",
            "pool": "last",
            "text": "One sentence is here to be read. Another sentence follows it. A third one ends it all. " * 9,
        },
    ),
}
if find_spec("lm_eval") is not None:  # an extra
    EXAMPLES["lm_eval"] = (
        {"task": harness_task("digits", 3)},
        set(),
        {
            "task": harness_task("numbers", 2),
            "include_path": str(FOLDER),
            "measure": "acc_norm",
            "limit": 2,
            "num_fewshot": 1,
            "batch_size": 2,
            "chat": True,
        },
    )
NAMES = list(EXAMPLES)
SEVERAL = {"embedding_position", "lm_eval"}  # read several texts a trial


PICTURES = {"hallucination", "pope", "spatial"}  # crossed with a model of images and text in vision/test_evaluate.py


def made(name: str) -> Task:
    return make(TASKS[name], name, EXAMPLES[name][0])


def test_every_task_has_an_example() -> None:
    assert set(EXAMPLES) | {"lm_eval"} | PICTURES == set(TASKS)
    for name in TASKS:
        cls = TASKS[name]
        assert cls.name == name and cls.metric and cls.unit and cls.source
        assert (cls.higher_is_better is None) == (name in SEVERAL), "a direction, where there is one"
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
        if value != getattr(task, field) and field != "chat":  # the reader has no chat template
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
    read = [task.tokens(reader, trial)[0] for trial in task.trials(reader)]
    if name in SEVERAL:
        assert looks.ends and max(end.lengths[0] for end in looks.ends) < max(read)
    else:
        assert looks.ends == {Boundary((tokens,)) for tokens in read}
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
    assert result.higher_is_better == {task.name: task.higher_is_better}
    scores = result.scores(task.name)
    assert list(scores.index) == list(range(count))
    assert (scores[edits[1].name] == scores["no edit"]).all()
    assert {task.name} == set(result.metrics) and result.provenance["parameters"]["tasks"][task.name]
    assert json.loads(json.dumps(result.details)) == result.details == Evaluation.load(tmp_path).details
    if type(task).summarise is not Task.summarise:
        assert [one["condition"] for one in result.details] == list(scores.columns)
        assert all(one["values"] for one in result.details)


@pytest.mark.parametrize("name", NAMES)
def test_bad_settings_are_refused_with_one_line(name: str) -> None:
    with pytest.raises(HeadscopeError, match=f"{name} has no setting 'colour'; it takes") as refused:
        make(TASKS[name], name, {"colour": 1})
    assert "\n" not in str(refused.value)
