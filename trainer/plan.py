"""
`mglmm train --plan CONFIG.yaml`: what a run trains, how much memory a GPU needs for it (see `memory_estimate.py`) and how
much data it sees. From configurations and the prepared data alone: no weights, no GPU, seconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.commands.config.config_args import load_config_from_file
from torch import nn
from transformers import AutoConfig
from transformers.training_args import OptimizerNames

from mglmm.modeling_mglmm import MglmmConfig, MglmmForConditionalGeneration
from mglmm.modeling_mglmm.configuration_mglmm import CLIP_VIT_LARGE_336, SAM_VIT_HUGE
from mglmm.modeling_mglmm.sam_checkpoint import load_sam_checkpoint
from mglmm.processing import MglmmProcessor
from mglmm.processing.uscdf import CONTROL_TOKENS, PHRASE_END, PHRASE_START, SEG_TOKEN

from .config import DTYPES, STAGES, RunConfig, has_joint_stage, training_arguments
from .memory_estimate import STRATEGIES, ModuleCount, Strategy, count_parameters, estimate_memory
from .plan_data import (
    ASSUMED_ANSWER,
    ASSUMED_MASKS,
    ASSUMED_PROMPT,
    CHARACTERS_PER_TOKEN,
    IMAGES,
    MASKS,
    SUPERVISED,
    TOKENS,
    SampledRows,
    largest_batch,
    shares_of,
)
from .stages import split_settings
from .trainable import make_trainable
from .training_args import MglmmTrainingArguments

# The paper's parts as their authors publish them (the config.json of each), planned without asking the hub.
KNOWN_PARTS: dict[str, dict[str, Any]] = {
    "openai/clip-vit-large-patch14-336": {"model_type": "clip_vision_model", **CLIP_VIT_LARGE_336},
    "lmsys/vicuna-7b-v1.5": {"model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
    "facebook/sam-vit-huge": {"vision_config": SAM_VIT_HUGE},
}
GIB = 2**30


@dataclass
class DatasetPlan:
    """What a run draws from one dataset; the numbers of a row are means."""

    path: str
    rows: int | None  # that the run may draw; `None` if the dataset is not on this machine
    share: float
    drawn: float
    tokens: float
    masks: float

    @property
    def epochs(self) -> float | None:
        return self.drawn / self.rows if self.rows else None


@dataclass
class Plan:
    """
    Args:
        modules: Parameters by the names in `memory_estimate.MODULES`.
        memory: Estimated bytes on each GPU, by what they hold.
        rows_per_step: Rows of one optimizer step over all processes; so are images, tokens (without padding), supervised
            tokens and masks.
        steps: Optimizer steps of the run; `None` if they follow from datasets that are not on this machine.
        missing: Folders of datasets and adapter that are not on this machine: `train` stops there.
        notes: What was assumed, and what will not work.
    """

    strategy: Strategy
    num_processes: int
    modules: dict[str, ModuleCount]
    memory: dict[str, int]
    datasets: list[DatasetPlan]
    rows_per_step: int
    images_per_step: float
    tokens_per_step: float
    supervised_per_step: float
    masks_per_step: float
    steps: int | None
    missing: list[str]
    notes: list[str]

    @property
    def total(self) -> int:
        return sum(count.total for count in self.modules.values())

    @property
    def trainable(self) -> int:
        return sum(count.trainable for count in self.modules.values())

    @property
    def memory_per_gpu(self) -> int:
        return sum(self.memory.values())

    def __str__(self) -> str:
        lines = [f"{'module':<24}{'parameters':>16}{'trainable':>14}{'frozen':>16}  dtype"]
        for name, count in self.modules.items():
            frozen, dtypes = count.total - count.trainable, ", ".join(sorted(count.dtypes))
            lines.append(f"{name:<24}{count.total:>16,}{count.trainable:>14,}{frozen:>16,}  {dtypes}")
        lines.append(f"{'all':<24}{self.total:>16,}{self.trainable:>14,}{self.total - self.trainable:>16,}")
        lines += ["", f"{f'memory per GPU, {self.strategy} on {self.num_processes}':<48}{'GiB':>8}"]
        lines += [f"{name:<48}{size / GIB:>8.2f}" for name, size in self.memory.items()]
        lines.append(f"{'all (estimate)':<48}{self.memory_per_gpu / GIB:>8.2f}")
        width = 2 + max(len(data.path) for data in self.datasets)
        head = f"{'rows':>12}{'share':>8}{'tokens':>8}{'masks':>7}{'drawn':>12}{'epochs':>8}"
        lines += ["", f"{'dataset':<{width}}{head}"]
        for data in self.datasets:
            rows = "not here" if data.rows is None else f"{data.rows:,}"
            epochs = "?" if data.epochs is None else f"{data.epochs:.2f}"
            row = f"{rows:>12}{data.share:>8.1%}{data.tokens:>8.0f}{data.masks:>7.1f}{data.drawn:>12,.0f}{epochs:>8}"
            lines.append(f"{data.path:<{width}}{row}")
        lines += [
            "",
            f"a step: {self.rows_per_step:,} rows, {self.images_per_step:,.0f} images, {self.tokens_per_step:,.0f} tokens "
            f"({self.supervised_per_step:,.0f} supervised), {self.masks_per_step:,.0f} masks",
        ]
        if self.steps is None:
            lines.append("steps: unknown while datasets are missing; training.max_steps would say")
        else:
            rows, tokens = f"{self.steps * self.rows_per_step:,}", f"{self.steps * self.tokens_per_step:,.0f}"
            lines.append(f"{self.steps:,} steps: {rows} rows, {tokens} tokens")
        if self.missing:
            lines.append(f"not on this machine, so that training would stop: {', '.join(self.missing)}")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def plan(config: RunConfig, num_processes: int = 1, strategy: Strategy = "ddp") -> Plan:
    """
    What `config` does on `num_processes` GPUs.

    Args:
        strategy: How the processes share the model. `read_accelerate` reads both from accelerate's file.

    Raises:
        ValueError: a setting that `train` refuses too, an unknown strategy, or data without the wanted split.
        FileNotFoundError: the configuration of the model, or of one of its parts, is neither here nor on the hub.
    """
    if strategy not in STRATEGIES or num_processes < 1:
        raise ValueError(
            f"{strategy!r} on {num_processes} processes: choose from {', '.join(STRATEGIES)}, on 1 or more"
        )
    args = training_arguments({**config.training, "use_cpu": True})  # nothing runs, so any machine will do
    notes: list[str] = []
    processor = _processor(config.model, notes)
    model_config = _model_config(config.model, processor)
    model = _meta_model(model_config, config, processor, args)
    counts = count_parameters(model, config.quantization)

    rng = np.random.default_rng(args.seed)
    found = [SampledRows.of(data, processor, model_config, args.max_length, rng, notes) for data in config.data]
    shares = shares_of(config.data, found, notes)
    rows_per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * num_processes
    epoch = config.rows_per_epoch
    if epoch is None and all(rows.number is not None for rows in found):
        epoch = sum(rows.number or 0 for rows in found)
    steps: int | None = args.max_steps
    if args.max_steps <= 0 and has_joint_stage(args):
        steps = None if epoch is None else math.ceil(math.ceil(epoch / rows_per_step) * args.num_train_epochs)
    means = np.stack([rows.sizes.mean(axis=0) for rows in found])
    per_step = rows_per_step * shares @ means
    datasets = [
        DatasetPlan(
            path=data.path,
            rows=rows.number,
            share=float(share),
            drawn=float(share) * rows_per_step * (steps or 0),
            tokens=float(mean[TOKENS]),
            masks=float(mean[MASKS]),
        )
        for data, rows, share, mean in zip(config.data, found, shares, means, strict=True)
    ]
    wanted = [data.path for data in (*config.data, *config.eval_data)]
    if config.adapter is not None:
        wanted.append(config.adapter)
    missing = [path for path in dict.fromkeys(wanted) if not Path(path).is_dir()]
    if any(rows.number is None for rows in found):
        text, masks = ASSUMED_PROMPT + ASSUMED_ANSWER, ASSUMED_MASKS
        notes.append(f"a row of data that is not here is taken for one image, {text} tokens of text and {masks} masks")
    for stage in STAGES:
        if (values := getattr(config, stage)) is not None:
            own = split_settings(stage, {**values, "use_cpu": True})[0]
            length = f"{own.max_steps:,} steps" if own.max_steps > 0 else f"{own.num_train_epochs:g} epochs"
            images = own.per_device_train_batch_size * own.gradient_accumulation_steps * num_processes
            notes.append(f"the stage {stage} comes before, {length} of {images:,} images")
    if not has_joint_stage(args):
        notes.append("no joint stage follows: the memory is what it would need")
    optimizer = OptimizerNames(args.optim).value
    if not optimizer.startswith("adamw_torch"):
        notes.append(f"optimizer states are counted as those of AdamW in float32, {optimizer} may need less")
    if strategy != "ddp" and (args.bf16 or args.fp16):
        notes.append(
            f"under {strategy}, bf16 or fp16 casts the mask path too, where it fails: add --training.bf16 false (the "
            "language model keeps its language_model_dtype)"
        )
    batch = largest_batch(found, shares, args.per_device_train_batch_size, rng)
    return Plan(
        strategy=strategy,
        num_processes=num_processes,
        modules=counts,
        memory=estimate_memory(model, model_config, counts, args, batch, strategy, num_processes),
        datasets=datasets,
        rows_per_step=rows_per_step,
        images_per_step=float(per_step[IMAGES]),
        tokens_per_step=float(per_step[TOKENS]),
        supervised_per_step=float(per_step[SUPERVISED]),
        masks_per_step=float(per_step[MASKS]),
        steps=steps,
        missing=missing,
        notes=notes,
    )


def read_accelerate(path: str | Path) -> tuple[int, Strategy]:
    """Number of processes and strategy of accelerate's configuration file; `ValueError` if it is none we plan for."""
    config = load_config_from_file(str(path))
    kind = str(config.distributed_type.value)
    stage, version = config.deepspeed_config.get("zero_stage"), config.fsdp_config.get("fsdp_version")
    known: dict[tuple[str, Any], Strategy] = {
        ("NO", None): "ddp",
        ("MULTI_GPU", None): "ddp",
        ("FSDP", 2): "fsdp2",
        ("DEEPSPEED", 2): "zero2",
        ("DEEPSPEED", 3): "zero3",
    }
    key = kind, stage if stage is not None else version
    if key not in known:
        raise ValueError(f"{path} says {kind} {key[1]}; plans are made for {', '.join(STRATEGIES)}")
    return config.num_processes, known[key]


# ---------------------------------------------------------------------- model


def _processor(model: str | dict[str, str], notes: list[str]) -> MglmmProcessor | None:
    name = model["processor"] if isinstance(model, dict) else model
    try:
        return MglmmProcessor.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError):
        notes.append(f"the processor {name} is not here: a token is counted as {CHARACTERS_PER_TOKEN} characters")
        return None


def _model_config(model: str | dict[str, str], processor: MglmmProcessor | None) -> MglmmConfig:
    if not isinstance(model, dict):
        return _read(MglmmConfig, model)
    vision = _part_config(model["vision_tower"])
    if Path(model["sam"]).is_file():
        sam: Any = load_sam_checkpoint(model["sam"], torch.bfloat16).config  # Meta's files hold no configuration
    else:
        sam = _part_config(model["sam"])
    config = MglmmConfig(
        vision_config=vision if isinstance(vision, dict) else getattr(vision, "vision_config", vision),
        text_config=_part_config(model["language_model"]),
        sam_config=sam,
    )
    text: Any = config.text_config
    if processor is None:
        text.vocab_size += len(CONTROL_TOKENS)
    else:
        text.vocab_size = max(text.vocab_size, len(processor.tokenizer))
    return config


def _part_config(name: str) -> Any:
    return dict(KNOWN_PARTS[name]) if name in KNOWN_PARTS else _read(AutoConfig, name)


def _read(kind: Any, name: str) -> Any:
    try:
        return kind.from_pretrained(name)
    except OSError as error:
        raise FileNotFoundError(
            f"the configuration of {name!r} is neither in a folder of that name nor on the hub or in its cache"
        ) from error


def _meta_model(
    config: MglmmConfig, run: RunConfig, processor: MglmmProcessor | None, args: MglmmTrainingArguments
) -> nn.Module:
    """The model as it trains, in its dtypes, without any weights."""
    with torch.device("meta"):
        model = MglmmForConditionalGeneration(config)
    dtype = DTYPES[run.language_model_dtype]
    # As `load_model` of train.py: parts come in one dtype, a model in one piece in its own, but for the language model.
    own = dtype if isinstance(run.model, dict) else config.dtype or torch.float32
    for name, parameter in model.named_parameters():
        if not any(part in name for part in model._keep_in_fp32_modules_strict):
            parameter.data = parameter.data.to(own)
    if run.quantization is None:
        model.model.language_model.to(dtype)
        model.lm_head.to(dtype)
    model.tie_weights()
    tokens = [PHRASE_START, PHRASE_END, SEG_TOKEN]
    if processor is None:
        new_ids = list(range(model.lm_head.out_features))[-len(tokens) :]
    else:
        new_ids = processor.tokenizer.convert_tokens_to_ids(tokens)
    return make_trainable(model, args, new_ids)
