"""Training: trainer, arguments, collator and recipes."""

from .data_collator import MglmmDataCollator
from .mglmm_trainer import MglmmTrainer
from .trainable import make_trainable
from .training_args import MglmmTrainingArguments

__all__ = ["MglmmDataCollator", "MglmmTrainer", "MglmmTrainingArguments", "make_trainable"]
