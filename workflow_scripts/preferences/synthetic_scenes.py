"""Scenes of the synthetic world: the objects that a prompt asks for, those that an image shows, and its quality.

A prompt such as "two red circles and one blue square on mint" is drawn with mistakes (a wrong count, colour or shape)
and with a quality (sharp, blurry, noisy, faded). Both lower a latent utility that only the simulated annotators see.
"""

import random
from collections import Counter
from dataclasses import dataclass, replace
from hashlib import sha256

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

COLOURS = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 80, 220), "yellow": (230, 200, 40)}
SHAPES = {"circle": "circles", "square": "squares", "triangle": "triangles"}
COUNTS = {1: "one", 2: "two", 3: "three"}
BACKGROUNDS = {
    "white": (250, 250, 250),
    "grey": (210, 210, 210),
    "cream": (250, 240, 215),
    "mint": (215, 245, 230),
    "lilac": (230, 220, 250),
    "sky": (215, 235, 250),
}
QUALITIES = ("sharp", "blurry", "noisy", "faded")
MISTAKES = ("count", "colour", "shape")

SIDE = 84  # pixels: three cells of 28, the side of one merged visual token of Qwen2.5-VL
CELLS = 3


@dataclass(frozen=True)
class Group:
    """A number of equal shapes of one colour."""

    count: int
    colour: str
    shape: str

    def __str__(self) -> str:
        """Describe it in words: "two red circles"."""
        return f"{COUNTS[self.count]} {self.colour} {self.shape if self.count == 1 else SHAPES[self.shape]}"


@dataclass(frozen=True)
class Scene:
    """One image: the groups the prompt asked for, those drawn, the quality, and the seed of the layout."""

    asked: tuple[Group, ...]
    drawn: tuple[Group, ...]
    background: str
    quality: str
    seed: int

    @property
    def prompt(self) -> str:
        """The text prompt."""
        return prompt_text(self.asked, self.background)

    @property
    def caption(self) -> str:
        """The drawn objects and the quality, in the words of a reasoning trace."""
        return " and ".join(map(str, self.drawn)) + f", {self.quality}."

    @property
    def mistakes(self) -> Counter[str]:
        """How often the count, the colour or the shape of a group differs from the prompt."""
        pairs = list(zip(self.asked, self.drawn, strict=True))
        return Counter({kind: sum(getattr(a, kind) != getattr(d, kind) for a, d in pairs) for kind in MISTAKES})

    @property
    def verdict(self) -> str:
        """The mistakes in words: "wrong count twice, wrong shape." or "all match."."""
        words = [f"wrong {kind}" + (" twice" if n > 1 else "") for kind, n in self.mistakes.items() if n]
        return (", ".join(words) or "all match") + "."


@dataclass(frozen=True)
class Taste:
    """Cost of one mistake of each kind and of each quality, in units of utility."""

    count: float
    colour: float
    shape: float
    blurry: float
    noisy: float
    faded: float
    sharp: float = 0.0

    def utility(self, scene: Scene) -> float:
        """Return the latent utility of an image, 0 at best."""
        return -sum(getattr(self, kind) * n for kind, n in scene.mistakes.items()) - getattr(self, scene.quality)


HUMAN = Taste(count=0.8, colour=1.2, shape=1.0, blurry=0.9, noisy=0.7, faded=0.5)


def prompt_text(asked: tuple[Group, ...], background: str) -> str:
    """Write the prompt that asks for these groups."""
    return " and ".join(map(str, asked)) + f" on {background}"


def held_out(prompt: str) -> bool:
    """Whether a prompt text belongs to the test splits (60 %) of the world: no policy is trained on such a text."""
    return sha256(prompt.encode()).digest()[0] < 154


def sample_prompt(rng: random.Random, test: bool) -> tuple[tuple[Group, ...], str]:
    """Draw groups and background of a prompt from the test part or from the training part of all prompt texts."""
    while True:
        kinds = [(colour, shape) for colour in COLOURS for shape in SHAPES]
        chosen = rng.sample(kinds, 1 if rng.random() < 0.1 else 2)
        asked = tuple(Group(rng.choice(list(COUNTS)), colour, shape) for colour, shape in chosen)
        background = rng.choice(list(BACKGROUNDS))
        if held_out(prompt_text(asked, background)) == test:
            return asked, background


def sample_scene(
    rng: random.Random,
    asked: tuple[Group, ...],
    background: str,
    mistake_weights: tuple[float, ...] = (0.35, 0.3, 0.25, 0.1),
    quality_weights: tuple[float, ...] = (0.4, 0.2, 0.2, 0.2),
) -> Scene:
    """Draw one scene for a prompt: 0 to 3 mistakes and a quality, with these weights."""
    drawn = list(asked)
    slots = [(index, kind) for index in range(len(asked)) for kind in MISTAKES]
    wanted = rng.choices(range(len(mistake_weights)), mistake_weights)[0]
    for index, kind in rng.sample(slots, min(wanted, len(slots))):
        values: list = list({"count": COUNTS, "colour": COLOURS, "shape": SHAPES}[kind])  # type: ignore[call-overload]
        values.remove(getattr(asked[index], kind))
        drawn[index] = replace(drawn[index], **{kind: rng.choice(values)})
    quality = rng.choices(QUALITIES, quality_weights)[0]
    return Scene(asked, tuple(drawn), background, quality, rng.getrandbits(64))


def draw(scene: Scene) -> Image.Image:
    """Render a scene: 84 x 84 RGB, the same pixels for the same scene."""
    rng = random.Random(scene.seed)
    image = Image.new("RGB", (SIDE, SIDE), BACKGROUNDS[scene.background])
    pen = ImageDraw.Draw(image)
    cell = SIDE // CELLS
    free = rng.sample(range(CELLS * CELLS), CELLS * CELLS)
    for group in scene.drawn:
        for _ in range(group.count):
            row, column = divmod(free.pop(), CELLS)
            x = column * cell + cell // 2 + rng.randint(-3, 3)
            y = row * cell + cell // 2 + rng.randint(-3, 3)
            r = rng.randint(8, 10)
            fill = COLOURS[group.colour]
            if group.shape == "circle":
                pen.ellipse([x - r, y - r, x + r, y + r], fill=fill)
            elif group.shape == "square":
                pen.rectangle([x - r, y - r, x + r, y + r], fill=fill)
            else:
                pen.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill=fill)
    if scene.quality == "blurry":
        return image.filter(ImageFilter.GaussianBlur(3))
    if scene.quality == "sharp":
        return image
    pixels = np.asarray(image).astype(np.float32)
    if scene.quality == "noisy":
        pixels = pixels + np.random.default_rng(scene.seed).normal(0, 45, pixels.shape)  # type: ignore[assignment]
    else:
        pixels = 127 + (pixels - 127) * 0.4
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
