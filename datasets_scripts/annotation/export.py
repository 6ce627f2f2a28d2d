"""
A run -> data that others read.

    DESTINATION/mgsc/annotations/*.json, MGLMM_{train,val}_split.txt, imgs    the layout of MGSCData, see `mgscdata`
    DESTINATION/mgsc/{train,validation}-*.parquet                             USCDF rows, made from that layout
    DESTINATION/objects/{train,validation}.parquet                            one row for each object of the trees
    DESTINATION/README.md                                                     card of the configurations mgsc and objects

A key of an item has, besides the published `label` and `mask`, the detailed `caption`, `count` (of things under one label)
and `bbox` ([x, y, width, height] in pixels). `imgs` is a link to the folder of the pictures.
"""

from __future__ import annotations

import base64
import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from datasets import DatasetInfo, Features, List, SplitDict, SplitInfo, Value
from datasets.arrow_writer import ParquetWriter
from datasets.info import DatasetInfosDict

from ..features import FEATURES
from ..labels import Noun, readable
from ..prepare import prepare
from ..sources import check_image_size, inside
from .records import ROOT, Context, ImageInfo, Tree, TreeNode
from .results import Result, RunSettings, read_results, read_settings
from .store import name_hash

if TYPE_CHECKING:
    from huggingface_hub import DatasetCard

MIN_TARGETS = 2
MAX_WEAK_SHARE = 0.2
VALIDATION_PERCENT = 5
LISTS = {"train": "MGLMM_train_split.txt", "validation": "MGLMM_val_split.txt"}
TERMS = "texts: written by {model}, on the terms of that model; pictures and masks: on those of their source{source}"
SA1B_TERMS = " (SA-1B: its dataset research license, which does not allow to pass the pictures on)"
ABOUT = """\
Masks of pictures were put into a tree by inclusion, `{model}` named and described each of them, siblings of one name were
united, and the same model wrote a text about each picture and about objects with parts, in which it marked the phrase of
each mask. Rules checked the form of every answer; nobody checked what the texts say. This is the annotation pipeline of the
Python package `mglmm`.

{images:,} pictures have {items:,} descriptions, of the whole picture (task `panoptic`) or of one object by its parts (task
`fine`). {share} Pictures with `int(sha1(image_id), 16) % 100 < {percent}` are for validation.

The configuration `objects` has one row for each of the {objects:,} objects of all trees: `image_id`, `file_name` below the
folder of the pictures, `id`, `parent` (`root` or an id), `depth`, `label`, `caption`, `count` of things under one label, `bbox`
(x, y, width, height), `area` in pixels, `segmentation` (COCO compressed RLE), and `weak` where the caption does not name the
label."""
SHARE = {
    "path": "Rows hold the paths of the pictures on the machine of this export.",
    "embed": "Rows hold the pictures themselves: mind the terms before they are passed on.",
}
OBJECTS = Features(
    {
        "image_id": Value("string"),
        "file_name": Value("string"),
        "id": Value("string"),
        "parent": Value("string"),
        "depth": Value("int32"),
        "label": Value("string"),
        "caption": Value("string"),
        "count": Value("int32"),
        "bbox": List(Value("int32"), length=4),
        "area": Value("int64"),
        "segmentation": FEATURES["ignore_mask"],
        "weak": Value("bool"),
    }
)
_TAG = re.compile(r"<(/?)(obj_\d+)>")


@dataclass
class ExportSummary:
    """What was written: pictures with a description, descriptions, their masks, objects; what was left out, by reason."""

    output: Path
    images: int = 0
    items: int = 0
    masks: int = 0
    objects: int = 0
    skipped: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        lines = [
            f"{self.images:,} images, {self.items:,} descriptions with {self.masks:,} masks, {self.objects:,} objects",
            *(f"skipped {count:,} x {reason}" for reason, count in self.skipped.most_common()),
        ]
        return "\n".join([*lines, f"written to {self.output}"])


def export(
    run: Path, destination: Path, *, images: Literal["path", "embed"] = "path", with_templates: bool = False
) -> ExportSummary:
    """
    Write what is done in a run; the same run gives the same bytes. The folder appears when it is whole.

    Args:
        images: What the rows of `mgsc` hold of the pictures: their paths, or the encoded pictures.
        with_templates: Also descriptions that a template took the place of.

    Raises:
        ValueError: `run` is no run, or nothing of it can be exported.
        FileExistsError: there is something in `destination`.
    """
    settings, destination = read_settings(run), Path(os.path.abspath(destination))
    if destination.exists() and not (destination.is_dir() and not any(destination.iterdir())):
        raise FileExistsError(f"{destination} is not empty; delete it or choose another output folder")
    destination.parent.mkdir(parents=True, exist_ok=True)
    summary = ExportSummary(destination)
    with tempfile.TemporaryDirectory(dir=destination.parent, prefix=f".{destination.name}-") as work:
        folder = Path(work) / "export"
        mgsc = folder / "mgsc"
        objects = _write_annotations(run, settings, folder, summary, with_templates)
        if not summary.items:
            raise ValueError(f"nothing of {run} can be exported: {dict(summary.skipped) or 'no image is finished'}")
        # The rows are made by the converter of the layout, so that they are what everybody gets from it.
        prepared = prepare("mgscdata", mgsc, Path(work) / "rows", images=images)
        for file in sorted((Path(work) / "rows" / "mgsc").iterdir()):
            file.rename(mgsc / file.name)
        summary.masks = prepared.masks.total()
        summary.items = prepared.rows.total()
        summary.skipped.update({r: n for r, n in prepared.skipped.items() if not r.startswith("split ")})
        _card(folder, settings, summary, objects, images).save(folder / "README.md")
        folder.rename(destination)
    return summary


def split_of(image_id: str) -> Literal["train", "validation"]:
    """By a hash of the picture's id: no picture is in both splits, whatever else is exported."""
    return "validation" if int(name_hash(image_id), 16) % 100 < VALIDATION_PERCENT else "train"


def refusal(item: Context, nodes: Mapping[str, TreeNode], *, with_templates: bool = False) -> str | None:
    """Why a description is not good enough; `None` if it is."""
    targets = list(_keys_of(item["tagged"]))
    if item["status"] == "failed":
        return "description failed"
    if item["status"] == "template" and not with_templates:
        return "description is a template"
    if any(target not in nodes for target in [*targets, item["about"]] if target != ROOT):
        return "description of an object that is not in the tree"
    if len(targets) < MIN_TARGETS:
        return f"description of fewer than {MIN_TARGETS} objects"
    if sum(nodes[target]["weak"] for target in targets) > MAX_WEAK_SHARE * len(targets):
        return f"captions of more than {MAX_WEAK_SHARE:.0%} of its objects do not name them"
    return None


def mgsc_item(item: Context, image: ImageInfo, nodes: Mapping[str, TreeNode]) -> dict[str, Any]:
    """A description as an item of the published layout; its keys k1, k2 ... are in the order of the text."""
    keys = _keys_of(item["tagged"])
    is_root = item["about"] == ROOT
    return {
        "file_name": image["file_name"],
        "label": "root" if is_root else f"subtree: {_name(nodes[item['about']])}",
        "type": "root" if is_root else "subtree",
        "gcg_caption": _TAG.sub(lambda tag: f"<{tag[1]}{keys[tag[2]]}>" if tag[2] in keys else "", item["tagged"]),
        "gcg_labels": list(keys.values()),
        **{key: _object(nodes[name]) for name, key in keys.items()},
    }


def _keys_of(tagged: str) -> dict[str, str]:
    """Id of an object -> its key, in the order of the text."""
    names = dict.fromkeys(tag[2] for tag in _TAG.finditer(tagged) if not tag[1])
    return {name: f"k{number}" for number, name in enumerate(names, 1)}


def _object(node: TreeNode) -> dict[str, Any]:
    rle = node["segmentation"]
    mask = {"size": rle["size"], "counts": base64.b64encode(rle["counts"].encode()).decode("ascii")}
    return {
        "label": _label(node),
        "mask": json.dumps(mask),
        "caption": node["caption"],
        "count": node["count"],
        "bbox": node["bbox"],
    }


def _label(node: TreeNode) -> str:
    """Readers of the layout take what follows a colon for the name."""
    return " ".join(node["label"].replace(":", " ").split())


def _name(node: TreeNode) -> str:
    """As a question asks for it: several windows are "windows"."""
    label = _label(node)
    return Noun(label, readable(label).kind).bare(node["count"])


def _write_annotations(
    run: Path, settings: RunSettings, folder: Path, summary: ExportSummary, with_templates: bool
) -> Counter[str]:
    """The JSON layout and the objects, counted in `summary`; returns the number of objects by split."""
    (folder / "mgsc" / "annotations").mkdir(parents=True)
    (folder / "mgsc" / "imgs").symlink_to(settings.image_root, target_is_directory=True)
    (folder / "objects").mkdir()
    listed: dict[str, list[str]] = {split: [] for split in LISTS}
    objects: Counter[str] = Counter()
    with ExitStack() as files:
        writers: dict[str, ParquetWriter] = {}
        for result in read_results(run):
            image, tree = _usable(result, settings, summary)
            if not image or not tree or not result.contexts:
                continue
            split: str = split_of(image["image_id"])
            if tree["nodes"] and split not in writers:
                path = str(folder / "objects" / f"{split}.parquet")
                writers[split] = files.enter_context(ParquetWriter(features=OBJECTS, path=path, writer_batch_size=1000))
            for row in _object_rows(image, tree):
                writers[split].write(row)
                objects[split] += 1
            nodes = {node["id"]: node for node in tree["nodes"]}
            items = []
            for item in result.contexts["items"]:
                if reason := refusal(item, nodes, with_templates=with_templates):
                    summary.skipped[reason] += 1
                else:
                    items.append(mgsc_item(item, image, nodes))
            if items:
                (folder / "mgsc" / "annotations" / f"{result.name}.json").write_text(json.dumps(items), "utf-8")
                listed[split].append(f"{result.name}.json")
                summary.images += 1
                summary.items += len(items)
        for writer in writers.values():
            writer.finalize()
    for split, names in listed.items():
        if names:
            (folder / "mgsc" / LISTS[split]).write_text("".join(f"{name}\n" for name in names), "utf-8")
    summary.objects = objects.total()
    return objects


def _usable(result: Result, settings: RunSettings, summary: ExportSummary) -> tuple[ImageInfo | None, Tree | None]:
    """What there is of an image whose picture is still the one that was annotated; else a count in `summary`."""
    if result.problem or not result.geometry:
        summary.skipped[f"image: {result.problem}"] += 1
        return None, None
    image = result.geometry["image"]
    try:
        check_image_size(inside(settings.image_root, image["file_name"]), image["height"], image["width"])
    except ValueError as error:
        summary.skipped[f"image: {error}"] += 1
        return None, None
    return image, result.tree


def _object_rows(image: ImageInfo, tree: Tree) -> Iterator[dict[str, Any]]:
    depth = {ROOT: 0}
    for node in tree["nodes"]:  # by levels: parents first
        depth[node["id"]] = depth[node["parent"]] + 1
        columns = {name: node[name] for name in OBJECTS if name in node}  # type: ignore[literal-required]
        yield {
            "image_id": image["image_id"],
            "file_name": image["file_name"],
            "depth": depth[node["id"]],
            **columns,
        }


def _card(
    folder: Path,
    settings: RunSettings,
    summary: ExportSummary,
    objects: Counter[str],
    images: Literal["path", "embed"],
) -> DatasetCard:
    # Late: cards of models, in the same module, need torch.
    from mglmm.hub_cards.cards import dataset_card

    from ..publish import read_contents

    name = summary.output.name
    card = dataset_card(
        read_contents(folder),
        FEATURES,
        name=name,
        terms=TERMS.format(model=settings.model, source=SA1B_TERMS if settings.kind == "sa1b" else ""),
        repo_id=name,
        skipped=dict(summary.skipped.most_common()),
        about=ABOUT.format(
            model=settings.model,
            images=summary.images,
            items=summary.items,
            objects=summary.objects,
            share=SHARE[images],
            percent=VALIDATION_PERCENT,
        ),
    )
    card.data["configs"].append(
        {
            "config_name": "objects",
            "data_files": [{"split": split, "path": f"objects/{split}.parquet"} for split in LISTS if objects[split]],
        }
    )
    splits = SplitDict({split: SplitInfo(split, num_examples=objects[split]) for split in LISTS if objects[split]})
    info = DatasetInfo(features=OBJECTS, config_name="objects", splits=splits)
    DatasetInfosDict({"objects": info}).to_dataset_card_data(card.data)
    return card
