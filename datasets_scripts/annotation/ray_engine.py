"""
The same steps as a Ray Data pipeline, for more machines than one. They share the run folder, on a file system that all of
them see; each worker adds answers to a cache file of its own and gets its part of the limits.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .annotators import Annotator, open_client
from .chat import BudgetSpent, RunStopped
from .config import AnnotationConfig
from .image_run import annotate_image
from .inputs import ImageItem
from .run import RunSummary, open_work

IMAGES_PER_BATCH = 16  # whose requests are in flight together in one worker


class AnnotationWorker:
    """Batches of images to what became of them, as JSON: what Ray Data runs in each of its actors."""

    def __init__(self, run: Path, config: AnnotationConfig, annotator: Annotator, workers: int):
        import ray

        self.run, self.config, self.annotator, self.workers = run, config, annotator, workers
        self.shard = f"ray-{ray.get_runtime_context().get_actor_id()}"  # no other process has it
        self.stopped: RunStopped | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        return {"outcome": list(map(json.dumps, asyncio.run(self._annotate(list(batch["item"])))))}

    async def _annotate(self, items: Sequence[ImageItem]) -> list[dict[str, Any]]:
        async with open_client(
            self.annotator, self.run / "cache", self.shard, asyncio.Event(), workers=self.workers
        ) as client:

            async def one(item: ImageItem) -> dict[str, Any]:
                if self.stopped is None:
                    try:
                        return {"status": await annotate_image(item, self.run, self.config, client)}
                    except RunStopped as error:
                        self.stopped = error
                return {"stopped": str(self.stopped), "budget": isinstance(self.stopped, BudgetSpent)}

            outcomes = list(await asyncio.gather(*map(one, items)))
            return [*outcomes, {"requests": client.misses, "from_cache": client.hits}]


def run_ray(
    items: Sequence[ImageItem],
    run: Path,
    config: AnnotationConfig,
    annotator: Annotator,
    *,
    workers: int = 2,
    retry: bool = False,
) -> RunSummary:
    """
    Annotate images on the Ray cluster that `RAY_ADDRESS` names, or on a local one.

    Args:
        workers: Actors, each of one processor.

    Raises `ModuleNotFoundError` without Ray (`pip install 'mglmm[ray]'`).
    """
    import ray
    import ray.data

    work = list(open_work(items, run, config, annotator.model_name, retry=retry))
    summary = RunSummary(kept=len(items) - len(work))
    if not work:
        return summary
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False  # there is one below
    size = max(1, min(IMAGES_PER_BATCH, len(work) // workers))
    outcomes = (
        ray.data.from_items([{"item": item} for item in work], override_num_blocks=-(-len(work) // size))
        .map_batches(
            AnnotationWorker,
            batch_size=size,
            batch_format="numpy",
            compute=ray.data.ActorPoolStrategy(size=workers),
            fn_constructor_args=(run.resolve(), config, annotator, workers),
        )
        .iter_rows()
    )
    with tqdm(total=len(items), initial=summary.kept, desc="annotate", unit="image") as bar:
        for row in outcomes:
            outcome = json.loads(row["outcome"])
            if "status" in outcome:
                summary.count(outcome["status"])
                bar.update()
            elif "requests" in outcome:
                summary.requests += outcome["requests"]
                summary.from_cache += outcome["from_cache"]
            else:
                summary.stopped = (BudgetSpent if outcome["budget"] else RunStopped)(outcome["stopped"])
    summary.left = len(work) - summary.done - summary.failed
    return summary
