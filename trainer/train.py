"""`mglmm train CONFIG.yaml [--key value ...]`: one run from a YAML file, stage by stage, resumable."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import PartialState
from datasets import concatenate_datasets
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig, set_seed

from mglmm.modeling_mglmm import MglmmForConditionalGeneration
from mglmm.processing import MglmmProcessor
from mglmm.processing.uscdf import PHRASE_END, PHRASE_START, SEG_TOKEN

from . import stages
from .checkpoints import last_checkpoint
from .checks import examine
from .config import DTYPES, RunConfig, has_joint_stage, read_config, training_arguments
from .curves import write_log
from .data_collator import MglmmDataCollator
from .doctor import examine_trainable, require
from .feature_cache import FeatureCache
from .interruption import StopOnSigterm
from .mglmm_trainer import MglmmTrainer
from .mixture import Mixture, load_mixture
from .mixture_stream import load_stream
from .run_card import run_card
from .trainable import make_trainable
from .training_args import MASK_MODULES, MglmmTrainingArguments

NEW_TOKENS = [PHRASE_START, PHRASE_END, SEG_TOKEN]
NOT_QUANTIZED = r"(?!model\.language_model\.).*"  # everything but the language model, head included


def load_model(config: RunConfig) -> tuple[MglmmForConditionalGeneration, MglmmProcessor]:
    """
    Model and processor that the run starts from, the language model in its dtype or quantised.

    Raises:
        ValueError: parts are to be quantised.
        ImportError: quantisation without bitsandbytes.
    """
    dtype = DTYPES[config.language_model_dtype]
    if isinstance(config.model, dict):
        if config.quantization is not None:
            raise ValueError("quantization needs a model in one piece: save the model made of the parts first")
        parts = config.model
        processor = MglmmProcessor.from_pretrained(parts["processor"])
        model = MglmmForConditionalGeneration.from_parts(
            parts["vision_tower"], parts["language_model"], parts["sam"], processor, dtype=dtype
        )
        return model, processor
    if config.quantization is not None:
        return _load_quantized(config.model, config.quantization, dtype), MglmmProcessor.from_pretrained(config.model)
    processor = MglmmProcessor.from_pretrained(config.model)
    model = MglmmForConditionalGeneration.from_pretrained(config.model)
    model.model.language_model.to(dtype)
    model.lm_head.to(dtype)
    model.tie_weights()
    return model, processor


def _load_quantized(folder: str, kind: str, dtype: torch.dtype) -> MglmmForConditionalGeneration:
    try:
        from bitsandbytes.nn import Linear4bit
    except ImportError as error:
        raise ImportError("quantization needs bitsandbytes: pip install 'mglmm[quantization]'") from error
    quantization = BitsAndBytesConfig(
        load_in_4bit=kind == "4bit",
        load_in_8bit=kind == "8bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=[NOT_QUANTIZED],
    )
    model = MglmmForConditionalGeneration.from_pretrained(folder, quantization_config=quantization)
    model.model.language_model.to(dtype)  # norms and embeddings; quantised weights stay
    model.lm_head.to(dtype)
    model.tie_weights()
    for module in model.modules():
        if isinstance(module, Linear4bit):
            # On some CPUs it would pack the weights at the first evaluation, after which no gradient passes them.
            module.support_avx512bf16_for_cpu = False
    return model


def fill_cache(
    cache: FeatureCache, model: MglmmForConditionalGeneration, processor: MglmmProcessor, mixtures: list[Mixture]
) -> None:
    """Encodes the pictures that are not there yet, each process its share; unreadable ones are left to the collator."""
    state = PartialState()
    for mixture in mixtures:
        numbers: list[int] = []
        first = 0
        for rows in mixture.datasets:  # one by one: two datasets may give the same id to different pictures
            pictures = [f"{source}/{name}" for source, name in zip(rows["source"], rows["image_id"], strict=True)]
            numbers += (first + np.unique(np.array(pictures), return_index=True)[1]).tolist()
            first += len(rows)
        share = numbers[state.process_index :: state.num_processes]
        images = (image for image in (mixture[number]["image"] for number in share) if image is not None)
        cache.fill(model, processor, images, total=len(share))
    state.wait_for_everyone()


def load_adapter(model: PeftModel, folder: str) -> None:
    """Weights of another run's adapter; what it lacks stays as it is. `ValueError` if it holds others than these."""
    path = Path(folder) / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {SAFETENSORS_WEIGHTS_NAME}: name the output folder of a run")
    weights = load_file(path)
    if unknown := sorted(weights.keys() - get_peft_model_state_dict(model).keys()):
        raise ValueError(f"{folder} holds {len(unknown)} weights that this run does not train: {unknown[:3]} ...")
    set_peft_model_state_dict(model, weights)


def _keep_base(model: MglmmForConditionalGeneration, processor: MglmmProcessor, folder: Path) -> None:
    """A model made of parts is written once, and named, so that its adapter has a base to be put on."""
    if PartialState().is_main_process and not (folder / "config.json").is_file():
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    PartialState().wait_for_everyone()
    model.config._name_or_path = model.name_or_path = str(folder)


def check_run(config: RunConfig, args: MglmmTrainingArguments) -> None:
    """Raises `ValueError` for settings that do not go together, before anything is loaded."""
    for stage in stages.NAMES:
        if getattr(config, stage) is not None:
            if args.cache_image_features is None:
                raise ValueError(f"{stage} works on cached features: set training.cache_image_features to a folder")
            if config.streaming:
                raise ValueError(f"{stage} needs all rows at hand: set streaming to false")
    if not has_joint_stage(args) and not any(getattr(config, stage) is not None for stage in stages.NAMES):
        raise ValueError("training.max_steps is 0 and no stage comes before: nothing would be trained")
    if config.streaming:
        if args.cache_image_features is not None:
            raise ValueError("a stream cannot be encoded beforehand: leave out training.cache_image_features")
        if args.max_steps <= 0:
            raise ValueError("a stream has no end: set training.max_steps")
        if config.rows_per_epoch is not None:
            raise ValueError("a stream has no epochs: leave out rows_per_epoch")
    left_out = ", ".join(sorted(set(MASK_MODULES) - set(args.trained_modules)))
    for stage in ("mask_warmup", "mask_path"):
        if getattr(config, stage) is not None and left_out:
            raise ValueError(f"{stage} trains {left_out}, which the result would lack: name it in trained_modules")
    if config.mask_path is not None and "language_model" in args.trained_modules:
        raise ValueError("mask_path needs a frozen language model: leave language_model out of trained_modules")
    if config.answer_warmup is not None and args.lora_r == 0:
        raise ValueError("answer_warmup trains LoRA: set training.lora_r above 0")
    if config.adapter is not None and "language_model" in args.trained_modules:
        raise ValueError("an adapter cannot be continued in full: merge it first (`mglmm merge`)")
    if args.eval_strategy != "no" and not config.eval_data:
        raise ValueError("training.eval_strategy needs eval_data: name held-out rows")


def run(config: RunConfig) -> Path:
    """
    Trains as `config` says; returns the output folder. Started again, it continues where it stopped.

    Raises:
        ValueError, OSError: one line about a setting, the data or the model.
        InterruptedError: SIGTERM came; the run is saved, and the same command continues it.
    """
    args = training_arguments(config.training)
    check_run(config, args)
    output_dir = Path(str(args.output_dir))
    stage_args = {}
    for stage in stages.NAMES:
        if (values := getattr(config, stage)) is not None:
            stage_args[stage] = stages.split_settings(stage, {"output_dir": str(output_dir / stage), **values})
    output_dir.mkdir(parents=True, exist_ok=True)
    say = PartialState().print
    say(f"processes: {args.world_size}, device: {args.device}, output: {output_dir}", flush=True)

    if config.streaming:
        rows: Any = load_stream(config.data, args.seed, args.process_index, args.world_size)
        say(f"streaming {', '.join(rows.sources)}", flush=True)
    else:
        rows = load_mixture(config.data, args.seed)
        say(f"{len(rows)} rows of {', '.join(rows.sources)}", flush=True)
    held_out = load_mixture(config.eval_data, args.seed) if config.eval_data else None

    model, processor = load_model(config)
    if config.quantization is None:
        model.to(args.device)
    require(examine(model, processor, trained=False))
    cache = None
    if args.cache_image_features is not None:
        cache = FeatureCache(args.cache_image_features, model, processor)
        fill_cache(cache, model, processor, [m for m in (rows, held_out) if m is not None])
        if stage_args:
            all_rows = concatenate_datasets(rows.datasets)
    if "mask_warmup" in stage_args and cache is not None:
        stages.mask_warmup(model, processor, all_rows, cache, *stage_args["mask_warmup"], output_dir=output_dir)

    if isinstance(config.model, dict):
        _keep_base(model, processor, output_dir / "base")
    joint = has_joint_stage(args)
    card = run_card(model, processor, config, args, {stage: own[0] for stage, own in stage_args.items()})
    new_tokens = processor.tokenizer.convert_tokens_to_ids(NEW_TOKENS)
    set_seed(args.seed)  # here, so that LoRA starts alike whether or not the first stage ran in this process
    trained = make_trainable(model, args, new_tokens)
    if config.adapter is not None:
        load_adapter(cast(PeftModel, trained), config.adapter)
    if "answer_warmup" in stage_args and cache is not None:
        settings = stage_args["answer_warmup"]
        stages.answer_warmup(cast(PeftModel, trained), processor, all_rows, cache, *settings, output_dir=output_dir)
    limit = args.max_length or model.config.get_text_config().max_position_embeddings
    collator = MglmmDataCollator(processor, args.mask_size, cache, limit, args.strict)
    if "mask_path" in stage_args and cache is not None:
        settings, where = stage_args["mask_path"], {"seed": args.seed, "output_dir": output_dir}
        stages.mask_path(cast(PeftModel, trained), collator, rows, cache, *settings, **where)
    require(examine_trainable(trained, new_tokens, args))
    for name in ("ce_loss_weight", "bce_loss_weight", "dice_loss_weight"):
        if (weight := getattr(args, name)) is not None:
            setattr(model.config, name, weight)

    sigterm = StopOnSigterm()
    trainer = MglmmTrainer(
        model=trained,
        args=args,
        train_dataset=rows,
        eval_dataset=held_out,
        data_collator=collator,
        rows_per_epoch=config.rows_per_epoch,
        callbacks=[sigterm],
    )
    if joint:
        trainer.train(resume_from_checkpoint=last_checkpoint(output_dir))
        if summary := trainer.skipped_summary():
            say(summary, flush=True)
        sigterm.raise_if_received(trainer)
    trainer.save_model(str(output_dir))
    if trainer.is_world_process_zero():
        processor.save_pretrained(output_dir)
        card.save(output_dir / "README.md")  # in place of PEFT's empty form
        if joint:
            write_log(trainer.state.log_history, output_dir, "training")
    return output_dir


def main(arguments: list[str]) -> None:
    """`arguments`: the YAML file, then overrides."""
    if not arguments:
        raise ValueError("usage: mglmm train CONFIG.yaml [--key value ...]")
    config = read_config(arguments[0], arguments[1:])
    try:
        folder = run(config)
        PartialState().print(f"result, log and curves: {folder}")
    except InterruptedError as stop:
        PartialState().print(str(stop))
    finally:
        gc.collect()
        if torch.distributed.is_initialized():  # its threads now and then abort the interpreter at its exit
            torch.distributed.destroy_process_group()
