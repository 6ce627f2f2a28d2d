"""Weights on disk and in memory: saving, sharding, dtypes, device maps, attention, vocabulary, compilation."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import infer_auto_device_map
from transformers import AutoModelForImageTextToText

from mglmm.modeling_mglmm import MglmmForConditionalGeneration
from tests.modeling_mglmm.batches import ROWS, gradients, prompts, training_batch
from tests.modeling_mglmm.test_modeling import LANGUAGE_MODELS, TOWERS, text_config
from tests.tiny import script_tokens, tiny_config, tiny_model

ROOT = Path(__file__).resolve().parents[2]
FLOAT32 = ("mask_projector", "prompt_encoder", "mask_decoder", "pixel_neck")
VARIANTS = {
    "sam": {},
    "shared": {"shared": True},
    "details": {"shared": True, "pixel_detail_layers": [1], "pixel_neck_blocks": 1},
    "neck": {"pixel_config": {**TOWERS["dinov2"], "image_size": 64, "patch_size": 16}},
    "gpt2": {"text": "gpt2"},
}


def variant(tiny, tiny_shared, name: str):
    options = dict(VARIANTS[name])
    processor = (tiny_shared if options.get("shared") else tiny).processor
    if "text" in options:
        options["text_config"] = text_config(processor, LANGUAGE_MODELS[options.pop("text")])
    return tiny_model(processor, **options), processor


@pytest.mark.parametrize("name", VARIANTS)
def test_saving_changes_no_bit(tiny, tiny_shared, name: str, tmp_path) -> None:
    model, _ = variant(tiny, tiny_shared, name)
    model.save_pretrained(tmp_path)
    assert [path.suffix for path in tmp_path.iterdir() if path.suffix in (".bin", ".pt", ".pth")] == []
    loaded, info = MglmmForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    expected, found = model.state_dict(), loaded.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    tied = loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert tied == (name == "gpt2")


def test_shards_give_equal_answers_in_a_fresh_process(tiny, tmp_path) -> None:
    batch = training_batch(tiny.processor, ROWS)
    tiny.model.save_pretrained(tmp_path / "model", max_shard_size="100KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 3
    torch.save(batch, tmp_path / "batch.pt")
    code = f"""
import torch
torch.set_num_threads(1)
from mglmm import MglmmForConditionalGeneration
model = MglmmForConditionalGeneration.from_pretrained({str(tmp_path / "model")!r})
batch = torch.load({str(tmp_path / "batch.pt")!r}, weights_only=True)
with torch.no_grad():
    outputs = model(**batch)
torch.save([outputs.logits, outputs.pred_masks], {str(tmp_path / "found.pt")!r})
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True, timeout=300)
    with torch.no_grad():
        expected = tiny.model(**batch)
    logits, masks = torch.load(tmp_path / "found.pt", weights_only=True)
    assert torch.equal(logits, expected.logits) and torch.equal(masks, expected.pred_masks)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["sam", "shared", "neck", "details"])
def test_the_mask_path_stays_float32(tiny, tiny_shared, name: str, dtype: torch.dtype, tmp_path) -> None:
    model, processor = variant(tiny, tiny_shared, name)
    model.save_pretrained(tmp_path)
    half = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=dtype)
    for key, value in half.state_dict().items():
        kept = any(f"model.{part}." in key for part in FLOAT32)
        assert value.dtype == (torch.float32 if kept else dtype), key
        if kept:
            assert torch.equal(value, model.state_dict()[key])  # not rounded on the way

    batch = training_batch(processor, ROWS, side=8)
    outputs = half(**batch)
    assert outputs.pred_masks.dtype == torch.float32 and outputs.logits.dtype == dtype
    outputs.loss.backward()
    assert all(gradient.isfinite().all() for gradient in gradients(half).values())
    script = script_tokens(half, processor, [ROWS[0][2]])
    inputs = prompts(processor, ROWS[:2])
    generated = half.generate(**inputs, output_masks=True, max_new_tokens=40, logits_processor=script)
    assert generated.pred_masks[0].dtype == torch.float32 and len(generated.pred_masks[0]) == 2

    half.save_pretrained(tmp_path / "half")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "half")  # the dtype is remembered
    assert again.lm_head.weight.dtype == dtype and again.model.mask_projector.linear_1.weight.dtype == torch.float32


def test_autocast_leaves_the_mask_path_alone(tiny_shared) -> None:
    batch = training_batch(tiny_shared.processor, ROWS, side=8)
    model = tiny_shared.model.model
    with torch.no_grad():
        features = model.encode_images(batch["pixel_values"])
        states, index = torch.randn(3, 48), torch.tensor([0, 1, 2])
        expected = model.decode_masks(states, index, model.get_image_embeddings(features))
        with torch.autocast("cpu", torch.bfloat16):
            embeddings = model.get_image_embeddings(features)
            masks = model.decode_masks(states, index, embeddings)
            assert tiny_shared.model(**batch).loss.isfinite()
    assert embeddings.dtype == masks.dtype == torch.float32
    assert torch.equal(masks, expected)


def test_device_map_splits_between_whole_layers(tiny) -> None:
    with torch.device("meta"):
        model = MglmmForConditionalGeneration(tiny_config(tiny.processor))
    no_split = model._no_split_modules
    assert {"LlamaDecoderLayer", "CLIPEncoderLayer", "SamVisionLayer", "SamMaskDecoder"} <= set(no_split)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    for share in (2, 3, 5):
        budget = {0: size // share, 1: size // share, "cpu": size}
        device_map = infer_auto_device_map(model, budget, no_split_module_classes=list(no_split))
        assert len(set(device_map.values())) > 1
        for name, module in model.named_modules():
            if type(module).__name__ in no_split:
                inside = {device for key, device in device_map.items() if key.startswith(name + ".")}
                assert len(inside) <= 1, f"{name} is split over {inside}"


def test_offloaded_weights_work(tiny, tmp_path) -> None:
    """What an automatic map puts on the disk last of all, the mask path, must stay: SAM's decoder cannot be offloaded."""
    tiny.model.save_pretrained(tmp_path / "model")
    path = [f"model.{name}" for name in ("mask_projector", "prompt_encoder", "mask_decoder")]
    size = sum(p.numel() * p.element_size() for name in path for p in tiny.model.get_submodule(name).parameters())
    no_split = list(tiny.model._no_split_modules)
    automatic = infer_auto_device_map(tiny.model, {0: 4 * size, "disk": 10**9}, no_split_module_classes=no_split)
    assert all(automatic[name] == 0 for name in path) and automatic["model.language_model"] == "disk"

    encoders = [
        f"model.{name}" for name in ("vision_tower", "multi_modal_projector", "language_model", "pixel_encoder")
    ]
    offloaded = MglmmForConditionalGeneration.from_pretrained(
        tmp_path / "model",
        device_map=dict.fromkeys([*path, "lm_head"], "cpu") | dict.fromkeys(encoders, "disk"),
        offload_folder=tmp_path / "offload",
    )
    assert offloaded.model.language_model.embed_tokens.weight.device.type == "meta"
    inputs = prompts(tiny.processor, ROWS)
    found, expected = (
        model.generate(
            **inputs,
            output_masks=True,
            max_new_tokens=40,
            logits_processor=script_tokens(model, tiny.processor, [row[2] for row in ROWS]),
        )
        for model in (offloaded, tiny.model)
    )
    torch.testing.assert_close(torch.cat(found.pred_masks), torch.cat(expected.pred_masks))


@pytest.mark.parametrize("name", ["sam", "shared"])
def test_eager_equals_sdpa(tiny, tiny_shared, name: str, tmp_path, caplog) -> None:
    model, processor = variant(tiny, tiny_shared, name)
    model.save_pretrained(tmp_path)
    batch = training_batch(processor, ROWS, side=8)
    outputs = {}
    transformers_logger = logging.getLogger("transformers")
    transformers_logger.propagate = True
    try:
        for implementation in ("eager", "sdpa"):
            loaded = MglmmForConditionalGeneration.from_pretrained(tmp_path, attn_implementation=implementation)
            attention = loaded.model.mask_decoder.transformer.layers[0].self_attn
            assert attention.config._attn_implementation == implementation
            assert loaded.model.language_model.config._attn_implementation == implementation
            with torch.no_grad():
                outputs[implementation] = loaded(**batch)
        loaded.set_attn_implementation("eager")
        assert attention.config._attn_implementation == "eager"
    finally:
        transformers_logger.propagate = False
    assert "AttentionInterface" not in caplog.text
    torch.testing.assert_close(outputs["eager"].pred_masks, outputs["sdpa"].pred_masks, rtol=0, atol=1e-4)
    torch.testing.assert_close(outputs["eager"].loss, outputs["sdpa"].loss)


def test_attention_that_sam_does_not_know_goes_to_the_other_parts(tiny) -> None:
    config = tiny_config(tiny.processor)
    config._attn_implementation = "flex_attention"
    with torch.device("meta"):
        model = MglmmForConditionalGeneration(config)
    assert model.model.language_model.config._attn_implementation == "flex_attention"
    assert model.model.mask_decoder.config._attn_implementation == "sdpa"
    assert model.model.pixel_encoder.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", ["sam", "gpt2"])
def test_vocabulary_can_grow_and_shrink(tiny, tiny_shared, name: str) -> None:
    model, processor = variant(tiny, tiny_shared, name)
    size = len(processor.tokenizer)
    batch = training_batch(processor, ROWS)
    with torch.no_grad():
        expected = model(**batch).logits
        for new_size in (size + 7, size):
            model.resize_token_embeddings(new_size, mean_resizing=False)
            outputs = model(**batch)
            assert model.get_input_embeddings().weight.shape[0] == outputs.logits.shape[-1] == new_size
            assert model.config.text_config.vocab_size == new_size
            assert outputs.loss.isfinite()
            torch.testing.assert_close(outputs.logits[..., :size], expected)
    embeddings, head = torch.nn.Embedding(size, 48), torch.nn.Linear(48, size, bias=False)
    model.set_input_embeddings(embeddings)
    model.set_output_embeddings(head)
    assert model.get_input_embeddings() is embeddings and model.get_output_embeddings() is head


def test_fresh_weights_have_sensible_sizes(tiny) -> None:
    model = tiny_model(tiny.processor)
    assert all(value.isfinite().all() for value in model.state_dict().values())
    codes = model.model.prompt_encoder.shared_embedding.positional_embedding.detach()
    assert 0.6 < float(codes.std()) < 1.5  # SAM's scale: neighbouring cells have similar codes
    assert (
        0.15 < float(model.model.mask_projector.linear_1.weight.detach().std()) < 0.25
    )  # initializer_range of the tiny config


def test_the_mask_decoder_compiles(tiny) -> None:
    states, index, embeddings = torch.randn(4, 48), torch.tensor([0, 1, 1, 0]), torch.randn(2, 32, 4, 4)
    model = tiny_model(tiny.processor)
    with torch.no_grad():
        expected = model.model.decode_masks(states, index, embeddings)
        # fullgraph: no graph breaks. The ahead-of-time backend needs no C++ compiler.
        model.model.mask_decoder = torch.compile(model.model.mask_decoder, fullgraph=True, backend="aot_eager")
        found = model.model.decode_masks(states, index, embeddings)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
