"""Labelled sets: balance, groups, determinism, and that words alone say nothing."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest

from headscope.interp.errors import HeadscopeError
from headscope.probes.linear.dataset import DATASETS, Labelled, load_labelled, subject_number, truth
from headscope.probes.linear.facts import ATTRACTORS, RELATIONS, SUBJECTS
from headscope.probes.linear.fitting import Settings, shuffle_labels, split, surface_baselines


def leaky(count: int = 40) -> Labelled:
    """A set whose label is one word of the text."""
    texts = [f"item {i} is {'fine' if label else 'broken'}" for i in range(count) for label in (0, 1)]
    return Labelled(texts, np.tile([0, 1], count), [str(i) for i in range(count) for _ in (0, 1)], "leaky")


@pytest.mark.parametrize("name", DATASETS)
def test_generated_sets_are_balanced_and_deterministic(name: str) -> None:
    made, again, other = (load_labelled(name, seed) for seed in (3, 3, 4))
    assert made.texts == again.texts and made.sha256 == again.sha256 != other.sha256
    assert made.balance == 0.5 and len(made) >= 300
    for group in set(made.groups):
        mine = [label for label, of in zip(made.labels.tolist(), made.groups, strict=True) if of == group]
        assert 2 * sum(mine) == len(mine)


def test_every_question_and_every_answer_is_true_once_and_false_once_in_its_group() -> None:
    made = truth()
    questions: Counter[tuple[str, str, int]] = Counter()
    answers: Counter[tuple[str, str, int]] = Counter()
    for text, label, group in zip(made.texts, made.labels.tolist(), made.groups, strict=True):
        question, answer = text.removeprefix("Q: ").split(" A: ")
        assert question in group
        questions[group, question, label] += 1
        answers[group, answer, label] += 1
    assert set(questions.values()) == {1} and len(questions) == len(made)
    assert set(answers.values()) == {1} and len(answers) == len(made)


def test_truth_labels_are_true() -> None:
    made = dict(zip(truth().texts, truth().labels.tolist(), strict=True))
    facts = {(q.format(thing), answer) for q, table in RELATIONS.items() for thing, answer in table}
    checked = 0
    for text, label in made.items():
        question, answer = text.removeprefix("Q: ").split(" A: ")
        words = question.rstrip("?").replace(",", "").split()
        if "plus" in words:
            expected = int(words[2]) + int(words[4]) == int(answer)
        elif "number" in words:
            expected = int(answer) == (max if "larger" in words else min)(int(words[4]), int(words[6]))
        else:
            expected = (question, answer) in facts
        assert expected == bool(label), text
        checked += 1
    assert checked == len(made)


def test_the_last_noun_does_not_tell_the_number_of_the_subject() -> None:
    made = subject_number()
    plural_places = {plural for _, plural in ATTRACTORS}
    agree = [(t.split()[-1] in plural_places) == bool(y) for t, y in zip(made.texts, made.labels, strict=True)]
    assert np.mean(agree) == 0.5
    assert not {noun for forms in SUBJECTS for noun in forms} & {noun for forms in ATTRACTORS for noun in forms}


@pytest.mark.parametrize("name", DATASETS)
def test_a_bag_of_words_is_at_chance_on_generated_sets_and_reads_a_leaky_one(name: str) -> None:
    settings = Settings(seeds=(0, 1))
    made = load_labelled(name)
    words = surface_baselines(made, [split(made, seed, 0.2) for seed in (0, 1)], settings)["words"]
    assert np.abs(words - 0.5).max() < 0.06
    trap = leaky()
    found = surface_baselines(trap, [split(trap, seed, 0.2) for seed in (0, 1)], settings)
    assert found["words"].min() == 1.0 and found["characters"].min() == 1.0


def test_a_split_never_divides_a_group() -> None:
    made = truth()
    sides = [split(made, seed, 0.2) for seed in range(5)]
    for train, held_out in sides:
        assert not {made.groups[i] for i in train} & {made.groups[i] for i in held_out}
        assert sorted([*train, *held_out]) == list(range(len(made)))
        assert len({made.groups[i] for i in held_out}) == pytest.approx(0.2 * len(set(made.groups)), abs=1)
    assert len({tuple(held_out) for _, held_out in sides}) == 5


def test_shuffled_labels_keep_the_structure_and_lose_the_label() -> None:
    mixed = truth()
    shuffled = shuffle_labels(mixed, 0)
    for group in range(int(mixed.group_index.max()) + 1):
        rows = mixed.group_index == group
        assert shuffled[rows].sum() == mixed.labels[rows].sum()
    assert abs((shuffled == mixed.labels).mean() - 0.5) < 0.08
    pure = Labelled([f"t{i}" for i in range(400)], np.arange(400) // 4 % 2, [str(i // 4) for i in range(400)])
    shuffled = shuffle_labels(pure, 0)
    assert all(len(set(shuffled[pure.group_index == group])) == 1 for group in range(100))
    assert shuffled.sum() == 200 and abs((shuffled == pure.labels).mean() - 0.5) < 0.2


@pytest.mark.parametrize(
    ("texts", "labels", "groups", "message"),
    [
        (["a", "b"], [0], (), "give one of each"),
        (list("abcdef"), [0] * 6, (), "both present"),
        (list("abcdef"), [0, 1, 2, 0, 1, 0], (), "must be 0 and 1"),
        (list("abcde "), [0, 1, 0, 1, 0, 1], (), "empty"),
        (list("abcdea"), [0, 1, 0, 1, 0, 1], (), "twice"),
        (list("abcdef"), [0, 1, 0, 1, 0, 1], list("xxyyzz"), "too few"),
    ],
)
def test_bad_sets_are_refused(texts: list[str], labels: list[int], groups: list[str], message: str) -> None:
    with pytest.raises(HeadscopeError, match=message):
        Labelled(texts, np.array(labels), groups)


def test_own_sets_are_read_from_csv_and_jsonl(tmp_path) -> None:
    made = leaky(5)
    rows = list(zip(made.texts, made.labels.tolist(), made.groups, strict=True))
    csv, lines = tmp_path / "mine.csv", tmp_path / "mine.jsonl"
    csv.write_text("text,label,group\n" + "".join(f'"{t}",{y},{g}\n' for t, y, g in rows))
    lines.write_text("".join(json.dumps({"text": t, "label": y, "group": g}) + "\n" for t, y, g in rows))
    for path in (csv, lines):
        assert load_labelled(path).sha256 == made.sha256 and load_labelled(path).name == "mine"
    csv.write_text("sentence,label\na,1\n")
    with pytest.raises(HeadscopeError, match="columns text, label"):
        load_labelled(csv)
    with pytest.raises(HeadscopeError, match="truth, subject_number"):
        load_labelled("no such set")
