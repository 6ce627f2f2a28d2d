"""Held-out evaluation on the configuration "benchmark" of a prepared dataset: referring, refusals, descriptions."""

from __future__ import annotations

import hashlib
import html
import importlib.metadata
import json
import platform
import random
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import PartialState
from huggingface_hub import snapshot_download

from mglmm.evaluation.metrics import ReferringSegmentationScore, SegCapScore
from mglmm.evaluation.predictions import predict, read_predictions
from mglmm.modeling_mglmm import MglmmForConditionalGeneration
from mglmm.processing import MglmmProcessor, SegCap
from mglmm.processing.rle import decode_mask
from mglmm.processing.uscdf import parse

MAX_NEW_TOKENS = {"object": 48, "part": 48, "absent": 48, "panoptic": 256, "fine": 256}
REFERRING = ("object", "part")
DESCRIPTIONS = ("panoptic", "fine")
# Scored together besides each source alone, by name.
GROUPS = {"fashion+cars": ("clothing-co-parsing", "Car-Parts-Segmentation")}
VERSIONS_OF = ("mglmm", "torch", "transformers", "tokenizers", "datasets", "numpy", "pillow", "pycocotools")


def evaluate(
    model: str | Path,
    data: str | Path,
    split: str = "validation",
    output: str | Path | None = None,
    *,
    limit: int | None = None,
    seed: int = 0,
    batch_size: int = 16,
    dtype: str = "float32",
) -> dict[str, Any]:
    """
    Answer every held-out question by greedy generation and score the answers; mode "clean": nothing is dropped.

    The folder `output` gets `predictions.jsonl` (see `predict`), `settings.json` and `results.json`. A second run with the
    same output folder answers only what is missing; one with another checkpoint or dataset is refused.

    Args:
        model: Checkpoint folder or hub id.
        data: Dataset folder (made by `prepare`) or hub id with the configuration "benchmark".
        output: Folder for predictions and results; without one nothing is kept.
        limit: Evaluate only so many rows, spread evenly over sources and tasks.
        seed: Chooses the rows of `limit`. Those of a smaller limit are among those of a larger one.
        batch_size: Questions answered at a time.
        dtype: Of the language model and the encoders; the mask path is float32 always.

    Returns:
        `groups` (see `score`), and how they were made: `mode`, `settings`, `rows`, `rows_answered` (in this run),
        `seconds` (of this run), `device`, `versions`.

    Raises:
        ValueError: `output` holds predictions of other settings, `limit` is not positive, or a row cannot be evaluated.
    """
    started = time.perf_counter()
    rows_of_split = datasets.load_dataset(str(data), "benchmark", split=split)
    rows = choose_rows(rows_of_split, limit, seed)
    folder = Path(model) if Path(model).is_dir() else Path(snapshot_download(str(model)))
    settings: dict[str, Any] = {
        "model": str(model),
        "checkpoint_sha256": _checkpoint_hash(folder),
        "split": split,
        "data_sha256": _data_hash(rows_of_split),
        "dtype": dtype,
        "generation": {"do_sample": False, "num_beams": 1},
        "max_new_tokens": MAX_NEW_TOKENS,
        "mask_threshold": 0.0,
    }
    with ExitStack() as stack:
        if output is None:
            output = stack.enter_context(tempfile.TemporaryDirectory())
        output = Path(output)
        output.mkdir(parents=True, exist_ok=True)
        _claim(output / "settings.json", settings)

        network = MglmmForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval()
        network.to(PartialState().device)
        answered = predict(
            network,
            MglmmProcessor.from_pretrained(folder),
            rows_of_split,
            rows,
            output / "predictions.jsonl",
            max_new_tokens=MAX_NEW_TOKENS,
            batch_size=batch_size,
            **settings["generation"],
        )
        results = {
            "groups": score(rows_of_split, read_predictions(output / "predictions.jsonl"), rows),
            "mode": "clean",
            "settings": settings,
            "limit": limit,
            "seed": seed,
            "batch_size": batch_size,
            "rows": len(rows),
            "rows_answered": answered,
            "seconds": round(time.perf_counter() - started, 1),
            "device": _device_name(network.device),
            "versions": _versions(),
        }
        _write_json(output / "results.json", results)
    return results


def choose_rows(data: datasets.Dataset, limit: int | None = None, seed: int = 0) -> list[int]:
    """
    Indices of `limit` rows, spread over sources and tasks in proportion, at least one of each if `limit` allows it.

    Raises:
        ValueError: `limit` is not positive.
    """
    if limit is None:
        return list(range(len(data)))
    if limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    strata: dict[tuple[str, str], list[int]] = defaultdict(list)
    for row, stratum in enumerate(zip(data["source"], data["task"], strict=True)):
        strata[stratum].append(row)
    ranked = []
    for stratum, members in sorted(strata.items()):
        random.Random(f"{seed}/{stratum}").shuffle(members)
        ranked += [(rank / len(members), row) for rank, row in enumerate(members)]
    return sorted(row for _, row in sorted(ranked, key=lambda item: item[0])[:limit])


def score(
    data: datasets.Dataset, predictions: Mapping[int, Mapping[str, Any]], rows: Iterable[int]
) -> dict[str, dict[str, Any]]:
    """
    Score predictions against USCDF rows, without a model.

    Args:
        data: The rows that were asked.
        predictions: Of `read_predictions`.
        rows: Indices into `data` to score, each of which must have a prediction.

    Returns:
        For the group "all", those of `GROUPS` that occur, and each source: a dict with
        - `rows`, `malformed`, `truncated`: counts; `well_formed`: share of the answers that keep to the grammar;
        - `object`, `part`: what `ReferringSegmentationScore` computes; the prediction is the union of an answer's masks;
        - `refused`: share of the absent targets answered without any mask; `absent`: their number;
        - `false_refusals`: share of the present targets (object and part) answered without any mask;
        - `panoptic`, `fine`: what `SegCapScore` computes against the masks and phrases of the reference description.
        What a group has no rows for is left out.

    Raises:
        ValueError: a prediction is missing, belongs to another row, or has masks of another size.
    """
    questions = data.remove_columns("image")
    rows = list(rows)
    missing = [row for row in rows if row not in predictions]
    if missing:
        raise ValueError(f"{len(missing)} of {len(rows)} rows have no prediction, the first is row {missing[0]}")
    groups: dict[str, _Group] = defaultdict(_Group)
    for row in rows:
        question, prediction = questions[row], predictions[row]
        for name in ("image_id", "source", "task"):
            if question[name] != prediction[name]:
                raise ValueError(
                    f"row {row} has the {name} {question[name]!r} but its prediction {prediction[name]!r}: the predictions "
                    "belong to another dataset"
                )
        names = ["all", *(name for name, sources in GROUPS.items() if question["source"] in sources)]
        reference = [decode_mask(mask) for mask in question["masks"]]
        answer = SegCap.from_dict(prediction)
        for name in {*names, question["source"]}:
            groups[name].update(question, reference, prediction, answer)
    combined = [name for name in (*GROUPS, "all") if name in groups]
    return {name: groups[name].compute() for name in (*combined, *sorted(groups.keys() - set(combined)))}


class _Group:
    """Scores of the rows of one group."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.referring = {task: ReferringSegmentationScore() for task in REFERRING}
        self.descriptions = {task: SegCapScore() for task in DESCRIPTIONS}

    def update(
        self, question: Mapping[str, Any], reference: list[np.ndarray], prediction: Mapping[str, Any], answer: SegCap
    ) -> None:
        task = question["task"]
        self.counts.update([task, "rows"])
        self.counts["malformed"] += not prediction["well_formed"]
        self.counts["truncated"] += prediction["truncated"]
        if task in DESCRIPTIONS:
            self.descriptions[task].update(
                [segment.mask for segment in answer.segments],
                [segment.phrase if segment.span else "" for segment in answer.segments],
                [segment.score for segment in answer.segments],
                reference,
                [mention.phrase for mention in parse(question["messages"][-1]["content"]).mentions],
            )
            return
        if not answer.segments:
            self.counts["refused" if task == "absent" else "false refusals"] += 1
        if task in REFERRING:
            shape = answer.image_size
            self.referring[task].update(
                _union([segment.mask for segment in answer.segments], shape), _union(reference, shape)
            )

    def compute(self) -> dict[str, Any]:
        counts = self.counts
        result: dict[str, Any] = {name: counts[name] for name in ("rows", "malformed", "truncated")}
        result["well_formed"] = 1 - counts["malformed"] / counts["rows"]
        result |= {task: value.compute() for task, value in self.referring.items() if counts[task]}
        present = sum(counts[task] for task in REFERRING)
        if counts["absent"]:
            result |= {"absent": counts["absent"], "refused": counts["refused"] / counts["absent"]}
        if present:
            result["false_refusals"] = counts["false refusals"] / present
        return result | {task: value.compute() for task, value in self.descriptions.items() if counts[task]}


def to_markdown(results: Mapping[str, Any]) -> str:
    """The results of `evaluate` as a Markdown table, one column for each group, with how they were made below."""
    groups = results["groups"]
    lines: list[list[str]] = [["", *(_plain(name) for name in groups)], ["---", *["---:"] * len(groups)]]

    def add(title: str, style: str, *path: str) -> None:
        cells = []
        for group in groups.values():
            value: Any = group
            for key in path:
                value = value.get(key, {})
            cells.append("–" if value == {} else format(value, style))
        if set(cells) != {"–"}:
            lines.append([title, *cells])

    add("rows", ",d", "rows")
    for task in REFERRING:
        add(f"{task} gIoU", ".3f", task, "gIoU")
        add(f"{task} cIoU", ".3f", task, "cIoU")
        add(f"{task} P@0.5", ".1%", task, "P@0.5")
    add("absent targets refused", ".1%", "refused")
    add("present targets refused", ".1%", "false_refusals")
    add("well-formed answers", ".1%", "well_formed")
    add("answers cut at the length limit", ",d", "truncated")
    for task in DESCRIPTIONS:
        add(f"{task} mask recall (exact noun)", ".3f", task, "mask_recall")
        add(f"{task} AP50", ".3f", task, "AP50")
        add(f"{task} mIoU over ground truth", ".3f", task, "mIoU_gt")
    settings, versions = results["settings"], results["versions"]
    lengths = ", ".join(f"{task} {length}" for task, length in settings["max_new_tokens"].items())
    subset = "" if results["limit"] is None else f" (a subset, seed {results['seed']})"
    notes = (
        f"{results['rows']:,} rows{subset} of the split {_plain(settings['split'])}, mode {results['mode']}, checkpoint "
        f"`{settings['checkpoint_sha256'][:12]}`, {settings['dtype']}, greedy generation of at most {lengths} tokens; "
        f"{results['rows_answered']:,} rows answered in {results['seconds']:,.0f} s on {_plain(results['device'])}; torch "
        f"{versions['torch']}, transformers {versions['transformers']}."
    )
    return "\n".join([*(f"| {' | '.join(cells)} |" for cells in lines), "", notes, ""])


def _plain(text: str) -> str:
    """Names come from the data: no Markdown or HTML in them."""
    return html.escape(" ".join(text.split())).replace("|", "\\|")


def _union(masks: Sequence[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    union = np.zeros(shape, dtype=bool)
    for mask in masks:
        if mask.shape != shape:
            raise ValueError(f"a mask of shape {mask.shape} belongs to another picture than one of {shape}")
        union |= mask
    return union


def _claim(path: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings of the predictions beside them; refuse a folder with predictions of other settings."""
    if not path.exists():
        _write_json(path, settings)
        return
    known = json.loads(path.read_text(encoding="utf-8"))
    # The path of the checkpoint may change, its hash may not.
    different = [name for name in settings if name != "model" and settings[name] != known.get(name)]
    if different:
        raise ValueError(
            f"{path.parent} holds predictions made with another {', '.join(different)}: choose another output folder"
        )


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def _checkpoint_hash(folder: Path) -> str:
    """SHA-256 of weights, configuration, tokenizer and chat template, by file name; a changed model card changes nothing."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".safetensors", ".json", ".jinja"):
            with open(path, "rb") as file:
                digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _data_hash(data: datasets.Dataset) -> str:
    """SHA-256 of the rows without their pictures."""
    digest = hashlib.sha256()
    for row in data.remove_columns("image"):
        digest.update(json.dumps(row, sort_keys=True).encode())
    return digest.hexdigest()


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({platform.machine()})"


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in VERSIONS_OF:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # of mglmm itself, in a checkout that is not installed
            versions[name] = "not installed"
    return versions
