"""Which parameters a run trains: LoRA, the new tokens' rows and the mask path, or the language model in full."""

from __future__ import annotations

import difflib

from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.constants import DUMMY_TARGET_MODULES

from mglmm.modeling_mglmm import MglmmForConditionalGeneration

from .training_args import TRAINED_MODULES, MglmmTrainingArguments

REGION_ENCODER = "region_encoder"  # trained by default, too, where the model has one
# Parts of SAM's decoder that no loss reaches: the IoU head and the hypernetworks of the three unused mask tokens.
UNTRAINED = ("iou_prediction_head", "hypernetworks_mlps.1", "hypernetworks_mlps.2", "hypernetworks_mlps.3")


def make_trainable(
    model: MglmmForConditionalGeneration, args: MglmmTrainingArguments, new_token_ids: list[int]
) -> PeftModel | MglmmForConditionalGeneration:
    """
    The model with what `args` names trainable, in float32, and everything else frozen.

    With LoRA or without any language-model weight a `PeftModel`, whose `save_pretrained` writes only what trains: LoRA,
    the new tokens' rows of the embedding and of the head (if they are not one), and the trained modules. With
    `language_model` among the trained modules the model itself.

    Raises:
        ValueError: `args.trained_modules` names something else than parts that can train, or `language_model` beside LoRA.
    """
    known = (*TRAINED_MODULES, REGION_ENCODER, "language_model")
    wanted = list(args.trained_modules)
    if wanted == list(TRAINED_MODULES):
        wanted.append(REGION_ENCODER)  # unless the run chooses
    for name in wanted:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
            raise ValueError(
                f"trained_modules: {name!r} cannot train (only {', '.join(known)} can); did you mean {near!r}?"
            )
    modules = [name for name in wanted if getattr(model.model, name) is not None]
    trained: PeftModel | MglmmForConditionalGeneration
    if "language_model" in modules:
        if args.lora_r:
            raise ValueError("trained_modules names language_model beside LoRA: set lora_r to 0, or leave it out")
        trained = model.requires_grad_(False)
        for module in (*(getattr(model.model, name) for name in modules), model.lm_head):
            module.requires_grad_(True)
    else:
        trained = _with_adapter(model, args, modules, new_token_ids)
    for name, parameter in trained.named_parameters():
        if any(part in name for part in UNTRAINED) or ".prompt_encoder." in name:
            parameter.requires_grad_(False)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return trained


def _with_adapter(
    model: MglmmForConditionalGeneration, args: MglmmTrainingArguments, modules: list[str], new_token_ids: list[int]
) -> PeftModel:
    embedding = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
    # PEFT ties the two if the model does.
    new_rows = dict.fromkeys((embedding.rpartition(".")[2], "lm_head"), new_token_ids)
    config = LoraConfig(
        r=args.lora_r or 1,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=args.lora_target if args.lora_r else DUMMY_TARGET_MODULES,
        modules_to_save=[*modules, "prompt_encoder"],  # the decoder was trained with this prompt encoder
        trainable_token_indices=new_rows if args.train_new_tokens else None,
    )
    return get_peft_model(model, config)
