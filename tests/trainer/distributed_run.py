"""
One optimizer step of the toy model over eight rows, as one process or as one of several started by torchrun:

    python -m tests.trainer.distributed_run OUTPUT ROWS BATCH_SIZE ACCUMULATION

Rank 0 writes the trained parameters and the log to OUTPUT; ROWS is a key of `ROWS`.
"""

import gc
import sys
from pathlib import Path
from typing import Any

import torch

from mglmm.processing.uscdf import PHRASE_END, PHRASE_START, SEG_TOKEN
from mglmm.trainer.data_collator import MglmmDataCollator
from mglmm.trainer.mglmm_trainer import MglmmTrainer
from mglmm.trainer.trainable import make_trainable
from tests.tiny import tiny_model, tiny_processor
from tests.trainer.conftest import training_arguments, uscdf_row

SEVEN = ("the hat", "the dog", "the car", "the hat", "the dog", "the car", "the dog")
SGD = {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, "weight_decay": 0.0, "max_steps": 1}


def eight(masks: tuple[int, ...]) -> list[dict[str, Any]]:
    """Rows with so many masks each."""
    return [uscdf_row(i % 4, "referring" if n else "absent", SEVEN[:n]) for i, n in enumerate(masks)]


ROWS = {
    "uneven": eight((0, 1, 7, 0, 1, 0, 0, 7)),
    # Two processes take the batches of two in turn: the second one gets no mask in either of its two.
    "one rank without": eight((7, 1, 0, 0, 1, 1, 0, 0)),
}


def train(output: Path, rows: str, batch_size: int, accumulation: int) -> None:
    processor = tiny_processor()
    args = training_arguments(
        output.with_suffix(".run"),
        train_sampling_strategy="sequential",
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        **SGD,
    )
    torch.manual_seed(0)  # for LoRA
    new_ids = processor.tokenizer.convert_tokens_to_ids([PHRASE_START, PHRASE_END, SEG_TOKEN])
    model = make_trainable(tiny_model(processor), args, new_ids)
    collator = MglmmDataCollator(processor, args.mask_size)
    trainer = MglmmTrainer(
        model=model, args=args, train_dataset=ROWS[rows], eval_dataset=ROWS[rows][:7], data_collator=collator
    )
    trainer.train()
    metrics = trainer.evaluate()  # seven rows: one rank has one row less
    if trainer.is_world_process_zero():
        parameters = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        log = trainer.state.log_history
        torch.save({"parameters": parameters, "log": log, "metrics": metrics, "world": args.world_size}, output)


if __name__ == "__main__":
    train(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    gc.collect()
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
