"""
Names and captions of the masks of one image, asked of a vision language model level by level.

A request shows a few objects of one level: an overview with an outline around each, and each one out of its
surroundings. Its parent's name is known by then and stands in the prompt (reference C.3).
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain, groupby
from types import MappingProxyType
from typing import Any

from PIL import Image

from .chat import (
    ChatClient,
    ChatRequest,
    Estimate,
    ask,
    finish_all,
    image_part,
    text_message,
)
from .config import LabelingConfig
from .drawing import Drawing, Outline, color_name, crop_box, draw_object, draw_outlines, drawn_size
from .facts import LABELING_HEAD, ObjectFacts
from .label_rules import in_one_field, judge_labels
from .records import ROOT, Exchange, Geometry, Label, Labels, Node

CROP_MARGIN, MIN_CROP = 0.3, 96
WHOLE_IMAGE = "whole image"

SYSTEM = """You are an annotator who names objects in photographs for a data set.
Describe only what lies inside the coloured line of each object; the lines are drawn on top and are not part of the scene.
Write as if the lines were not there: never mention a mask, outline, contour, highlight, crop, box, id, or "the image", and \
never take the colour of a line for that of the object.
Answer with JSON only."""
TASK = """The first picture shows a scene with a numbered line around each object below; m0007 has the number 7. Then each \
object follows by itself, with its surroundings darkened. Boxes are (x, y, width, height) as shares of the picture.

For each object give
- "label": a singular noun phrase of 1 to 3 words that names exactly this region; a part is named as the part ("wheel"), \
not as the whole; "unknown" if it cannot be recognised,
- "caption": two or three sentences, 20 to 60 words in all, that name it by its label and tell its colour, material, shape, \
state and relation to its surroundings. No guesses about what cannot be seen.

Answer in this form, with every id exactly once:
{"objects": [{"id": "m0001", "label": "...", "caption": "..."}]}
"""


async def label_objects(
    picture: Image.Image,
    geometry: Geometry,
    client: ChatClient,
    config: LabelingConfig,
    *,
    seeds: Mapping[str, int] = MappingProxyType({}),
) -> Labels:
    """
    Label every node. All requests of a level are under way at the same time; exchanges are recorded in the order of the
    nodes, whichever answer came first.

    Args:
        picture: Of the size that the geometry names.
        seeds: By node, 0 without one. A request has the smallest seed of its objects: after a retry those that were labelled
            are answered from the cache, and those that failed are asked anew as soon as they are by themselves.

    Raises:
        ValueError: the picture has another size than the masks, or a mask is broken.
        RequestFailed: a request got no answer.
        RunStopped: from the client. Requests under way are finished first, so that what they cost is not lost.
    """
    picture = await asyncio.to_thread(picture.convert, "RGB")
    nodes = {node["id"]: node for node in geometry["nodes"]}
    labels: dict[str, Label] = {}
    exchanges: list[Exchange] = []
    for level in label_batches(geometry, config):
        parents = {node["id"]: _label_above(node, nodes, labels) for batch in level for node in batch}
        step = _Step(picture, client, config, seeds, parents)
        for found, made in await finish_all(step.label(batch) for batch in level):
            labels |= found
            exchanges += made
    return {"objects": {name: labels[name] for name in nodes}, "exchanges": exchanges}


def rejection(labels: Labels) -> str | None:
    """Why an image has no label at all, if that is because no answer kept the rules."""
    if any(label["status"] != "failed" for label in labels["objects"].values()):
        return None
    codes = Counter(code for exchange in labels["exchanges"] for attempt in exchange["attempts"] for code in attempt)
    counted = ", ".join(f"{code} x {count}" for code, count in sorted(codes.items(), key=lambda c: (-c[1], c[0])))
    return f"the model's answers never kept the rules: {counted}"


def label_batches(geometry: Geometry, config: LabelingConfig) -> list[list[list[Node]]]:
    """The nodes of each request, by level: siblings lie next to each other, and only the last request of a level is smaller."""
    size = config.objects_per_request
    levels = [list(level) for _, level in groupby(geometry["nodes"], key=lambda node: node["depth"])]
    return [[level[start : start + size] for start in range(0, len(level), size)] for level in levels]


def estimate_labeling(geometry: Geometry, config: LabelingConfig) -> Estimate:
    """What labelling would cost at most without a second attempt; nothing is drawn or asked."""
    image = geometry["image"]
    size = (image["width"], image["height"])
    total = [0, 0, 0]
    for batch in chain.from_iterable(label_batches(geometry, config)):
        boxes = [crop_box(node["bbox"], size, CROP_MARGIN, MIN_CROP) for node in batch]
        drawings = [Drawing(b"", drawn_size(size, config.overview_long_side))] + [
            Drawing(b"", drawn_size((right - left, bottom - top), config.crop_long_side))
            for left, top, right, bottom in boxes
        ]
        request = make_request(make_facts(batch, size, {}), drawings, config)
        total = [total[0] + 1, total[1] + request.prompt_tokens(), total[2] + request.max_tokens]
    return Estimate(*total)


def make_facts(batch: Sequence[Node], size: tuple[int, int], parents: Mapping[str, str]) -> list[ObjectFacts]:
    """
    What the prompt says of each object.

    Args:
        size: (width, height) of the image.
        parents: Label of what a node lies in, where there is one.
    """
    width, height = size
    facts = []
    for index, node in enumerate(batch):
        x, y, w, h = node["bbox"]
        box = (x / width, y / height, w / width, h / height)
        percent = 100 * node["area"] / (width * height)
        parent = parents.get(node["id"], WHOLE_IMAGE)
        known = in_one_field(node["known_label"] or "")
        facts.append(ObjectFacts(node["id"], color_name(index), box, percent, parent, known))
    return facts


def make_request(
    facts: Sequence[ObjectFacts], drawings: Sequence[Drawing], config: LabelingConfig, seed: int = 0
) -> ChatRequest:
    """The request about some objects; `drawings` are the overview and then one of each."""
    lines = "\n".join([TASK, LABELING_HEAD, *map(str, facts)])
    content: list[dict[str, Any]] = [{"type": "text", "text": lines}, image_part(drawings[0].jpeg)]
    for object_facts, drawing in zip(facts, drawings[1:], strict=True):
        content += [
            {"type": "text", "text": f"{object_facts.id}, {object_facts.color} line:"},
            image_part(drawing.jpeg),
        ]
    return ChatRequest(
        messages=(text_message("system", SYSTEM), {"role": "user", "content": content}),
        max_tokens=config.max_tokens * len(facts),
        schema=answer_schema([object_facts.id for object_facts in facts]),
        seed=seed,
        image_sizes=tuple(drawing.size for drawing in drawings),
    )


def answer_schema(ids: Sequence[str]) -> dict[str, Any]:
    """JSON schema of the answer, in the subset that strict structured output allows."""
    texts = {"id": {"type": "string", "enum": list(ids)}, "label": {"type": "string"}, "caption": {"type": "string"}}
    entry = {"type": "object", "properties": texts, "required": list(texts), "additionalProperties": False}
    return {
        "type": "object",
        "properties": {"objects": {"type": "array", "items": entry}},
        "required": ["objects"],
        "additionalProperties": False,
    }


class _Step:
    """The requests of one level."""

    def __init__(
        self,
        picture: Image.Image,
        client: ChatClient,
        config: LabelingConfig,
        seeds: Mapping[str, int],
        parents: Mapping[str, str],
    ):
        self.picture, self.client, self.config, self.seeds = picture, client, config, seeds
        self.parents = {name: label for name, label in parents.items() if label}

    async def label(self, batch: Sequence[Node], splits: int = 0) -> tuple[dict[str, Label], list[Exchange]]:
        """A batch as a whole; if that fails its halves, and what fails of these object by object."""
        found, exchange = await self._ask(batch, 1 if splits else self.config.attempts)
        if found is not None:
            return found, [exchange]
        if len(batch) == 1:
            return {batch[0]["id"]: {"label": "", "caption": "", "status": "failed", "flags": []}}, [exchange]
        size = 1 if splits else (len(batch) + 1) // 2
        pieces = [batch[start : start + size] for start in range(0, len(batch), size)]
        labels: dict[str, Label] = {}
        exchanges = [exchange]
        for found, made in await finish_all(self.label(piece, splits + 1) for piece in pieces):
            labels |= found
            exchanges += made
        return labels, exchanges

    async def _ask(self, batch: Sequence[Node], attempts: int) -> tuple[dict[str, Label] | None, Exchange]:
        drawings = await asyncio.to_thread(self._draw, batch)
        facts = make_facts(batch, self.picture.size, self.parents)
        seed = min(self.seeds.get(node["id"], 0) for node in batch)
        asked = await ask(
            self.client,
            make_request(facts, drawings, self.config, seed),
            lambda text, _: judge_labels(text, facts, self.parents),
            about=[node["id"] for node in batch],
            attempts=attempts,
        )
        return asked.value, asked.exchange

    def _draw(self, batch: Sequence[Node]) -> list[Drawing]:
        outlines = [
            Outline(node["segmentation"], int(node["id"][1:]), color_name(index)) for index, node in enumerate(batch)
        ]
        overview = draw_outlines(self.picture, outlines, self.config.overview_long_side)
        return [overview] + [
            draw_object(
                self.picture,
                outline,
                self.config.crop_long_side,
                crop_box(node["bbox"], self.picture.size, CROP_MARGIN, MIN_CROP),
            )
            for node, outline in zip(batch, outlines, strict=True)
        ]


def _label_above(node: Node, nodes: Mapping[str, Node], labels: Mapping[str, Label]) -> str:
    """Label of the smallest labelled thing around a node, or ""."""
    while node["parent"] != ROOT:
        node = nodes[node["parent"]]
        if label := labels[node["id"]]["label"]:
            return label
    return ""
