"""Boxes in pixels to boxes for the model: what the tower sees, wrong boxes, `<region>` in text and pipeline."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import CLIPImageProcessorPil

from mglmm.processing import MglmmProcessor
from mglmm.processing.pipeline_mglmm import TASK, MglmmPipeline
from mglmm.processing.regions import middle_of, tower_view
from tests.tiny import Tiny, picture, script_tokens, tiny_model, tiny_processor


def region_processor(token: str = "<region>", shared: bool = False, **kwargs: Any) -> MglmmProcessor:
    plain = tiny_processor(shared)
    options = {"sam_image_size": plain.sam_image_size, "patch_size": 14, "region_token": token}
    return MglmmProcessor(plain.image_processor, plain.tokenizer, **(options | kwargs))


@pytest.fixture(scope="module")
def processor() -> MglmmProcessor:
    return region_processor()


def boxes_of(processor: MglmmProcessor, size: tuple[int, int], *regions: Any) -> np.ndarray:
    """`region_boxes` for a picture of `size` (height, width)."""
    text = "<image>" + " <region>" * len(regions)
    image = Image.new("RGB", size[::-1])
    return processor(images=image, text=text, regions=list(regions), return_tensors="pt")["region_boxes"].numpy()


# ------------------------------------------------------------------ what the tower sees


@pytest.mark.parametrize(
    ("size", "box", "tower", "whole"),
    [
        # square: the frames are one
        ((100, 100), [10, 20, 60, 80], [0.1, 0.2, 0.6, 0.8], [0.1, 0.2, 0.6, 0.8]),
        # wide, 50 x 100: the tower sees x from 25 to 75
        ((50, 100), [25, 0, 75, 50], [0, 0, 1, 1], [0.25, 0, 0.75, 1]),
        ((50, 100), [50, 10, 60, 25], [0.5, 0.2, 0.7, 0.5], [0.5, 0.2, 0.6, 0.5]),
        # sticks out of the crop: cut off
        ((50, 100), [0, 10, 50, 25], [0, 0.2, 0.5, 0.5], [0, 0.2, 0.5, 0.5]),
        # high, 80 x 40: the tower sees y from 20 to 60
        ((80, 40), [10, 30, 20, 100 - 20], [0.25, 0.25, 0.5, 1], [0.25, 0.375, 0.5, 1]),
        # sticks out of the picture by less than a pixel: annotations are rounded
        ((100, 100), [-0.4, 0, 100.6, 50], [0, 0, 1, 0.5], [0, 0, 1, 0.5]),
    ],
)
def test_boxes_in_both_frames(size: tuple[int, int], box: list[float], tower: list[float], whole: list[float]) -> None:
    for frame, expected in (("tower", tower), ("picture", whole)):
        found = boxes_of(region_processor(region_box_frame=frame), size, box)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, [expected], atol=1e-6)


def test_a_shared_tower_sees_the_whole_picture() -> None:
    found = boxes_of(region_processor(shared=True), (50, 100), [0, 10, 50, 25])
    np.testing.assert_allclose(found, [[0, 0.2, 0.5, 0.5]], atol=1e-6)


VIEWS = {
    "shortest edge and crop": {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}},
    "less cropped than resized": {"size": {"shortest_edge": 64}, "crop_size": {"height": 56, "width": 56}},
    "crop larger than the picture: padded": {"size": {"shortest_edge": 40}, "crop_size": {"height": 56, "width": 56}},
    "crop of another shape": {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 28}},
    "stretched, then cropped": {"size": {"height": 80, "width": 60}, "crop_size": {"height": 56, "width": 56}},
    "stretched": {"size": {"height": 56, "width": 42}, "do_center_crop": False},
    "cropped only": {"do_resize": False, "crop_size": {"height": 56, "width": 56}},
}


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("size", [(90, 90), (70, 131), (140, 61), (60, 1300)])
def test_the_view_is_where_the_image_processor_looks(name: str, size: tuple[int, int]) -> None:
    """A picture of its own coordinates, before and after the image processor (a linear ramp survives any resize)."""
    image_processor = CLIPImageProcessorPil(do_normalize=False, resample=Image.Resampling.BILINEAR, **VIEWS[name])
    height, width = size
    kept = middle_of(size) if image_processor.do_center_crop else (0, 0, width, height)
    view = tower_view(size, image_processor)
    for axis, side in enumerate((width, height)):
        ramp = np.linspace(0, 1, 64 * side)[::64] * 200 + 20  # pixel i is 200 * i / side + 20
        values = np.broadcast_to(ramp if axis == 0 else ramp[:, None], size).round().astype(np.uint8)
        shown = Image.fromarray(values).convert("RGB").crop(kept)
        pixels = image_processor([shown], return_tensors="np")["pixel_values"][0, 0] * 255
        profile = pixels[pixels.shape[0] // 2] if axis == 0 else pixels[:, pixels.shape[1] // 2]
        inner = slice(len(profile) // 2 - 8, len(profile) // 2 + 8)  # away from padding
        seen = (profile[inner] - 20) / 200 * side + 0.5  # coordinate of the centres of the tower's pixels
        start, end = view[axis], view[axis + 2]
        expected = start + (np.arange(len(profile))[inner] + 0.5) / len(profile) * (end - start)
        np.testing.assert_allclose(seen, expected, atol=max(1.0, side / 150))  # 8 bits: a step is side / 200 pixels


@settings(max_examples=30)
@example((8, 8), [0.0, 0.0, 1.0, 1e-60])  # higher than 0, but not as float32
@given(st.tuples(st.integers(8, 300), st.integers(8, 300)), st.lists(st.floats(0, 1), min_size=4, max_size=4))
def test_boxes_stay_in_order_and_within_the_frame(size: tuple[int, int], corners: list[float]) -> None:
    processor = region_processor()
    height, width = size
    (left, right), (top, bottom) = sorted(corners[::2]), sorted(corners[1::2])
    box = [left * width, top * height, right * width, bottom * height]
    try:
        ((x1, y1, x2, y2),) = boxes_of(processor, size, box)
    except ValueError as error:
        assert "is no box" in str(error) or "lies outside of what the vision tower sees" in str(error)
    else:
        assert 0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1


def test_boxes_of_a_rotated_photograph_are_those_of_the_upright_one(processor: MglmmProcessor) -> None:
    image = Image.new("RGB", (80, 40))
    exif = Image.Exif()
    exif[0x0112] = 6  # a viewer shows it 40 wide and 80 high
    image.info["exif"] = exif.tobytes()
    found = processor(images=image, text="<image><region>", regions=[[10, 30, 20, 70]], return_tensors="pt")
    np.testing.assert_allclose(found["region_boxes"], [[0.25, 0.25, 0.5, 1]], atol=1e-6)


# ------------------------------------------------------------------ wrong boxes


@pytest.mark.parametrize(
    ("regions", "message"),
    [
        ([[10, 10, 10, 20]], r"region 0, \[10.0, 10.0, 10.0, 20.0\], is no box: it needs numbers x1 < x2"),  # no width
        ([[30, 10, 40, 20], [30, 40, 50, 10]], "region 1, .*, is no box"),  # upside down
        ([[10, 10, float("nan"), 20]], "region 0, .*nan.*, is no box"),
        ([[10, 10, float("inf"), 20]], "region 0, .*inf.*, is no box"),
        ([[10, 10, 20]], r"region 0 must be a box \[x1, y1, x2, y2\] in pixels, got \[10, 10, 20\]"),
        ([["a", 10, 20, 30]], "region 0 must be a box"),
        ([None], "region 0 must be a box .* got None"),
        ([[10, 10, 120, 20]], "region 0, .*, does not lie in its picture of 100 x 50 pixels"),  # too far right
        ([[-5, 10, 20, 20]], "region 0, .*, does not lie in its picture"),
        ([[60, 10, 70, 60]], "region 0, .*, does not lie in its picture"),  # too low
        ([[0, 0, 20, 50]], r"lies outside of what the vision tower sees .*, x 25.0 to 75.0 and y 0.0 to 50.0"),
    ],
)
def test_wrong_boxes_are_refused(processor: MglmmProcessor, regions: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        boxes_of(processor, (50, 100), *regions)


@pytest.mark.parametrize(
    ("text", "regions", "message"),
    [
        (
            "<image><region> and <region>",
            [[0, 0, 9, 9]],
            "2 <region> in the text but 1 regions; they are matched in order",
        ),
        ("<image><region>", [[0, 0, 9, 9]] * 2, "1 <region> in the text but 2 regions"),
        ("<image><region>", [0, 0, 9, 9], "1 <region> in the text but 4 regions"),  # a box is not a list of boxes
        ("<image>", [[0, 0, 9, 9]], "0 <region> in the text but 1 regions"),
        ("<image><region>", None, "1 <region> in the text but 0 regions"),
        ("<region> in <image>", [[0, 0, 9, 9]], "prompt 0 holds <region> before any <image>"),
        ("<image><image><region>", [[0, 0, 9, 9]], "2 <image> stand before the regions of the text but 1 images"),
    ],
)
def test_regions_and_text_must_fit(processor: MglmmProcessor, text: str, regions: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        processor(images=picture(), text=text, regions=regions)


@pytest.mark.parametrize(("text", "regions"), [("<image><region>", None), ("<image> What?", [[0, 0, 9, 9]])])
def test_a_model_without_region_encoder_says_so(tiny: Tiny, text: str, regions: Any) -> None:
    with pytest.raises(
        ValueError, match="this model has no region encoder: use one that has, such as an imported GLaMM"
    ):
        tiny.processor(images=picture(), text=text, regions=regions)


def test_unknown_frames_are_refused() -> None:
    with pytest.raises(ValueError, match="region_box_frame must be 'tower' or 'picture', got 'crop'"):
        region_processor(region_box_frame="crop")


# ------------------------------------------------------------------ text


def test_each_region_belongs_to_the_last_image_before_it(processor: MglmmProcessor) -> None:
    images = [picture(100, 100), picture(50, 50), picture(200, 200)]
    text = ["<image><region> <image><region><region>", "<image>", "<image><region>"]
    inputs = processor(
        images=[*images, picture(10, 10)],
        text=text,
        regions=[[0, 0, 10, 10], [0, 0, 10, 10], [5, 5, 10, 10], [0, 0, 5, 5]],
        padding=True,
        return_tensors="pt",
    )
    expected = [[0, 0, 0.1, 0.1], [0, 0, 0.2, 0.2], [0.1, 0.1, 0.2, 0.2], [0, 0, 0.5, 0.5]]
    np.testing.assert_allclose(inputs["region_boxes"], expected, atol=1e-6)
    assert (inputs["input_ids"] == processor.region_token_id).sum(1).tolist() == [3, 0, 1]


@pytest.mark.parametrize("token", ["<region>", "<bbox>"])
def test_what_users_say_of_a_region_becomes_the_region_token(token: str) -> None:
    processor = region_processor(token)
    question = {"type": "text", "text": "What is <region>? And <bbox>?"}
    conversation = [
        {"role": "system", "content": "Speak of <region>."},
        {"role": "user", "content": [{"type": "image", "image": picture()}, question]},
        {"role": "assistant", "content": "It is <region>."},
    ]
    inputs = processor.apply_chat_template(
        conversation,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"regions": [[20, 9, 30, 30]]},
    )
    # Once: not that of the system or the assistant, and not the model's own token in a user's text.
    assert (inputs["input_ids"] == processor.region_token_id).sum() == 1
    assert inputs["region_boxes"].shape == (1, 4)


def test_texts_without_regions_have_no_boxes(processor: MglmmProcessor, tiny: Tiny) -> None:
    for regions in (None, []):
        inputs = processor(images=picture(), text="<image> What?", regions=regions)
        assert "region_boxes" not in inputs
        assert inputs["input_ids"] == tiny.processor(images=picture(), text="<image> What?")["input_ids"]


def test_boxes_without_tensors_are_lists(processor: MglmmProcessor) -> None:
    inputs = processor(images=picture(100, 100), text="<image><region>", regions=np.array([[0, 0, 50, 50]]))
    assert inputs["region_boxes"] == [[0, 0, 0.5, 0.5]]


def test_saving_keeps_token_and_frame(tmp_path: Any) -> None:
    region_processor("<bbox>", region_box_frame="picture").save_pretrained(tmp_path)
    loaded = MglmmProcessor.from_pretrained(tmp_path)
    assert (loaded.region_token, loaded.region_box_frame) == ("<bbox>", "picture")
    assert loaded.region_token_id == region_processor("<bbox>").region_token_id


# ------------------------------------------------------------------ pipeline


@pytest.fixture(scope="module")
def pipe(processor: MglmmProcessor) -> MglmmPipeline:
    fields = {"region_feature_layers": [1, 2], "region_hidden_size": 16, "region_token_id": processor.region_token_id}
    model = tiny_model(processor, **fields)
    return MglmmPipeline(model, processor=processor, task=TASK, device="cpu")


SURE = "Sure, <p> hat </p> [SEG]."


def ask(pipe: MglmmPipeline, *args: Any, **kwargs: Any) -> Any:
    answers = script_tokens(pipe.model, pipe.processor, [SURE])
    return pipe(*args, logits_processor=answers, **kwargs)


def test_pipeline_answers_about_regions(pipe: MglmmPipeline) -> None:
    question = "What is in <region>?"
    left, right = [[12, 2, 25, 30]], [[30, 10, 48, 39]]
    answers = [ask(pipe, picture(), question, regions=regions) for regions in (left, right)]
    assert [answer.text for answer in answers] == [SURE, SURE]
    scores = [answer.segments[0].score for answer in answers]
    assert abs(scores[0] - scores[1]) > 1e-5  # the box matters
    item = {"image": picture(), "text": question, "regions": right}
    assert ask(pipe, item, regions=left).segments[0].score == pytest.approx(scores[1], rel=1e-4)


def test_pipeline_answers_batches_with_any_number_of_regions(pipe: MglmmPipeline) -> None:
    items = [
        {"image": picture(seed=0), "text": "What is in <region>?", "regions": [[12, 2, 25, 30]]},
        {"image": picture(seed=1), "text": "What is this?"},
        {
            "image": picture(seed=2),
            "text": "Compare <region> and <region>.",
            "regions": [[12, 2, 25, 30], [15, 9, 49, 39]],
        },
    ]
    together = ask(pipe, items, batch_size=3)
    alone = [ask(pipe, item) for item in items]
    for one, other in zip(together, alone, strict=True):
        assert one.segments[0].score == pytest.approx(other.segments[0].score, rel=1e-3)


@pytest.mark.parametrize(
    ("text", "regions", "message"),
    [
        ("What is in <region>?", None, "1 <region> in the text but 0 regions"),
        ("What is this?", [[12, 2, 25, 30]], "0 <region> in the text but 1 regions"),
        (None, [[12, 2, 25, 30]], "0 <region> in the text but 1 regions"),  # the panoptic instruction
    ],
)
def test_pipeline_errors(pipe: MglmmPipeline, text: str | None, regions: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipe(picture(), text, regions=regions, max_new_tokens=1)


def test_inputs_of_generate_fit(pipe: MglmmPipeline, processor: MglmmProcessor) -> None:
    inputs = processor(images=picture(), text="<image><region>", regions=[[12, 2, 25, 30]], return_tensors="pt")
    assert torch.is_tensor(pipe.model.generate(**inputs, max_new_tokens=1))
