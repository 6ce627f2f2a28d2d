"""How the things of a picture lie with respect to one another, where it is clear from their boxes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from .scene import Scene
from .scene_templates import ABOVE, BELOW, BESIDE, LEFT, RIGHT
from .targets import Target

APART = 0.12  # least distance of two centres along the axis of their relation, as a share of the image's side
OVERLAP = 0.2  # most overlap of the boxes along that axis, as a share of the smaller extent
ALIGNED = 0.5  # least overlap of the boxes across that axis
NEAR = 0.06  # widest gap between things that touch or nearly do
COMPACT = 0.3  # least share of its box that a thing fills
BACKGROUND = 0.4  # share of the image from which on a thing is no landmark
UNCLEAR = frozenset({"skin", "accessories"})  # scattered over a person


class Relation(NamedTuple):
    """`one` is `word` `other`: "to the left of", "above", ..."""

    one: Target
    word: str
    other: Target


def relations(scene: Scene) -> list[Relation]:
    """
    The clear relations of a scene: between its objects, of one of several instances to an object, and between the parts
    of one object. Of an instance only what is true of no other one; the other side is never one of several.
    """
    found = []
    for group in (scene.objects, *_parts(scene)):
        for other in group:
            if _is_landmark(other):
                for one in group:
                    if one is not other and _is_compact(one):
                        found += [Relation(*triple) for triple in _between(one, other)]
    return found


def neighbours(scene: Scene) -> list[Relation]:
    """
    Relations in which `one` is the only thing that can be meant: the nearest above or below a part, among the parts of
    an object; on any side of an object, where all of the picture is labelled and one labelled thing lies there.
    """
    found = []
    # Where not all is labelled, something without a label may be nearer than any object.
    for group in (*([scene.objects] if scene.dense else []), *_parts(scene)):
        for other in group:
            if not _is_landmark(other):
                continue
            for word in (ABOVE, BELOW) if other.owner else (LEFT, RIGHT, ABOVE, BELOW):
                there = [one for one in group if one is not other and _loosely(one, word, other)]
                near = [one for one in there if _gap(one, word, other) <= NEAR]
                candidates = near if other.owner else there
                if len(candidates) != 1 or (candidates[0].noun.name, word) == ("hair", ABOVE):  # a face is between
                    continue
                if _is_compact(candidates[0]) and word in _words(candidates[0], other):
                    # What straddles the other's border may be meant as well.
                    if not any(_straddles(one, word, other) for one in group if one is not other):
                        found.append(Relation(candidates[0], word, other))
    return found


def owned(scene: Scene) -> list[tuple[Target, Target]]:
    """(part, the object it belongs to), where there is one such object."""
    pairs = []
    for part in scene.parts:
        owner = scene.owner_of(part)
        if owner is not None and owner.count == 1 and part.noun.name not in UNCLEAR and not part.shared:
            pairs.append((part, owner))
    return pairs


def _parts(scene: Scene) -> Iterator[Sequence[Target]]:
    """The parts of each single object."""
    for owner in dict.fromkeys(part.owner for part in scene.parts):
        yield [
            part
            for part in scene.parts
            if part.owner == owner and part.owner_count == 1 and not part.shared and part.noun.name not in UNCLEAR
        ]


def _is_landmark(target: Target) -> bool:
    height, width = target.size
    return target.count == 1 and target.area <= BACKGROUND * height * width and _is_compact(target)


def _is_compact(target: Target) -> bool:
    """Whether the box says where it is. Several instances have boxes of their own."""
    return (
        bool(target.instances)
        or target.noun.kind in ("count", "plural")
        and target.area >= COMPACT * target.box[2] * target.box[3]
    )


def _between(one: Target, other: Target) -> Iterator[tuple[Target, str, Target]]:
    if one.count == 1:
        for word in _words(one, other):
            yield one, word, other
        return
    for instance in one.instances:
        siblings = [sibling for sibling in one.instances if sibling is not instance]
        for word in _words(instance, other):
            if word != BESIDE and not any(_loosely(sibling, word, other) for sibling in siblings):
                yield instance, word, other


def _words(one: Target, other: Target) -> list[str]:
    """What can be said of `one` with respect to `other`."""
    sides = {side for target in (one, other) for side in ("left", "right") if side in target.noun.name.split()}
    dx = one.centre[0] - other.centre[0]
    dy = one.centre[1] - other.centre[1]
    across, along = _overlap(one, other, 0), _overlap(one, other, 1)
    words = []
    if abs(dx) >= APART and across <= OVERLAP and along >= ALIGNED and not sides:
        words.append(RIGHT if dx > 0 else LEFT)
        if max(_gap(one, RIGHT, other), _gap(one, LEFT, other)) <= NEAR:
            words.append(BESIDE)
    if abs(dy) >= APART and along <= OVERLAP and across >= ALIGNED:
        words.append(BELOW if dy > 0 else ABOVE)
    return words


def _loosely(one: Target, word: str, other: Target) -> bool:
    """Whether somebody might say so: `one` reaches beyond the other's centre on that side."""
    left, top, right, bottom = one.corners
    x, y = other.centre
    if word in (ABOVE, BELOW) and _overlap(one, other, 0) < 0.15:
        return False
    return {
        LEFT: left + right < 2 * x,
        RIGHT: left + right > 2 * x,
        ABOVE: top + bottom < 2 * y,
        BELOW: top + bottom > 2 * y,
    }[word]


def _straddles(one: Target, word: str, other: Target) -> bool:
    """Whether the side of `other` that the word names runs through `one`, far from its ends."""
    axis = 0 if word in (LEFT, RIGHT) else 1
    side = other.corners[axis] if word in (LEFT, ABOVE) else other.corners[axis + 2]
    start, end = one.corners[axis], one.corners[axis + 2]
    margin = OVERLAP * min(end - start, other.corners[axis + 2] - other.corners[axis])
    return start + margin < side < end - margin and _overlap(one, other, 1 - axis) > 0.15


def _gap(one: Target, word: str, other: Target) -> float:
    """Distance of the facing sides as a share of the image's side, below zero where the boxes overlap."""
    a, b = one.corners, other.corners
    return {LEFT: b[0] - a[2], RIGHT: a[0] - b[2], ABOVE: b[1] - a[3], BELOW: a[1] - b[3]}[word]


def _overlap(one: Target, other: Target, axis: int) -> float:
    """Overlap of the boxes along an axis (0 is x), as a share of the smaller extent."""
    a, b = one.corners, other.corners
    shared = min(a[axis + 2], b[axis + 2]) - max(a[axis], b[axis])
    smaller = min(a[axis + 2] - a[axis], b[axis + 2] - b[axis])
    return max(shared, 0.0) / smaller if smaller > 0 else 0.0
