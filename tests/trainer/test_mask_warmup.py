"""The first stage: states of phrases, what its batches hold, and that only the mask path is trained."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mglmm.modeling_mglmm.mask_losses import mask_losses
from mglmm.processing.uscdf import SEG_TOKEN
from mglmm.trainer.feature_cache import FeatureCache
from mglmm.trainer.mask_warmup import (
    MaskWarmup,
    MaskWarmupCollator,
    phrase_states,
    phrase_words,
    phrases_of,
    presence_loss,
    standardise_prompts,
    word_loss,
    words_of_images,
)
from mglmm.trainer.stage_trainer import StageTrainer
from tests.tiny import tiny_model
from tests.trainer.conftest import BOXES, box_mask, training_arguments, uscdf_row


def test_phrases_in_the_order_of_the_masks(rows):
    assert [phrases_of(row["messages"]) for row in rows] == [
        ["the hat", "the dog"],
        [],
        ["the car", "the dog", "the hat"],
        ["the car"],
    ]


@pytest.mark.parametrize(("answers", "answer"), [("uscdf", "<p> {} </p> [SEG]"), ("plain", "[SEG]")])
def test_states_are_those_of_a_direct_forward(tiny, answers, answer):
    phrases = ["the hat", "a brown dog on the grass", "the hat", "two cars"]
    states = phrase_states(tiny.model, tiny.processor, phrases, answers, batch_size=2)
    assert sorted(states) == ["a brown dog on the grass", "the hat", "two cars"]
    tokenizer = tiny.processor.tokenizer
    for phrase, state in states.items():
        text = (
            "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
            f"detailed, and polite answers to the human's questions. USER: Please segment {phrase}. "
            f"ASSISTANT: Sure, {answer.format(phrase)}.</s>"
        )
        input_ids = tokenizer(text, return_tensors="pt")["input_ids"]
        position = int((input_ids[0] == tokenizer.convert_tokens_to_ids(SEG_TOKEN)).nonzero())
        with torch.no_grad():
            hidden = tiny.model.model(input_ids=input_ids).last_hidden_state
        torch.testing.assert_close(state, hidden[0, position - 1], atol=1e-5, rtol=1e-5)


@pytest.fixture
def stage(tmp_path: Path, rows, request):
    """Model, processor, and the collator of the first stage with its states for `rows`."""
    _, processor = request.getfixturevalue("tiny_shared")
    model = tiny_model(processor, shared=True, tie_word_embeddings=True)
    cache = FeatureCache(tmp_path / "features", model, processor)
    cache.fill(model, processor, [row["image"] for row in rows])
    states, words = phrase_states(model, processor, list(BOXES)), phrase_words(model, processor, BOXES)

    image_words = {("test", "0"): {"hat", "dog"}, ("test", "1"): set(), ("test", "2"): {"car", "dog", "hat"}}

    def collator(masks_per_image: int) -> MaskWarmupCollator:
        return MaskWarmupCollator(processor, states, words, image_words, cache, masks_per_image, mask_size=16)

    return model, processor, collator, states


def warmup_of(model, processor) -> MaskWarmup:
    words = phrase_words(model, processor, ["car", "dog", "hat"])
    return MaskWarmup(model, torch.stack([words[word] for word in ("car", "dog", "hat")]))


def test_a_batch_draws_at_most_so_many_masks_an_image(stage, rows):
    _, processor, collator_of, states = stage
    collator = collator_of(2)
    labels = {name: processor.mask_labels([box_mask(name)], 16)[0] for name in BOXES}
    torch.manual_seed(0)
    drawn = set()
    for _ in range(20):
        batch = collator([rows[2], rows[3], rows[0]])
        assert batch["mask_image_index"].tolist() == [0, 0, 1, 2, 2]  # of 3, 1 and 2 masks
        assert batch["seg_states"].shape == (5, 48) and batch["mask_labels"].shape == (5, 16, 16)
        names = [next(n for n, s in states.items() if torch.equal(s, state)) for state in batch["seg_states"]]
        assert all(torch.equal(labels[n], label) for n, label in zip(names, batch["mask_labels"], strict=True))
        assert torch.equal(batch["words"], torch.stack([collator.words[name] for name in names]))
        # The words car, dog and hat of the pictures 2, 0 and 0.
        assert batch["present"].tolist() == [[True, True, True], [False, True, True], [False, True, True]]
        assert names[2] == "the car" and len(batch["image_features"].vision_hidden_states) == 3
        drawn.add(frozenset(names[:2]))
    assert len(drawn) == 3  # every pair of the first row's masks comes up


def test_only_the_mask_path_changes_and_the_loss_falls(stage, rows, tmp_path: Path):
    model, processor, collator_of, _ = stage
    before = copy.deepcopy(model.state_dict())
    args = training_arguments(
        tmp_path / "run",
        max_steps=20,
        per_device_train_batch_size=3,
        learning_rate=3e-3,
        save_strategy="steps",
        save_steps=20,
    )
    with_masks = [row for row in rows if row["masks"]]
    trainer = StageTrainer(
        model=warmup_of(model, processor), args=args, train_dataset=with_masks, data_collator=collator_of(3)
    )
    trainer.train()

    after = model.state_dict()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    trained = {"pixel_neck", "mask_projector", "mask_decoder", "multi_modal_projector"}
    assert {name.split(".")[1] for name in changed} == trained
    assert not [name for name in changed if "iou_prediction_head" in name or "hypernetworks_mlps.1" in name]
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert history[-1]["mask_bce_loss"] < 0.7 * history[0]["mask_bce_loss"]
    assert history[-1]["word_loss"] < history[0]["word_loss"]
    for entry in history:
        total = 2.0 * entry["mask_bce_loss"] + 0.5 * entry["mask_dice_loss"] + entry["pixel_loss"]
        total += 0.25 * entry["word_loss"] + entry["presence_loss"]
        assert entry["loss"] == pytest.approx(total, rel=1e-4)
    assert history[-1]["presence_loss"] < history[0]["presence_loss"]

    # The embeddings of this model are tied, which safetensors refuses: checkpoints hold what is trained alone.
    saved = load_file(tmp_path / "run" / "checkpoint-20" / "model.safetensors")
    assert {name.split(".")[1] for name in saved} == {*trained, "prompt_encoder"}


def test_the_losses_are_those_of_the_model(stage, rows):
    model, processor, collator_of, _ = stage
    row = uscdf_row(0, "referring", ("the hat", "the dog"))
    batch = collator_of(2)([row])
    outputs = warmup_of(model, processor)(**batch)
    embeddings = model.model.get_image_embeddings(batch["image_features"])
    logits = model.model.decode_masks(batch["seg_states"], batch["mask_image_index"], embeddings)
    logits = torch.nn.functional.interpolate(logits[:, None], (16, 16), mode="bilinear", align_corners=False)[:, 0]
    target = batch["mask_labels"].float()
    assert not (batch["mask_labels"] == 255).any()  # the shared tower sees no padding
    bce = torch.nn.functional.binary_cross_entropy_with_logits(logits, target)
    probability = logits.sigmoid()
    overlap = 2 * (probability * target).sum((1, 2)) / 1000 + 1e-6
    dice = 1 - overlap / ((probability.sum((1, 2)) + target.sum((1, 2))) / 1000 + 1e-6)
    torch.testing.assert_close(outputs["mask_bce_loss"], bce)
    torch.testing.assert_close(outputs["mask_dice_loss"], dice.mean())


def test_the_pixel_loss_is_that_of_the_product_of_prompt_and_embedding(stage, rows):
    model, processor, collator_of, _ = stage
    batch = collator_of(2)([rows[0], rows[3]])
    outputs = warmup_of(model, processor)(**batch)
    prompts = model.model.mask_projector(batch["seg_states"])
    embeddings = model.model.get_image_embeddings(batch["image_features"])[[0, 0, 1]]
    logits = (prompts[:, :, None, None] * embeddings).sum(1) / prompts.shape[1] ** 0.5
    bce, dice = mask_losses(logits, batch["mask_labels"], 3)
    torch.testing.assert_close(outputs["pixel_loss"], 2.0 * bce + 0.5 * dice)


def test_prompts_of_different_phrases_start_far_apart(stage):
    model, _, _, _ = stage
    states = 40 + 0.1 * torch.randn(50, 48, generator=torch.Generator().manual_seed(0))  # nearly one and the same
    standardise_prompts(model, states)
    prompts = model.model.mask_projector(states).detach()
    torch.testing.assert_close(prompts.mean(0), torch.zeros(prompts.shape[1]), atol=1e-3, rtol=0)
    torch.testing.assert_close(prompts.std(0), torch.ones(prompts.shape[1]), atol=1e-3, rtol=0)


def test_words_are_mean_embeddings_around_the_mean_of_the_vocabulary(tiny):
    table = tiny.model.get_input_embeddings().weight.detach()
    hat = tiny.processor.tokenizer(" the hat", add_special_tokens=False)["input_ids"]
    words = phrase_words(tiny.model, tiny.processor, ["the hat", "the dog", "the hat"])
    assert sorted(words) == ["the dog", "the hat"]
    torch.testing.assert_close(words["the hat"], table[hat].mean(0) - table.mean(0))


def test_the_word_loss_looks_under_the_mask_and_tells_phrases_apart():
    # A picture of 2 x 2 image tokens whose left column says (1, 0) and whose right column says (0, 1).
    tokens = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]]).expand(3, -1, -1)
    left, right = torch.zeros(4, 4, dtype=torch.bool), torch.zeros(4, 4, dtype=torch.bool)
    left[:, :2], right[:, 2:] = True, True
    words = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])  # the first and the last are one phrase, not rivals
    agreeing = word_loss(tokens, words, torch.stack([left, right, left]))
    assert agreeing.item() == pytest.approx(0.0, abs=1e-5)
    swapped = word_loss(tokens, words, torch.stack([right, left, right]))
    assert swapped.item() == pytest.approx(
        2.0 + 1 / 0.07, rel=1e-4
    )  # squared distance 2 of power 1; cosine 0 against 1
    half = word_loss(tokens, words, torch.ones(3, 4, 4, dtype=torch.bool))  # both columns: half way, and undecided
    assert half.item() == pytest.approx(0.5 + torch.tensor(2.0).log().item(), rel=1e-4)


def test_words_of_an_image_are_gathered_over_its_rows():
    said = {
        "1": ["the red t-shirt", "a hat"],
        "2": ["the person's hat", "t-shirt"],
        "3": ["Hat", "the t-shirt", "shoes"],
    }
    rows = {"source": [], "image_id": [], "messages": []}
    for image_id, phrases in said.items():
        for phrase in phrases:
            rows["source"].append("a")
            rows["image_id"].append(image_id)
            rows["messages"].append([{"role": "assistant", "content": f"<p> {phrase} </p> [SEG]"}])
    # Of the same id in another source; and nothing is said of it.
    rows["source"].append("b")
    rows["image_id"].append("1")
    rows["messages"].append([{"role": "assistant", "content": "Sorry."}])
    words = words_of_images(rows)
    # "red", "person", "s" and "shoes" are said of fewer than three images.
    both = {"hat", "t-shirt"}
    assert words == {
        ("a", "1"): both | {"the"},
        ("a", "2"): both | {"the"},
        ("a", "3"): both | {"the"},
        ("b", "1"): set(),
    }


def test_the_presence_loss_asks_for_one_near_token_a_word():
    vocabulary = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    # One of the two tokens says the first word, the other says neither: it points away from both.
    tokens = torch.tensor([[[1.0, 0.0], [-1.0, -1.0]]])
    near, far = 11.0 * (1 - 0.35), 11.0 * (0 - 0.35)  # logits of the cosines 1 and 0
    softplus = torch.nn.functional.softplus
    right = presence_loss(tokens, vocabulary, torch.tensor([[True, False]]))
    assert right.item() == pytest.approx((softplus(torch.tensor(-near)) + softplus(torch.tensor(far))).item(), rel=1e-4)
    wrong = presence_loss(tokens, vocabulary, torch.tensor([[False, True]]))
    assert wrong.item() == pytest.approx((softplus(torch.tensor(near)) + softplus(torch.tensor(-far))).item(), rel=1e-4)
    nothing = presence_loss(tokens, torch.zeros(0, 2), torch.zeros(1, 0, dtype=torch.bool))
    assert nothing.item() == 0.0
