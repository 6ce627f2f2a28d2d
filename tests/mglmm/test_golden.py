"""Imported checkpoints compute what the original LISA and GLaMM compute: ids, logits, losses, gradients, masks, answers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mglmm import MglmmForConditionalGeneration, MglmmProcessor
from mglmm.importing import import_weights
from mglmm.modeling_mglmm.mask_losses import to_picture
from mglmm.modeling_mglmm.weight_layouts import GLAMM, LISA, original_name

FRAME = (1024, 1024)
IMAGE_SENTINEL = -200
LAYOUTS = {"lisa": LISA, "glamm": GLAMM}


class Golden:
    """An imported checkpoint beside the outputs of the original code."""

    def __init__(self, name: str, shared: Path, folder: Path):
        self.name, self.root, self.images = name, shared / "golden" / name, shared / "golden" / "images"
        self.facts = json.loads((self.root / "goldens.json").read_text())
        self.arrays = np.load(self.root / "goldens.npz")
        import_weights(self.root / "ckpt", folder / name, max_shard_size=10**7)
        self.model = MglmmForConditionalGeneration.from_pretrained(folder / name)
        self.processor = MglmmProcessor.from_pretrained(folder / name)

    def __getitem__(self, key: str) -> torch.Tensor:
        return torch.from_numpy(self.arrays[key])

    def conversation(self, name: str) -> dict[str, Any]:
        return self.facts["conversations"][f"llava_v1.{name}" if self.name == "lisa" else name]

    def groups(self, case: str) -> list[list[str]]:
        return self.facts["cases"][case]["groups"]

    def picture(self, name: str) -> Image.Image:
        return Image.open(self.images / f"{name}.png").convert("RGB")

    def inputs(self, case: str) -> dict[str, Any]:
        """Model inputs of a case, from the ids that the original code made."""
        ids, image_id = self[f"{case}.input_ids"], self.model.config.image_token_id
        masks = self[f"{case}.attention_masks"]
        labels = self[f"{case}.labels"] if f"{case}.labels" in self.arrays else torch.full_like(ids, -100)
        rows: dict[str, list[torch.Tensor]] = {"input_ids": [], "attention_mask": [], "labels": []}
        for row, mask, label in zip(ids, masks, labels, strict=True):
            at = int((row == IMAGE_SENTINEL).nonzero())
            for name, values, filler in (
                ("input_ids", row, image_id),
                ("attention_mask", mask.long(), 1),
                ("labels", label, -100),
            ):
                tokens = torch.full((self.processor.num_image_tokens,), filler)
                rows[name].append(torch.cat([values[:at], tokens, values[at + 1 :]]))
        pictures = [self.picture(self.conversation(name)["image"]) for group in self.groups(case) for name in group]
        pixels = self.processor(images=pictures, return_tensors="pt")
        inputs: dict[str, Any] = {name: torch.stack(value) for name, value in rows.items()}
        return inputs | {name: pixels[name] for name in ("pixel_values", "sam_pixel_values")}

    def per_mask(self, case: str, name: str) -> list[torch.Tensor]:
        """Arrays `(H, W)` of all masks of a case, in order."""
        count = len(self.groups(case))
        return [mask for i in range(count) for mask in self[f"{case}.{name}.{i}"]]


@pytest.fixture(scope="module", params=["lisa", "glamm"])
def golden(request: pytest.FixtureRequest, shared_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Golden:
    return Golden(request.param, shared_dir, tmp_path_factory.mktemp("imported"))


def check_logits(golden: Golden, case: str, logits: torch.Tensor) -> None:
    """Within 1e-4 of the original's wherever it has words."""
    vocabulary = golden.facts["len_tokenizer"]
    logits = logits[..., :vocabulary]
    tokens = golden.processor.num_image_tokens
    valid = torch.nn.functional.pad(golden[f"{case}.attention_masks"], (tokens - 1, 0), value=True)
    if f"{case}.logits" in golden.arrays:
        expected = golden[f"{case}.logits"]
        start = logits.shape[1] - expected.shape[1]
        pairs = [(logits[:, start:], expected, valid[:, start:])]
    else:
        tail, sample = golden[f"{case}.logits_tail"], golden[f"{case}.logits_s"]
        start = logits.shape[1] - tail.shape[1]
        pairs = [
            (logits[:, start:], tail, valid[:, start:]),
            (logits[:, ::9, ::7], sample, valid[:, ::9]),
        ]
    for found, expected, where in pairs:
        assert found.shape == expected.shape
        torch.testing.assert_close(found[where], expected[where], atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", ["train_b3", "train_multi"])
def test_training(golden: Golden, case: str) -> None:
    """0, 1 and 3 masks in a batch; two conversations about one image: logits, prompts, masks, losses, gradients."""
    inputs = golden.inputs(case)
    labels = golden.per_mask(case, "gt_masks")
    golden.model.zero_grad()
    golden.model.requires_grad_(True)
    outputs = golden.model(**inputs, mask_labels=labels)
    check_logits(golden, case, outputs.logits.detach())
    expected = golden.per_mask(case, "masks")
    for logits, mask in zip(outputs.pred_masks.detach(), expected, strict=True):
        found = to_picture(logits[None], mask.shape, FRAME)[0]
        torch.testing.assert_close(found, mask, atol=1e-3, rtol=0)
    losses, weights = golden.facts["cases"][case]["losses"], golden.model.config
    assert outputs.ce_loss.item() == pytest.approx(golden.facts["cases"][case]["raw_ce"], abs=1e-5)
    assert weights.bce_loss_weight * outputs.mask_bce_loss.item() == pytest.approx(losses["mask_bce_loss"], abs=1e-5)
    assert weights.dice_loss_weight * outputs.mask_dice_loss.item() == pytest.approx(losses["mask_dice_loss"], abs=1e-5)
    assert outputs.loss.item() == pytest.approx(losses["loss"], abs=2e-5)

    outputs.loss.backward()
    layout, config = LAYOUTS[golden.name], golden.model.config
    gradients = {original_name(name, layout, config): p.grad for name, p in golden.model.named_parameters()}
    compared = 0
    for name, facts in golden.facts["cases"][case]["grads"].items():
        gradient = gradients[name]
        vocabulary = golden.facts["len_tokenizer"]
        gradient = gradient[:vocabulary] if len(gradient) == vocabulary + 1 else gradient
        # Where a ReLU of the decoder is all but zero, rounding decides whether it passes a gradient on.
        assert gradient.norm().item() == pytest.approx(facts["norm"], rel=5e-3, abs=1e-6), name
        compared += 1
    assert compared > 50


@pytest.fixture(scope="module")
def glamm(golden: Golden) -> Golden:
    if golden.name != "glamm":
        pytest.skip("LISA takes no regions")
    return golden


def test_training_on_regions(glamm: Golden) -> None:
    """Boxes in place of `<bbox>`. The original drops the second box of a conversation with one `<bbox>`; here it errs."""
    inputs = glamm.inputs("train_region")
    del inputs["sam_pixel_values"]
    boxes = torch.cat([glamm["train_region.bboxes.0"][:1], glamm["train_region.bboxes.1"]])
    outputs = glamm.model(**inputs, region_boxes=boxes)
    check_logits(glamm, "train_region", outputs.logits.detach())
    assert outputs.ce_loss.item() == pytest.approx(glamm.facts["cases"]["train_region"]["raw_ce"], abs=1e-5)
    surplus = torch.cat([glamm["train_region.bboxes.0"], glamm["train_region.bboxes.1"]])
    with pytest.raises(ValueError, match=r"4.*5|5.*4"):
        glamm.model(**inputs, region_boxes=surplus)


@pytest.mark.parametrize(("case", "count"), [("gen_r1", 1), ("gen_r2", 3)])
def test_region_captioning(glamm: Golden, case: str, count: int) -> None:
    """From the words of the question and boxes in pixels, as a user asks: the original's answer, token by token."""
    facts = glamm.facts["cases"][case]
    picture = glamm.picture(facts["image"])
    boxes = glamm["train_region.bboxes.0" if case == "gen_r1" else "train_region.bboxes.1"][:count]
    pixels = boxes * torch.tensor([picture.width, picture.height] * 2)
    question = facts["prompt"].split("\n")[-1].removesuffix(" ASSISTANT:").replace("<bbox>", "<region>")
    content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
    inputs = glamm.processor.apply_chat_template(
        [[{"role": "user", "content": content}]],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"regions": pixels.tolist()},
    )
    outputs = glamm.model.generate(**inputs, max_new_tokens=facts["max_new_tokens"], output_masks=True)
    assert outputs.generated_ids[0].tolist() == facts["new_ids"]
    expected = glamm[f"{case}.masks.0"]
    found = to_picture(outputs.pred_masks[0], expected.shape[1:], FRAME)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("case", ["infer_s1", "infer_s2", "infer_two_convs"])
def test_teacher_forced_inference(golden: Golden, case: str) -> None:
    """The path of the referring benchmarks, with the prompts of SAM and the decoder's own output beside the masks."""
    inputs = golden.inputs(case)
    del inputs["labels"]
    with torch.no_grad():
        outputs = golden.model(**inputs)
    for logits, mask in zip(outputs.pred_masks, golden.per_mask(case, "masks"), strict=True):
        torch.testing.assert_close(to_picture(logits[None], mask.shape, FRAME)[0], mask, atol=1e-3, rtol=0)
    for logits, low in zip(outputs.pred_masks, golden.per_mask(case, "low_res"), strict=True):
        torch.testing.assert_close(logits[::2, ::2], low, atol=1e-3, rtol=0)


@pytest.mark.parametrize("case", ["gen_s0", "gen_s1", "gen_s2"])
def test_generation(golden: Golden, case: str) -> None:
    """What the original's `evaluate()` wrote, token by token, and its masks at the picture's size."""
    facts = golden.facts["cases"][case]
    picture = golden.picture(facts["image"])
    prompt = golden[f"{case}.prompt_ids"][0]
    at = int((prompt == IMAGE_SENTINEL).nonzero())
    tokens = torch.full((golden.processor.num_image_tokens,), golden.model.config.image_token_id)
    input_ids = torch.cat([prompt[:at], tokens, prompt[at + 1 :]])[None]
    pixels = golden.processor(images=picture, return_tensors="pt")
    outputs = golden.model.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        pixel_values=pixels["pixel_values"],
        sam_pixel_values=pixels["sam_pixel_values"],
        max_new_tokens=facts["max_new_tokens"],
        output_masks=True,
    )
    assert outputs.generated_ids[0].tolist() == facts["new_ids"]
    expected = golden[f"{case}.masks.0"]
    assert len(outputs.pred_masks[0]) == len(expected)
    if len(expected):
        found = to_picture(outputs.pred_masks[0], expected.shape[1:], FRAME)
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)
        binary = golden.processor.post_process_masks(outputs.pred_masks[0], expected.shape[1:])
        assert (binary == (expected.numpy() > 0)).mean() > 0.9999


def test_preprocessing(golden: Golden) -> None:
    """What both encoders are shown, for pictures of every shape."""
    arrays = np.load(golden.root / "preprocess.npz")
    for name, facts in golden.facts["preprocess"].items():
        inputs = golden.processor(images=golden.picture(name), return_tensors="pt")
        extent, _ = golden.processor.frame_of(tuple(facts["orig"]))
        assert list(extent) == facts["resized"]
        sam = inputs["sam_pixel_values"][0]
        np.testing.assert_allclose(sam[:, ::16, ::16], arrays[f"{name}.sam_s16"], atol=1e-5)
        clip, expected = inputs["pixel_values"][0], arrays[f"{name}.clip"]
        np.testing.assert_allclose(clip[:, ::3, ::3] if expected.shape != clip.shape else clip, expected, atol=1e-5)


def test_prompt_as_a_user_types_it(golden: Golden) -> None:
    """From the words of the question alone: the processor's template gives the original's prompt."""
    facts = golden.facts["cases"]["gen_s1"]
    question = facts["prompt"].split("\n")[-1].removesuffix(" ASSISTANT:")
    content = [{"type": "image", "image": golden.picture(facts["image"])}, {"type": "text", "text": question}]
    inputs = golden.processor.apply_chat_template(
        [[{"role": "user", "content": content}]],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    ids = inputs["input_ids"][0]
    image_id = golden.model.config.image_token_id
    assert int((ids == image_id).sum()) == golden.processor.num_image_tokens
    first = torch.cat([torch.tensor([True]), ids[1:] != ids[:-1]])
    kept = ids[(ids != image_id) | first].tolist()
    assert [IMAGE_SENTINEL if token == image_id else token for token in kept] == golden.arrays["gen_s1.prompt_ids"][
        0
    ].tolist()
