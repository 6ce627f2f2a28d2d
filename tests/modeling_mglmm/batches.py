"""Model inputs from short descriptions: rows of (picture or None, question, answer)."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from mglmm.processing import MglmmProcessor
from tests.tiny import picture

Row = tuple[Image.Image | None, str, str]

# Mixed picture sizes, prompt lengths and numbers of [SEG], with a picture that gets none in the middle.
ROWS: list[Row] = [
    (picture(40, 60, 0), "Describe the image.", "A <p> hat </p> [SEG] and <p> the sky </p> [SEG]."),
    (picture(64, 24, 1), "Is there a bicycle? I would like to know.", "Sorry, I cannot find a bicycle."),
    (picture(30, 30, 2), "Hair?", "<p> hair </p> [SEG]"),
    (picture(20, 90, 3), "Segment the two cars on the grass, please.", "Sure, <p> two cars </p> [SEG] [SEG] [SEG]."),
]
TEXT_ONLY: list[Row] = [(None, "What is a hat?", "A thing that a woman shows."), (None, "And a dog?", "Brown.")]


def conversation(row: Row, with_answer: bool) -> list[dict[str, Any]]:
    image, question, answer = row
    content: list[dict[str, Any]] = [{"type": "text", "text": question}]
    if image is not None:
        content.insert(0, {"type": "image", "image": image})
    turns = [{"role": "user", "content": content}]
    return turns + ([{"role": "assistant", "content": answer}] if with_answer else [])


def prompts(processor: MglmmProcessor, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
    """Left-padded inputs of `generate`."""
    inputs = processor.apply_chat_template(
        [conversation(row, with_answer=False) for row in rows],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )
    inputs.pop("original_sizes", None)
    return dict(inputs)


def training_batch(processor: MglmmProcessor, rows: Sequence[Row], side: int = 16, seed: int = 0) -> dict[str, Any]:
    """Right-padded inputs of `forward` with labels and, for each [SEG], a random mask that depends on its row only."""
    inputs = processor.apply_chat_template(
        [conversation(row, with_answer=True) for row in rows],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
        processor_kwargs={"padding": True, "padding_side": "right"},
    )
    inputs.pop("original_sizes", None)
    supervised = inputs.pop("assistant_masks").bool()
    masks = [torch.zeros((0, side, side), dtype=torch.uint8)]
    for row in rows:
        generator = torch.Generator().manual_seed(seed + len(row[2]))
        masks.append(torch.randint(0, 2, (row[2].count("[SEG]"), side, side), generator=generator, dtype=torch.uint8))
    labels = inputs["input_ids"].masked_fill(~supervised, -100)
    return {**inputs, "labels": labels, "mask_labels": torch.cat(masks)}


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
