"""The rule annotator's answers keep every rule that it is judged by, whatever the labels."""

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mglmm.datasets_scripts.annotation.chat import ChatRequest, RequestFailed, text_message
from mglmm.datasets_scripts.annotation.context_rules import judge_context, sentences_of, without_tags
from mglmm.datasets_scripts.annotation.facts import CONTEXT_HEAD, LABELING_HEAD, ObjectFacts, TargetFacts, subject_line
from mglmm.datasets_scripts.annotation.label_rules import breaks_label_form, clean_label, judge_labels, says_nothing
from mglmm.datasets_scripts.annotation.rule_annotator import (
    RuleAnnotator,
    context_text,
    labels_text,
    place_of,
    spoken_label,
)
from mglmm.datasets_scripts.labels import TABLE

LEFT, RIGHT = (0.0, 0.7, 0.2, 0.2), (0.7, 0.0, 0.2, 0.2)
LABELS = [*TABLE, *(noun for noun, _ in TABLE.values())] + (
    "dog,cat,front left light,t-shirt,people,shoes,glass,bus,house,person,artist's easel,high heels,hair,sky,knife,child,"
    "mask,crop,outline,leaves,pair of skis,ox,x,dirt road in the woods"
).split(",")


def target(number: int, label: str, count: int = 1, box=LEFT, depth: int = 1) -> TargetFacts:
    return TargetFacts(f"obj_{number}", label, count, box, "", depth)


def ask(prompt: str) -> str:
    request = ChatRequest((text_message("system", "Be brief."), text_message("user", prompt)), max_tokens=100)
    result = asyncio.run(RuleAnnotator().complete(request))
    assert result.finish_reason == "stop"
    assert (result.prompt_tokens, result.completion_tokens) == (request.prompt_tokens(), len(result.text) // 4)
    return result.text


def test_a_scene() -> None:
    targets = [target(1, "dog"), target(2, "window", 3, RIGHT), target(3, "sky"), target(4, "dog"), target(5, "jeans")]
    lines = "\n".join(["Describe it.", CONTEXT_HEAD, *map(str, targets)])
    assert ask(lines) == (
        "A number of things stand out from their surroundings here. There one finds <obj_1>a dog</obj_1> in the lower left, "
        "<obj_2>three windows</obj_2> in the upper right and <obj_3>the sky</obj_3> in the lower left. To this the "
        "scene adds <obj_4>another dog</obj_4> in the lower left and <obj_5>jeans</obj_5> in the lower left. Nothing else takes up "
        "as much room."
    )


def test_an_object_with_parts_of_parts() -> None:
    targets = [
        target(1, "door"),
        target(2, "handle", depth=2),
        target(3, "window", 2, depth=2),
        target(4, "frame", depth=3),
    ]
    lines = "\n".join(
        ["Describe it.", subject_line("car", 2), CONTEXT_HEAD, *map(str, targets), str(target(5, "hood", 1, RIGHT))]
    )
    assert ask(lines) == (
        "Several details of the cars come into view as soon as one looks at them closely. First of all one finds <obj_1>a door</obj_1> "
        "in the lower left with <obj_2>a handle</obj_2> and <obj_3>two windows</obj_3> showing <obj_4>a frame</obj_4>. The eye "
        "then meets <obj_5>a hood</obj_5> in the upper right."
    )


def test_objects() -> None:
    facts = [
        ObjectFacts("m0001", "red", (0.1, 0.1, 0.2, 0.3), 3.0, "whole image", "wall-brick"),
        ObjectFacts("m0002", "blue", (0.4, 0.8, 0.2, 0.1), 0.2, "person", "shoes"),
        ObjectFacts("m0003", "green", (0.4, 0.8, 0.2, 0.1), 0.2, "person", "shoes"),
        ObjectFacts("m0004", "white", (0.4, 0.8, 0.2, 0.1), 0.2, "person"),
    ]
    verdict = judge_labels(ask("\n".join([LABELING_HEAD, *map(str, facts)])), facts, {"m0002": "person"})
    assert verdict.value is not None
    shoes = (
        "Shoes can be seen at the bottom of the scene, where they belong to the person. They are tiny and reach from 40 to 60 "
        "percent of the width and from 80 to 90 percent of the height."
    )
    assert verdict.value["m0001"] == {
        "label": "brick wall",
        "caption": "A brick wall can be seen in the upper left of the scene. It is of medium size and reaches from 10 to 30 "
        "percent of the width and from 10 to 40 percent of the height.",
        "status": "ok",
        "flags": [],
    }
    assert verdict.value["m0002"]["caption"] == shoes
    assert verdict.value["m0003"]["caption"] == f"{shoes} It is number 2 of its kind at this place."
    assert verdict.value["m0004"]["status"] == "unlabelled"


@pytest.mark.parametrize(
    ("known", "label"),
    [
        ("sky-other-merged", "sky"),
        ("Traffic_Light (red)", "traffic light red"),
        ("a very long label with many words", "label with many words"),  # the last words say most
        ("17", "unknown"),
        ("-merged", "unknown"),  # nothing but a suffix
        ("", "unknown"),
        ("собака", "unknown"),
        ("x" * 40, "unknown"),
    ],
)
def test_labels_that_are_known(known: str, label: str) -> None:
    assert spoken_label(known) == label


@pytest.mark.parametrize(
    ("box", "frame", "place"),
    [
        ((0.0, 0.0, 0.1, 0.1), (0.0, 0.0, 1.0, 1.0), "in the upper left"),
        ((0.0, 0.0, 1.0, 1.0), (0.0, 0.0, 1.0, 1.0), "in the middle"),
        ((0.9, 0.4, 0.1, 0.2), (0.0, 0.0, 1.0, 1.0), "on the right"),
        ((0.6, 0.6, 0.1, 0.1), (0.5, 0.5, 0.5, 0.5), "in the upper left"),  # of the frame
        ((0.5, 0.5, 0.0, 0.0), (0.5, 0.5, 0.0, 0.0), "in the middle"),  # a frame without an extent
        ((1.0, 1.0, 0.0, 0.0), (0.0, 0.0, 1.0, 1.0), "in the lower right"),  # on the border
    ],
)
def test_places(box, frame, place) -> None:
    assert place_of(box, frame) == place


def test_a_prompt_without_objects_gets_no_answer() -> None:
    with pytest.raises(RequestFailed, match="neither objects nor targets"):
        ask(f"{LABELING_HEAD}\nm0001 is a dog")


shares = st.floats(0, 1).map(lambda share: round(share, 2))
boxes = st.tuples(shares, shares, shares, shares)
labels = st.sampled_from(LABELS) | st.from_regex(r"[a-z]{1,9}([ '-][a-z]{1,7}){0,3}", fullmatch=True)


@settings(max_examples=100)
@given(
    st.lists(
        st.tuples(labels | st.text("abc XYZ-_.1|é'", max_size=50), boxes, shares, labels | st.just("whole image")),
        min_size=1,
        max_size=8,
    )
)
def test_labels_keep_all_rules(objects) -> None:
    facts = [
        ObjectFacts(f"m{number:04}", "red", box, 100 * share, parent, known)
        for number, (known, box, share, parent) in enumerate(objects, 1)
    ]
    parents = {each.id: each.parent for each in facts if each.parent != "whole image"}
    verdict = judge_labels(labels_text(facts), facts, parents)
    assert not verdict.violations and verdict.value is not None
    for label in verdict.value.values():
        assert label["status"] in ("ok", "unlabelled") and set(label["flags"]) <= {"L3", "L7"}


@st.composite
def target_lists(draw: st.DrawFn) -> list[TargetFacts]:
    depth = 1
    found = []
    usable = labels.map(clean_label).filter(lambda label: not breaks_label_form(label) and not says_nothing(label))
    for number in range(1, draw(st.integers(1, 24)) + 1):
        found.append(TargetFacts(f"obj_{number}", draw(usable), draw(st.integers(1, 12)), draw(boxes), "", depth))
        depth = draw(st.integers(1, depth + 1))
    return found


@settings(max_examples=150)
@given(target_lists(), labels, st.integers(1, 3))
def test_contexts_keep_all_rules(targets: list[TargetFacts], subject: str, count: int) -> None:
    flat = [TargetFacts(each.id, each.label, each.count, each.box, "") for each in targets]
    for text, whole_image, given_targets, least, most in (
        (context_text(flat), True, flat, 3, 8),
        (context_text(targets, (subject, count)), False, targets, 2, 7),
    ):
        verdict = judge_context(text, given_targets, whole_image=whole_image, last=False)
        assert (list(verdict.violations), list(verdict.flags)) == ([], [])
        assert verdict.value is not None and verdict.value.tagged == text
        assert verdict.value.targets == [each.id for each in targets]
        assert least <= len(sentences_of(without_tags(text))) <= most


def test_the_longest_text_has_at_most_320_words() -> None:
    """24 labels of four words each, all with a place."""
    texts = [
        context_text([target(n, "one two three four", 2) for n in range(first, first + 24)], subject)
        for first in range(40)
        for subject in (None, ("car", 1))
    ]
    assert max(len(without_tags(text).split()) for text in texts) <= 320
