"""Tiny prepared data, one for each family of benchmarks: two pictures, masks that are columns of them."""

from __future__ import annotations

from pathlib import Path

import datasets

from mglmm.datasets_scripts.features import FEATURES
from mglmm.processing.rle import encode_mask
from tests.evaluation import conftest
from tests.evaluation.conftest import columns

SIZES = {"1": (40, 60), "2": (50, 30)}  # height, width
CONFIGS = {
    "photos": "benchmark",
    "photos_paraphrased": "paraphrases",
    "coco_panoptic": "benchmark",
    "ade20k": "benchmark",
}
SPLITS = {"flickr30k": "test", "vg_region": "test"}
Span = tuple[int, int]


def row(image_id: str, task: str, question: str, answer: str, *spans: Span, source: str = "s", **more) -> dict:
    return conftest.row(source, image_id, task, question, answer, *spans) | more


def found(phrase: str) -> str:
    return f"Sure, <p> {phrase} </p> [SEG]."


def expressions(count: int = 5) -> list[dict]:
    """`count` expressions about the first picture, one about the second, and one that nothing fits."""
    rows = [
        row("1", "referring", f"Segment hat {i}.", found(f"hat {i}"), (4 * i, 4 * i + 10 + i)) for i in range(count)
    ]
    rows.append(row("2", "referring", "Segment the dog.", found("the dog"), (0, 12)))
    return [*rows, row("2", "absent", "Segment the car.", 'I cannot find "the car".')]


def reasoning() -> list[dict]:
    ignored = encode_mask(columns(SIZES["1"], 30, 40))
    question = "What keeps the head warm?"
    return [
        row("1", "reasoning", question, found("the hat"), (0, 20), ignore_mask=ignored),
        row("2", "reasoning", "Who barks?", found("the dog"), (0, 12)),
    ]


def descriptions(*tasks: str) -> list[dict]:
    both = "There is <p> a hat </p> [SEG] and <p> a dog </p> [SEG]."
    spans = ((0, 10), (10, 30))
    return [row(str(1 + i), task, "Describe everything.", both, *spans) for i, task in enumerate(tasks)]


def captions() -> list[dict]:
    texts = {"1": ("A dog on the grass.", "The dog runs."), "2": ("Two cars.", "There are two cars on the grass.")}
    return [row(i, "caption", "What is in the picture?", text) for i, each in texts.items() for text in each]


def regions() -> list[dict]:
    """Two boxes, one of them with two texts."""
    boxes = (("1", "a red hat", [4.0, 4.0, 40.0, 30.0]), ("1", "a hat", [4.0, 4.0, 40.0, 30.0]))
    boxes += (("2", "the brown dog", [0.0, 0.0, 30.0, 50.0]),)
    question = "What is in <region>?"
    return [row(i, "region", question, text, regions=[box]) for i, text, box in boxes]


def scenes(names: tuple[str, str] = ("person", "sky")) -> list[dict]:
    """Two pictures with two labels each: questions about each, about an absent one, and a description."""
    rows = []
    for image, width in (("1", 60), ("2", 30)):
        spans = ((0, width // 3), (width // 3, width))
        rows += [
            row(image, "object", f"Segment the {n}.", found(f"the {n}"), s) for n, s in zip(names, spans, strict=True)
        ]
        rows.append(row(image, "absent", "Segment the car.", "Sorry, there is no car."))
        both = f"There is <p> a {names[0]} </p> [SEG] and <p> the {names[1]} </p> [SEG]."
        rows.append(row(image, "panoptic", "Describe everything.", both, *spans))
    return rows


ROWS = {
    "refcoco": expressions,
    "refcoco+": expressions,
    "refcocog": expressions,
    "grefcoco": expressions,
    "reasonseg": reasoning,
    "gcg": lambda: descriptions("grounded_caption", "grounded_caption"),
    "mgsc": lambda: descriptions("panoptic", "fine"),
    "flickr30k": captions,
    "nocaps": captions,
    "coco_panoptic": scenes,
    "ade20k": scenes,
    "refcocog_region": regions,
    "vg_region": regions,
    "photos": scenes,
    "photos_paraphrased": scenes,
}


def dataset(benchmark: str) -> datasets.Dataset:
    return datasets.Dataset.from_list(ROWS[benchmark](), features=FEATURES)


def write(folder: Path, benchmark: str) -> Path:
    """On disk, as `mglmm prepare` writes it."""
    config, split = CONFIGS.get(benchmark, "default"), SPLITS.get(benchmark, "validation")
    (folder / config).mkdir(parents=True)
    dataset(benchmark).to_parquet(folder / config / f"{split}-00000-of-00001.parquet")
    files = f"data_files:\n  - split: {split}\n    path: {config}/{split}-*.parquet"
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: {config}\n  {files}\n---\n")
    return folder
