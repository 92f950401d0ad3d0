"""Invented people and what is said of them: facts that no model has read, so that memory does not help."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from headscope.interp.errors import HeadscopeError

ONSETS = ("Ba", "Do", "Fe", "Ga", "Ke", "Lo", "Mi", "Na", "Pe", "Ri", "So", "Ta", "Ve", "Zo")
ENDS = ("bran", "dek", "fir", "lum", "mar", "nix", "pol", "rik", "san", "tov", "vel", "zin")


@dataclass(frozen=True)
class Relation:
    """What can be said of somebody: ``statement`` with {name} and {value}, whose beginning up to the value also asks;
    ``question``; the values, no two alike."""

    name: str
    statement: str
    question: str
    values: tuple[str, ...]

    def say(self, name: str, value: str) -> str:
        """The sentence."""
        return self.statement.format(name=name, value=value)

    def begin(self, name: str) -> str:
        """The sentence up to its value."""
        return self.statement.partition("{value}")[0].rstrip().format(name=name)


RELATIONS = (
    Relation(
        "city",
        "{name} lives in {value}.",
        "Where does {name} live?",
        (
            "Lisbon",
            "Oslo",
            "Vienna",
            "Athens",
            "Madrid",
            "Dublin",
            "Warsaw",
            "Prague",
            "Cairo",
            "Tokyo",
            "Berlin",
            "Rome",
        ),
    ),
    Relation(
        "job",
        "{name} works as a {value}.",
        "What is the job of {name}?",
        (
            "baker",
            "doctor",
            "farmer",
            "lawyer",
            "nurse",
            "painter",
            "pilot",
            "sailor",
            "tailor",
            "teacher",
            "writer",
            "judge",
        ),
    ),
    Relation(
        "colour",
        "The favorite color of {name} is {value}.",
        "What is the favorite color of {name}?",
        ("black", "blue", "brown", "green", "grey", "orange", "pink", "purple", "red", "silver", "white", "yellow"),
    ),
)
ASIDES = (
    "The move took two days, and the cat was carried in a basket.",
    "The house has a wooden door and stands beside a small bakery.",
    "In winter the windows are covered with ice in the morning.",
    "A piano was brought up the stairs by three men.",
    "On Sundays there is soup, and the neighbors come to play cards.",
    "The old bridge was closed for repairs during the summer.",
    "Every letter is answered on the day that it arrives.",
    "The garden has two apple trees and a broken fence.",
)


def names(rng: np.random.Generator, count: int) -> list[str]:
    """Different invented names, of which no two begin or end alike.

    Raises:
        HeadscopeError: more than there are.
    """
    most = min(len(ONSETS), len(ENDS))
    if count > most:
        raise HeadscopeError(f"{count} people are asked for, and there are {most} invented names: ask for fewer")
    drawn = zip(rng.permutation(len(ONSETS)), rng.permutation(len(ENDS)), strict=False)
    return [ONSETS[first] + ENDS[second] for first, second in list(drawn)[:count]]


def values(rng: np.random.Generator, relation: Relation, count: int) -> list[str]:
    """Different values of a relation.

    Raises:
        HeadscopeError: more than it has.
    """
    if count > len(relation.values):
        raise HeadscopeError(
            f"{count} different answers are asked for, and {relation.name} has {len(relation.values)}: ask for fewer"
        )
    return pick(rng, relation.values, count)


def pick(rng: np.random.Generator, given: Sequence[str], count: int) -> list[str]:
    """So many of the given texts in random order, each once before one comes twice."""
    found: list[str] = []
    while len(found) < count:
        found += [given[i] for i in rng.permutation(len(given))]
    return found[:count]
