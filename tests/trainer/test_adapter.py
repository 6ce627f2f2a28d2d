"""The adapter: exactly what it trains, that nothing else moves, and that it loads back to the same model."""

import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import pipeline

import mglmm  # registers the pipeline
from mglmm.processing.uscdf import PHRASE_END, PHRASE_START, SEG_TOKEN
from mglmm.trainer.data_collator import MglmmDataCollator
from mglmm.trainer.trainable import make_trainable
from tests.tiny import script_tokens, tiny_model, tiny_processor
from tests.trainer.conftest import training_arguments, uscdf_row

CORE = "base_model.model."
# Modules of the toy model that are trained: their number of parameter tensors, and of single parameters.
PROJECTOR = "model.multi_modal_projector"
DECODER = {
    "iou_token": 1,
    "mask_tokens": 1,
    "output_hypernetworks_mlps.0": 6,  # three linear layers; those of the other mask tokens have no gradient
    "transformer.layers.0": 36,
    "transformer.layers.1": 36,
    "transformer.final_attn_token_to_image": 8,
    "transformer.layer_norm_final_attn": 2,
    "upscale_conv1": 2,
    "upscale_conv2": 2,
    "upscale_layer_norm": 2,
}
LORA = [
    f"model.language_model.layers.{layer}.self_attn.{projection}.{matrix}"
    for layer in range(2)
    for projection in ("q_proj", "v_proj")
    for matrix in ("lora_A", "lora_B")
]


def plain(name: str) -> str:
    """Name of a parameter in the model without the adapter's wrappers."""
    name = name.removeprefix(CORE).replace(".modules_to_save.default", "").replace(".default", "")
    return name.replace(".token_adapter", "")


def trained_names(model: PeftModel) -> set[str]:
    return {plain(name) for name, parameter in model.named_parameters() if parameter.requires_grad}


def linears(prefix: str) -> set[str]:
    return {f"{prefix}.linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}


@pytest.mark.parametrize("shared", [False, True], ids=["sam_encoder", "shared_tower"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_exactly_the_intended_parameters_train(adapted, shared, tied):
    model, _ = adapted(shared=shared, tie_word_embeddings=tied)
    names = trained_names(model)
    decoder = {name for name in names if name.startswith("model.mask_decoder.")}
    counts = {part: sum(name.startswith(f"model.mask_decoder.{part}.") for name in decoder) for part in DECODER}
    assert counts == DECODER and len(decoder) == sum(DECODER.values())
    expected = linears(PROJECTOR) | linears("model.mask_projector") | {f"{name}.weight" for name in LORA}
    expected |= {"model.language_model.embed_tokens.trainable_tokens_delta"}
    if not tied:
        expected |= {"lm_head.trainable_tokens_delta"}
    if shared:
        neck = ("conv1.weight", "conv2.weight", "layer_norm1.weight", "layer_norm1.bias")
        expected |= {f"model.pixel_neck.{name}" for name in (*neck, "layer_norm2.weight", "layer_norm2.bias")}
    assert names - decoder == expected
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}


def test_what_trains_is_float32_beside_a_bfloat16_language_model(adapted):
    model, _ = adapted(language_model_dtype=torch.bfloat16)
    kinds = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    assert kinds == {torch.float32}
    frozen = model.get_base_model().model.language_model.layers[0].mlp.up_proj.weight
    assert frozen.dtype == torch.bfloat16 and not frozen.requires_grad


@pytest.mark.parametrize(
    ("arguments", "missing"),
    [
        ({"lora_r": 0}, "lora_"),
        ({"train_new_tokens": False}, "trainable_tokens_delta"),
    ],
)
def test_parts_can_be_left_out(adapted, arguments, missing):
    everything = trained_names(adapted()[0])
    model, _ = adapted(**arguments)
    assert trained_names(model) == {name for name in everything if missing not in name}


def train(model: PeftModel, batch: dict, steps: int = 3) -> None:
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    model.eval()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_only_the_rows_of_the_new_tokens_change(adapted, tied, rows):
    model, processor = adapted(tie_word_embeddings=tied)
    before = {
        name: value.clone() for name, value in tiny_model(processor, tie_word_embeddings=tied).state_dict().items()
    }
    train(model, MglmmDataCollator(processor, 16)(rows))
    merged = model.merge_and_unload()
    after = merged.state_dict()
    assert (merged.lm_head.weight is merged.get_input_embeddings().weight) == tied
    assert after.keys() == before.keys()

    new_ids = sorted(processor.tokenizer.convert_tokens_to_ids([PHRASE_START, PHRASE_END, SEG_TOKEN]))
    for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
        changed = (after[name] != before[name]).any(1).nonzero().flatten().tolist()
        assert changed == new_ids, name
    frozen = r"model\.(vision_tower|pixel_encoder|prompt_encoder)\.|language_model\..*(mlp|norm|k_proj|o_proj)"
    unused = r"iou_prediction_head|hypernetworks_mlps\.[123]\."
    for name in before:
        if re.search(f"{frozen}|{unused}", name):
            assert torch.equal(after[name], before[name]), name


def test_batches_with_and_without_masks_reach_the_same_parameters(adapted, rows):
    reached = []
    for batch_rows in ([rows[0]], [rows[1]]):
        model, processor = adapted()
        model.train()
        model(**MglmmDataCollator(processor, 16)(batch_rows)).loss.backward()
        reached.append({name for name, parameter in model.named_parameters() if parameter.grad is not None})
        assert {plain(name) for name in reached[-1]} == trained_names(model)
    assert reached[0] == reached[1]


@pytest.mark.parametrize("shared", [False, True], ids=["sam_encoder", "shared_tower"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_saved_and_loaded_it_is_the_same_model(adapted, shared, tied, rows, tmp_path: Path):
    model, processor = adapted(shared=shared, tie_word_embeddings=tied)
    batch = MglmmDataCollator(processor, 16)(rows)
    train(model, batch)
    model.save_pretrained(tmp_path / "adapter")
    base = tiny_model(processor, shared, tie_word_embeddings=tied)
    merged = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload()
    with torch.no_grad():
        expected, outputs = model(**batch), merged(**batch)
    torch.testing.assert_close(outputs.logits, expected.logits, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(outputs.pred_masks, expected.pred_masks, atol=1e-5, rtol=1e-5)

    question = [{"type": "image", "image": rows[0]["image"]}, {"type": "text", "text": "Segment the hat."}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": question}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )
    inputs.pop("original_sizes")
    answers = []
    for asked in (model, merged):
        forced = script_tokens(base, processor, [" Sure, <p> the hat </p> [SEG] and <p> the dog </p> [SEG]."])
        answers.append(asked.generate(**inputs, output_masks=True, logits_processor=forced, max_new_tokens=40))
    assert torch.equal(answers[0].sequences, answers[1].sequences)
    assert answers[1].pred_masks[0].shape[0] == 2
    torch.testing.assert_close(answers[1].pred_masks[0], answers[0].pred_masks[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(answers[1].mask_scores[0], answers[0].mask_scores[0], atol=1e-5, rtol=1e-5)
    free = [asked.generate(**inputs, max_new_tokens=8) for asked in (model, merged)]
    assert torch.equal(free[0], free[1])


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_its_folder_loads_like_a_model(tied, rows, tmp_path: Path):
    """transformers reads adapter_config.json, loads the base named there and puts the adapter on it."""
    processor = tiny_processor(shared=tied)
    tiny_model(processor, shared=tied, tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    base = mglmm.MglmmForConditionalGeneration.from_pretrained(tmp_path / "base")
    torch.manual_seed(0)  # for LoRA
    new_ids = processor.tokenizer.convert_tokens_to_ids([PHRASE_START, PHRASE_END, SEG_TOKEN])
    model = make_trainable(base, training_arguments(tmp_path / "run"), new_ids)
    batch = MglmmDataCollator(processor, 16)(rows)
    train(model, batch)
    model.save_pretrained(tmp_path / "adapter")

    loaded, loading = mglmm.MglmmForConditionalGeneration.from_pretrained(
        tmp_path / "adapter", output_loading_info=True
    )
    # Rows of a tied head are those of the embedding, but transformers believes that they are missing.
    assert loading["missing_keys"] == ({"lm_head.token_adapter.trainable_tokens_delta.default"} if tied else set())
    assert not loading["unexpected_keys"] and not loading["mismatched_keys"]
    with torch.no_grad():
        expected, outputs = model(**batch), loaded(**batch)
    assert torch.equal(outputs.logits, expected.logits) and torch.equal(outputs.pred_masks, expected.pred_masks)

    pipe = pipeline("image-segmentation-captioning", model=str(tmp_path / "adapter"))
    with torch.no_grad():
        assert torch.equal(pipe.model(**batch).pred_masks, expected.pred_masks)
    answer = pipe(
        rows[0]["image"],
        "Segment the hat.",
        logits_processor=script_tokens(base, processor, [" Sure, <p> the hat </p> [SEG]."]),
        max_new_tokens=30,
    )
    assert [segment.phrase for segment in answer.segments] == ["the hat"]


def test_the_adapter_is_small(adapted, tmp_path: Path):
    from safetensors.torch import load_file

    model, _ = adapted()
    model.save_pretrained(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert not [name for name in saved if re.search("vision_tower|pixel_encoder|mlp.up_proj|embed_tokens.weight", name)]
    assert saved[f"{CORE}lm_head.token_adapter.trainable_tokens_delta"].shape == (3, 48)


def test_training_moves_the_masks_and_the_text(adapted):
    model, processor = adapted()
    batch = MglmmDataCollator(processor, 16)([uscdf_row(0, "referring", ("the hat",))])
    before = model(**batch)
    train(model, batch, steps=5)
    after = model(**batch)
    assert after.ce_loss < before.ce_loss and after.loss < before.loss
