"""Documents, arithmetic and facts: prompts, scores against plain passes, what edits change, summaries."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from headscope.interp.errors import HeadscopeError
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts.likelihood import Likelihood
from headscope.interventions import AblateHeads, Pine, apply
from headscope.interventions.tasks import arithmetic, documents, facts
from headscope.interventions.tasks.arithmetic import Arithmetic
from headscope.interventions.tasks.documents import DocumentsTask
from headscope.interventions.tasks.facts import Facts

TASKS = [DocumentsTask(questions=2, documents=3, max_new_tokens=3), Arithmetic(problems=1), Facts(questions=6)]


def said(lm: Any, text: str, option: str) -> float:
    """The log-probability of ``option`` behind ``text``, by one plain pass."""
    before, whole = (lm.tokenizer(t)["input_ids"] for t in (text, text + option))
    with torch.no_grad():
        each = lm.model(input_ids=torch.tensor([whole])).logits[0, :-1].double().log_softmax(-1)
    return float(sum(each[at - 1, whole[at]] for at in range(len(before), len(whole))))


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_responses_and_log_probabilities_by_hand(reader: LanguageModel, task: Any) -> None:
    for trial in task.trials(reader)[:4]:
        text, found = task.build(reader, trial).text, task.run(reader, trial)
        answer = trial["object"] if "object" in trial else found["answer"]
        assert found["log_probability"] == pytest.approx(said(reader, text, f" {answer}"), abs=1e-4)
        most = task.tokens(reader, trial)[1] - 1
        assert reader.generate(text, most)[0].partition("\n")[0].strip() == found["response"].partition("\n")[0]


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_without_attention_every_trial_is_answered_alike(reader: LanguageModel, task: Any) -> None:
    """But for what the prompt ends with, the only token that its last row sees."""
    every = [(layer, head) for layer in range(2) for head in range(4)]
    for edits, alike in (((), False), ((AblateHeads(every),), True)):
        ends: dict[int, set[str]] = {}
        with apply(reader, *edits):
            for trial in task.trials(reader):
                ends.setdefault(task.build(reader, trial).ids[-1], set()).add(task.run(reader, trial)["response"])
        begun = [{text[: min(map(len, said))] for text in said} for said in ends.values()]  # answers differ in length
        assert all(len(said) == 1 for said in begun) == alike


def response(monkeypatch: pytest.MonkeyPatch, module: Any, text: str) -> None:
    """What the model is made to answer."""
    likely = Likelihood(torch.tensor([-1.0, -0.5]), torch.tensor([3, 0]))
    monkeypatch.setattr(module, "answered", lambda *given, **named: (text, 3, likely))


# -- documents -------------------------------------------------------------------------------------------------------


def test_the_gold_document_moves_and_nothing_else(reader: LanguageModel) -> None:
    task = DocumentsTask(questions=3, documents=4)
    for trial in task.trials(reader):
        asked, prompt = task.loaded[trial["question"]], task.build(reader, trial)
        texts = [reader.tokenizer.decode(prompt.ids[slice(*prompt.spans[f"document_{i}"])]) for i in range(4)]
        assert texts[trial["place"]] == f"{asked.gold}\n"
        assert [text for i, text in enumerate(texts) if i != trial["place"]] == [f"{text}\n" for text in asked.others]
        assert prompt.spans["gold"] == prompt.spans[f"document_{trial['place']}"]
        assert prompt.spans["documents"] == (prompt.spans["document_0"][0], prompt.spans["document_3"][1])
        assert prompt.text.endswith(f"Question: {asked.question}\nAnswer: {asked.begun}")
        assert asked.gold.startswith(f"{asked.begun} {asked.answer}.") and not any(
            asked.answer in text for text in asked.others
        )
    assert len({asked.gold for asked in task.loaded}) == 3


def test_pine_takes_the_position_away(reader: LanguageModel) -> None:
    """All heads and layers: the answer's log-probability is the same wherever its document stands."""
    task = DocumentsTask(questions=2, documents=4, max_new_tokens=1)
    for edits, flat in (((Pine(),), True), ((), False)):
        with apply(reader, *edits):
            frame = pd.DataFrame([{**t, **task.run(reader, t)} for t in task.trials(reader)])
        apart = frame.groupby("question")["log_probability"].agg(lambda values: values.max() - values.min())
        assert (apart < 1e-3).all() if flat else (apart > 1e-2).all()


@pytest.mark.parametrize(
    ("answer", "said", "score"),
    [
        ("Vienna", "She lives in vienna, I think.", 1.0),
        ("Vienna", "Viennas", 0.0),
        ("The red house", "a Red House!", 1.0),
        ("Vienna", "", 0.0),
    ],
)
def test_an_answer_counts_where_its_words_occur(
    reader: LanguageModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, answer: str, said: str, score: float
) -> None:
    file = tmp_path / "d.jsonl"
    file.write_text(json.dumps({"question": "q?", "answer": answer, "documents": ["one", "two", "three"], "gold": 2}))
    task = DocumentsTask(data=file, documents=2)
    response(monkeypatch, documents, said)
    assert [trial["place"] for trial in task.trials(reader)] == [0, 1]
    assert task.build(reader, task.trials(reader)[0]).text.endswith("three\none\nQuestion: q?\nAnswer:")
    begun = json.loads(file.read_text()) | {"begun": "It is"}
    file.write_text(json.dumps(begun))
    task = DocumentsTask(data=file, documents=2)
    assert task.build(reader, task.trials(reader)[0]).text.endswith("\nAnswer: It is")
    assert "three\none\n" in task.build(reader, task.trials(reader)[0]).text
    assert task.run(reader, task.trials(reader)[0])["score"] == score


def test_the_position_curve() -> None:
    frame = pd.DataFrame(
        {"place": [0, 1, 0, 1], "score": [1.0, 0.0, 1.0, 1.0], "log_probability": [-1.0, -3.0, -2.0, -4.0]}
    )
    assert DocumentsTask(documents=2).summarise(frame) == {
        **{"accuracy at 1": 1.0, "accuracy at 2": 0.5, "spread": 0.5},
        **{"log-probability at 1": -1.5, "log-probability at 2": -3.5},
    }


# -- arithmetic ------------------------------------------------------------------------------------------------------

READ = {
    "plain": int,
    "padded": int,
    "reversed": lambda text: int(text[::-1]),
    "spaced": lambda text: int(text.replace(" ", "")),
}


def test_every_line_is_right_in_its_form(reader: LanguageModel) -> None:
    task = Arithmetic(digits=(1, 2, 4), problems=3, examples=5, example_digits=(1, 3))
    asked: dict[str, list[tuple[int, ...]]] = {}
    for trial in task.trials(reader):
        lines = task.build(reader, trial).text.split("\n")
        assert len(lines) == 6
        numbers = []
        for line in [*lines[:-1], f"{lines[-1]} {task.answer(trial)}"]:
            a, b, total = (READ[trial["form"]](part) for part in re.split(r" [+=] ", line))
            assert a + b == total
            numbers += [a, b]
            if trial["form"] == "padded":
                assert {len(part) for part in re.split(r" [+=] ", line)} == {5}
        assert [len(str(n)) for n in numbers] == [1, 1, 3, 3, 1, 1, 3, 3, 1, 1, trial["digits"], trial["digits"]]
        assert (trial["first"], trial["second"]) == tuple(numbers[-2:])
        assert trial["beyond"] == (trial["digits"] == 4)
        asked.setdefault(trial["form"], []).append(tuple(numbers))
    assert all(one == asked["plain"] for one in asked.values()), "forms ask for other sums"
    assert len(set(asked["plain"])) == 9
    spaced = [task.build(reader, trial).text for trial in task.trials(reader) if trial["form"] == "spaced"]
    assert all(re.search(r"\d \d", text) for text in spaced) and not any(re.search(r"= \d+ \d", t) for t in spaced)


@pytest.mark.parametrize(
    ("form", "said", "score"),
    [
        ("plain", "46", 1.0),
        ("plain", "46\n1 + 1", 1.0),
        ("plain", "466", 0.0),
        ("padded", "0046", 1.0),
        ("padded", "46", 0.0),
        ("reversed", "64", 1.0),
        ("reversed", "46", 0.0),
        ("spaced", "4 6", 1.0),
    ],
)
def test_a_sum_counts_in_its_form(
    reader: LanguageModel, monkeypatch: pytest.MonkeyPatch, form: str, said: str, score: float
) -> None:
    response(monkeypatch, arithmetic, said)
    trial = {"form": form, "digits": 2, "number": 0, "first": 12, "second": 34}
    assert Arithmetic().run(reader, trial)["score"] == score


def test_accuracy_by_form_and_digits() -> None:
    rows = [("plain", 1, 1.0), ("plain", 2, 0.0), ("padded", 1, 0.0), ("plain", 1, 0.0)]
    found = Arithmetic().summarise(pd.DataFrame(rows, columns=["form", "digits", "score"]))
    assert found == {
        **{"plain": pytest.approx(1 / 3), "padded": 0.0},
        **{"plain, 1 digits": 0.5, "plain, 2 digits": 0.0, "padded, 1 digits": 0.0},
    }


# -- facts -----------------------------------------------------------------------------------------------------------


def test_a_context_tells_the_fact_once(reader: LanguageModel) -> None:
    task = Facts(questions=9, people=4)
    for trial in task.trials(reader):
        prompt = task.build(reader, trial)
        spans = {name: reader.tokenizer.decode(prompt.ids[slice(*span)]) for name, span in prompt.spans.items()}
        assert spans["fact"] == f"{trial['begun']} {trial['object']}.\n" and prompt.text.count(trial["begun"]) == 2
        assert spans["question"] == f" {trial['begun']}" and spans["context"].count("\n") == 12
        assert prompt.text.endswith(f".\nTo sum up: {trial['begun']}")
    assert {trial["relation"] for trial in task.trials(reader)} == {"city", "job", "colour"}


def test_memory_has_no_context(reader: LanguageModel) -> None:
    trials = Facts(where="memory", questions=56).trials(reader)
    assert len({trial["begun"] for trial in trials}) == 56
    task = Facts(where="memory", questions=4)
    prompt = task.build(reader, task.trials(reader)[0])
    assert prompt.text == task.trials(reader)[0]["begun"] and set(prompt.spans) == {"question"}
    other = Facts(where="memory", questions=4, seed=1).trials(reader)
    assert [t["begun"] for t in other] != [t["begun"] for t in task.trials(reader)]


@pytest.mark.parametrize(
    ("said", "score"),
    [("Paris.", 1.0), (" “paris”, of course", 1.0), ("Parisian", 0.0), ("the city of Paris", 0.0), ("", 0.0)],
)
def test_an_answer_counts_where_it_begins(
    reader: LanguageModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, said: str, score: float
) -> None:
    file = tmp_path / "f.jsonl"
    file.write_text(json.dumps({"prompt": "The capital of France is ", "object": "Paris"}) + "\n")
    response(monkeypatch, facts, said)
    task = Facts(where="memory", data=file)
    (trial,) = task.trials(reader)
    found = task.run(reader, trial)
    assert found["score"] == score
    assert (found["rank"], found["first_log_probability"], found["log_probability"]) == (3, -1.0, -1.5)
    frame = pd.DataFrame([{**trial, **found}])
    assert task.summarise(frame) == {"rank": 3.0, "log-probability": -1.5}, "a file without relations has none"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DocumentsTask(documents=1), "documents: documents is a whole number of at least 2"),
        (lambda: DocumentsTask(documents=13).loaded, "13 people are asked for, and there are 12"),
        (lambda: DocumentsTask(data="nowhere").loaded, "cannot read nowhere"),
        (lambda: Arithmetic(forms=("roman",)), "forms is one of plain, padded, reversed, spaced"),
        (lambda: Arithmetic(digits=()), "digits is empty"),
        (lambda: Arithmetic(digits=(0, 1)), "digits is a whole number of at least 1"),
        (lambda: Arithmetic(problems=1.5), "problems must be a whole number"),
        (lambda: Facts(where="books"), "where is one of context, memory"),
        (lambda: Facts(data="f.jsonl"), "data are facts without a context"),
    ],
)
def test_bad_settings_are_one_line(make: Any, message: str) -> None:
    with pytest.raises(HeadscopeError, match=message) as refused:
        make()
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gold": 3}, "question 1: documents is a list of texts"),
        ({"documents": "one"}, "question 1: documents is a list of texts"),
        ({"answer": "..."}, "answer has a word"),
        ({"documents": ["one", "two"]}, "question 1 has 2 documents and 3 are asked for"),
    ],
)
def test_documents_of_another_form_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    file = tmp_path / "d.jsonl"
    file.write_text(json.dumps({"question": "q?", "answer": "x", "documents": ["x", "y", "z"], "gold": 0, **change}))
    with pytest.raises(HeadscopeError, match=message):
        _ = DocumentsTask(data=file, documents=3).loaded


@pytest.mark.slow
def test_smollm2_recalls_facts_of_the_world_with_its_attention(smollm2: LanguageModel) -> None:
    task = Facts(where="memory", questions=8, max_new_tokens=2)
    every = [(layer, head) for layer in range(30) for head in range(9)]
    plain = [task.run(smollm2, trial)["score"] for trial in task.trials(smollm2)]
    with apply(smollm2, AblateHeads(every)):
        without = [task.run(smollm2, trial)["score"] for trial in task.trials(smollm2)]
    assert sum(plain) >= 4 and sum(without) == 0
