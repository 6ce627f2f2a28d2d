"""Answers of a model to questions about prepared rows, written as they come, so that a killed run goes on."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import torch
from PIL import Image
from tqdm import tqdm

from mglmm.modeling_mglmm import MglmmForConditionalGeneration, MglmmImageFeatures
from mglmm.processing import MglmmProcessor
from mglmm.processing.images import load_image
from mglmm.processing.rle import encode_mask
from mglmm.processing.uscdf import PHRASE_START, count_seg, drop_phrases, is_well_formed

GENERATE = "generate"
Key = tuple[str, int]
"""Protocol and row of a question."""


@dataclass(frozen=True)
class Question:
    """
    One prompt about one picture.

    Attributes:
        row: Number of the (first) row of the data that it is about; unique within its protocol.
        turns: Questions and answers, without `<image>`. The answer to generate is "".
        protocol: `GENERATE`; any other name is one of teacher forcing: the answers are given and masks are read from them.
        rows: Numbers of all rows that hold its ground truth.
        max_new_tokens: Of a generated answer.
        regions: Boxes x1, y1, x2, y2 of the `<region>`s of the turns, in pixels.
        crop: Box in pixels: only this part of the picture is shown.
    """

    row: int
    image_id: str
    source: str
    task: str
    turns: tuple[tuple[str, str], ...]
    rows: tuple[int, ...]
    protocol: str = GENERATE
    max_new_tokens: int = 0
    regions: tuple[tuple[float, ...], ...] = ()
    crop: tuple[float, ...] | None = None

    @property
    def key(self) -> Key:
        return self.protocol, self.row


def predict(
    model: MglmmForConditionalGeneration,
    processor: MglmmProcessor,
    data: datasets.Dataset,
    questions: Iterable[Question],
    path: str | Path,
    *,
    done: Iterable[Key] = (),
    batch_size: int = 16,
    process_index: int = 0,
    num_processes: int = 1,
    **generation_kwargs: Any,
) -> int:
    """
    Append the answers to a JSON Lines file, batch by batch.

    Each picture is encoded once, with `batch_size` of them at a time, whose questions are batched together. Batches depend
    on `questions` and `batch_size` alone, so that the answers do not depend on kills nor on the number of processes.

    A line holds `row`, `image_id`, `source` and `task` of the question and

    - of a generated answer `well_formed` (`uscdf.is_well_formed`), `truncated` (it did not end within its tokens) and the
      fields of `SegCap.to_dict()`: the text, and phrases with RLE masks at the size of the upright picture;
    - of a teacher-forced one `protocol` and `masks`, RLE, in the order of the `[SEG]`s of its turns;
    - where the question could not be asked `error`, and no mask: an unreadable picture, a prompt beyond the context, ….

    Args:
        data: USCDF rows.
        done: Keys that are answered already.
        process_index, num_processes: Which share of the questions to answer; each process has a file of its own.
        generation_kwargs: Passed to `generate`.

    Returns:
        Number of questions answered now.
    """
    questions = list(questions)
    known = set(done)
    todo = {question.key for question in questions} - known
    answered = 0
    with (
        open(path, "ab") as file,
        tqdm(total=len(questions), unit="question", disable=process_index > 0, smoothing=0.05) as bar,
    ):
        for number, chunk in enumerate(_chunks(questions, batch_size)):
            if number % num_processes == process_index and any(q.key in todo for group in chunk for q in group):
                for records in _answer_chunk(model, processor, data, chunk, todo, batch_size, generation_kwargs):
                    file.write("".join(f"{json.dumps(record)}\n" for record in records).encode())
                    file.flush()
                    os.fsync(file.fileno())
                    answered += len(records)
            bar.update(sum(map(len, chunk)))
    return answered


class Predictions(Mapping[Key, dict[str, Any]]):
    """
    What `predict` wrote, read from the file record by record; only where each begins is kept.

    Raises:
        ValueError: a line is broken, or a question is answered twice.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._offsets: dict[Key, int] = {}
        position = 0
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                key = _key_of(line, number, self.path)
                if key in self._offsets:
                    raise ValueError(
                        f"line {number} of {path} answers row {key[1]} a second time; delete one of the two"
                    )
                self._offsets[key] = position
                position += len(line)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        with open(self.path, "rb") as file:
            file.seek(self._offsets[key])
            record: dict[str, Any] = json.loads(file.readline())
        return record

    def __iter__(self) -> Iterator[Key]:
        return iter(self._offsets)

    def __len__(self) -> int:
        return len(self._offsets)


def part_path(path: Path, process_index: int) -> Path:
    """The file of one process, until `merge_parts` joins them in `path`."""
    return path.with_name(f"{path.stem}.part{process_index}{path.suffix}")


def merge_parts(path: Path) -> None:
    """
    Join what all processes wrote, also those of a killed run, sorted by protocol and row. A last line that a kill cut off
    is dropped.

    Raises:
        ValueError: a line other than the last is broken.
    """
    parts = sorted(path.parent.glob(f"{path.stem}.part*{path.suffix}"))
    if not parts:
        return
    places: dict[Key, tuple[Path, int]] = {}
    for part in [path, *parts] if path.exists() else parts:
        position = 0
        with open(part, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.endswith(b"\n"):
                    # A run that was killed while it deleted the parts left lines twice.
                    places.setdefault(_key_of(line, number, part), (part, position))
                position += len(line)
    partial = path.with_suffix(".partial")
    with open(partial, "wb") as merged:
        for _, (part, position) in sorted(places.items()):
            with open(part, "rb") as file:
                file.seek(position)
                merged.write(file.readline())
    partial.replace(path)
    for part in parts:
        part.unlink()


def _key_of(line: bytes, number: int, path: Path) -> Key:
    try:
        record = json.loads(line)
        key = record.get("protocol", GENERATE), record["row"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"line {number} of {path} is no prediction ({error}); delete the file or line") from error
    return key


# ------------------------------------------------------------------ batches

Asked = tuple[int, Question]
"""Index of the picture within its chunk, and what is asked about it."""


def _chunks(questions: Sequence[Question], size: int) -> Iterator[list[list[Question]]]:
    """The questions about each picture, `size` pictures at a time."""
    pictures: dict[Any, list[Question]] = defaultdict(list)
    for question in sorted(questions, key=lambda question: question.row):
        pictures[question.source, question.image_id, question.crop].append(question)
    groups = list(pictures.values())
    for start in range(0, len(groups), size):
        yield groups[start : start + size]


def _answer_chunk(
    model: MglmmForConditionalGeneration,
    processor: MglmmProcessor,
    data: datasets.Dataset,
    chunk: list[list[Question]],
    todo: set[Key],
    batch_size: int,
    generation_kwargs: Mapping[str, Any],
) -> Iterator[list[dict[str, Any]]]:
    """Records of the questions in `todo`, a batch at a time."""
    images: list[Image.Image] = []
    batches: dict[tuple[str, int], list[Asked]] = defaultdict(list)
    for group in chunk:
        try:
            image = load_picture(data[group[0].row]["image"])
            if group[0].crop is not None:
                image = _cropped(image, group[0].crop)
            processor.frame_of(image.size[::-1])
        except ValueError as error:
            yield [_failed(question, error) for question in group if question.key in todo]
            continue
        for question in group:
            batches[question.protocol, question.max_new_tokens].append((len(images), question))
        images.append(image)
    if not images:
        return
    features = _encode(model, processor, images, batch_size)
    for (protocol, length), asked in sorted(batches.items()):
        for start in range(0, len(asked), batch_size):
            batch = asked[start : start + batch_size]
            if all(question.key not in todo for _, question in batch):
                continue
            records = _answer(model, processor, images, features, batch, protocol, length, generation_kwargs)
            yield [record for record, (_, question) in zip(records, batch, strict=True) if question.key in todo]


def load_picture(image: Any) -> Image.Image:
    """The upright picture of a row, whether `datasets` decoded it or not. Raises `ValueError`."""
    if isinstance(image, Mapping):
        image = image["bytes"] if image["bytes"] is not None else image["path"]
    return load_image(image)


def _cropped(image: Image.Image, box: Sequence[float]) -> Image.Image:
    """The pixels that a box touches, at least one."""
    left, top = (min(max(int(side), 0), limit - 1) for side, limit in zip(box[:2], image.size, strict=True))
    right, bottom = (min(max(-int(-side // 1), 1), limit) for side, limit in zip(box[2:], image.size, strict=True))
    return image.crop((left, top, max(right, left + 1), max(bottom, top + 1)))


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
    batch: list[Asked],
    protocol: str,
    max_new_tokens: int,
    generation_kwargs: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """One record for each question; where the batch cannot be asked, its questions are asked one by one."""
    try:
        if protocol == GENERATE:
            return _generate(model, processor, images, features, batch, max_new_tokens, generation_kwargs)
        return _force(model, processor, images, features, batch)
    except ValueError as error:
        if len(batch) == 1:
            return [_failed(batch[0][1], error)]
    settings = (protocol, max_new_tokens, generation_kwargs)
    return [_answer(model, processor, images, features, [asked], *settings)[0] for asked in batch]


def _inputs(
    processor: MglmmProcessor, images: list[Image.Image], batch: list[Asked], padding_side: str, **kwargs: Any
) -> Any:
    """The tensors of a batch of conversations; a turn without an answer is left open."""
    conversations = []
    for index, question in batch:
        conversation: list[dict[str, Any]] = []
        for text, answer in question.turns:
            picture = [] if conversation else [{"type": "image", "image": images[index]}]
            conversation.append({"role": "user", "content": [*picture, {"type": "text", "text": text}]})
            if answer:
                conversation.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        conversations.append(conversation)
    options: dict[str, Any] = {"padding": True, "padding_side": padding_side, "images_kwargs": {"return_pixels": False}}
    if regions := [box for _, question in batch for box in question.regions]:
        options["regions"] = regions
    return processor.apply_chat_template(
        conversations, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs=options, **kwargs
    )


def _features_of(features: MglmmImageFeatures, batch: list[Asked]) -> MglmmImageFeatures:
    indices = [index for index, _ in batch]
    return MglmmImageFeatures(**{name: value[indices] for name, value in features.items()})


def _generate(
    model: MglmmForConditionalGeneration,
    processor: MglmmProcessor,
    images: list[Image.Image],
    features: MglmmImageFeatures,
    batch: list[Asked],
    max_new_tokens: int,
    generation_kwargs: Mapping[str, Any],
) -> list[dict[str, Any]]:
    inputs = _inputs(processor, images, batch, "left", add_generation_prompt=True).to(model.device)
    sizes = inputs.pop("original_sizes")
    length = inputs["input_ids"].shape[1]
    room = min(max_new_tokens, processor.tokenizer.model_max_length - length)
    if room < 1:
        raise ValueError(f"a prompt of {length} tokens fills the context of {processor.tokenizer.model_max_length}")
    settings = dict(generation_kwargs)
    grammar = processor.logits_processor(length, room)
    grammar.extend(settings.pop("logits_processor", []))  # the caller's have the last word
    outputs = model.generate(
        **inputs,
        image_features=_features_of(features, batch),
        output_masks=True,
        logits_processor=grammar,
        max_new_tokens=room,
        **settings,
    )
    eos = torch.tensor(model.generation_config.eos_token_id, device=outputs.generated_ids.device)
    ended = torch.isin(outputs.generated_ids, eos).any(dim=1).tolist()
    results = processor.post_process_segcap(outputs, sizes, queries=[question.turns[-1][0] for _, question in batch])
    return [
        {
            **_facts(question),
            "well_formed": is_well_formed(processor.split_pieces(ids)),
            "truncated": not row_ended,
            **result.to_dict(),
        }
        for (_, question), ids, row_ended, result in zip(
            batch, outputs.generated_ids.tolist(), ended, results, strict=True
        )
    ]


@torch.inference_mode()
def _force(
    model: MglmmForConditionalGeneration,
    processor: MglmmProcessor,
    images: list[Image.Image],
    features: MglmmImageFeatures,
    batch: list[Asked],
) -> list[dict[str, Any]]:
    if PHRASE_START not in processor.control_tokens:  # to such a model tags are letters
        batch = [
            (index, replace(q, turns=tuple((text, drop_phrases(answer)) for text, answer in q.turns)))
            for index, q in batch
        ]
    # Padded at the right, as in training: positions are counted from the left.
    inputs = _inputs(processor, images, batch, "right").to(model.device)
    sizes = inputs.pop("original_sizes").tolist()
    outputs = model(**inputs, image_features=_features_of(features, batch), logits_to_keep=1)
    counts = [count_seg([{"role": "assistant", "content": answer} for _, answer in q.turns]) for _, q in batch]
    records = []
    for (_, question), logits, size in zip(batch, outputs.pred_masks.split(counts), sizes, strict=True):
        masks = processor.post_process_masks(logits, (size[0], size[1]))
        records.append({**_facts(question), "image_size": size, "masks": [encode_mask(mask) for mask in masks]})
    return records


def _facts(question: Question) -> dict[str, Any]:
    facts: dict[str, Any] = {name: getattr(question, name) for name in ("row", "image_id", "source", "task")}
    return facts if question.protocol == GENERATE else {"protocol": question.protocol, **facts}


def _failed(question: Question, error: Exception) -> dict[str, Any]:
    nothing: dict[str, Any] = {"masks": []}
    if question.protocol == GENERATE:
        text = {"text": "", "clean_text": "", "image_size": [1, 1], "segments": []}
        nothing = {"well_formed": False, "truncated": False, **text}
    return {**_facts(question), "error": " ".join(str(error).split()), **nothing}
