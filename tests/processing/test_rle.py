"""RLE of masks: exact round trips, and refusal of what would make pycocotools read or return foreign memory."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pycocotools import mask as mask_utils

from mglmm.processing.rle import check_size, decode_mask, encode_mask

masks = hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=40))


@pytest.mark.parametrize(
    ("mask", "rle"),
    [
        ([[False]], {"size": [1, 1], "counts": "1"}),
        ([[True]], {"size": [1, 1], "counts": "01"}),
        # column-major runs 1 1 4, not row-major 2 1 3
        ([[False, False, False], [True, False, False]], {"size": [2, 3], "counts": "114"}),
        ([[True] * 40] * 2, {"size": [2, 40], "counts": "0`2"}),
    ],
)
def test_known_values(mask, rle):
    mask = np.array(mask)
    assert encode_mask(mask) == rle
    np.testing.assert_array_equal(decode_mask(rle), mask)


@settings(max_examples=300)
@given(masks)
def test_round_trip_through_json(mask):
    rle = json.loads(json.dumps(encode_mask(mask)))
    decoded = decode_mask(rle)
    assert decoded.dtype == bool and decoded.flags.c_contiguous
    np.testing.assert_array_equal(decoded, mask)
    np.testing.assert_array_equal(decode_mask(encode_mask(np.asfortranarray(mask))), mask)


def test_long_runs_round_trip():
    mask = np.zeros((3000, 2000), dtype=bool)
    mask[10:2900, 1:1990] = True  # runs that need five characters, and large differences
    mask[0, 0] = True
    np.testing.assert_array_equal(decode_mask(encode_mask(mask)), mask)


@pytest.mark.parametrize(
    "mask",
    [
        np.zeros((2, 2), dtype=np.uint8),  # not thresholded
        np.full((2, 2), -1.0),  # logits, of which astype(bool) would make foreground
        np.zeros((1, 2, 2), dtype=bool),
        np.zeros((0, 2), dtype=bool),
    ],
)
def test_encode_refuses(mask):
    with pytest.raises(ValueError, match="bool mask"):
        encode_mask(mask)


@pytest.mark.parametrize(
    ("rle", "message"),
    [
        ({"size": [4, 5], "counts": ""}, "no complete COCO string"),  # pycocotools returns uninitialised memory
        ({"size": [4, 5], "counts": "1"}, "cover 1 pixels, .* has 20"),
        ({"size": [4, 5], "counts": "9999"}, "cover"),
        ({"size": [4, 5], "counts": "Pm0O"}, "run outside"),  # a negative run
        ({"size": [4, 5], "counts": "PPP"}, "no complete COCO string"),  # continued past its end
        ({"size": [4, 5], "counts": "PPPPPPPPP0"}, "10 characters"),  # more than 32 bits
        ({"size": [4, 5], "counts": "4 "}, "no complete COCO string"),  # character out of range
        ({"size": [4, 5], "counts": "4é\x00"}, "no complete COCO string"),
        ({"size": [4, 5], "counts": b"d0"}, "compressed COCO string, got bytes"),
        ({"size": [4, 5], "counts": [20]}, "compressed COCO string, got list"),
        ({"size": [4, 5]}, "got NoneType"),
        ({"size": [4, -5], "counts": "d0"}, "positive ints"),
        ({"size": [4.0, 5], "counts": "d0"}, "positive ints"),
        ({"size": [True, 5], "counts": "5"}, "positive ints"),
        ({"size": [20], "counts": "d0"}, "positive ints"),
        ({"size": "45", "counts": "d0"}, "positive ints"),
        ({"counts": "d0"}, "positive ints"),
        ("d0", "positive ints"),
        (None, "positive ints"),
        ({"size": [10**6, 10**6], "counts": "d0"}, "exceeds the limit"),  # must not be allocated
    ],
)
def test_decode_refuses(rle, message):
    with pytest.raises(ValueError, match=message):
        decode_mask(rle)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools on numpy 2
@settings(max_examples=2_000)
@given(
    st.tuples(st.integers(1, 6), st.integers(1, 6)),
    st.text(st.characters(codec="utf-8", max_codepoint=0x80), max_size=8),
)
def test_accepted_counts_are_deterministic_masks(size, counts):
    rle = {"size": list(size), "counts": counts}
    try:
        mask = decode_mask(rle)
    except ValueError:
        return
    assert mask.shape == size
    np.testing.assert_array_equal(mask_utils.decode([{"size": list(size), "counts": counts.encode()}])[..., 0], mask)
    np.testing.assert_array_equal(decode_mask(encode_mask(mask)), mask)


def test_check_size():
    assert check_size({"size": (3, 4), "counts": "unread"}) == (3, 4)
