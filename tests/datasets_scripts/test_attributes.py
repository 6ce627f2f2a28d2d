import numpy as np
import PIL.Image
import pytest

from mglmm.datasets_scripts.attributes import (
    COLOURS,
    colour_of,
    contradicts,
    describe_colours,
    may_have_colour,
    name_pixels,
    sensible,
)
from mglmm.datasets_scripts.labels import Noun
from mglmm.datasets_scripts.scene import read_scene
from tests.datasets_scripts.conftest import annotation

SIZE = (40, 60)


@pytest.mark.parametrize(
    ("rgb", "colour"),
    [
        ((12, 12, 14), "black"),
        ((45, 40, 40), "black"),  # black cloth in the light, a little warm
        ((245, 245, 245), "white"),
        ((120, 120, 122), "grey"),
        ((190, 30, 40), "red"),
        ((80, 15, 25), "red"),  # wine
        ((240, 140, 40), "orange"),
        ((240, 220, 40), "yellow"),
        ((50, 130, 60), "green"),
        ((40, 80, 170), "blue"),
        ((25, 30, 65), "blue"),  # navy is not black
        ((110, 50, 140), "purple"),
        ((235, 150, 180), "pink"),
        ((110, 70, 40), "brown"),
        ((215, 195, 165), "beige"),
    ],
)
def test_a_pixel_is_called_by_its_colour(rgb: tuple[int, int, int], colour: str) -> None:
    assert COLOURS[name_pixels(np.array([[rgb]], dtype=np.uint8))[0, 0]] == colour


@pytest.mark.parametrize(
    ("red_columns", "size", "colour"),
    [
        (20, 20, "red"),
        (16, 20, "red"),  # 80 % of it, and less than a quarter is something else
        (12, 20, None),  # 60 %
        (4, 4, None),  # too few pixels to be sure
    ],
)
def test_only_what_clearly_has_one_colour_has_one(red_columns: int, size: int, colour: str | None) -> None:
    names = np.full((size, size), COLOURS.index("white"), dtype=np.uint8)
    names[:, :red_columns] = COLOURS.index("red")
    assert colour_of(names, np.ones((size, size), dtype=bool)) == colour


@pytest.mark.parametrize(
    ("name", "colour", "expected"),
    [
        ("bag", "red", "red"),
        ("hair", "brown", "brown"),
        ("hair", "green", None),  # the light, or a hat
        ("sky", "brown", None),
    ],
)
def test_colours_that_nobody_says(name: str, colour: str, expected: str | None) -> None:
    assert sensible(Noun(name), colour) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("car", True),
        ("hair", True),
        ("person", False),  # "the black person" is no description of a photograph
        ("skin", False),
        ("front glass", False),  # shows what is behind it
        ("front left light", False),
        ("orange", False),  # "the orange orange"
    ],
)
def test_what_may_have_a_colour(name: str, expected: bool) -> None:
    assert may_have_colour(Noun(name)) is expected


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [("red", "green", True), ("red", "red", False), ("black", "grey", False), ("grey", "black", False)],
)
def test_colours_that_contradict_each_other(one: str, other: str, expected: bool) -> None:
    assert contradicts(one, other) is expected


def test_colours_of_a_scene(tmp_path) -> None:
    # A red car with black wheels and glass that mirrors the sky; the picture is larger than what is looked at.
    scale = 10
    size = SIZE[0] * scale, SIZE[1] * scale
    boxes = {"car": (5, 10, 55, 35), "wheel": (10, 20, 25, 35), "front glass": (30, 12, 50, 25)}
    colours = {"car": (190, 30, 40), "wheel": (20, 20, 20), "front glass": (140, 180, 220)}
    pixels = np.full((*size, 3), 120, dtype=np.uint8)
    annotations = []
    for number, (label, box) in enumerate(boxes.items(), 1):
        left, top, right, bottom = (side * scale for side in box)
        pixels[top:bottom, left:right] = colours[label]
        level, parent = ("object", None) if label == "car" else ("part", 1)
        annotations.append(annotation(number, 1, label, level, parent, size, (left, top, right, bottom)))
    PIL.Image.fromarray(pixels).save(tmp_path / "car.png")
    image = {"height": size[0], "width": size[1], "source": "cars"}
    scene = describe_colours(read_scene(image, annotations), tmp_path / "car.png")
    assert {target.noun.name: target.colour for target in (*scene.objects, *scene.parts)} == {
        "car": "red",  # though wheels and glass are half of it
        "wheel": "black",
        "front glass": None,
    }
