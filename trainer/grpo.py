"""
`mglmm grpo CONFIG.yaml [--key value ...]`: the answers of a trained model, improved by rewards with TRL's GRPO.

GRPO trains LoRA on the language model and nothing else. What it optimises, the probability of the sampled text, does not
depend on the mask path, which so gets no gradient; it stays as it was trained, and a changed `[SEG]` state has to suit it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from peft import LoraConfig
from peft.utils import CONFIG_NAME
from transformers import set_seed

from mglmm.modeling_mglmm import MglmmForConditionalGeneration
from mglmm.processing import MglmmProcessor
from mglmm.processing.uscdf import conversation_of, count_seg, validate_row

from .checkpoints import last_checkpoint
from .config import DTYPES, DataConfig, check_names, check_present, read_data, read_yaml, training_arguments
from .curves import write_log
from .interruption import StopOnSigterm
from .mixture import Mixture, MixtureSampler, load_mixture
from .rewards import CaptionCider, CountMatch, MaskIoU, PhrasesHaveMasks, WellFormed, captions_of
from .training_args import MglmmTrainingArguments

try:
    from trl import GRPOConfig, GRPOTrainer
except ImportError as error:
    raise ImportError("GRPO runs on trl, which is missing: run `pip install mglmm[trl]`") from error

REWARDS = ("well_formed", "phrases_have_masks", "count_match", "mask_iou", "caption_cider")
CORPUS_SIZE = 20_000  # captions of each dataset that weigh the words of caption_cider


@dataclass
class MglmmGRPOConfig(GRPOConfig):
    r"""
    [`~trl.GRPOConfig`] with the adapter that it trains.

    Parameters that control what is trained:
        lora_r (`int`, *optional*, defaults to 16): Rank of LoRA on the language model.
        lora_alpha (`int`, *optional*, defaults to 32)
        lora_dropout (`float`, *optional*, defaults to 0.0): Answers are sampled without it, so it makes them off-policy.
        lora_target (`str`, *optional*): Anchored pattern of the linear layers that get LoRA; by default that of
            `MglmmTrainingArguments`.
    """

    lora_r: int = field(default=16, metadata={"help": "Rank of LoRA on the language model."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of LoRA."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout of LoRA."})
    lora_target: str = field(
        default=MglmmTrainingArguments.lora_target, metadata={"help": "Layers that get LoRA (regex)."}
    )


@dataclass
class GRPORunConfig:
    """
    Args:
        model (`str`): Folder or hub id of a trained model; an adapter is merged into its model before.
        data (`list[DataConfig]`): What to ask: of each row drawn, one of its user turns.
        rewards (`dict`): Weight of each reward of `REWARDS` (see `rewards.py`); one that is not named is not computed.
        training (`dict`): Fields of `MglmmGRPOConfig`; `reward_weights` come from `rewards`.
        rows_per_epoch (`int`, *optional*): Rows drawn from the mixture; by default the sum of their numbers.
        language_model_dtype (`str`, *optional*, defaults to `"float32"`): Of the frozen language-model weights.
    """

    model: str
    data: list[DataConfig]
    rewards: dict[str, float]
    training: dict[str, Any]
    rows_per_epoch: int | None = None
    language_model_dtype: str = "float32"


class MglmmGRPOTrainer(GRPOTrainer):
    """TRL's trainer, which by itself passes all that a processor returns on to its log-probability pass, and fails."""

    def _get_per_token_logps_and_entropies(
        self, *args: Any, sam_pixel_values: Any = None, original_sizes: Any = None, **kwargs: Any
    ) -> Any:
        return super()._get_per_token_logps_and_entropies(*args, **kwargs)


def read_grpo_config(path: str | Path, overrides: list[str]) -> GRPORunConfig:
    """
    The run of a YAML file with `--key value` (dotted for nested keys: `--data.weight 3`) laid over it; of `training` the
    name alone will do: `--max_steps 10`.

    Raises `ValueError` naming the nearest right key for a misspelt one.
    """
    known = [f.name for f in fields(MglmmGRPOConfig) if f.name != "reward_weights"]
    run_names = [f.name for f in fields(GRPORunConfig)]
    values = read_yaml(path, overrides, [name for name in known if name not in run_names])
    check_names(values, run_names, str(path))
    check_present(values, ("model", "data", "rewards", "training"), str(path))
    values["data"] = read_data(values["data"], f"{path}: data")
    check_names(values["rewards"], list(REWARDS), f"{path}: rewards")
    check_names(values["training"], known, f"{path}: training")
    config = GRPORunConfig(**values)
    for name, weight in config.rewards.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or weight <= 0:
            raise ValueError(f"{path}: the weight of reward {name} is {weight!r}; give a number above 0, or drop it")
    if not config.rewards:
        raise ValueError(f"{path}: rewards is empty; choose from {', '.join(REWARDS)}")
    if config.language_model_dtype not in DTYPES:
        raise ValueError(
            f"{path}: language_model_dtype is {config.language_model_dtype!r}; choose from {', '.join(DTYPES)}"
        )
    return config


def grpo_arguments(values: dict[str, Any], reward_weights: list[float]) -> MglmmGRPOConfig:
    """`MglmmGRPOConfig` of a YAML mapping."""
    args = training_arguments({**values, "reward_weights": reward_weights}, MglmmGRPOConfig)
    if args.lora_r < 1:
        raise ValueError(f"training.lora_r is {args.lora_r}: GRPO trains LoRA only, so it must be at least 1")
    return args


def questions_of(mixture: Mixture, args: MglmmGRPOConfig, rows_per_epoch: int | None = None) -> list[int]:
    """
    Numbers of the rows of a mixture that a run asks, from its first step to its last: as [`MixtureSampler`] draws them,
    epoch after epoch, for `args.max_steps` or else `args.num_train_epochs`.
    """
    sampler = MixtureSampler(mixture, args.seed, rows_per_epoch)
    count = int(args.num_train_epochs * len(sampler))
    if args.max_steps > 0:
        settings: Any = args  # whose unset fields trl has filled in
        batches = args.max_steps * args.gradient_accumulation_steps
        rounds = math.ceil(batches / (settings.steps_per_generation * settings.num_iterations))
        count = rounds * (settings.generation_batch_size // settings.num_generations)
    return [number for epoch in range(math.ceil(count / len(sampler))) for number in sampler.order(epoch)][:count]


def prompts_of(mixture: Mixture, numbers: list[int], seed: int) -> Dataset:
    """
    What GRPO asks: of each numbered row of a mixture, one user turn, drawn by `seed`, with the turns before it.

    Returns a dataset whose rows are read when they are used, with `prompt` (a conversation with its picture) and the
    columns of the USCDF row but `image`; `messages` and `masks` end with the answer to that turn.
    """
    draws = np.random.default_rng(seed).random(len(numbers))

    def read(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        rows = [asked(mixture[number], draw) for number, draw in zip(batch["number"], batch["draw"], strict=True)]
        return {name: [row[name] for row in rows] for name in rows[0]}

    return Dataset.from_dict({"number": numbers, "draw": draws}).with_transform(read)


def asked(row: dict[str, Any], draw: float) -> dict[str, Any]:
    """
    One turn of a USCDF row as TRL wants it.

    Args:
        row: From a `Mixture`.
        draw: In [0, 1), chooses among the assistant turns.

    Raises:
        ValueError: the row has no picture that can be read, no assistant turn, or is not valid USCDF.
    """
    where = f"{row['dataset']}, row {row['index']}"
    if row["image"] is None:
        raise ValueError(f"{where} has no picture: {row.get('error', 'leave its task out with task_weights')}")
    validate_row(row, row["image"].size[::-1])
    answers = [i for i, message in enumerate(row["messages"]) if message["role"] == "assistant"]
    if not answers:
        raise ValueError(f"{where} has no assistant turn to measure an answer against")
    messages = row["messages"][: answers[int(draw * len(answers))] + 1]
    return {
        "prompt": conversation_of({**row, "messages": messages[:-1]}),
        # Not the column "image": TRL would put it into the prompt a second time.
        **{name: row[name] for name in ("image_id", "source", "task", "ignore_mask", "dataset", "index")},
        "messages": messages,
        "masks": row["masks"][: count_seg(messages)],
    }


def make_rewards(
    names: list[str], model: MglmmForConditionalGeneration, processor: MglmmProcessor, mixture: Mixture, seed: int
) -> list[Any]:
    """The rewards of these names, in order."""

    def corpus() -> Iterator[str]:
        for rows in mixture.datasets:
            texts = rows.select_columns(["messages", "task"]).shuffle(seed)
            yield from islice(captions_of(texts), CORPUS_SIZE)

    makers = {
        "well_formed": lambda: WellFormed(processor),
        "phrases_have_masks": lambda: PhrasesHaveMasks(processor),
        "count_match": lambda: CountMatch(processor),
        "mask_iou": lambda: MaskIoU(model, processor),
        "caption_cider": lambda: CaptionCider(processor, corpus()),
    }
    return [makers[name]() for name in names]


def run_grpo(config: GRPORunConfig) -> Path:
    """
    Trains as `config` says; returns the folder with the adapter. Started again, after a kill or a SIGTERM, it continues
    from its last checkpoint.

    Raises:
        ValueError: the model is an adapter, or the data has a row that cannot be asked (see `asked`).
    """
    if (Path(config.model) / CONFIG_NAME).is_file():
        raise ValueError(
            f"{config.model} is an adapter: GRPO adds its own, so merge it first (`mglmm merge {config.model} FOLDER`) and "
            "name that folder"
        )
    args = grpo_arguments(config.training, list(config.rewards.values()))
    output_dir = Path(str(args.output_dir))
    output_dir.mkdir(parents=True, exist_ok=True)
    print(f"processes: {args.world_size}, device: {args.device}, output: {output_dir}", flush=True)

    processor = MglmmProcessor.from_pretrained(config.model)
    model = MglmmForConditionalGeneration.from_pretrained(config.model)
    dtype = DTYPES[config.language_model_dtype]
    model.model.language_model.to(dtype)
    model.lm_head.to(dtype)
    model.tie_weights()
    model.requires_grad_(False)

    mixture = load_mixture(config.data, args.seed)
    numbers = questions_of(mixture, args, config.rows_per_epoch)
    # One long epoch in this order: TRL's own shuffle starts anew when a run is resumed in a later epoch.
    args.shuffle_dataset, args.num_train_epochs = False, 1
    print(f"{len(numbers)} questions from {len(mixture)} rows", flush=True)
    set_seed(args.seed)
    stop = StopOnSigterm()
    trainer = MglmmGRPOTrainer(
        model=model,
        reward_funcs=make_rewards(list(config.rewards), model, processor, mixture, args.seed),
        args=args,
        train_dataset=prompts_of(mixture, numbers, args.seed),
        processing_class=processor,
        callbacks=[stop],
        peft_config=LoraConfig(
            r=args.lora_r,
            lora_alpha=args.lora_alpha,
            lora_dropout=args.lora_dropout,
            target_modules=args.lora_target,
            task_type="CAUSAL_LM",
        ),
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(output_dir))
    stop.raise_if_received(trainer)
    trainer.save_model(str(output_dir))
    if trainer.is_world_process_zero():
        write_log(trainer.state.log_history, output_dir, "grpo")
    return output_dir


def main(arguments: list[str]) -> None:
    """`arguments`: the YAML file, then overrides."""
    if not arguments:
        raise ValueError("usage: mglmm grpo CONFIG.yaml [--key value ...]")
    try:
        folder = run_grpo(read_grpo_config(arguments[0], arguments[1:]))
        print(f"adapter, log and curves: {folder}")
    except InterruptedError as stop:
        print(stop)
