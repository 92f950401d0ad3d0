"""Scenes: what is said of them is true of what was drawn, and they stand in the shares that the world declares."""

import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from headscope.interp.prompts.scenes.drawing import draw
from headscope.interp.prompts.scenes.language import (
    KINDS,
    LONG,
    article,
    caption,
    exists,
    hallucinated,
    named,
    place,
    plural,
    question,
    relation,
    request,
)
from headscope.interp.prompts.scenes.pictures import sample_pictures
from headscope.interp.prompts.scenes.world import (
    CLASSES,
    COLOURS,
    COMPANIONS,
    GRID,
    PATCH,
    SIZE,
    SMUDGE,
    Scene,
    Thing,
    balanced_scene,
    prior_scene,
)

ALONE = Scene((Thing(CLASSES.index("ball"), COLOURS.index("red"), 30.0, 90.0, 15.0),), background=0)


def test_a_thing_is_where_it_is_said_to_be():
    drawn = draw([ALONE], seed=0)
    rows, columns = (drawn.kinds[0] == CLASSES.index("ball")).nonzero(as_tuple=True)
    left, top, right, bottom = ALONE.things[0].box
    # the ball's shape has a radius of 0.9; labels reach 0.3 pixels beyond its edge, pixels are whole
    for low, high, found in ((left, right, columns), (top, bottom, rows)):
        assert low < found.min() <= low + 1.5 + 1.5 and high - 3.0 <= found.max() < high
    red, green, blue = drawn.pixels[0, :, 90 - 6, 30]
    assert red > 0.75 and max(green, blue) < 0.3
    assert (drawn.colours[0][rows, columns] == COLOURS.index("red")).all()


def test_pixels_are_whole_steps_and_come_back_with_their_seed():
    scenes = [balanced_scene(random.Random(n)) for n in range(3)]
    first, again, other = draw(scenes, 1), draw(scenes, 1), draw(scenes, 2)
    steps = first.pixels * 255
    assert torch.equal(first.pixels, again.pixels) and not torch.equal(first.pixels, other.pixels)
    assert (steps - steps.round()).abs().max() < 1e-4 and first.pixels.shape == (3, 3, SIZE, SIZE)


def test_later_things_are_drawn_over_earlier_ones_and_smudges_are_no_objects():
    below = replace(ALONE.things[0], kind=CLASSES.index("heart"))
    above = replace(ALONE.things[0], colour=COLOURS.index("blue"))
    smudge = Thing(SMUDGE, 0, 90.0, 30.0, 8.0, opacity=0.5, softness=8.0)
    scene = Scene((below, above, smudge), background=0)
    drawn = draw([scene], seed=0)
    assert drawn.kinds[0, 90, 30] == CLASSES.index("ball") and drawn.kinds[0, 30, 90] == -1
    assert [thing.name for thing in scene.objects] == ["heart", "ball"]
    assert not torch.equal(drawn.pixels[0, :, 26:34, 86:94], draw([ALONE], seed=0).pixels[0, :, 26:34, 86:94])


def test_fog_hides_everything_at_one():
    scene, bare = replace(ALONE, fog=1.0), Scene((), 0, fog=1.0)
    assert torch.equal(draw([scene, scene], 3).pixels[0], draw([scene, scene], 3).pixels[0])
    hidden, clear = draw([scene], 3).pixels[0], draw([ALONE], 3).pixels[0]
    assert hidden.std() < 0.5 * clear.std()
    with pytest.raises(IndexError):
        caption(bare, detail=False)  # there is nothing to say


def test_patches_hold_the_label_that_covers_most_of_them():
    drawn = draw([ALONE], seed=0)
    patches = drawn.patches(drawn.kinds, len(CLASSES))[0].reshape(GRID, GRID)
    cells = (drawn.kinds[0] >= 0).reshape(GRID, PATCH, GRID, PATCH).float().mean((1, 3))
    assert torch.equal(patches >= 0, cells > 0.12) and patches[7, 2] == CLASSES.index("ball")


def test_captions_name_what_is_there_and_nothing_else():
    draw_ = random.Random(5)
    for scene in [prior_scene(draw_) for _ in range(50)] + [balanced_scene(draw_) for _ in range(50)]:
        for detail in (False, True):
            said = caption(scene, detail=detail)
            assert Counter(named(said)) == Counter(thing.name for thing in scene.objects)
            assert hallucinated(said, scene.names) == []
            for thing in scene.objects:
                assert f"{COLOURS[thing.colour]} {thing.name}" in said


def test_answers_are_true():
    draw_, asked = random.Random(6), Counter()
    for _ in range(400):
        scene = balanced_scene(draw_)
        by_name = {thing.name: thing for thing in scene.objects}
        counts = Counter(thing.name for thing in scene.objects)
        for kind in KINDS:
            found = question(draw_, scene, kind)
            if found is None:
                continue
            asked[kind] += 1
            text, answer = found
            names = named(text)
            if kind == "colour":
                assert answer == f"{COLOURS[by_name[names[0]].colour].capitalize()}." and counts[names[0]] == 1
            if kind == "where":
                assert answer.lower() == f"{place(by_name[names[0]])}."
            if kind == "exists":
                assert answer == ("Yes." if names[0] in counts else "No.")
            if kind == "count_class":
                words = ("Zero", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight")
                assert words.index(answer[:-1]) == counts[names[0]] and plural(names[0]) in text
            if kind == "relation":
                one, other = (by_name[name] for name in names)
                across, down = one.x - other.x, one.y - other.y
                score = {"Left.": -across, "Right.": across, "Above.": -down, "Below.": down}
                assert answer == max(score, key=score.get) and abs(abs(across) - abs(down)) >= 3
    assert min(asked[kind] for kind in KINDS) > 200


def test_no_relation_where_no_direction_prevails():
    one = ALONE.things[0]
    assert relation(one, replace(one, x=50.0, y=110.0)) is None
    assert relation(one, replace(one, x=50.0)) == "Left." and relation(one, replace(one, y=50.0)) == "Below."


def test_companions_come_as_often_as_declared():
    draw_, trials = random.Random(7), 1500
    for name, companion in COMPANIONS.items():
        there = np.mean([companion.name in prior_scene(draw_, objects=[name]).names for _ in range(trials)])
        error = (companion.beside * (1 - companion.beside) / trials) ** 0.5
        assert abs(there - companion.beside) < 4 * error, name
    missing = [prior_scene(draw_, objects=["boat"], companions=False) for _ in range(50)]
    assert all(scene.missing_companions() == ("fish",) for scene in missing)
    assert not any(scene.names & {c.name for c in COMPANIONS.values()} for scene in missing)
    assert all("fish" in prior_scene(draw_, objects=["boat"], companions=True).names for _ in range(50))


def test_everything_stays_inside_the_image():
    draw_ = random.Random(8)
    for scene in [prior_scene(draw_) for _ in range(100)] + [balanced_scene(draw_, 8, 8) for _ in range(50)]:
        for thing in scene.things:
            assert thing.radius <= thing.x <= SIZE - thing.radius and thing.radius <= thing.y <= SIZE - thing.radius


def test_words():
    assert article("orange boat") == "an orange boat" and exists("ball", False)[1] == "No."
    assert request(detail=True) == LONG and "boat" in request(detail=False, mention="boat")
    assert named("Two boats, a Star and mushrooms; starfish") == ["boat", "star", "mushroom"]


def test_pictures_are_the_same_whatever_stands_beside_them():
    few, many = sample_pictures(2), sample_pictures(4)
    assert all((one.pixels == other.pixels).all() for one, other in zip(few, many, strict=False))
    for one in many:
        assert one.pixels.shape == (SIZE, SIZE, 3) and one.pixels.dtype == np.uint8
        for name, box in one.boxes.items():
            thing = next(thing for thing in one.scene.objects if name.endswith(thing.name))
            assert box == thing.box
