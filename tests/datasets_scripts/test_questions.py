import random
import re
from dataclasses import replace

import numpy as np
import pytest

from mglmm.datasets_scripts import phrase_templates, scene_templates, templates, training_templates
from mglmm.datasets_scripts.conversations import describe_image, describe_parts
from mglmm.datasets_scripts.questions import (
    ask_about_region,
    ask_for_absent,
    ask_for_whole,
    ask_for_wrong_colour,
    ask_with_relation,
    attributes,
)
from mglmm.datasets_scripts.relations import neighbours, owned, relations
from mglmm.datasets_scripts.scene import AbsentLabels, Label, Scene, read_scene
from mglmm.datasets_scripts.targets import Target
from mglmm.processing.rle import decode_mask
from mglmm.processing.uscdf import parse
from tests.datasets_scripts.conftest import annotation

SIZE = (100, 200)
OBJECTS = "object", None


def scene_of(*things: tuple, colours: dict[str, str] | None = None, dense: bool = False) -> Scene:
    """A scene of (label, box xyxy[, number of its owner, counted from 1]) in a picture of 100 x 200 pixels."""
    annotations = [
        annotation(number, 1, label, *(("part", owner[0]) if owner else OBJECTS), SIZE, box)
        for number, (label, box, *owner) in enumerate(things, 1)
    ]
    scene = read_scene({"height": SIZE[0], "width": SIZE[1], "source": "tiny"}, annotations)

    def coloured(target: Target) -> Target:
        return replace(
            target,
            colour=(colours or {}).get(target.noun.name),
            instances=tuple(
                replace(each, colour=(colours or {}).get(f"{each.noun.name} {number}"))
                for number, each in enumerate(target.instances, 1)
            ),
        )

    return replace(
        scene, dense=dense, objects=tuple(map(coloured, scene.objects)), parts=tuple(map(coloured, scene.parts))
    )


def phrases(scene: Scene) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for seed in range(30):  # words are drawn
        for kind, described in attributes(random.Random(seed), scene).items():
            found.setdefault(kind, set()).update(each.phrase for each in described)
    return {kind: words for kind, words in found.items() if words}


@pytest.mark.parametrize(
    ("box", "place"),
    [
        ((10, 30, 50, 70), "on the left"),
        ((150, 30, 190, 70), "on the right"),
        ((80, 5, 120, 30), "at the top"),
        ((80, 80, 120, 95), "at the bottom"),
        ((80, 40, 120, 60), "in the middle"),
        ((10, 30, 110, 70), None),  # reaches over the middle
        ((0, 0, 200, 100), None),
        ((62, 40, 85, 60), None),  # left of the middle, and not clearly on the left
    ],
)
def test_places(box: tuple[int, int, int, int], place: str | None) -> None:
    assert scene_of(("dog", box)).objects[0].place == place


def test_a_label_of_two_pieces_far_apart_has_no_place() -> None:
    scene = scene_of(("dog", (0, 40, 8, 50)), ("dog", (70, 40, 78, 50)))
    assert scene.objects[0].place is None


@pytest.mark.parametrize(
    ("things", "colours", "expected"),
    [
        (
            [("bag", (150, 30, 190, 70))],
            {"bag": "black"},
            {
                "colour": {"the black bag"},
                "place": {"the bag on the right"},
                "colour and place": {"the black bag on the right"},
            },
        ),
        (  # the hood is a part of the only car; nobody says "the hood on the left" of what reaches over the middle
            [("car", (0, 0, 200, 100)), ("trunk", (30, 0, 150, 90), 1)],
            {"car": "red"},
            {"colour": {"the red car"}, "owner": {"the trunk of the red car"}},
        ),
        (  # worn
            [("person", (0, 0, 200, 100)), ("coat", (30, 0, 150, 90), 1), ("jeans", (30, 5, 150, 95), 1)],
            {"coat": "black", "jeans": "blue"},
            {
                "colour": {"the black coat", "the blue jeans"},
                "worn": {"the person in the black coat", "the person in blue jeans"},
            },
        ),
        (  # two of them: by side and size, and the colour only if it tells them apart
            [("dog", (10, 30, 30, 70)), ("dog", (150, 20, 190, 80))],
            {"dog 1": "white", "dog 2": "black"},
            {
                "number": {"the two dogs", "both dogs"},
                "instance": {
                    "the dog on the left",
                    "the left dog",
                    "the dog on the right",
                    "the right dog",
                    "the larger dog",
                    "the smaller dog",
                    "the white dog",
                    "the black dog",
                },
            },
        ),
        (  # one of two colours is not known: neither is told by it; one above the other
            [("dog", (80, 5, 120, 35)), ("dog", (80, 65, 120, 95))],
            {"dog 1": "white"},
            {"number": {"the two dogs", "both dogs"}, "instance": {"the upper dog", "the lower dog"}},
        ),
        (
            [("dog", (10, 30, 40, 70)), ("dog", (80, 30, 110, 70)), ("dog", (150, 30, 180, 70))],
            {},
            {
                "number": {"the three dogs", "all three dogs"},
                "instance": {
                    "the dog on the left",
                    "the leftmost dog",
                    "the dog on the right",
                    "the rightmost dog",
                    "the first dog from the left",
                    "the second dog from the left",
                    "the third dog from the left",
                    "the dog in the middle",
                },
            },
        ),
        (  # too many to be told apart
            [("dog", (x, 30, x + 20, 70)) for x in range(0, 125, 25)],
            {"dog": "white"},
            {},
        ),
        ([("dog", (50, 30, 90, 70)), ("dog", (54, 30, 94, 70))], {}, {"number": {"the two dogs", "both dogs"}}),
    ],
)
def test_what_is_said_of_a_target(things: list, colours: dict, expected: dict) -> None:
    assert phrases(scene_of(*things, colours=colours)) == expected


def test_an_instance_has_its_own_mask() -> None:
    scene = scene_of(("dog", (10, 30, 40, 70)), ("dog", (150, 30, 190, 70)))
    masks = {phrase: target.mask for phrase, target in attributes(random.Random(0), scene)["instance"]}
    expected = np.zeros(SIZE, dtype=bool)
    expected[30:70, 150:190] = True
    np.testing.assert_array_equal(decode_mask(masks["the dog on the right"]), expected)


@pytest.mark.parametrize(
    ("things", "expected"),
    [
        (
            [("dog", (20, 30, 60, 70)), ("cat", (64, 35, 100, 75))],
            {
                ("dog", "to the left of", "cat"),
                ("dog", "next to", "cat"),
                ("cat", "to the right of", "dog"),
                ("cat", "next to", "dog"),
            },
        ),
        (  # far apart: not next to each other
            [("dog", (0, 30, 40, 70)), ("cat", (140, 35, 180, 75))],
            {("dog", "to the left of", "cat"), ("cat", "to the right of", "dog")},
        ),
        ([("dog", (80, 5, 120, 40)), ("cat", (82, 50, 122, 90))], {("dog", "above", "cat"), ("cat", "below", "dog")}),
        ([("dog", (0, 0, 40, 30)), ("cat", (140, 70, 180, 100))], set()),  # diagonal: neither is clear
        ([("dog", (20, 30, 80, 70)), ("cat", (50, 30, 110, 70))], set()),  # they overlap
        (  # of two dogs the one that is meant, and neither may stand for the place
            [("dog", (0, 30, 30, 70)), ("dog", (150, 30, 180, 70)), ("cat", (80, 30, 110, 70))],
            {("dog", "to the left of", "cat"), ("dog", "to the right of", "cat")},
        ),
        (  # both dogs are to the left of it
            [("dog", (0, 30, 30, 70)), ("dog", (50, 30, 80, 70)), ("cat", (150, 30, 180, 70))],
            set(),
        ),
        (  # parts and objects are not compared; left and right in a name are the car's own
            [("car", (0, 0, 200, 100)), ("left mirror", (10, 30, 40, 60), 1), ("trunk", (100, 30, 140, 60), 1)],
            set(),
        ),
    ],
)
def test_relations(things: list, expected: set) -> None:
    found = {(one.noun.name, word, other.noun.name) for one, word, other in relations(scene_of(*things))}
    assert found == expected


@pytest.mark.parametrize(
    ("things", "dense", "expected"),
    [
        (  # the hat is above the trousers too, and farther away
            [
                ("person", (60, 0, 140, 100)),
                ("hat", (80, 0, 120, 12), 1),
                ("coat", (70, 30, 130, 58), 1),
                ("trousers", (75, 60, 125, 95), 1),
            ],
            False,
            {("coat", "above", "trousers"), ("trousers", "below", "coat")},
        ),
        (  # the dress reaches over the belt's rim
            [("person", (60, 0, 140, 100)), ("dress", (70, 30, 130, 90), 1), ("belt", (70, 50, 130, 56), 1)],
            False,
            set(),
        ),
        ([("dog", (20, 30, 60, 70)), ("cat", (64, 35, 100, 75))], False, set()),  # something unlabelled may be nearer
        (
            [("dog", (20, 30, 60, 70)), ("cat", (64, 35, 100, 75))],
            True,
            {("dog", "to the left of", "cat"), ("cat", "to the right of", "dog")},
        ),
    ],
)
def test_the_only_thing_there(things: list, dense: bool, expected: set) -> None:
    found = {(one.noun.name, word, other.noun.name) for one, word, other in neighbours(scene_of(*things, dense=dense))}
    assert found == expected


def test_parts_have_one_owner() -> None:
    one = scene_of(("car", (0, 0, 100, 100)), ("hood", (10, 10, 50, 50), 1))
    two = scene_of(("car", (0, 0, 90, 100)), ("car", (100, 0, 190, 100)), ("hood", (10, 10, 50, 50), 1))
    assert [(part.noun.name, owner.noun.name) for part, owner in owned(one)] == [("hood", "car")]
    assert owned(two) == []


def test_questions_for_an_owner_agree_with_the_part() -> None:
    scene = scene_of(("person", (0, 0, 100, 100)), ("shoes", (10, 80, 50, 99), 1))
    questions = {ask_with_relation(random.Random(seed), scene).question for seed in range(200)}
    assert {"Outline the one that the shoes belong to.", "Who wears the shoes? Answer with a mask."} <= questions
    assert not any("{" in question or "shoes belongs" in question for question in questions)


def test_wrong_colours_are_refused() -> None:
    scene = scene_of(("car", (0, 0, 100, 100)), colours={"car": "red"})
    turns = [ask_for_wrong_colour(random.Random(seed), scene) for seed in range(60)]
    assert all(not turn.masks and "[SEG]" not in turn.answer for turn in turns)
    answers = " ".join(turn.answer for turn in turns)
    assert "a green car" in answers
    # What somebody might call red as well.
    assert not re.search(r"\b(red|orange|pink|brown|purple) car", answers)
    assert ask_for_wrong_colour(random.Random(0), scene_of(("car", (0, 0, 100, 100)))) is None


def test_parts_of_absent_things_name_their_owner() -> None:
    scene = scene_of(("dog", (0, 0, 100, 100)), dense=True)
    absent = AbsentLabels(scene, {"tiny": {Label("dog"): 3, Label("airplane"): 1}})
    asked = {ask_for_absent(random.Random(seed), scene, absent).question.lower() for seed in range(300)}
    assert any("the wing of the airplane" in question for question in asked)
    assert not any("the wing" in question and "airplane" not in question for question in asked)
    assert not any("dog" in question for question in asked)


def test_every_object_is_asked_for_whole() -> None:
    scene = scene_of(("person", (0, 0, 90, 100)), ("bag", (100, 0, 150, 50)), ("shoes", (10, 80, 50, 99), 1))
    absent = AbsentLabels(scene, {"tiny": {Label("cat"): 1, Label("belt", "person"): 2}})
    turns = [ask_for_whole(random.Random(seed), scene, absent, 0.28) for seed in range(300)]
    answers = [turn.answer for turn in turns]
    named = {mention.phrase.split()[-1] for answer in answers for mention in parse(answer).mentions}
    assert named == {"person", "bag"}
    assert 0.2 < sum(not turn.masks for turn in turns) / len(turns) < 0.36  # not less, though most labels are parts


def test_a_region_is_named_with_owner_and_colour() -> None:
    scene = scene_of(("car", (0, 0, 190, 100)), ("hood", (20, 10, 70, 50), 1), colours={"car": "red"})
    turns = [ask_about_region(random.Random(seed), scene) for seed in range(300)]
    assert all(turn.question.count("<region>") == 1 for turn in turns)
    assert {turn.regions[0] for turn in turns} == {(0, 0, 190, 100), (20, 10, 70, 50)}
    answers = {turn.answer for turn in turns}
    assert {"It is the hood of a red car.", "It is <p> the hood of a red car </p> [SEG].", "It is a car."} <= answers
    assert all(len(turn.masks) == turn.answer.count("[SEG]") for turn in turns)
    assert ask_about_region(random.Random(0), scene_of()) is None


def test_two_things_of_one_box_are_no_region() -> None:
    scene = scene_of(("person", (0, 0, 100, 100)), ("dress", (0, 0, 100, 98), 1))
    assert ask_about_region(random.Random(0), scene) is None


def test_descriptions_say_colours_and_places_only_if_wanted() -> None:
    scene = scene_of(
        ("sky", (0, 0, 200, 20)), ("dog", (10, 30, 50, 70)), ("bench", (150, 30, 190, 80)), colours={"dog": "white"}
    )
    plain = describe_image(random.Random(1), scene.objects)
    told = describe_image(random.Random(1), scene.objects, coloured=True, placed=True)
    assert plain.answer == "The image shows <p> a dog </p> [SEG], <p> the sky </p> [SEG], and <p> a bench </p> [SEG]."
    assert told.answer == (
        "The image shows <p> the sky </p> [SEG]. On the left I see <p> a white dog </p> [SEG]. "
        "On the right I see <p> a bench </p> [SEG]."
    )
    by_name = {target.noun.name: target.mask for target in scene.objects}
    assert told.masks == (by_name["sky"], by_name["dog"], by_name["bench"])


def test_the_colour_of_a_thing_is_said_of_the_whole_and_not_of_each_part() -> None:
    scene = scene_of(("car", (0, 0, 190, 100)), ("hood", (20, 10, 70, 50), 1), colours={"car": "red", "hood": "red"})
    turn = describe_parts(random.Random(0), scene.objects[0], scene.parts, coloured=True, varied=True)
    assert parse(turn.answer).clean_text == "The red car shows the hood."


def test_paraphrases_are_never_said_in_training() -> None:
    said = [
        text
        for module in (templates, training_templates, scene_templates, phrase_templates)
        for name, value in vars(module).items()
        if name != "PARAPHRASES" and name.isupper()
        for texts in (value.values() if isinstance(value, dict) else [value])
        for text in ([texts] if isinstance(texts, str) else texts)
    ]
    assert len(said) > 400 and len(set(templates.PARAPHRASES)) >= 24
    for paraphrase in templates.PARAPHRASES:
        start = paraphrase.partition("{x}")[0].lower()
        assert len(start) >= 5  # so that it says something
        assert [text for text in said if text.lower().startswith(start) or paraphrase.lower() in text.lower()] == []
        # Nor does a paraphrase with a thing in it begin as a template does.
        assert not any(
            paraphrase.lower().startswith(text.lower().partition("{")[0]) and paraphrase.partition("{x}")[2] == end
            for text in said
            if (end := text.partition("{x}")[2]) and text.partition("{")[0]
        )
