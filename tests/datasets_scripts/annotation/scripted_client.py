"""A chat client whose answers a test scripts, and small geometries and trees."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from mglmm.datasets_scripts.annotation.chat import ChatRequest, ChatResult, texts_of
from mglmm.datasets_scripts.annotation.facts import read_objects
from mglmm.datasets_scripts.annotation.records import ROOT, Geometry, Node, Tree, TreeNode
from mglmm.processing.rle import encode_mask

WIDTH, HEIGHT = 60, 40
GOOD_CAPTION = "The {} of {} is made of painted wood and stands upright beside the others."


class ScriptedClient:
    """
    Answers with what `script` says of a request; an exception is raised instead.

    Args:
        gather: As many requests have to be under way before any of them is answered.
    """

    model = "scripted"

    def __init__(self, script: Callable[[ChatRequest], str | ChatResult | Exception], gather: int = 1):
        self.script, self.gather = script, gather
        self.requests: list[ChatRequest] = []
        self.finished = 0
        self._waiting = 0
        self._all_there = asyncio.Event()

    async def complete(self, request: ChatRequest) -> ChatResult:
        self.requests.append(request)
        self._waiting += 1
        if self._waiting >= self.gather:
            self._all_there.set()
        await asyncio.wait_for(self._all_there.wait(), timeout=5)
        answer = self.script(request)
        self.finished += 1
        if isinstance(answer, Exception):
            raise answer
        return answer if isinstance(answer, ChatResult) else ChatResult(answer, "stop", 100, 10)


def prompt_of(request: ChatRequest) -> str:
    """The text of the first question."""
    return "\n".join(texts_of(request.messages[1]))


def asked_ids(request: ChatRequest) -> list[str]:
    return [facts.id for facts in read_objects(prompt_of(request))]


def labels_answer(names: dict[str, str], captions: dict[str, str] | None = None) -> str:
    """A JSON answer that keeps the rules, of labels by id."""
    objects = [
        {
            "id": name,
            "label": label,
            "caption": (captions or {}).get(name, GOOD_CAPTION.format(label, name_in_words(name))),
        }
        for name, label in names.items()
    ]
    return json.dumps({"objects": objects})


def name_in_words(name: str) -> str:
    """Something that differs between ids and is no id."""
    return " ".join("zero one two three four five six seven eight nine".split()[int(digit)] for digit in name[1:])


def picture() -> Image.Image:
    return Image.new("RGB", (WIDTH, HEIGHT), (90, 120, 30))


def box_mask(bbox: Sequence[int], size: tuple[int, int] = (WIDTH, HEIGHT)) -> dict[str, Any]:
    mask = np.zeros(size[::-1], dtype=bool)
    mask[bbox[1] : bbox[1] + bbox[3], bbox[0] : bbox[0] + bbox[2]] = True
    return encode_mask(mask)


def geometry(*nodes: tuple[str, list[int], str] | tuple[str, list[int], str, str]) -> Geometry:
    """Of (id, bbox, parent) or (id, bbox, parent, known label), by levels."""
    depths = {ROOT: 0}
    made: list[Node] = []
    for name, bbox, parent, *known in nodes:
        depths[name] = depths[parent] + 1
        made.append(
            {
                "id": name,
                "ann_id": name,
                "bbox": bbox,
                "area": bbox[2] * bbox[3],
                "quality": 1.0,
                "parent": parent,
                "containment": 1.0,
                "depth": depths[name],
                "known_label": known[0] if known else None,
                "segmentation": box_mask(bbox),
            }
        )
    image = {"image_id": "1", "file_name": "1.jpg", "width": WIDTH, "height": HEIGHT}
    return {"image": image, "nodes": made, "dropped": []}  # type: ignore[typeddict-item]


def tree(*nodes: tuple[str, str, list[int], str] | tuple[str, str, list[int], str, int]) -> Tree:
    """Of (id, label, bbox, parent) or (id, label, bbox, parent, count), by levels."""
    made: list[TreeNode] = [
        {
            "id": name,
            "members": [name.replace("obj_", "m")],
            "count": count[0] if count else 1,
            "label": label,
            "caption": f"A {label} of painted wood that stands upright.",
            "weak": False,
            "parent": parent,
            "children": [other[0] for other in nodes if other[3] == name],
            "bbox": bbox,
            "area": bbox[2] * bbox[3],
            "segmentation": box_mask(bbox),
        }
        for name, label, bbox, parent, *count in nodes
    ]
    return {"nodes": made}
