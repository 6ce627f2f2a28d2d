"""
Single questions of training rows that say more than a label: colour, place, size, number, relations, what is not so, and
regions. Each is asked only where it is true and where one thing alone can be meant.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import combinations
from typing import NamedTuple

from mglmm.processing.uscdf import render_phrase

from . import scene_templates as texts
from . import training_templates
from .attributes import COLOURS, contradicts
from .conversations import Turn, ask_by_phrase, ask_for_one, masks_of, refusal, reworded
from .labels import BODY
from .phrase_templates import REGION_QUESTIONS
from .relations import APART, UNCLEAR, neighbours, owned, relations
from .scene import AbsentLabels, Scene
from .targets import Target
from .templates import choose, loosen

TRIES = 5  # to draw an object among absent labels, of which most are parts
NUMBERS = {2: "two", 3: "three", 4: "four"}
ORDINALS = ("first", "second", "third", "fourth")
LARGER = 1.8  # times the area of the next instance
SAME_BOX = 0.75  # intersection over union from which on two boxes are one
# What one is "in"; with the colour it tells a person.
OUTER = frozenset(
    "blazer blouse cape cardigan coat dress jacket jeans jumper leggings pants romper shirt shorts skirt suit sweater "
    "sweatshirt t-shirt top vest".split()
)
# How often a question is of each kind of attribute, among those that the picture offers.
ATTRIBUTES = {"colour": 4, "place": 2, "colour and place": 1, "number": 1, "owner": 2, "worn": 2, "instance": 6}
WRONG_COLOUR_SHARE, PART_OF_ABSENT_SHARE = 0.07, 0.13  # of the refusals, where there is one


class Described(NamedTuple):
    """A target and words that are true of it alone."""

    phrase: str
    target: Target


def ask_with_attribute(rng: random.Random, scene: Scene) -> Turn | None:
    """A question that names its target by colour, place, size or number; `None` if nothing can be said."""
    phrases = attributes(rng, scene)
    kinds = [kind for kind in ATTRIBUTES if phrases[kind]]
    if not kinds:
        return None
    (kind,) = rng.choices(kinds, [ATTRIBUTES[kind] for kind in kinds])
    phrase, target = rng.choice(phrases[kind])
    return ask_by_phrase(rng, phrase, target)


def attributes(rng: random.Random, scene: Scene) -> dict[str, list[Described]]:
    """All that can be said, by kind (see `ATTRIBUTES`)."""
    found: dict[str, list[Described]] = defaultdict(list)
    person = next((each for each in scene.objects if each.noun.name == "person" and each.count == 1), None)
    for original in (*scene.objects, *scene.parts):
        target = reworded(rng, original)
        if target.shared:
            continue  # its owner must be named, which is enough
        for word, instance in _instances(target):
            found["instance"].append(Described(word, instance))
        number = len(target.instances) or (1 if target.count == 1 else 0)
        if number == 0:
            continue  # nobody counted them
        one_colour = all(each.colour == target.colour for each in target.instances)
        name, place = target.noun.bare(number), target.place
        if {"at", "in"} & set(name.split()):
            place = None  # "the bumper at the front on the left"
        if target.colour and one_colour:
            coloured = target.named().bare(number)
            found["colour"].append(Described(f"the {coloured}", target))
            if place:
                found["colour and place"].append(Described(f"the {coloured} {place}", target))
        if place:
            found["place"].append(Described(f"the {name} {place}", target))
        if number > 1:
            words = [
                f"the {NUMBERS[number]} {name}",
                f"both {name}" if number == 2 else f"all {NUMBERS[number]} {name}",
            ]
            found["number"].append(Described(rng.choice(words), target))
        if target.owner is None:
            continue
        owner = scene.owner_of(original)
        if owner is not None and owner.count == 1 and owner.colour:
            found["owner"].append(Described(f"the {name} of {owner.named().definite()}", target))
        if owner is not None and owner is person and original.noun.name in OUTER and target.colour:
            found["worn"].append(Described(f"the person in {_worn(target)}", person))
    return found


def ask_with_relation(rng: random.Random, scene: Scene) -> Turn | None:
    """A question about a relation: "the bag to the right of the person", "what is above the trousers", whose part it is."""
    kinds: list[Callable[[], Turn | None]] = [
        lambda: _relation(rng, scene),
        lambda: _relation(rng, scene),
        lambda: _neighbour(rng, scene),
        lambda: _owner(rng, scene),
    ]
    for ask in rng.sample(kinds, len(kinds)):
        turn = ask()
        if turn is not None:
            return turn
    return None


def _relation(rng: random.Random, scene: Scene) -> Turn | None:
    found = relations(scene)
    if not found:
        return None
    one, word, other = rng.choice(found)
    return ask_by_phrase(rng, f"{one.noun.definite()} {word} {other.noun.definite()}", one)


def _neighbour(rng: random.Random, scene: Scene) -> Turn | None:
    found = neighbours(scene)
    if not found:
        return None
    one, word, other = rng.choice(found)
    questions = tuple(question.replace("{r}", word) for question in texts.NEIGHBOUR_QUESTIONS)
    return ask_by_phrase(rng, one.noun.definite(one.count), one, questions, query=reworded(rng, other).noun.definite())


def _owner(rng: random.Random, scene: Scene) -> Turn | None:
    found = owned(scene)
    if not found:
        return None
    part, owner = rng.choice(found)
    if owner.noun.name != "person":
        questions = texts.OWNER_QUESTIONS
    elif part.noun.name in BODY:
        questions = texts.BODY_QUESTIONS
    else:
        questions = texts.WEARER_QUESTIONS
    noun = reworded(rng, part).noun
    verbs = ("belong", "are", "do") if noun.is_plural(part.count) else ("belongs", "is", "does")
    for slot, verb in zip(("{belongs}", "{is}", "{does}"), verbs, strict=True):
        questions = tuple(question.replace(slot, verb) for question in questions)
    return ask_by_phrase(rng, owner.noun.definite(), owner, questions, query=noun.definite(part.count))


def ask_for_absent(rng: random.Random, scene: Scene, absent: AbsentLabels) -> Turn | None:
    """A refused question: a label, a part of a thing that is absent itself, or a thing in a colour that it does not have."""
    draw = rng.random()
    if draw < WRONG_COLOUR_SHARE:
        turn = ask_for_wrong_colour(rng, scene)
        if turn is not None:
            return turn
    target = absent.draw_part(rng) if draw > 1 - PART_OF_ABSENT_SHARE else None
    target = target or absent.draw(rng)
    return ask_for_one(rng, target, varied=True) if target is not None else None


def ask_for_wrong_colour(rng: random.Random, scene: Scene) -> Turn | None:
    """ "The green car" of a red one: refused; `None` if no target clearly has one colour."""
    targets = [target for target in (*scene.objects, *scene.parts) if target.colour and target.count == 1]
    targets = [target for target in targets if not target.shared and target.noun.kind != "unique"]
    if not targets:
        return None
    target = reworded(rng, rng.choice(targets))
    colour = rng.choice([other for other in COLOURS if contradicts(target.colour or "", other)])
    wrong = replace(target, noun=target.noun.coloured(colour), owner=None, mask=None)
    question = loosen(rng, choose(rng, training_templates.DEFINITE_QUESTIONS).format(x=wrong.noun.definite()))
    return Turn(question, refusal(rng, [wrong.noun.indefinite()], wrong))


def ask_for_whole(rng: random.Random, scene: Scene, absent: AbsentLabels, refused: float) -> Turn | None:
    """A plain question for one of the objects, or for an absent one with the probability `refused`."""
    if rng.random() < refused:
        drawn = (absent.draw(rng) for _ in range(TRIES))
        target = next((target for target in drawn if target is not None and target.owner is None), None)
        if target is not None:
            return ask_for_one(rng, target, varied=True)
    return ask_for_one(rng, rng.choice(scene.objects), varied=True) if scene.objects else None


def ask_about_region(rng: random.Random, scene: Scene) -> Turn | None:
    """What is in the box of a target, in words, or as a phrase with its mask; `None` if no box stands for one thing."""
    candidates = [each for each in (*scene.objects, *scene.parts) if each.noun.name not in UNCLEAR]
    singles = [single for each in candidates for single in each.instances or (each,)]
    distinct = [each for each in singles if not any(_same_box(each, other) for other in singles if other is not each)]
    wholes = [each for each in distinct if each.owner is None]
    parts = [each for each in distinct if each.owner is not None]
    pool = parts if parts and (not wholes or rng.random() < 0.5) else wholes
    if not pool:
        return None
    target = rng.choice(pool)
    left, top, width, height = target.box
    region = left, top, left + width, top + height
    coloured = reworded(rng, target).named(coloured=rng.random() < 0.8)
    phrase = coloured.indefinite(target.count)
    if target.owner is not None and (target.owner.name != "person" or rng.random() < 0.5):
        phrase = f"{coloured.definite(target.count)} of {_owner_in_words(scene, target)}"
    answers = texts.REGION_ANSWERS_PLURAL if coloured.is_plural(target.count) else texts.REGION_ANSWERS
    answer = choose(rng, answers, first=0.5)
    if rng.random() < 0.4:
        question = choose(rng, texts.REGION_MASK_QUESTIONS)
        return Turn(loosen(rng, question), answer.format(n=render_phrase(phrase)), masks_of([target]), (region,))
    return Turn(loosen(rng, choose(rng, REGION_QUESTIONS)), answer.format(n=phrase), regions=(region,))


def _owner_in_words(scene: Scene, part: Target) -> str:
    owner = scene.owner_of(part)
    assert part.owner is not None
    if owner is None or part.owner_count != owner.count:
        return part.owner.indefinite(part.owner_count)
    return owner.named().indefinite(owner.count)


def _instances(target: Target) -> Iterable[Described]:
    """Words for one of several instances: by side, order, size or colour, as far as it is clear."""
    singles = target.instances
    name = target.noun.name
    if not singles or {"left", "right"} & set(name.split()):
        return
    by_x = sorted(singles, key=lambda single: single.centre[0])
    apart = [right.centre[0] - left.centre[0] >= APART for left, right in zip(by_x, by_x[1:], strict=False)]
    if any(_box_iou(one, other) > 0.2 for one, other in combinations(singles, 2)):
        return
    if apart[0]:
        yield Described(f"the {name} on the left", by_x[0])
        yield Described(f"the leftmost {name}" if len(singles) > 2 else f"the left {name}", by_x[0])
    if apart[-1]:
        yield Described(f"the {name} on the right", by_x[-1])
        yield Described(f"the rightmost {name}" if len(singles) > 2 else f"the right {name}", by_x[-1])
    if len(singles) > 2 and all(apart):
        for number, single in enumerate(by_x):
            yield Described(f"the {ORDINALS[number]} {name} from the left", single)
        if len(singles) == 3:
            yield Described(f"the {name} in the middle", by_x[1])
    upper, *_, lower = sorted(singles, key=lambda single: single.centre[1])
    if len(singles) == 2 and lower.centre[1] - upper.centre[1] >= 1.5 * APART:
        yield Described(f"the upper {name}", upper)
        yield Described(f"the lower {name}", lower)
    by_area = sorted(singles, key=lambda single: single.area)
    if by_area[-1].area >= LARGER * by_area[-2].area:
        yield Described(f"the {'larger' if len(singles) == 2 else 'largest'} {name}", by_area[-1])
    if by_area[1].area >= LARGER * by_area[0].area:
        yield Described(f"the {'smaller' if len(singles) == 2 else 'smallest'} {name}", by_area[0])
    for single in singles:
        others = [other for other in singles if other is not single]
        if single.colour and all(other.colour and contradicts(single.colour, other.colour) for other in others):
            yield Described(f"the {target.noun.coloured(single.colour).name}", single)


def _worn(target: Target) -> str:
    noun = target.named()
    return noun.definite() if noun.kind == "count" else noun.name


def _same_box(one: Target, other: Target) -> bool:
    return _box_iou(one, other) >= SAME_BOX


def _box_iou(one: Target, other: Target) -> float:
    a, b = one.corners, other.corners
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    shared = width * height
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)
