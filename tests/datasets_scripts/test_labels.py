import random

import pytest

from mglmm.datasets_scripts.labels import CONFUSABLE, Noun, confusable, readable


@pytest.mark.parametrize(
    ("label", "definite", "indefinite", "two", "none"),
    [
        ("sky-other-merged", "the sky", "the sky", "the sky", "there is no sky"),  # unique: no "a"
        ("door-stuff", "the door", "a door", "two doors", "there is no door"),  # suffix
        ("water-other", "the water", "water", "water", "there is no water"),  # mass
        ("wall-brick", "the brick wall", "a brick wall", "two brick walls", "there is no brick wall"),  # table
        ("floor-wood", "the wooden floor", "a wooden floor", "two wooden floors", "there is no wooden floor"),
        ("tree-merged", "the trees", "trees", "trees", "there are no trees"),  # merged stuff of any number
        ("window-blind", "the window blind", "a window blind", "two window blinds", "there is no window blind"),
        ("shoes", "the shoes", "shoes", "shoes", "there are no shoes"),  # plural in itself
        ("jeans", "the jeans", "jeans", "jeans", "there are no jeans"),
        ("skin", "the skin", "skin", "skin", "there is no skin"),
        ("t-shirt", "the t-shirt", "a t-shirt", "two t-shirts", "there is no t-shirt"),  # the hyphen stays
        ("umbrella", "the umbrella", "an umbrella", "two umbrellas", "there is no umbrella"),
        ("suit", "the suit", "a suit", "two suits", "there is no suit"),
        ("person", "the person", "a person", "two people", "there is no person"),  # irregular
        ("knife", "the knife", "a knife", "two knives", "there is no knife"),
        ("bus", "the bus", "a bus", "two buses", "there is no bus"),
        ("toothbrush", "the toothbrush", "a toothbrush", "two toothbrushes", "there is no toothbrush"),
        ("wine glass", "the wine glass", "a wine glass", "two wine glasses", "there is no wine glass"),
        ("Metal_Shutters", "the metal shutters", "metal shutters", "metal shutters", "there are no metal shutters"),
    ],
)
def test_a_label_reads_as_english(label: str, definite: str, indefinite: str, two: str, none: str) -> None:
    noun = readable(label)
    assert (noun.definite(), noun.indefinite(), noun.indefinite(2), noun.none()) == (definite, indefinite, two, none)


def test_owners_take_the_apostrophe_of_their_number() -> None:
    person, car = Noun("person"), Noun("car")
    assert [person.possessive(), person.possessive(2), car.possessive(), car.possessive(2)] == [
        "the person's",
        "the people's",
        "the car's",
        "the cars'",
    ]


def test_a_label_cannot_smuggle_in_a_control_token() -> None:
    assert readable("<p> red </p> <image>").name == "< p> red < /p> < image>"


def test_a_label_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no readable name"):
        readable("-merged")


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("coat", "jacket", True),  # annotators mix these up
        ("sneakers", "loafers", True),
        ("bag", "purse", True),
        ("hood", "trunk", False),  # front and back of a car are not alike
        ("front bumper", "back bumper", False),
        ("cat", "coat", False),
    ],
)
def test_confusable_labels(one: str, other: str, expected: bool) -> None:
    assert (other in confusable(one)) is expected
    assert (one in confusable(other)) is expected


def test_groups_hold_whole_names() -> None:
    # A comma forgotten in the table would make one name of two.
    assert all(
        name == name.strip() and "," not in name and len(name.split()) <= 3 for group in CONFUSABLE for name in group
    )


def test_synonyms_keep_the_number() -> None:
    words = {readable("pants").reworded(random.Random(seed)).indefinite() for seed in range(40)}
    assert words == {"pants", "trousers"}
