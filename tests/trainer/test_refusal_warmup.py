"""The stage in which the language model learns to look: packed questions are as good as single ones, and it learns."""

from collections import Counter

import datasets
import pytest
import torch

from mglmm.datasets_scripts.features import FEATURES
from mglmm.trainer.feature_cache import FeatureCache
from mglmm.trainer.refusal_warmup import (
    ImageQuestions,
    Question,
    RefusalCollator,
    RefusalWarmup,
    deciding_tokens,
)
from mglmm.trainer.stage_trainer import StageTrainer
from tests.trainer.conftest import training_arguments, uscdf_row


def dataset(rows) -> datasets.Dataset:
    return datasets.Dataset.from_list(rows, features=FEATURES)


@pytest.fixture
def asked() -> datasets.Dataset:
    """Of two pictures: of each, questions that are answered and one that is refused; a description besides."""
    return dataset(
        [
            uscdf_row(0, "referring", ("the hat",), (), ("the dog", "the hat")),
            uscdf_row(0, "fine", ("the car",)),  # not a question of what is there
            uscdf_row(1, "referring", ("the car",)),
            uscdf_row(1, "absent", ()),
        ]
    )


def test_every_turn_of_a_picture_is_a_question(asked):
    images = ImageQuestions(asked)
    assert len(images) == 2
    assert [images[i]["questions"] for i in range(2)] == [
        [
            Question("Segment the hat.", False),
            Question("Segment a bicycle.", True),
            Question("Segment the dog and the hat.", False),
        ],
        [Question("Segment the car.", False), Question("Segment a bicycle.", True)],
    ]
    assert images[1]["image"].size == (60, 40)
    assert images.openings == {False: Counter({"Sure, <p> the": 3}), True: Counter({"Sorry, I cannot": 2})}


@pytest.mark.parametrize(
    ("turns", "counts"),
    [
        ([("the hat",)], "0 refused and 1 answered"),
        ([()], "1 refused and 0 answered"),
    ],
)
def test_both_kinds_are_needed(turns, counts):
    with pytest.raises(ValueError, match=f"1 rows hold {counts} questions: the refusal warm-up needs both"):
        ImageQuestions(dataset([uscdf_row(0, "referring", *turns)]))


def test_the_first_tokens_that_decide(tiny):
    openings = {
        True: Counter({"I cannot find": 3, "The picture shows": 1}),
        False: Counter({"a <p> hat": 2, "The <p> hat": 2}),
    }
    decision = deciding_tokens(tiny.processor, openings)
    ids = tiny.processor.tokenizer.convert_tokens_to_ids
    assert decision.prefix == []
    assert decision.refusing.tolist() == [ids("ĠI")] and decision.answering.tolist() == [ids("Ġa")]  # "The" begins both


def test_what_all_answers_begin_with_is_passed_over(tiny):
    openings = {True: Counter({"Sorry, I cannot": 1}), False: Counter({"Sure, <p> the": 1})}
    decision = deciding_tokens(tiny.processor, openings)  # to this tokenizer " S or r y" and " S ure"
    ids = tiny.processor.tokenizer.convert_tokens_to_ids
    assert decision.prefix == ids(["Ġ", "S"])
    assert decision.refusing.tolist() == [ids("or")] and decision.answering.tolist() == [ids("ure")]


def test_answers_that_begin_alike_cannot_be_told_apart(tiny):
    same = Counter({"The picture shows": 1})
    with pytest.raises(ValueError, match="begin with the same words"):
        deciding_tokens(tiny.processor, {True: same, False: same + Counter({"The picture has": 1})})


def packed(model, processor, images, tmp_path, questions_per_image):
    cache = FeatureCache(tmp_path, model, processor)
    cache.fill(model, processor, [images[i]["image"] for i in range(len(images))])
    decision = deciding_tokens(processor, images.openings)
    return RefusalCollator(processor, cache, decision, questions_per_image)([images[i] for i in range(len(images))])


def test_packed_questions_do_not_see_each_other(tiny_shared, asked, tmp_path):
    """The state at the end of each is that of the same question asked alone."""
    model, processor = tiny_shared
    images = ImageQuestions(asked)
    batch = packed(model, processor, images, tmp_path, 2)
    assert batch["refused"].tolist() == [True, False, True, False]
    blocked = torch.finfo(torch.float32).min
    mask = torch.zeros(batch["attention_mask"].shape).masked_fill(~batch["attention_mask"], blocked)
    keys = ("input_ids", "position_ids", "image_features")
    with torch.no_grad():
        hidden = model.model(**{key: batch[key] for key in keys}, attention_mask=mask).last_hidden_state
    ends = batch["ends"]
    states = hidden[ends[:, 0], ends[:, 1]]

    start = 0
    for (image, end), state in zip(ends.tolist(), states, strict=True):
        own = (batch["attention_mask"][image, 0, end]).nonzero()[:, 0]  # what the last token sees: prefix and question
        text = processor.tokenizer.decode(batch["input_ids"][image, own])
        (question,) = [q.text for q in images[image]["questions"] if q.text in text]
        content = [{"type": "image", "image": images[image]["image"]}, {"type": "text", "text": question}]
        alone = processor.apply_chat_template(
            [[{"role": "user", "content": content}]],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        prefix = deciding_tokens(processor, images.openings).prefix
        alone["input_ids"] = torch.cat([alone["input_ids"], torch.tensor([prefix])], dim=1)
        assert torch.equal(alone["input_ids"][0], batch["input_ids"][image, own])
        features = {name: value[image : image + 1] for name, value in batch["image_features"].items()}
        with torch.no_grad():
            expected = model.model(
                input_ids=alone["input_ids"], image_features=type(batch["image_features"])(**features)
            ).last_hidden_state[0, -1]
        torch.testing.assert_close(state, expected, atol=1e-4, rtol=1e-4)
        start += 1
    assert start == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_learns_to_refuse_and_changes_nothing_else(adapted, asked, tmp_path, dtype):
    model, processor = adapted(shared=True, lora_dropout=0.0, language_model_dtype=dtype)
    images = ImageQuestions(asked)
    cache = FeatureCache(tmp_path / "features", model.get_base_model(), processor)
    cache.fill(model.get_base_model(), processor, [images[i]["image"] for i in range(2)])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    decision = deciding_tokens(processor, images.openings)
    wrapper = RefusalWarmup(model, decision)
    args = training_arguments(tmp_path / "run", max_steps=30, per_device_train_batch_size=2, learning_rate=1e-2)
    trainer = StageTrainer(
        model=wrapper, args=args, train_dataset=images, data_collator=RefusalCollator(processor, cache, decision, 4)
    )
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "refusal_loss" in entry]
    assert len(log) == 30 and log[-1]["refusal_loss"] < 0.1 < log[0]["refusal_loss"]
    assert log[-1]["refused_absent"] == 1.0 and log[-1]["refused_present"] == 0.0
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all("lora_" in name or ".multi_modal_projector.modules_to_save." in name for name in moved)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == moved
