"""The USCDF grammar: rendering, parsing of whatever a model emits, escaping, and the row invariant."""

import re
from copy import deepcopy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mglmm.processing.uscdf import (
    CONTROL_TOKENS,
    Mention,
    ParsedAnswer,
    count_seg,
    drop_phrases,
    escape_control_tokens,
    is_well_formed,
    parse,
    render_list,
    render_phrase,
    validate_row,
)

TAGS = [(tag, True) for tag in ("<p>", "</p>", "[SEG]")]
# Control tokens (tags three times as often as the rest), their literal look-alikes, fragments of them, and text.
PIECES = 3 * TAGS + [
    *[("<image>", True), ("</s>", True), ("[SEG]", False), ("<p>", False), ("</p>", False), ("<region>", False)],
    *[(text, False) for text in ("[SE", "G]", "<", "/p>", "dog", "red hat", "a", " ", "  ", "\n", "\t ", "\xa0", "")],
    *[
        (text, False)
        for text in (".", ",", " (", ")", '"', "'s", "狗", "é", "\x00", "\u200b", "\ud800", " two  words ")
    ],
]
# Bytes as indices: ten times faster to draw than lists.
pieces_lists = st.binary(max_size=14).map(lambda indices: [PIECES[index % len(PIECES)] for index in indices])
raw_strings = pieces_lists.map(lambda pieces: "".join(text for text, _ in pieces))
phrases = st.text(st.characters(exclude_characters="<[", exclude_categories=("Cs",)), min_size=1, max_size=12).filter(
    str.strip
)


@pytest.mark.parametrize(
    ("answer", "clean", "mentions"),
    [
        # one target
        ("Sure, <p> dog </p> [SEG].", "Sure, dog.", [("dog", (6, 9))]),
        # several targets, Oxford comma
        (
            "Sure, <p> a </p> [SEG], <p> b c </p> [SEG], and <p> d </p> [SEG].",
            "Sure, a, b c, and d.",
            [("a", (6, 7)), ("b c", (9, 12)), ("d", (18, 19))],
        ),
        # nothing present: no tags
        ("Sorry, there is no dog here.", "Sorry, there is no dog here.", []),
        # some present, some absent: the absent one is not tagged
        ("<p> dog </p> [SEG]. But I cannot see a cat.", "dog. But I cannot see a cat.", [("dog", (0, 3))]),
        # [SEG] without a phrase stands for the query
        ("It is [SEG].", "It is.", [("the query", None)]),
        # ... also where the phrase before it was taken by another [SEG]
        ("<p> dog </p> [SEG] [SEG]", "dog", [("dog", (0, 3)), ("the query", None)]),
        # phrase without [SEG] is text; the next [SEG] takes the last closed phrase
        ("<p> a </p> and <p> b </p> [SEG]", "a and b", [("b", (6, 7))]),
        # text between phrase and [SEG] does not part them
        ("<p> dog </p> over there [SEG]", "dog over there", [("dog", (0, 3))]),
        # an inner <p> restarts the phrase
        ("<p> a <p> b </p> [SEG]", "a b", [("b", (2, 3))]),
        # a stray </p> does not close anything
        ("<p> a </p> b </p> [SEG]", "a b", [("a", (0, 1))]),
        # an unclosed <p> is dropped
        ("<p> dog [SEG]", "dog", [("the query", None)]),
        # a [SEG] inside a phrase leaves it whole
        ("<p> red [SEG] hat </p> [SEG]", "red hat", [("the query", None), ("red hat", (0, 7))]),
        # an empty phrase is none, and hides the one before it
        ("<p> dog </p> <p> </p> [SEG]", "dog", [("the query", None)]),
        # the same phrase twice gets two spans
        ("<p> dog </p> [SEG] <p> dog </p> [SEG]", "dog dog", [("dog", (0, 3)), ("dog", (4, 7))]),
        # brackets, possessives, quotes and slashes close up again
        ("(<p> dog </p> [SEG])", "(dog)", [("dog", (1, 4))]),
        ("<p> dog </p> [SEG]'s tail", "dog's tail", [("dog", (0, 3))]),
        ('"<p> dog </p> [SEG]" / <p> cat </p> [SEG]', '"dog" / cat', [("dog", (1, 4)), ("cat", (8, 11))]),
        # spaces swallowed by the tokenizer come back between words, not before punctuation
        ("Sure,<p>dog</p>[SEG]and<p>cat</p>[SEG].", "Sure, dog and cat.", [("dog", (6, 9)), ("cat", (14, 17))]),
        # line breaks survive, other whitespace collapses
        ("Two  things:\n- <p> a </p> [SEG]\n", "Two things:\n- a", [("a", (14, 15))]),
        # scripts without spaces get none
        ("有<p> 狗 </p> [SEG]和猫。", "有狗和猫。", [("狗", (1, 2))]),
        # only tags
        ("[SEG]</p><p>[SEG]", "", [("the query", None), ("the query", None)]),
    ],
)
def test_parse_string(answer, clean, mentions):
    expected = ParsedAnswer(text=answer, clean_text=clean, mentions=tuple(Mention(*mention) for mention in mentions))
    assert parse(answer, query=" the query ") == expected


def test_literal_tags_in_text_pieces_are_text():
    pieces = [
        ("I type [S", False),
        ("EG] or <p> ", False),
        ("<p>", True),
        (" dog ", False),
        ("</p>", True),
        ("[SEG]", True),
    ]
    parsed = parse(pieces)
    assert parsed.text == "I type [SEG] or <p> <p> dog </p>[SEG]"
    assert parsed.clean_text == "I type [SEG] or <p> dog"
    assert parsed.mentions == (Mention("dog", (20, 23)),)
    assert is_well_formed(pieces) and not is_well_formed(parsed.text)


def naive_phrases(pieces, query):
    """Oracle, by looking back from each [SEG]; phrases without their whitespace, None for the query."""
    controls = [text if is_control else None for text, is_control in pieces]
    found = []
    for seg in (i for i, control in enumerate(controls) if control == "[SEG]"):
        phrase = query
        for close in range(seg - 1, -1, -1):
            if controls[close] == "[SEG]":
                break
            if controls[close] != "</p>":
                continue
            previous_close = max((i for i in range(close) if controls[i] == "</p>"), default=-1)
            opening = max((i for i in range(close) if controls[i] == "<p>"), default=-1)
            if opening > previous_close:
                inside = "".join(text for text, is_control in pieces[opening:close] if not is_control)
                phrase = "".join(inside.split()) or query
                break
        found.append(phrase)
    return found


def check_parsed(pieces, parsed):
    assert parsed.text == "".join(text for text, _ in pieces)
    assert len(parsed.mentions) == sum(piece == ("[SEG]", True) for piece in pieces)
    assert ["".join(mention.phrase.split()) for mention in parsed.mentions] == naive_phrases(pieces, "QUERY")
    end = 0
    for mention in parsed.mentions:
        if mention.span is None:
            assert mention.phrase == "QUERY"
        else:
            assert parsed.clean_text[slice(*mention.span)] == mention.phrase == mention.phrase.strip() != ""
            assert mention.span[0] >= end  # reading order, no overlap
            end = mention.span[1]
    # nothing but control tokens and whitespace is lost, and the spacing is tidy
    kept = "".join(text for text, is_control in pieces if not is_control)
    assert "".join(parsed.clean_text.split()) == "".join(kept.split())
    assert not re.search(r"[^\S\n]{2}|[^\S\n ]| \n|\n |^\s|\s$", parsed.clean_text)


@settings(max_examples=10_000)
@given(pieces_lists)
def test_parse_keeps_masks_and_phrases_aligned(pieces):
    check_parsed(pieces, parse(pieces, query="QUERY"))


@settings(max_examples=2_000)
@given(st.one_of(raw_strings, st.text(max_size=30)))
def test_parse_of_a_string_equals_parse_of_its_pieces(text):
    pieces = [(part, part in CONTROL_TOKENS) for part in re.split(r"(<image>|\[SEG\]|<p>|</p>)", text)]
    assert parse(text, "QUERY") == parse(pieces, "QUERY")
    assert is_well_formed(text) == is_well_formed(pieces)
    check_parsed(pieces, parse(text, "QUERY"))


@settings(max_examples=500)
@given(st.lists(phrases, min_size=1, max_size=5))
def test_rendered_phrases_are_parsed_back(given_phrases):
    words = [" ".join(phrase.split()) for phrase in given_phrases]
    answer = f"Sure, {render_list(given_phrases)}."
    assert is_well_formed(answer)
    assert [mention.phrase for mention in parse(answer).mentions] == words
    assert parse(answer[:-1] + " [SEG]", "rest").mentions[-1] == Mention("rest", None)


@pytest.mark.parametrize(
    ("names", "rendered"),
    [
        (["a"], "<p> a </p> [SEG]"),
        (["a", " b\n c "], "<p> a </p> [SEG] and <p> b c </p> [SEG]"),
        (["a", "b", "c"], "<p> a </p> [SEG], <p> b </p> [SEG], and <p> c </p> [SEG]"),
    ],
)
def test_render_list(names, rendered):
    assert render_list(names) == rendered


@pytest.mark.parametrize("phrase", ["", " \n", "a <p> b", "[SEG]", "the <image>", "<region>", "</p>"])
def test_render_phrase_refuses(phrase):
    with pytest.raises(ValueError, match="phrase"):
        render_phrase(phrase)


def test_render_list_refuses_no_phrase():
    with pytest.raises(ValueError, match="at least one phrase"):
        render_list([])


@pytest.mark.parametrize(
    ("answer", "well_formed"),
    [
        ("no tags at all", True),
        ("", True),
        ("<p> a </p> [SEG] and <p> b </p>\n[SEG].", True),
        ("<p>a</p>[SEG]", True),
        ("[SEG]", False),  # no phrase
        ("<p> a </p>", False),  # no [SEG]
        ("<p> a </p>, [SEG]", False),  # text between
        ("<p> </p> [SEG]", False),  # empty phrase
        ("<p> a <p> b </p> [SEG]", False),  # nested
        ("<p> a", False),  # unclosed
        ("a </p> [SEG]", False),  # unopened
        ("<p> a </p> [SEG] [SEG]", False),  # one phrase, two masks
        ("<p> a [SEG] </p> [SEG]", False),  # [SEG] inside
        ("the <image>", False),  # not a token of answers
    ],
)
def test_is_well_formed(answer, well_formed):
    assert is_well_formed(answer) is well_formed


@pytest.mark.parametrize(
    ("text", "tokens", "escaped"),
    [
        ("mark [SEG] and <p> x </p>", CONTROL_TOKENS, "mark [ SEG] and < p> x < /p>"),
        ("<image><image>", CONTROL_TOKENS, "< image>< image>"),
        ("[[SEG]SEG]", CONTROL_TOKENS, "[[ SEG]SEG]"),  # nothing is deleted, so nothing new closes up
        ("[seg] 5 < 6", CONTROL_TOKENS, "[seg] 5 < 6"),  # case matters, lone brackets stay
        ("<p>", ["<p>", "< p>"], "<  p>"),  # escaping one token yields another
        ("<<p>", ["<p>", "<< p>"], "< < p>"),  # ... across its border
        ("aaa", ["aa"], "a a a"),  # overlapping
        ("text", [], "text"),
        ("text", ["", "x!"], "text"),
    ],
)
def test_escape_control_tokens(text, tokens, escaped):
    assert escape_control_tokens(text, tokens) == escaped


@pytest.mark.parametrize("token", ["x", " x", "x  "])  # a space would leave these what they are
def test_escape_refuses_tokens_that_a_space_cannot_break(token):
    assert escape_control_tokens("harmless", [token]) == "harmless"
    with pytest.raises(ValueError, match="cannot be escaped"):
        escape_control_tokens("the box x  ", [token])


@settings(max_examples=2_000)
@given(
    raw_strings,
    st.sets(st.sampled_from([*CONTROL_TOKENS, "<region>", "</s>", "< p>", "[ SEG]", "dog", "aa", "p> <p>"])),
)
def test_escape_removes_every_token(text, tokens):
    escaped = escape_control_tokens(text, tokens)
    assert not any(token in escaped for token in tokens)
    assert escape_control_tokens(escaped, tokens) == escaped
    assert "".join(escaped.split()) == "".join(text.split())


def test_escaped_text_parses_without_control_tokens():
    text = "<p> dog </p> [SEG] <image>"
    assert parse(escape_control_tokens(text, CONTROL_TOKENS)).clean_text == "< p> dog < /p> [ SEG] < image>"


def test_count_seg_ignores_user_turns():
    messages = [
        {"role": "user", "content": "[SEG] [SEG] [SEG]"},
        {"role": "assistant", "content": "<p> a </p> [SEG] [SEG]"},
        {"role": "assistant", "content": "[SEG]"},
    ]
    assert count_seg(messages) == 3


ROW = {
    "image_id": "img-7",
    "messages": [
        {"role": "user", "content": "<image>\nWhat is in <region>? Mark it."},
        {"role": "assistant", "content": "It is <p> a dog </p> [SEG]."},
        {"role": "user", "content": "And the tail?"},
        {"role": "assistant", "content": "It is [SEG]."},
    ],
    "masks": [{"size": [4, 6], "counts": "x"}, {"size": [4, 6], "counts": "y"}],
    "regions": [[0, 0, 2, 2]],
}


def text_row(content):
    return {"image_id": 1, "messages": [{"role": "user", "content": content}], "masks": [], "regions": []}


@pytest.mark.parametrize(
    ("row", "image_size"),
    [
        (ROW, None),
        (ROW, (4, 6)),
        (ROW, [4, 6]),
        (text_row("Hello."), None),  # a row without image
        ({**text_row("Hello."), "image": None}, None),
        (text_row("<image> Describe."), None),  # the image column is not loaded
        (text_row("<image> Describe."), (4, 6)),
    ],
)
def test_valid_rows(row, image_size):
    before = deepcopy(row)
    validate_row(row, image_size)
    assert row == before


def changed(index, content):
    row = deepcopy(ROW)
    row["messages"][index]["content"] = content
    return row


@pytest.mark.parametrize(
    ("row", "image_size", "message"),
    [
        ({**ROW, "masks": ROW["masks"][:1]}, None, r"2 \[SEG\] in assistant turns but 1 masks"),
        ({**ROW, "regions": []}, None, "1 <region> in user turns but 0 regions"),
        (ROW, (6, 4), r"2 of 2 masks do not have the size \(h, w\) = \(6, 4\), the first is mask 0: \(4, 6\)"),
        ({**ROW, "masks": [ROW["masks"][0], {"size": [4, 7], "counts": ""}]}, None, "1 of 2 masks .* mask 1"),
        (changed(0, "What is in <region>?"), None, "has an image but no <image>"),
        (changed(0, "<image> <image> <region>"), None, r"user turns hold \[2, 0\]"),
        (changed(2, "<image> And the tail?"), None, r"user turns hold \[1, 1\]"),
        ({**text_row("<image> Hi."), "image": None}, None, "has an <image> but no image"),
        (changed(1, "<p> a <p> b </p> </p> [SEG]"), None, "message 1 has unbalanced or nested tags: 2 <p>, 2 </p>"),
        (changed(1, "a </p> <p> [SEG]"), None, "message 1 has unbalanced or nested tags: 1 <p>, 1 </p>"),
        (changed(1, "<p> a [SEG]"), None, "message 1 has unbalanced or nested tags: 1 <p>, 0 </p>"),
        (changed(2, "Mark [SEG]."), None, r"message 2 \(user\) holds 1 \[SEG\]"),
        (changed(2, "Mark <p> it."), None, r"message 2 \(user\) holds 1 <p>"),
        (changed(1, "<image> <p> a </p> [SEG]"), None, r"message 1 \(assistant\) holds 1 <image>"),
        (changed(1, "<region> <p> a </p> [SEG]"), None, r"message 1 \(assistant\) holds 1 <region>"),
        ({**text_row("Hi."), "messages": []}, None, "no user turn among 0 messages"),
        (
            {**text_row("Hi."), "messages": [{"role": "human", "content": "Hi."}]},
            None,
            "message 0 has the role 'human'",
        ),
        ({**ROW, "masks": [], "regions": []}, None, r"row 'img-7': 2 \[SEG\].*; 1 <region>"),  # all problems at once
    ],
)
def test_invalid_rows(row, image_size, message):
    with pytest.raises(ValueError, match=message):
        validate_row(row, image_size)


@pytest.mark.parametrize(
    "answer, plain",
    [
        ("Sure, <p> the hat </p> [SEG].", "Sure, [SEG]."),
        ("Sure, <p> a </p> [SEG], <p> b </p> [SEG] and <p> c </p> [SEG].", "Sure, [SEG], [SEG] and [SEG]."),
        ("Sorry, there is no hat.", "Sorry, there is no hat."),  # nothing to leave out
    ],
)
def test_drop_phrases_keeps_every_mask(answer, plain):
    assert drop_phrases(answer) == plain
    messages = [[{"role": "assistant", "content": text}] for text in (answer, plain)]
    assert count_seg(messages[0]) == count_seg(messages[1])
