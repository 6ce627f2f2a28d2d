"""What the stage files of an image hold, as plain JSON; ids of masks are `m0001`..., those of merged objects `obj_1`..."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NotRequired, TypedDict

Rle = dict[str, Any]  # COCO compressed RLE: {"size": [height, width], "counts": str}
ROOT = "root"  # id of the image as a whole


@dataclass(frozen=True)
class InputMask:
    """
    A mask as its source gives it.

    Args:
        ann_id: Name of the annotation in its source.
        rle: Of the size of the displayed image.
        predicted_iou, stability_score: The segmenter's own confidence in [0, 1], as in SA-1B; 1 where people drew.
        known_label: What the source calls it, if it does. Language models are told it as a hint.
        invalid: Why it is of no use, in a few words; it is dropped for that, and `rle` is not looked at.
    """

    ann_id: int | str
    rle: Rle
    predicted_iou: float = 1.0
    stability_score: float = 1.0
    known_label: str | None = None
    invalid: str = ""


class ImageInfo(TypedDict):
    image_id: str
    file_name: str  # below the run's image root
    width: int
    height: int


class Node(TypedDict):
    """A mask in the tree of inclusion. `bbox` is [x, y, width, height] and `area` in pixels of the image."""

    id: str
    ann_id: int | str
    bbox: list[int]
    area: int
    quality: float  # predicted_iou * stability_score
    parent: str  # id of the smallest mask that contains it, or ROOT
    containment: float  # share of its pixels that lie in the parent
    depth: int  # 1 below the root
    known_label: str | None
    segmentation: Rle


class Dropped(TypedDict):
    ann_id: int | str
    reason: str  # invalid: ..., low_quality, too_small, too_large, duplicate_of:m0003, cap


class Geometry(TypedDict):
    """Nodes in the order of a walk by levels, siblings by (area descending, id)."""

    image: ImageInfo
    nodes: list[Node]
    dropped: list[Dropped]


class Exchange(TypedDict):
    """One conversation with a model: what it was about, how each attempt failed, and the request that counts."""

    about: list[str]  # ids of its targets
    attempts: list[list[str]]  # codes of the rules that each answer broke; the last list is empty if it was accepted
    request: str  # key of the last request
    prompt_tokens: int  # of all attempts
    completion_tokens: int


class Label(TypedDict):
    label: str  # "" unless ok or weak
    caption: str
    status: Literal["ok", "weak", "unlabelled", "failed"]
    flags: list[str]  # codes of broken soft rules


class Labels(TypedDict):
    objects: dict[str, Label]  # by the id of the node
    exchanges: list[Exchange]


class TreeNode(TypedDict):
    """Siblings of one label as one object. `segmentation` is the union of its members', at the image's size."""

    id: str
    members: list[str]  # ids of nodes
    count: int  # how many things it stands for
    label: str
    caption: str
    weak: bool  # the caption of its largest member does not name the label
    parent: str
    children: list[str]  # ids, by (area descending, id)
    bbox: list[int]
    area: int
    segmentation: Rle


class Tree(TypedDict):
    nodes: list[TreeNode]  # by levels


class Context(TypedDict):
    """
    A description of the whole image (`about` is ROOT) or of one object. `tagged` holds each target's phrase between
    <obj_k> and </obj_k>; `targets` are the ids in the order of the text.
    """

    about: str
    tagged: str
    targets: list[str]
    dropped: list[str]
    status: Literal["ok", "partial", "template", "failed"]
    flags: list[str]
    exchange: NotRequired[Exchange]  # none for a template


class Contexts(TypedDict):
    items: list[Context]  # ROOT first
