"""What the pixels say about a target: its colour, where one colour clearly covers it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

from mglmm.processing.images import load_image
from mglmm.processing.rle import decode_mask

from .labels import BODY, Noun
from .scene import Scene
from .targets import Target

# Typical sRGB values of each word, in light and in shade; a pixel is called by the nearest of them.
PALETTE: dict[str, tuple[tuple[int, int, int], ...]] = {
    "black": ((8, 8, 8), (22, 22, 22), (38, 36, 38), (30, 24, 24), (44, 38, 36)),
    "white": ((252, 252, 252), (232, 232, 232), (222, 224, 230), (242, 238, 230)),
    "grey": ((72, 72, 74), (98, 98, 100), (128, 128, 130), (155, 155, 158), (182, 182, 186), (110, 114, 122)),
    "red": ((200, 25, 35), (150, 18, 28), (225, 60, 60), (105, 14, 22), (180, 45, 45), (72, 16, 26), (96, 34, 38)),
    "orange": ((240, 130, 30), (225, 100, 30), (250, 165, 80), (200, 95, 25)),
    "yellow": ((245, 225, 50), (225, 190, 40), (250, 235, 130), (190, 165, 40)),
    "green": ((40, 130, 50), (20, 75, 35), (110, 160, 70), (130, 190, 120), (80, 100, 45), (50, 95, 70), (45, 55, 25)),
    "blue": (
        *((30, 70, 170), (15, 25, 85), (90, 140, 210), (155, 195, 232), (60, 90, 135), (45, 58, 88)),
        *((110, 135, 170), (70, 150, 190), (26, 32, 62), (38, 44, 76), (150, 182, 204)),
    ),
    "purple": ((100, 40, 130), (150, 100, 180), (70, 35, 80), (125, 80, 130)),
    "pink": ((240, 150, 180), (225, 90, 150), (245, 195, 208), (205, 120, 140)),
    "brown": ((110, 65, 35), (75, 48, 30), (145, 95, 60), (62, 38, 22), (98, 76, 60), (125, 90, 65)),
    "beige": ((215, 195, 165), (232, 216, 190), (190, 165, 130), (205, 184, 160)),
}
COLOURS = tuple(PALETTE)
# Words that fit the same thing in another light, or that people do not tell apart.
ALIKE: tuple[frozenset[str], ...] = tuple(
    frozenset(pair.split())
    for pair in (
        "black grey, black blue, black brown, black purple, black green, white grey, white beige, white pink, white yellow, "
        "grey blue, grey beige, grey brown, grey green, red orange, red pink, red brown, red purple, orange yellow, "
        "orange brown, orange beige, yellow green, yellow beige, green blue, green brown, blue purple, purple pink, "
        "pink beige, brown beige, white blue, pink orange, yellow brown, grey purple"
    ).split(", ")
)
SIDE = 240  # pixels of the longer side of the picture that is looked at
MIN_PIXELS = 20  # of that picture
MIN_SHARE, MAX_SECOND = 0.66, 0.22  # of the mask, for the colour and for the next one

# A word that says nothing of the thing itself, or nothing that should be said.
COLOURLESS = (BODY - {"hair"}) | {
    "person",
    "people",
    "accessories",
    "food",
    "light",
    "lamp",
    "mirror",
    "window",
    "glass",
}
# Parts that do not have the colour of the whole: a red car has black wheels.
UNPAINTED = frozenset({"glass", "windshield", "window", "light", "headlight", "taillight", "wheel", "mirror", "tire"})
ONLY = {
    "hair": frozenset({"black", "brown", "grey", "white", "red"}),
    "sky": frozenset({"blue", "grey", "white", "orange", "pink"}),
    "trees": frozenset({"green", "brown", "yellow"}),
    "grass": frozenset({"green", "brown", "yellow"}),
}


def contradicts(colour: str, other: str) -> bool:
    """Whether nobody would call a thing of the one colour by the other."""
    return colour != other and frozenset({colour, other}) not in ALIKE


def describe_colours(scene: Scene, path: Path) -> Scene:
    """
    The scene with the colours of its targets and of their instances.

    Args:
        path: The picture, of the size of the masks as it is displayed.

    Raises:
        ValueError: the picture cannot be read.
    """
    picture = load_image(path)
    size = picture.height, picture.width
    scale = max(1.0, max(picture.size) / SIDE)
    small = picture.resize((max(1, round(size[1] / scale)), max(1, round(size[0] / scale))), Image.Resampling.BOX)
    names = name_pixels(np.asarray(small))
    # The pixel of the picture in the middle of each of the small one.
    rows = ((np.arange(names.shape[0]) + 0.5) * size[0] / names.shape[0]).astype(int)
    columns = ((np.arange(names.shape[1]) + 0.5) * size[1] / names.shape[1]).astype(int)

    def small_mask(target: Target) -> np.ndarray:
        return decode_mask(target.mask or {})[np.ix_(rows, columns)]

    def described(target: Target) -> Target:
        if not may_have_colour(target.noun):
            return target
        mask = small_mask(target)
        if target.owner is None:
            for part in scene.parts_of(target):
                if part.noun.name.rsplit(" ", 1)[-1] in UNPAINTED:
                    mask &= ~small_mask(part)
        return replace(
            target,
            colour=sensible(target.noun, colour_of(names, mask)),
            instances=tuple(map(described, target.instances)),
        )

    return replace(scene, objects=tuple(map(described, scene.objects)), parts=tuple(map(described, scene.parts)))


def name_pixels(pixels: np.ndarray) -> np.ndarray:
    """
    The index in `COLOURS` of every pixel.

    Args:
        pixels: sRGB `(H, W, 3)`, uint8.

    Returns:
        `(H, W)`, uint8.
    """
    red, green, blue = np.moveaxis(pixels >> 3, -1, 0)
    return _names_of_colours()[red, green, blue]


def colour_of(names: np.ndarray, mask: np.ndarray) -> str | None:
    """
    The colour that clearly covers a mask: at least `MIN_SHARE` of it, and the next one at most `MAX_SECOND`.

    Args:
        names: Indices in `COLOURS`, `(H, W)`.
        mask: Boolean, `(H, W)`.
    """
    inner = ndimage.binary_erosion(mask)  # the rim is mixed with what is beside it
    if inner.sum() >= MIN_PIXELS:
        mask = inner
    covered = names[mask]
    if covered.size < MIN_PIXELS:
        return None
    shares = np.bincount(covered, minlength=len(COLOURS)) / covered.size
    *_, second, first = np.argsort(shares, kind="stable")
    return COLOURS[first] if shares[first] >= MIN_SHARE and shares[second] <= MAX_SECOND else None


def may_have_colour(noun: Noun) -> bool:
    words = noun.name.split()
    # "the orange orange"
    return noun.name not in COLOURLESS and words[-1] not in COLOURLESS and not set(words) & set(COLOURS)


def sensible(noun: Noun, colour: str | None) -> str | None:
    """The colour, unless nobody says it of such a thing."""
    return colour if colour in ONLY.get(noun.name, COLOURS) else None


@cache
def _names_of_colours() -> np.ndarray:
    """The index in `COLOURS` of every sRGB colour of 5 bits a channel: `(32, 32, 32)`, uint8."""
    levels = np.arange(32) * 8 + 4
    grid = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1)
    values = [value for word in COLOURS for value in PALETTE[word]]
    owners = np.array([index for index, word in enumerate(COLOURS) for _ in PALETTE[word]], dtype=np.uint8)
    distances = np.linalg.norm(_lab(grid)[..., None, :] - _lab(values), axis=-1)
    return owners[distances.argmin(-1)]


def _lab(values: np.ndarray | Sequence[tuple[int, int, int]]) -> np.ndarray:
    """sRGB in [0, 255] `(..., 3)` to CIE L*a*b* under D65 (IEC 61966-2-1 and CIE 15); lightness counts 0.7."""
    srgb = np.asarray(values) / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    xyz = linear @ np.array([[0.4124, 0.2126, 0.0193], [0.3576, 0.7152, 0.1192], [0.1805, 0.0722, 0.9505]])
    ratio = xyz / [0.95047, 1.0, 1.08883]
    f = np.where(ratio > (6 / 29) ** 3, np.cbrt(ratio), ratio / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.stack([0.7 * (116 * f[..., 1] - 16), 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], -1)
