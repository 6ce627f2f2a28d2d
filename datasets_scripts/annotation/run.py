"""
A run over many images on one machine: processes for the geometry, asyncio for the requests.

It can be stopped at any moment. After SIGINT or SIGTERM requests in flight are finished and their answers kept; after
SIGKILL those in flight are lost. Started again it goes on, and ends with the same bytes.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import signal
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tqdm import tqdm

from .annotators import Annotator, open_client
from .chat import Estimate, Interrupted, RunStopped
from .config import AnnotationConfig
from .dense_context import estimate_contexts
from .image_run import annotate_image, made_from, make_geometry, next_round
from .inputs import ImageItem, Kind, find_images, image_root
from .object_labeling import estimate_labeling
from .store import RUN_FILE, ImageFolder, Status, read_plan, shard_of, write_atomically

NO_MEMORY = "a process of the geometry died: if memory was short, try --num-proc 1"


@dataclass(frozen=True)
class Source:
    """
    What is annotated.

    Args:
        kind: Layout of the masks, see `inputs.find_images`.
        annotations: File or folder of the masks.
        images: Folder of the pictures, where it is another one.
    """

    kind: Kind
    annotations: Path
    images: Path | None = None


@dataclass
class RunSummary:
    """
    Args:
        done, failed: Images that are done, found so or made so, and that failed now.
        kept: Images left alone, since they failed before (or, in a retry, did not).
        left: Images not reached when the run was stopped.
        reasons: Of the failures, with how many images.
        requests, from_cache: Requests that went out, and that had been answered before.
        stopped: Why the run ended before its last image; `None` if it did not.
    """

    done: int = 0
    failed: int = 0
    kept: int = 0
    left: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    requests: int = 0
    from_cache: int = 0
    stopped: RunStopped | None = None

    def count(self, status: Status) -> None:
        if status["state"] == "done":
            self.done += 1
        else:
            self.failed += 1
            self.reasons[status["reason"]] += 1

    def __str__(self) -> str:
        lines = [
            f"images: {self.done:,} done, {self.failed:,} failed, {self.kept:,} left alone, {self.left:,} left",
            f"requests: {self.requests:,} made, {self.from_cache:,} answered from the cache",
            *(f"failed {count:,} x {reason}" for reason, count in self.reasons.most_common()),
        ]
        return "\n".join([*lines, f"stopped: {self.stopped}"] if self.stopped else lines)


@dataclass
class Plan:
    """What a run would do: images, those whose masks are of no use by reason, and its requests at most."""

    images: int
    finished: int
    broken: Counter[str]
    estimate: Estimate

    def cost(self, price_prompt: float, price_completion: float) -> float:
        """In the currency of the prices, which are per million tokens."""
        return (
            self.estimate.prompt_tokens * price_prompt + self.estimate.completion_tokens * price_completion
        ) / 1_000_000

    def __str__(self) -> str:
        return "\n".join(
            [
                f"images: {self.images:,}, of which {self.finished:,} are finished and {self.broken.total():,} of no use",
                *(f"of no use {count:,} x {reason}" for reason, count in self.broken.most_common()),
                f"requests: about {self.estimate.requests:,}",
                f"tokens: about {self.estimate.prompt_tokens:,} in prompts, {self.estimate.completion_tokens:,} in answers",
            ]
        )


def list_work(
    source: Source,
    run: Path,
    config: AnnotationConfig,
    annotator: Annotator,
    *,
    shard: tuple[int, int] = (0, 1),
    limit: int | None = None,
    begin: bool = True,
) -> list[ImageItem]:
    """
    The images of a shard; the run folder is checked to be of the same source.

    Args:
        begin: Write into the folder what it is run with, for `read_run`; a dry run does not.

    Raises `ValueError` if it was begun with another one, `FileNotFoundError` if the source is not there.
    """
    number, count = shard
    if not 0 <= number < count:
        raise ValueError(f"shard {number}/{count} does not exist: they are numbered from 0 to {count - 1}")
    place = source.annotations.resolve()
    if place.is_dir() and run.resolve().is_relative_to(place):
        raise ValueError(f"{run} lies in {source.annotations}, whose files are read: choose another folder for the run")
    items = find_images(source.kind, source.annotations, source.images, cache=run / "cache")[:limit]
    root = image_root(source.kind, source.annotations, source.images, run)
    plan = {
        "source": {
            "kind": source.kind,
            "annotations": str(source.annotations.resolve()),
            "images": str(source.images.resolve()) if source.images else None,
        },
        "image_root": str(root.resolve()),
        "config": config.to_dict(),
        "model": annotator.model_name,
        "annotator": asdict(annotator),
    }
    file = run / RUN_FILE
    if file.is_file():
        begun = read_plan(run)["source"]
        if begun != plan["source"]:
            raise ValueError(
                f"{run} was begun with {begun['kind']} of {begun['annotations']}: choose another folder for this source"
            )
    if begin:
        write_atomically(file, json.dumps(plan, indent=1, sort_keys=True) + "\n")
    return [item for item in items if shard_of(item.image_id, count) == number]


def read_run(run: Path) -> tuple[Source, AnnotationConfig, Annotator]:
    """What a run was last started with. Raises `ValueError` if the folder is of no run."""
    plan = read_plan(run)
    source = plan["source"]
    images = Path(source["images"]) if source["images"] else None
    return (
        Source(source["kind"], Path(source["annotations"]), images),
        AnnotationConfig.from_dict(plan["config"]),
        Annotator(**plan["annotator"]),
    )


def run_local(
    items: Sequence[ImageItem],
    run: Path,
    config: AnnotationConfig,
    annotator: Annotator,
    *,
    shard: tuple[int, int] = (0, 1),
    num_proc: int | None = None,
    retry: bool = False,
) -> RunSummary:
    """
    Annotate images on this machine.

    Args:
        num_proc: Processes for the geometry; one a core by default.
        retry: Begin the images that failed, in whole or in part, anew; others are left alone.
    """
    with _workers(num_proc) as pool:
        return asyncio.run(_run(items, run, config, annotator, f"{shard[0]}-of-{shard[1]}", pool, retry))


def plan_run(
    items: Sequence[ImageItem], run: Path, config: AnnotationConfig, model: str, num_proc: int | None = None
) -> Plan:
    """Make the geometry of all images and estimate what their requests will cost; none is made."""
    broken: Counter[str] = Counter()
    estimates = [Estimate(0, 0, 0)]
    statuses = [ImageFolder(run, item.image_id).status for item in items]
    open_items = [
        item
        for item, status in zip(items, statuses, strict=True)
        if not status or status["made_from"] != made_from(config, model, status["round"])
    ]
    with _workers(num_proc) as pool:
        jobs = [pool.submit(make_geometry, item, run, config) for item in open_items]
        for job in tqdm(jobs, desc="geometry", unit="image"):
            try:
                geometry = job.result()
            except BrokenProcessPool as error:
                raise RunStopped(NO_MEMORY) from error
            except (ValueError, OSError) as error:
                broken[str(error)] += 1
                continue
            estimates += [estimate_labeling(geometry, config.labeling), estimate_contexts(geometry, config.context)]
    return Plan(len(items), len(items) - len(open_items), broken, Estimate(*map(sum, zip(*estimates, strict=True))))


async def _run(
    items: Sequence[ImageItem],
    run: Path,
    config: AnnotationConfig,
    annotator: Annotator,
    shard: str,
    pool: ProcessPoolExecutor,
    retry: bool,
) -> RunSummary:
    stop = asyncio.Event()
    with _stop_on_signals(stop):
        async with open_client(annotator, run / "cache", shard, stop) as client:
            work = list(open_work(items, run, config, annotator.model_name, retry=retry))
            summary = RunSummary(kept=len(items) - len(work))
            places = asyncio.Semaphore(annotator.concurrency + 2 * (os.cpu_count() or 1))
            with tqdm(total=len(items), initial=summary.kept, desc="annotate", unit="image") as bar:

                async def one(item: ImageItem) -> None:
                    async with places:
                        if stop.is_set() or summary.stopped:
                            return
                        try:
                            summary.count(await annotate_image(item, run, config, client, pool))
                        except RunStopped as error:
                            summary.stopped = summary.stopped or error
                            return
                        except BrokenProcessPool:
                            summary.stopped = RunStopped(NO_MEMORY)
                            return
                        bar.update()
                        bar.set_postfix(failed=summary.failed, requests=client.misses, cached=client.hits)

                await asyncio.gather(*map(one, work))
            summary.requests, summary.from_cache = client.misses, client.hits
    if stop.is_set():
        summary.stopped = Interrupted("by a signal: the same command goes on")
    summary.left = len(work) - summary.done - summary.failed
    return summary


def open_work(
    items: Iterable[ImageItem], run: Path, config: AnnotationConfig, model: str, *, retry: bool
) -> Iterator[ImageItem]:
    """
    The images that a run has to look at: all but those that failed with these settings before. With `retry` those alone
    of which something failed, their next round begun.
    """
    for item in items:
        folder = ImageFolder(run, item.image_id)
        status = folder.status
        if retry:
            begun = next_round(folder, status) if status else None
            if begun:
                folder.write_status(begun)
                yield item
        elif (
            not status or status["state"] == "done" or status["made_from"] != made_from(config, model, status["round"])
        ):
            yield item


@contextmanager
def _stop_on_signals(stop: asyncio.Event) -> Iterator[None]:
    """The first SIGINT or SIGTERM sets `stop`; the second one does what it always does."""
    loop = asyncio.get_running_loop()

    def first(number: int) -> None:
        loop.remove_signal_handler(number)
        tqdm.write("stopping: requests in flight are finished first (once more to stop at once)", sys.stderr)
        stop.set()

    numbers = (signal.SIGINT, signal.SIGTERM)
    for number in numbers:
        loop.add_signal_handler(number, first, number)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


@contextmanager
def _workers(num_proc: int | None) -> Iterator[ProcessPoolExecutor]:
    # Forked where the system can, before there is any thread: spawning would import everything anew in each.
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    # An interrupt goes to the whole group of processes, but only this one is to react.
    with ProcessPoolExecutor(
        num_proc or os.cpu_count(), context, signal.signal, (signal.SIGINT, signal.SIG_IGN)
    ) as pool:
        pool.submit(os.getpid).result()  # starts them all
        try:
            yield pool
        except BaseException:
            pool.shutdown(cancel_futures=True)  # or an interrupt would wait for all that was submitted
            raise
