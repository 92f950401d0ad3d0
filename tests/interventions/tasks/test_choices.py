"""Multiple choice and examples in the context: scores against plain passes, chance without attention, summaries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from headscope.interp.errors import HeadscopeError
from headscope.interp.models.language_model import LanguageModel
from headscope.interventions import AblateHeads, SwapKeys, apply
from headscope.interventions.tasks.few_shot import FewShot
from headscope.interventions.tasks.multiple_choice import MultipleChoice

EVERY = [(layer, head) for layer in range(2) for head in range(4)]


def said(lm: Any, text: str, option: str) -> float:
    """The log-probability of ``option`` behind ``text``, by one plain pass."""
    before, whole = (lm.tokenizer(t)["input_ids"] for t in (text, text + option))
    assert whole[: len(before)] == before
    with torch.no_grad():
        each = lm.model(input_ids=torch.tensor([whole])).logits[0, :-1].double().log_softmax(-1)
    return float(sum(each[at - 1, whole[at]] for at in range(len(before), len(whole))))


def test_letters_by_hand(reader: LanguageModel) -> None:
    task = MultipleChoice(questions=3)
    assert len(task.trials(reader)) == 12
    for trial in task.trials(reader):
        question, order = task.loaded[trial["question"]], trial["order"]
        options = [question.options[i] for i in order]
        listed = "".join(f"\n{letter}. {option}" for letter, option in zip("ABCD", options, strict=True))
        text = f"Question: {question.question}{listed}\nAnswer:"
        expected = [said(reader, text, f" {letter}") for letter in "ABCD"]
        found = task.run(reader, trial)
        assert found["log_probabilities"] == pytest.approx(expected, abs=1e-4)
        best = max(range(4), key=expected.__getitem__)
        assert (found["letter"], found["chosen"]) == ("ABCD"[best], options[best])
        assert options["ABCD".index(found["gold_letter"])] == question.options[question.gold]
        assert found["score"] == float(found["letter"] == found["gold_letter"])
        gold = "ABCD".index(found["gold_letter"])
        others = max(value for place, value in enumerate(expected) if place != gold)
        assert found["margin"] == pytest.approx(expected[gold] - others, abs=1e-4)


@pytest.mark.parametrize("normalise", ["sum", "token", "character", "byte"])
def test_cloze_by_hand(reader: LanguageModel, tmp_path: Path, normalise: str) -> None:
    options = ["a café", "the answer is a long one", "seven"]
    file = tmp_path / "q.jsonl"
    file.write_text(json.dumps({"question": "Which?", "options": options, "answer": 1}) + "\n")
    task = MultipleChoice(data=file, scoring="cloze", normalise=normalise)
    (trial,) = task.trials(reader)
    sums = [said(reader, "Question: Which?\nAnswer:", f" {option}") for option in options]
    tokens = [len(reader.tokenizer(f" {option}")["input_ids"]) for option in options]
    by = {"sum": [1, 1, 1], "token": tokens, "character": [6, 24, 5], "byte": [7, 24, 5]}[normalise]
    values = [value / n for value, n in zip(sums, by, strict=True)]
    found = task.run(reader, trial)
    assert found["log_probabilities"] == pytest.approx(sums, abs=1e-4)
    assert found["chosen"] == options[max(range(3), key=values.__getitem__)]
    assert found["margin"] == pytest.approx(values[1] - max(values[0], values[2]), abs=1e-4)
    assert task.tokens(reader, trial) == (len(reader.tokenizer("Question: Which?\nAnswer:")["input_ids"]), 3)


def test_without_attention_it_is_chance(reader: LanguageModel) -> None:
    """The last row then sees itself alone, so that every prompt gets the same letter, and the same label."""
    tasks = [MultipleChoice(questions=5), FewShot(classes=3, queries=12)]
    for task, chance in zip(tasks, (1 / 4, 1 / 3), strict=True):
        with apply(reader, AblateHeads(EVERY)):
            rows = [{**trial, **task.run(reader, trial)} for trial in task.trials(reader)]
        frame = pd.DataFrame(rows)
        assert frame["score"].mean() == pytest.approx(chance)
        assert sorted(value for name, value in task.summarise(frame).items() if name.startswith("chose"))[-1] == 1.0
    letters = pd.DataFrame([{**t, **tasks[0].run(reader, t)} for t in tasks[0].trials(reader)])
    assert letters["log_probabilities"].map(str).nunique() > 1, "attention changes nothing, so the test shows nothing"


def test_edits_by_phase_and_by_span(reader: LanguageModel, tmp_path: Path) -> None:
    """A letter is chosen by the prompt's last row; an option's later tokens by rows of its own."""
    file = tmp_path / "q.jsonl"
    file.write_text(json.dumps({"question": "Which?", "options": ["one two three", "four five"], "answer": "B"}) + "\n")
    letters, cloze = MultipleChoice(data=file), MultipleChoice(data=file, scoring="cloze")

    def scores(task: MultipleChoice, *edits: Any) -> list[float]:
        with apply(reader, *edits):
            found: list[float] = task.run(reader, task.trials(reader)[0])["log_probabilities"]
        return found

    decode, answer = AblateHeads(EVERY, during="decode"), AblateHeads(EVERY, during="answer")
    assert scores(letters, decode)[0] == scores(letters)[0] != scores(letters, answer)[0], "' A' is one token"
    assert scores(cloze, decode) != scores(cloze)
    swapped = SwapKeys(EVERY, first="anchor", second="gold_letter", during="answer")
    assert scores(letters, swapped) != scores(letters)


def test_orders() -> None:
    rotations = MultipleChoice(questions=1)._orders(0, 4)
    assert rotations == [[0, 1, 2, 3], [1, 2, 3, 0], [2, 3, 0, 1], [3, 0, 1, 2]]
    drawn = MultipleChoice(orders=5, seed=3)._orders(7, 4)
    assert drawn[0] == [0, 1, 2, 3] and len({tuple(one) for one in drawn}) == 5
    assert all(sorted(one) == [0, 1, 2, 3] for one in drawn)
    assert drawn == MultipleChoice(orders=5, seed=3)._orders(7, 4) != MultipleChoice(orders=5, seed=4)._orders(7, 4)
    assert sorted(MultipleChoice(orders=50)._orders(0, 3)) == sorted(
        [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]]
    )
    assert MultipleChoice(scoring="cloze")._orders(0, 4) == [[0, 1, 2, 3]], "an order that is not shown"
    assert len(MultipleChoice(scoring="cloze", listed=True)._orders(0, 4)) == 4


def test_what_it_says_beside_accuracy() -> None:
    rows = [(0, "A", "x", "A", 1.0), (0, "A", "y", "B", 0.0), (1, "B", "u", "A", 0.0), (1, "A", "u", "B", 0.0)]
    frame = pd.DataFrame(rows, columns=["question", "letter", "chosen", "gold_letter", "score"])
    found = MultipleChoice(questions=2).summarise(frame)
    assert found == {
        **{"chose A": 0.75, "chose B": 0.25, "chose C": 0.0, "chose D": 0.0},
        **{"right at A": 0.5, "right at B": 0.0, "consistent": 0.5},
    }
    assert "consistent" not in MultipleChoice(questions=2).summarise(frame.iloc[[0, 2]]), "one order has none"


def test_bundled_questions_have_one_right_answer() -> None:
    from headscope.interventions.tasks.lines import bundled

    kinds = json.loads(bundled("kinds.json"))
    for question in MultipleChoice(questions=None).loaded:
        asked = question.question.removesuffix("?").split()[-1]
        assert [option in kinds[asked] for option in question.options].index(True) == question.gold
        assert sum(option in kinds[asked] for option in question.options) == 1
    assert len(MultipleChoice(questions=None).loaded) == 40


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "q", "options": ["a", "b"]}', "line 1 of .* has no answer"),
        ("[1]", "line 1 of .* has no question, options, answer"),
        ("nonsense", "line 1 of .* is no JSON"),
        ("", "is empty: give one JSON object a line"),
        ('{"question": "q", "options": ["a"], "answer": 0}', "question 1: options are 2 to 26 different texts"),
        ('{"question": "q", "options": ["a", "a"], "answer": 0}', "question 1: options are 2 to 26 different texts"),
        (
            '{"question": "q", "options": ["a", "b"], "answer": 2}',
            "a letter from A to B or an index from 0 to 1, not 2",
        ),
        ('{"question": "q", "options": ["a", "b"], "answer": "C"}', "a letter from A to B or an index"),
        ('{"question": "q", "options": ["a", "b"], "answer": true}', "a letter from A to B or an index"),
    ],
)
def test_a_file_of_another_form_is_refused(reader: LanguageModel, tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "q.jsonl"
    file.write_text(line)
    with pytest.raises(HeadscopeError, match=message) as refused:
        MultipleChoice(data=file).trials(reader)
    assert "\n" not in str(refused.value)


def test_answers_are_letters_or_indices(tmp_path: Path) -> None:
    file = tmp_path / "q.jsonl"
    file.write_text(
        "\n".join(json.dumps({"question": "q", "options": ["a", "b"], "answer": x}) for x in (1, "B", "b", " b "))
    )
    assert [question.gold for question in MultipleChoice(data=file).loaded] == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MultipleChoice(scoring="guess"), "scoring is one of letter, cloze; got 'guess'"),
        (lambda: MultipleChoice(normalise="word"), "normalise is one of sum, token, character, byte"),
        (lambda: MultipleChoice(normalise="byte"), "letters are listed and not normalised"),
        (lambda: MultipleChoice(listed=False), "letters are listed"),
        (lambda: MultipleChoice(orders=0), "orders is a whole number of at least 1"),
        (lambda: MultipleChoice(data="nowhere.jsonl").loaded, "cannot read nowhere.jsonl"),
        (lambda: FewShot(labels="no"), "labels is one of true, shuffled, permuted, abstract"),
        (lambda: FewShot(classes=1), "classes is a whole number of at least 2"),
        (lambda: FewShot(classes=9).loaded, "there are 8 classes"),
        (lambda: FewShot(shots=12).loaded, "class 'fruit' has 12 texts"),
    ],
)
def test_bad_settings_are_one_line(make: Any, message: str) -> None:
    with pytest.raises(HeadscopeError, match=message):
        make()


# -- examples in the context -----------------------------------------------------------------------------------------


def shown(text: str) -> list[tuple[str, str]]:
    """The examples of a prompt."""
    return [tuple(part.removeprefix("Input: ").split("\nLabel: ")) for part in text.split("\n\n")[:-1]]  # type: ignore[misc]


@pytest.mark.parametrize("labels", ["true", "permuted", "abstract", "shuffled"])
def test_examples_and_their_labels(reader: LanguageModel, labels: str) -> None:
    task = FewShot(classes=3, shots=2, queries=6, labels=labels)
    mixed = False
    for trial in task.trials(reader):
        examples = shown(task.build(reader, trial).text)
        words = [word for word, _ in examples]
        assert len(set(words)) == 6 and trial["query"] not in words
        own = [next(kind for kind, texts in task.loaded.items() if word in texts) for word in words]
        assert sorted(own) == sorted([kind for kind in task.loaded for _ in range(2)])
        right = [task.written[kind] == label for kind, (_, label) in zip(own, examples, strict=True)]
        mixed |= not all(right)
        assert {label for _, label in examples} <= set(task.written.values())
        assert trial["wanted"] == task.written[trial["label"]]
    assert mixed == (labels == "shuffled")
    renamed = {kind: label for kind, label in task.written.items() if kind != label}
    assert len(renamed) == {"true": 0, "shuffled": 0, "permuted": 3, "abstract": 3}[labels]
    assert len(set(task.written.values())) == 3


def test_labels_by_hand(reader: LanguageModel) -> None:
    task = FewShot(classes=3, shots=1, queries=3)
    for trial in task.trials(reader):
        text, found = task.build(reader, trial).text, task.run(reader, trial)
        values = {label: said(reader, text, f" {label}") for label in task.written.values()}
        assert found["chosen"] == max(values, key=values.__getitem__)
        assert found["log_probability"] == pytest.approx(values[trial["wanted"]], abs=1e-4)
        others = max(value for label, value in values.items() if label != trial["wanted"])
        assert found["margin"] == pytest.approx(values[trial["wanted"]] - others, abs=1e-4)


@pytest.mark.slow
def test_smollm2_learns_classes_from_examples_with_its_attention(smollm2: LanguageModel) -> None:
    task = FewShot(classes=4, shots=3, queries=8)
    trials = task.trials(smollm2)
    every = [(layer, head) for layer in range(30) for head in range(9)]
    assert sum(task.run(smollm2, trial)["score"] for trial in trials) >= 6
    with apply(smollm2, AblateHeads(every)):
        assert sum(task.run(smollm2, trial)["score"] for trial in trials) == 2, "one class of four"
