"""
Where a run keeps what it has made of each image.

    RUN/run.json                          what the run was begun with
    RUN/images/<aa>/<image id>/           geometry.json labels.json tree.json contexts.json status.json
    RUN/cache/requests-<shard>.jsonl      answers of the model

A stage file names the hashes of what it was made from; one whose hashes differ is made anew, and so is all that follows.
Every file is written beside its place and moved there, so that a kill leaves a whole file or none; what it left beside the
place is deleted when the image is looked at again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

from .config import digest_of

STAGES = ("geometry", "labels", "tree", "contexts")  # each is made from the one before
SCHEMA = 1
RUN_FILE = "run.json"
PARTIAL = ".partial"
Stage = Literal["geometry", "labels", "tree", "contexts"]


class Status(TypedDict):
    """How an image ended. `reason` says why it failed, in one line without the image's name."""

    image_id: str
    state: Literal["done", "failed"]
    round: int  # how often it was retried
    seeds: dict[str, int]  # of the requests about these ids; 0 of all others
    made_from: str  # hash of the settings, the model and the round
    reason: NotRequired[str]


class ImageFolder:
    """The stage files of one image."""

    def __init__(self, run: Path, image_id: str):
        digest = name_hash(image_id)
        name = re.sub(r"[^\w.-]", "_", image_id).lstrip(".")[:80]
        # Names that are not kept as they are get a piece of the hash, so that no two images share a folder.
        self.path = run / "images" / digest[:2] / (name if name == image_id else f"{name}-{digest[:8]}")

    def read(self, stage: Stage, inputs: str | None = None, config: str | None = None) -> Any:
        """
        The payload of a stage; `None` if it is not there, not whole, or (where given) made from other hashes.
        """
        content = _read_json(self.path / f"{stage}.json")
        if not isinstance(content, dict) or content.get("schema") != SCHEMA or "payload" not in content:
            return None
        for name, expected in (("inputs", inputs), ("config", config)):
            if expected is not None and content.get(name) != expected:
                return None
        return content["payload"]

    def write(self, stage: Stage, payload: Any, *, inputs: str, config: str) -> None:
        content = {"schema": SCHEMA, "stage": stage, "inputs": inputs, "config": config, "payload": payload}
        write_atomically(self.path / f"{stage}.json", json.dumps(content, sort_keys=True) + "\n")

    def delete_leftovers(self) -> None:
        """Of writes that a kill cut short. Not while another process writes here: an image is of one shard, which one has."""
        for leftover in self.path.glob(f"*{PARTIAL}"):
            leftover.unlink(missing_ok=True)

    @property
    def status(self) -> Status | None:
        return _read_json(self.path / "status.json")

    def write_status(self, status: Status) -> None:
        write_atomically(self.path / "status.json", json.dumps(status, sort_keys=True) + "\n")


def finished_images(run: Path) -> Iterator[tuple[ImageFolder, Status]]:
    """Every image that is done or failed, in the order of image ids."""
    found: list[Any] = []
    for file in run.glob("images/??/*/status.json"):
        status = _read_json(file)
        if isinstance(status, dict) and "image_id" in status:
            found.append(status)
    for status in sorted(found, key=lambda status: status["image_id"]):
        yield ImageFolder(run, status["image_id"]), status


def read_plan(run: Path) -> Any:
    """What `run.json` holds. Raises `ValueError` if the folder is of no run."""
    plan = _read_json(run / RUN_FILE)
    if not isinstance(plan, dict) or not {"source", "image_root", "model", "config", "annotator"} <= plan.keys():
        raise ValueError(f"{run} is no folder of `mglmm annotate run`")
    return plan


def shard_of(image_id: str, count: int) -> int:
    """Which of `count` shards an image belongs to, whatever other images there are."""
    return int(name_hash(image_id), 16) % count


def name_hash(image_id: str) -> str:
    """sha1 of an image's id; file systems allow names that are no text."""
    return hashlib.sha1(image_id.encode("utf-8", "surrogatepass")).hexdigest()


def payload_hash(payload: Any) -> str:
    """What the next stage calls its inputs."""
    return digest_of(payload)


def write_atomically(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f"{path.name}.", suffix=PARTIAL)
    with open(handle, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    Path(partial).chmod(0o644)  # mkstemp's files are for their owner alone
    Path(partial).replace(path)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
        return None
