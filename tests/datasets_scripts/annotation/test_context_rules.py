"""Each rule C1-C8 with texts that keep it and texts that break it, and the repairs after the last attempt."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mglmm.datasets_scripts.annotation.chat import Verdict
from mglmm.datasets_scripts.annotation.context_rules import (
    TAG,
    Described,
    breaks_length,
    breaks_phrase,
    breaks_prose,
    breaks_tags,
    breaks_targets,
    drop_repeated_sentences,
    is_plural,
    judge_context,
    leaks_labels,
    names_target,
    sentences_of,
)
from mglmm.datasets_scripts.annotation.facts import TargetFacts
from mglmm.processing.uscdf import SEG_TOKEN

BOX = (0.0, 0.0, 0.5, 0.5)
TARGETS = [
    TargetFacts("obj_1", "dog", 1, BOX, "A brown puppy sits there."),
    TargetFacts("obj_2", "step", 3, BOX, "Stone steps lead up."),
    TargetFacts("obj_3", "door", 1, BOX, "A green door is closed."),
]
GOOD = (
    "In front of an old house, <obj_1>a brown dog</obj_1> sits on <obj_2>three stone steps</obj_2> and waits. "
    "Behind it <obj_3>a green door</obj_3> is closed."
)


def judge(
    text: str, *, last: bool = False, whole_image: bool = True, targets: list[TargetFacts] = TARGETS
) -> Verdict[Described]:
    return judge_context(text, targets, whole_image=whole_image, last=last)


def codes(text: str, **options) -> list[str]:
    verdict = judge(text, **options)
    assert (verdict.value is None) == bool(verdict.violations)
    return [violation.code for violation in verdict.violations]


def many(count: int) -> list[TargetFacts]:
    return [TargetFacts(f"obj_{number}", "dog", 1, BOX, "") for number in range(1, count + 1)]


def naming(*numbers: int) -> str:
    return f"All of the dogs are in a row: {', '.join(f'<obj_{n}>a dog</obj_{n}>' for n in numbers)}. They wait for their meal now."


def test_a_good_description() -> None:
    assert judge(GOOD) == Verdict(Described(GOOD, ["obj_1", "obj_2", "obj_3"], [], "ok"), [], [])


def test_targets_come_in_the_order_of_the_text() -> None:
    text = "Behind <obj_3>a green door</obj_3>, and over <obj_2>stone steps</obj_2>, there is a hall. <obj_1>The dog</obj_1> waits for us."
    value = judge(text).value
    assert value is not None and value.targets == ["obj_3", "obj_2", "obj_1"]


@pytest.mark.parametrize(
    "answer",
    [
        f"  {GOOD}\n",
        GOOD.replace(". ", ".\n\n"),  # two paragraphs are one text
        f'"{GOOD}"',  # quoted as a whole
        GOOD.replace(" sits", "\u00a0sits\u2028").replace("old", "old\x00"),  # odd blanks
    ],
)
def test_blanks_and_quotes_around_are_nothing_to_ask_again_for(answer: str) -> None:
    value = judge(answer).value
    assert value is not None and value.tagged == GOOD


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("<obj_1>a dog</obj_1> here", True),
        ("nothing at all", True),
        ("<obj_1>a dog</obj_2>", False),  # closed by another
        ("<obj_1>a <obj_2>dog</obj_2></obj_1>", False),  # nested
        ("<obj_1>a dog", False),  # left open
        ("a dog</obj_1>", False),
        ("<obj_1></obj_1>", False),  # nothing in it
        ("<b>a dog</b>", False),
        ("<OBJ_1>a dog</OBJ_1>", False),
        ("3 < 4", False),
        ("a -> b", False),
        ("<obj_1 >a dog</obj_1>", False),
    ],
)
def test_c1(text: str, kept: bool) -> None:
    assert (breaks_tags(text) is None) is kept


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("<obj_1>a</obj_1> <obj_2>b</obj_2>", None),
        ("<obj_2>b</obj_2> <obj_1>a</obj_1>", None),  # in any order
        ("<obj_1>a</obj_1>", "missing: obj_2"),
        ("<obj_1>a</obj_1> <obj_2>b</obj_2> <obj_1>a</obj_1>", "more than once: obj_1"),
        ("<obj_1>a</obj_1> <obj_2>b</obj_2> <obj_9>c</obj_9>", "not in the list: obj_9"),
        ("<obj_1>a</obj_1> <obj_02>b</obj_02>", "missing: obj_2; not in the list: obj_02"),
    ],
)
def test_c2(text: str, told: str | None) -> None:
    problem = breaks_targets(text, ["obj_1", "obj_2"])
    assert problem is None if told is None else problem is not None and told in problem


@pytest.mark.parametrize(
    ("text", "targets", "status", "order", "dropped"),
    [
        (naming(1, 2, 3, 4), 5, "partial", [1, 2, 3, 4], [5]),  # 20 % missing are given up
        (naming(2, 3), 2, None, [], []),  # 50 % are not
        (naming(1, 2, 3), 4, None, [], []),  # 25 % neither
        (naming(1, 2, 1, 2), 2, "ok", [1, 2], []),  # the first ones stay tagged
        (naming(1, 9, 2), 2, "ok", [1, 2], []),  # what is no target loses its tag
    ],
)
def test_c2_is_repaired_after_the_last_attempt_only(text, targets, status, order, dropped) -> None:
    assert codes(text, targets=many(targets)) == ["C2"]
    verdict = judge(text, targets=many(targets), last=True)
    if status is None:
        assert verdict.value is None and [violation.code for violation in verdict.violations] == ["C2"]
        return
    assert verdict.value is not None and list(verdict.flags) == ["C2"]
    tagged, found, left_out, how = verdict.value
    assert (how, found, left_out) == (status, [f"obj_{n}" for n in order], [f"obj_{n}" for n in dropped])
    assert TAG.sub("a dog", tagged) == TAG.sub("a dog", text)  # the words stay
    assert [match[1] for match in TAG.finditer(tagged)] == found


@pytest.mark.parametrize(
    ("phrase", "kept"),
    [
        ("a brown dog", True),
        (" a brown dog ", True),
        ("dog's bowl", True),
        ("one two three four five six", True),
        ("one two three four five six seven", False),  # too long
        ("17", False),  # only digits
        ("?!", False),
        (" ", False),
        ("a dog,", False),  # punctuation at the end
        ("a dog. ", False),
    ],
)
def test_c3(phrase: str, kept: bool) -> None:
    assert (breaks_phrase(phrase) is None) is kept


@pytest.mark.parametrize(
    ("phrase", "label", "caption", "named"),
    [
        ("a brown dog", "dog", "", True),
        ("two dogs on the left", "dog", "", True),  # in the plural, not at the end
        ("the wheels", "front wheel", "", True),  # last word of the label
        ("the front", "front wheel", "", False),  # only its first word
        ("a sofa", "couch", "", True),  # listed synonym
        ("the couch", "sofa", "", True),  # the other way round
        ("an armchair", "chair", "", True),  # much like it
        ("a tshirt", "t-shirt", "", True),
        ("a hat", "cat", "", False),  # short words only look alike
        ("the brown puppy", "dog", "A brown puppy sits on the steps.", True),  # subject of its caption
        ("the steps", "dog", "A brown puppy sits on the steps.", False),  # another thing of its caption
        ("the car of the puppy", "dog", "A brown puppy sits there.", False),
        ("it", "dog", "", False),
    ],
)
def test_c4(phrase: str, label: str, caption: str, named: bool) -> None:
    assert names_target(phrase, label, caption) is named


@pytest.mark.parametrize(
    ("wrong", "violations", "flags"),
    [(0, [], []), (1, [], ["C4"]), (3, [], ["C4"]), (4, ["C4"], [])],  # up to 30 % of ten
)
def test_c4_allows_a_share(wrong: int, violations: list[str], flags: list[str]) -> None:
    phrases = [f"<obj_{n}>{'a tree' if n <= wrong else 'a dog'}</obj_{n}>" for n in range(1, 11)]
    verdict = judge(f"All of these are in a row: {', '.join(phrases)}. They wait for us.", targets=many(10))
    assert [violation.code for violation in verdict.violations] == violations and list(verdict.flags) == flags


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        (GOOD, 0),
        ("A group of people stands there. A pair - of shoes.", 0),
        ("- a dog\n- a cat", 1),  # a list
        ("1. a dog\n2. a cat", 1),
        ("# Scene\nA dog.", 1),
        ("**A dog** sits.", 1),
        ("```\nA dog.\n```", 1),
        ("| dog | cat |", 1),
        ("I cannot help with that.", 1),
        ("As an AI, I see a dog.", 1),
        ("I’m sorry, there is no dog.", 1),  # typographic apostrophe
        ("The dog (obj_1) sits.", 1),  # an id outside of a tag
        ("The obj is brown.", 1),
        ("Group 2 holds a dog.", 1),
        ("The objects are brown.", 0),
        (f"A dog {SEG_TOKEN} sits.", 1),  # a token of the training text
        ("<p>A dog</p> sits.", 1),
    ],
)
def test_c5_prose(text: str, problems: int) -> None:
    assert len(breaks_prose(text)) == problems


@pytest.mark.parametrize(
    ("text", "least", "problems"),
    [
        ("word " * 14 + "end.", 1, 0),
        ("word " * 13 + "end.", 1, 1),  # fourteen words
        ("word " * 319 + "end.", 1, 0),
        ("word " * 320 + "end.", 1, 1),
        ("word " * 14 + "end.", 2, 1),  # one sentence of a whole image
        ("word. " * 14 + "end", 2, 1),  # cut off
        ("<obj_1>a b c d e f</obj_1> " * 3 + "end!", 1, 0),  # the words of tags count
        ("", 1, 3),
    ],
)
def test_c5_length(text: str, least: int, problems: int) -> None:
    assert len(breaks_length(text, least)) == problems


@pytest.mark.parametrize(
    ("phrase", "plural"),
    [
        ("three windows", True),
        ("windows of the house", True),
        ("people", True),
        ("a row of houses", True),
        ("both sheep", True),
        ("jeans", True),
        ("green grass", True),  # has no plural
        ("2 window", True),
        ("the window", False),
        ("a glass", False),
        ("a window with shutters", False),  # the plural of something else
    ],
)
def test_c6(phrase: str, plural: bool) -> None:
    assert is_plural(phrase) is plural


@pytest.mark.parametrize(
    ("text", "leaks"),
    [
        ("There is a dog, a step, the door, and dogs here.", True),  # three commas between labels
        ("Targets: dog, step, door, dog.", True),
        ("There is a dog, a step and a door.", False),
        ("A dog, a step, a door.", False),  # two commas
        ("<obj_1>a dog</obj_1>, <obj_2>steps</obj_2>, <obj_3>a door</obj_3>, <obj_4>a dog</obj_4>", False),  # tagged
        ("A dog, brown and old, sits, a door, closed, behind it.", False),  # more than labels
        ("a hotdog, step, door, dog", False),  # whole words
    ],
)
def test_c7(text: str, leaks: bool) -> None:
    assert (leaks_labels(text, ["dog", "step", "door"]) is not None) is leaks


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two. One.", "One. Two."),
        ("A <obj_1>dog</obj_1> sits. A dog sits.", "A <obj_1>dog</obj_1> sits."),  # the same but for the tag
        ("A dog sits. A <obj_1>dog</obj_1> sits.", "A dog sits. A <obj_1>dog</obj_1> sits."),  # would lose a target
        ("A <obj_1>dog</obj_1>. A <obj_2>dog</obj_2>.", "A <obj_1>dog</obj_1>. A <obj_2>dog</obj_2>."),
        ("A <obj_1>dog</obj_1>. A <obj_1>dog</obj_1>.", "A <obj_1>dog</obj_1>."),  # also repairs a doubled tag
    ],
)
def test_c8(text: str, expected: str) -> None:
    assert drop_repeated_sentences(text) == (expected, text != expected)


def test_sentences_do_not_end_inside_a_tag() -> None:
    text = "Here <obj_1>a St. Bernard dog</obj_1> sits. There <obj_2>a U.S. flag</obj_2> hangs."
    assert sentences_of(text) == [
        "Here <obj_1>a St. Bernard dog</obj_1> sits.",
        "There <obj_2>a U.S. flag</obj_2> hangs.",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (GOOD.replace("</obj_1>", ""), ["C1"]),
        (GOOD.replace("a brown dog", "a brown dog,"), ["C3"]),
        (GOOD.replace("<obj_2>three stone steps</obj_2>", "steps"), ["C2"]),
        (GOOD.replace("a brown dog", "a tree"), ["C4"]),  # one of three is more than 30 %
        (GOOD.removesuffix("."), ["C5"]),
        (GOOD.replace("old house", "dog, step, door, dog"), ["C7"]),
        ("# Scene\n<obj_1>a dog", ["C1", "C5"]),  # all at once
    ],
)
def test_hard_rules_give_no_value(text: str, expected: list[str]) -> None:
    assert codes(text) == expected


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        (GOOD.replace("three stone steps", "the stone step"), ["C6"]),
        (f"{GOOD} Nobody else is there. Nobody else is there.", ["C8"]),
    ],
)
def test_soft_rules_give_flags(text: str, flags: list[str]) -> None:
    verdict = judge(text)
    assert verdict.value is not None and list(verdict.flags) == flags


def test_one_sentence_is_enough_about_an_object() -> None:
    text = "The old <obj_1>dog</obj_1> on <obj_2>steps</obj_2> before <obj_3>a door</obj_3> is made of stone and stands still."
    assert codes(text) == ["C5"] and codes(text, whole_image=False) == []


@settings(max_examples=200)
@given(
    st.lists(
        st.sampled_from(
            [
                "<obj_1>",
                "</obj_1>",
                "<obj_2>a dog</obj_2>",
                "<",
                ">",
                ". ",
                "a ",
                "dog, ",
                "\n- ",
                SEG_TOKEN,
                "I cannot ",
            ]
        )
        | st.text(max_size=10)
    ).map("".join),
    st.booleans(),
)
def test_any_answer_is_judged_without_an_error(text: str, last: bool) -> None:
    verdict = judge(text, last=last)
    assert (verdict.value is None) == bool(verdict.violations)
    if verdict.value is not None:
        assert [match[1] for match in TAG.finditer(verdict.value.tagged)] == verdict.value.targets
        assert verdict.value.tagged.encode() and SEG_TOKEN not in verdict.value.tagged
