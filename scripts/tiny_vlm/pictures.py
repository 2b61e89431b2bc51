"""Synthetic 64 x 64 pictures of filled shapes on light backgrounds, with what is on them.

`draw_scene(random, objects)` places objects that do not overlap and draws them four times larger,
then reduces: soft edges, as in a resized photograph.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random

import numpy as np
from PIL import Image, ImageDraw

from tiny_vlm.words import COLORS, SHAPES

SIDE = 64
SCALE = 4
# Several shades of each colour; between two shades of one list, anything is drawn.
SHADES = {
    "red": [(255, 0, 0), (225, 15, 25)],
    "green": [(0, 255, 0), (20, 160, 40), (0, 120, 0)],
    "blue": [(0, 0, 255), (40, 70, 235)],
    "black": [(0, 0, 0), (30, 30, 30)],
    "gray": [(128, 128, 128), (110, 115, 120), (150, 150, 150)],
    "teal": [(0, 128, 128), (10, 145, 140), (0, 110, 115)],
    "brown": [(165, 42, 42), (139, 69, 19), (120, 60, 40)],
    "yellow": [(255, 255, 0), (245, 225, 30)],
    "orange": [(255, 140, 0), (255, 120, 20)],
    "purple": [(128, 0, 160), (150, 50, 200)],
    "pink": [(255, 105, 180), (255, 130, 200)],
}


@dataclass(frozen=True)
class Thing:
    """One object of a scene; centre and radius in pixels."""

    shape: str
    color: str
    x: float
    y: float
    radius: float

    @property
    def size(self) -> str:
        return "small" if self.radius < 8.5 else "large" if self.radius > 11.5 else "medium"


@dataclass(frozen=True)
class Scene:
    things: tuple[Thing, ...]
    pixels: np.ndarray  # (64, 64, 3) uint8


def draw_scene(
    random: Random, count: int, *, smallest: float = 5.0, grain_fraction: float = 0.3
) -> Scene:
    """A picture of `count` things, fewer where they do not fit beside each other.

    `smallest` is the least radius in pixels; `grain_fraction` of the pictures have noise.
    """
    things: list[Thing] = []
    largest = 18.0 if count == 1 else 13.0 if count < 4 else 10.0
    for _ in range(count):
        radius = random.uniform(min(smallest, largest), largest)
        thing = None
        for _ in range(20):
            x = random.uniform(radius * 0.95, SIDE - radius * 0.95)
            y = random.uniform(radius * 0.95, SIDE - radius * 0.95)
            if all(math.hypot(x - t.x, y - t.y) > radius + t.radius + 1 for t in things):
                color = random.choice(COLORS)
                thing = Thing(random.choice(SHAPES), color, x, y, radius)
                break
            radius = max(5.0, radius * 0.9)
        if thing is not None:
            things.append(thing)
    return Scene(tuple(things), _paint(random, things, grain_fraction))


def _paint(random: Random, things: list[Thing], grain_fraction: float) -> np.ndarray:
    lightest = 228 if random.random() < 0.8 else 190
    background = tuple(random.randint(lightest, 255) for _ in range(3))
    image = Image.new("RGB", (SIDE * SCALE, SIDE * SCALE), background)
    pen = ImageDraw.Draw(image)
    for thing in things:
        _draw(random, pen, thing, _shade(random, thing.color), background)
    pixels = np.asarray(image.reduce(SCALE))
    if random.random() < grain_fraction:
        noise = np.random.default_rng(random.getrandbits(32)).normal(0, 4, pixels.shape)
        pixels = np.clip(pixels + noise, 0, 255).astype(np.uint8)
    return pixels


def _shade(random: Random, color: str) -> tuple[int, ...]:
    shades = SHADES[color]
    first, second = random.choice(shades), random.choice(shades)
    mix = random.random()
    jitter = 0 if random.random() < 0.4 else 8
    return tuple(
        min(255, max(0, round(a + (b - a) * mix) + random.randint(-jitter, jitter)))
        for a, b in zip(first, second)
    )


def _draw(
    random: Random,
    pen: ImageDraw.ImageDraw,
    thing: Thing,
    fill: tuple[int, ...],
    background: tuple[int, ...],
) -> None:
    x, y, r = thing.x * SCALE, thing.y * SCALE, thing.radius * SCALE
    turn = 0.0 if random.random() < 0.5 else random.uniform(0, 2 * math.pi)

    def disc(cx: float, cy: float, radius: float, color: tuple[int, ...]) -> None:
        pen.ellipse((cx - radius, cy - radius, cx + radius, cy + radius), fill=color)

    if thing.shape in ("circle", "ring", "moon"):
        disc(x, y, r, fill)
        if thing.shape == "ring":
            disc(x, y, r * random.uniform(0.45, 0.65), background)
        elif thing.shape == "moon":
            far = random.uniform(0.4, 0.6) * r
            disc(x + far * math.cos(turn), y + far * math.sin(turn), r * 0.85, background)
        return
    outline = OUTLINES[thing.shape](random)
    reach = max(math.hypot(px, py) for px, py in outline)
    cos, sin = math.cos(turn) * r / reach, math.sin(turn) * r / reach
    pen.polygon([(x + px * cos - py * sin, y + px * sin + py * cos) for px, py in outline], fill)


def _rectangle(random: Random) -> list[tuple[float, float]]:
    narrow = random.uniform(0.3, 1.0)
    w, h = (1.0, narrow) if random.random() < 0.5 else (narrow, 1.0)
    return [(-w, -h), (w, -h), (w, h), (-w, h)]


def _triangle(random: Random) -> list[tuple[float, float]]:
    wide = random.uniform(0.75, 1.0)
    return [(0.0, -0.9), (wide, 0.7), (-wide, 0.7)]


def _star(random: Random) -> list[tuple[float, float]]:
    inner = random.uniform(0.38, 0.5)
    angles = [(math.pi * k / 5 - math.pi / 2, 1.0 if k % 2 == 0 else inner) for k in range(10)]
    return [(d * math.cos(a), d * math.sin(a)) for a, d in angles]


def _cross(random: Random) -> list[tuple[float, float]]:
    a = random.uniform(0.25, 0.36)
    quarter = [(a, -1.0), (a, -a), (1.0, -a)]
    outline = []
    for _ in range(4):
        outline += quarter
        quarter = [(-py, px) for px, py in quarter]
    return outline


def _heart(random: Random) -> list[tuple[float, float]]:
    outline = []
    for k in range(24):
        t = 2 * math.pi * k / 24
        px = 16 * math.sin(t) ** 3
        py = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        outline.append((px, -py))
    return outline


OUTLINES = {
    "rectangle": _rectangle,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "heart": _heart,
}
