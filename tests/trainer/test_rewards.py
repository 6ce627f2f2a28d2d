"""Rewards on answers whose worth is known: one literal table per reward."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from mglmm.processing.rle import encode_mask
from mglmm.processing.uscdf import SEG_TOKEN, conversation_of
from mglmm.trainer.rewards import (
    CaptionCider,
    CountMatch,
    MaskIoU,
    PhrasesHaveMasks,
    WellFormed,
    captions_of,
    last_answer,
    ordered_overlap,
)
from tests.tiny import Tiny, picture, tiny_model, tiny_processor
from tests.trainer.conftest import SIZE, uscdf_row

HAT, DOG = "<p> the hat </p> [SEG]", "<p> the dog </p> [SEG]"


def ids_of(processor, text: str) -> list[int]:
    return processor.tokenizer(text, add_special_tokens=False)["input_ids"]


def answered(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": "<image>\nSegment it."}, {"role": "assistant", "content": text}]


@pytest.mark.parametrize(
    ("answer", "well_formed", "phrases_have_masks"),
    [
        (f"Sure, {HAT}.", 1.0, 1.0),  # one phrase with its mask
        (f"Sure, {HAT} and {DOG}.</s>", 1.0, 1.0),  # two, and the end token that generation leaves in place
        ("Sorry, I cannot find a bicycle.", 1.0, 1.0),  # a refusal has no tags at all
        ("", 1.0, 1.0),  # nothing
        ("Sure, <p> the hat </p>.", 0.0, 0.0),  # phrase without mask
        (f"Sure, <p> the hat </p> and {DOG}.", 0.0, 0.5),  # one of two phrases without
        ("Sure, [SEG].", 0.0, 1.0),  # mask without phrase: none lacks a mask, but the grammar is broken
        ("Sure, <p> the hat [SEG].", 0.0, 0.0),  # never closed
        ("Sure, the hat </p> [SEG].", 0.0, 1.0),  # never opened
        (f"Sure, <p> the {HAT}.", 0.0, 0.5),  # nested: the outer phrase has none
        ("Sure, <p> </p> [SEG].", 0.0, 0.0),  # an empty phrase is none
        (f"Sure, {HAT} [SEG].", 0.0, 1.0),  # the second mask has no phrase
        ("Sure, <p> the hat </p> of [SEG].", 0.0, 1.0),  # words between phrase and mask
    ],
)
def test_grammar_rewards(tiny, answer, well_formed, phrases_have_masks):
    columns = {"prompts": [None], "completions": [None], "completion_ids": [ids_of(tiny.processor, answer)]}
    assert WellFormed(tiny.processor)(**columns) == [well_formed]
    assert PhrasesHaveMasks(tiny.processor)(**columns) == [phrases_have_masks]


def test_tags_spelt_in_letters_earn_nothing(tiny):
    """Decoded, these answers look right; but no mask comes of letters."""
    spelt = [i for letter in "[SEG]" for i in ids_of(tiny.processor, letter)]
    ids = ids_of(tiny.processor, "Sure, <p> the hat </p> ") + spelt
    assert tiny.processor.decode(ids).endswith("<p> the hat </p> [SEG]") and tiny.processor.seg_token_id not in ids
    columns = {"completion_ids": [ids], "messages": [answered(f"Sure, {HAT}.")]}
    assert WellFormed(tiny.processor)(**columns) == [0.0]
    assert PhrasesHaveMasks(tiny.processor)(**columns) == [0.0]
    assert CountMatch(tiny.processor)(**columns) == [0.0]


@pytest.mark.parametrize(
    ("answer", "reference", "reward"),
    [
        (HAT, DOG, 1.0),  # one and one: which one is not asked here
        ("Sorry, there is none.", "Sorry, I cannot find it.", 1.0),  # nothing there, none given
        (HAT, "Sorry, I cannot find it.", 0.0),  # one where nothing is there
        ("Sorry, there is none.", HAT, 0.0),  # refused although it is there
        (HAT, f"{HAT} and {DOG}", 0.5),  # one of two
        (f"{HAT}, {HAT}, {HAT}, and {HAT}", HAT, 0.25),  # too many
        ("[SEG]", HAT, 1.0),  # without a phrase it is a mask all the same
    ],
)
def test_count_match(tiny, answer, reference, reward):
    # The masks of earlier turns are not due again.
    messages = answered(f"{DOG}, {DOG}, and {DOG}") + answered(reference)
    assert CountMatch(tiny.processor)(completion_ids=[ids_of(tiny.processor, answer)], messages=[messages]) == [reward]


@pytest.mark.parametrize(
    ("iou", "total"),
    [
        ([[0.5]], 0.5),  # one pair
        ([[0.75, 0.0], [0.0, 0.5]], 1.25),  # in order
        ([[0.0, 1.0], [1.0, 0.0]], 1.0),  # in each other's place: only one can be paired
        ([[0.0, 0.5, 1.0]], 1.0),  # one mask, three due: the best of them
        ([[1.0, 0.0], [0.0, 0.0], [0.0, 0.5]], 1.5),  # one too many in the middle is passed over
        ([[0.5, 0.0], [1.0, 0.0], [0.0, 1.0]], 2.0),  # each is used once
        ([[0.25, 1.0], [0.0, 0.5]], 1.0),  # pairing the best leaves the rest alone if that is worth more
    ],
)
def test_ordered_overlap(iou, total):
    assert ordered_overlap(np.array(iou)) == total


@pytest.fixture(scope="module")
def own() -> Tiny:
    """A toy model of this module's own, and a mask head that answers differently for each `[SEG]`."""
    processor = tiny_processor()
    return Tiny(tiny_model(processor), processor)


def own_masks(own, row, answer: str) -> np.ndarray:
    """What `generate` itself gives for the masks of a scripted answer, `(n, H, W)`."""
    from tests.tiny import script_tokens

    inputs = own.processor.apply_chat_template(
        [conversation_of(row)[:-1]],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
        processor_kwargs={"padding": True},
    )
    outputs = own.model.generate(
        **inputs,
        output_masks=True,
        max_new_tokens=60,
        logits_processor=script_tokens(own.model, own.processor, [answer]),
    )
    return own.processor.post_process_masks(outputs.pred_masks[0], SIZE)


def mask_reward(own, row, answer: str, model=None, **columns) -> float:
    reward = MaskIoU(model or own.model, own.processor)
    (value,) = reward(
        prompts=[conversation_of(row)[:-1]],
        completions=[None],
        completion_ids=[[*ids_of(own.processor, answer), own.processor.tokenizer.eos_token_id]],
        messages=[row["messages"]],
        masks=[row["masks"]],
        **columns,
    )
    return value


def with_masks(row, masks) -> dict:
    return {**row, "masks": [encode_mask(mask) for mask in masks]}


def test_mask_iou_is_that_of_the_masks_that_generation_gives(own):
    """A second turn: the masks of the first, in prompt and row, are passed over. The order of the two counts."""
    row = uscdf_row(2, "referring", ("the car",), ("the dog", "the hat"))
    answer = f"Sure, {HAT} and {DOG}."
    first, second = own_masks(own, row, answer)
    assert first.any() and second.any() and (first != second).any()
    elsewhere = np.zeros(SIZE, dtype=bool)
    iou = (first & second).sum() / (first | second).sum()
    assert mask_reward(own, with_masks(row, [elsewhere, first, second]), answer) == 1.0
    assert mask_reward(own, with_masks(row, [elsewhere, second, first]), answer) == pytest.approx(max(2 * iou, 1.0) / 2)


def test_mask_iou_of_other_counts(own):
    row = uscdf_row(0, "referring", ("the hat", "the dog"))
    first, second = own_masks(own, row, f"{HAT} and {DOG}")
    refusal = uscdf_row(0, "absent", ())
    assert mask_reward(own, with_masks(row, [first, second]), HAT) == 0.5  # one of two, and that one right
    one = with_masks(uscdf_row(0, "referring", ("the hat",)), [first])
    # The question of `one` differs, so its masks are those of its own prompt.
    (alone,) = own_masks(own, one, HAT)
    assert mask_reward(own, with_masks(one, [alone]), f"{HAT}, {DOG}, {DOG}, and {DOG}") == 0.25  # three too many
    assert mask_reward(own, refusal, "Sorry, I cannot find it.") == 1.0  # nothing there, and none given
    assert mask_reward(own, refusal, HAT) == 0.0  # nothing there
    assert mask_reward(own, row, "Sorry, I cannot find it.") == 0.0  # refused although it is there


def test_mask_iou_leaves_out_ignored_pixels(own):
    row = uscdf_row(0, "referring", ("the hat",))
    (mask,) = own_masks(own, row, HAT)
    half = mask.copy()
    half[:, : SIZE[1] // 2] = False
    left = np.zeros(SIZE, dtype=bool)
    left[:, : SIZE[1] // 2] = True
    assert 0 < half.sum() < mask.sum()
    row = with_masks(row, [half])
    assert mask_reward(own, row, HAT) == half.sum() / mask.sum()
    assert mask_reward(own, row, HAT, ignore_mask=[encode_mask(left)]) == 1.0
    assert mask_reward(own, row, HAT, ignore_mask=[None]) == half.sum() / mask.sum()


def test_batches_and_shared_pictures_change_nothing(own):
    """Rows of different pictures and lengths, some of which need no pass, in passes of 2: each gets what it gets alone."""
    rows = [
        uscdf_row(0, "referring", ("the hat", "the dog")),
        uscdf_row(1, "absent", ()),
        uscdf_row(0, "referring", ("the hat", "the dog")),
        uscdf_row(2, "referring", ("the car",)),
        uscdf_row(1, "referring", ("the dog",)),
    ]
    answers = [f"Sure, {HAT} and {DOG}.", "Sorry.", HAT, f"Of course, that is {DOG}.", HAT]
    together = MaskIoU(own.model, own.processor, batch_size=2)(
        prompts=[conversation_of(row)[:-1] for row in rows],
        completion_ids=[[*ids_of(own.processor, a), own.processor.tokenizer.eos_token_id] for a in answers],
        messages=[row["messages"] for row in rows],
        masks=[row["masks"] for row in rows],
    )
    alone = [mask_reward(own, row, answer) for row, answer in zip(rows, answers, strict=True)]
    assert together == pytest.approx(alone, abs=1e-6)
    assert len(set(alone)) == 5


def test_the_policy_is_left_as_it_was(own):
    """Modes (mixed ones too), gradients, weights, random numbers; and an adapter counts although it came later."""
    processor = own.processor
    model = tiny_model(processor)
    reward = MaskIoU(model, processor)
    config = LoraConfig(target_modules=r".*\.language_model\..*\.q_proj", lora_dropout=0.5, init_lora_weights=False)
    row = uscdf_row(0, "referring", ("the hat",))
    plain = mask_reward(own, row, HAT, model)
    peft_model = get_peft_model(model, config).train()
    peft_model.base_model.model.lm_head.eval()
    modes = {name: module.training for name, module in peft_model.named_modules()}
    weights = {name: value.clone() for name, value in peft_model.state_dict().items()}
    random_state = torch.get_rng_state()

    wrapped = [mask_reward(own, row, HAT, peft_model) for _ in range(2)]  # without dropout: twice the same
    assert wrapped[0] == wrapped[1] != plain
    assert reward.model is peft_model.get_base_model()
    assert {name: module.training for name, module in peft_model.named_modules()} == modes
    assert set(modes.values()) == {True, False}
    assert all(parameter.grad is None for parameter in peft_model.parameters())
    assert all(torch.equal(value, weights[name]) for name, value in peft_model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_modes_come_back_after_an_error(own):
    model = tiny_model(own.processor).train()
    row = uscdf_row(0, "referring", ("the hat",))
    model.model.mask_decoder.forward = None  # fails in the middle of the pass
    with pytest.raises(TypeError):
        mask_reward(own, row, HAT, model)
    assert model.training and model.model.mask_decoder.training and not model.model.vision_tower.training


def test_prompts_need_one_picture(own):
    row = uscdf_row(0, "referring", ("the hat",))
    prompt = conversation_of(row)[:-1]
    for parts, count in (([], 0), ([{"type": "image", "image": picture()}] * 2, 2)):
        prompt[0]["content"] = [*parts, {"type": "text", "text": "Segment the hat."}]
        with pytest.raises(ValueError, match=f"one picture each, got one with {count}"):
            MaskIoU(own.model, own.processor)(
                prompts=[prompt],
                completion_ids=[ids_of(own.processor, HAT)],
                messages=[row["messages"]],
                masks=[row["masks"]],
            )


CORPUS = (
    "A woman with a red hat stands on the grass.",
    "A brown dog runs on the grass.",
    "Two cars on the street and a dog.",
    "The sky is blue.",
)


@pytest.mark.parametrize(
    ("caption", "score"),
    [
        # What pycocoevalcap 1.2 gives for these words with the four captions as references.
        ("A brown dog runs on the grass.", 10.0),  # the reference itself
        ("a  brown DOG, runs on the grass", 10.0),  # case, spaces and punctuation do not count
        ("A dog on the grass.", 1.537942825779814),  # fewer words
        ("A woman.", 0.04632095442204692),  # the wrong thing, too short
        ("the the the grass", 0.8150854532388965),  # repeated words are clipped
        ("grass the on runs dog brown a", 2.5),  # the right words in a wrong order: 1-grams only
        # Twice the reference and more: the length counts.
        ("A brown dog runs on the grass and a brown dog runs on the grass and then again it runs.", 0.3650505097824816),
        ("", 0.0),
        ("Zebras graze.", 0.0),  # no word in common
    ],
)
def test_cider(tiny, caption, score):
    assert CaptionCider(tiny.processor, CORPUS).score(caption, CORPUS[1]) == pytest.approx(score, abs=1e-9)


def test_caption_cider_reads_clean_text_and_leaves_other_tasks_alone(tiny):
    reference = "<p> A brown dog </p> [SEG] runs on <p> the grass </p> [SEG]."
    answers = ["A brown dog runs on <p> the grass </p> [SEG].</s>", "A dog on the grass.", "A brown dog."]
    rewards = CaptionCider(tiny.processor, CORPUS)(
        completion_ids=[ids_of(tiny.processor, answer) for answer in answers],
        messages=[answered("Not this turn.") + answered(reference)] * 3,
        task=["panoptic", "caption", "referring"],
    )
    assert rewards == [pytest.approx(1.0), pytest.approx(0.1537942825779814), None]


def test_captions_of_rows():
    rows = [
        {"task": "fine", "messages": answered(f"The dog has {HAT}.")},
        {"task": "referring", "messages": answered(HAT)},  # no description
        {"task": "caption", "messages": answered("A dog.") + answered("A hat.")},  # both turns
    ]
    assert list(captions_of(rows)) == ["The dog has the hat.", "A dog.", "A hat."]


@pytest.mark.parametrize("corpus", [(), ("A dog.",)])
def test_caption_cider_needs_a_corpus(tiny, corpus):
    with pytest.raises(ValueError, match=f"there are {len(corpus)}: give it rows of the tasks caption"):
        CaptionCider(tiny.processor, corpus)


def test_a_conversation_must_end_with_an_answer():
    with pytest.raises(ValueError, match="must end with an assistant turn, not one of user"):
        last_answer([{"role": "user", "content": SEG_TOKEN}])


def test_names_in_the_log(tiny):
    """TRL logs a reward under its `__name__`."""
    rewards = [kind(tiny.processor) for kind in (WellFormed, PhrasesHaveMasks, CountMatch)]
    rewards += [MaskIoU(tiny.model, tiny.processor), CaptionCider(tiny.processor, CORPUS)]
    names = ["well_formed", "phrases_have_masks", "count_match", "mask_iou", "caption_cider"]
    assert [reward.__name__ for reward in rewards] == names
