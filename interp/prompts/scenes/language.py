"""What is said and asked of a scene: captions, questions with their answers, and the classes that a text names."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal

from headscope.interp.prompts.scenes.world import BACKGROUNDS, CLASSES, COLOURS, COMPANIONS, SIZE, Scene, Thing

SHORT, LONG = "Describe the image briefly.", "Describe the image in detail."
NUMBERS = ("Zero", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine", "Ten", "Eleven", "Twelve")
KINDS = ("colour", "where", "count", "count_class", "relation", "exists", "background")
Kind = Literal["colour", "where", "count", "count_class", "relation", "exists", "background"]
Asked = tuple[str, str]  # a question and its answer
_BEHIND = ("on the grass", "at the beach", "at night", "in the snow")
_PLACES = (
    "in the top left", "at the top", "in the top right", "on the left", "in the center", "on the right",
    "in the bottom left", "at the bottom", "in the bottom right",
)  # fmt: skip
CLEAR = 3.0  # pixels by which one direction must exceed the other for a relation to be asked
_PLURAL = {"fish": "fish", "mushroom": "mushrooms"}


def article(words: str) -> str:
    """With "a" or "an"."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def called(thing: Thing) -> str:
    """Its colour and class."""
    return f"{COLOURS[thing.colour]} {thing.name}"


def place(thing: Thing) -> str:
    """Which ninth of the image its centre is in."""
    column, row = (min(2, int(3 * value / SIZE)) for value in (thing.x, thing.y))
    return _PLACES[3 * row + column]


def listing(parts: Sequence[str]) -> str:
    """ "a, b and c"."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def caption(scene: Scene, *, detail: bool) -> str:
    """What is there, the large and clear first: in a list, or a sentence each with its place. Nothing else is named."""
    things = sorted(scene.objects, key=lambda thing: -thing.salience)
    behind = _BEHIND[scene.background]
    if not detail:
        return f"The image shows {listing([article(called(thing)) for thing in things])} {behind}."
    sentences = [f"{article(called(thing)).capitalize()} is {place(thing)}." for thing in things]
    return " ".join([f"The scene is {behind}.", *sentences])


def request(*, detail: bool, mention: str | None = None) -> str:
    """The question for a caption; ``mention`` names an object in it."""
    if mention is None:
        return LONG if detail else SHORT
    return f"Describe the image with the {mention} {'in detail' if detail else 'briefly'}."


def named(text: str) -> list[str]:
    """The classes that a text names, in order, plurals as their class."""
    plurals = {plural(name): name for name in CLASSES}
    words = re.findall(r"[a-z]+", text.lower())
    return [word if word in CLASSES else plurals[word] for word in words if word in CLASSES or word in plurals]


def plural(name: str) -> str:
    """More than one of a class."""
    return _PLURAL.get(name, f"{name}s")


def exists(name: str, there: bool) -> Asked:
    """The yes/no question of POPE."""
    return f"Is there {article(name)} in the image?", "Yes." if there else "No."


def relation(thing: Thing, other: Thing) -> str | None:
    """ "Left.", "Right.", "Above." or "Below.": where the one is from the other; None where no direction prevails."""
    across, down = thing.x - other.x, thing.y - other.y
    if abs(abs(across) - abs(down)) < CLEAR:
        return None
    if abs(across) > abs(down):
        return "Left." if across < 0 else "Right."
    return "Above." if down < 0 else "Below."


def single(scene: Scene) -> list[Thing]:
    """The objects whose class stands in the scene once."""
    counts = Counter(thing.name for thing in scene.objects)
    return [thing for thing in scene.objects if counts[thing.name] == 1]


def question(draw: random.Random, scene: Scene, kind: Kind) -> Asked | None:
    """A question of one kind with its true answer; None where the scene has none."""
    alone, counts = single(scene), Counter(thing.name for thing in scene.objects)
    if kind == "colour" and alone:
        thing = draw.choice(alone)
        return f"What color is the {thing.name}?", f"{COLOURS[thing.colour].capitalize()}."
    if kind == "where" and alone:
        thing = draw.choice(alone)
        return f"Where is the {thing.name}?", f"{place(thing).capitalize()}."
    if kind == "count":
        return "How many objects are there?", f"{NUMBERS[len(scene.objects)]}."
    if kind == "count_class":
        name = draw.choice(scene.objects).name if draw.random() < 0.75 else draw.choice(CLASSES)
        return f"How many {plural(name)} are there?", f"{NUMBERS[counts[name]]}."
    if kind == "relation" and len(alone) > 1:
        thing, other = draw.sample(alone, 2)
        answer = relation(thing, other)
        return None if answer is None else (f"Where is the {thing.name} relative to the {other.name}?", answer)
    if kind == "exists":
        return _asked_after(draw, scene)
    if kind == "background":
        return "What is the background?", f"{BACKGROUNDS[scene.background].capitalize()}."
    return None


def _asked_after(draw: random.Random, scene: Scene) -> Asked:
    """Companions of what is there, present or not, in half of the questions: so "yes" is right more often than not."""
    companions = [beside.name for name, beside in COMPANIONS.items() if name in scene.names]
    if companions and draw.random() < 0.5:
        name = draw.choice(companions)
    elif draw.random() < 0.5:
        name = draw.choice(sorted(scene.names))
    else:
        name = draw.choice([name for name in CLASSES if name not in scene.names] or list(CLASSES))
    return exists(name, name in scene.names)


def hallucinated(text: str, there: Iterable[str]) -> list[str]:
    """The classes that a text names and a scene lacks, in order, each time it is named."""
    present = set(there)
    return [name for name in named(text) if name not in present]
