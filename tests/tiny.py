"""A real MGLMM and its processor at toy size, built in code: every path of the package in well under a second."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CLIPImageProcessorPil, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerFast

from mglmm.modeling_mglmm import MglmmConfig, MglmmForConditionalGeneration
from mglmm.processing import MglmmProcessor
from mglmm.processing.chat_templates import LLAVA_V1

CONTEXT = 512
CORPUS = (
    LLAVA_V1,
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, and "
    "polite answers to the human's questions. USER: Describe the image and mark everything you mention. ASSISTANT: ",
    "The picture shows a woman with a red hat, a brown dog and two cars on the grass. It also shows the sky.",
    "Segment the left person's hair. Sure, the hair. Sorry, I cannot find a bicycle in this picture.",
)
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
    "projection_dim": 16,
    "initializer_range": 0.5,
}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.2,  # large enough that pictures change answers and no two tokens tie
}


class Tiny(NamedTuple):
    """What the fixtures `tiny` and `tiny_shared` give; shared by all tests, so copy before changing anything."""

    model: MglmmForConditionalGeneration
    processor: MglmmProcessor


def tiny_processor(shared: bool = False) -> MglmmProcessor:
    """Byte-level BPE of about 400 tokens, 28 px pictures of 2 x 2 patches for the tower, 64 px for SAM (`shared`: none)."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS * 2, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
        model_max_length=CONTEXT,
    )
    size = {"height": 28, "width": 28} if shared else {"shortest_edge": 28}
    image_processor = CLIPImageProcessorPil(size=size, crop_size={"height": 28, "width": 28}, do_center_crop=not shared)
    return MglmmProcessor(image_processor, tokenizer, sam_image_size=None if shared else 64, patch_size=14)


def tiny_config(processor: MglmmProcessor, shared: bool = False, **kwargs) -> MglmmConfig:
    """CLIP 28/14, Llama with 2 layers of 48, SAM 64/16 (`shared`: the tower with a neck); `kwargs` are fields of the config.

    Masks are `(16, 16)`, or `(8, 8)` when shared.
    """
    tokenizer = processor.tokenizer
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    grid = {"image_size": 28, "patch_size": 14} if shared else {"image_size": 64, "patch_size": 16}
    sam_vision = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "window_size": 2,
        "global_attn_indexes": [1],
        "output_channels": 32,
        "num_pos_feats": 16,
        "mlp_dim": 64,
        "initializer_range": 0.02,  # SAM's own default, 1e-10, makes every picture look the same
    }
    sam = {
        "vision_config": sam_vision | grid,
        "prompt_encoder_config": {"hidden_size": 32} | grid,
        "mask_decoder_config": {
            "hidden_size": 32,
            "num_attention_heads": 2,
            "mlp_dim": 64,
            "iou_head_hidden_dim": 32,
        },
    }
    fields = {
        "vision_config": dict(CLIP),
        "text_config": {**LLAMA, **ids, "vocab_size": len(tokenizer)},
        "sam_config": sam,
        "share_vision_tower": shared,
        "image_token_id": processor.image_token_id,
        "seg_token_id": processor.seg_token_id,
        "initializer_range": 0.2,
    }
    return MglmmConfig(**fields | kwargs)


def tiny_model(processor: MglmmProcessor, shared: bool = False, **kwargs) -> MglmmForConditionalGeneration:
    """A random model for `processor` (made with the same `shared`), the same at every call, in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MglmmForConditionalGeneration(tiny_config(processor, shared, **kwargs)).eval()
    for name in ("pad", "bos", "eos"):
        setattr(model.generation_config, f"{name}_token_id", getattr(processor.tokenizer, f"{name}_token_id"))
    return model


def picture(height: int = 40, width: int = 60, seed: int = 0) -> Image.Image:
    """An RGB picture of smooth random colours: noise would look the same to every encoder after resizing."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


class ForcedAnswers(LogitsProcessor):
    """Makes generation emit given token ids, row by row; over several calls of `generate` the rows are counted on."""

    def __init__(self, answers: list[list[int]], eos_token_id: int, rows_per_prompt: int):
        self.answers = answers
        self.eos_token_id = eos_token_id
        self.rows_per_prompt = rows_per_prompt
        self.prompt: torch.Tensor | None = None
        self.first = 0  # index of the first row of the current call

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if self.prompt is None or not self._continues(input_ids):
            if self.prompt is not None:
                self.first += len(self.prompt) // self.rows_per_prompt
            self.prompt = input_ids.clone()
        step = input_ids.shape[1] - self.prompt.shape[1]
        forced = torch.full_like(scores, -torch.inf)
        for row in range(len(scores)):
            answer = self.answers[(self.first + row // self.rows_per_prompt) % len(self.answers)]
            forced[row, answer[step] if step < len(answer) else self.eos_token_id] = 0.0
        return forced

    def _continues(self, input_ids: torch.LongTensor) -> bool:
        length = self.prompt.shape[1]
        return input_ids.shape[1] > length and torch.equal(input_ids[:, :length], self.prompt)


def script_tokens(
    model: MglmmForConditionalGeneration, processor: MglmmProcessor, texts: Sequence[str], rows_per_prompt: int = 1
) -> LogitsProcessorList:
    """
    The `logits_processor` for `generate` (or the pipeline) that makes prompt i answer `texts[i % len(texts)]`, then EOS.

    Masks come from the states of the model as ever, only the choice of tokens is fixed. Use a fresh one for each call of
    the pipeline. `rows_per_prompt` is `num_beams` or `num_return_sequences`.
    """
    answers = [processor.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    return LogitsProcessorList([ForcedAnswers(answers, model.generation_config.eos_token_id, rows_per_prompt)])
