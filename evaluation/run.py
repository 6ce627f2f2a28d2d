"""The run of a benchmark: ask, score, and write down how the numbers were made."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import PartialState
from huggingface_hub import snapshot_download
from tqdm import tqdm

from mglmm.datasets_scripts.features import FEATURES
from mglmm.evaluation.benchmarks import BENCHMARKS, GENERATE, Benchmark, Mode, plan
from mglmm.evaluation.predictions import Predictions, Question, merge_parts, part_path, predict
from mglmm.evaluation.report import render_report
from mglmm.evaluation.sample import Numbers, Sample
from mglmm.evaluation.scoring import Scorer, make_scorer
from mglmm.evaluation.text_similarity import DEFAULT_ENCODER, ExactSimilarity, TextSimilarity, load_text_similarity
from mglmm.modeling_mglmm import MglmmConfig, MglmmForConditionalGeneration
from mglmm.processing import MglmmProcessor

GENERATION = {"do_sample": False, "num_beams": 1}
PATIENCE = timedelta(days=7)  # of a process that waits for the others
VERSIONS_OF = (
    *("mglmm", "torch", "transformers", "tokenizers", "datasets", "numpy", "pillow"),
    *("pycocotools", "pycocoevalcap", "scipy"),
)


def evaluate(
    model: str | Path | None,
    data: str | Path,
    output: str | Path,
    benchmark: str = "photos",
    split: str | None = None,
    *,
    mode: Mode = "both",
    limit: int | None = None,
    seed: int = 0,
    batch_size: int = 16,
    dtype: str = "float32",
    predictions: str | Path | None = None,
    text_similarity: str | None = None,
) -> dict[str, Any] | None:
    """
    Answer the questions of a benchmark by greedy generation (and by teacher forcing, where the originals did) and score
    the answers.

    The folder `output` gets `predictions.jsonl` (see `predict`), `settings.json`, `results.json` and `report.html`. A second
    run with the same folder answers only what is missing; one with another checkpoint or dataset is refused. Started by
    torchrun or `accelerate launch`, the processes share the questions.

    Args:
        model: Checkpoint folder or hub id; `None` with `predictions`.
        data: Dataset folder (made by `mglmm prepare`) or hub id.
        output: Folder for predictions and results.
        benchmark: One of `BENCHMARKS`.
        split: By default the one that the papers report.
        mode: "clean" is the right metric of generated answers, "parity" the originals' rule, flaws included.
        limit: Ask only so many questions, spread evenly over sources and tasks.
        seed: Chooses the questions of `limit`. Those of a smaller limit are among those of a larger one.
        batch_size: Questions answered at a time.
        dtype: Of the language model and the encoders; the mask path is float32 always.
        predictions: Score this `predictions.jsonl` in place of asking a model.
        text_similarity: "exact", "exact-noun", or a text encoder. By default the originals' encoder and, where that is not
            at hand, "exact-noun", which the results mark.

    Returns:
        What stands in `results.json`: `numbers` by mode, `groups` for "photos", `skipped` and `marked` metrics, counts, and
        how they were made. `None` in processes other than the main one.

    Raises:
        ValueError: unknown benchmark or encoder, data that is not of the benchmark, predictions of other settings or data,
            no question could be asked, or a row cannot be scored.
        FileNotFoundError: there is no such model, data or file of predictions.
    """
    started = time.perf_counter()
    if benchmark not in BENCHMARKS:
        raise ValueError(f"unknown benchmark {benchmark!r}; known: {', '.join(BENCHMARKS)}")
    if (model is None) == (predictions is None):
        raise ValueError(
            "name a model to answer the questions, or --predictions FILE to score answers without one"
            + (", not both" if model is not None else "")
        )
    chosen = BENCHMARKS[benchmark]
    similarity, note = _similarity(chosen, text_similarity)
    scorer = make_scorer(benchmark, chosen, similarity)
    split = split or chosen.split
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=PATIENCE)
    with state.main_process_first():
        rows = datasets.load_dataset(_known(data), chosen.config, split=split)
    if missing := [name for name in FEATURES if name not in rows.column_names]:
        raise ValueError(f"the columns {missing} are missing: is this data that `mglmm prepare` wrote?")
    rows = rows.cast_column("image", datasets.Image(decode=False))  # a broken picture fails alone, see `load_picture`
    output = Path(output)
    device: str | None
    settings = {
        "benchmark": benchmark,
        "split": split,
        "data": str(data),
        "dtype": dtype,
        "generation": GENERATION,
        "max_new_tokens": dict(chosen.max_new_tokens),
        "mask_threshold": 0.0,
    }
    if model is not None:
        questions, settings, answered, device = _ask(
            _known(model), rows, chosen, settings, output, state, batch_size, mode=mode, limit=limit, seed=seed
        )
        file = output / "predictions.jsonl"
    else:
        file = Path(_known(str(predictions)))
        questions = plan(chosen, rows, mode=mode, limit=limit, seed=seed)
        settings = _settings_beside(file, settings, rows)
        answered, device = 0, None
    if not state.is_main_process:
        return None

    output.mkdir(parents=True, exist_ok=True)
    found = Predictions(file)
    absent = _without_answers(questions, found)
    facts = score([q for q in questions if q.protocol not in absent], rows, found, scorer)
    numbers = facts.numbers
    skipped = {f"protocol {name}": "no such predictions in the file" for name in absent} | numbers.skipped
    if mode != "clean" and not chosen.answers_parity and not chosen.forced:
        skipped["parity"] = "none of the originals evaluates these rows"
    results: dict[str, Any] = {
        "numbers": {
            name: values
            for name, values in (("clean", numbers.clean), ("parity", numbers.parity))
            if mode in (name, "both") and values
        },
        "skipped": skipped,
        "marked": note
        | numbers.marked
        | {name: why for name, why in chosen.notes.items() if mode != "clean" or "parity" not in name},
        "mode": mode,
        "settings": settings,
        "limit": limit,
        "seed": seed,
        "batch_size": batch_size,
        "processes": state.num_processes,
        "rows": sum(question.protocol == GENERATE for question in questions) or len(questions),
        "questions": dict(Counter(question.protocol for question in questions)),
        "rows_answered": answered,
        "counts": dict(facts.counts),
        "failures": dict(facts.failures.most_common(10)),
        "seconds": round(time.perf_counter() - started, 1),
        "device": device,
        "versions": _versions(),
    }
    if chosen.family == "photos":
        results["groups"] = numbers.clean
        results["numbers"]["clean"] = numbers.clean["all"]
    write_json(output / "results.json", results)
    render_report(output / "report.html", results, facts.samples, facts.phrases, rows, found)
    return results


# ------------------------------------------------------------------ asking


def _ask(
    model: str,
    rows: datasets.Dataset,
    benchmark: Benchmark,
    settings: dict[str, Any],
    output: Path,
    state: PartialState,
    batch_size: int,
    **choice: Any,
) -> tuple[list[Question], dict[str, Any], int, str]:
    """Questions, settings, how many were answered now, and on which device."""
    with state.local_main_process_first():
        folder = Path(model) if Path(model).is_dir() else Path(snapshot_download(model))
    sees_regions = MglmmConfig.from_pretrained(folder).region_feature_layers is not None
    questions = plan(benchmark, rows, sees_regions=sees_regions, **choice)
    path = output / "predictions.jsonl"
    if state.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
        settings |= {
            "model": model,
            "checkpoint_sha256": _checkpoint_hash(folder),
            "data_sha256": data_hash(rows),
            "regions": "as boxes" if sees_regions else "cropped out of the picture",
        }
        _claim(output / "settings.json", settings)
        merge_parts(path)
    state.wait_for_everyone()
    done = set(Predictions(path)) if path.exists() else set()
    network = MglmmForConditionalGeneration.from_pretrained(folder, dtype=settings["dtype"]).eval().to(state.device)
    answered = predict(
        network,
        MglmmProcessor.from_pretrained(folder),
        rows,
        questions,
        part_path(path, state.process_index),
        done=done,
        batch_size=batch_size,
        process_index=state.process_index,
        num_processes=state.num_processes,
        **settings["generation"],
    )
    state.wait_for_everyone()
    if state.is_main_process:
        merge_parts(path)
        answered = len(set(Predictions(path)) - done)
    return questions, settings, answered, _device_name(network.device)


def _known(name: str | Path) -> str:
    """A folder, file or hub id; what looks like a path must exist."""
    if str(name).startswith(("/", ".", "~")) and not Path(name).expanduser().exists():
        raise FileNotFoundError(f"there is no {str(name)!r}")
    return str(Path(name).expanduser()) if Path(name).expanduser().exists() else str(name)


def _similarity(benchmark: Benchmark, name: str | None) -> tuple[TextSimilarity, dict[str, str]]:
    """How phrases are compared, and a mark where that is not what was to be expected."""
    if benchmark.family != "segcap":
        return ExactSimilarity(), {}
    try:
        return load_text_similarity(name or DEFAULT_ENCODER), {}
    except ValueError as error:
        if name is not None:
            raise
        print(f"{error}. Phrases are compared by their nouns now.", file=sys.stderr)
        return ExactSimilarity(), {"mask_recall": f"phrases compared by their nouns: {DEFAULT_ENCODER} is not at hand"}


def _claim(path: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings of the predictions beside them; refuse a folder with predictions of other settings."""
    if not path.exists():
        write_json(path, settings)
        return
    known = json.loads(path.read_text(encoding="utf-8"))
    # The paths of checkpoint and data may change, their hashes may not.
    different = [name for name in settings if name not in ("model", "data") and settings[name] != known.get(name)]
    if different:
        raise ValueError(
            f"{path.parent} holds predictions made with another {', '.join(different)}: choose another output folder"
        )


def _settings_beside(file: Path, settings: dict[str, Any], rows: datasets.Dataset) -> dict[str, Any]:
    """The settings that predictions were made with, as far as they are known. Raises if they are of other data."""
    settings = {**settings, "model": None, "checkpoint_sha256": None, "predictions_sha256": _file_hash(file).hex()}
    settings["data_sha256"] = data_hash(rows)
    path = file.with_name("settings.json")
    if not path.is_file():
        return settings | {"dtype": None, "generation": None}
    known = json.loads(path.read_text(encoding="utf-8"))
    for name in ("benchmark", "split", "data_sha256"):
        if known.get(name) != settings[name]:
            raise ValueError(f"{file} holds answers for the {name} {known.get(name)!r}, not {settings[name]!r}")
    return settings | {name: value for name, value in known.items() if name != "data"}


# ------------------------------------------------------------------ scoring


@dataclass
class Facts:
    """What scoring gives: the numbers, counts of answers, what failed by reason, and what the report is made from."""

    numbers: Numbers = field(default_factory=Numbers)
    counts: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    samples: list[tuple[Question, float | None]] = field(default_factory=list)
    phrases: dict[str, list[int]] = field(default_factory=dict)  # found, all


def score(questions: Sequence[Question], data: datasets.Dataset, predictions: Predictions, scorer: Scorer) -> Facts:
    """
    Score answers, one after the other.

    Raises:
        ValueError: an answer is missing, belongs to another row, or has masks of another size; or no question could be
            asked at all.
    """
    facts = Facts()
    texts = data.remove_columns("image")
    missing = [question.row for question in questions if question.key not in predictions]
    if missing:
        raise ValueError(f"{len(missing)} of {len(questions)} rows have no prediction, the first is row {missing[0]}")
    for question in tqdm(questions, desc="scoring", unit="question", smoothing=0.05):
        record = predictions[question.key]
        for name in ("image_id", "source", "task"):
            if getattr(question, name) != record.get(name):
                raise ValueError(
                    f"row {question.row} has the {name} {getattr(question, name)!r} but its prediction "
                    f"{record.get(name)!r}: the predictions belong to another dataset"
                )
        facts.counts["answers"] += 1
        if "error" in record:
            facts.counts["failed"] += 1
            facts.failures[record["error"]] += 1
        if question.protocol == GENERATE:
            facts.counts["malformed"] += not record["well_formed"]
            facts.counts["truncated"] += record["truncated"]
        try:
            sample: Sample | None = scorer.update(question, [texts[row] for row in question.rows], record)
        except (ValueError, KeyError) as error:
            raise ValueError(f"row {question.row} cannot be scored: {error}") from error
        if sample is not None:
            facts.samples.append((question, sample.value))
            for phrase, found in sample.phrases:
                tally = facts.phrases.setdefault(" ".join(phrase.split()).casefold(), [0, 0])
                tally[0] += found
                tally[1] += 1
    if facts.counts["failed"] == len(questions):
        raise ValueError(f"none of {len(questions)} questions could be asked, the first: {next(iter(facts.failures))}")
    facts.numbers = scorer.compute()
    values = facts.numbers.values
    facts.samples = [(q, values.get(q.row) if value is None else value) for q, value in facts.samples]
    return facts


def _without_answers(questions: Sequence[Question], predictions: Predictions) -> set[str]:
    """Protocols of which there is no prediction at all."""
    asked, found = {question.protocol for question in questions}, {protocol for protocol, _ in predictions}
    if not asked & found:
        raise ValueError(f"{predictions.path} holds none of the answers to {len(questions)} questions")
    return asked - found


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def _checkpoint_hash(folder: Path) -> str:
    """SHA-256 of weights, configuration, tokenizer and chat template, by file name; a changed model card changes nothing."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".safetensors", ".json", ".jinja"):
            digest.update(path.name.encode() + _file_hash(path))
    return digest.hexdigest()


def _file_hash(path: Path) -> bytes:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def data_hash(data: datasets.Dataset) -> str:
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
        except importlib.metadata.PackageNotFoundError:  # an extra, or a checkout of mglmm that is not installed
            versions[name] = "not installed"
    return versions
