"""Arguments of `MglmmTrainer`."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import TrainingArguments


@dataclass
class MglmmTrainingArguments(TrainingArguments):
    r"""
    [`~transformers.TrainingArguments`] with what a model with masks needs besides.

    Parameters that control what is trained:
        lora_r (`int`, *optional*, defaults to 8): Rank of LoRA on the language model; 0 trains no language-model weight.
        lora_alpha (`int`, *optional*, defaults to 16)
        lora_dropout (`float`, *optional*, defaults to 0.05)
        lora_target (`str`, *optional*): Anchored pattern of the linear layers that get LoRA; by default the query and
            value projections of the language model (never those of the towers or of the mask decoder).
        train_new_tokens (`bool`, *optional*, defaults to `True`): Train the embedding rows of `<p>`, `</p>`, `[SEG]`.

    Parameters that control optimisation:
        mask_learning_rate (`float`, *optional*): Learning rate of projectors, neck and mask decoder;
            `learning_rate` if unset.

    Parameters that control the data:
        mask_size (`int`, *optional*, defaults to 128): Side of the square mask labels.
        cache_image_features (`str`, *optional*): Folder for the frozen encoders' features, computed once.
    """

    lora_r: int = field(default=8, metadata={"help": "Rank of LoRA on the language model."})
    lora_alpha: int = field(default=16, metadata={"help": "Scale of LoRA."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout of LoRA."})
    lora_target: str = field(
        default=r".*\.language_model\..*\.(q_proj|v_proj)", metadata={"help": "Layers that get LoRA (regex)."}
    )
    train_new_tokens: bool = field(default=True, metadata={"help": "Train the rows of the new tokens."})
    mask_learning_rate: float | None = field(default=None, metadata={"help": "Learning rate of the mask path."})
    mask_size: int = field(default=128, metadata={"help": "Side of the mask labels."})
    cache_image_features: str | None = field(default=None, metadata={"help": "Folder for frozen image features."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "The collator needs every column."})
    label_names: list[str] | None = field(default_factory=lambda: ["labels"], metadata={"help": "Of the losses."})
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "There are none."})
