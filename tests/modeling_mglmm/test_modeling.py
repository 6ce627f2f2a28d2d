"""Forward passes: every kind of part, batches against single rows, hidden traps of the masks' bookkeeping."""

import pytest
import torch

from mglmm.modeling_mglmm import MglmmForConditionalGeneration, MglmmImageFeatures
from mglmm.modeling_mglmm.seg_states import gather_seg_states, image_index_of_seg
from tests.modeling_mglmm.batches import ROWS, TEXT_ONLY, gradients, prompts, training_batch
from tests.tiny import CLIP, CONTEXT, LLAMA, picture, script_tokens, tiny_model

WIDTHS = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
DINOV2 = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "mlp_ratio": 2, "initializer_range": 0.5}
TOWERS = {
    # a class token before the patches
    "clip": CLIP,
    # no class token, a pooling head that is not used
    "siglip": {"model_type": "siglip_vision_model", **WIDTHS, "image_size": 28, "patch_size": 14},
    # a class token
    "dinov2": {"model_type": "dinov2", **DINOV2, "image_size": 28, "patch_size": 14},
    # a class token and four registers
    "registers": {"model_type": "dinov2_with_registers", **DINOV2, "image_size": 28, "patch_size": 14},
}
PREFIX_TOKENS = {"clip": 1, "siglip": 0, "dinov2": 1, "registers": 5}
LANGUAGE_MODELS = {
    "llama": LLAMA,
    # other names (`wte`), learned positions, tied head
    "gpt2": {
        "model_type": "gpt2",
        "n_embd": 48,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": CONTEXT,
        "initializer_range": 0.2,
    },
    # biases, tied head
    "qwen2": {**LLAMA, "model_type": "qwen2", "tie_word_embeddings": True},
    # scaled embeddings, tied head
    "gemma": {**LLAMA, "model_type": "gemma", "head_dim": 12},
}


def text_config(processor, config):
    ids = {f"{name}_token_id": getattr(processor.tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    return {**config, **ids, "vocab_size": len(processor.tokenizer)}


def check(model, processor) -> None:
    """Forward and generation give finite masks, and the same ones."""
    batch = training_batch(processor, ROWS[:1])
    with torch.no_grad():
        outputs = model(**batch)
    assert outputs.loss.isfinite() and outputs.pred_masks.shape[0] == 2
    answers = script_tokens(model, processor, [" " + ROWS[0][2]])
    generated = model.generate(
        **prompts(processor, ROWS[:1]), output_masks=True, max_new_tokens=60, logits_processor=answers
    )
    torch.testing.assert_close(generated.pred_masks[0], outputs.pred_masks, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", TOWERS)
def test_any_vision_tower(tiny, name: str) -> None:
    model = tiny_model(tiny.processor, vision_config=TOWERS[name])
    check(model, tiny.processor)
    pixels = torch.rand(1, 3, 28, 28)
    hidden = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]
    assert hidden.shape[1] == 4 + PREFIX_TOKENS[name]
    features = model.encode_images(pixels).vision_hidden_states
    torch.testing.assert_close(features, hidden[:, PREFIX_TOKENS[name] :])


def test_full_strategy_keeps_the_prefix(tiny) -> None:
    model = tiny_model(tiny.processor, vision_config=TOWERS["registers"], vision_feature_select_strategy="full")
    assert model.encode_images(torch.rand(1, 3, 28, 28)).vision_hidden_states.shape[1] == 9


def test_several_layers_are_normalised_concatenated_and_pooled(tiny) -> None:
    model = tiny_model(
        tiny.processor, vision_feature_layer=[1, -1], normalize_vision_features=True, image_token_stride=2
    )
    pixels = torch.rand(2, 3, 28, 28)
    features = model.encode_images(pixels)
    states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    normal = [
        (s[:, 1:] - s[:, 1:].mean(-1, True)) / (s[:, 1:].var(-1, False, keepdim=True) + 1e-5).sqrt() for s in states
    ]
    expected = torch.cat([normal[1], normal[3]], -1)
    torch.testing.assert_close(features.vision_hidden_states, expected, rtol=1e-4, atol=1e-4)
    tokens = model.model.project_image_features(features)
    torch.testing.assert_close(tokens, model.model.multi_modal_projector(expected.mean(1, keepdim=True)))
    assert model.model.tokens_per_image(features) == 1


def test_pooling_averages_squares_of_the_grid(tiny) -> None:
    model = tiny_model(tiny.processor, image_token_stride=2)
    states = torch.arange(16.0)[None, :, None].repeat(1, 1, 32)  # a 4 x 4 grid, row by row
    model.model.multi_modal_projector = torch.nn.Identity()
    model.model.multi_modal_projector.linear_1 = torch.nn.Linear(1, 1)
    tokens = model.model.project_image_features(MglmmImageFeatures(vision_hidden_states=states))
    assert tokens[0, :, 0].tolist() == [2.5, 4.5, 10.5, 12.5]


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_any_language_model(tiny, name: str) -> None:
    model = tiny_model(tiny.processor, text_config=text_config(tiny.processor, LANGUAGE_MODELS[name]))
    tied = name in ("gpt2", "qwen2", "gemma")
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    check(model, tiny.processor)


def test_another_pixel_encoder_with_a_neck(tiny) -> None:
    pixel_config = {**TOWERS["registers"], "image_size": 64, "patch_size": 16}
    model = tiny_model(tiny.processor, pixel_config=pixel_config, pixel_feature_layer=[1, -1])
    assert model.model.pixel_neck.conv1.in_channels == 64
    assert model.encode_images(torch.rand(1, 3, 28, 28), torch.rand(1, 3, 64, 64)).pixel_hidden_states.shape == (
        1,
        16,
        64,
    )
    check(model, tiny.processor)


def test_a_shared_tower(tiny_shared) -> None:
    assert tiny_shared.model.model.pixel_encoder is None
    check(*tiny_shared)


def test_details_of_a_shared_tower_reach_the_masks_alone(tiny_shared) -> None:
    model = tiny_model(tiny_shared.processor, shared=True, pixel_detail_layers=[1, 0], pixel_neck_blocks=2)
    check(model, tiny_shared.processor)
    pixels = torch.rand(1, 3, 28, 28)
    features = model.encode_images(pixels)
    states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    torch.testing.assert_close(features.vision_hidden_states, states[-2][:, 1:])
    torch.testing.assert_close(features.pixel_hidden_states, torch.cat([states[1], states[0]], -1)[:, 1:])
    batch = training_batch(tiny_shared.processor, ROWS[:1])
    batch.pop("pixel_values")
    other = MglmmImageFeatures(features.vision_hidden_states, torch.zeros_like(features.pixel_hidden_states))
    with torch.no_grad():
        seen, unseen = (model(**batch, image_features=each) for each in (features, other))
        assert torch.equal(seen.logits, unseen.logits) and not torch.allclose(seen.pred_masks, unseen.pred_masks)
        without = MglmmImageFeatures(features.vision_hidden_states)  # of a model without details
        with pytest.raises(ValueError, match="masks need sam_pixel_values"):
            model.model.get_image_embeddings(without)


def test_fresh_blocks_of_the_neck_hardly_change_it(tiny_shared) -> None:
    blocks = tiny_model(tiny_shared.processor, shared=True, pixel_neck_blocks=2)
    plain = tiny_model(tiny_shared.processor, shared=True)
    weights = {name: weight for name, weight in blocks.state_dict().items() if ".blocks." not in name}
    plain.load_state_dict(weights)
    features = plain.encode_images(torch.rand(1, 3, 28, 28))
    with torch.no_grad():
        before, after = (model.model.get_image_embeddings(features) for model in (plain, blocks))
    assert 0 < (after - before).norm() < 0.2 * before.norm()


def test_pixel_encoder_grid_is_checked(tiny) -> None:
    features = MglmmImageFeatures(
        vision_hidden_states=torch.zeros(1, 4, 32), pixel_hidden_states=torch.zeros(1, 32, 5, 5)
    )
    with pytest.raises(ValueError, match="4 x 4 grid but the features of an image have 25 cells"):
        tiny.model.model.get_image_embeddings(features)


def test_features_of_another_image_size_are_refused(tiny_shared) -> None:
    """A DINOv2-like tower takes any picture size; the count of its tokens then disagrees with the prompt."""
    batch = training_batch(tiny_shared.processor, ROWS[:1])
    features = MglmmImageFeatures(vision_hidden_states=torch.zeros(1, 9, 32))
    batch.pop("pixel_values")
    with pytest.raises(ValueError, match="tokens: 4, features: 9"):
        tiny_shared.model(**batch, image_features=features)


def test_batch_equals_single_rows(tiny) -> None:
    batch = training_batch(tiny.processor, ROWS)
    with torch.no_grad():
        together = tiny.model(**batch)
        singles = [tiny.model(**training_batch(tiny.processor, [row])) for row in ROWS]
    assert together.mask_image_index.tolist() == [0, 0, 2, 3, 3, 3]
    masks = torch.cat([single.pred_masks for single in singles])
    torch.testing.assert_close(together.pred_masks, masks, rtol=0, atol=1e-4)
    for i, single in enumerate(singles):
        length = single.logits.shape[1]
        torch.testing.assert_close(together.logits[i, :length], single.logits[0], rtol=0, atol=1e-4)


def test_masks_depend_on_their_own_image(tiny) -> None:
    rows = [ROWS[0], (picture(50, 50, 9), *ROWS[2][1:])]
    with torch.no_grad():
        first = tiny.model(**training_batch(tiny.processor, ROWS[:1] + ROWS[2:3])).pred_masks
        second = tiny.model(**training_batch(tiny.processor, rows)).pred_masks
    torch.testing.assert_close(first[:2], second[:2], rtol=0, atol=1e-5)
    assert (first[2] - second[2]).abs().max() > 1e-2


def test_chunks_of_masks_change_nothing(tiny) -> None:
    states, index = torch.randn(5, 48), torch.tensor([0, 1, 1, 0, 1])
    embeddings = torch.randn(2, 32, 4, 4)
    with torch.no_grad():
        whole = tiny.model.model.decode_masks(states, index, embeddings)
        tiny.model.config.mask_chunk_size = 2
        chunks = tiny.model.model.decode_masks(states, index, embeddings)
        tiny.model.config.mask_chunk_size = 8
    torch.testing.assert_close(whole, chunks, rtol=0, atol=1e-5)
    assert tiny.model.model.decode_masks(states[:0], index[:0], embeddings).shape == (0, 16, 16)


def test_image_features_in_place_of_pixels(tiny) -> None:
    batch = training_batch(tiny.processor, ROWS)
    pixels = {name: batch.pop(name) for name in ("pixel_values", "sam_pixel_values")}
    with torch.no_grad():
        direct = tiny.model(**batch, **pixels)
        features = tiny.model.encode_images(**pixels)
        again = tiny.model(**batch, image_features=features)
    torch.testing.assert_close(again.loss, direct.loss)
    torch.testing.assert_close(again.pred_masks, direct.pred_masks)


def test_inputs_embeds_and_tuple_output(tiny) -> None:
    batch = training_batch(tiny.processor, ROWS[:2])
    ids, pixels = batch["input_ids"], batch["pixel_values"]
    rest = {"attention_mask": batch["attention_mask"], "labels": batch["labels"]}
    with torch.no_grad():
        expected = tiny.model(input_ids=ids, pixel_values=pixels, **rest)
        embeds = tiny.model.get_input_embeddings()(ids)
        found = tiny.model(inputs_embeds=embeds, pixel_values=pixels, **rest)
        torch.testing.assert_close(found.logits, expected.logits)
        as_tuple = tiny.model(input_ids=ids, pixel_values=pixels, **rest, return_dict=False)
        assert isinstance(as_tuple, tuple)
        torch.testing.assert_close(as_tuple[0], expected.loss)
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            tiny.model(input_ids=ids, inputs_embeds=embeds)
        with pytest.raises(ValueError, match="mask_labels need input_ids"):
            tiny.model(inputs_embeds=embeds, pixel_values=pixels, mask_labels=batch["mask_labels"])


def test_numbers_of_images_and_masks_are_checked(tiny) -> None:
    batch = training_batch(tiny.processor, ROWS[:2])
    with pytest.raises(ValueError, match="tokens: 8, features: 4"):
        tiny.model(
            **{**batch, "pixel_values": batch["pixel_values"][:1], "sam_pixel_values": batch["sam_pixel_values"][:1]}
        )
    with pytest.raises(ValueError, match="2 images in pixel_values but 1 in sam_pixel_values"):
        tiny.model(**{**batch, "sam_pixel_values": batch["sam_pixel_values"][:1]})
    with pytest.raises(ValueError, match=r"2 \[SEG\] tokens in input_ids but 1 mask_labels"):
        tiny.model(**{**batch, "mask_labels": batch["mask_labels"][:1]})
    with pytest.raises(ValueError, match="mask_labels need sam_pixel_values"):
        tiny.model(**{**batch, "sam_pixel_values": None})
    with pytest.raises(ValueError, match="2 .* but 1 entries in mask_image_index"):
        tiny.model(**batch, mask_image_index=torch.tensor([0]))


def test_seg_state_is_the_one_that_predicts_seg() -> None:
    hidden = torch.arange(10.0).reshape(2, 5, 1)
    ids = torch.tensor([[1, 7, 2, 7, 3], [7, 0, 0, 0, 7]])  # 7 is [SEG]; one at the very start has no predicting state
    states, rows, positions = gather_seg_states(hidden[:, :-1], ids[:, 1:], 7)
    assert states[:, 0].tolist() == [0.0, 2.0, 8.0]
    assert rows.tolist() == [0, 0, 1] and positions.tolist() == [0, 2, 3]


def test_image_of_each_seg() -> None:
    ids = torch.tensor([[9, 9, 5, 9, 9, 5], [0, 0, 0, 1, 1, 1], [0, 9, 9, 5, 5, 1]])  # 9 is <image>, two per image
    rows, positions = torch.tensor([0, 0, 2]), torch.tensor([2, 5, 4])
    assert image_index_of_seg(ids, 9, 2, rows, positions).tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match=r"row 1 holds a \[SEG\] but no image before it; 1 of 2 masks"):
        image_index_of_seg(ids, 9, 2, torch.tensor([0, 1]), torch.tensor([5, 5]))


@pytest.mark.parametrize("variant", ["tiny", "tiny_shared"])
def test_checkpointing_gives_the_same_gradients(variant: str, request) -> None:
    processor = request.getfixturevalue(variant).processor
    batch = training_batch(processor, ROWS)
    found = []
    for checkpointing in (False, True):
        model: MglmmForConditionalGeneration = tiny_model(processor, shared=variant == "tiny_shared").train()
        if checkpointing:
            model.activation_checkpointing_enable()
            assert model.model.gradient_checkpointing and not model.model.vision_tower.training
        model(**batch).loss.backward()
        found.append(gradients(model))
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_text_only_batch_needs_no_images(tiny) -> None:
    batch = training_batch(tiny.processor, TEXT_ONLY)
    assert "pixel_values" not in batch
    batch.pop("mask_labels")
    with torch.no_grad():
        outputs = tiny.model(**batch)
    assert outputs.loss.isfinite() and outputs.pred_masks is None


def test_tuples_by_configuration(tiny) -> None:
    model = tiny_model(tiny.processor)
    batch = training_batch(tiny.processor, ROWS[:1])
    with torch.no_grad():
        expected = model(**batch)
        model.config.return_dict = False
        outputs = model(**batch)
    assert isinstance(outputs, tuple)
    assert torch.equal(outputs[0], expected.loss) and torch.equal(outputs[4], expected.logits)
