"""Masks become a tree of inclusion; whatever is dropped has its reason."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pycocotools import mask as mask_utils

from mglmm.datasets_scripts.annotation.config import GeometryConfig
from mglmm.datasets_scripts.annotation.mask_tree import (
    Candidate,
    Grid,
    build_geometry,
    examine,
    extent,
    find_overlaps,
    runs_of,
)
from mglmm.datasets_scripts.annotation.records import ROOT, Geometry, InputMask
from mglmm.processing.rle import decode_mask, encode_mask
from tests.datasets_scripts.conftest import box_rle

SIDE = 100
CONFIG = GeometryConfig()  # the grid of an image of 100 x 100 has a cell for every pixel
ALL = GeometryConfig(min_area_share=0, max_area_share=1, max_level1=10**6, max_below_level1=10**6, max_nodes=10**6)


def mask_of(box: tuple[int, int, int, int], name: int | str = 0, quality: float = 1.0, side: int = SIDE) -> InputMask:
    """A filled box (xyxy, exclusive)."""
    return InputMask(name, box_rle((side, side), box), predicted_iou=quality)


def tree_of(*masks: Any, config: GeometryConfig = CONFIG, side: int = SIDE) -> Geometry:
    """The geometry of masks, or of boxes."""
    given_masks = [mask_of(m, k, side=side) if isinstance(m, tuple) else m for k, m in enumerate(masks)]
    image = {"image_id": "sa_1", "file_name": "sa_1.jpg", "width": side, "height": side}
    return build_geometry(image, given_masks, config)


def parents_of(geometry: Geometry) -> dict[str, str]:
    return {node["id"]: node["parent"] for node in geometry["nodes"]}


def reasons_of(geometry: Geometry) -> dict[int | str, str]:
    return {dropped["ann_id"]: dropped["reason"] for dropped in geometry["dropped"]}


def test_nested_squares() -> None:
    inner, alone, outer, middle = (20, 20, 40, 30), (85, 80, 99, 99), (0, 0, 80, 80), (10, 10, 60, 60)
    masks = [
        InputMask("i", box_rle((SIDE, SIDE), inner), 0.93333, 0.95, known_label="eye"),
        mask_of(alone, "a"),
        mask_of(outer, "o"),
        mask_of(middle, "m"),
    ]
    geometry = tree_of(*masks)
    assert geometry["image"] == {"image_id": "sa_1", "file_name": "sa_1.jpg", "width": SIDE, "height": SIDE}
    assert geometry["dropped"] == []
    seen = [
        (n["id"], n["ann_id"], n["bbox"], n["area"], n["quality"], n["parent"], n["depth"], n["known_label"])
        for n in geometry["nodes"]
    ]
    assert seen == [
        ("m0003", "o", [0, 0, 80, 80], 6400, 1.0, "root", 1, None),
        ("m0002", "a", [85, 80, 14, 19], 266, 1.0, "root", 1, None),
        ("m0004", "m", [10, 10, 50, 50], 2500, 1.0, "m0003", 2, None),
        ("m0001", "i", [20, 20, 20, 10], 200, 0.8867, "m0004", 3, "eye"),
    ]
    assert {node["containment"] for node in geometry["nodes"]} == {1.0}
    assert geometry["nodes"][3]["segmentation"] == masks[0].rle
    assert json.loads(json.dumps(geometry)) == geometry


def test_no_masks() -> None:
    assert tree_of()["nodes"] == [] == tree_of()["dropped"]


def test_siblings_by_area_then_id() -> None:
    small = [(9 * k, 0, 9 * k + 5, 5) for k in range(10)]  # all of 25 pixels
    geometry = tree_of(*small, (0, 50, 20, 70), (50, 50, 55, 55))
    assert [node["id"] for node in geometry["nodes"]] == ["m0011", *(f"m{k:04d}" for k in (*range(1, 11), 12))]


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (InputMask(7, box_rle((SIDE, SIDE), (0, 0, 9, 9)), 0.8799, 1.0), "low_quality"),  # predicted IoU
        (InputMask(7, box_rle((SIDE, SIDE), (0, 0, 9, 9)), 0.88, 0.92), None),  # both just enough
        (InputMask(7, box_rle((SIDE, SIDE), (0, 0, 9, 9)), 1.0, 0.9199), "low_quality"),  # stability
        (InputMask(7, box_rle((SIDE, SIDE), (0, 0, 9, 9)), 1.02, 1.0), None),  # SAM's own estimate may exceed 1
        (InputMask(7, box_rle((SIDE, SIDE), (0, 0, 9, 9)), float("nan"), 1.0), "low_quality"),  # JSON of Python has NaN
        (InputMask(7, box_rle((SIDE, SIDE), (0, 0, 9, 9)), float("inf"), 1.0), "low_quality"),  # it has Infinity, too
        (mask_of((0, 0, 7, 1), 7), "too_small"),  # 0.0007 of the image
        (mask_of((0, 0, 8, 1), 7), None),  # 0.0008
        (mask_of((0, 0, 0, 0), 7), "too_small"),  # nothing
        (mask_of((0, 0, 95, 100), 7), None),  # 0.95
        (mask_of((0, 0, 96, 100), 7), "too_large"),
    ],
)
def test_filter(mask: InputMask, reason: str | None) -> None:
    geometry = tree_of(mask)
    assert reasons_of(geometry) == ({} if reason is None else {7: reason})
    assert len(geometry["nodes"]) == (reason is None)


@pytest.mark.parametrize(
    ("rle", "reason"),
    [
        (box_rle((50, 200), (0, 0, 9, 9)), "mask of 50x200 pixels, image of 100x100"),  # as many pixels, another shape
        ({"size": [100, 100], "counts": box_rle((100, 100), (0, 0, 9, 9))["counts"][:-1]}, "counts"),  # truncated
        ({"size": [100, 100], "counts": box_rle((99, 100), (0, 0, 9, 9))["counts"]}, "cover 9900 pixels"),
        ({"size": [100, 100], "counts": "<script>"}, "no complete COCO string"),  # not the alphabet
        ({"size": [100, 100], "counts": [5000, 5000]}, "compressed COCO string, got list"),  # readers compress these
        ({"size": [10**6, 10**6], "counts": "0"}, "exceeds the limit"),  # would not fit into memory
        ({"counts": "0"}, "size"),
        ([[0, 0, 9, 0, 9, 9]], "size"),  # a polygon
        (None, "size"),
    ],
)
def test_broken_masks_are_dropped_alone(rle: Any, reason: str) -> None:
    geometry = tree_of(InputMask("broken", rle), mask_of((0, 0, 50, 50), "whole"))
    assert list(reasons_of(geometry)) == ["broken"]
    assert reasons_of(geometry)["broken"].startswith("invalid: ") and reason in reasons_of(geometry)["broken"]
    assert "\n" not in reasons_of(geometry)["broken"]
    assert parents_of(geometry) == {"m0002": ROOT}  # ids count the broken one


def test_what_a_reader_found_invalid_is_not_looked_at() -> None:
    mask = replace(mask_of((0, 0, 50, 50), "x"), invalid="its area is another one")
    assert reasons_of(tree_of(mask)) == {"x": "invalid: its area is another one"}


def test_a_mask_between_the_cells_is_too_small() -> None:
    config = replace(ALL, work_long_side=10)  # cells look at columns 50, 150, ...
    hidden, seen = (60, 0, 140, 1000), (40, 40, 60, 60)
    geometry = tree_of(hidden, seen, config=config, side=1000)
    assert reasons_of(geometry) == {0: "too_small"}
    assert [(node["id"], node["bbox"], node["area"]) for node in geometry["nodes"]] == [
        ("m0002", [40, 40, 20, 20], 400)
    ]


@pytest.mark.parametrize(
    ("first", "second", "reasons"),
    [
        (((0, 0, 100, 10), 1.0), ((0, 0, 85, 10), 1.0), {1: "duplicate_of:m0001"}),  # IoU 0.85; the larger stays
        (((0, 0, 85, 10), 1.0), ((0, 0, 100, 10), 1.0), {0: "duplicate_of:m0002"}),  # whatever the order
        (((0, 0, 100, 10), 1.0), ((0, 0, 84, 10), 1.0), {}),  # IoU 0.84
        (((0, 0, 100, 10), 0.9), ((0, 0, 85, 10), 0.95), {0: "duplicate_of:m0002"}),  # quality counts before size
        (((0, 0, 50, 50), 1.0), ((0, 0, 50, 50), 1.0), {1: "duplicate_of:m0001"}),  # equal: the first stays
        (((0, 0, 50, 50), 0.9), ((2, 0, 52, 50), 0.95), {0: "duplicate_of:m0002"}),  # IoU 48 / 52, moved
    ],
)
def test_duplicates(first: Any, second: Any, reasons: dict[int, str]) -> None:
    masks = [mask_of(box, name, quality) for name, (box, quality) in enumerate((first, second))]
    assert reasons_of(tree_of(*masks)) == reasons


def test_a_duplicate_of_a_dropped_mask_is_kept() -> None:
    # Each is like its neighbour (IoU 46 / 54), the ends are not (42 / 58).
    masks = [mask_of((4 * k, 0, 50 + 4 * k, 50), name=k, quality=1 - k / 100) for k in range(3)]
    geometry = tree_of(*masks)
    assert reasons_of(geometry) == {1: "duplicate_of:m0001"}
    assert list(parents_of(geometry)) == ["m0001", "m0003"]


def test_the_best_of_two_originals_is_named() -> None:
    masks = [mask_of((x, 0, 50 + x, 50), name=x, quality=quality) for x, quality in ((4, 0.9), (0, 0.95), (8, 1.0))]
    assert reasons_of(tree_of(*masks)) == {4: "duplicate_of:m0003"}


@pytest.mark.parametrize(
    ("inside", "parent", "containment"),
    [
        (85, "m0001", 0.85),  # just enough
        (84, ROOT, 1.0),  # one pixel less
        (100, "m0001", 1.0),
        (10, ROOT, 1.0),  # neighbours
    ],
)
def test_edge_of_containment(inside: int, parent: str, containment: float) -> None:
    geometry = tree_of((0, 0, inside, 90), (0, 20, 100, 21))  # 100 pixels, of which `inside` lie in the first mask
    node = {n["id"]: n for n in geometry["nodes"]}["m0002"]
    assert (node["parent"], node["containment"]) == (parent, containment)


@pytest.mark.parametrize(
    ("width", "parent"),
    [
        (90, "m0001"),  # 0.9 of the whole
        (91, ROOT),  # nearly as large: beside it
    ],
)
def test_edge_of_the_area_ratio(width: int, parent: str) -> None:
    config = replace(CONFIG, duplicate_iou=0.95)
    assert parents_of(tree_of((0, 0, 100, 10), (0, 0, width, 10), config=config))["m0002"] == parent


def test_containment_is_rounded() -> None:
    geometry = tree_of((0, 0, 50, 50), (44, 0, 51, 10))
    assert [node["containment"] for node in geometry["nodes"]] == [1.0, 0.8571]  # 60 / 70


def test_of_equal_parents_the_one_with_the_smaller_id() -> None:
    # Two bars of one size cross; the third mask lies in both.
    geometry = tree_of((45, 45, 55, 55), (0, 40, 100, 60), (40, 0, 60, 100))
    assert parents_of(geometry) == {"m0002": ROOT, "m0003": ROOT, "m0001": "m0002"}


def test_equal_masks_have_no_parent_in_each_other() -> None:
    config = replace(CONFIG, duplicate_iou=1.1, max_child_ratio=1.0)  # nothing is a duplicate, equals may be parts
    assert parents_of(tree_of((0, 0, 50, 50), (0, 0, 50, 50), config=config)) == {"m0001": ROOT, "m0002": ROOT}


# m0001 > m0003 > m0004, m0001 > m0005; m0002 > m0006
FOREST = ((0, 0, 60, 60), (60, 60, 99, 99), (0, 0, 40, 40), (0, 0, 10, 10), (45, 45, 58, 58), (65, 65, 80, 80))
FOREST_PARENTS = {"m0001": ROOT, "m0002": ROOT, "m0003": "m0001", "m0006": "m0002", "m0005": "m0001", "m0004": "m0003"}


@pytest.mark.parametrize(
    ("caps", "kept"),
    [
        ({}, "m0001 m0002 m0003 m0005 m0006 m0004"),  # by levels, siblings together
        ({"max_level1": 1}, "m0001 m0003 m0005 m0004"),  # m0002 goes with what lies in it
        ({"max_below_level1": 2}, "m0001 m0002 m0003 m0005 m0006"),  # of three below m0001; m0006 has a cap of its own
        ({"max_below_level1": 0}, "m0001 m0002"),
        ({"max_nodes": 4}, "m0001 m0002 m0003 m0006"),  # the largest anywhere
        ({"max_nodes": 0}, ""),
        ({"max_level1": 1, "max_below_level1": 1}, "m0001 m0003"),
    ],
)
def test_caps(caps: dict[str, int], kept: str) -> None:
    geometry = tree_of(*FOREST, config=replace(CONFIG, **caps))
    assert [node["id"] for node in geometry["nodes"]] == kept.split()
    # What is kept stays where it was: its parent is larger, so it is kept, too.
    assert parents_of(geometry) == {name: FOREST_PARENTS[name] for name in kept.split()}
    assert set(reasons_of(geometry).values()) <= {"cap"} and len(geometry["dropped"]) == 6 - len(kept.split())


def test_what_lies_in_a_duplicate_lies_in_the_kept_one() -> None:
    geometry = tree_of((20, 20, 30, 30), mask_of((0, 0, 50, 50), 1, 0.9), mask_of((0, 0, 50, 49), 2, 0.95))
    assert parents_of(geometry) == {"m0003": ROOT, "m0001": "m0003"}


def test_dropped_are_listed_in_the_order_of_the_input() -> None:
    masks = [
        mask_of((0, 0, 5, 5), 0),  # capped
        mask_of((0, 0, 1, 1), 1),  # too small
        mask_of((50, 50, 90, 90), 2),  # duplicate
        InputMask(3, None),
        mask_of((50, 50, 91, 91), 4),
    ]
    geometry = tree_of(*masks, config=replace(CONFIG, max_nodes=1))
    assert [d["ann_id"] for d in geometry["dropped"]] == [0, 1, 2, 3]
    assert [d["reason"].partition(":")[0] for d in geometry["dropped"]] == [
        "cap",
        "too_small",
        "duplicate_of",
        "invalid",
    ]


# -- properties ----------------------------------------------------------------------------------------------------

SHAPES = st.lists(
    st.tuples(st.booleans(), st.integers(0, 59), st.integers(0, 59), st.integers(1, 40), st.integers(1, 40)),
    max_size=14,
)


def drawn(shape: tuple[bool, int, int, int, int]) -> np.ndarray:
    """bool (60, 60): an ellipse or a box around (x, y), cut at the edges."""
    is_round, x, y, width, height = shape
    rows, columns = np.mgrid[:60, :60]
    across, down = np.abs(columns - x) / width, np.abs(rows - y) / height
    return (across**2 + down**2 <= 1) if is_round else (np.maximum(across, down) <= 1)


def masks_of(shapes: list[Any]) -> list[InputMask]:
    return [InputMask(k, encode_mask(drawn(s)), predicted_iou=1 - k / 1000) for k, s in enumerate(shapes)]


@settings(max_examples=60)
@given(SHAPES)
def test_a_forest_in_strict_order_of_area(shapes: list[Any]) -> None:
    masks = masks_of(shapes)
    geometry = tree_of(*masks, config=ALL, side=60)
    nodes = {node["id"]: node for node in geometry["nodes"]}
    assert len(nodes) + len(geometry["dropped"]) == len(masks)
    pixels = {name: decode_mask(node["segmentation"]) for name, node in nodes.items()}
    for place, (name, node) in enumerate(nodes.items()):
        assert node["area"] == pixels[name].sum()
        inside = {
            other: (pixels[name] & pixels[other]).sum() / node["area"]
            for other in nodes
            if nodes[other]["area"] > node["area"] and node["area"] / nodes[other]["area"] <= ALL.max_child_ratio
        }
        containing = [other for other, share in inside.items() if share >= ALL.containment]
        expected = min(containing, key=lambda other: (nodes[other]["area"], other), default=ROOT)
        assert node["parent"] == expected
        if expected == ROOT:
            assert (node["depth"], node["containment"]) == (1, 1.0)
        else:
            assert node["depth"] == nodes[expected]["depth"] + 1
            assert node["containment"] == round(inside[expected], 4)
            assert list(nodes).index(expected) < place
        for other in nodes:  # no duplicate is left
            union = (pixels[name] | pixels[other]).sum()
            assert other == name or (pixels[name] & pixels[other]).sum() / union < ALL.duplicate_iou
    siblings: dict[str, list[tuple[int, str]]] = {}
    for node in geometry["nodes"]:
        siblings.setdefault(node["parent"], []).append((-node["area"], node["id"]))
    assert all(group == sorted(group) for group in siblings.values())
    depths = [node["depth"] for node in geometry["nodes"]]
    assert depths == sorted(depths)


@settings(max_examples=40)
@given(SHAPES, st.randoms(use_true_random=False))
def test_the_order_of_the_input_changes_only_ids(shapes: list[Any], rng: Any) -> None:
    unique = {
        mask_area: mask for mask in masks_of(shapes) if (mask_area := extent(mask.rle)[1])
    }  # ids decide ties only
    masks = list(unique.values())
    shuffled = rng.sample(masks, len(masks))

    def named(geometry: Geometry, given_masks: list[InputMask]) -> Any:
        names = {f"m{k:04d}": mask.ann_id for k, mask in enumerate(given_masks, 1)} | {ROOT: ROOT}
        nodes = [(n["ann_id"], names[n["parent"]], n["containment"], n["depth"]) for n in geometry["nodes"]]
        reasons = {d["ann_id"]: names.get(d["reason"].removeprefix("duplicate_of:")) for d in geometry["dropped"]}
        assert all(names[node["id"]] == node["ann_id"] for node in geometry["nodes"])
        return sorted(nodes), reasons

    assert named(tree_of(*masks, config=ALL, side=60), masks) == named(
        tree_of(*shuffled, config=ALL, side=60), shuffled
    )


@settings(max_examples=60)
@given(SHAPES, st.integers(0, 3), st.integers(0, 4), st.integers(0, 8))
def test_caps_keep_parents(shapes: list[Any], level1: int, below: int, total: int) -> None:
    masks = masks_of(shapes)
    everything = parents_of(tree_of(*masks, config=ALL, side=60))
    caps = replace(ALL, max_level1=level1, max_below_level1=below, max_nodes=total)
    geometry = tree_of(*masks, config=caps, side=60)
    kept = parents_of(geometry)
    assert len(kept) <= total and sum(parent == ROOT for parent in kept.values()) <= level1
    assert all(parent == everything[name] and parent in {ROOT, *kept} for name, parent in kept.items())
    assert sum(reason == "cap" for reason in reasons_of(geometry).values()) == len(everything) - len(kept)


@settings(max_examples=80)
@given(
    arrays(bool, st.tuples(st.integers(1, 150), st.integers(1, 40)), elements=st.booleans(), fill=st.booleans()),
    st.integers(1, 200),
)
def test_the_grid_takes_the_pixels_in_the_middle_of_its_cells(pixels: np.ndarray, long_side: int) -> None:
    grid = Grid(pixels.shape[1], pixels.shape[0], long_side)
    assert max(grid.width, grid.height) == min(long_side, max(pixels.shape))
    rows, columns = (
        ((np.arange(cells) + 0.5) * side / cells + 1e-9).astype(int)
        for cells, side in ((grid.height, pixels.shape[0]), (grid.width, pixels.shape[1]))
    )
    expected = pixels[np.ix_(rows, columns)]
    found = examine(0, InputMask(0, encode_mask(pixels)), grid, ALL)
    if not expected.any():
        assert found == "too_small"
        return
    assert isinstance(found, Candidate) and found.cells == expected.sum()
    x1, y1, x2, y2 = found.cell_box
    assert (expected.any(axis=0).nonzero()[0][[0, -1]] == [x1, x2 - 1]).all()
    assert (expected.any(axis=1).nonzero()[0][[0, -1]] == [y1, y2 - 1]).all()
    unpacked = np.unpackbits(found.bits.view(np.uint8), axis=1).T
    start = y1 // 64 * 64
    assert (unpacked[y1 - start : y2 - start] == expected[y1:y2, x1:x2]).all() and unpacked.sum() == expected.sum()


@settings(max_examples=40)
@given(st.lists(st.tuples(*[st.integers(0, 299)] * 2, *[st.integers(1, 200)] * 2), min_size=2, max_size=6))
def test_shared_cells_are_counted(boxes: list[tuple[int, int, int, int]]) -> None:
    # Higher than two words, so that pairs start and end in different ones.
    ends = [(x, y, min(x + width, 300), min(y + height, 300)) for x, y, width, height in boxes]
    grid = Grid(300, 300, 512)
    found = [examine(k, mask_of(box, side=300), grid, ALL) for k, box in enumerate(ends)]
    overlaps = find_overlaps([mask for mask in found if isinstance(mask, Candidate)])
    seen = {(a, b): n for a, b, n in zip(*(column.tolist() for column in overlaps), strict=True)}
    expected = {}
    for b, (left, top, right, bottom) in enumerate(ends):
        for a, other in enumerate(ends[:b]):
            across, down = min(right, other[2]) - max(left, other[0]), min(bottom, other[3]) - max(top, other[1])
            if across > 0 and down > 0:
                expected[a, b] = across * down
    assert seen == expected


@settings(max_examples=60)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=24), st.integers(1, 6))
def test_extent_of_any_runs(runs: list[int], height: int) -> None:
    """Runs of no pixels, which no encoder writes, change nothing."""
    width = -(-max(sum(runs), 1) // height)
    runs = [*runs, *([0] if len(runs) % 2 else []), width * height - sum(runs)]
    counts = mask_utils.frPyObjects({"size": [height, width], "counts": runs}, height, width)["counts"].decode()
    rle = {"size": [height, width], "counts": counts}
    pixels = decode_mask(rle)
    if not pixels.any():
        with pytest.raises(ValueError, match="empty mask"):
            extent(rle)
        return
    rows, columns = pixels.any(axis=1).nonzero()[0], pixels.any(axis=0).nonzero()[0]
    box = [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
    assert extent(rle) == (box, pixels.sum())
    assert (runs_of(rle).starts < runs_of(rle).stops).all()
