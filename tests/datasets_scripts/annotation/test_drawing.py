"""Outlines leave the objects' colours alone, numbers stand beside small masks, same input gives the same bytes."""

import io

import numpy as np
import pytest
from PIL import Image

from mglmm.datasets_scripts.annotation.drawing import (
    COLORS,
    Drawing,
    Outline,
    color_name,
    crop_box,
    draw_object,
    draw_outlines,
    draw_picture,
    drawn_size,
)
from tests.datasets_scripts.annotation.scripted_client import box_mask

SIZE = (200, 100)
GREY = (128, 128, 128)


def pixels(drawing: Drawing) -> np.ndarray:
    image = Image.open(io.BytesIO(drawing.jpeg))
    assert image.size == drawing.size and image.mode == "RGB"
    return np.asarray(image).astype(int)


def near(found: np.ndarray, color: tuple[int, int, int], tolerance: int = 40) -> np.ndarray:
    return (np.abs(found - np.array(color)) <= tolerance).all(axis=-1)


@pytest.mark.parametrize(
    ("bbox", "size", "margin", "least", "expected"),
    [
        ([100, 100, 200, 100], (640, 480), 0.3, 0, (70, 85, 330, 215)),  # half of the margin on either side
        ([100, 100, 10, 10], (640, 480), 0.3, 96, (57, 57, 153, 153)),  # small things get their surroundings
        ([0, 0, 10, 10], (640, 480), 0.3, 96, (0, 0, 96, 96)),  # moved into the picture, not cut
        ([630, 470, 10, 10], (640, 480), 0.3, 96, (544, 384, 640, 480)),  # at the other corner
        ([10, 10, 20, 20], (50, 40), 0.3, 96, (0, 0, 50, 40)),  # a picture below the least size
        ([0, 0, 640, 480], (640, 480), 0.3, 96, (0, 0, 640, 480)),  # everything
        ([5, 5, 0, 0], (640, 480), 0.2, 0, (4, 4, 5, 5)),  # an empty box still shows a pixel
    ],
)
def test_crop_box(bbox, size, margin, least, expected) -> None:
    assert crop_box(bbox, size, margin, least) == expected


@pytest.mark.parametrize(
    ("size", "long_side", "expected"),
    [
        ((2250, 1500), 768, (768, 512)),  # reduced
        ((480, 320), 768, (480, 320)),  # never enlarged
        ((5000, 2), 1024, (1024, 1)),  # a strip keeps a pixel
    ],
)
def test_drawn_size(size, long_side, expected) -> None:
    assert drawn_size(size, long_side) == expected


def test_color_names_are_distinct_and_begin_anew() -> None:
    names = [color_name(index) for index in range(13)]
    assert names[:6] == ["red", "cyan", "yellow", "blue", "green", "magenta"]
    assert len(set(names)) == 12 and names[12] == "red" and set(names) == set(COLORS)


def test_the_line_runs_outside_of_the_mask() -> None:
    """A line or a fill inside would change what colour the object seems to have."""
    outline = Outline(box_mask([60, 30, 80, 40], SIZE), 1, "red")
    found = pixels(draw_outlines(Image.new("RGB", SIZE, GREY), [outline], 768))
    red = near(found, COLORS["red"], 60)
    assert red[50, 58:60].all() and red[50, 140:142].all()  # two pixels at the left and the right
    assert not red[50, 56] and not red[50, 143]
    corner = found[32:40, 64:80]  # inside, away from the number
    assert near(corner, GREY, 12).all()


def test_numbers_stand_inside_large_masks_and_beside_small_ones() -> None:
    large, small = (
        Outline(box_mask([10, 10, 120, 80], SIZE), 7, "blue"),
        Outline(box_mask([170, 50, 6, 6], SIZE), 12, "yellow"),
    )
    found = pixels(draw_outlines(Image.new("RGB", SIZE, GREY), [large, small], 768))
    assert near(found[40:60, 60:80], COLORS["blue"], 60).sum() > 60  # the plate in the middle
    assert near(found[51:55, 171:175], GREY, 30).all()  # the small object is free
    assert near(found[25:48, 140:170], COLORS["yellow"], 60).sum() > 40  # its plate above and beside it


@pytest.mark.parametrize("background", sorted(COLORS))
def test_numbers_are_legible_on_any_background(background: str) -> None:
    """A plate has a rim and digits that differ from it, also where it has the colour of what is behind it."""
    picture = Image.new("RGB", SIZE, COLORS[background])
    found = pixels(draw_outlines(picture, [Outline(box_mask([40, 20, 100, 60], SIZE), 8, background)], 768))
    brightness = found.mean(axis=-1)
    assert brightness.max() - brightness.min() > 80


def test_plates_do_not_hide_each_other() -> None:
    outlines = [Outline(box_mask([96 + 4 * i, 48, 4, 4], SIZE), i + 1, color_name(i)) for i in range(3)]
    found = pixels(draw_outlines(Image.new("RGB", SIZE, GREY), outlines, 768))
    assert all(near(found, COLORS[outline.color], 60).sum() > 60 for outline in outlines)


def test_an_object_is_shown_and_its_surroundings_are_darkened() -> None:
    outline = Outline(box_mask([60, 30, 80, 40], SIZE), 1, "cyan")
    found = pixels(draw_object(Image.new("RGB", SIZE, (200, 100, 50)), outline, 384, (40, 20, 160, 80)))
    assert found.shape == (60, 120, 3)
    assert near(found[25:35, 40:80], (200, 100, 50), 12).all()
    assert near(found[2:6, 5:100], (120, 60, 30), 12).all()  # 60 %
    assert near(found[30, 18:20], COLORS["cyan"], 70).all()


def test_a_picture_is_reduced_with_its_masks() -> None:
    big = (4 * SIZE[0], 4 * SIZE[1])
    outline = Outline(box_mask([240, 120, 320, 160], big), 1, "red")
    found = pixels(draw_outlines(Image.new("RGB", big, GREY), [outline], 200))
    assert found.shape == (100, 200, 3) and near(found[50, 58:60], COLORS["red"], 60).all()


def test_the_same_input_gives_the_same_bytes() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (100, 200, 3), dtype=np.uint8))
    outlines = [Outline(box_mask([20 * i, 10, 30, 60], SIZE), i, color_name(i)) for i in range(5)]
    assert draw_outlines(noise, outlines, 150) == draw_outlines(noise.copy(), outlines, 150)
    assert draw_picture(noise, 150, (0, 0, 50, 50)).size == (50, 50)


@pytest.mark.parametrize(
    "bbox",
    [
        [0, 0, 200, 100],  # the whole picture: no line has room
        [0, 0, 1, 1],  # a pixel in the corner
        [150, 60, 40, 30],  # outside of the box that is shown
    ],
)
def test_masks_that_leave_no_room_are_drawn_without_an_error(bbox) -> None:
    outline = Outline(box_mask(bbox, SIZE), 64, "pink")
    assert draw_outlines(Image.new("RGB", SIZE), [outline], 768, (0, 0, 20, 10)).size == (20, 10)
    assert draw_object(Image.new("RGB", SIZE), outline, 384, (0, 0, 5, 5)).size == (5, 5)


def test_a_mask_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="mask of 60x40 pixels for a picture of 200x100"):
        draw_outlines(Image.new("RGB", SIZE), [Outline(box_mask([1, 1, 5, 5]), 1, "red")], 768)
