"""
Speed and memory of making the tree of an image's masks, the first step of `mglmm annotate`.

```shell
python benchmarks/mask_tree.py
python benchmarks/mask_tree.py --quick
```

Makes SA-1B-like masks, builds their tree and writes the table of `benchmarks/README.md`, where the columns are explained.
About a minute on an idle core.
"""

import argparse
import os
import resource
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import process_time

import numpy as np
from pycocotools import mask as mask_utils
from tables import README, in_own_process, markdown_table, write_tables

from mglmm.datasets_scripts.annotation.config import GeometryConfig
from mglmm.datasets_scripts.annotation.mask_tree import WORD, Candidate, Grid, build_geometry, examine
from mglmm.datasets_scripts.annotation.records import ROOT, ImageInfo, InputMask

HEIGHT, WIDTH = 1500, 2250
CASES = (50, 100, 200, 500, 1000)  # masks
QUICK = (10, 20)
# Nothing is dropped for its size, and no cap leaves anything out: only duplicates are.
CONFIG = GeometryConfig(min_area_share=0, max_area_share=1, max_level1=10**6, max_below_level1=10**6, max_nodes=10**6)
IMAGE: ImageInfo = {"image_id": "sa_1", "file_name": "sa_1.jpg", "width": WIDTH, "height": HEIGHT}


@dataclass(frozen=True)
class Tree:
    masks: int
    nodes: int
    children: int  # nodes that lie in another one
    pairs: int  # masks whose boxes overlap on the grid
    seconds: float  # from RLEs to the tree
    decoding_seconds: float  # of these, from RLEs to bits on the grid
    matmul_seconds: float  # of one product of all masks with all masks, on the same grid
    peak_memory: int  # bytes, libraries included
    tree_memory: int  # bytes, of the tree alone


def blobs(count: int) -> list[InputMask]:
    """
    Wavy discs, most of them inside of an earlier one, at any depth. Their sizes spread over orders of magnitude, as in
    SA-1B: the middle half covers about 0.1 % to 1.7 % of the image.
    """
    rng = np.random.default_rng(0)
    angles = np.linspace(0, 2 * np.pi, 96, endpoint=False)
    waves = np.arange(2, 9)[:, None]
    discs: list[tuple[float, float, float]] = []
    masks = []
    while len(masks) < count:
        if discs and rng.random() < 0.6:
            x, y, outer = discs[rng.integers(len(discs))]
            radius = outer * rng.uniform(0.15, 0.6)
            direction, distance = rng.uniform(0, 2 * np.pi), (outer - radius) * rng.uniform(0, 0.9)
            x, y = x + distance * np.cos(direction), y + distance * np.sin(direction)
        else:
            x, y, radius = rng.uniform(0, WIDTH), rng.uniform(0, HEIGHT), min(np.exp(rng.normal(4.9, 0.8)), 700.0)
        outline = 1 + (rng.uniform(0, 0.12, (7, 1)) * np.cos(waves * angles + rng.uniform(0, 2 * np.pi, (7, 1)))).sum(0)
        points = np.stack([x + radius * outline * np.cos(angles), y + radius * outline * np.sin(angles)], axis=1)
        (rle,) = mask_utils.frPyObjects([points.ravel().tolist()], HEIGHT, WIDTH)
        if radius < 8 or mask_utils.area(rle) == 0:  # nothing to see on the grid
            continue
        discs.append((x, y, radius))
        masks.append(InputMask(len(masks), {"size": [HEIGHT, WIDTH], "counts": rle["counts"].decode("ascii")}))
    return masks


def run_tree(count: int, repeats: int) -> Tree:
    masks = blobs(count)
    seconds = _seconds(lambda: build_geometry(IMAGE, masks, CONFIG), repeats)
    decoding_seconds = _seconds(lambda: _candidates(masks), repeats)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    tracemalloc.start()
    geometry = build_geometry(IMAGE, masks, CONFIG)
    tree_memory = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    candidates = _candidates(masks)
    dense = _dense(candidates)
    assert (dense @ dense.T).diagonal().tolist() == [mask.cells for mask in candidates]
    return Tree(
        masks=len(masks),
        nodes=len(geometry["nodes"]),
        children=sum(node["parent"] != ROOT for node in geometry["nodes"]),
        pairs=_overlapping_pairs(candidates),
        seconds=seconds,
        decoding_seconds=decoding_seconds,
        matmul_seconds=_seconds(lambda: dense @ dense.T, repeats),
        peak_memory=peak,
        tree_memory=tree_memory,
    )


def _seconds(function: Callable[[], object], repeats: int) -> float:
    """Median of the processor's time, after a warm-up: what else the machine does counts less than by the clock."""
    function()
    seconds = []
    for _ in range(repeats):
        start = process_time()
        function()
        seconds.append(process_time() - start)
    return median(seconds)


def _candidates(masks: list[InputMask]) -> list[Candidate]:
    grid = Grid(WIDTH, HEIGHT, CONFIG.work_long_side)
    found = [examine(k, mask, grid, CONFIG) for k, mask in enumerate(masks)]
    return [mask for mask in found if isinstance(mask, Candidate)]


def _overlapping_pairs(candidates: list[Candidate]) -> int:
    boxes = np.array([mask.cell_box for mask in candidates])
    before = (boxes[:, None, :2] < boxes[None, :, 2:]).all(axis=-1)
    return (int((before & before.T).sum()) - len(candidates)) // 2


def _dense(candidates: list[Candidate]) -> np.ndarray:
    """The same masks as float32 (masks, cells)."""
    grid = Grid(WIDTH, HEIGHT, CONFIG.work_long_side)
    dense = np.zeros((len(candidates), grid.width, grid.height), np.float32)
    for pixels, mask in zip(dense, candidates, strict=True):
        x1, y1, x2, y2 = mask.cell_box
        first = y1 % WORD
        pixels[x1:x2, y1:y2] = np.unpackbits(mask.bits.view(np.uint8), axis=1)[:, first : first + y2 - y1]
    return dense.reshape(len(candidates), -1)


def render(trees: list[Tree], command: str) -> str:
    """The text between the script's markers of the README."""
    lines = [
        [
            f"{each.masks:,}",
            f"{each.nodes:,}",
            f"{each.children:,}",
            f"{each.pairs:,}",
            f"{each.seconds:.3f}",
            f"{each.decoding_seconds:.3f}",
            f"{each.matmul_seconds:.3f}",
            f"{each.seconds / each.matmul_seconds:.3f}",
            f"{1e6 * each.seconds / each.pairs:.1f}",
            f"{1e6 * (each.seconds - each.decoding_seconds) / each.pairs:.1f}",
            f"{each.peak_memory / 2**20:.0f}",
            f"{each.tree_memory / 2**20:.1f}",
        ]
        for each in trees
    ]
    header = ["masks", "nodes", "in another node", "overlapping pairs", "seconds", "decoding, s", "matmul, s"]
    header += ["seconds / matmul", "µs per pair", "without decoding", "peak memory, MiB", "tree, MiB"]
    return "\n".join(
        [f"`{command}`, one thread on {os.cpu_count()} cores; numpy {np.__version__}.\n", markdown_table(header, lines)]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="a few masks, to see that it runs; the figures mean nothing"
    )
    parser.add_argument("--repeats", type=int, default=3, help="after a warm-up; the median counts (default: 3)")
    parser.add_argument("--readme", type=Path, default=README, help="file whose tables are replaced")
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error(f"--repeats ({args.repeats}) must be at least 1")
    os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")  # read by the processes of the cases: matmul, too
    trees = [in_own_process(run_tree, count, args.repeats) for count in (QUICK if args.quick else CASES)]
    tables = render(trees, "python benchmarks/mask_tree.py" + " --quick" * args.quick + f" --repeats {args.repeats}")
    print(f"\n{tables}")
    write_tables(args.readme, Path(__file__).name, tables)
    print(f"written to {os.path.relpath(args.readme)}")


if __name__ == "__main__":
    main()
