"""The region encoder: RoI-align against loops, GLaMM's own numbers, where boxes lie, forward, generation, training."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from transformers import CLIPImageProcessorPil, CLIPVisionModel

from mglmm.modeling_mglmm import MglmmForConditionalGeneration, MglmmImageFeatures
from mglmm.modeling_mglmm.region_encoder import MglmmRegionEncoder, roi_align
from mglmm.processing import MglmmProcessor
from tests.modeling_mglmm.batches import ROWS, TEXT_ONLY, Row, conversation, gradients, training_batch
from tests.tiny import Tiny, picture, script_tokens, tiny_model, tiny_processor

LAYERS = [0, 1, 2]  # of the toy tower's three blocks


def region_processor(shared: bool = False) -> MglmmProcessor:
    plain = tiny_processor(shared)
    return MglmmProcessor(
        plain.image_processor, plain.tokenizer, plain.sam_image_size, patch_size=14, region_token="<region>"
    )


def region_model(processor: MglmmProcessor, shared: bool = False, **kwargs) -> MglmmForConditionalGeneration:
    fields = {
        "region_feature_layers": LAYERS,
        "region_hidden_size": 24,
        "region_token_id": processor.region_token_id,
    }
    return tiny_model(processor, shared, **(fields | kwargs))


@pytest.fixture(scope="module")
def regional() -> Tiny:
    processor = region_processor()
    return Tiny(region_model(processor), processor)


def prompts(processor: MglmmProcessor, rows: list[Row], regions: list[list[float]]) -> dict[str, torch.Tensor]:
    inputs = processor.apply_chat_template(
        [conversation(row, with_answer=False) for row in rows],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "regions": regions},
    )
    inputs.pop("original_sizes", None)
    return dict(inputs)


# ------------------------------------------------------------------ RoI-align


def sample(feature_map: np.ndarray, y: float, x: float) -> float:
    """One bilinear sample as mmcv's RoIAlign takes it."""
    height, width = feature_map.shape
    if y < -1 or y > height or x < -1 or x > width:
        return 0.0
    y, x = max(y, 0.0), max(x, 0.0)
    top, left = int(y), int(x)
    if top >= height - 1:
        top = bottom = height - 1
        y = float(top)
    else:
        bottom = top + 1
    if left >= width - 1:
        left = right = width - 1
        x = float(left)
    else:
        right = left + 1
    dy, dx = y - top, x - left
    return (
        (1 - dy) * (1 - dx) * feature_map[top, left]
        + (1 - dy) * dx * feature_map[top, right]
        + dy * (1 - dx) * feature_map[bottom, left]
        + dy * dx * feature_map[bottom, right]
    )


def roi_align_by_loops(feature_map: np.ndarray, box: np.ndarray) -> np.ndarray:
    """mmcv's RoIAlign(14, sampling_ratio=2, aligned=True, pool_mode="avg"), literally, for one channel and box."""
    left, top, right, bottom = box - 0.5
    bin_height, bin_width = (bottom - top) / 14, (right - left) / 14
    result = np.zeros((14, 14))
    for row in range(14):
        for column in range(14):
            for iy in range(2):
                for ix in range(2):
                    y = top + row * bin_height + (iy + 0.5) * bin_height / 2
                    x = left + column * bin_width + (ix + 0.5) * bin_width / 2
                    result[row, column] += sample(feature_map, y, x) / 4
    return result


BOXES = {
    "inside": (1.2, 2.4, 5.9, 6.1),
    "the whole map": (0, 0, 9, 7),
    "beyond every border": (-3, -4, 14, 12),
    "just beyond, where the border's value counts": (-0.9, -0.9, 9.9, 7.9),
    "wholly outside": (12, 9, 15, 11),
    "wholly outside at the left": (-9, 1, -4, 3),
    "empty": (3.3, 2.2, 3.3, 2.2),
    "empty in one direction": (2, 3.5, 6, 3.5),
    "within a pixel": (4.1, 3.1, 4.2, 3.3),
    "a side on the last pixel": (4, 3, 9, 7),
}


@pytest.mark.parametrize("name", BOXES)
def test_roi_align_equals_the_loops(name: str) -> None:
    maps = torch.randn(2, 7, 9, generator=torch.Generator().manual_seed(0))
    box = torch.tensor([BOXES[name]], dtype=torch.float32)
    expected = [roi_align_by_loops(channel.double().numpy(), box[0].double().numpy()) for channel in maps]
    np.testing.assert_allclose(roi_align(maps, box)[0], np.stack(expected), atol=2e-5)


side = st.floats(-4, 14, width=32)


@settings(max_examples=25)
@given(st.tuples(side, side, side, side), st.sampled_from([(1, 1), (1, 6), (5, 2), (8, 8)]))
def test_roi_align_equals_the_loops_for_any_box(corners: tuple[float, ...], shape: tuple[int, int]) -> None:
    (left, right), (top, bottom) = sorted(corners[::2]), sorted(corners[1::2])
    maps = torch.randn(1, *shape, generator=torch.Generator().manual_seed(1))
    box = np.array([left, top, right, bottom])
    found, expected = (
        roi_align(maps, torch.tensor(box[None], dtype=torch.float32)),
        roi_align_by_loops(maps[0].double().numpy(), box),
    )
    # Samples that lie on a limit fall to one side or the other by rounding.
    near = np.isclose(found[0, 0], expected, atol=1e-4)
    limits = [
        abs(a - 0.5 + (b - a) * (k + 0.5) / 28 - limit) < 1e-4
        for a, b, size in ((left, right, shape[1]), (top, bottom, shape[0]))
        for k in range(28)
        for limit in (-1, size)
    ]
    assert near.all() or any(limits)


def test_roi_align_of_several_boxes_is_that_of_each() -> None:
    maps = torch.randn(3, 7, 9, generator=torch.Generator().manual_seed(2))
    boxes = torch.tensor(list(BOXES.values()))
    together = roi_align(maps, boxes)
    assert together.shape == (len(BOXES), 3, 14, 14)
    torch.testing.assert_close(together, torch.cat([roi_align(maps, box[None]) for box in boxes]))
    assert roi_align(maps, boxes[:0]).shape == (0, 3, 14, 14)
    assert roi_align(maps.bfloat16(), boxes).dtype == torch.float32


# ------------------------------------------------------------------ GLaMM's own numbers


@pytest.fixture(scope="module")
def golden(shared_dir: Path) -> Path:
    folder = shared_dir / "golden" / "glamm"
    if not folder.is_dir():
        pytest.skip("needs the golden files of GLaMM")
    return folder


def load_golden_encoder(folder: Path) -> MglmmRegionEncoder:
    index = json.loads((folder / "ckpt" / "pytorch_model.bin.index.json").read_text())["weight_map"]
    prefix = "model.region_encoder."
    state = {}
    for file in sorted({file for name, file in index.items() if name.startswith(prefix)}):
        tensors = torch.load(folder / "ckpt" / file, weights_only=True, map_location="cpu")
        state |= {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    renamed = {}
    for name, value in state.items():
        name = name.replace("mlvl_fuse.", "fuse.").replace("fuse_convs.", "convs.").replace(".gn.", ".norm.")
        renamed[name.replace("roi_align.", "roi.")] = value
    encoder = MglmmRegionEncoder(128, 4, 64, 64).eval()
    encoder.load_state_dict(renamed)  # strict: exactly these names and shapes
    return encoder


@torch.no_grad()
def test_features_equal_those_of_the_original(golden: Path) -> None:
    tower_folder = next((golden / "openai").iterdir())
    tower = CLIPVisionModel.from_pretrained(tower_folder).eval()
    pixels = CLIPImageProcessorPil.from_pretrained(tower_folder)(
        [Image.open(golden.parent / "images" / f"{name}.png").convert("RGB") for name in "AB"], return_tensors="pt"
    )["pixel_values"]
    layers = tower(pixels, output_hidden_states=True).hidden_states
    states = torch.stack([layers[i][:, 1:] for i in (2, 5, 8, 11)], dim=1)  # hidden_states[-2::-3], reversed
    encoder = load_golden_encoder(golden)
    arrays = np.load(golden / "goldens.npz")
    boxes = [torch.from_numpy(arrays[f"train_region.bboxes.{i}"]) for i in range(2)]
    index = torch.tensor([0] * len(boxes[0]) + [1] * len(boxes[1]))
    expected = np.concatenate([arrays[f"train_region.region_feats.{i}"] for i in range(2)])
    fused = []
    encoder.fuse.register_forward_hook(lambda *call: fused.append(call[-1]))
    order = torch.tensor([3, 0, 4, 1, 2])  # whatever the order of the boxes
    found = encoder(states, torch.cat(boxes)[order], index[order], 224 / 14)
    np.testing.assert_allclose(found, expected[order], atol=1e-4)
    for level in range(4):
        maps = torch.cat([levels[level] for levels in fused])
        np.testing.assert_allclose(
            maps[:, ::16, ::8, ::8], arrays[f"train_region.fused_s.{level}"], atol=1e-4, err_msg=f"level {level}"
        )


# ------------------------------------------------------------------ where boxes lie


def encoder_that_shows_what_it_pools(levels: int, channels: int) -> MglmmRegionEncoder:
    """Level maps pass `fuse` unchanged and every output is the mean of what lies in the box, on all levels."""
    encoder = MglmmRegionEncoder(channels, levels, 8, 1).eval()
    encoder.fuse = nn.Identity()
    for conv in encoder.roi.pconvs:
        nn.init.dirac_(conv.weight)
        nn.init.zeros_(conv.bias)
    encoder.roi.pos_embedd = nn.Sequential(nn.Linear(4, 8))
    for layer in (encoder.roi.pos_embedd[0], encoder.roi.flatten_linear, encoder.roi.updims):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    encoder.roi.flatten_linear.weight.data[0] = 1 / (levels * channels * 14 * 14)
    encoder.roi.updims.weight.data[0, 0] = 1
    return encoder


@pytest.mark.parametrize("quadrant", [0, 1, 2, 3])
@pytest.mark.parametrize("levels", [1, 4])
@torch.no_grad()
def test_a_box_sees_what_lies_in_it_with_the_right_scale_only(quadrant: int, levels: int) -> None:
    row, column = divmod(quadrant, 2)
    grid = torch.zeros(24, 24)
    grid[12 * row : 12 * row + 12, 12 * column : 12 * column + 12] = 1
    states = grid.reshape(1, 1, 576, 1).expand(1, levels, 576, 4)
    encoder = encoder_that_shows_what_it_pools(levels, 4)
    # A margin, because bilinear levels blur the quadrant's border.
    boxes = torch.tensor([[x / 2 + 0.05, y / 2 + 0.05, x / 2 + 0.45, y / 2 + 0.45] for y in (0, 1) for x in (0, 1)])
    index = torch.zeros(4, dtype=torch.long)
    expected = torch.eye(4)[quadrant]
    torch.testing.assert_close(encoder(states, boxes, index, 24.0)[:, 0], expected, atol=0.01, rtol=0)
    # With GLaMM's 224 of 336 the boxes of the other quadrants reach into the first: (15.2 - 12) / (15.2 - 8.8) of a side
    # is bright.
    shrunk = encoder(states, boxes, index, 224 / 14)[quadrant, 0]
    assert float(shrunk) == pytest.approx([1.0, 0.5, 0.5, 0.25][quadrant], abs=0.03)


@pytest.mark.parametrize(
    ("fields", "image_size", "cells"),
    [
        ({}, 28, 2.0),  # the tower's own picture
        ({"region_scale": 28}, 28, 2.0),
        ({"region_scale": 14}, 28, 1.0),  # GLaMM's way: less than the picture
        ({}, 56, 4.0),  # a tower run at another size than its configuration says
        ({}, 34, 34 / 14),  # patches that do not reach the picture's border
    ],
)
def test_scale_of_boxes_follows_from_the_grid(regional: Tiny, fields, image_size: int, cells: float) -> None:
    processor = regional.processor
    model = region_model(processor, **fields)
    if image_size == 34:
        model.config.vision_config.image_size = 34
    grid = image_size // 14
    features = MglmmImageFeatures(
        vision_hidden_states=torch.zeros(1, grid**2, 32), region_hidden_states=torch.zeros(1, 3, grid**2, 32)
    )
    calls = []
    model.model.region_encoder.register_forward_pre_hook(lambda module, args: calls.append(args))
    ids = torch.tensor([[processor.image_token_id] * grid**2 + [processor.region_token_id]])
    model.model.get_region_features(ids, torch.tensor([[0.0, 0.0, 1.0, 1.0]]), features)
    assert calls[0][3] == pytest.approx(cells)


# ------------------------------------------------------------------ forward


REGION_ROWS: list[Row] = [
    (picture(40, 60, 0), "What is in <region>?", "A <p> hat </p> [SEG]."),
    (picture(40, 60, 1), "Describe the image.", "The sky."),
    (picture(40, 60, 2), "Compare <region> and <region>.", "A <p> dog </p> [SEG] and <p> hair </p> [SEG]."),
]
REGIONS = [[12, 2, 40, 30], [11, 1, 30, 39], [20.5, 5, 49, 20]]  # within the square in the middle, x 10 to 50


def region_batch(processor: MglmmProcessor, rows: list[Row], regions: list[list[float]]) -> dict[str, torch.Tensor]:
    images = [row[0] for row in rows if row[0] is not None]
    text = [(image, question.replace("<region>", "it"), answer) for image, question, answer in rows]
    batch = training_batch(processor, text)
    inputs = processor.apply_chat_template(
        [conversation(row, with_answer=True) for row in rows],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
        processor_kwargs={"padding": True, "padding_side": "right", "regions": regions},
    )
    assert len(inputs.pop("original_sizes", ())) == len(images)
    supervised = inputs.pop("assistant_masks").bool()
    labels = inputs["input_ids"].masked_fill(~supervised, -100)
    return {**inputs, "labels": labels, "mask_labels": batch["mask_labels"]}


def test_encode_images_reads_all_layers_in_one_run(regional: Tiny) -> None:
    model = regional.model
    pixels = torch.rand(2, 3, 28, 28)
    runs = []
    hook = model.model.vision_tower.register_forward_hook(lambda *call: runs.append(1))
    features = model.encode_images(pixels)
    hook.remove()
    assert len(runs) == 1
    layers = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    expected = torch.stack([layers[i][:, 1:] for i in LAYERS], dim=1)
    torch.testing.assert_close(features.region_hidden_states, expected)
    torch.testing.assert_close(features.vision_hidden_states, layers[-2][:, 1:])


def test_models_without_region_encoder_have_no_region_features(tiny: Tiny) -> None:
    assert "region_hidden_states" not in tiny.model.encode_images(torch.rand(1, 3, 28, 28)).keys()
    assert not [name for name in tiny.model.state_dict() if "region" in name]


@pytest.mark.parametrize("shared", [False, True])
def test_a_batch_equals_its_rows(regional: Tiny, shared: bool) -> None:
    processor = region_processor(shared)
    model = region_model(processor, shared) if shared else regional.model
    counts = [0, 1, 1, 3]
    with torch.no_grad():
        together = model(**region_batch(processor, REGION_ROWS, REGIONS))
        for i, row in enumerate(REGION_ROWS):
            single = region_batch(processor, [row], REGIONS[counts[i] : counts[i + 1]])
            alone = model(**single).logits
            torch.testing.assert_close(together.logits[i : i + 1, : alone.shape[1]], alone, atol=1e-4, rtol=1e-4)


def test_boxes_and_their_order_matter(regional: Tiny) -> None:
    batch = region_batch(regional.processor, REGION_ROWS, REGIONS)
    with torch.no_grad():
        logits = regional.model(**batch).logits
        swapped = regional.model(**{**batch, "region_boxes": batch["region_boxes"][[0, 2, 1]]}).logits
    assert torch.equal(logits[:2], swapped[:2])
    assert (logits[2] - swapped[2]).abs().max() > 1e-2


def test_features_in_place_of_pixels(regional: Tiny) -> None:
    batch = region_batch(regional.processor, REGION_ROWS, REGIONS)
    with torch.no_grad():
        expected = regional.model(**batch).logits
        features = regional.model.encode_images(batch.pop("pixel_values"), batch.pop("sam_pixel_values"))
        torch.testing.assert_close(regional.model(**batch, image_features=features).logits, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        # GLaMM would drop the second box in silence
        (lambda b: b | {"region_boxes": torch.cat([b["region_boxes"]] * 2)}, "3 region tokens .* but 6 region_boxes"),
        (lambda b: b | {"region_boxes": b["region_boxes"][:1]}, "3 region tokens .* but 1 region_boxes"),
        (lambda b: b | {"region_boxes": None, "labels": None}, "3 region tokens .* pass region_boxes"),
        (lambda b: b | {"region_boxes": b["region_boxes"].flatten()}, r"must be \(total_regions, 4\), got \(12,\)"),
        (lambda b: b | {"pixel_values": None}, "3 region_boxes need the pictures"),
    ],
)
def test_errors_of_forward(regional: Tiny, change, message: str) -> None:
    batch = change(region_batch(regional.processor, REGION_ROWS, REGIONS))
    batch["mask_labels"] = None
    with pytest.raises(ValueError, match=message):
        regional.model(**batch)


def test_a_region_needs_an_image_before_it(regional: Tiny) -> None:
    processor = regional.processor
    ids = torch.tensor([[processor.region_token_id] + [processor.image_token_id] * 4])
    features = regional.model.encode_images(torch.rand(1, 3, 28, 28))
    with pytest.raises(ValueError, match="row 0 holds a region token but no image before it"):
        regional.model(input_ids=ids, image_features=features, region_boxes=torch.tensor([[0.0, 0, 1, 1]]))


def test_a_model_without_region_encoder_says_so(tiny: Tiny) -> None:
    with pytest.raises(ValueError, match="1 region_boxes, but this model has no region encoder: use one that has"):
        tiny.model(input_ids=torch.tensor([[5, 6]]), region_boxes=torch.tensor([[0.0, 0, 1, 1]]))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"region_feature_layers": []}, "at least one layer"),
        ({"region_token_id": None}, "needs region_token_id"),
        ({"region_scale": 0}, "must be >= 1"),
    ],
)
def test_errors_of_the_configuration(regional: Tiny, fields, message: str) -> None:
    with pytest.raises(StrictDataclassError, match=message):
        region_model(regional.processor, **fields)


def test_saving_and_loading(regional: Tiny, tmp_path: Path) -> None:
    batch = region_batch(regional.processor, REGION_ROWS, REGIONS)
    regional.model.save_pretrained(tmp_path)
    loaded = MglmmForConditionalGeneration.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, regional.model(**batch).logits)


def test_a_fresh_encoder_keeps_the_scale_of_its_input() -> None:
    torch.manual_seed(0)
    encoder = MglmmRegionEncoder(64, 4, 32, 48)
    for parameter in encoder.parameters():
        parameter.data.fill_(torch.nan)
    for module in encoder.modules():
        if isinstance(module, nn.GroupNorm | nn.LayerNorm):
            module.reset_parameters()
    encoder.init_parameters()
    vector = encoder(torch.randn(1, 4, 4, 64), torch.tensor([[0.0, 0, 1, 1]]), torch.tensor([0]), 2.0)
    assert 0.05 < float(vector.detach().std()) < 2


# ------------------------------------------------------------------ generation


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}, {"prefill_chunk_size": 7}]
)
def test_generation_equals_teacher_forcing(regional: Tiny, options) -> None:
    model, processor = regional
    encoder_calls = []
    hook = model.model.region_encoder.register_forward_hook(lambda *call: encoder_calls.append(1))
    copies = options.get("num_return_sequences", 1)
    answers = script_tokens(model, processor, [" " + row[2] for row in REGION_ROWS], options.get("num_beams", 1))
    generated = model.generate(
        **prompts(processor, REGION_ROWS, REGIONS),
        output_masks=True,
        max_new_tokens=40,
        logits_processor=answers,
        **options,
    )
    hook.remove()
    assert len(encoder_calls) == 1
    with torch.no_grad():
        expected = model(**region_batch(processor, REGION_ROWS, REGIONS)).pred_masks.split([1, 0, 2])
    for i, masks in enumerate(generated.pred_masks):
        torch.testing.assert_close(masks, expected[i // copies], atol=1e-3, rtol=1e-3)


def test_a_region_token_that_the_model_writes_is_a_token_like_others(regional: Tiny) -> None:
    answers = script_tokens(regional.model, regional.processor, ["<region> <region>"])
    inputs = prompts(regional.processor, REGION_ROWS[1:2], [])
    generated = regional.model.generate(**inputs, max_new_tokens=5, logits_processor=answers)
    assert (generated == regional.processor.region_token_id).sum() == 2


def test_generation_refuses_regions_without_boxes(regional: Tiny) -> None:
    inputs = prompts(regional.processor, REGION_ROWS, REGIONS)
    inputs.pop("region_boxes")
    with pytest.raises(ValueError, match="3 region tokens in input_ids but 0 regions: pass region_boxes"):
        regional.model.generate(**inputs, max_new_tokens=2)


# ------------------------------------------------------------------ training


def test_every_kind_of_batch_gives_gradients_to_the_same_parameters(regional: Tiny) -> None:
    processor = regional.processor
    model = copy.deepcopy(regional.model).train()
    named = {}
    batches = {
        "regions": region_batch(processor, REGION_ROWS, REGIONS),
        "images only": training_batch(processor, ROWS),
        "text only": training_batch(processor, TEXT_ONLY),
    }
    for kind, batch in batches.items():
        model.zero_grad()
        model(**batch).loss.backward()
        named[kind] = gradients(model)
        region = {name: grad for name, grad in named[kind].items() if ".region_encoder." in name}
        assert len(region) == len(list(model.model.region_encoder.parameters()))
        assert all(grad.isfinite().all() for grad in region.values())
        assert any(bool(grad.any()) for grad in region.values()) == (kind == "regions")
    assert named["regions"].keys() == named["images only"].keys() == named["text only"].keys()


def test_gradient_checkpointing_changes_no_gradient(regional: Tiny) -> None:
    model = copy.deepcopy(regional.model).train()
    batch = region_batch(regional.processor, REGION_ROWS, REGIONS)
    model(**batch).loss.backward()
    plain = gradients(model)
    model.zero_grad()
    model.activation_checkpointing_enable()
    assert model.model.region_encoder.gradient_checkpointing
    model(**batch).loss.backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, plain[name], atol=1e-4, rtol=1e-3)


def test_which_quadrant_is_bright_can_be_learnt() -> None:
    """One of four boxes is bright, another one in every picture: to be told from the pixels only."""
    torch.manual_seed(0)
    encoder = MglmmRegionEncoder(8, 2, 16, 2)
    encoder.init_parameters()
    before = {name: parameter.detach().clone() for name, parameter in encoder.named_parameters()}
    optimizer = torch.optim.Adam(encoder.parameters(), lr=1e-2)
    boxes = torch.tensor([[x / 2, y / 2, x / 2 + 0.5, y / 2 + 0.5] for y in (0, 1) for x in (0, 1)])

    def batch(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        bright = torch.eye(4, dtype=torch.long)[torch.randint(0, 4, (count,), generator=generator)]
        grid = bright.reshape(count, 2, 2).float().repeat_interleave(2, 1).repeat_interleave(2, 2)
        noise = torch.randn(count, 2, 16, 8, generator=generator) * 0.1
        return grid.reshape(count, 1, 16, 1) * torch.linspace(-1, 1, 8) + noise, bright.flatten()

    def logits(states: torch.Tensor) -> torch.Tensor:
        index = torch.arange(len(states)).repeat_interleave(4)
        return encoder(states, boxes.repeat(len(states), 1), index, 4.0)

    generator = torch.Generator().manual_seed(0)
    for _ in range(45):
        states, labels = batch(4, generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits(states), labels).backward()
        optimizer.step()
    assert not [name for name, parameter in encoder.named_parameters() if torch.equal(parameter, before[name])]
    with torch.no_grad():
        states, labels = batch(16, generator)
        assert (logits(states).argmax(1) == labels).float().mean() > 0.95  # 0.75 is what "dark" for all would give
