"""`mglmm train CONFIG.yaml [--key value ...]`: one run from a YAML file, stage by stage, resumable."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

import numpy as np
import torch
import yaml
from datasets import Dataset, concatenate_datasets, load_dataset
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from transformers import set_seed

from mglmm.modeling_mglmm import MglmmForConditionalGeneration
from mglmm.processing import MglmmProcessor
from mglmm.processing.uscdf import PHRASE_END, PHRASE_START, SEG_TOKEN

from .curves import plot_curves
from .data_collator import MglmmDataCollator
from .feature_cache import FeatureCache
from .mask_warmup import (
    MaskWarmup,
    MaskWarmupCollator,
    MaskWarmupTrainer,
    phrase_states,
    phrase_words,
    phrases_of,
    standardise_prompts,
    words_of_images,
)
from .mglmm_trainer import MglmmTrainer, add_adapter
from .training_args import MglmmTrainingArguments

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class DataConfig:
    """
    Args:
        path (`str`): Folder or hub id of a USCDF dataset.
        name (`str`, *optional*, defaults to `"default"`), split (`str`, *optional*, defaults to `"train"`)
        task_weights (`dict`, *optional*): Share of the rows per `task`; a task that is not named is left out. All rows
            alike if unset.
    """

    path: str
    name: str = "default"
    split: str = "train"
    task_weights: dict[str, float] = field(default_factory=dict)


@dataclass
class RunConfig:
    """
    Args:
        model (`str`): Folder or hub id of the model to start from.
        data (`list[DataConfig]`): What to train on.
        training (`dict`): Fields of `MglmmTrainingArguments`.
        mask_warmup (`dict`, *optional*): Fields of `MglmmTrainingArguments` for a first stage that trains neck and mask
            decoder alone (see `mask_warmup.py`), plus `masks_per_image`. Needs `training.cache_image_features`.
        adapter (`str`, *optional*): Folder of an adapter of the same model to go on from; what it lacks starts fresh.
        language_model_dtype (`str`, *optional*, defaults to `"float32"`): Of the frozen language-model weights.
    """

    model: str
    data: list[DataConfig]
    training: dict[str, Any]
    mask_warmup: dict[str, Any] | None = None
    adapter: str | None = None
    language_model_dtype: str = "float32"


def read_config(path: str | Path, overrides: list[str]) -> RunConfig:
    """
    The run of a YAML file with `--key value` (dotted for nested keys: `--training.max_steps 10`) laid over it.

    Raises `ValueError` naming the nearest right key for a misspelt one.
    """
    values = yaml.safe_load(Path(path).read_text())
    if not isinstance(values, dict):
        raise ValueError(f"{path} is not a mapping of settings")
    if len(overrides) % 2:
        raise ValueError(f"settings come as --key value pairs, got {' '.join(overrides)!r}")
    for key, text in zip(overrides[::2], overrides[1::2], strict=True):
        target = values
        *parents, last = key.removeprefix("--").split(".")
        for parent in parents:
            target = target[int(parent)] if isinstance(target, list) else target.setdefault(parent, {})
            if not isinstance(target, dict | list):
                raise ValueError(f"{key}: {parent} is {target!r} in {path} and has no settings of its own")
        target[last] = yaml.safe_load(text)
    _check_keys(values, RunConfig, str(path))
    data = values["data"] if isinstance(values["data"], list) else [values["data"]]
    for item in data:
        _check_keys(item, DataConfig, f"{path}: data")
    for stage in ("training", "mask_warmup"):
        known = [f.name for f in fields(MglmmTrainingArguments)] + ["masks_per_image"] * (stage == "mask_warmup")
        if stage == "training" or values.get(stage) is not None:
            _check_names(values[stage], known, f"{path}: {stage}")
    config = RunConfig(**{**values, "data": [DataConfig(**item) for item in data]})
    if config.language_model_dtype not in DTYPES:
        raise ValueError(
            f"{path}: language_model_dtype is {config.language_model_dtype!r}; choose from {', '.join(DTYPES)}"
        )
    return config


def _check_keys(values: dict[str, Any], kind: type, where: str) -> None:
    _check_names(values, [f.name for f in fields(kind)], where)
    required = {"model", "data", "training"} if kind is RunConfig else {"path"}
    if missing := sorted(required - set(values)):
        raise ValueError(f"{where}: {', '.join(missing)} missing")


def _check_names(values: Any, known: list[str], where: str) -> None:
    if not isinstance(values, dict):
        raise ValueError(f"{where} must be a mapping of settings, got {values!r}")
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0)[0]
            raise ValueError(f"{where}: there is no setting {key!r}; did you mean {near!r}?")


def _training_arguments(values: dict[str, Any]) -> MglmmTrainingArguments:
    values, types = dict(values), get_type_hints(MglmmTrainingArguments)
    for key, value in values.items():
        kinds = set(get_args(types[key]) or [types[key]])
        if isinstance(value, str) and kinds <= {bool, int, float, NoneType}:
            try:
                values[key] = float(value) if float in kinds else int(value)  # YAML 1.1 reads 1e-3 as text
            except ValueError:
                wanted = " or ".join(sorted(kind.__name__ for kind in kinds))
                raise ValueError(f"setting {key} must be {wanted}, got {value!r}") from None
    return MglmmTrainingArguments(**values)


def load_rows(config: DataConfig, seed: int) -> Dataset:
    """
    Rows of one dataset; with task weights, every task repeated or thinned to its share of the given weights.

    Adds the column `length`, characters of the messages, for `training.train_sampling_strategy: group_by_length`.
    """
    dataset = load_dataset(config.path, config.name, split=config.split)
    if len(dataset) == 0:
        raise ValueError(f"{config.path} ({config.name}, {config.split}) has no rows")
    lengths = [sum(len(message["content"]) for message in messages) for messages in dataset["messages"]]
    dataset = dataset.add_column("length", lengths)
    if not config.task_weights:
        return dataset
    tasks, rng = np.array(dataset["task"]), np.random.default_rng(seed)
    rows_of = {task: np.flatnonzero(tasks == task) for task in config.task_weights}
    for task, weight in config.task_weights.items():
        if len(rows_of[task]) == 0 or weight <= 0:
            raise ValueError(
                f"{config.path}: task {task!r} has weight {weight} and {len(rows_of[task])} rows; drop it from task_weights"
            )
    total, parts = sum(config.task_weights.values()), []
    for task, rows in rows_of.items():
        count = round(len(dataset) * config.task_weights[task] / total)
        parts.append(np.concatenate([rng.permutation(rows) for _ in range(-(-count // len(rows)))])[:count])
    return dataset.select(np.sort(np.concatenate(parts)))


def warm_up(
    model: MglmmForConditionalGeneration,
    processor: MglmmProcessor,
    dataset: Dataset,
    cache: FeatureCache,
    args: MglmmTrainingArguments,
    masks_per_image: int,
    output_dir: Path,
) -> None:
    """First stage; its result is kept in `output_dir`, so that a run started again does not repeat it."""
    result = output_dir / "mask_warmup.safetensors"
    if not result.is_file():
        phrases = [phrase for messages in dataset["messages"] for phrase in phrases_of(messages)]
        states, words = phrase_states(model, processor, phrases), phrase_words(model, processor, phrases)
        image_words = words_of_images(dataset)
        standardise_prompts(model, states.values())
        with_masks = dataset.select(np.flatnonzero([len(masks) > 0 for masks in dataset["masks"]]))
        collator = MaskWarmupCollator(processor, states, words, image_words, cache, masks_per_image, args.mask_size)
        vocabulary = phrase_words(model, processor, collator.vocabulary)
        rows = [vocabulary[word] for word in collator.vocabulary]
        wrapper = MaskWarmup(model, torch.stack(rows) if rows else torch.zeros(0, len(next(iter(words.values())))))
        trainer = MaskWarmupTrainer(model=wrapper, args=args, train_dataset=with_masks, data_collator=collator)
        trainer.train(resume_from_checkpoint=_last_checkpoint(Path(str(args.output_dir))))
        _write_log(trainer.state.log_history, output_dir, "mask_warmup")
        partial = result.with_suffix(".partial")
        save_file({n: p.detach() for n, p in model.named_parameters() if p.requires_grad}, partial)
        partial.replace(result)
    model.load_state_dict(load_file(result), strict=False)


def _last_checkpoint(folder: Path) -> str | None:
    """The last complete one: `trainer_state.json` is written last."""
    states = folder.glob("checkpoint-*/trainer_state.json")
    return max((str(state.parent) for state in states), key=lambda name: int(name.rpartition("-")[2]), default=None)


def _write_log(history: list[dict[str, Any]], output_dir: Path, stage: str) -> None:
    (output_dir / f"{stage}_log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in history))
    plot_curves(history, output_dir / f"{stage}_curves.png", title=stage.replace("_", " "))


def run(config: RunConfig) -> Path:
    """Trains as `config` says; returns the folder with the adapter. Started again, it continues where it stopped."""
    args = _training_arguments(config.training)
    output_dir = Path(str(args.output_dir))
    if config.mask_warmup is not None:
        if args.cache_image_features is None:
            raise ValueError("mask_warmup works on cached features: set training.cache_image_features to a folder")
        warmup = {"output_dir": str(output_dir / "mask_warmup"), **config.mask_warmup}
        masks_per_image = warmup.pop("masks_per_image", 3)
        warmup_args = _training_arguments(warmup)
    output_dir.mkdir(parents=True, exist_ok=True)
    print(f"processes: {args.world_size}, device: {args.device}, output: {output_dir}", flush=True)

    processor = MglmmProcessor.from_pretrained(config.model)
    model = MglmmForConditionalGeneration.from_pretrained(config.model)
    model.to(args.device)  # type: ignore[arg-type]
    parts = [load_rows(data, args.seed) for data in config.data]
    dataset = concatenate_datasets(parts)
    print(f"{len(dataset)} rows", flush=True)

    cache = None
    if args.cache_image_features is not None:
        cache = FeatureCache(args.cache_image_features, model, processor)
        for part in parts:  # one by one: two datasets may give the same id to different pictures
            first_rows = np.unique(np.array(part["image_id"]), return_index=True)[1]
            pictures = part.select(first_rows)
            cache.fill(model, processor, (row["image"] for row in pictures), total=len(pictures))
    if config.mask_warmup is not None and cache is not None:
        warm_up(model, processor, dataset, cache, warmup_args, masks_per_image, output_dir)

    dtype = DTYPES[config.language_model_dtype]
    model.model.language_model.to(dtype)
    model.lm_head.to(dtype)
    model.tie_weights()
    new_tokens = processor.tokenizer.convert_tokens_to_ids([PHRASE_START, PHRASE_END, SEG_TOKEN])
    set_seed(args.seed)  # here, so that LoRA starts alike whether or not the first stage ran in this process
    peft_model = add_adapter(model, args, new_tokens)
    if config.adapter is not None:
        weights = load_file(Path(config.adapter) / SAFETENSORS_WEIGHTS_NAME)
        if unknown := sorted(weights.keys() - get_peft_model_state_dict(peft_model).keys()):
            raise ValueError(
                f"{config.adapter} holds {len(unknown)} weights that this run does not train: {unknown[:3]} ..."
            )
        set_peft_model_state_dict(peft_model, weights)
    collator = MglmmDataCollator(processor, args.mask_size, cache)
    trainer = MglmmTrainer(model=peft_model, args=args, train_dataset=dataset, data_collator=collator)
    trainer.train(resume_from_checkpoint=_last_checkpoint(output_dir))
    trainer.save_model(str(output_dir))
    processor.save_pretrained(output_dir)
    _write_log(trainer.state.log_history, output_dir, "training")
    return output_dir


def main(arguments: list[str]) -> None:
    """`arguments`: the YAML file, then overrides."""
    if not arguments:
        raise ValueError("usage: mglmm train CONFIG.yaml [--key value ...]")
    folder = run(read_config(arguments[0], arguments[1:]))
    print(f"adapter, log and curves: {folder}")
