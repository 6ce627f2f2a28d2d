"""Arguments of `MglmmTrainer`."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import TrainingArguments

# Trained in full beside LoRA and the new tokens' rows; those that a model lacks are passed over.
MASK_MODULES = ("mask_projector", "mask_decoder", "pixel_neck")  # of them, what only the masks depend on
TRAINED_MODULES = ("multi_modal_projector", *MASK_MODULES)


@dataclass
class MglmmTrainingArguments(TrainingArguments):
    r"""
    [`~transformers.TrainingArguments`] with what a model with masks needs besides.

    Parameters that control what is trained:
        lora_r (`int`, *optional*, defaults to 8): Rank of LoRA on the language model; 0 for none.
        lora_alpha (`int`, *optional*, defaults to 16)
        lora_dropout (`float`, *optional*, defaults to 0.05)
        lora_target (`str`, *optional*): Anchored pattern of the linear layers that get LoRA; by default the query and
            value projections of the language model (never those of the towers or of the mask decoder).
        train_new_tokens (`bool`, *optional*, defaults to `True`): Train the embedding rows of `<p>`, `</p>`, `[SEG]`.
        trained_modules (`list[str]`, *optional*): Parts that train in full: by default both projectors, the neck of a
            shared encoder, the mask decoder and, where there is one, the region encoder. `language_model` (with its head; needs `lora_r` 0) may be named too.
            Vision tower, pixel encoder and prompt encoder are always frozen.

    Parameters that control the loss:
        ce_loss_weight, bce_loss_weight, dice_loss_weight (`float`, *optional*): In place of those of the model's
            configuration (1, 2 and 0.5 in the paper).

    Parameters that control optimisation:
        mask_learning_rate (`float`, *optional*): Learning rate of mask projector, neck and mask decoder;
            `learning_rate` if unset.

    Parameters that control the data:
        mask_size (`int`, *optional*, defaults to 128): Side of the square mask labels.
        max_length (`int`, *optional*): Longest row in tokens, its image included; the language model's context if unset.
            Nothing is ever cut: a longer row is a bad row.
        strict (`bool`, *optional*, defaults to `False`): Stop at the first bad row (broken picture, masks that do not
            fit, too many tokens) in place of skipping it with a note in `skipped_rows.*.jsonl`.
        cache_image_features (`str`, *optional*): Folder for the frozen encoders' features, computed once.
    """

    lora_r: int = field(default=8, metadata={"help": "Rank of LoRA on the language model."})
    lora_alpha: int = field(default=16, metadata={"help": "Scale of LoRA."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout of LoRA."})
    lora_target: str = field(
        default=r".*\.language_model\..*\.(q_proj|v_proj)", metadata={"help": "Layers that get LoRA (regex)."}
    )
    train_new_tokens: bool = field(default=True, metadata={"help": "Train the rows of the new tokens."})
    trained_modules: list[str] = field(
        default_factory=lambda: list(TRAINED_MODULES), metadata={"help": "Parts that train in full."}
    )
    ce_loss_weight: float | None = field(default=None, metadata={"help": "Weight of the text loss."})
    bce_loss_weight: float | None = field(default=None, metadata={"help": "Weight of the masks' BCE."})
    dice_loss_weight: float | None = field(default=None, metadata={"help": "Weight of the masks' DICE loss."})
    mask_learning_rate: float | None = field(default=None, metadata={"help": "Learning rate of the mask path."})
    mask_size: int = field(default=128, metadata={"help": "Side of the mask labels."})
    max_length: int | None = field(default=None, metadata={"help": "Longest row in tokens."})
    strict: bool = field(default=False, metadata={"help": "Stop at the first bad row."})
    cache_image_features: str | None = field(default=None, metadata={"help": "Folder for frozen image features."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "The collator needs every column."})
    label_names: list[str] | None = field(default_factory=lambda: ["labels"], metadata={"help": "Of the losses."})
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "There are none."})
    logging_steps: float = field(default=1, metadata={"help": "Every step says how it went."})
