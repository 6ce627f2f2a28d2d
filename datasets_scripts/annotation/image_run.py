"""One image through all steps: what is there already is kept, what is missing is made and written."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

from .chat import ChatClient, RequestFailed
from .config import PROMPT_VERSION, AnnotationConfig, digest_of
from .dense_context import describe
from .inputs import ImageItem
from .label_merge import merge_tree
from .mask_tree import build_geometry
from .object_labeling import label_objects, rejection
from .records import Contexts, Geometry, Labels
from .store import ImageFolder, Status, payload_hash

MAX_ROUNDS = 3  # of `retry`


def make_geometry(item: ImageItem, run: Path, config: AnnotationConfig) -> Geometry:
    """
    The masks of an image as a tree of inclusion, from its stage file or made anew: the step that costs processor time.

    Raises `ValueError` with what is wrong with the image or its masks.
    """
    folder, digest = ImageFolder(run, item.image_id), digest_of(config.to_dict()["geometry"])
    fingerprint = item.fingerprint()
    geometry: Geometry | None = folder.read("geometry", fingerprint, digest)
    if geometry is None:
        geometry = build_geometry(*item.load(), config.geometry)
        item.store_picture(run / "pictures")
        folder.write("geometry", geometry, inputs=fingerprint, config=digest)
    if not geometry["nodes"]:
        raise ValueError("no mask is left to describe")
    return geometry


async def annotate_image(
    item: ImageItem, run: Path, config: AnnotationConfig, client: ChatClient, processes: Executor | None = None
) -> Status:
    """
    All steps of one image. The status is written, too: `failed` with a reason if the image, its masks or the answers to
    its requests are of no use, which concerns no other image.

    Args:
        processes: Where the geometry is made; a thread without it.

    Raises `RunStopped` if the client does; what was made before is kept.
    """
    folder = ImageFolder(run, item.image_id)
    folder.delete_leftovers()
    old = folder.status
    seeds: Mapping[str, int] = old["seeds"] if old else {}
    round_ = old["round"] if old else 0
    status: Status = {
        "image_id": item.image_id,
        "state": "done",
        "round": round_,
        "seeds": dict(seeds),
        "made_from": made_from(config, client.model, round_),
    }
    loop = asyncio.get_running_loop()
    try:
        if processes is None:
            geometry = await asyncio.to_thread(make_geometry, item, run, config)
        else:
            geometry = await loop.run_in_executor(processes, make_geometry, item, run, config)
        await _describe(item, folder, geometry, config, client, seeds)
    except (ValueError, OSError, RequestFailed) as error:
        status["state"], status["reason"] = "failed", " ".join(str(error).split())
    if status != old:
        folder.write_status(status)
    return status


async def _describe(
    item: ImageItem,
    folder: ImageFolder,
    geometry: Geometry,
    config: AnnotationConfig,
    client: ChatClient,
    seeds: Mapping[str, int],
) -> None:
    settings = config.to_dict()
    picture: Any = None
    inputs, digest = payload_hash(geometry), _digest(settings["labeling"], client, seeds)
    labels: Labels | None = folder.read("labels", inputs, digest)
    if labels is None:
        picture = await asyncio.to_thread(item.picture)
        labels = await label_objects(picture, geometry, client, config.labeling, seeds=seeds)
        folder.write("labels", labels, inputs=inputs, config=digest)
    if reason := rejection(labels):
        raise RequestFailed(reason)

    inputs, digest = payload_hash([inputs, labels["objects"]]), digest_of(settings["merging"])
    tree: Any = folder.read("tree", inputs, digest)
    if tree is None:
        tree = await asyncio.to_thread(merge_tree, geometry, labels, config.merging)
        folder.write("tree", tree, inputs=inputs, config=digest)
    if not tree["nodes"]:
        raise RequestFailed("no mask could be named")

    inputs, digest = payload_hash(tree), _digest(settings["context"], client, seeds)
    contexts: Contexts | None = folder.read("contexts", inputs, digest)
    if contexts is None:
        picture = picture or await asyncio.to_thread(item.picture)
        contexts = await describe(picture, tree, client, config.context, seeds=seeds)
        folder.write("contexts", contexts, inputs=inputs, config=digest)


def made_from(config: AnnotationConfig, model: str, round_: int) -> str:
    """Hash of all that decides how an image ends, besides the image."""
    return digest_of([config.to_dict(), PROMPT_VERSION, model, round_])


def next_round(folder: ImageFolder, status: Status) -> Status | None:
    """
    The status with which a retry begins: whatever failed is asked with a new seed, so that the answers that failed are not
    read from the cache again. `None` if nothing failed, or after `MAX_ROUNDS`.
    """
    if not status["made_from"]:  # a retry that was begun and did not end goes on
        return status
    labels: Labels | None = folder.read("labels")
    contexts: Contexts | None = folder.read("contexts")
    failed = [item["about"] for item in contexts["items"] if item["status"] == "failed"] if contexts else []
    if labels:
        failed += [name for name, label in labels["objects"].items() if label["status"] == "failed"]
    if (status["state"] == "done" and not failed) or status["round"] >= MAX_ROUNDS:
        return None
    round_ = status["round"] + 1
    seeds = {**status["seeds"], **dict.fromkeys(failed, round_)}
    return {"image_id": status["image_id"], "state": "failed", "round": round_, "seeds": seeds, "made_from": ""}


def _digest(settings: Mapping[str, Any], client: ChatClient, seeds: Mapping[str, int]) -> str:
    return digest_of([settings, PROMPT_VERSION, client.model, dict(seeds)])
