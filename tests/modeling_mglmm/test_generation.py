"""Generation with masks: the states of the generation itself, one pass of everything, batches equal to single rows."""

from collections import Counter
from contextlib import contextmanager

import pytest
import torch

from mglmm.modeling_mglmm import MglmmGenerateOutput, MglmmImageFeatures
from mglmm.modeling_mglmm.generation_mglmm import mask_confidence
from tests.modeling_mglmm.batches import ROWS, TEXT_ONLY, conversation, prompts
from tests.modeling_mglmm.test_modeling import LANGUAGE_MODELS, text_config
from tests.tiny import picture, script_tokens, tiny_model

MODES = {
    "greedy": {},
    "sampling": {"do_sample": True},
    "several samples": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"num_beams": 2},
    "several beams": {"num_beams": 3, "num_return_sequences": 2, "output_scores": True},
    "sampled beams": {"num_beams": 2, "do_sample": True},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "chunked prefill": {"prefill_chunk_size": 50},
}


@contextmanager
def counted_calls(model):
    """Counts the forward calls of the encoders and of the language model."""
    calls: Counter[str] = Counter()
    hooks = [
        module.register_forward_hook(lambda *_, name=name: calls.update([name]))
        for name, module in model.model.named_children()
        if name in ("vision_tower", "pixel_encoder", "language_model", "mask_decoder", "pixel_neck")
    ]
    yield calls
    for hook in hooks:
        hook.remove()


def often_seg(model, bias: float = 6.0) -> dict:
    """Options of `generate` under which a random model writes some [SEG]s."""
    return {"max_new_tokens": 12, "sequence_bias": [[[model.config.seg_token_id], bias]]}


def teacher_forced(model, inputs: dict, output: MglmmGenerateOutput) -> torch.Tensor:
    """Masks of one plain forward pass over the generated sequences."""
    copies = len(output.sequences) // len(inputs["input_ids"])
    mask = inputs["attention_mask"].repeat_interleave(copies, 0)
    mask = torch.cat([mask, mask.new_ones(output.generated_ids.shape)], 1)
    pixels = {k: inputs[k].repeat_interleave(copies, 0) for k in ("pixel_values", "sam_pixel_values") if k in inputs}
    with torch.no_grad():
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        return model(input_ids=output.sequences, attention_mask=mask, position_ids=positions, **pixels)


@pytest.mark.parametrize("mode", MODES)
def test_masks_are_those_of_teacher_forcing(tiny, mode: str) -> None:
    model = tiny.model
    inputs = prompts(tiny.processor, ROWS)
    torch.manual_seed(1)
    output = model.generate(**inputs, output_masks=True, **often_seg(model), **MODES[mode])
    assert len(output.pred_masks) == len(output.sequences) == 4 * MODES[mode].get("num_return_sequences", 1)
    is_seg = output.generated_ids == model.config.seg_token_id
    assert [len(masks) for masks in output.pred_masks] == is_seg.sum(1).tolist()
    assert 4 <= is_seg.sum() < is_seg.numel()
    expected = teacher_forced(model, inputs, output)
    torch.testing.assert_close(torch.cat(output.pred_masks), expected.pred_masks, rtol=0, atol=1e-4)
    assert (output.sequences_scores is not None) == ("output_scores" in MODES[mode])

    # p([SEG]) x mean probability of the mask's own foreground
    length = inputs["input_ids"].shape[1]
    probability = expected.logits.softmax(-1)[:, length - 1 : -1, model.config.seg_token_id][is_seg]
    confidence = torch.stack([m.sigmoid()[m > 0].mean() if (m > 0).any() else m.sum() * 0 for m in expected.pred_masks])
    torch.testing.assert_close(torch.cat(output.mask_scores), probability * confidence, rtol=1e-3, atol=1e-5)


def test_confidence_of_a_mask() -> None:
    masks = torch.tensor([[[-1.0, -2.0]], [[0.0, 2.0]], [[1.0, 3.0]]])
    expected = [0.0, 0.880797, (0.731059 + 0.952574) / 2]  # 0 for an empty mask
    assert mask_confidence(masks).tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("name", "shared"), [*((name, False) for name in LANGUAGE_MODELS), ("llama", True)])
def test_batch_equals_single_rows(tiny, tiny_shared, name: str, shared: bool) -> None:
    processor = (tiny_shared if shared else tiny).processor
    model = tiny_model(processor, shared, text_config=text_config(processor, LANGUAGE_MODELS[name]))
    output = model.generate(**prompts(processor, ROWS), output_masks=True, **often_seg(model))
    for i, row in enumerate(ROWS):
        single = model.generate(**prompts(processor, [row]), output_masks=True, **often_seg(model))
        generated = single.generated_ids[0].tolist()
        assert output.generated_ids[i, : len(generated)].tolist() == generated
        torch.testing.assert_close(output.pred_masks[i], single.pred_masks[0], rtol=0, atol=1e-4)
        torch.testing.assert_close(output.mask_scores[i], single.mask_scores[0], rtol=0, atol=1e-4)


def test_scripted_batch_with_a_row_that_gets_no_mask(tiny) -> None:
    model, processor = tiny
    answers = [row[2] for row in ROWS]
    script = script_tokens(model, processor, answers)
    output = model.generate(**prompts(processor, ROWS), output_masks=True, max_new_tokens=60, logits_processor=script)
    assert [len(masks) for masks in output.pred_masks] == [2, 0, 1, 3]
    assert output.pred_masks[1].shape == (0, 16, 16) and output.mask_scores[1].shape == (0,)
    for i, row in enumerate(ROWS):
        script = script_tokens(model, processor, answers[i : i + 1])
        single = model.generate(
            **prompts(processor, [row]), output_masks=True, max_new_tokens=60, logits_processor=script
        )
        torch.testing.assert_close(output.pred_masks[i], single.pred_masks[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("mode", ["greedy", "several beams", "no cache"])
@pytest.mark.parametrize("shared", [False, True])
def test_everything_runs_once(tiny, tiny_shared, mode: str, shared: bool) -> None:
    model, processor = tiny_shared if shared else tiny
    inputs = prompts(processor, ROWS)
    script = script_tokens(model, processor, [ROWS[0][2]], rows_per_prompt=MODES[mode].get("num_beams", 1))
    with counted_calls(model) as calls:
        output = model.generate(**inputs, output_masks=True, max_new_tokens=60, logits_processor=script, **MODES[mode])
    assert sum(map(len, output.pred_masks)) == 2 * len(output.sequences)
    assert calls["vision_tower"] == 1
    assert calls["pixel_encoder"] == (0 if shared else 1) and calls["pixel_neck"] == (1 if shared else 0)
    masks = 2 * len(output.sequences)
    assert calls["mask_decoder"] == -(-masks // model.config.mask_chunk_size)  # once for every eight masks
    assert calls["language_model"] == output.generated_ids.shape[1]


def test_encode_once_and_ask_many_times(tiny) -> None:
    model, processor = tiny
    inputs = prompts(processor, ROWS)
    direct = model.generate(**inputs, output_masks=True, **often_seg(model))
    features = model.encode_images(inputs.pop("pixel_values"), inputs.pop("sam_pixel_values"))
    for _ in range(2):
        with counted_calls(model) as calls:
            output = model.generate(**inputs, image_features=features, output_masks=True, **often_seg(model))
        assert calls["vision_tower"] == calls["pixel_encoder"] == 0
        assert torch.equal(output.sequences, direct.sequences)
        torch.testing.assert_close(torch.cat(output.pred_masks), torch.cat(direct.pred_masks))
    # half-precision features, as a cache stores them
    half = MglmmImageFeatures(**{name: value.half() for name, value in features.items()})
    output = model.generate(**inputs, image_features=half, output_masks=True, **often_seg(model))
    assert torch.cat(output.pred_masks).dtype == torch.float32


def test_without_masks_it_is_the_generate_of_transformers(tiny) -> None:
    model, processor = tiny
    inputs = prompts(processor, ROWS[:2])
    with counted_calls(model) as calls:
        ids = model.generate(**inputs, **often_seg(model))
    assert isinstance(ids, torch.Tensor) and calls["pixel_encoder"] == calls["mask_decoder"] == 0
    masks = model.generate(**inputs, output_masks=True, **often_seg(model))
    assert torch.equal(masks.sequences, ids)
    length = inputs["input_ids"].shape[1]
    assert torch.equal(masks.generated_ids, ids[:, length:])
    no_sam = {name: value for name, value in inputs.items() if name != "sam_pixel_values"}
    assert torch.equal(model.generate(**no_sam, **often_seg(model)), ids)
    as_dict = model.generate(**inputs, **often_seg(model), return_dict_in_generate=True, output_scores=True)
    assert torch.equal(as_dict.sequences, ids) and len(as_dict.scores) == ids.shape[1] - length
    assert torch.equal(model.generate(inputs.pop("input_ids"), **inputs, **often_seg(model)), ids)  # positional


def test_takes_all_that_the_processor_gives(tiny) -> None:
    model, processor = tiny
    inputs = processor(images=picture(), text="<image> hat?", return_tensors="pt")
    assert "original_sizes" in inputs
    assert model.generate(**inputs, output_masks=True, **often_seg(model)).sequences.shape[0] == 1


def test_rows_without_image_have_no_masks(tiny) -> None:
    """A model may write [SEG] where there is nothing to segment; the other rows must not suffer."""
    model, processor = tiny
    rows = [ROWS[0], TEXT_ONLY[0], ROWS[2]]
    answers = ["<p> hat </p> [SEG]", "<p> a </p> [SEG] [SEG]", "<p> hair </p> [SEG] [SEG]"]
    script = script_tokens(model, processor, answers)
    output = model.generate(**prompts(processor, rows), output_masks=True, max_new_tokens=40, logits_processor=script)
    assert [len(masks) for masks in output.pred_masks] == [1, 0, 2]
    single = model.generate(
        **prompts(processor, rows[2:]),
        output_masks=True,
        max_new_tokens=40,
        logits_processor=script_tokens(model, processor, answers[2:]),
    )
    torch.testing.assert_close(output.pred_masks[2], single.pred_masks[0], rtol=0, atol=1e-4)


def test_seg_of_the_history_is_not_generated_again(tiny) -> None:
    model, processor = tiny
    turns = conversation(ROWS[0], with_answer=True) + conversation((None, "And the dog?", ""), with_answer=False)
    inputs = processor.apply_chat_template(
        turns, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert (inputs["input_ids"] == model.config.seg_token_id).sum() == 2
    script = script_tokens(model, processor, ["<p> dog </p> [SEG]"])
    output = model.generate(**inputs, output_masks=True, max_new_tokens=40, logits_processor=script)
    assert len(output.pred_masks[0]) == 1


def test_several_images_in_one_prompt(tiny) -> None:
    """A generated [SEG] speaks of the last image of its prompt."""
    model, processor = tiny
    first, second = picture(40, 60, 5), picture(40, 60, 6)
    script = {"output_masks": True, "max_new_tokens": 3}
    masks = []
    for images in ([first, second], [second, second], [first, first]):
        inputs = processor(images=[images], text="<image> and <image> hat", return_tensors="pt")
        features = model.encode_images(inputs["pixel_values"], inputs["sam_pixel_values"])
        features.vision_hidden_states = features.vision_hidden_states * 0  # the same states, so only the image differs
        answers = script_tokens(model, processor, ["[SEG]"])
        output = model.generate(inputs["input_ids"], image_features=features, logits_processor=answers, **script)
        masks.append(output.pred_masks[0])
    torch.testing.assert_close(masks[0], masks[1], rtol=0, atol=1e-5)
    assert (masks[0] - masks[2]).abs().max() > 1e-2


def test_what_masks_need_is_checked_before_generating(tiny) -> None:
    model, processor = tiny
    inputs = prompts(processor, ROWS[:1])
    pixels, sam_pixels = inputs.pop("pixel_values"), inputs.pop("sam_pixel_values")
    text = prompts(processor, TEXT_ONLY)
    features = model.encode_images(pixels, sam_pixels)
    with pytest.raises(ValueError, match="output_masks=True needs images"):
        model.generate(**text, output_masks=True, max_new_tokens=2)
    with pytest.raises(ValueError, match="pass pixel_values and sam_pixel_values"):
        model.generate(**inputs, pixel_values=pixels, output_masks=True, max_new_tokens=2)
    with pytest.raises(ValueError, match="either pixel_values or image_features"):
        model.generate(**inputs, pixel_values=pixels, image_features=features, max_new_tokens=2)
    with pytest.raises(ValueError, match="assisted decoding"):
        model.generate(**inputs, image_features=features, output_masks=True, prompt_lookup_num_tokens=2)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    with pytest.raises(ValueError, match="needs input_ids"):
        model.generate(inputs_embeds=embeds, image_features=features, output_masks=True, max_new_tokens=2)
    with pytest.raises(ValueError, match="tokens: 4, features: 8"):
        two = MglmmImageFeatures(**{name: value.repeat(2, *[1] * (value.ndim - 1)) for name, value in features.items()})
        model.generate(**inputs, image_features=two, max_new_tokens=2)
