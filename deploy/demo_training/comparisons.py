"""Samples about two to four pictures of shapes or of text, to be told apart by number."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from deploy.demo_training.canvas import photograph
from deploy.demo_training.fonts import FontShelf
from deploy.demo_training.notices import make_notice
from deploy.demo_training.phrasing import phrase, plural, with_article
from deploy.demo_training.sample import SHAPES, Picture, Sample, Turn
from deploy.demo_training.scenes import Scene, make_scene
from deploy.demo_training.shape_questions import describe

ORDINALS = ("first", "second", "third", "fourth")
WHICH_HAS = (
    "Which image has {thing}?",
    "Which picture has {thing}?",
    "Which image shows {thing}?",
    "Which picture shows {thing}?",
    "Which image contains {thing}?",
    "In which image is {thing}?",
    "In which picture do you see {thing}?",
    "Where is {thing}, in which image?",
    "Which one has {thing}?",
    "Find {thing}. Which image is it in?",
)
WHICH_SAYS = (
    "Which image says {text}?",
    "Which picture says {text}?",
    'Which image says "{text}"?',
    "Which sign says {text}?",
    "Which one says {text}?",
    "In which image do you read {text}?",
    "Which image shows the text {text}?",
    "Which image contains the word {text}?",
    "Where does it say {text}, in which image?",
)
WHAT_SAYS = (
    "What does {image} say?",
    "What does the sign in {image} say?",
    "What is written in {image}?",
    "What is the text in {image}?",
    "Read the text in {image}.",
    "Which text is in {image}?",
    "What can you read in {image}?",
    "Read {image}.",
)
WHAT_COLOR = (
    "What color is the {thing} in {image}?",
    "Which color is the {thing} in {image}?",
    "In {image}, what color is the {thing}?",
    "What is the color of the {thing} in {image}?",
    "Tell me the color of the {thing} in {image}.",
    "What color does the {thing} in {image} have?",
)
WHAT_IS_IN = (
    "What is in {image}?",
    "What do you see in {image}?",
    "What does {image} show?",
    "Describe {image}.",
    "What is shown in {image}?",
    "What can you see in {image}?",
    "And what is in {image}?",
)
HOW_MANY_IN = (
    "How many {things} are in {image}?",
    "How many {things} do you see in {image}?",
    "How many {things} are there in {image}?",
    "Count the {things} in {image}.",
    "In {image}, how many {things} are there?",
)
IS_IN = (
    "Is there {thing} in {image}?",
    "Does {image} show {thing}?",
    "Do you see {thing} in {image}?",
    "Does {image} have {thing}?",
    "Is {thing} in {image}?",
)
HOW_MANY_IMAGES = (
    "How many images are there?",
    "How many pictures are there?",
    "How many images do you see?",
    "How many pictures did I send?",
    "How many images?",
    "Count the images.",
    "What is the number of images?",
)


@dataclass(frozen=True)
class Panel:
    """One of the pictures: objects or a text, never both."""

    picture: Picture
    scene: Scene | None = None
    text: str | None = None


Asker = Callable[[random.Random, Sequence[Panel]], Turn | None]


def make_comparison(
    rng: random.Random,
    sizes: Sequence[tuple[int, int]],
    fonts: FontShelf,
    level: float,
    max_tiles: int | None = 1,
) -> Sample:
    """One picture of each of the 2 to 4 `sizes`, and 1 to 3 questions about them."""
    assert 2 <= len(sizes) <= len(ORDINALS)
    share_of_text = rng.choice((0.0, 0.5, 1.0))
    panels = [_make_panel(rng, size, fonts, level, rng.random() < share_of_text) for size in sizes]
    numbers = range(1, len(panels) + 1)
    labels = () if rng.random() < 0.2 else tuple(f"Image-{number}: " for number in numbers)
    pictures = tuple(panel.picture for panel in panels)
    return Sample(_ask(rng, panels), pictures, labels, max_tiles)


def _make_panel(
    rng: random.Random, size: tuple[int, int], fonts: FontShelf, level: float, with_text: bool
) -> Panel:
    if with_text:
        text, picture = make_notice(rng, size, fonts, level)
        return Panel(picture, text=text)
    scene, image = make_scene(rng, size, level, rng.choice((1, 1, 2, 3)) if level > 0.3 else 1)
    return Panel(Picture(photograph(image, rng, level), scene.marks()), scene=scene)


def _ask(rng: random.Random, panels: Sequence[Panel]) -> tuple[Turn, ...]:
    """1 to 3 different questions; the number of pictures can always be asked, so this ends."""
    (count,) = rng.choices((1, 2, 3), (5, 3, 2))
    askers, weights = zip(*ASKERS, strict=True)
    turns: dict[str, Turn] = {}
    while len(turns) < count:
        (asker,) = rng.choices(askers, weights)
        turn = asker(rng, panels)
        if turn is not None:
            turns.setdefault(turn.question.lower().rstrip("?.!"), turn)
    return tuple(turns.values())


def name_image(rng: random.Random, index: int, count: int) -> str:
    """Words that users have for one of `count` pictures."""
    ordinal = "last" if index == count - 1 and rng.random() < 0.3 else ORDINALS[index]
    names = (f"Image-{index + 1}", f"image {index + 1}", f"the {ordinal} image", f"the {ordinal} picture")
    return rng.choice((f"Image-{index + 1}", *names))


def _ask_which_has(rng: random.Random, panels: Sequence[Panel]) -> Turn | None:
    """Something that one picture alone has; `the` only where it has a single one."""
    index = rng.randrange(len(panels))
    scene = panels[index].scene
    if scene is None:
        return None
    thing = rng.choice(scene.things)
    color, shape = rng.choice(
        ((None, thing.shape), (None, thing.shape), (thing.color, thing.shape), (thing.color, None))
    )
    if [bool(_count(panel, color, shape)) for panel in panels].count(True) != 1:
        return None
    name = " ".join(filter(None, (color, shape or rng.choice(("object", "shape", "one")))))
    definite = _count(panels[index], color, shape) == 1 and (shape is None or rng.random() < 0.6)
    words = f"the {name}" if definite else with_article(name)
    return Turn("multi_image", phrase(rng, WHICH_HAS, thing=words), f"Image-{index + 1}")


def _ask_which_says(rng: random.Random, panels: Sequence[Panel]) -> Turn | None:
    index = rng.randrange(len(panels))
    text = panels[index].text
    if text is None or sum(text.casefold() == (panel.text or "").casefold() for panel in panels) > 1:
        return None
    return Turn("multi_image", phrase(rng, WHICH_SAYS, text=text), f"Image-{index + 1}")


def _ask_what_says(rng: random.Random, panels: Sequence[Panel]) -> Turn | None:
    index = rng.randrange(len(panels))
    text = panels[index].text
    if text is None:
        return None
    return Turn("multi_image", phrase(rng, WHAT_SAYS, image=name_image(rng, index, len(panels))), text)


def _ask_color(rng: random.Random, panels: Sequence[Panel]) -> Turn | None:
    index = rng.randrange(len(panels))
    scene = panels[index].scene
    if scene is None:
        return None
    thing = rng.choice(scene.things)
    if _count(panels[index], None, thing.shape) > 1:
        return None
    name = thing.shape if len(scene.things) > 1 else rng.choice((thing.shape, thing.shape, "object", "shape"))
    image = name_image(rng, index, len(panels))
    return Turn("multi_image", phrase(rng, WHAT_COLOR, thing=name, image=image), thing.color)


def _ask_what_is_in(rng: random.Random, panels: Sequence[Panel]) -> Turn | None:
    index = rng.randrange(len(panels))
    scene = panels[index].scene
    description = None if scene is None else describe(scene)
    if description is None:
        return None
    image = name_image(rng, index, len(panels))
    return Turn("multi_image", phrase(rng, WHAT_IS_IN, image=image), description)


def _ask_how_many_in(rng: random.Random, panels: Sequence[Panel]) -> Turn | None:
    index = rng.randrange(len(panels))
    if panels[index].scene is None:
        return None
    shape = rng.choice((None, *_shapes(panels)))
    name = plural(shape) if shape else rng.choice(("objects", "shapes"))
    question = phrase(rng, HOW_MANY_IN, things=name, image=name_image(rng, index, len(panels)))
    return Turn("multi_image", question, str(_count(panels[index], None, shape)))


def _ask_is_in(rng: random.Random, panels: Sequence[Panel]) -> Turn | None:
    """As often yes as no, though most shapes are in one picture of several."""
    index, yes = rng.randrange(len(panels)), rng.random() < 0.5
    seen = _shapes(panels) if rng.random() < 0.7 else SHAPES
    shapes = [shape for shape in seen if bool(_count(panels[index], None, shape)) == yes]
    if panels[index].scene is None or not shapes:
        return None
    words, image = with_article(rng.choice(shapes)), name_image(rng, index, len(panels))
    return Turn("multi_image", phrase(rng, IS_IN, thing=words, image=image), "yes" if yes else "no")


def _ask_how_many_images(rng: random.Random, panels: Sequence[Panel]) -> Turn:
    return Turn("multi_image", phrase(rng, HOW_MANY_IMAGES), str(len(panels)))


ASKERS: tuple[tuple[Asker, int], ...] = (
    (_ask_which_has, 8),
    (_ask_which_says, 6),
    (_ask_what_says, 6),
    (_ask_color, 3),
    (_ask_what_is_in, 3),
    (_ask_how_many_in, 1),
    (_ask_is_in, 1),
    (_ask_how_many_images, 1),
)


def _shapes(panels: Sequence[Panel]) -> list[str]:
    found = {thing.shape for panel in panels if panel.scene for thing in panel.scene.things}
    return [shape for shape in SHAPES if shape in found]


def _count(panel: Panel, color: str | None, shape: str | None) -> int:
    things = panel.scene.things if panel.scene else ()
    return sum(color in (None, thing.color) and shape in (None, thing.shape) for thing in things)
