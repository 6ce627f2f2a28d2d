"""The stage in which the language model learns its answers: packed conversations are as good as single ones."""

from collections import Counter

import datasets
import pytest
import torch

from mglmm.datasets_scripts.features import FEATURES
from mglmm.processing.uscdf import conversation_of
from mglmm.trainer.answer_warmup import AnswerCollator, AnswerWarmup, ImageConversations, deciding_tokens
from mglmm.trainer.feature_cache import FeatureCache
from mglmm.trainer.stage_trainer import StageTrainer
from tests.trainer.conftest import training_arguments, uscdf_row


def dataset(rows) -> datasets.Dataset:
    return datasets.Dataset.from_list(rows, features=FEATURES)


@pytest.fixture
def asked() -> datasets.Dataset:
    """Of two pictures: of each a question that is answered and one that is refused; longer conversations besides."""
    return dataset(
        [
            uscdf_row(0, "referring", ("the hat",), (), ("the dog", "the hat")),  # several turns
            uscdf_row(0, "fine", ("the car",)),  # not a question of what is there
            uscdf_row(0, "referring", ("the dog",)),
            uscdf_row(0, "absent", ()),
            uscdf_row(1, "referring", ("the car",)),
            uscdf_row(1, "region", ("the hat",)),
            uscdf_row(1, "absent", ()),
        ]
    )


def test_conversations_by_picture_and_kind(asked):
    images = ImageConversations(asked)
    kinds = [{k: [len(m) for m in c] for k, c in images[i]["conversations"].items()} for i in range(2)]
    assert kinds == [
        {"other": [6], "described": [2], "answered": [2], "refused": [2]},
        {"answered": [2], "refused": [2]},
    ]
    assert images[1]["image"].size == (60, 40)
    assert images.openings == {False: Counter({"Sure, <p> the": 2}), True: Counter({"Sorry, I cannot": 2})}


def test_pictures_of_a_source_come_as_often_as_is_said(asked):
    other = asked.map(lambda row: {"source": "other"})
    images = ImageConversations(datasets.concatenate_datasets([asked, other]), {"other": 3})
    assert [image[0] for image, _ in images.images].count("other") == 6 and len(images) == 8
    expected = {"other", "described", "answered", "refused"}
    assert images[0]["conversations"].keys() == images[1]["conversations"].keys() == expected


@pytest.mark.parametrize(
    ("turns", "counts"),
    [
        ([("the hat",)], "0 refused and 1 answered"),
        ([()], "1 refused and 0 answered"),
        ([("the hat",), ()], "0 refused and 0 answered"),  # no single question
    ],
)
def test_both_kinds_are_needed(turns, counts):
    with pytest.raises(ValueError, match=f"1 rows hold {counts} single questions: the answer warm-up needs both"):
        ImageConversations(dataset([uscdf_row(0, "referring", *turns)]))


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


def packed(model, processor, images, tmp_path, conversations_per_image=16):
    cache = FeatureCache(tmp_path, model, processor)
    cache.fill(model, processor, [images[i]["image"] for i in range(len(images))])
    collator = AnswerCollator(processor, cache, deciding_tokens(processor, images.openings), conversations_per_image)
    return collator([images[i] for i in range(len(images))])


def test_packed_conversations_do_not_see_each_other(tiny_shared, asked, tmp_path):
    """What is said at each supervised token is what the same conversation says by itself."""
    model, processor = tiny_shared
    images = ImageConversations(asked)
    batch = packed(model, processor, images, tmp_path)
    blocked = torch.finfo(torch.float32).min
    mask = torch.zeros(batch["attention_mask"].shape).masked_fill(~batch["attention_mask"], blocked)
    keys = ("input_ids", "position_ids", "image_features")
    with torch.no_grad():
        hidden = model.model(**{key: batch[key] for key in keys}, attention_mask=mask).last_hidden_state
    found = 0
    for image in range(2):
        picture = images[image]["image"]
        features = {name: value[image : image + 1] for name, value in batch["image_features"].items()}
        for messages in [m for kind in images[image]["conversations"].values() for m in kind]:
            alone = processor.apply_chat_template(
                [conversation_of({"image": picture, "messages": messages})],
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                return_assistant_tokens_mask=True,
            )
            with torch.no_grad():
                expected = model.model(
                    input_ids=alone["input_ids"], image_features=type(batch["image_features"])(**features)
                ).last_hidden_state[0]
            tokens, end = alone["input_ids"][0], None
            for position in range(batch["input_ids"].shape[1]):  # which packed one it is
                own = batch["attention_mask"][image, 0, position].nonzero()[:, 0]
                if torch.equal(batch["input_ids"][image, own], tokens):
                    end = own
            torch.testing.assert_close(hidden[image, end], expected, atol=1e-4, rtol=1e-4)
            supervised = alone["assistant_masks"][0].bool()
            assert batch["labels"][image, end].tolist() == tokens.masked_fill(~supervised, -100).tolist()
            found += 1
    assert found == 6


def test_decisions_stand_before_the_first_telling_token(tiny_shared, asked, tmp_path):
    model, processor = tiny_shared
    images = ImageConversations(asked)
    batch = packed(model, processor, images, tmp_path)
    decision = deciding_tokens(processor, images.openings)
    assert sorted(batch["refused"].tolist()) == [False, False, True, True]
    for (image, position), refused in zip(batch["decisions"].tolist(), batch["refused"].tolist(), strict=True):
        telling = decision.refusing if refused else decision.answering
        assert int(batch["labels"][image, position + 1]) in telling.tolist()


def test_as_many_as_fit_and_no_question_twice(tiny_shared, asked, tmp_path, monkeypatch):
    model, processor = tiny_shared
    images = ImageConversations(datasets.concatenate_datasets([asked, asked]))
    batch = packed(model, processor, images, tmp_path)
    assert batch["refused"].tolist().count(True) == 2  # the same words, once a picture
    monkeypatch.setattr("mglmm.trainer.answer_warmup.MAX_PACKED", 1)
    short = packed(model, processor, images, tmp_path)  # one alone always fits
    assert short["input_ids"].shape[1] < batch["input_ids"].shape[1] and len(short["input_ids"]) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_learns_to_answer_and_changes_nothing_else(adapted, asked, tmp_path, dtype):
    model, processor = adapted(shared=True, lora_dropout=0.0, language_model_dtype=dtype)
    images = ImageConversations(asked)
    cache = FeatureCache(tmp_path / "features", model.get_base_model(), processor)
    cache.fill(model.get_base_model(), processor, [images[i]["image"] for i in range(2)])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    decision = deciding_tokens(processor, images.openings)
    args = training_arguments(tmp_path / "run", max_steps=40, per_device_train_batch_size=2, learning_rate=1e-2)
    trainer = StageTrainer(
        model=AnswerWarmup(model, decision),
        args=args,
        train_dataset=images,
        data_collator=AnswerCollator(processor, cache, decision, 16),
    )
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "refusal_loss" in entry]
    assert len(log) == 40 and log[-1]["refusal_loss"] < 0.2 < log[0]["refusal_loss"]
    assert log[-1]["ce_loss"] < 0.5 * log[0]["ce_loss"]
    assert log[-1]["refused_absent"] == 1.0 and log[-1]["refused_present"] == 0.0
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all("lora_" in name or ".multi_modal_projector.modules_to_save." in name for name in moved)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == moved
