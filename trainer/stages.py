"""The stages before the last: their results are kept, so that a run started again does not repeat them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from mglmm.modeling_mglmm import MglmmForConditionalGeneration
from mglmm.processing import MglmmProcessor

from .answer_warmup import AnswerCollator, AnswerWarmup, ImageConversations, deciding_tokens
from .checkpoints import last_checkpoint
from .config import STAGES, training_arguments
from .curves import write_log
from .data_collator import MglmmDataCollator
from .feature_cache import FeatureCache
from .interruption import StopOnSigterm
from .mask_stage import (
    MaskCollator,
    MaskImages,
    MaskPath,
    conversation_states,
    draw_conversations,
)
from .mask_warmup import (
    MaskWarmup,
    MaskWarmupCollator,
    phrase_states,
    phrase_words,
    phrases_of,
    standardise_prompts,
    words_of_images,
)
from .mixture import Mixture
from .stage_trainer import StageTrainer
from .training_args import MglmmTrainingArguments

NAMES = tuple(STAGES)


def split_settings(stage: str, values: dict[str, Any]) -> tuple[MglmmTrainingArguments, dict[str, Any]]:
    """The training arguments of a stage, and its own settings beside them."""
    own = {name: values[name] for name in STAGES[stage] if name in values}
    return training_arguments({name: value for name, value in values.items() if name not in own}), own


def check_sources(rows: Iterable[Dataset], named: Iterable[str], setting: str) -> None:
    """Raises `ValueError` if a setting names a source that no row has."""
    sources = {source for part in rows for source in part.unique("source")}
    if unknown := sorted(set(named) - sources):
        raise ValueError(
            f"{setting} names {', '.join(unknown)}, of which there is no row (sources: {', '.join(sorted(sources))})"
        )


def mask_warmup(
    model: MglmmForConditionalGeneration,
    processor: MglmmProcessor,
    rows: Dataset,
    cache: FeatureCache,
    args: MglmmTrainingArguments,
    own: dict[str, Any],
    *,
    output_dir: Path,
) -> None:
    """Trains the mask path of `model` (see `mask_warmup.py`), or loads what an earlier run made of it."""
    masks_per_image = own.get("masks_per_image", 3)
    result = output_dir / "mask_warmup.safetensors"
    if not result.is_file():
        phrases = [phrase for messages in rows["messages"] for phrase in phrases_of(messages)]
        states = phrase_states(model, processor, phrases, own.get("answers", "uscdf"))
        words = phrase_words(model, processor, phrases)
        image_words = words_of_images(rows)
        standardise_prompts(model, states.values())
        with_masks = rows.select(np.flatnonzero([len(masks) > 0 for masks in rows["masks"]]))
        collator = MaskWarmupCollator(processor, states, words, image_words, cache, masks_per_image, args.mask_size)
        vocabulary = phrase_words(model, processor, collator.vocabulary)
        vectors = [vocabulary[word] for word in collator.vocabulary]
        wrapper = MaskWarmup(
            model, torch.stack(vectors) if vectors else torch.zeros(0, len(next(iter(words.values()))))
        )
        _train(StageTrainer(wrapper, args, collator, with_masks), model, result)
    model.load_state_dict(load_file(result), strict=False)


def answer_warmup(
    model: PeftModel,
    processor: MglmmProcessor,
    rows: Dataset,
    cache: FeatureCache,
    args: MglmmTrainingArguments,
    own: dict[str, Any],
    *,
    output_dir: Path,
) -> None:
    """Trains LoRA and the image projector of `model` (see `answer_warmup.py`), or loads what an earlier run made."""
    result = output_dir / "answer_warmup.safetensors"
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not result.is_file():
        source_repeats = own.get("source_repeats", {})
        check_sources([rows], source_repeats, "answer_warmup.source_repeats")
        images = ImageConversations(rows, source_repeats)
        decision = deciding_tokens(processor, images.openings)
        wrapper = AnswerWarmup(model, decision)
        collator = AnswerCollator(processor, cache, decision, own.get("conversations_per_image", 16))
        _train(StageTrainer(wrapper, args, collator, images), model, result)
    model.load_state_dict(load_file(result), strict=False)
    for parameter in trainable:
        parameter.requires_grad_(True)


def mask_path(
    model: PeftModel,
    collator: MglmmDataCollator,
    rows: Mixture,
    cache: FeatureCache,
    args: MglmmTrainingArguments,
    own: dict[str, Any],
    *,
    seed: int,
    output_dir: Path,
) -> None:
    """
    Trains the mask path of `model` (see `mask_stage.py`), or loads what an earlier run made of it.

    `collator` is that of the joint stage, `seed` that of the run.
    """
    result = output_dir / "mask_path.safetensors"
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not result.is_file():
        source_weights, phrase_weights = own.get("source_weights", {}), own.get("phrase_weights", {})
        check_sources(rows.datasets, source_weights, "mask_path.source_weights")
        numbers = draw_conversations(rows, own.get("conversations", 6000), seed)
        states = conversation_states(model, rows, collator, numbers, Path(str(args.output_dir)) / "states")
        draws = args.max_steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        images = MaskImages(rows, states, source_weights, phrase_weights, draws, seed)
        of_images = MaskCollator(collator.processor, cache, own.get("masks_per_image", 5), args.mask_size)
        _train(StageTrainer(MaskPath(model), args, of_images, images), model, result)
    model.load_state_dict(load_file(result), strict=False)
    for parameter in trainable:
        parameter.requires_grad_(True)


def _train(trainer: StageTrainer, model: nn.Module, result: Path) -> None:
    sigterm = StopOnSigterm()
    trainer.add_callback(sigterm)
    trainer.train(resume_from_checkpoint=last_checkpoint(Path(str(trainer.args.output_dir))))
    sigterm.raise_if_received(trainer)
    if not trainer.is_world_process_zero():
        trainer.accelerator.wait_for_everyone()
        return
    write_log(trainer.state.log_history, result.parent, result.stem)
    partial = result.with_suffix(".partial")
    save_file({n: p.detach().contiguous() for n, p in model.named_parameters() if p.requires_grad}, partial)
    partial.replace(result)
    trainer.accelerator.wait_for_everyone()
