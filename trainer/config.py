"""What one training run is: the YAML file that `mglmm train` reads, with every key checked before anything is loaded."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

import torch
import yaml

from .training_args import MglmmTrainingArguments

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PARTS = ("vision_tower", "language_model", "sam", "processor")
QUANTIZATIONS = ("4bit", "8bit")
STAGES = {  # of training before the last; each takes the fields of MglmmTrainingArguments and these
    "mask_warmup": ("masks_per_image", "answers"),
    "answer_warmup": ("conversations_per_image", "source_repeats"),
    "mask_path": ("masks_per_image", "conversations", "source_weights", "phrase_weights"),
}


@dataclass
class DataConfig:
    """
    One USCDF dataset of a mixture.

    Args:
        path (`str`): Folder or hub id of a USCDF dataset.
        name (`str`, *optional*, by default the one that its card calls default), split (`str`, *optional*, defaults to `"train"`)
        weight (`float`, *optional*): Share of the drawn rows relative to the other datasets; its number of rows if unset.
        task_weights (`dict`, *optional*): Share of the rows per `task`; a task that is not named is left out. All rows
            alike if unset.
        task_limits (`dict`, *optional*): At most so many different rows of a task.
    """

    path: str
    name: str | None = None
    split: str = "train"
    weight: float | None = None
    task_weights: dict[str, float] = field(default_factory=dict)
    task_limits: dict[str, int] = field(default_factory=dict)


@dataclass
class RunConfig:
    """
    Args:
        model (`str` or `dict`): Folder or hub id of the model to start from; or the parts of a new one: `vision_tower`,
            `language_model` and `sam` for `from_parts`, and the folder or hub id of its `processor`.
        data (`list[DataConfig]`): What to train on.
        training (`dict`): Fields of `MglmmTrainingArguments`. With `max_steps: 0` the run ends with the stages named below.
        eval_data (`list[DataConfig]`, *optional*): Held-out rows, scored as `training.eval_strategy` says.
        rows_per_epoch (`int`, *optional*): Rows drawn from the mixture per epoch; by default the sum of their numbers.
        streaming (`bool`, *optional*, defaults to `False`): Read the datasets as streams; needs `training.max_steps`.
        mask_warmup (`dict`, *optional*): Fields of `MglmmTrainingArguments` for a first stage that trains neck and mask
            decoder alone (see `mask_warmup.py`), plus `masks_per_image` and `answers` ("uscdf" or "plain": whether the
            answers that it reads repeat the phrase). Needs `training.cache_image_features`.
        answer_warmup (`dict`, *optional*): The same for a second stage that teaches the language model its answers, and to
            tell what is there from what is not (see `answer_warmup.py`), plus `conversations_per_image` and
            `source_repeats` (how often the pictures of a source come in an epoch, 1 where not named).
        mask_path (`dict`, *optional*): The same for a third stage that trains the mask path alone on the frozen language
            model's states (see `mask_stage.py`), plus `masks_per_image` (5), `conversations` (6000, the rows whose states
            are computed), `source_weights` (of pictures, by the source of their rows) and `phrase_weights` (of masks, by
            the last word of their phrase), 1 where not named. Needs `max_steps`.
        adapter (`str`, *optional*): Folder of an adapter of the same model to go on from; what it lacks starts fresh.
        language_model_dtype (`str`, *optional*, defaults to `"float32"`): Of the frozen language-model weights.
        quantization (`str`, *optional*): `"4bit"` or `"8bit"` for the frozen language model (needs bitsandbytes).
    """

    model: str | dict[str, str]
    data: list[DataConfig]
    training: dict[str, Any]
    eval_data: list[DataConfig] = field(default_factory=list)
    rows_per_epoch: int | None = None
    streaming: bool = False
    mask_warmup: dict[str, Any] | None = None
    answer_warmup: dict[str, Any] | None = None
    mask_path: dict[str, Any] | None = None
    adapter: str | None = None
    language_model_dtype: str = "float32"
    quantization: str | None = None


def read_config(path: str | Path, overrides: list[str]) -> RunConfig:
    """
    The run of a YAML file with `--key value` (dotted for nested keys: `--data.weight 3`) laid over it; of `training` the
    name alone will do: `--max_steps 10`.

    Raises `ValueError` naming the nearest right key for a misspelt one.
    """
    known = [f.name for f in fields(MglmmTrainingArguments)]
    run_names = [f.name for f in fields(RunConfig)]
    values = read_yaml(path, overrides, [name for name in known if name not in run_names])
    check_names(values, run_names, str(path))
    check_present(values, ("model", "data", "training"), str(path))
    if isinstance(values["model"], dict):
        check_names(values["model"], list(PARTS), f"{path}: model")
        check_present(values["model"], PARTS, f"{path}: model")
    for key in ("data", "eval_data"):
        values[key] = read_data(values.get(key) or [], f"{path}: {key}")
    check_names(values["training"], known, f"{path}: training")
    for stage, more in STAGES.items():
        if values.get(stage) is not None:
            check_names(values[stage], [*known, *more], f"{path}: {stage}")
    if (answers := (values.get("mask_warmup") or {}).get("answers", "uscdf")) not in ("uscdf", "plain"):
        raise ValueError(f"{path}: mask_warmup: answers is {answers!r}; choose from uscdf, plain")
    if values.get("answer_warmup") is not None:
        check_positive(values["answer_warmup"], ("source_repeats",), f"{path}: answer_warmup", whole=True)
    if values.get("mask_path") is not None:
        check_mask_path(values["mask_path"], f"{path}: mask_path")
    config = RunConfig(**values)
    if not config.data:
        raise ValueError(f"{path}: data names no dataset")
    for key, known_values in (("language_model_dtype", tuple(DTYPES)), ("quantization", (None, *QUANTIZATIONS))):
        if (value := getattr(config, key)) not in known_values:
            choices = ", ".join(str(known) for known in known_values if known is not None)
            raise ValueError(f"{path}: {key} is {value!r}; choose from {choices}")
    return config


def read_yaml(path: str | Path, overrides: list[str], of_training: list[str]) -> dict[str, Any]:
    """
    The mapping of a YAML file with `--key value` pairs laid over it, those of `of_training` over its mapping `training`;
    raises `ValueError` for anything else.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}: name the YAML file of a run")
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} is not a mapping of settings")
    if len(overrides) % 2:
        raise ValueError(f"settings come as --key value pairs, got {' '.join(overrides)!r}")
    for key, text in zip(overrides[::2], overrides[1::2], strict=True):
        target = values
        *parents, last = key.removeprefix("--").split(".")
        if not parents and last in of_training:
            parents = ["training"]
        for parent in parents:
            target = target[int(parent)] if isinstance(target, list) else target.setdefault(parent, {})
            if not isinstance(target, dict | list):
                raise ValueError(f"{key}: {parent} is {target!r} in {path} and has no settings of its own")
        target[last] = yaml.safe_load(text)
    return values


def read_data(values: Any, where: str) -> list[DataConfig]:
    """One mapping or a list of them."""
    items = values if isinstance(values, list) else [values]
    for item in items:
        check_names(item, [f.name for f in fields(DataConfig)], where)
        check_present(item, ("path",), where)
        for name in ("weight", "task_weights", "task_limits"):
            value = item.get(name)
            for number in value.values() if isinstance(value, dict) else [value]:
                if isinstance(number, bool | str | list):
                    raise ValueError(f"{where}: {name} of {item['path']} holds {number!r}, which is no number")
    return [DataConfig(**item) for item in items]


def check_mask_path(values: dict[str, Any], where: str) -> None:
    check_present(values, ("max_steps",), where)  # draws by weight have no epochs
    for name in ("max_steps", "masks_per_image", "conversations"):
        if type(value := values.get(name, 1)) is not int or value < 1:
            raise ValueError(f"{where}: {name} must be a whole number above zero, got {value!r}")
    check_positive(values, ("source_weights", "phrase_weights"), where)


def check_positive(values: dict[str, Any], settings: tuple[str, ...], where: str, whole: bool = False) -> None:
    """Raises `ValueError` if one of the settings is no mapping of names to numbers above zero."""
    number = "whole number" if whole else "number"
    for name in settings:
        weights = values.get(name, {})
        if not isinstance(weights, dict):
            raise ValueError(f"{where}: {name} must be a mapping of names to numbers, got {weights!r}")
        for key, weight in weights.items():
            kinds = int if whole else int | float
            if isinstance(weight, bool) or not isinstance(weight, kinds) or not 0 < weight < math.inf:
                raise ValueError(f"{where}: {name} gives {key!r} {weight!r}, which must be a {number} above zero")


def has_joint_stage(args: MglmmTrainingArguments) -> bool:
    """Whether a joint stage ends the run: all but one that says `max_steps: 0`, which ends with the stage before it."""
    return args.max_steps != 0


def check_present(values: dict[str, Any], required: tuple[str, ...], where: str) -> None:
    if missing := [name for name in required if name not in values]:
        raise ValueError(f"{where}: {', '.join(missing)} missing")


def check_names(values: Any, known: list[str], where: str) -> None:
    if not isinstance(values, dict):
        raise ValueError(f"{where} must be a mapping of settings, got {values!r}")
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0)[0]
            raise ValueError(f"{where}: there is no setting {key!r}; did you mean {near!r}?")


def training_arguments(values: dict[str, Any], kind: Any = MglmmTrainingArguments) -> Any:
    """
    Arguments of the dataclass `kind` from a YAML mapping, whose numbers may have come as text (`1e-3` in YAML 1.1).

    Raises `ValueError` for a number that is none, and where one process sees several GPUs: transformers would split every
    batch over them, tensor by tensor, and masks would part from their rows.
    """
    values, types = dict(values), get_type_hints(kind)
    for key, value in values.items():
        kinds = set(get_args(types[key]) or [types[key]])
        if isinstance(value, str) and kinds <= {bool, int, float, NoneType}:
            try:
                values[key] = float(value) if float in kinds else int(value)
            except ValueError:
                wanted = " or ".join(sorted(kind.__name__ for kind in kinds))
                raise ValueError(f"setting {key} must be {wanted}, got {value!r}") from None
    args = kind(**values)
    if args.n_gpu > 1:
        raise ValueError(
            f"one process sees {args.n_gpu} GPUs: start one for each (torchrun --standalone --nproc_per_node {args.n_gpu} -m "
            "mglmm.cli train ...), or let it see one (CUDA_VISIBLE_DEVICES=0)"
        )
    return args
