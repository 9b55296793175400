"""Pictures of coloured shapes and digits, and questions about them with their answers.

Made by seeds: the same seed gives the same picture. The script that trains on them, the demo and
the tests draw from here.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw, ImageFont

COLOURS = {
    "red": (214, 40, 40),
    "green": (42, 157, 66),
    "blue": (38, 84, 214),
    "yellow": (240, 210, 40),
    "purple": (138, 48, 176),
    "orange": (246, 134, 28),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
DIGITS = tuple("0123456789")
NUMBERS = ("Zero", "One", "Two", "Three")
# What no picture of the training has: whether the model puts colour and shape together by itself.
UNSEEN = frozenset(
    {("purple", "star"), ("orange", "cross"), ("green", "triangle"), ("blue", "4"), ("red", "8")}
)
# Pixels, width and height: those of the model's images, twice as large.
SIZES = ((224, 224), (224, 168), (168, 224), (280, 168), (168, 280))
GAP = 30  # pixels from left to right between centres, so that their order is plain

Point = tuple[float, float]


@dataclass(frozen=True)
class Thing:
    """A shape or a digit; `name` is one of SHAPES or DIGITS."""

    name: str
    colour: str
    x: int
    y: int
    radius: int

    @property
    def kind(self) -> str:
        return "digit" if self.name in DIGITS else self.name

    @property
    def phrase(self) -> str:
        return f"{'an' if self.colour == 'orange' else 'a'} {self.colour} {self.name}"


@dataclass(frozen=True)
class Question:
    kind: str  # the row of the table of accuracies
    text: str
    answer: str


@dataclass(frozen=True)
class Picture:
    """`things` from left to right; no two are of one kind."""

    image: Image.Image
    things: tuple[Thing, ...]


def make_picture(
    rng: random.Random, size: tuple[int, int] = SIZES[0], unseen: bool = False
) -> Picture:
    """One to three things on a noisy ground. `unseen`: one of them is in UNSEEN, else none is."""
    while True:
        things = _place(rng, size)
        strange = any((thing.colour, thing.name) in UNSEEN for thing in things)
        if strange == unseen:
            return Picture(_draw(rng, size, things), things)


def _place(rng: random.Random, size: tuple[int, int]) -> tuple[Thing, ...]:
    kinds = rng.sample((*SHAPES, *["digit"] * 3), rng.randint(1, 3))
    things: list[Thing] = []
    for kind in dict.fromkeys(kinds):
        name = rng.choice(DIGITS) if kind == "digit" else kind
        for _ in range(20):
            radius = rng.randint(32, 46)
            x = rng.randint(radius + 2, size[0] - radius - 2)
            y = rng.randint(radius + 2, size[1] - radius - 2)
            thing = Thing(name, rng.choice(tuple(COLOURS)), x, y, radius)
            if all(_apart(thing, other) for other in things):
                things.append(thing)
                break
    return tuple(sorted(things, key=lambda thing: thing.x))


def _apart(a: Thing, b: Thing) -> bool:
    distance = math.hypot(a.x - b.x, a.y - b.y)
    return abs(a.x - b.x) >= GAP and distance > a.radius + b.radius + 4


def _draw(rng: random.Random, size: tuple[int, int], things: tuple[Thing, ...]) -> Image.Image:
    level = rng.choice((rng.randint(205, 250), rng.randint(15, 50)))
    ground = tuple(level + rng.randint(-6, 5) for _ in range(3))
    image = Image.new("RGB", size, ground)
    draw = ImageDraw.Draw(image)
    for thing in things:
        colour = tuple(
            min(255, max(0, part + rng.randint(-14, 14))) for part in COLOURS[thing.colour]
        )
        _draw_thing(draw, thing, colour)
    amplitude = rng.randint(0, 18)
    noise = np.random.default_rng(rng.getrandbits(32)).integers(
        -amplitude, amplitude + 1, (size[1], size[0], 3), np.int16
    )
    return Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))


def _draw_thing(draw: ImageDraw.ImageDraw, thing: Thing, colour: tuple[int, ...]) -> None:
    x, y, r = thing.x, thing.y, thing.radius
    if thing.kind == "digit":
        font = ImageFont.load_default(size=2.4 * r)
        draw.text((x, y), thing.name, fill=colour, font=font, anchor="mm", stroke_width=1)
    elif thing.name == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)
    elif thing.name == "square":
        draw.rectangle((x - 0.85 * r, y - 0.85 * r, x + 0.85 * r, y + 0.85 * r), fill=colour)
    elif thing.name == "cross":
        draw.rectangle((x - r, y - 0.3 * r, x + r, y + 0.3 * r), fill=colour)
        draw.rectangle((x - 0.3 * r, y - r, x + 0.3 * r, y + r), fill=colour)
    else:
        radii = (r,) if thing.name == "triangle" else (r, 0.42 * r)
        draw.polygon(_corners(thing, radii), fill=colour)


def _corners(thing: Thing, radii: tuple[float, ...]) -> list[Point]:
    """Of a triangle (one radius) or a five-pointed star (its outer and its inner one)."""
    count = 3 if len(radii) == 1 else 10
    angles = [2 * math.pi * i / count for i in range(count)]
    return [
        (
            thing.x + radii[i % len(radii)] * math.sin(angle),
            thing.y - radii[i % len(radii)] * math.cos(angle),
        )
        for i, angle in enumerate(angles)
    ]


def questions(rng: random.Random, things: tuple[Thing, ...]) -> list[Question]:
    """One of each kind that the picture allows, in random order."""
    asked = [
        _what(rng, things),
        _colour(rng, things),
        _count(rng, things),
        _beside(rng, things),
        _is_there(rng, things),
    ]
    if any(thing.kind == "digit" for thing in things) or rng.random() < 0.2:
        asked.append(_digit(rng, things))
    rng.shuffle(asked)
    return asked


def _what(rng: random.Random, things: tuple[Thing, ...]) -> Question:
    text = rng.choice(
        (
            "What is in the picture?",
            "What is in this picture?",
            "What do you see?",
            "What is this?",
            "Describe the picture.",
        )
    )
    phrases = [thing.phrase for thing in things]
    listed = " and ".join([", ".join(phrases[:-1]), phrases[-1]] if phrases[1:] else phrases)
    return Question("what is in it", text, _sentence(listed))


def _colour(rng: random.Random, things: tuple[Thing, ...]) -> Question:
    thing = rng.choice(things)
    word = rng.choice(("colour", "color"))
    return Question("colour", f"What {word} is the {thing.kind}?", _sentence(thing.colour))


def _count(rng: random.Random, things: tuple[Thing, ...]) -> Question:
    shapes = sum(thing.kind != "digit" for thing in things)
    text = rng.choice(("How many shapes are there?", "How many shapes do you see?"))
    return Question("how many shapes", text, f"{NUMBERS[shapes]}.")


def _digit(rng: random.Random, things: tuple[Thing, ...]) -> Question:
    text = rng.choice(("Which digit is it?", "Which digit do you see?", "What digit is it?"))
    found = [thing.name for thing in things if thing.kind == "digit"]
    return Question("which digit", text, f"{found[0]}." if found else "There is no digit.")


def _beside(rng: random.Random, things: tuple[Thing, ...]) -> Question:
    place = rng.randrange(len(things))
    side, step = rng.choice((("left", -1), ("right", 1)))
    to = rng.choice(("", "to the "))
    other = place + step
    answer = things[other].phrase if 0 <= other < len(things) else "nothing"
    text = f"What is {to}{side} of the {things[place].kind}?"
    return Question("what is left or right", text, _sentence(answer))


def _is_there(rng: random.Random, things: tuple[Thing, ...]) -> Question:
    near = rng.choice(things)  # what is asked for shares a colour or a name with it
    asked = rng.choice(
        (
            near,
            near,
            replace(near, colour=rng.choice(tuple(COLOURS))),
            replace(near, name=rng.choice(SHAPES)),
        )
    )
    there = any(asked.phrase == thing.phrase for thing in things)
    return Question("is there", f"Is there {asked.phrase}?", "Yes." if there else "No.")


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."
