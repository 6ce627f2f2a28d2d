"""A run folder with literal stage files: one picture of a house with windows and a door, and a tree beside it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import PIL.Image

from mglmm.datasets_scripts.annotation.records import Context, Exchange, Geometry, Labels, Tree, TreeNode
from mglmm.datasets_scripts.annotation.store import ImageFolder
from mglmm.datasets_scripts.masks import area, union
from tests.datasets_scripts.conftest import box_rle

SIZE = (40, 60)  # height, width
Box = tuple[int, int, int, int]  # x1, y1, x2, y2, exclusive

HOUSE, TREE, WINDOWS, DOOR = (5, 5, 35, 35), (40, 5, 55, 35), ((8, 8, 13, 13), (20, 8, 25, 13)), (15, 20, 25, 35)
ROOT_TEXT = "<obj_2>A tall tree</obj_2> stands beside <obj_1>a brick house</obj_1>. The sky is grey."
HOUSE_TEXT = "The house has <obj_3>two windows</obj_3> above <obj_4>a green door</obj_4>."


def tree_node(number: int, label: str, *boxes: Box, parent: str = "root", **change: Any) -> TreeNode:
    """An object of one mask for each box."""
    rle = union([box_rle(SIZE, box) for box in boxes])
    left, top = min(box[0] for box in boxes), min(box[1] for box in boxes)
    right, bottom = max(box[2] for box in boxes), max(box[3] for box in boxes)
    node: Any = {
        "id": f"obj_{number}",
        "members": [f"m{10 * number + index:04d}" for index in range(len(boxes))],
        "count": len(boxes),
        "label": label,
        "caption": f"A {label} with clean lines that stands in plain view.",
        "weak": False,
        "parent": parent,
        "children": [],
        "bbox": [left, top, right - left, bottom - top],
        "area": area(rle),
        "segmentation": rle,
        **change,
    }
    return node


def house_tree(**weak: bool) -> Tree:
    """House (900 pixels) and tree (450) below the root, two windows (50) and a door (150) in the house."""
    nodes = [
        tree_node(1, "house", HOUSE),
        tree_node(2, "tree", TREE),
        tree_node(3, "window", *WINDOWS, parent="obj_1"),
        tree_node(4, "door", DOOR, parent="obj_1"),
    ]
    nodes[0]["children"] = ["obj_3", "obj_4"]
    for node in nodes:
        node["weak"] = weak.get(node["id"], False)
    return {"nodes": nodes}


def exchange(*attempts: Sequence[str], about: Sequence[str] = ()) -> Exchange:
    """100 tokens of prompt and 10 of answer for each attempt, which broke these rules."""
    return {
        "about": list(about),
        "attempts": [list(codes) for codes in attempts],
        "request": "0" * 64,
        "prompt_tokens": 100 * len(attempts),
        "completion_tokens": 10 * len(attempts),
    }


def context(about: str, tagged: str, targets: Sequence[str], **change: Any) -> Context:
    item: Any = {
        "about": about,
        "tagged": tagged,
        "targets": list(targets),
        "dropped": [],
        "status": "ok",
        "flags": [],
        "exchange": exchange([]),
        **change,
    }
    return item


def both_contexts() -> list[Context]:
    return [context("root", ROOT_TEXT, ["obj_2", "obj_1"]), context("obj_1", HOUSE_TEXT, ["obj_3", "obj_4"])]


def write_run(run: Path, image_root: Path, *, model: str = "a-model", kind: str = "sa1b") -> Path:
    """The file that says what the run was begun with."""
    run.mkdir(parents=True, exist_ok=True)
    image_root.mkdir(parents=True, exist_ok=True)
    plan = {
        "image_root": str(image_root.resolve()),
        "model": model,
        "source": {"kind": kind},
        "config": {},
        "annotator": {},
    }
    (run / "run.json").write_text(json.dumps(plan))
    return run


def write_image(
    run: Path,
    image_id: str = "sa_1",
    *,
    tree: Tree | None = None,
    items: Sequence[Context] | None = None,
    exchanges: Sequence[Exchange] = (),
    dropped: Sequence[tuple[int, str]] = (),
    reason: str = "",
) -> ImageFolder:
    """
    All stage files of an image, and its picture `image_id`.jpg below the image root of the run's file.

    Args:
        exchanges: Of the labelling; one without a mistake if not given.
        reason: Why the image failed, if it did.
    """
    tree = tree or house_tree()
    file = Path(json.loads((run / "run.json").read_text())["image_root"]) / f"{image_id}.jpg"
    file.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new("RGB", SIZE[::-1], (120, 140, 160)).save(file)
    geometry: Geometry = {
        "image": {"image_id": image_id, "file_name": f"{image_id}.jpg", "width": SIZE[1], "height": SIZE[0]},
        "nodes": [],
        "dropped": [{"ann_id": number, "reason": why} for number, why in dropped],
    }
    labels: Labels = {
        "objects": {
            member: {
                "label": node["label"],
                "caption": node["caption"],
                "status": "weak" if node["weak"] else "ok",
                "flags": ["L6"] if node["weak"] else [],
            }
            for node in tree["nodes"]
            for member in node["members"]
        },
        "exchanges": list(exchanges) or [exchange([])],
    }
    folder = ImageFolder(run, image_id)
    folder.write("geometry", geometry, inputs="", config="")
    folder.write("labels", labels, inputs="", config="")
    folder.write("tree", tree, inputs="", config="")
    folder.write("contexts", {"items": both_contexts() if items is None else list(items)}, inputs="", config="")
    status: Any = {
        "image_id": image_id,
        "state": "failed" if reason else "done",
        "round": 0,
        "seeds": {},
        "made_from": "",
        **({"reason": reason} if reason else {}),
    }
    folder.write_status(status)
    return folder
