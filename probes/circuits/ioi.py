"""Indirect object identification by templates of our own: pairs of prompts that differ in the second subject alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from headscope.interp.errors import HeadscopeError
from headscope.interp.models import load_model
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.registry import check_counts
from headscope.probes.patching.pairs import Pairs

# {A} and {B} are the two names in the order in which they come, {S} the one that is named again
TEMPLATES = (
    "Then,{A} and{B} went to the{place}.{S} gave a{thing} to",
    "When{A} and{B} were at the{place} together,{S} handed a{thing} to",
    "After{A} and{B} arrived at the{place},{S} decided to give a{thing} to",
    "While{A} and{B} were working at the{place},{S} passed a{thing} to",
    "Last week{A} and{B} met at the{place}, and{S} brought a{thing} to",
    "Friends{A} and{B} found a{thing} at the{place}.{S} gave it to",
)
NAMES = (
    "Mary John Tom James Dan Paul Mark David Peter Robert Michael Sarah Laura Anna Emma Kate Jane Alice Lisa Rachel "
    "Jack Henry Charles William Thomas Adam Simon Susan Julia Maria Linda Martin Eric Kevin Brian Jason Ryan Steve"
).split()
PLACES = "store garden restaurant school hospital office house station park market library museum".split()
THINGS = "drink book ring kiss ball computer necklace basketball box letter key gift".split()


def ioi(lm: LanguageModel, count: int = 64, *, seed: int = 0, templates: Sequence[str] = TEMPLATES) -> Pairs:
    """``count`` pairs of "Then, Mary and John went to the store. John gave a drink to": the answer is Mary.

    After Wang et al. 2022 (arXiv 2211.00593, Section 2), with templates and words of our own. Clean: IO and S are
    named, S again, so IO answers. Corrupt, as Merullo et al. 2024 (their ``gen_flipped_prompts(("S2", "IO"))``): the
    second S is IO, so that S answers; one token differs. Either name comes first in half of the pairs (ABBA and BABA).
    Names, places and things are single tokens of this tokenizer; a group is a template and an order, so that all its
    prompts have one token after the other in the same place. The answers are the names with a space before them.

    What differs from their data: fewer templates, no second sentence in between, names of one list for both. What a
    model does on it says nothing about other sentences.

    Returns:
        ``Pairs`` with the spans ``io``, ``s1``, ``s2`` and ``end``.

    Raises:
        HeadscopeError: the tokenizer has too few of the words as single tokens, or a pair that does not align.
    """
    check_counts(1, count=count)
    if not templates:
        raise HeadscopeError("no templates were given: name some, or leave templates out for those of this module")
    lm = load_model(lm)
    names, places, things = (single_tokens(lm, words) for words in (NAMES, PLACES, THINGS))
    if len(names) < 2 or not places or not things:
        raise HeadscopeError(
            f"{lm.name}: only {len(names)} names, {len(places)} places and {len(things)} things are single tokens"
        )
    rng = np.random.default_rng(seed)
    clean, corrupt, answers, others, groups = [], [], [], [], []
    for i in range(count):
        kind = i % (2 * len(templates))
        template, order = templates[kind // 2], kind % 2
        io, s = (names[n] for n in rng.choice(len(names), 2, replace=False))
        words = {
            "A": io if order == 0 else s,
            "B": s if order == 0 else io,
            "place": rng.choice(places),
            "thing": rng.choice(things),
        }
        clean.append(template.format(S=s, **words))
        corrupt.append(template.format(S=io, **words))
        answers.append(io)
        others.append(s)
        groups.append(kind)
    pairs = Pairs.of(lm, clean, corrupt, answers, others, groups)
    return Pairs(**{**vars(pairs), "spans": _spans(pairs)})


def single_tokens(lm: LanguageModel, words: Sequence[str]) -> list[str]:
    """Those of ``words``, a space before each, that are one token of their own, which stands for no other."""
    tokenizer, found = lm.required_tokenizer(), dict[int, str]()
    for word in words:
        ids = tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
        if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
            found.setdefault(ids[0], f" {word}")
    return list(found.values())


def _spans(pairs: Pairs) -> dict[str, list[tuple[int, int]]]:
    """Where the names stand, checked token by token.

    Raises:
        HeadscopeError: a pair that differs in anything but the second subject.
    """
    found: dict[str, list[tuple[int, int]]] = {"io": [], "s1": [], "s2": [], "end": []}
    rows: Any = zip(pairs.clean.tolist(), pairs.corrupt.tolist(), pairs.lengths.tolist(), pairs.answers.tolist(),
                    pairs.others.tolist(), strict=True)  # fmt: skip
    for i, (one, two, length, io, s) in enumerate(rows):
        differ = [at for at in range(length) if one[at] != two[at]]
        at_s = [at for at in range(length) if one[at] == s]
        if len(differ) != 1 or len(at_s) != 2 or differ[0] != at_s[1] or two[differ[0]] != io or one.count(io) != 1:
            raise HeadscopeError(
                f"pair {i} does not differ in its second subject alone: this tokenizer splits the names otherwise"
            )
        for name, at in (("io", one.index(io)), ("s1", at_s[0]), ("s2", at_s[1]), ("end", length - 1)):
            found[name].append((at, at + 1))
    return found
