"""Generation that keeps to the grammar, whatever the model would say."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import pipeline

from mglmm.processing.grammar import UscdfGrammar
from mglmm.processing.pipeline_mglmm import TASK
from mglmm.processing.uscdf import PHRASE_END, PHRASE_START, SEG_TOKEN, is_well_formed
from tests.tiny import picture, script_tokens, tiny_processor

PROCESSOR = tiny_processor()
TOKENIZER = PROCESSOR.tokenizer
START, END, SEG = TOKENIZER.convert_tokens_to_ids([PHRASE_START, PHRASE_END, SEG_TOKEN])
EOS = TOKENIZER.eos_token_id


def ids(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def allowed(text: str, max_new_tokens: int | None = None) -> set[int]:
    """Tokens that may follow an answer which has got as far as `text`, after a prompt that looks like an open phrase."""
    prompt = ids("<p> a")
    grammar = UscdfGrammar(TOKENIZER, len(prompt), max_new_tokens)
    scores = grammar(torch.tensor([prompt + ids(text)]), torch.zeros(1, len(TOKENIZER)))
    assert not scores.isnan().any()
    return set(torch.isfinite(scores[0]).nonzero()[:, 0].tolist())


EVERYTHING = set(range(len(TOKENIZER)))
IMAGE = PROCESSOR.image_token_id


@pytest.mark.parametrize(
    ("text", "forbidden"),
    [
        ("", {END, SEG, IMAGE}),  # nothing to close, and no mask without a phrase
        ("Sure,", {END, SEG, IMAGE}),
        ("Sure, <p>", {START, END, SEG, IMAGE, EOS, TOKENIZER.pad_token_id}),  # an empty phrase is none
        ("Sure, <p> ", {START, END, SEG, IMAGE, EOS, TOKENIZER.pad_token_id}),  # nor is a blank one
        ("Sure, <p> hat", {START, SEG, IMAGE, EOS, TOKENIZER.pad_token_id}),  # words: now it may be closed
        ("Sure, <p> hat </p> [SEG]", {END, SEG, IMAGE}),
    ],
)
def test_what_is_forbidden(text, forbidden):
    assert EVERYTHING - allowed(text) == forbidden


def test_a_closed_phrase_is_followed_by_its_mask_as_in_the_training_data():
    rendered = ids("<p> hat </p> [SEG]")
    closing = rendered[rendered.index(END) :]
    assert closing[0] == END and closing[-1] == SEG
    said = ids("<p> hat")
    grammar = UscdfGrammar(TOKENIZER, 0)
    for done in range(1, len(closing)):
        scores = torch.full((1, len(TOKENIZER)), -torch.inf)  # even if something else forbade it
        scores[0, EOS] = 5.0
        scores = grammar(torch.tensor([said + closing[:done]]), scores)
        assert scores[0].argmax() == closing[done] and torch.isfinite(scores).sum() == 1


@pytest.mark.parametrize(
    ("text", "room", "expected"),
    [
        ("Sure,", 4, EVERYTHING - {START, END, SEG, IMAGE}),  # too late for another phrase
        ("Sure,", 40, EVERYTHING - {END, SEG, IMAGE}),
        ("Sure, <p> hat", 3, {END}),  # just enough for `</p>`, a blank and `[SEG]`
        ("Sure, <p> hat", 4, EVERYTHING - {START, SEG, IMAGE, EOS, TOKENIZER.pad_token_id}),
    ],
)
def test_near_the_limit_phrases_are_closed_and_none_is_opened(text, room, expected):
    assert allowed(text, len(ids(text)) + room) == expected


@settings(max_examples=200)
@given(seed=st.integers(0, 2**31), limit=st.integers(1, 40))
def test_whatever_is_chosen_the_answer_is_well_formed(seed, limit):
    """The chosen tokens are random, with control tokens far more often than a model would say them."""
    generator = torch.Generator().manual_seed(seed)
    grammar, tokens = UscdfGrammar(TOKENIZER, 0, limit), []
    while len(tokens) < limit:
        scores = torch.randn(1, len(TOKENIZER), generator=generator)
        scores[0, [START, END, SEG, EOS, IMAGE, *ids(" ")]] += 3.0
        scores[0, ids("a dog hat the")] += 2.0
        tokens.append(int(grammar(torch.tensor([tokens], dtype=torch.long).reshape(1, -1), scores).argmax()))
        if tokens[-1] == EOS:
            break
    assert is_well_formed(PROCESSOR.split_pieces(tokens)), TOKENIZER.decode(tokens)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "temperature": 5.0},  # nearly every token is possible
        {"num_beams": 3},
        {"no_repeat_ngram_size": 1},  # which by itself forbids the second `</p>`
    ],
)
def test_answers_of_the_model_are_well_formed_in_every_mode(tiny, options):
    inputs = tiny.processor.apply_chat_template(
        [
            [
                {
                    "role": "user",
                    "content": [{"type": "image", "image": picture(seed=i)}, {"type": "text", "text": "Mark."}],
                }
            ]
            for i in range(4)
        ],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )
    torch.manual_seed(0)
    bias = {(token,): 6.0 for token in (START, END, SEG)}  # so that phrases do come
    grammar = tiny.processor.logits_processor(inputs["input_ids"].shape[1], 60)
    outputs = tiny.model.generate(
        **inputs, output_masks=True, max_new_tokens=60, logits_processor=grammar, sequence_bias=bias, **options
    )
    answers = outputs.generated_ids.tolist()
    assert sum(answer.count(SEG) for answer in answers) > 0
    assert all(is_well_formed(tiny.processor.split_pieces(answer)) for answer in answers)


def test_a_model_of_another_form_is_left_alone(tiny):
    processor = type(tiny.processor)(
        tiny.processor.image_processor, TOKENIZER, sam_image_size=64, keep_to_grammar=False
    )
    assert list(processor.logits_processor(10, 20)) == []
    assert [type(item) for item in tiny.processor.logits_processor(10, 20)] == [UscdfGrammar]


def test_the_caller_of_the_pipeline_has_the_last_word(tiny):
    pipe = pipeline(TASK, model=tiny.model, processor=tiny.processor, device="cpu")
    script = script_tokens(tiny.model, tiny.processor, ["It is [SEG]."])
    assert pipe(picture(), "Segment the hat.", logits_processor=script, max_new_tokens=20).text == "It is [SEG]."
