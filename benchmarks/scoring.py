"""
Speed and memory of scoring descriptions with masks (GCG).

```shell
python benchmarks/scoring.py
python benchmarks/scoring.py --quick
```

Scores synthetic images of 10 masks each and writes the table of `benchmarks/README.md`, where the columns are explained.
About two minutes on an idle core.
"""

import argparse
import importlib.metadata
import os
import resource
import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from tables import README, in_own_process, markdown_table, write_tables

from mglmm.evaluation.metrics import SegCapScore
from mglmm.evaluation.text_similarity import ExactSimilarity
from mglmm.processing.rle import encode_mask

HEIGHT, WIDTH, MASKS = 480, 640, 10
MAPS = 12  # different label maps; the images share them
SHIFTS = (-40, -12, -4, 0, 6, 20)  # pixels, of the predicted masks against the true ones
NAMES = [f"a {colour} {thing}" for colour in ("red", "blue", "old") for thing in ("car", "dog", "house", "tree", "hat")]
CASES = (("RLE", 1000), ("RLE", 5000), ("bool", 1000))  # masks as, images
QUICK = (("RLE", 4), ("RLE", 12), ("bool", 4))


@dataclass(frozen=True)
class Scoring:
    masks_as: str
    images: int
    update_seconds: float
    compute_seconds: float
    peak_memory: int  # bytes, libraries included
    kept: float  # bytes of an image that stay in memory until `compute`
    recall: float


class Images:
    """
    Images with ten true masks and eight to twelve predicted ones, made as they are asked for.

    A predicted mask is a true one moved aside; one in six has another phrase, some are missing, some there twice. Only the
    masks of `MAPS` pictures are kept, whatever the number of images.
    """

    def __init__(self, masks_as: str) -> None:
        rng = np.random.default_rng(0)
        self._pool: list[list[list[Any]]] = []  # by picture, true mask and shift
        for _ in range(MAPS if masks_as == "RLE" else 2):
            label_map = _label_map(rng)
            moved = [[np.roll(label_map == k, shift, axis=1) for shift in SHIFTS] for k in range(MASKS)]
            encode = encode_mask if masks_as == "RLE" else np.ascontiguousarray
            self._pool.append([[encode(mask) for mask in masks] for masks in moved])

    def __call__(self, images: int) -> Iterator[tuple[Any, ...]]:
        """The arguments of `SegCapScore.update`."""
        rng = np.random.default_rng(1)
        for number in range(images):
            masks = self._pool[number % len(self._pool)]
            labels = [NAMES[k] for k in rng.permutation(len(NAMES))[:MASKS]]
            chosen = rng.integers(MASKS, size=rng.integers(8, 13))
            predicted = [masks[k][rng.integers(len(SHIFTS))] for k in chosen]
            phrases = [labels[k] if rng.random() > 1 / 6 else "a zebra" for k in chosen]
            truth = [mask[SHIFTS.index(0)] for mask in masks]
            yield f"sa_{number}", predicted, phrases, rng.random(len(predicted)), truth, labels


def _label_map(rng: np.random.Generator) -> np.ndarray:
    """uint8 (480, 640) of 0 to 9: the nearest of ten points, with a wavy distance."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    wave = 12 * np.sin(x / 17) + 12 * np.sin(y / 11)
    points = rng.uniform((0, 0), (HEIGHT, WIDTH), (MASKS, 2))
    return np.argmin([np.hypot(y + wave - py, x - wave - px) for py, px in points], axis=0).astype(np.uint8)


def run_scoring(masks_as: str, images: int) -> Scoring:
    source = Images(masks_as)
    kept = _kept(source, min(images, 100))  # first: it also loads what is loaded late
    score = SegCapScore(ExactSimilarity())
    seconds = 0.0
    for arguments in source(images):
        start = perf_counter()
        score.update(*arguments)
        seconds += perf_counter() - start
    start = perf_counter()
    result = score.compute()
    finish = perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Scoring(masks_as, images, seconds, finish - start, peak, kept, result["clean"]["mask_recall"])


def _kept(source: Images, images: int) -> float:
    """Bytes for each image that Python and numpy hold after `update`."""
    score = SegCapScore(ExactSimilarity())
    rows = source(images + 1)
    score.update(*next(rows))
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    for arguments in rows:
        score.update(*arguments)
    del arguments
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    score.compute()
    return (after - before) / images


def render(scorings: list[Scoring], command: str) -> str:
    """The text between the script's markers of the README."""
    lines = [
        [
            each.masks_as,
            f"{each.images:,}",
            f"{each.images / (each.update_seconds + each.compute_seconds):.0f}",
            f"{1000 * each.update_seconds / each.images:.2f}",
            f"{each.compute_seconds:.2f}",
            f"{each.peak_memory / 2**20:.0f}",
            f"{each.kept / 2**10:.1f}",
            f"{each.recall:.3f}",
        ]
        for each in scorings
    ]
    version = importlib.metadata.version("pycocotools")
    header = ["masks as", "images", "images/s", "update, ms", "compute, s", "peak memory, MiB", "kept per image, KiB"]
    return "\n".join(
        [
            f"`{command}`, one process on {os.cpu_count()} cores; numpy {np.__version__}, pycocotools {version}.\n",
            markdown_table([*header, "mask recall"], lines),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="a few images, to see that it runs; the figures mean nothing"
    )
    parser.add_argument("--readme", type=Path, default=README, help="file whose tables are replaced")
    args = parser.parse_args()
    scorings = [in_own_process(run_scoring, *case) for case in (QUICK if args.quick else CASES)]
    tables = render(scorings, "python benchmarks/scoring.py" + " --quick" * args.quick)
    print(f"\n{tables}")
    write_tables(args.readme, Path(__file__).name, tables)
    print(f"written to {os.path.relpath(args.readme)}")


if __name__ == "__main__":
    main()
