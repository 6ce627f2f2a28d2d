"""Masks between a picture and the pixel encoder's frame, at every shape of picture; generated ids to `SegCap`s."""

import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CLIPImageProcessorPil, PreTrainedTokenizerFast, SamImageProcessorPil

from mglmm.modeling_mglmm import MglmmGenerateOutput
from mglmm.processing import MglmmProcessor
from tests.tiny import CORPUS, picture

SIZES = [(1, 1), (1, 7), (2, 2), (3, 3), (3, 200), (200, 3), (10, 210), (40, 60), (61, 37), (64, 64), (300, 127)]


def sized(tiny, side: int, crop: int = 28) -> MglmmProcessor:
    tower = CLIPImageProcessorPil(size={"shortest_edge": crop}, crop_size={"height": crop, "width": crop})
    return MglmmProcessor(tower, tiny.processor.tokenizer, sam_image_size=side)


def ellipse(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return ((y + 0.5) / height - 0.45) ** 2 / 0.09 + ((x + 0.5) / width - 0.6) ** 2 / 0.1 < 1


# ---------------------------------------------------------------------- pictures


@pytest.mark.parametrize("size", SIZES)
def test_pictures_of_every_shape(tiny, size: tuple[int, int]) -> None:
    """One colour stays that colour, inside the extent that the masks are decoded in, and zeros fill the rest."""
    processor = sized(tiny, 64)
    colour = np.array([200, 30, 90], np.uint8)
    image = Image.fromarray(np.broadcast_to(colour, (*size, 3)).copy())
    inputs = processor(images=image, return_tensors="pt")
    assert inputs["original_sizes"].tolist() == [list(size)]
    (height, width), frame = processor.frame_of(size)
    assert frame == (64, 64) and max(height, width) == 64
    seen = inputs["sam_pixel_values"][0]
    expected = (colour / 255 - np.array(processor.sam_image_mean)) / np.array(processor.sam_image_std)
    assert np.allclose(seen[:, :height, :width], expected[:, None, None], atol=1e-5)
    assert not seen[:, height:].any() and not seen[:, :, width:].any()
    tower = processor.image_processor
    expected = (colour / 255 - np.array(tower.image_mean)) / np.array(tower.image_std)
    assert np.allclose(inputs["pixel_values"][0], expected[:, None, None], atol=1e-5)


def test_a_picture_that_would_vanish_is_refused(tiny) -> None:
    processor = sized(tiny, 64)
    assert processor(images=Image.new("RGB", (128, 1)), return_tensors="pt")["sam_pixel_values"].shape == (1, 3, 64, 64)
    with pytest.raises(ValueError, match="an image of 129 x 1 pixels is too thin to be seen at 64: crop it first"):
        processor(images=Image.new("RGB", (129, 1)))


def test_a_shared_tower_sees_any_shape(tiny_shared) -> None:
    for size in ((129, 1), (1, 1), (5000, 2)):
        inputs = tiny_shared.processor(images=Image.new("RGB", size, (255, 0, 0)), return_tensors="pt")
        assert inputs["pixel_values"].shape == (1, 3, 28, 28)


@pytest.mark.parametrize("size", [(20_000, 20), (20, 20_000)])
def test_a_very_long_picture_costs_little(tiny, size: tuple[int, int]) -> None:
    """Resizing its shorter edge to 224 would make 50 million pixels of it."""
    processor = sized(tiny, 1024, crop=224)
    image = Image.new("RGB", size, (255, 0, 0))
    middle = [(side // 2 - 10) if side > 20 else 0 for side in size]
    image.paste((0, 0, 255), (*middle, middle[0] + 20, middle[1] + 20))
    tracemalloc.start()
    inputs = processor(images=image, return_tensors="pt")
    assert tracemalloc.get_traced_memory()[1] < 200 * 2**20
    tracemalloc.stop()
    blue = inputs["pixel_values"][0, 2] > 0
    assert blue.float().mean() > 0.97  # the tower's crop is the blue square in the middle
    extent = processor.frame_of(size[::-1])[0]
    assert extent == ((1, 1024) if size[0] > size[1] else (1024, 1))


@pytest.mark.parametrize("rest", [0, 1])
def test_cutting_long_pictures_first_changes_nothing(tiny, rest: int) -> None:
    processor = sized(tiny, 64)
    noise = np.random.default_rng(0).integers(0, 256, (4, 100 + rest, 3), dtype=np.uint8)
    for array in (noise, noise.transpose(1, 0, 2)):
        image = Image.fromarray(np.ascontiguousarray(array))
        found = processor(images=image, return_tensors="pt")["pixel_values"]
        expected = processor.image_processor(image, return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


# ---------------------------------------------------------------------- masks


@settings(max_examples=60)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 100))
def test_masks_come_out_as_sams_own_post_processing_has_it(tiny, height: int, width: int, seed: int) -> None:
    side = 64
    processor = sized(tiny, side)
    sam = SamImageProcessorPil(size={"longest_edge": side}, pad_size={"height": side, "width": side})
    if max(height, width) >= 2 * side * min(height, width):
        return  # too thin
    sizes = sam(Image.new("RGB", (width, height)), return_tensors="pt")
    logits = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(seed))
    expected = sam.post_process_masks(
        logits[None, :, None],
        sizes["original_sizes"],
        sizes["reshaped_input_sizes"],
        pad_size={"height": side, "width": side},
    )[0]
    found = processor.post_process_masks(logits, (height, width))
    assert found.dtype == bool and found.shape == (2, height, width)
    assert np.array_equal(found, np.asarray(expected).reshape(found.shape))


def test_post_processing_details(tiny, tiny_shared) -> None:
    assert tiny.processor.post_process_masks(torch.zeros(0, 16, 16), (40, 60)).shape == (0, 40, 60)
    logits = torch.full((1, 8, 8), 1.5, dtype=torch.bfloat16)
    assert tiny_shared.processor.post_process_masks(logits, (5, 9)).all()
    assert not tiny_shared.processor.post_process_masks(logits, (5, 9), threshold=2.0).any()
    half = torch.tensor([[[1.0, -1.0]] * 2])  # a shared tower sees the whole picture, squashed
    mask = tiny_shared.processor.post_process_masks(half, (10, 100))[0]
    assert mask[:, :50].all() and not mask[:, 50:].any()


@pytest.mark.parametrize("size", [(480, 640), (640, 480), (500, 333), (37, 61), (512, 512), (100, 1000)])
@pytest.mark.parametrize("side", [128, 256])
def test_labels_lie_in_sams_frame(tiny, size: tuple[int, int], side: int) -> None:
    processor = sized(tiny, 1024)
    mask = ellipse(*size)
    label = processor.mask_labels([mask], side)[0]
    assert label.dtype == torch.uint8
    (height, width), _ = processor.frame_of(size)
    inside = (height * side // 1024, width * side // 1024)
    assert set(label[: inside[0], : inside[1]].unique().tolist()) == {0, 1}
    assert (label[inside[0] :] == 255).all() and (label[:, inside[1] :] == 255).all()

    # the geometry of SAM itself: resize to the extent, pad, shrink
    frame = np.zeros((1024, 1024), np.uint8)
    frame[:height, :width] = np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST))
    cells = frame.reshape(side, 1024 // side, side, 1024 // side).mean((1, 3)) >= 0.5
    cells[inside[0] :], cells[:, inside[1] :] = False, False  # cells partly in the padding
    found = label.numpy() == 1
    assert (cells & found).sum() / (cells | found).sum() > 0.97

    # and back: what the label says is the mask again, up to the size of a cell
    logits = torch.where(label == 1, 1.0, -1.0)[None]
    back = processor.post_process_masks(logits, size)[0]
    cell = max(size) / side
    boundary = np.abs(np.gradient(mask.astype(float))).max(0) > 0
    tolerance = np.asarray(Image.fromarray(boundary).convert("L").resize(size[::-1])) > 0
    wrong = (back != mask) & ~tolerance
    assert wrong.sum() <= 2 * cell * boundary.sum() and (back & mask).sum() / (back | mask).sum() > 0.9


def test_labels_of_a_shared_tower_fill_the_frame(tiny_shared) -> None:
    label = tiny_shared.processor.mask_labels([np.tile([True, False], (10, 50)), np.ones((10, 100), bool)], 8)
    assert label.shape == (2, 8, 8) and label[1].all() and set(label.unique().tolist()) <= {0, 1}


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        ([[1, 1], [0, 0]], 1),  # half of it
        ([[1, 0], [0, 0]], 0),
        ([[255, 255], [255, 0]], 255),  # mostly void
        ([[255, 1], [1, 0]], 1),
        ([[255, 1], [0, 0]], 0),
    ],
)
def test_label_of_one_cell(tiny, cell: list, expected: int) -> None:
    mask = np.tile(np.array(cell, np.uint8), (4, 4))
    assert tiny.processor.mask_labels([mask], 4).unique().tolist() == [expected]


def test_labels_without_masks_and_thin_pictures(tiny) -> None:
    assert tiny.processor.mask_labels([], 8).shape == (0, 8, 8)
    assert (tiny.processor.mask_labels([np.ones((1, 100), bool)], 8) == 1).sum() == 8  # never less than one row
    with pytest.raises(ValueError, match="too thin"):
        tiny.processor.mask_labels([np.ones((1, 1000), bool)], 8)


# ---------------------------------------------------------------------- answers


def llama_like(tiny) -> MglmmProcessor:
    """A tokenizer whose decoder drops the space that a text begins with, as SentencePiece's do."""
    backend = Tokenizer(models.BPE(byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special[:3], show_progress=False)
    backend.train_from_iterator([*CORPUS, "".join(special[3:])], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<unk>", bos_token="<s>", eos_token="</s>")
    return MglmmProcessor(tiny.processor.image_processor, tokenizer, sam_image_size=64)


@pytest.mark.parametrize("kind", ["byte level", "llama"])
def test_generated_ids_read_as_they_were_written(tiny, kind: str) -> None:
    processor = tiny.processor if kind == "byte level" else llama_like(tiny)
    text = "The <p> red hat </p> [SEG] and <p>a dog</p>[SEG], also the sky."
    ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = processor.split_pieces([*ids, processor.tokenizer.eos_token_id, processor.tokenizer.pad_token_id])
    assert "".join(piece for piece, _ in pieces).strip() == text
    assert [piece for piece, control in pieces if control] == ["<p>", "</p>", "[SEG]"] * 2
    assert processor.split_pieces([]) == []


def test_letters_are_not_control_tokens(tiny) -> None:
    tokenizer = tiny.processor.tokenizer
    letters = [i for letter in "see [SEG] <p>" for i in tokenizer(letter, add_special_tokens=False)["input_ids"]]
    pieces = tiny.processor.split_pieces([*letters, tiny.processor.seg_token_id])
    assert pieces == [("see [SEG] <p>", False), ("[SEG]", True)]


def output_of(processor: MglmmProcessor, texts: list[str], masks: list[torch.Tensor]) -> MglmmGenerateOutput:
    tokenizer = processor.tokenizer
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] for text in texts]
    length = max(map(len, ids))
    padded = torch.tensor([row + [tokenizer.pad_token_id] * (length - len(row)) for row in ids])
    scores = tuple(torch.linspace(0.5, 0.9, len(m)) for m in masks)
    return MglmmGenerateOutput(sequences=padded, generated_ids=padded, pred_masks=tuple(masks), mask_scores=scores)


def test_segcaps(tiny) -> None:
    left, right = torch.full((16, 16), -1.0), torch.full((16, 16), -1.0)
    left[:, :8], right[:, 8:] = 1.0, 1.0
    texts = [" A <p> red hat </p> [SEG] and <p> a dog </p> [SEG].", " Nothing here.", "[SEG]"]
    outputs = output_of(
        tiny.processor, texts, [torch.stack([left, right]), torch.zeros(0, 16, 16), right[None] * 0 + 1]
    )
    pictures = [picture(64, 64), picture(40, 60), picture(20, 90)]
    sizes = torch.tensor([[64, 64], [40, 60], [20, 90]])
    first, second, third = tiny.processor.post_process_segcap(
        outputs, sizes, queries=["Describe.", "Bicycle?", "the car"], images=pictures
    )
    assert first.text == texts[0].strip() and first.clean_text == "A red hat and a dog."
    assert [s.phrase for s in first.segments] == ["red hat", "a dog"]
    assert [s.box for s in first.segments] == [(0, 0, 32, 64), (32, 0, 64, 64)]
    assert [s.score for s in first.segments] == pytest.approx([0.5, 0.9])
    assert first.image is pictures[0]
    assert second.segments == [] and second.clean_text == "Nothing here." and second.image_size == (40, 60)
    assert third.segments[0].phrase == "the car" and third.segments[0].span is None
    assert third.segments[0].mask.shape == (20, 90) and third.segments[0].area == 20 * 90


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_sizes": [(4, 4)]}, "2 generated rows but 1 target_sizes"),
        ({"queries": ["a"]}, "2 generated rows but 1 queries"),
        ({"images": []}, "2 generated rows but 0 images"),
    ],
)
def test_numbers_of_rows_are_checked(tiny, options: dict, message: str) -> None:
    outputs = output_of(tiny.processor, ["a", "b"], [torch.zeros(0, 16, 16)] * 2)
    with pytest.raises(ValueError, match=message):
        tiny.processor.post_process_segcap(outputs, **{"target_sizes": [(4, 4), (4, 4)], **options})


def test_a_row_without_image_is_refused(tiny) -> None:
    outputs = output_of(tiny.processor, ["<p> hat </p> [SEG]"], [torch.zeros(0, 16, 16)])
    with pytest.raises(ValueError, match=r"row 0 has 1 \[SEG\]s but 0 masks"):
        tiny.processor.post_process_segcap(outputs, [(4, 4)])
