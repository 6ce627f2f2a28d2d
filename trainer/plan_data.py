"""What the rows of a mixture look like, from a sample of each dataset: for the dry run (`plan.py`)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from datasets import load_dataset_builder
from PIL import Image

from mglmm.modeling_mglmm import MglmmConfig
from mglmm.processing import MglmmProcessor
from mglmm.processing.uscdf import IMAGE_TOKEN, REGION_TOKEN, conversation_of

from .config import DataConfig
from .memory_estimate import Batch
from .mixture import weight_of

SAMPLED_ROWS = 200
DRAWN_BATCHES = 1000
# Where there is no data to look at: a question and an answer of a sentence or two about three things in one image.
ASSUMED_PROMPT, ASSUMED_ANSWER, ASSUMED_MASKS = 96, 96, 3
CHARACTERS_PER_TOKEN, TEMPLATE_TOKENS = 4, 48  # where there is no tokenizer; the system prompt and the roles
TOKENS, SUPERVISED, MASKS, IMAGES = range(4)  # columns of the sizes of rows


@dataclass
class SampledRows:
    """
    Number of rows of a dataset that a run may draw (`None` if it is not on this machine), and the sizes of some of them,
    float `(n, 4)`: `TOKENS` with the image, `SUPERVISED` ones, `MASKS`, `IMAGES`.
    """

    number: int | None
    sizes: np.ndarray

    @classmethod
    def of(
        cls,
        data: DataConfig,
        processor: MglmmProcessor | None,
        config: MglmmConfig,
        max_length: int | None,
        rng: np.random.Generator,
        notes: list[str],
    ) -> SampledRows:
        """Raises `ValueError` if the dataset lacks the split or task, or no sampled row can be used."""
        vision: Any = config.vision_config
        side = vision.image_size // vision.patch_size // config.image_token_stride
        if not Path(data.path).is_dir():
            length = side * side + ASSUMED_PROMPT + ASSUMED_ANSWER
            return cls(None, np.array([[length, ASSUMED_ANSWER, ASSUMED_MASKS, 1.0]]))
        number, rows = _sample(data, rng)
        sizes, reasons = [], []
        for row in rows:
            try:
                size = _sizes(row, processor, side * side)
                if max_length is not None and size[TOKENS] > max_length:
                    raise ValueError(f"{size[TOKENS]:.0f} tokens with the image, but at most {max_length} fit")
            except ValueError as error:
                reasons.append(str(error))
                continue
            sizes.append(size)
        if not sizes:
            raise ValueError(f"{data.path}: none of {len(rows)} sampled rows can be used, such as: {reasons[0]}")
        if reasons:
            notes.append(f"{data.path}: {len(reasons)} of {len(rows)} sampled rows are left out, such as: {reasons[0]}")
        return cls(number, np.array(sizes, dtype=float))


def _sample(data: DataConfig, rng: np.random.Generator) -> tuple[int, list[dict[str, Any]]]:
    """Number of rows the run may draw, and up to `SAMPLED_ROWS` of them, tasks in their shares; pictures stay unread."""
    splits = load_dataset_builder(data.path, data.name).config.data_files or {}
    if data.split not in splits:
        raise ValueError(
            f"{data.path} ({data.name or 'default'}) has no split {data.split!r}; it has {', '.join(map(str, splits))}"
        )
    files = [pq.ParquetFile(path) for path in splits[data.split]]
    groups = [(file, i) for file in files for i in range(file.num_row_groups)]
    ends = np.cumsum([file.metadata.row_group(i).num_rows for file, i in groups])
    number = int(ends[-1]) if len(ends) else 0
    shares = np.ones(number)
    if data.task_weights or data.task_limits:
        tasks = np.concatenate([file.read(["task"])["task"].to_numpy(zero_copy_only=False) for file in files])
        shares = np.zeros(number)
        for task in data.task_weights or np.unique(tasks):
            rows = np.flatnonzero(tasks == task)[: data.task_limits.get(task)]
            if len(rows) == 0:
                raise ValueError(f"{data.path}: task {task!r} has no rows; it has {', '.join(np.unique(tasks))}")
            shares[rows] = data.task_weights[task] / len(rows) if data.task_weights else 1.0
    usable = int((shares > 0).sum())
    if usable == 0:
        raise ValueError(f"{data.path} ({data.name or 'default'}, {data.split}) has no rows")
    chosen = np.sort(rng.choice(number, min(SAMPLED_ROWS, usable), replace=False, p=shares / shares.sum()))
    group_of = np.searchsorted(ends, chosen, side="right")
    sampled: list[dict[str, Any]] = []
    for group in np.unique(group_of):
        file, i = groups[group]
        table = file.read_row_group(i, columns=["messages", "masks"])
        first = ends[group] - len(table)
        sampled += table.take(chosen[group_of == group] - first).to_pylist()
    return usable, sampled


def _sizes(row: dict[str, Any], processor: MglmmProcessor | None, image_tokens: int) -> list[float]:
    """Tokens, supervised tokens, masks and images of one row; raises `ValueError` for one that is longer than fits."""
    images = int(any(IMAGE_TOKEN in message["content"] for message in row["messages"]))
    if processor is None:
        answers = [message["content"] for message in row["messages"] if message["role"] == "assistant"]
        characters = sum(len(message["content"]) for message in row["messages"])
        tokens = images * image_tokens + TEMPLATE_TOKENS + characters / CHARACTERS_PER_TOKEN
        return [tokens, sum(map(len, answers)) / CHARACTERS_PER_TOKEN, len(row["masks"]), images]
    inputs = processor.apply_chat_template(
        # Any picture has as many tokens.
        [conversation_of({**row, "image": Image.new("RGB", (64, 64))})],
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        processor_kwargs={
            "images_kwargs": {"return_pixels": False},
            "regions": [[16, 16, 48, 48]] * sum(message["content"].count(REGION_TOKEN) for message in row["messages"]),
        },
    )
    return [len(inputs["input_ids"][0]), sum(inputs["assistant_masks"][0]), len(row["masks"]), images]


def shares_of(data: list[DataConfig], found: list[SampledRows], notes: list[str]) -> np.ndarray:
    """Share of each dataset in the drawn rows."""
    numbers = [rows.number for rows in found if rows.number is not None]
    guess = round(sum(numbers) / len(numbers)) if numbers else 1
    unknown = [item.path for item, rows in zip(data, found, strict=True) if item.weight is None and rows.number is None]
    if unknown:
        notes.append(f"not here and without a weight, taken for as large as the others: {', '.join(unknown)}")
    weights = np.array(
        [weight_of(item, guess if rows.number is None else rows.number) for item, rows in zip(data, found, strict=True)]
    )
    return weights / weights.sum()


def largest_batch(found: list[SampledRows], shares: np.ndarray, rows: int, rng: np.random.Generator) -> Batch:
    """The largest of many micro-batches, in each respect."""
    sizes = np.concatenate([item.sizes for item in found])
    chances = np.concatenate(
        [np.full(len(item.sizes), s / len(item.sizes)) for item, s in zip(found, shares, strict=True)]
    )
    drawn = sizes[rng.choice(len(sizes), (DRAWN_BATCHES, rows), p=chances / chances.sum())]
    supervised, masks, images = (int(drawn[..., i].sum(axis=1).max()) for i in (SUPERVISED, MASKS, IMAGES))
    return Batch(rows, rows * math.ceil(drawn[..., TOKENS].max()), supervised, masks, images)
