"""Two-way choices built offline, for what is fitted: facts from memory, and cities read in the context.

An item is a prompt, what should follow, what should not, and a group, which no split divides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from headscope.probes.linear.dataset import truth

PEOPLE = "Anna Boris Clara David Elena Felix Greta Henry Irene Jonas Karla Leo Maria Nora Oscar Paula".split()
CITIES = "Lisbon Oslo Cairo Lima Tokyo Delhi Rome Paris Berlin Madrid Dublin Vienna Athens Warsaw".split()


@dataclass(frozen=True)
class Item:
    """Two ways to go on."""

    prompt: str
    right: str
    wrong: str
    group: str

    def preference(self) -> dict[str, str]:
        """A row of {"prompt", "chosen", "rejected"}."""
        return {"prompt": self.prompt, "chosen": self.right, "rejected": self.wrong}

    def response(self) -> dict[str, str]:
        """A row of {"prompt", "response"}."""
        return {"prompt": self.prompt, "response": self.right}

    def labelled(self) -> list[dict[str, Any]]:
        """Two rows of {"text", "label", "group"}."""
        ways = ((self.right, 1), (self.wrong, 0))
        return [{"text": self.prompt + way, "label": label, "group": self.group} for way, label in ways]


def facts(seed: int) -> list[Item]:
    """``"Q: What is the capital of France? A:"``, `` Paris`` or `` Berlin``: the bundled facts, sums and comparisons.

    Pairs of questions exchange their answers (see ``headscope.probes.truth``), so that no answer is right by itself.
    """
    data = truth(seed)
    asked: dict[str, dict[int, str]] = {}
    groups = {}
    for text, label, group in zip(data.texts, data.labels.tolist(), data.groups, strict=True):
        prompt, _, answer = text.partition(" A:")
        asked.setdefault(prompt + " A:", {})[label] = answer
        groups[prompt + " A:"] = group
    return [Item(prompt, ways[1], ways[0], groups[prompt]) for prompt, ways in asked.items() if len(ways) == 2]


def lookup(seed: int, count: int = 400) -> list[Item]:
    """``"Anna lives in Oslo. Leo lives in Cairo. Q: Where does Leo live? A:"``, `` Cairo`` or `` Oslo``."""
    rng = np.random.default_rng(seed)
    items: dict[str, Item] = {}
    while len(items) < count:
        people, cities = rng.choice(PEOPLE, 2, replace=False), rng.choice(CITIES, 2, replace=False)
        who = int(rng.integers(2))
        told = " ".join(f"{name} lives in {city}." for name, city in zip(people, cities, strict=True))
        prompt = f"{told} Q: Where does {people[who]} live? A:"
        items[prompt] = Item(prompt, f" {cities[who]}", f" {cities[1 - who]}", prompt)
    return list(items.values())


TASKS: dict[str, Callable[[int], list[Item]]] = {"facts": facts, "lookup": lookup}


def split(items: list[Item], seed: int, sizes: tuple[int, ...]) -> list[list[Item]]:
    """Parts of so many items, drawn by whole groups: every group is in one part, and a part's last may be cut short."""
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(item.group, []).append(item)
    order = [list(groups.values())[i] for i in np.random.default_rng(seed).permutation(len(groups))]
    parts: list[list[Item]] = []
    for size in sizes:
        part: list[Item] = []
        while len(part) < size and order:
            part += order.pop()
        parts.append(part[:size])
    return parts
