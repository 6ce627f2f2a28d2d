"""Answers of a model to the questions of a prepared dataset, written as they come, so that a killed run goes on."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from PIL import Image
from tqdm import tqdm

from mglmm.modeling_mglmm import MglmmForConditionalGeneration, MglmmImageFeatures
from mglmm.processing import MglmmProcessor
from mglmm.processing.images import load_image
from mglmm.processing.uscdf import IMAGE_TOKEN, is_well_formed

PICTURES_AT_ONCE = 32  # whose features are held in memory, so that their questions can be batched across pictures


def predict(
    model: MglmmForConditionalGeneration,
    processor: MglmmProcessor,
    data: datasets.Dataset,
    rows: Sequence[int],
    path: str | Path,
    *,
    max_new_tokens: Mapping[str, int],
    batch_size: int = 16,
    **generation_kwargs: Any,
) -> int:
    """
    Append the answers to the questions in `rows` to a JSON Lines file, batch by batch; rows that are there are skipped.

    Each picture is encoded once. Rows are batched across pictures, those with the same `max_new_tokens` together.

    A line holds `row`, `image_id`, `source` and `task` of the question, `well_formed` (`uscdf.is_well_formed`),
    `truncated` (the answer did not end within its `max_new_tokens`) and the fields of `SegCap.to_dict()`: the text, and
    phrases with RLE masks at the size of the upright picture.

    Args:
        data: USCDF rows of one question and one answer each.
        rows: Indices into `data`.
        max_new_tokens: By task.
        batch_size: Rows of one call of `generate`, and pictures encoded at a time.
        generation_kwargs: Passed to `generate`.

    Returns:
        Number of rows answered now.

    Raises:
        ValueError: a row is no single question and answer or of an unknown task, a picture cannot be read, or the file
            holds a broken line other than the last.
    """
    path = Path(path)
    _cut_torn_line(path)
    done = read_predictions(path) if path.exists() else {}
    questions = data.remove_columns(["image", "masks", "regions"])
    pictures: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in sorted(set(rows) - done.keys()):
        question = {"row": row, **questions[row]}
        _check(question, max_new_tokens)
        pictures[question["source"], question["image_id"]].append(question)
    todo = sum(map(len, pictures.values()))

    groups = list(pictures.values())
    with open(path, "ab") as file, tqdm(total=len(set(rows)), initial=len(set(rows)) - todo, unit="row") as bar:
        for start in range(0, len(groups), PICTURES_AT_ONCE):
            group = groups[start : start + PICTURES_AT_ONCE]
            images = [load_image(data[questions[0]["row"]]["image"]) for questions in group]
            features = _encode(model, processor, images, batch_size)
            by_length: dict[int, list[tuple[int, dict[str, Any]]]] = defaultdict(list)
            for index, questions_of_picture in enumerate(group):
                for question in questions_of_picture:
                    by_length[max_new_tokens[question["task"]]].append((index, question))
            for length, asked in sorted(by_length.items()):
                for first in range(0, len(asked), batch_size):
                    batch = asked[first : first + batch_size]
                    settings = {"max_new_tokens": length, **generation_kwargs}
                    records = _answer(model, processor, images, features, batch, settings)
                    file.write("".join(f"{json.dumps(record)}\n" for record in records).encode())
                    file.flush()
                    os.fsync(file.fileno())
                    bar.update(len(batch))
    return todo


def read_predictions(path: str | Path) -> dict[int, dict[str, Any]]:
    """
    The lines that `predict` wrote, by row.

    Raises:
        ValueError: a line is broken, or a row stands there twice.
    """
    records: dict[int, dict[str, Any]] = {}
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                record = json.loads(line)
                row = record["row"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"line {number} of {path} is no prediction ({error}); delete the file or line"
                ) from error
            if row in records:
                raise ValueError(f"line {number} of {path} answers row {row} a second time; delete one of the two")
            records[row] = record
    return records


def _cut_torn_line(path: Path) -> None:
    """Drop a last line that a killed run did not finish."""
    if not path.exists():
        return
    with open(path, "rb+") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)


def _check(question: dict[str, Any], max_new_tokens: Mapping[str, int]) -> None:
    roles = [message["role"] for message in question["messages"]]
    if roles != ["user", "assistant"]:
        raise ValueError(f"row {question['row']} is not one question and one answer but {roles}")
    if question["task"] not in max_new_tokens:
        known = ", ".join(max_new_tokens)
        raise ValueError(f"row {question['row']} is of the task {question['task']!r}, known are {known}")


def _encode(
    model: MglmmForConditionalGeneration, processor: MglmmProcessor, images: list[Image.Image], batch_size: int
) -> MglmmImageFeatures:
    parts = []
    for start in range(0, len(images), batch_size):
        inputs = processor(images=images[start : start + batch_size], return_tensors="pt")
        pixels = {
            name: inputs[name].to(model.device) for name in ("pixel_values", "sam_pixel_values") if name in inputs
        }
        parts.append(model.encode_images(**pixels))
    return MglmmImageFeatures(**{name: torch.cat([part[name] for part in parts]) for name in parts[0]})


def _answer(
    model: MglmmForConditionalGeneration,
    processor: MglmmProcessor,
    images: list[Image.Image],
    features: MglmmImageFeatures,
    batch: list[tuple[int, dict[str, Any]]],
    generation_kwargs: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Records of a batch of (index of the picture, question)."""
    indices = [index for index, _ in batch]
    texts = [question["messages"][0]["content"].replace(IMAGE_TOKEN, "", 1).strip() for _, question in batch]
    conversations = [
        [{"role": "user", "content": [{"type": "image", "image": images[index]}, {"type": "text", "text": text}]}]
        for index, text in zip(indices, texts, strict=True)
    ]
    inputs = processor.apply_chat_template(
        conversations,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "left", "images_kwargs": {"return_pixels": False}},
    ).to(model.device)
    sizes = inputs.pop("original_sizes")
    settings = dict(generation_kwargs)
    grammar = processor.logits_processor(inputs["input_ids"].shape[1], settings["max_new_tokens"])
    grammar.extend(settings.pop("logits_processor", []))  # the caller's have the last word
    outputs = model.generate(
        **inputs,
        image_features=MglmmImageFeatures(**{name: value[indices] for name, value in features.items()}),
        output_masks=True,
        logits_processor=grammar,
        **settings,
    )
    eos = torch.tensor(model.generation_config.eos_token_id, device=outputs.generated_ids.device)
    ended = torch.isin(outputs.generated_ids, eos).any(dim=1).tolist()
    results = processor.post_process_segcap(outputs, sizes, queries=texts)
    return [
        {
            **{name: question[name] for name in ("row", "image_id", "source", "task")},
            "well_formed": is_well_formed(processor.split_pieces(ids)),
            "truncated": not row_ended,
            **result.to_dict(),
        }
        for (_, question), ids, row_ended, result in zip(
            batch, outputs.generated_ids.tolist(), ended, results, strict=True
        )
    ]
