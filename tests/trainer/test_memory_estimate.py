"""The formulas for what is kept for the backward pass, against what autograd really keeps."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaModel
from transformers.models.sam.configuration_sam import SamMaskDecoderConfig
from transformers.models.sam.modeling_sam import SamMaskDecoder

from mglmm.modeling_mglmm.modeling_mglmm import PRODUCTS
from mglmm.trainer.memory_estimate import DECODER_BYTES, PRODUCT_BYTES, language_model_bytes


def kept_bytes(model: torch.nn.Module, call) -> int:
    """Bytes that autograd keeps for the backward pass of `call()`, without weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = tensor  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = call()
    assert output.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize(
    ("dtype", "autocast", "full"),
    [
        (torch.bfloat16, False, False),  # LoRA in float32 on a bfloat16 model, as under FSDP2
        (torch.bfloat16, True, False),  # the recipes under DDP
        (torch.float32, False, False),
        (torch.float32, False, True),  # no LoRA, all weights train
    ],
)
def test_what_a_language_model_keeps(dtype, autocast, full):
    text = LlamaConfig(
        hidden_size=256, intermediate_size=704, num_hidden_layers=3, num_attention_heads=8, vocab_size=16
    )
    model = LlamaModel(text).to(dtype)
    if not full:
        lora = LoraConfig(r=8, lora_dropout=0.05, target_modules=["q_proj", "v_proj"])
        model = get_peft_model(model, lora)
        assert next(p for p in model.parameters() if p.requires_grad).dtype == torch.float32
    model.train()
    states = torch.randn(2, 64, 256, dtype=dtype, requires_grad=True)

    def call():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return model(inputs_embeds=states, use_cache=False).last_hidden_state

    kept = kept_bytes(model, call)
    estimate = language_model_bytes(
        text,
        bytes_per_value=2 if dtype == torch.bfloat16 or autocast else 4,
        lora_inputs=0 if full else 3 * 2 * 256,
        lora_bytes=2 if autocast else 4,
        full=full,
        tokens=128,
        checkpointing=False,
    )
    if not full:
        estimate += 128 * 3 * 2 * 256 * (4 - 1)  # the mask of LoRA's dropout, which only a GPU keeps in one byte
    assert estimate == pytest.approx(kept, rel=0.06)


def test_what_a_mask_keeps():
    decoder = SamMaskDecoder(SamMaskDecoderConfig(attn_implementation="eager"))
    decoder.config._attn_implementation = "sdpa"
    image, positional = torch.randn(1, 256, 64, 64), torch.randn(1, 256, 64, 64)
    prompt, dense = torch.randn(1, 1, 1, 256, requires_grad=True), torch.randn(1, 256, 64, 64)
    kept = kept_bytes(decoder, lambda: decoder(image, positional, prompt, dense, False)[0])
    assert DECODER_BYTES == pytest.approx(kept, rel=0.1)

    class Products(TorchDispatchMode):
        """Sums up what selective checkpointing keeps."""

        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            result = operation(*args, **(kwargs or {}))
            if operation in PRODUCTS:
                first = result[0] if isinstance(result, tuple) else result
                sizes.append(first.numel() * first.element_size())
            return result

    sizes: list[int] = []
    with Products():
        decoder(image, positional, prompt, dense, False)
    assert PRODUCT_BYTES == pytest.approx(sum(sizes) + image.numel() * 4, rel=0.05)
