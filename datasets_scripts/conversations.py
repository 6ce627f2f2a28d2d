"""USCDF conversations about the labelled things of one image, made from templates.

Every function takes a `random.Random` and is otherwise pure, so that a row depends on its source record and a seed alone.
"""

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mglmm.datasets_scripts import scene_templates, templates, training_templates
from mglmm.datasets_scripts.labels import BODY, CARRIED
from mglmm.datasets_scripts.targets import Target
from mglmm.datasets_scripts.templates import capitalise, choose, loosen
from mglmm.processing.uscdf import parse, render_list, render_phrase

SPECIAL_SHARE = 1 / 6  # of the turns of a conversation
MAX_MENTIONS = 10  # of a description; more would be longer than the small language models hold together


@dataclass(frozen=True)
class Turn:
    """A question and its answer.

    Attributes:
        masks: COCO RLEs of the `[SEG]`s of the answer, in their order.
        regions: Boxes (xyxy, pixels) of the `<region>`s of the question, in their order.
    """

    question: str
    answer: str
    masks: tuple[Mapping[str, Any], ...] = ()
    regions: tuple[tuple[float, float, float, float], ...] = ()


def masks_of(targets: Iterable[Target]) -> tuple[Mapping[str, Any], ...]:
    return tuple(target.mask for target in targets if target.mask is not None)


def listed(items: Sequence[str], last: str = "and") -> str:
    """Plain enumeration: "a", "a and b", "a, b and c"."""
    return f"{', '.join(items[:-1])} {last} {items[-1]}" if len(items) > 1 else items[0]


def definite(rng: random.Random, target: Target, *, every: float = 0.3) -> str:
    """How one points at the target: "the hood", "the car's hood", "the hood of the car", "all the cups" (share `every`)."""
    name = target.noun.bare(target.count)
    draw = rng.random()
    if target.owner is None:
        return f"all the {name}" if target.count > 1 and draw < every else f"the {name}"
    if target.shared or draw < 0.3:
        return f"the {name} of {target.owner.definite(target.owner_count)}"
    return f"{target.owner.possessive(target.owner_count)} {name}" if draw < 0.6 else f"the {name}"


def reworded(rng: random.Random, target: Target) -> Target:
    """The target, now and then by another word for the same thing."""
    return replace(target, noun=target.noun.reworded(rng))


def ask_for_one(rng: random.Random, target: Target, *, follow_up: bool = False, varied: bool = False) -> Turn:
    """A question for one target and its answer: the mask, or a refusal that names what was asked for.

    Args:
        varied: Use the phrasings of training too, which no question of the benchmark has.
    """
    target = reworded(rng, target)
    draw = rng.random()
    if follow_up and rng.random() < 0.4:
        query, questions = definite(rng, target), templates.FOLLOW_UP_QUESTIONS
    elif draw < 0.12 and not target.shared:
        query, questions = target.noun.bare(target.count), templates.BARE_QUESTIONS
    elif draw < 0.25 and not target.shared and target.count == 1 and target.noun.kind != "unique":
        query = target.noun.indefinite()
        questions = templates.SEARCH_QUESTIONS_PLURAL if target.noun.is_plural() else templates.SEARCH_QUESTIONS
    else:
        query = definite(rng, target)
        questions = (training_templates if varied else templates).DEFINITE_QUESTIONS
    question = loosen(rng, choose(rng, questions).format(x=query))
    if target.mask is None:
        named = target.noun.indefinite() if questions is templates.BARE_QUESTIONS else query
        if named.startswith("all the "):
            named = f"any {target.noun.bare(target.count)}"
        return Turn(question, refusal(rng, [named], target))
    answer = choose(rng, templates.PRESENT_ANSWERS, first=0.6)
    return Turn(question, answer.format(p=render_phrase(query)), masks_of([target]))


def ask_by_phrase(
    rng: random.Random,
    phrase: str,
    target: Target,
    questions: tuple[str, ...] = training_templates.DEFINITE_QUESTIONS,
    *,
    query: str | None = None,
) -> Turn:
    """A question for a target that is there, called by `phrase`; where the question says `query`, the answer names it."""
    question = loosen(rng, choose(rng, questions).format(x=query or phrase))
    answer = choose(rng, templates.PRESENT_ANSWERS, first=0.6)
    return Turn(question, answer.format(p=render_phrase(phrase)), masks_of([target]))


def paraphrase(rng: random.Random, target: Target) -> Turn:
    """`ask_for_one`, in words of which none is used in training."""
    query = definite(rng, reworded(rng, target))
    answer = choose(rng, templates.PRESENT_ANSWERS, first=0.6)
    question = rng.choice(templates.PARAPHRASES).format(x=query)
    return Turn(question, answer.format(p=render_phrase(query)), masks_of([target]))


def ask_for_several(rng: random.Random, targets: Sequence[Target]) -> Turn:
    """One question for several targets, in the given order; those without a mask are refused by name after the others."""
    targets = [reworded(rng, target) for target in targets]
    bare = rng.random() < 0.15 and not any(target.shared for target in targets)
    queries = [target.noun.bare(target.count) if bare else definite(rng, target, every=0.0) for target in targets]
    questions = templates.BARE_QUESTIONS[3:] if bare else templates.SEVERAL_QUESTIONS
    question = loosen(rng, choose(rng, questions).format(x=listed(queries)))
    present = [(query, target) for query, target in zip(queries, targets, strict=True) if target.mask is not None]
    absent = [
        target.noun.indefinite() if bare else query
        for query, target in zip(queries, targets, strict=True)
        if target.mask is None
    ]
    if not present:
        return Turn(question, refusal(rng, absent))
    answer = choose(rng, templates.SEVERAL_ANSWERS if len(present) > 1 else templates.PRESENT_ANSWERS, first=0.6)
    answer = answer.format(p=render_list([query for query, _ in present]))
    if absent:
        answer += " " + choose(rng, templates.PARTLY_ABSENT_TAILS).format(y=listed(absent, "or"))
    return Turn(question, answer, masks_of(target for _, target in present))


def refusal(rng: random.Random, queries: Sequence[str], target: Target | None = None) -> str:
    """An answer without a mask. `target` is given where a bare "there is no hat" denies all that was asked for."""
    answers = templates.ABSENT_ANSWERS
    if target is None or target.owner is not None and target.noun.name != queries[0].split(" ", 1)[-1]:
        answers = tuple(answer for answer in answers if "{none}" not in answer)
    none = target.noun.none(target.count) if target else ""
    return choose(rng, answers, first=0.4).format(y=listed(queries, "or"), none=none)


def refer(
    rng: random.Random,
    objects: Sequence[Target],
    parts: Sequence[Target],
    absent: Callable[[random.Random], Target | None],
    turns: int,
    special: Callable[[random.Random], Turn | None],
) -> list[Turn]:
    """A conversation of up to `turns` turns: objects, parts, several at once, absent (about 1 in 4) and partly absent.

    Args:
        absent: Draws a thing that is not in the image, or `None` if nothing can be said to be absent.
        special: Draws a question that says more than a label, or `None` if there is nothing to say; about 1 in 6.
    """
    left_objects, left_parts = list(objects), list(parts)
    rng.shuffle(left_objects)
    rng.shuffle(left_parts)
    refused: set[str] = set()
    said: set[str] = set()
    conversation: list[Turn] = []

    def take() -> Target:
        pool = left_parts if left_parts and (not left_objects or rng.random() < 0.65) else left_objects
        return pool.pop()

    def draw_absent() -> Target | None:
        target = absent(rng)
        if target is None or target.noun.name in refused:
            return None
        refused.add(target.noun.name)
        return target

    while len(conversation) < turns:
        turn = special(rng) if rng.random() < SPECIAL_SHARE else None
        if turn is not None and not _phrases(turn) & said:
            conversation.append(turn)
            said |= _phrases(turn)
            continue
        draw = rng.random()
        left = len(left_objects) + len(left_parts)
        missing = draw_absent() if draw < 0.35 or left == 0 else None
        if missing is not None and (draw < 0.25 or left == 0):
            conversation.append(ask_for_one(rng, missing, follow_up=bool(conversation), varied=True))
        elif missing is not None:
            asked = [take() for _ in range(min(left, rng.choice((1, 1, 2, 3))))]
            asked.insert(rng.randint(0, len(asked)), missing)
            conversation.append(ask_for_several(rng, asked))
        elif left >= 2 and draw > 0.8:
            conversation.append(ask_for_several(rng, [take() for _ in range(min(left, rng.choice((2, 2, 3, 3, 4))))]))
        elif left:
            conversation.append(ask_for_one(rng, take(), follow_up=bool(conversation), varied=True))
        else:
            break
    return conversation


def describe_image(
    rng: random.Random,
    objects: Sequence[Target],
    *,
    coloured: bool = False,
    placed: bool = False,
    varied: bool = False,
) -> Turn:
    """A panoptic description of the `MAX_MENTIONS` largest targets, from left to right or from large to small.

    Args:
        coloured: Say the colours that are known.
        placed: Say what is on the left and on the right, where that is clear.
        varied: Ask in the phrasings of training too, which no question of the benchmark has.
    """
    chosen = sorted(objects, key=lambda target: -target.area)[:MAX_MENTIONS]
    if rng.random() < 0.5:
        chosen.sort(key=lambda target: target.box[0] + target.box[2] / 2)
    sentences: list[str] = []
    mentioned: list[Target] = []
    person = next((target for target in chosen if target.noun.name == "person" and target.count == 1), None)
    carried = [target for target in chosen if person is not None and target.noun.name in CARRIED]
    if person is not None and carried:
        mentioned += [person, *carried]
        sentences.append(f"{_first_mentions([person], coloured)} with {_first_mentions(carried, coloured)}")
        chosen = [target for target in chosen if target not in mentioned]
    beside: dict[str, list[Target]] = {}
    if placed:
        for place in scene_templates.PLACE_OPENINGS:
            # The first sentence says what the picture shows, so something is left for it.
            there = [target for target in chosen if target.place == place][:4]
            if there and (sentences or len(chosen) > len(there)):
                beside[place] = there
                chosen = [target for target in chosen if target not in there]
    # Long enumerations are hard to read and to learn: at most four things a sentence, of about equal number.
    groups = -(-len(chosen) // 4)
    for group in range(groups):
        members = chosen[group * len(chosen) // groups : (group + 1) * len(chosen) // groups]
        mentioned += members
        sentences.append(_first_mentions(members, coloured))
    openings = [choose(rng, templates.PANOPTIC_OPENINGS, first=0.4)]
    openings += rng.sample(templates.PANOPTIC_MORE, len(sentences) - 1)
    for place, there in beside.items():
        mentioned += there
        sentences.append(_first_mentions(there, coloured))
        openings.append(choose(rng, scene_templates.PLACE_OPENINGS[place]))
    answer = " ".join(opening.format(p=phrases) for opening, phrases in zip(openings, sentences, strict=True))
    questions = (training_templates if varied else templates).PANOPTIC_QUESTIONS
    return Turn(loosen(rng, choose(rng, questions)), answer, masks_of(mentioned))


def describe_parts(
    rng: random.Random, target: Target, parts: Sequence[Target], *, coloured: bool = False, varied: bool = False
) -> Turn:
    """A fine-grained description of one object by its up to `MAX_MENTIONS` largest parts, from top to bottom.

    Args:
        coloured: Say the colours that are known: of what a person wears, else of the object.
        varied: Use the phrasings of training too, which the benchmark does not have.
    """
    chosen = sorted(parts, key=lambda part: -part.area)[:MAX_MENTIONS]
    chosen.sort(key=lambda part: part.box[1] + part.box[3] / 2)
    is_person = target.noun.name == "person"
    plural = target.noun.is_plural(target.count)
    whole = target.noun.definite(target.count)
    questions = (training_templates if varied else templates).FINE_QUESTIONS
    if is_person:
        questions += templates.FINE_PERSON_QUESTIONS_PLURAL if plural else templates.FINE_PERSON_QUESTIONS
    question = loosen(rng, choose(rng, questions).format(x=whole))
    if not is_person:
        answers = templates.FINE_ANSWERS_PLURAL if plural else templates.FINE_ANSWERS
        answers += scene_templates.MORE_FINE_ANSWERS if varied else ()
        whole = target.named(coloured=coloured).definite(target.count)
        phrases = render_list([part.noun.definite(part.count) for part in chosen])
        answer = choose(rng, answers, first=0.5).format(x=whole, p=phrases)
        return Turn(question, capitalise(answer), masks_of(chosen))
    worn = [part for part in chosen if part.noun.name not in BODY]
    body = [part for part in chosen if part.noun.name in BODY]
    sentences = []
    if worn:
        wears: tuple[str, ...] = templates.WEARS_PLURAL if plural else templates.WEARS
        wears += scene_templates.MORE_WEARS if varied else ()
        sentences.append(choose(rng, wears, first=0.6).format(x=whole, p=_first_mentions(worn, coloured)))
    if body:
        template = choose(rng, templates.BODY_AFTER if worn else templates.BODY_ONLY, first=0.6)
        sentences.append(template.format(x=whole, p=render_list([part.noun.definite(part.count) for part in body])))
    return Turn(question, " ".join(map(capitalise, sentences)), masks_of((*worn, *body)))


def caption(rng: random.Random, objects: Sequence[Target], parts: Sequence[Target], *, coloured: bool = False) -> Turn:
    """A short caption in plain text: up to four things, a lone person with what they wear; `coloured` as far as known."""
    chosen = sorted(objects, key=lambda target: -target.area)[:4]
    names = []
    for target in chosen:
        name = target.named(coloured=coloured).indefinite(target.count)
        worn = [part for part in parts if part.owner == target.noun and part.noun.name not in BODY]
        if target.noun.name == "person" and target.count == 1 and worn:
            worn = sorted(worn, key=lambda part: -part.area)[:3]
            name += f" wearing {listed([part.named(coloured=coloured).indefinite(part.count) for part in worn])}"
            carried = [
                other.named(coloured=coloured).indefinite(other.count) for other in chosen if other.noun.name in CARRIED
            ]
            if carried:
                names = [f"{name}, with {listed(carried)}"]
                break
        names.append(name)
    answer = choose(rng, templates.CAPTION_ANSWERS).format(rest=listed(names))
    return Turn(loosen(rng, choose(rng, templates.CAPTION_QUESTIONS)), answer)


def _phrases(turn: Turn) -> set[str]:
    return {mention.phrase for mention in parse(turn.answer).mentions}


def _first_mentions(targets: Sequence[Target], coloured: bool) -> str:
    return render_list([target.named(coloured=coloured).indefinite(target.count) for target in targets])
