"""
The masks of one image as a tree of inclusion, before anything is known of what they show.

    filter -> grid -> overlaps -> without duplicates -> parents -> caps -> nodes

A mask is part of another one if most of *its own* pixels lie in it. IoU would not tell: that of a small part with its whole
is tiny. What two masks share is counted on a coarser grid, in bits. Which one is larger is a matter of their pixels in the
image: that never makes a tie of what differs, and agrees with the areas that the nodes name.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mglmm.processing.rle import check_mask

from .config import GeometryConfig
from .records import ROOT, Dropped, Geometry, ImageInfo, InputMask, Node, Rle

WORD = 64  # bits


class Runs(NamedTuple):
    """
    The pixels of a mask: `starts[k]` to `stops[k]` (exclusive) of the image's columns laid end to end. Both int64 (pieces,),
    ascending; no piece is empty.
    """

    starts: np.ndarray
    stops: np.ndarray


@dataclass(frozen=True, eq=False)
class Candidate:
    """
    A mask that may become a node.

    Args:
        index: Of the mask in the input.
        bbox, area: As in `Node`.
        quality: predicted_iou * stability_score.
        cells: Of the grid that it covers, at least one.
        cell_box: x1, y1, x2, y2 (exclusive) on the grid.
        bits: uint64 (x2 - x1, words), a row for each column of the grid, from word y1 // 64 of the column on.
    """

    index: int
    bbox: list[int]
    area: int
    quality: float
    cells: int
    cell_box: tuple[int, int, int, int]
    bits: np.ndarray

    @property
    def id(self) -> str:
        return f"m{self.index + 1:04d}"

    @property
    def largest_first(self) -> tuple[int, str]:
        return -self.area, self.id


class Parent(NamedTuple):
    whole: int  # index of the mask in the input
    containment: float


def build_geometry(image: ImageInfo, masks: Sequence[InputMask], config: GeometryConfig) -> Geometry:
    """
    The tree of the masks that are good enough, are no duplicates, and fit into the caps (reference C.2).

    The mask `masks[k]` has the id m000<k + 1> whatever becomes of the others. Those that are dropped are listed in their
    order with a reason; a mask that is broken or of another size than the image is one of them, "invalid: ...".

    Args:
        masks: RLEs of `image["height"]` x `image["width"]` pixels.
    """
    grid = Grid(image["width"], image["height"], config.work_long_side)
    dropped: dict[int, str] = {}
    candidates: dict[int, Candidate] = {}
    for index, mask in enumerate(masks):
        found = examine(index, mask, grid, config)
        if isinstance(found, Candidate):
            candidates[index] = found
        else:
            dropped[index] = found
    overlaps = find_overlaps(list(candidates.values()))
    duplicates = find_duplicates(candidates, overlaps, config.duplicate_iou)
    dropped |= {index: f"duplicate_of:{candidates[original].id}" for index, original in duplicates.items()}
    unique = {index: mask for index, mask in candidates.items() if index not in duplicates}
    parents = find_parents(unique, overlaps, config)
    kept = within_caps(unique, parents, config)
    dropped |= {index: "cap" for index in unique if index not in kept}
    return {
        "image": image,
        "nodes": nodes_by_level([unique[index] for index in kept], parents, masks),
        "dropped": [Dropped(ann_id=masks[index].ann_id, reason=dropped[index]) for index in sorted(dropped)],
    }


def examine(index: int, mask: InputMask, grid: Grid, config: GeometryConfig) -> Candidate | str:
    """The mask on the grid, or the reason why it is dropped."""
    if mask.invalid:
        return f"invalid: {mask.invalid}"
    try:
        runs = runs_of(mask.rle)
    except ValueError as error:
        return f"invalid: {error}"
    if list(mask.rle["size"]) != [grid.image_height, grid.image_width]:
        of_image = f"{grid.image_height}x{grid.image_width}"
        return f"invalid: mask of {'x'.join(map(str, mask.rle['size']))} pixels, image of {of_image} (height x width)."
    quality = mask.predicted_iou * mask.stability_score
    enough = mask.predicted_iou >= config.min_predicted_iou and mask.stability_score >= config.min_stability_score
    if not enough or not math.isfinite(quality):
        return "low_quality"
    area = _count(runs)
    share = area / (grid.image_height * grid.image_width)
    if area == 0 or share < config.min_area_share:
        return "too_small"
    if share > config.max_area_share:
        return "too_large"
    sampled = grid.sample(runs)
    if not sampled.starts.size:
        return "too_small"
    cell_box, bits = grid.pack(sampled)
    return Candidate(index, bbox_of(runs, grid.image_height), area, quality, _count(sampled), cell_box, bits)


def runs_of(rle: Rle) -> Runs:
    """
    The runs of an RLE from any source.

    Raises:
        ValueError: it is broken, see `check_mask`.
    """
    ends = np.cumsum(check_mask(rle))
    stops = ends[1::2]
    return _without_empty(ends[0::2][: stops.size], stops)


def extent(rle: Rle) -> tuple[list[int], int]:
    """
    `bbox` and `area` of a mask as in `Node`.

    Raises:
        ValueError: it is broken or empty.
    """
    runs = runs_of(rle)
    if not runs.starts.size:
        raise ValueError("empty mask")
    return bbox_of(runs, rle["size"][0]), _count(runs)


def bbox_of(runs: Runs, height: int) -> list[int]:
    """[x, y, width, height] of a mask that is not empty, whose columns have `height` pixels."""
    first_columns, first_rows = np.divmod(runs.starts, height)
    last_columns, last_rows = np.divmod(runs.stops - 1, height)
    left, right = int(first_columns[0]), int(last_columns[-1])
    if (first_columns < last_columns).any():  # a piece that goes on in the next column touches both edges
        return [left, 0, right - left + 1, height]
    top, bottom = int(first_rows.min()), int(last_rows.max())
    return [left, top, right - left + 1, bottom - top + 1]


class Grid:
    """
    The working grid: each of its cells takes the value of one pixel, the one in its middle. Never finer than the image.

    Args:
        long_side: Cells along the image's longer side.
    """

    def __init__(self, image_width: int, image_height: int, long_side: int):
        scale = min(1.0, long_side / max(image_width, image_height))
        self.image_width, self.image_height = image_width, image_height
        self.width, self.height = (max(1, round(side * scale)) for side in (image_width, image_height))
        self._columns_before = _samples_before(image_width, self.width)
        self._rows_before = _samples_before(image_height, self.height)

    def sample(self, runs: Runs) -> Runs:
        """The mask on the grid, in time that depends on its runs only."""
        return _without_empty(self._cells_before(runs.starts), self._cells_before(runs.stops))

    def pack(self, runs: Runs) -> tuple[tuple[int, int, int, int], np.ndarray]:
        """`cell_box` and `bits` of a `Candidate` from its runs on the grid."""
        left, top, width, height = bbox_of(runs, self.height)
        change = np.zeros(width * self.height + 1, np.int8)
        change[runs.starts - left * self.height] = 1
        change[runs.stops - left * self.height] -= 1  # where two runs touch, nothing changes
        cells = np.cumsum(change[:-1], dtype=np.int8).reshape(width, self.height)
        words = _words(top, top + height)
        padded = np.zeros((width, (words.stop - words.start) * WORD), np.int8)
        padded[:, top % WORD : top % WORD + height] = cells[:, top : top + height]
        return (left, top, left + width, top + height), np.packbits(padded, axis=1).view(np.uint64)

    def _cells_before(self, positions: np.ndarray) -> np.ndarray:
        """How many cells look at a pixel before each position of the image's columns laid end to end."""
        column, row = np.divmod(positions, self.image_height)
        before = self._columns_before[column]
        return before * self.height + (self._columns_before[column + 1] - before) * self._rows_before[row]


class Overlaps(NamedTuple):
    """Pairs of masks by their indices in the input, int64 (pairs,), and the number of cells that both cover."""

    first: np.ndarray
    second: np.ndarray
    shared: np.ndarray


def find_overlaps(candidates: Sequence[Candidate]) -> Overlaps:
    """What each two masks share, for all pairs whose boxes overlap on the grid."""
    boxes = np.array([mask.cell_box for mask in candidates]).reshape(-1, 4)
    pairs = []
    for k, mask in enumerate(candidates):
        low = np.maximum(boxes[:k, :2], boxes[k, :2])
        high = np.minimum(boxes[:k, 2:], boxes[k, 2:])
        near = np.flatnonzero((low < high).all(axis=1))
        for other, (x1, y1), (x2, y2) in zip(near.tolist(), low[near].tolist(), high[near].tolist(), strict=True):
            both = _cut(candidates[other], x1, y1, x2, y2) & _cut(mask, x1, y1, x2, y2)
            pairs.append((candidates[other].index, mask.index, np.bitwise_count(both).sum()))
    return Overlaps(*np.array(pairs, dtype=np.int64).reshape(-1, 3).T)


def find_duplicates(candidates: dict[int, Candidate], overlaps: Overlaps, iou: float) -> dict[int, int]:
    """
    Masks that overlap by `iou` or more with a better one that is kept: index of the mask -> index of the best such.

    The better one has the higher quality; of equal ones the larger, then the one with the smaller id.
    """
    like: defaultdict[int, list[int]] = defaultdict(list)
    for first, second, shared in zip(*(column.tolist() for column in overlaps), strict=True):
        if shared / (candidates[first].cells + candidates[second].cells - shared) >= iou:
            like[first].append(second)
            like[second].append(first)
    duplicates: dict[int, int] = {}
    best_first = sorted(like, key=lambda index: (-candidates[index].quality, *candidates[index].largest_first))
    for index in best_first:
        if index not in duplicates:
            # A better one among them would have made this one its duplicate.
            for worse in like[index]:
                duplicates.setdefault(worse, index)
    return duplicates


def find_parents(masks: dict[int, Candidate], overlaps: Overlaps, config: GeometryConfig) -> dict[int, Parent]:
    """
    The smallest mask (of equal ones that with the smaller id) that contains each one, as the configuration says when; none
    for children of the root. Parents are larger than their children, so that there is no circle.
    """
    parents: dict[int, Parent] = {}
    for first, second, shared in zip(*(column.tolist() for column in overlaps), strict=True):
        if first not in masks or second not in masks or masks[first].area == masks[second].area:
            continue
        child, parent = sorted((first, second), key=lambda index: masks[index].area)
        containment = shared / masks[child].cells
        if containment < config.containment or masks[child].area / masks[parent].area > config.max_child_ratio:
            continue
        known = parents.get(child)
        if known is None or _smallest_first(masks[parent]) < _smallest_first(masks[known.whole]):
            parents[child] = Parent(parent, containment)
    return parents


def within_caps(masks: dict[int, Candidate], parents: dict[int, Parent], config: GeometryConfig) -> set[int]:
    """
    The largest children of the root, of what is below each of them the largest, and of all these the largest.

    Whatever is kept keeps its parent, which is larger than itself; so nothing needs another parent.
    """
    below: defaultdict[int, list[Candidate]] = defaultdict(list)  # by child of the root
    largest_first = sorted(masks.values(), key=lambda mask: mask.largest_first)
    top: dict[int, int] = {}  # the child of the root in which each mask lies
    for mask in largest_first:
        parent = parents.get(mask.index)
        top[mask.index] = mask.index if parent is None else top[parent.whole]
        if parent is not None:
            below[top[mask.index]].append(mask)
    level1 = [mask for mask in largest_first if top[mask.index] == mask.index][: config.max_level1]
    kept = [mask for root in level1 for mask in (root, *below[root.index][: config.max_below_level1])]
    return {mask.index for mask in sorted(kept, key=lambda mask: mask.largest_first)[: config.max_nodes]}


def nodes_by_level(kept: Iterable[Candidate], parents: dict[int, Parent], masks: Sequence[InputMask]) -> list[Node]:
    """The nodes of a tree that holds the parents of all it holds, in the order of `Geometry`."""
    children: defaultdict[int | None, list[Candidate]] = defaultdict(list)
    for mask in sorted(kept, key=lambda mask: mask.largest_first):
        children[parents[mask.index].whole if mask.index in parents else None].append(mask)
    nodes: list[Node] = []
    level, depth = [(ROOT, mask) for mask in children[None]], 1
    while level:
        nodes += [_node(mask, masks[mask.index], parent, parents.get(mask.index), depth) for parent, mask in level]
        level = [(mask.id, child) for _, mask in level for child in children[mask.index]]
        depth += 1
    return nodes


def _node(mask: Candidate, source: InputMask, parent_id: str, parent: Parent | None, depth: int) -> Node:
    return {
        "id": mask.id,
        "ann_id": source.ann_id,
        "bbox": mask.bbox,
        "area": mask.area,
        "quality": round(mask.quality, 4),
        "parent": parent_id,
        "containment": 1.0 if parent is None else round(parent.containment, 4),
        "depth": depth,
        "known_label": source.known_label,
        "segmentation": {"size": list(source.rle["size"]), "counts": source.rle["counts"]},
    }


def _smallest_first(mask: Candidate) -> tuple[int, str]:
    return mask.area, mask.id


def _cut(mask: Candidate, x1: int, y1: int, x2: int, y2: int) -> np.ndarray:
    left, top, _, _ = mask.cell_box
    words, skipped = _words(y1, y2), top // WORD
    return mask.bits[x1 - left : x2 - left, words.start - skipped : words.stop - skipped]


def _words(y1: int, y2: int) -> slice:
    """The words of a column that hold its cells `y1` to `y2` (exclusive)."""
    return slice(y1 // WORD, -(-y2 // WORD))


def _count(runs: Runs) -> int:
    return int((runs.stops - runs.starts).sum())


def _without_empty(starts: np.ndarray, stops: np.ndarray) -> Runs:
    filled = starts < stops
    return Runs(starts[filled], stops[filled])


def _samples_before(pixels: int, cells: int) -> np.ndarray:
    """For each position 0 to `pixels` + 1: how many of `cells` evenly spaced middles lie before it."""
    middles = (2 * np.arange(cells) + 1) * pixels // (2 * cells)
    return np.searchsorted(middles, np.arange(pixels + 2))
