"""Each rule L1-L8 with strings that keep it and strings that break it."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mglmm.datasets_scripts.annotation.facts import ObjectFacts
from mglmm.datasets_scripts.annotation.label_rules import (
    breaks_caption_form,
    breaks_label_form,
    clean_label,
    in_one_field,
    judge_labels,
    names_label,
    read_answer,
    same_word,
    says_nothing,
    talks_of_drawing,
    to_ascii,
)
from tests.datasets_scripts.annotation.scripted_client import labels_answer

IDS = ["m0001", "m0002"]
GOOD = labels_answer({"m0001": "dog", "m0002": "cat"})


def facts(*ids: str) -> list[ObjectFacts]:
    return [
        ObjectFacts(name, color, (0.0, 0.0, 0.5, 0.5), 25.0, "whole image")
        for name, color in zip(ids, ("red", "blue"), strict=False)
    ]


def codes(text: str, parents: dict[str, str] | None = None) -> list[str]:
    return [violation.code for violation in judge_labels(text, facts(*IDS), parents or {}).violations]


@pytest.mark.parametrize(
    "answer",
    [
        GOOD,
        f"```json\n{GOOD}\n```",  # a fenced block
        f"```\n{GOOD}```",
        f"Sure, here is {{what you}} want:\n{GOOD}\nI hope this helps {{:-)}}!",  # prose with braces around it
        f'<think>{{"a": 1}} or so</think>{GOOD}',  # another object before it
        json.dumps({"notes": float("nan"), **json.loads(GOOD)}),  # NaN is let be where nobody asks for it
    ],
)
def test_l1_finds_the_answer(answer: str) -> None:
    assert codes(answer) == []


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ("", "no JSON object"),
        ("I cannot help with that.", "no JSON object"),
        (GOOD[:-20], "no JSON object"),  # cut off
        (json.dumps(json.loads(GOOD)["objects"]), "no JSON object"),  # a list without the object around it
        ('{"objects": {}}', "no JSON object"),  # objects is no list
        ('{"objects": []}', "missing: m0001, m0002"),
        (labels_answer({"m0001": "dog"}), "missing: m0002"),
        (labels_answer({"m0001": "dog", "m0002": "cat", "m0003": "cow"}), "'m0003', which was not asked for"),
        ('{"objects": [17, null, {"id": 5}, {"id": ["m0001"]}]}', "that is no text"),
        ('{"objects": [{"id": "m0001", "label": 7, "caption": null}]}', "m0001 lacks a label or a caption"),
        (json.dumps({"objects": json.loads(GOOD)["objects"] * 2}), "m0001 is there twice"),
        ('{"a":' * 100_000, "no JSON object"),  # deep nesting
        ("{" * 100_000, "no JSON object"),
        ('{"objects": [' + "[" * 100_000, "no JSON object"),
        ('{"objects": ' + "9" * 10_000 + "}", "no JSON object"),  # a number beyond Python's limit
        ('{"objects": [{"id": "\\ud800", "label": "a", "caption": "b"}]}', "was not asked for"),  # half a character
    ],
)
def test_l1_broken(answer: str, told: str) -> None:
    objects, violations = read_answer(answer, IDS)
    assert [violation.code for violation in violations] == ["L1"]
    assert told in violations[0].message
    violations[0].message.encode()  # can be sent


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("Dog Collar", "dog collar"),  # lower case
        (" the  dog's   bowl. ", "dog's bowl"),  # article, blanks, full stop
        ("A", "a"),  # an article alone is no article
        ("café table", "cafe table"),  # accents
        ("artist’s easel", "artist's easel"),  # typographic apostrophe
        ("'t-shirt'", "t-shirt"),  # quotes
    ],
)
def test_labels_are_cleaned(given: str, expected: str) -> None:
    assert clean_label(given) == expected


@pytest.mark.parametrize(
    ("label", "kept"),
    [
        ("dog", True),
        ("left rear car door", True),  # four words
        ("t-shirt", True),
        ("dog's bowl", True),
        ("", False),
        ("rear left door of car", False),  # five words
        ("a" * 33, False),  # too long
        ("dog|cat", False),
        ("3d printer", False),  # digits
        ("dog: brown", False),
        ("собака", False),  # no Latin letters
        ("dog\ncollar", False),
    ],
)
def test_l2(label: str, kept: bool) -> None:
    assert (breaks_label_form(label) is None) is kept


@pytest.mark.parametrize(
    ("label", "nothing"),
    [
        ("unknown", True),
        ("unknown object", True),  # two empty words
        ("background region", True),
        ("thing", True),
        ("dog", False),
        ("car part", False),  # says whose part
        ("picture frame", False),
        ("", False),  # breaks L2 instead
    ],
)
def test_l3(label: str, nothing: bool) -> None:
    assert says_nothing(label) is nothing


@pytest.mark.parametrize(
    ("caption", "kept"),
    [
        ("A brown dog sits on the grey stone steps.", True),
        ("Is this brown dog asleep on the grey steps?", True),
        ("A brown dog sits on steps now.", False),  # seven words
        ("dog " * 79 + "dog.", True),  # eighty
        ("dog " * 80 + "dog.", False),  # eighty-one
        ("A brown dog sits on the grey stone steps", False),  # no end
        ("A brown dog sits on the\ngrey stone steps now.", False),  # two lines
        ("A brown dog sits on the <b>grey</b> stone steps.", False),
        ("A brown dog [SEG] sits on the grey stone steps.", False),
        ("A brown dog sits on the grey stone шагах.", False),  # not ASCII
        ("A brown dog sits \x07 on the grey stone steps.", False),  # a control character
    ],
)
def test_l4(caption: str, kept: bool) -> None:
    assert (breaks_caption_form(caption) is None) is kept


def test_l4_takes_typography_as_typed() -> None:
    """Language models write these all the time; none is worth a second request."""
    assert to_ascii("the dog’s “café” – naïve … ½") == 'the dog\'s "cafe" - naive ... 1⁄2'


@pytest.mark.parametrize(
    ("caption", "own", "told"),
    [
        ("A dog behind the mask.", "", "mask"),
        ("The masked region is a dog.", "", "mask"),
        ("A dog with a red outline.", "", "outline"),
        ("Its contour is soft.", "", "contour"),
        ("The highlighted dog sleeps.", "", "highlighted"),
        ("This crop shows a dog.", "", "crop"),
        ("The cropped image shows a dog.", "", "crop"),
        ("A dog in its bounding box.", "", "bounding box"),
        ("A dog in the image.", "", "in the image"),
        ("A dog in this Photo.", "", "in the image"),
        ("A dog beside m0007.", "", "ids"),
        ("A dog with a red border.", "", "the red outline"),
        ("A flag with a blue border.", "", None),  # only the colour of its own outline
        ("A woman in cropped jeans and a crop top.", "", None),
        ("A nurse with a surgical mask.", "", None),
        ("The mask covers the eyes.", "carnival mask", None),  # it is one
        ("The masks hang on a wall.", "mask", None),
        ("The photo in the picture frame is grey.", "", None),
        ("A crop of maize stands high.", "crop", None),
    ],
)
def test_l5(caption: str, own: str, told: str | None) -> None:
    problem = talks_of_drawing(caption, "red", own)
    assert problem is None if told is None else problem is not None and told in problem


@pytest.mark.parametrize(
    ("caption", "label", "named"),
    [
        ("A brown dog sleeps.", "dog", True),
        ("Two dogs sleep.", "sleeping dog", True),  # plural in the caption, last word of the label
        ("A shelf of wood.", "wooden shelves", True),  # irregular
        ("Vases of glass.", "vase", True),
        ("A puppy sleeps.", "dog", False),
        ("A hotdog lies there.", "dog", False),  # only whole words
        ("A dog's bowl.", "dog's bowl", True),
    ],
)
def test_l6(caption: str, label: str, named: bool) -> None:
    assert names_label(caption, label) is named


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("bus", "buses", True),
        ("house", "houses", True),
        ("man", "men", True),
        ("glass", "glasses", True),
        ("car", "cart", False),
    ],
)
def test_singular_and_plural_are_the_same_word(first: str, second: str, same: bool) -> None:
    assert same_word(first, second) is same_word(second, first) is same


def test_the_labels_of_an_answer() -> None:
    captions = {"m0002": "Something grey and shiny lies far behind all the others."}
    verdict = judge_labels(
        labels_answer({"m0001": "The Dogs", "m0002": "cat"}, captions), facts(*IDS), {"m0001": "dog"}
    )
    assert verdict.violations == [] and verdict.value == {
        "m0001": {
            "label": "dogs",
            "caption": "The The Dogs of zero zero zero one is made of painted wood and stands upright beside the others.",
            "status": "ok",
            "flags": ["L7"],  # as its parent, in another number
        },
        "m0002": {"label": "cat", "caption": captions["m0002"], "status": "weak", "flags": ["L6"]},
    }


def test_nothing_is_asked_of_the_caption_of_an_unknown_thing() -> None:
    verdict = judge_labels(labels_answer({"m0001": "Unknown.", "m0002": "cat"}, {"m0001": "no idea"}), facts(*IDS), {})
    assert verdict.value is not None
    assert verdict.value["m0001"] == {"label": "", "caption": "", "status": "unlabelled", "flags": ["L3"]}


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (labels_answer({"m0001": "dog 2", "m0002": "cat"}), ["L2"]),
        (labels_answer({"m0001": "dog", "m0002": "cat"}, {"m0001": "A dog."}), ["L4"]),
        (
            labels_answer({"m0001": "dog", "m0002": "cat"}, {"m0001": "A dog with a red outline lies on the floor."}),
            ["L5"],
        ),
        (
            labels_answer(
                {"m0001": "dog", "m0002": "dog"}, dict.fromkeys(IDS, "A brown dog sits on the grey stone steps.")
            ),
            ["L8"],
        ),
        (
            labels_answer({"m0001": "dog!?#", "m0003": "cat"}, {"m0001": "A mask"}),
            ["L1", "L2", "L4", "L5"],
        ),  # all at once
    ],
)
def test_hard_rules_give_no_value(answer: str, expected: list[str]) -> None:
    verdict = judge_labels(answer, facts(*IDS), {})
    assert verdict.value is None and [violation.code for violation in verdict.violations] == expected


def test_the_default_parent_allows_no_talk_of_the_image() -> None:
    answer = labels_answer({"m0001": "dog", "m0002": "cat"}, {"m0001": "A brown dog sits on steps in the image."})
    assert codes(answer) == ["L5"]


def test_known_labels_stay_in_their_field() -> None:
    assert in_one_field("a | b\n  m0009 | outline: red\x00 ") == "a b m0009 outline: red"
    assert in_one_field("x" * 100) == "x" * 64


_JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=8) | st.sampled_from([*IDS, "objects", "id"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["id", "label", "caption", "objects"]), inner)
    ),
    max_leaves=12,
)


@settings(max_examples=200)
@given(st.text() | _JSON.map(json.dumps) | _JSON.map(lambda value: json.dumps({"objects": value})))
def test_any_answer_is_judged_without_an_error(answer: str) -> None:
    verdict = judge_labels(answer, facts(*IDS), {"m0001": "dog"})
    assert (verdict.value is None) == bool(verdict.violations)
    assert verdict.value is None or set(verdict.value) == set(IDS)
