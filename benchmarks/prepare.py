"""
Speed and memory of `mglmm prepare` on COCO-panoptic-like input, and of reading the result back.

```shell
python benchmarks/prepare.py
python benchmarks/prepare.py --images 4000 --repeats 5
```

Makes the input, prepares it and writes the tables of `benchmarks/README.md`, where the columns are explained. About two
minutes on an idle core.
"""

import argparse
import json
import os
import resource
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import datasets
import numpy as np
import PIL.Image
import pyarrow.parquet
from tables import README, in_own_process, markdown_table, write_tables

from mglmm.datasets_scripts.prepare import prepare
from mglmm.processing.rle import encode_mask

HEIGHT, WIDTH, MASKS = 480, 640, 12
MAPS = 20  # different label maps; the images share them
LAYOUTS = ("PNG", "RLE")  # panoptic maps as published, and panopticapi's detection format


@dataclass(frozen=True)
class Preparation:
    layout: str
    images: int
    rows: int
    seconds: float
    peak_memory: int  # bytes, libraries included


def write_source(folder: Path, layout: str, images: int) -> Path:
    """A COCO panoptic folder whose images have 12 segments each: an object, or stuff, of ragged outline."""
    rng = np.random.default_rng(0)
    (folder / "val2017").mkdir(parents=True)
    (folder / "annotations/panoptic_val2017").mkdir(parents=True)
    picture = folder / "val2017/picture.jpg"
    PIL.Image.new("RGB", (WIDTH, HEIGHT), (90, 120, 30)).save(picture)
    maps = [_label_map(rng) for _ in range(MAPS)]
    rles = [[encode_mask(label_map == k) for k in range(1, MASKS + 1)] for label_map in maps]
    for number, label_map in enumerate(maps):
        colours = np.stack([label_map, np.zeros_like(label_map), np.zeros_like(label_map)], axis=-1)
        PIL.Image.fromarray(colours).save(folder / f"annotations/panoptic_val2017/{number}.png")
    categories = [{"id": k, "name": f"thing {chr(96 + k)}", "isthing": int(k <= 8)} for k in range(1, MASKS + 1)]
    listed, annotations = [], []
    for number in range(images):
        name = f"{number:012d}.jpg"
        os.link(picture, folder / "val2017" / name)
        listed.append({"id": number, "file_name": name, "height": HEIGHT, "width": WIDTH})
        segments = [{"id": k, "category_id": k, "iscrowd": 0} for k in range(1, MASKS + 1)]
        if layout == "PNG":
            annotations.append({"image_id": number, "file_name": f"{number % MAPS}.png", "segments_info": segments})
        else:
            annotations += [
                {**segment, "image_id": number, "id": number * MASKS + k, "segmentation": rles[number % MAPS][k]}
                for k, segment in enumerate(segments)
            ]
    suffix = "" if layout == "PNG" else "_detection_format"
    content = {"images": listed, "annotations": annotations, "categories": categories}
    (folder / f"annotations/panoptic_val2017{suffix}.json").write_text(json.dumps(content))
    return folder


def _label_map(rng: np.random.Generator) -> np.ndarray:
    """uint8 (480, 640) of 1 to 12: the nearest of twelve points, with a wavy distance."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    wave = 12 * np.sin(x / 17) + 12 * np.sin(y / 11)
    points = rng.uniform((0, 0), (HEIGHT, WIDTH), (MASKS, 2))
    distances = [np.hypot(y + wave - py, x - wave - px) for py, px in points]
    return (np.argmin(distances, axis=0) + 1).astype(np.uint8)


def run_preparation(source: Path, output: Path, layout: str, images: int) -> Preparation:
    start = perf_counter()
    summary = prepare("coco_panoptic", source, output, images="path", num_proc=1)
    seconds = perf_counter() - start
    # The worker is a child; its peak begins at this process's size.
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) * 1024
    return Preparation(layout, images, sum(summary.rows.values()), seconds, peak)


def run_reading(prepared: Path, cache: Path, repeats: int) -> tuple[list[float], list[float]]:
    """
    Seconds to read all rows of the prepared data, and of the same columns as a dataset that knows nothing of images: the
    image as a plain struct of bytes and path. Both are read from Arrow, in turns, without decoding images.
    """
    datasets.disable_progress_bars()
    ours = datasets.load_dataset(str(prepared), "benchmark", split="validation", cache_dir=str(cache))
    ours = ours.cast_column("image", datasets.Image(decode=False))
    files = [str(path) for path in sorted(prepared.glob("benchmark/*.parquet"))]
    table = pyarrow.parquet.ParquetDataset(files).read().replace_schema_metadata()
    table = pyarrow.table({name: table[name] for name in ours.column_names})
    pyarrow.parquet.write_table(table, cache / "plain.parquet")
    plain = datasets.Dataset.from_parquet(str(cache / "plain.parquet"), cache_dir=str(cache))

    def seconds(dataset: datasets.Dataset) -> float:
        start = perf_counter()
        for _ in dataset:
            pass
        return perf_counter() - start

    seconds(ours), seconds(plain)
    pairs = [(seconds(ours), seconds(plain)) for _ in range(repeats)]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def render(preparations: list[Preparation], reading: tuple[list[float], list[float]], rows: int, command: str) -> str:
    """The text between the script's markers of the README."""
    lines = [
        [
            f"{each.layout}",
            f"{each.images:,}",
            f"{each.rows:,}",
            f"{each.seconds:.1f}",
            f"{each.images / each.seconds:.0f}",
            f"{each.rows / each.seconds:.0f}",
            f"{each.peak_memory / 2**20:.0f}",
        ]
        for each in preparations
    ]
    ours, plain = reading
    ratio = median(p / o for o, p in zip(ours, plain, strict=True))
    speeds = [f"{rows / median(ours):,.0f}", f"{rows / median(plain):,.0f}", f"{ratio:.2f}"]
    header = ["masks as", "images", "rows", "seconds", "images/s", "rows/s", "peak memory, MiB"]
    return "\n".join(
        [
            f"`{command}`, one process; datasets {datasets.__version__}.\n",
            markdown_table(header, lines),
            markdown_table(["read back", "rows/s", "plain rows/s", "ratio"], [[f"{rows:,} rows", *speeds]]),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--images", type=int, default=2000, help="of the larger case; the smaller has a quarter")
    parser.add_argument("--repeats", type=int, default=3, help="of reading back, after a warm-up (default: 3)")
    parser.add_argument("--readme", type=Path, default=README, help="file whose tables are replaced")
    args = parser.parse_args()
    if args.images < 4 or args.repeats < 1:
        parser.error(f"--images ({args.images}) must be at least 4 and --repeats ({args.repeats}) at least 1")
    preparations: list[Preparation] = []
    with tempfile.TemporaryDirectory() as work:
        for layout in LAYOUTS:
            for images in (args.images // 4, args.images):
                source, output = Path(work) / f"{layout}-{images}", Path(work) / f"{layout}-{images}-uscdf"
                write_source(source, layout, images)
                arguments: tuple[Any, ...] = (source, output, layout, images)
                preparations.append(in_own_process(run_preparation, *arguments))
        rows = pyarrow.parquet.ParquetDataset(sorted(map(str, output.glob("benchmark/*.parquet")))).read().num_rows
        reading = in_own_process(run_reading, output, Path(work), args.repeats)
    command = f"python benchmarks/prepare.py --images {args.images} --repeats {args.repeats}"
    tables = render(preparations, reading, rows, command)
    print(f"\n{tables}")
    write_tables(args.readme, Path(__file__).name, tables)
    print(f"written to {os.path.relpath(args.readme)}")


if __name__ == "__main__":
    main()
