"""Drawn pictures with masks in the layout of SA-1B, and a server's answers about them."""

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from mglmm.datasets_scripts.annotation.facts import read_objects
from mglmm.processing.rle import encode_mask
from tests.chat_server import rule_answer

SIZE = (120, 160)  # height, width
# x1, y1, x2, y2 and colour: a house with two windows and a door, a tree, a car with two wheels.
HOUSE = (10, 30, 70, 100)
BOXES = [
    (HOUSE, "firebrick"),
    ((18, 40, 34, 56), "lightyellow"),
    ((46, 40, 62, 56), "lightyellow"),
    ((30, 70, 46, 98), "saddlebrown"),
    ((78, 20, 96, 100), "forestgreen"),
    ((100, 70, 155, 100), "navy"),
    ((104, 86, 118, 100), "black"),
    ((136, 86, 150, 100), "black"),
]
SHADE = 25  # of red in the sky: a request tells by it which picture it shows


def write_images(folder: Path, count: int) -> Path:
    """`count` different pictures `sa_1.jpg`... with their JSON files beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(1, count + 1):
        picture = Image.new("RGB", SIZE[::-1], (SHADE * (number % 10), 160, 200))
        draw, annotations = ImageDraw.Draw(picture), []
        for index, (box, colour) in enumerate(BOXES, 1):
            left, top, right, bottom = (side + number % 5 for side in box)  # neighbours are not equal
            draw.rectangle((left, top, right - 1, bottom - 1), fill=colour)
            mask = np.zeros(SIZE, dtype=bool)
            mask[top:bottom, left:right] = True
            annotations.append(
                {
                    "id": 1000 * number + index,
                    "segmentation": encode_mask(mask),
                    "bbox": [left, top, right - left, bottom - top],
                    "area": int(mask.sum()),
                    "predicted_iou": 0.95,
                    "stability_score": 0.97,
                }
            )
        picture.save(folder / f"sa_{number}.jpg", quality=95)
        image = {"image_id": number, "file_name": f"sa_{number}.jpg", "height": SIZE[0], "width": SIZE[1]}
        (folder / f"sa_{number}.json").write_text(json.dumps({"image": image, "annotations": annotations}))
    return folder


NAMES = {(60, 70): "house", (16, 16): "window", (16, 28): "door", (18, 80): "tree", (55, 30): "car", (14, 14): "wheel"}


def picture_number(body: dict[str, Any]) -> int:
    """Number of the picture that a request shows first."""
    parts = [
        part for message in body["messages"] if isinstance(message["content"], list) for part in message["content"]
    ]
    url = next(part["image_url"]["url"] for part in parts if part["type"] == "image_url")
    with Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as picture:
        return round(picture.convert("RGB").getpixel((2, 2))[0] / SHADE)  # type: ignore[index]


def knowing_answer(body: dict[str, Any]) -> str:
    """What the rule-based annotator would say if it had been told the names of the masks: a model that sees."""
    texts = [dict(message) for message in body["messages"]]
    for message in texts:
        parts = message["content"] if isinstance(message["content"], list) else []
        message["content"] = [
            {**part, "text": OBJECT.sub(_named, part["text"])} if part["type"] == "text" else part for part in parts
        ] or message["content"]
    return rule_answer({**body, "messages": texts})


OBJECT = re.compile(r"^m\d+ \| .*\| in: [^|\n]+$", re.MULTILINE)


def _named(line: re.Match[str]) -> str:
    (facts,) = read_objects(line[0])
    width, height = facts.box[2] * SIZE[1], facts.box[3] * SIZE[0]
    name = min(NAMES, key=lambda size: abs(size[0] - width) + abs(size[1] - height))
    return f"{line[0]} | said to be: {NAMES[name]}"
