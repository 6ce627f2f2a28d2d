"""Every published form of a mask gives the same pixels."""

from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mglmm.datasets_scripts import masks
from mglmm.datasets_scripts.masks import area, read_index_image, rle_of, rles_of_values, union
from mglmm.processing.rle import decode_mask, encode_mask
from tests.datasets_scripts.conftest import box_rle

SIZE = (6, 8)
BOX = (1, 2, 5, 4)  # columns 1 to 4 of rows 2 and 3
POLYGON = [1, 2, 5, 2, 5, 4, 1, 4]
RUNS = [6 * 1 + 2, 2, 4, 2, 4, 2, 4, 2, 6 * 3 + 2]  # column by column


@pytest.mark.parametrize(
    "segmentation",
    [
        [POLYGON],
        [POLYGON, [1, 2, 3, 2, 3, 4, 1, 4]],  # overlapping: clipped to 1
        {"size": [6, 8], "counts": RUNS},
        {"size": [6, 8], "counts": box_rle(SIZE, BOX)["counts"]},
        {"size": [6, 8], "counts": box_rle(SIZE, BOX)["counts"].encode()},
        [box_rle(SIZE, (1, 2, 3, 4)), box_rle(SIZE, (3, 2, 5, 4))],  # a list of RLEs, as in RefCLEF
    ],
)
def test_every_form_of_one_box(segmentation) -> None:
    rle = rle_of(segmentation, *SIZE)
    assert rle == box_rle(SIZE, BOX)
    assert area(rle) == 8


@pytest.mark.parametrize(
    ("segmentation", "reason"),
    [
        ([], "empty segmentation"),
        ([[1, 2, 5, 2]], "fewer than three points"),
        ([[1, 2, 5, 2, 5, 4, 1]], "fewer than three points"),  # a coordinate without its pair
        ([[1, 2, "5", 2, 5, 4]], "no number"),
        ([[1, 2, float("nan"), 2, 5, 4]], "no number"),
        ({"size": [8, 6], "counts": RUNS}, "size differs"),
        ({"size": [6, 8], "counts": RUNS[:-1]}, "does not cover"),
        ({"size": [6, 8], "counts": [-1, 49]}, "does not cover"),
        ({"size": [6, 8], "counts": box_rle(SIZE, BOX)["counts"][:-2]}, "RLE"),  # truncated
        ({"size": [6, 8]}, "compressed COCO string"),
        ({"counts": RUNS}, "size differs"),
        ("poly", "neither polygons nor RLE but str"),
        ([[100, 100, 120, 100, 120, 120]], "empty mask"),  # outside the image
    ],
)
def test_broken_masks_are_refused(segmentation, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        rle_of(segmentation, *SIZE)


@given(arrays(bool, (6, 8)), arrays(bool, (6, 8)))
def test_a_union_is_the_union(one: np.ndarray, two: np.ndarray) -> None:
    if not (one | two).any():
        with pytest.raises(ValueError, match="empty mask"):
            union([encode_mask(one), encode_mask(two)])
    else:
        assert (decode_mask(union([encode_mask(one), encode_mask(two)])) == (one | two)).all()


@given(arrays(np.uint8, (5, 7), elements=st.sampled_from([0, 3, 255])))
def test_values_part_the_image(values: np.ndarray) -> None:
    rles = rles_of_values(values, ignored=(255,))
    assert set(rles) == set(np.unique(values).tolist()) - {255}
    assert all((decode_mask(rle) == (values == value)).all() for value, rle in rles.items())


@pytest.mark.parametrize("mode", ["L", "P", "I;16"])
def test_index_images_keep_their_values(tmp_path: Path, mode: str) -> None:
    values = np.arange(12, dtype=np.uint8).reshape(3, 4)
    if mode == "P":
        image = PIL.Image.fromarray(values, "L").convert("P")
        image.putdata(values.ravel().tolist())
        image.putpalette([9] * 768)  # all colours alike: the index is what counts
    elif mode == "L":
        image = PIL.Image.fromarray(values)
    else:
        image = PIL.Image.fromarray(values.astype(np.uint16))
    image.save(tmp_path / "label.png")
    assert (read_index_image(tmp_path / "label.png") == values).all()


def test_colour_and_oversized_label_images(tmp_path: Path, monkeypatch) -> None:
    PIL.Image.new("RGBA", (4, 3), (1, 2, 3, 4)).save(tmp_path / "label.png")
    assert read_index_image(tmp_path / "label.png").tolist() == [[[1, 2, 3]] * 4] * 3
    monkeypatch.setattr(masks, "MAX_LABEL_PIXELS", 11)
    with pytest.raises(ValueError, match="more than 11 pixels"):
        read_index_image(tmp_path / "label.png")
    (tmp_path / "label.png").write_bytes(b"none")
    with pytest.raises(ValueError, match="label image cannot be read"):
        read_index_image(tmp_path / "label.png")
