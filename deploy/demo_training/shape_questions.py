"""Questions about a scene of objects that have exactly one right answer; None where the scene offers none."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from deploy.demo_training.geometry import beside, is_beside, ninth, reading_groups
from deploy.demo_training.phrasing import join_list, phrase, plural, with_article
from deploy.demo_training.sample import COLORS, SHAPES, Turn
from deploy.demo_training.scenes import Scene, Thing

Asker = Callable[[random.Random, Scene], Turn | None]

COLOR_OF = (
    "What color is the {thing}?",
    "Which color is the {thing}?",
    "What is the color of the {thing}?",
    "What color does the {thing} have?",
    "Tell me the color of the {thing}.",
    "The {thing} is what color?",
    "Name the color of the {thing}.",
)
COLOR_OF_MANY = (
    "What color are the {things}?",
    "Which color are the {things}?",
    "What is the color of the {things}?",
    "What color do the {things} have?",
    "Tell me the color of the {things}.",
)
COLOR_OF_IT = (
    "What color is it?",
    "What color is this?",
    "Which color do you see?",
    "What color is this {thing}?",
)
SHAPE_OF = (
    "What shape is {color}?",
    "Which shape is {color}?",
    "What shape is the {color} {thing}?",
    "What is the shape of the {color} {thing}?",
    "Which shape does the {color} {thing} have?",
    "What shape does the {color} {thing} have?",
    "Name the shape of the {color} {thing}.",
    "What shape has the color {color}?",
)
SHAPE_OF_IT = (
    "What shape is it?",
    "What shape is this?",
    "Which shape do you see?",
    "What shape is the {thing}?",
    "What is the shape of the {thing}?",
    "Which shape is shown?",
)
COUNT_OF = (
    "How many {things} are there?",
    "How many {things}?",
    "How many {things} do you see?",
    "How many {things} can you see?",
    "How many {things} are in the picture?",
    "How many {things} are in the image?",
    "Count the {things}.",
    "What is the number of {things}?",
    "How many {things} does the picture show?",
)
PLACE_OF = (
    "Where is the {thing}?",
    "Where is the {thing} in the picture?",
    "Where in the image is the {thing}?",
    "Where do you see the {thing}?",
    "Where can I find the {thing}?",
    "In which part of the picture is the {thing}?",
    "What is the position of the {thing}?",
    "Where's the {thing}?",
)
THING_AT = {
    "left": ("left of", "to the left of", "on the left of", "directly left of"),
    "right": ("right of", "to the right of", "on the right of", "directly right of"),
    "above": ("above", "directly above", "over", "on top of"),
    "below": ("below", "under", "directly below", "beneath"),
}
THING_BESIDE = (
    "What is {side} the {thing}?",
    "What do you see {side} the {thing}?",
    "Which object is {side} the {thing}?",
    "What object is {side} the {thing}?",
    "Which shape is {side} the {thing}?",
    "What's {side} the {thing}?",
    "Name the object {side} the {thing}.",
)
WHICH_SIDE = (
    "Is the {thing} {sides} the {mate}?",
    "Where is the {thing}, {sides} the {mate}?",
    "Do you see the {thing} {sides} the {mate}?",
    "Is the {thing} located {sides} the {mate}?",
)
ACROSS = ("left or right of", "right or left of", "to the left or right of", "to the right or to the left of")
UPRIGHT = ("above or below", "below or above")
THING_IN = (
    "What is in the {place}?",
    "What do you see in the {place}?",
    "Which object is in the {place}?",
    "What object is in the {place}?",
    "What's in the {place}?",
    "What is in the {place} of the picture?",
)
IS_THERE = (
    "Is there {thing}?",
    "Is there {thing} in the picture?",
    "Do you see {thing}?",
    "Can you see {thing}?",
    "Does the picture show {thing}?",
    "Does the image contain {thing}?",
    "Is there {thing} here?",
)
IS_COLOR = (
    "Is the {thing} {color}?",
    "Is the color of the {thing} {color}?",
    "Does the {thing} have the color {color}?",
)
IS_BESIDE = ("Is the {thing} {side} the {mate}?", "Do you see the {thing} {side} the {mate}?")
DESCRIBE = (
    "What is in the picture?",
    "Describe the picture.",
    "What do you see?",
    "What is shown here?",
    "What can you see in the image?",
    "Describe this image.",
    "Which objects are in the picture?",
    "List the objects.",
    "What does the picture show?",
    "What's in this image?",
)
ANY_THING = ("object", "shape", "thing")
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}


def ask_color(rng: random.Random, scene: Scene) -> Turn | None:
    things = scene.things
    if len(things) == 1 and rng.random() < 0.4:
        question = phrase(rng, COLOR_OF_IT, thing=rng.choice((*ANY_THING, things[0].shape)))
        return Turn("color", question, things[0].color)
    one_color = [
        shape for shape in SHAPES if len({thing.color for thing in things if thing.shape == shape}) == 1
    ]
    if not one_color:
        return None
    shape = rng.choice(one_color)
    found = [thing for thing in things if thing.shape == shape]
    templates = COLOR_OF if len(found) == 1 else COLOR_OF_MANY
    return Turn("color", phrase(rng, templates, thing=shape, things=plural(shape)), found[0].color)


def ask_shape(rng: random.Random, scene: Scene) -> Turn | None:
    things = scene.things
    if len(things) == 1 and rng.random() < 0.4:
        return Turn("shape", phrase(rng, SHAPE_OF_IT, thing=rng.choice(ANY_THING)), things[0].shape)
    only = [thing for thing in things if _count(things, color=thing.color) == 1]
    if not only:
        return None
    thing = rng.choice(only)
    question = phrase(rng, SHAPE_OF, color=thing.color, thing=rng.choice((*ANY_THING, "one")))
    return Turn("shape", question, thing.shape)


def ask_count(rng: random.Random, scene: Scene) -> Turn | None:
    """All numbers that the scene offers alike but 1, which most scenes do; one answer of eight is 0."""
    if rng.random() < 0.125:
        name = _absent_kind(rng, scene)
        return Turn("count", phrase(rng, COUNT_OF, things=name), "0")
    names: dict[int, list[str]] = {len(scene.things): [rng.choice(("objects", "shapes", "things"))]}
    for thing in scene.things:
        for color, shape in ((thing.color, None), (None, thing.shape), (thing.color, thing.shape)):
            name = _plural_name(rng, color, shape)
            names.setdefault(_count(scene.things, color, shape), []).append(name)
    numbers = sorted(names)
    (number,) = rng.choices(numbers, [1 if number == 1 else 2 for number in numbers])
    return Turn("count", phrase(rng, COUNT_OF, things=rng.choice(names[number])), str(number))


def ask_place(rng: random.Random, scene: Scene) -> Turn | None:
    """Where something is, what is where, or which side of another it is on."""
    askers: tuple[Asker, ...] = (_ask_where, _ask_where, _ask_beside, _ask_side, _ask_what_is_in)
    return rng.choice(askers)(rng, scene)


def ask_yes_no(rng: random.Random, scene: Scene) -> Turn | None:
    kind, yes = rng.random(), rng.random() < 0.5
    if kind < 0.25:
        return _ask_is_color(rng, scene, yes)
    if kind < 0.4:
        return _ask_is_beside(rng, scene, yes)
    name = _present_name(rng, scene) if yes else _absent_name(rng, scene)
    return Turn("yes_no", phrase(rng, IS_THERE, thing=name), "yes" if yes else "no")


def ask_describe(rng: random.Random, scene: Scene) -> Turn | None:
    description = describe(scene)
    return None if description is None else Turn("describe", phrase(rng, DESCRIBE), description)


def describe(scene: Scene) -> str | None:
    """'2 red circles and a blue square' in reading order; None if that order or the list is not clear cut."""
    groups = reading_groups(scene)
    if groups is None or len(groups) > 4:
        return None
    names = [(group[0], len(group)) for group in groups]
    return join_list(
        [
            with_article(thing.name) if number == 1 else f"{number} {thing.color} {plural(thing.shape)}"
            for thing, number in names
        ]
    )


def reference(rng: random.Random, scene: Scene, thing: Thing) -> str | None:
    """Words that mean this object and no other: 'star', 'red star' or 'red object'."""
    names = [thing.name] if _count(scene.things, thing.color, thing.shape) == 1 else []
    if _count(scene.things, shape=thing.shape) == 1:
        names.append(thing.shape)
    if _count(scene.things, color=thing.color) == 1:
        names.append(f"{thing.color} {rng.choice((*ANY_THING, 'one'))}")
    return rng.choice(names) if names else None


def _ask_where(rng: random.Random, scene: Scene) -> Turn | None:
    thing = rng.choice(scene.things)
    name, place = reference(rng, scene, thing), ninth(scene.size, thing)
    if name is None or place is None:
        return None
    return Turn("place", phrase(rng, PLACE_OF, thing=name), place)


def _ask_what_is_in(rng: random.Random, scene: Scene) -> Turn | None:
    """Asked of corners and the centre alone: 'at the top' would take in the top corners."""
    thing = rng.choice(scene.things)
    place = ninth(scene.size, thing)
    if place is None or not (place == "center" or " " in place):
        return None
    if any(other is not thing and ninth(scene.size, other) in (place, None) for other in scene.things):
        return None
    if " " in place and rng.random() < 0.4:
        place = f"{place} corner"
    return Turn("place", phrase(rng, THING_IN, place=place), with_article(thing.name))


def _ask_beside(rng: random.Random, scene: Scene) -> Turn | None:
    thing = rng.choice(scene.things)
    name = reference(rng, scene, thing)
    sides = [(side, mate) for side in THING_AT if (mate := beside(scene, thing, side))]
    if name is None or not sides:
        return None
    side, mate = rng.choice(sides)
    question = phrase(rng, THING_BESIDE, side=rng.choice(THING_AT[side]), thing=name)
    return Turn("place", question, with_article(mate.name))


def _ask_side(rng: random.Random, scene: Scene) -> Turn | None:
    pair = _related_pair(rng, scene)
    if pair is None:
        return None
    name, side, mate = pair
    sides = rng.choice(ACROSS if side in ("left", "right") else UPRIGHT)
    return Turn("place", phrase(rng, WHICH_SIDE, thing=name, sides=sides, mate=mate), side)


def _ask_is_color(rng: random.Random, scene: Scene, yes: bool) -> Turn | None:
    only = [thing for thing in scene.things if _count(scene.things, shape=thing.shape) == 1]
    if not only:
        return None
    thing = rng.choice(only)
    seen = sorted({other.color for other in scene.things} - {thing.color})
    others = seen if seen and rng.random() < 0.5 else [color for color in COLORS if color != thing.color]
    question = phrase(rng, IS_COLOR, thing=thing.shape, color=thing.color if yes else rng.choice(others))
    return Turn("yes_no", question, "yes" if yes else "no")


def _ask_is_beside(rng: random.Random, scene: Scene, yes: bool) -> Turn | None:
    pair = _related_pair(rng, scene)
    if pair is None:
        return None
    name, side, mate = pair
    words = rng.choice(THING_AT[side if yes else OPPOSITE[side]][:2])
    return Turn("yes_no", phrase(rng, IS_BESIDE, thing=name, side=words, mate=mate), "yes" if yes else "no")


def _related_pair(rng: random.Random, scene: Scene) -> tuple[str, str, str] | None:
    """Words for two objects and the side of the second that the first is clearly on."""
    if len(scene.things) < 2:
        return None
    thing, mate = rng.sample(scene.things, 2)
    name, mate_name = reference(rng, scene, thing), reference(rng, scene, mate)
    sides = [side for side in THING_AT if is_beside(scene.size, thing, side, mate)]
    if name is None or mate_name is None or not sides:
        return None
    return name, rng.choice(sides), mate_name


def _count(things: Sequence[Thing], color: str | None = None, shape: str | None = None) -> int:
    return sum(color in (None, thing.color) and shape in (None, thing.shape) for thing in things)


def _plural_name(rng: random.Random, color: str | None, shape: str | None) -> str:
    noun = plural(shape) if shape else rng.choice(("objects", "shapes", "things", "ones"))
    return f"{color} {noun}" if color else noun


def _present_name(rng: random.Random, scene: Scene) -> str:
    thing = rng.choice(scene.things)
    return rng.choice((with_article(thing.name), with_article(thing.name), *_loose_names(rng, thing)))


def _absent_name(rng: random.Random, scene: Scene) -> str:
    """A colour, a shape or, most often, a pair that is not there though its colour or shape may be."""
    colors, shapes = _absent(scene)
    manner = rng.random()
    if manner < 0.2:
        return _loose_names(rng, Thing(rng.choice(colors), "circle", 0, 0, 0))[1]
    if manner < 0.45 and shapes:
        return with_article(rng.choice(shapes))
    color, shape = _absent_pair(rng, scene)
    return with_article(f"{color} {shape}")


def _loose_names(rng: random.Random, thing: Thing) -> tuple[str, str]:
    noun = with_article(f"{thing.color} {rng.choice(ANY_THING)}")
    return with_article(thing.shape), rng.choice((f"anything {thing.color}", noun))


def _absent_kind(rng: random.Random, scene: Scene) -> str:
    colors, shapes = _absent(scene)
    manner = rng.random()
    if manner < 0.25:
        return _plural_name(rng, rng.choice(colors), None)
    if manner < 0.5 and shapes:
        return _plural_name(rng, None, rng.choice(shapes))
    return _plural_name(rng, *_absent_pair(rng, scene))


def _absent(scene: Scene) -> tuple[list[str], list[str]]:
    colors, shapes = {thing.color for thing in scene.things}, {thing.shape for thing in scene.things}
    return [color for color in COLORS if color not in colors], [
        shape for shape in SHAPES if shape not in shapes
    ]


def _absent_pair(rng: random.Random, scene: Scene) -> tuple[str, str]:
    """A (colour, shape) that no object has; of what the objects have in part, where there is such a pair."""
    present = {(thing.color, thing.shape) for thing in scene.things}
    near = sorted({(a.color, b.shape) for a in scene.things for b in scene.things} - present)
    thing = rng.choice(scene.things)
    half = [(thing.color, shape) for shape in SHAPES] + [(color, thing.shape) for color in COLORS]
    manner = rng.random()
    if near and manner < 0.5:
        return rng.choice(near)
    if manner < 0.85:
        return rng.choice([pair for pair in half if pair not in present])
    return rng.choice(
        [(color, shape) for color in COLORS for shape in SHAPES if (color, shape) not in present]
    )
