"""The card of a run's output folder, in place of PEFT's empty form."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard

from mglmm.hub_cards.cards import model_card
from mglmm.modeling_mglmm import MglmmForConditionalGeneration
from mglmm.processing import MglmmProcessor

from .config import RunConfig
from .merging import parents_of, public_name
from .training_args import MASK_MODULES, MglmmTrainingArguments


def run_card(
    model: MglmmForConditionalGeneration,
    processor: MglmmProcessor,
    config: RunConfig,
    args: MglmmTrainingArguments,
    mask_path: MglmmTrainingArguments | None = None,
) -> ModelCard:
    """
    What the run starts from, trains and reads; `model` still without its adapter. `mask_path`: arguments of that stage, if
    the run ends with it.
    """
    bases = list(config.model.values()) if isinstance(config.model, dict) else [config.model]
    in_full = [part for part in args.trained_modules if getattr(model.model, part) is not None]
    what = [f"LoRA of rank {args.lora_r} on the language model"] if args.lora_r else []
    what += ["the rows of the new tokens"] if args.train_new_tokens else []
    whole = "language_model" in in_full
    parts = [*in_full, *(["language_model"] if what and not whole else [])]
    if (args.train_new_tokens or whole) and not model.config.tie_word_embeddings:
        parts.append("lm_head")
    trained = ", ".join([*what, *in_full])
    last, stage, unit = args, "training", "rows"
    if mask_path is not None:
        trained = f"{', '.join(part for part in in_full if part in MASK_MODULES)} and nothing else"
        last, stage, unit = mask_path, "mask_path", "images"
    length = f"{last.max_steps} steps" if last.max_steps > 0 else f"{last.num_train_epochs:g} epochs"
    rows = last.train_batch_size * last.gradient_accumulation_steps * last.world_size
    data = [
        f"| {public_name(d.path)} | {d.name or 'default'} | {d.split} | {'' if d.weight is None else d.weight} |"
        for d in config.data
    ]
    adapter_only = (
        "This folder holds an adapter, not a whole model: `from_pretrained` and the pipeline put it on its base, "
        f"`{', '.join(map(public_name, bases))}`, and `mglmm merge` makes one checkpoint of the two."
    )
    training = (
        f"Trained: {trained}; {length} of {rows} {unit}, learning rate {last.learning_rate:g}, "
        f"seed {args.seed}.\n\n| data | configuration | split | weight |\n|---|---|---|---:|\n"
        + "\n".join(data)
        + f"\n\n![Curves of the run]({stage}_curves.png)"
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
