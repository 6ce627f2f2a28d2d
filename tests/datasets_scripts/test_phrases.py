"""Turns about free phrases keep `[SEG]` and masks in step, whatever the text."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mglmm.datasets_scripts.phrases import (
    Expression,
    Span,
    ask_for_expression,
    ask_for_expressions,
    clean_phrase,
    grounded,
    refer_to,
)
from mglmm.processing.uscdf import SEG_TOKEN, is_well_formed, parse

A, B, C = ({"size": [2, 2], "counts": counts} for counts in ("13", "22", "04"))


def test_one_expression() -> None:
    turn = ask_for_expression(random.Random(0), Expression(" Left  guy in RED. ", A))
    assert turn.question == 'help me find "left guy in red" in this image.'
    assert turn.answer == "Sure, <p> left guy in red </p> [SEG]." and turn.masks == (A,)
    refusal = ask_for_expression(random.Random(1), Expression("the cat", None))
    assert "the cat" in refusal.answer and SEG_TOKEN not in refusal.answer and refusal.masks == ()


def test_several_expressions_of_which_one_is_absent() -> None:
    turn = ask_for_expressions(random.Random(0), [Expression("left cup", A), Expression("dog"), Expression("mug", B)])
    assert [mention.phrase for mention in parse(turn.answer).mentions] == ["left cup", "mug"]
    assert turn.masks == (A, B)
    assert turn.answer.startswith("Sure, <p> left cup </p> [SEG] and <p> mug </p> [SEG]. ") and '"dog"' in turn.answer
    assert all(name in turn.question for name in ('"left cup"', '"dog"', '"mug"'))


def test_every_expression_is_asked_for_once() -> None:
    expressions = [Expression(f"thing number {i}", A if i % 3 else None) for i in range(10)]
    conversations = refer_to(random.Random(3), expressions)
    assert [sum(len(turn.masks) for turn in turns) <= 3 for turns in conversations] == [True] * 4
    text = "\n".join(turn.question for turns in conversations for turn in turns)
    assert all(text.count(f"thing number {i}") == 1 for i in range(10))
    assert sum(len(turn.masks) for turns in conversations for turn in turns) == 6


@pytest.mark.parametrize(
    ("caption", "spans", "answer", "masks"),
    [
        ("A man rides a bike.", [(0, 5, A), (12, 18, B)], "<p> A man </p> [SEG] rides <p> a bike </p> [SEG].", (A, B)),
        ("A man rides a bike.", [(12, 18, B), (0, 5, A)], "<p> A man </p> [SEG] rides <p> a bike </p> [SEG].", (A, B)),
        ("a red hat", [(2, 9, A), (0, 9, B), (6, 9, C)], "<p> a red hat </p> [SEG]", (B,)),  # the longest stays
        ("a hat, a cup", [(0, 6, A), (6, 12, B)], "<p> a hat </p> [SEG], <p> a cup </p> [SEG]", (A, B)),  # trimmed
        ("a hat", [(5, 9, A), (3, 3, B), (-4, 1, C)], "<p> a </p> [SEG] hat", (C,)),  # outside and empty are dropped
        ("no  spans [SEG] here", [], "no spans [ SEG] here", ()),  # a control token of the annotator's
        ("a <p> b", [(0, 7, A)], "<p> a < p> b </p> [SEG]", (A,)),
    ],
)
def test_grounded_captions(caption, spans, answer, masks) -> None:
    assert grounded(caption, [Span(*span) for span in spans]) == (answer, masks)


TEXT = st.text(alphabet="ab <p>/[SEG]\n\"'.{}é", max_size=30)


@settings(max_examples=500)
@given(TEXT, st.lists(st.tuples(st.integers(-5, 35), st.integers(-5, 35)), max_size=6))
def test_any_caption_and_spans_stay_aligned(caption: str, spans: list[tuple[int, int]]) -> None:
    answer, masks = grounded(caption, [Span(start, end, A) for start, end in spans])
    assert is_well_formed(answer)
    assert len(parse(answer).mentions) == len(masks) == answer.count(SEG_TOKEN)


@settings(max_examples=300)
@given(st.lists(st.tuples(TEXT, st.booleans()), min_size=1, max_size=4), st.integers(0, 10**6))
def test_any_expressions_stay_aligned(texts: list[tuple[str, bool]], seed: int) -> None:
    usable = []
    for text, present in texts:
        try:
            clean_phrase(text)
        except ValueError:
            continue
        usable.append(Expression(text, A if present else None))
    for turns in refer_to(random.Random(seed), usable):
        for turn in turns:
            assert is_well_formed(turn.answer)
            assert len(parse(turn.answer).mentions) == len(turn.masks)
            assert SEG_TOKEN not in turn.question and "<" + "p>" not in turn.question
