"""The card of a run's output folder, in place of PEFT's empty form."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import ModelCard

from mglmm.hub_cards.cards import model_card
from mglmm.modeling_mglmm import MglmmForConditionalGeneration
from mglmm.processing import MglmmProcessor

from .config import RunConfig, has_joint_stage
from .merging import parents_of, public_name
from .training_args import MASK_MODULES, MglmmTrainingArguments


def run_card(
    model: MglmmForConditionalGeneration,
    processor: MglmmProcessor,
    config: RunConfig,
    args: MglmmTrainingArguments,
    stages: Mapping[str, MglmmTrainingArguments],
) -> ModelCard:
    """
    What the run starts from, trains and reads; `model` still without its adapter. `stages`: arguments of those that come
    before the joint one, in their order.
    """
    bases = list(config.model.values()) if isinstance(config.model, dict) else [config.model]
    in_full = [part for part in args.trained_modules if getattr(model.model, part) is not None]
    lora = [f"LoRA of rank {args.lora_r} on the language model"] if args.lora_r else []
    what = [*lora, *(["the rows of the new tokens"] if args.train_new_tokens else [])]
    whole = "language_model" in in_full
    parts = [*in_full, *(["language_model"] if what and not whole else [])]
    if (args.train_new_tokens or whole) and not model.config.tie_word_embeddings:
        parts.append("lm_head")
    projector = ["multi_modal_projector"] if "multi_modal_projector" in in_full else []
    mask_modules = [part for part in in_full if part in MASK_MODULES]
    of_stages = {
        "mask_warmup": [*mask_modules, *(projector if model.config.share_vision_tower else [])],
        "answer_warmup": [*lora, *projector],
        "mask_path": mask_modules,
    }
    runs = [f"`{name}`: {', '.join(of_stages[name])}; {_length(own, 'images')}" for name, own in stages.items()]
    if joint := has_joint_stage(args):
        runs.append(f"{'Then ' if runs else ''}{', '.join([*what, *in_full])}; {_length(args, 'rows')}")
    data = [
        f"| {public_name(d.path)} | {d.name or 'default'} | {d.split} | {'' if d.weight is None else d.weight} |"
        for d in config.data
    ]
    adapter_only = (
        "This folder holds an adapter, not a whole model: `from_pretrained` and the pipeline put it on its base, "
        f"`{', '.join(map(public_name, bases))}`, and `mglmm merge` makes one checkpoint of the two."
    )
    training = (
        f"Trained: {'. '.join(runs)}. Seed {args.seed}.\n\n| data | configuration | split | weight |\n|---|---|---|---:|\n"
        + "\n".join(data)
        + f"\n\n![Curves of the run]({'training' if joint else [*stages][-1]}_curves.png)"
    )
    card = model_card(
        model,
        processor,
        model_name=Path(str(args.output_dir)).resolve().name,
        base_model=[parent for base in bases for parent in parents_of(base)],
        datasets=[d.path for d in config.data if not Path(d.path).exists()],
        trained=parts,
        training=training,
        limits=[] if whole else [adapter_only],
    )
    if not whole:
        card.data["base_model_relation"] = "adapter"
    return card


def _length(args: MglmmTrainingArguments, unit: str) -> str:
    length = f"{args.max_steps} steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs"
    size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return f"{length} of {size} {unit}, learning rate {args.learning_rate:g}"
