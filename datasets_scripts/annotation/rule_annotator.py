"""
An annotator that sees nothing: it writes down what the lines of a prompt say, in sentences that keep every rule.

For runs without a language model: to try the pipeline, to test it, and to describe masks whose labels are known.
"""

from __future__ import annotations

import json
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence

from mglmm.datasets_scripts.conversations import listed
from mglmm.datasets_scripts.labels import Noun, readable

from .chat import CHARACTERS_PER_TOKEN, ChatRequest, ChatResult, RequestFailed, texts_of
from .facts import CONTEXT_HEAD, LABELING_HEAD, ObjectFacts, TargetFacts, read_objects, read_subject, read_targets
from .label_merge import normalize_label
from .label_rules import MAX_LABEL_LENGTH, MAX_LABEL_WORDS, clean_label, same_word, says_nothing

UNKNOWN = "unknown"
MAX_SENTENCES = 6  # with targets, of a description
MAX_PLACED = 24  # with more targets their places are left out, for the length of the text

Box = tuple[float, float, float, float]  # x, y, width, height as shares of the image
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)

_NUMBERS = "two three four five six seven eight nine ten".split()
_SIZES = ((40, "very large"), (12, "large"), (3, "of medium size"), (0.5, "small"), (0, "tiny"))  # percent of the area
# By third of the height and of the width.
_PLACES = (
    ("in the upper left", "at the top", "in the upper right"),
    ("on the left", "in the middle", "on the right"),
    ("in the lower left", "at the bottom", "in the lower right"),
)
_ROOT_OPENINGS = (
    "The scene holds several things that can be told apart.",
    "Several things come together in this view.",
    "A number of things stand out from their surroundings here.",
)
_ROOT_OPENING_OF_ONE = "One thing stands out from its surroundings here."
_ROOT_LINKS = (  # the first one stays the first
    "There one finds {}.",
    "One can also see {}.",
    "The eye then meets {}.",
    "Further on one comes upon {}.",
    "Besides, there is room for {}.",
    "To this the scene adds {}.",
)
_ROOT_CLOSINGS = (
    "Together they make up most of what can be seen.",
    "All the rest stays in the background.",
    "Nothing else takes up as much room.",
)
_SUBJECT_OPENINGS = (
    "{} can be told apart from the rest by the parts that make {} up.",
    "A closer look at {} brings out what belongs to {}.",
    "Several details of {} come into view as soon as one looks at {} closely.",
)
_SUBJECT_LINKS = (  # the first one stays the first
    "First of all one finds {}.",
    "One can also make out {}.",
    "Next to that one notices {}.",
    "There one also comes upon {}.",
    "Further details include {}.",
    "The eye then meets {}.",
)
_HOLDING = ("with", "showing", "bearing", "carrying")  # parts, by depth


class RuleAnnotator:
    """A `ChatClient` that answers prompts of `object_labeling` and `dense_context` without a model."""

    model = "rules"

    async def complete(self, request: ChatRequest) -> ChatResult:
        """Raises `RequestFailed` if the prompt has no line that it knows."""
        prompt = "\n".join(text for message in request.messages for text in texts_of(message))
        heads = prompt.splitlines()
        if LABELING_HEAD in heads and (objects := read_objects(prompt)):
            answer = labels_text(objects)
        elif CONTEXT_HEAD in heads and (targets := read_targets(prompt)):
            answer = context_text(targets, read_subject(prompt))
        else:
            raise RequestFailed("the rule annotator finds neither objects nor targets in the prompt")
        return ChatResult(answer, "stop", request.prompt_tokens(), len(answer) // CHARACTERS_PER_TOKEN)


def labels_text(objects: Sequence[ObjectFacts]) -> str:
    """
    The answer about objects, as JSON: each is called what its source calls it, or "unknown", and captioned by its place and
    size.
    """
    seen: Counter[str] = Counter()
    entries = []
    for facts in objects:
        label = spoken_label(facts.known)
        caption = _caption(facts, label)
        seen[caption] += 1
        if seen[caption] > 1:
            caption += f" It is number {seen[caption]} of its kind at this place."
        entries.append({"id": facts.id, "label": label, "caption": caption})
    return json.dumps({"objects": entries})


def context_text(targets: Sequence[TargetFacts], subject: tuple[str, int] | None = None) -> str:
    """
    A description with a tagged phrase for each target, the same for the same ids.

    Args:
        targets: At least one; parts follow what they belong to and are one deeper.
        subject: Label and count of what is described; `None` for the whole image.

    Returns:
        3 to 8 sentences about an image, 2 to 7 about an object; at most 320 words for 24 targets.
    """
    choice = zlib.crc32(" ".join(target.id for target in targets).encode())
    frame = _around([target.box for target in targets]) if subject else WHOLE
    mentions: Counter[str] = Counter()
    clauses = []
    for target, parts in _branches(targets):
        phrase = _mention(target, mentions)
        place = f" {place_of(target.box, frame)}" if len(targets) <= MAX_PLACED else ""
        clauses.append((f"{phrase}{place}{_parts(parts, mentions)}", 1 + len(parts)))
    first, *links = _SUBJECT_LINKS if subject else _ROOT_LINKS
    turn = choice % len(links)
    sentences = [
        link.format(listed(group))
        # As many sentences as there are groups of clauses.
        for link, group in zip(
            [first, *links[turn:], *links[:turn]], _grouped(clauses, -(-len(targets) // 4)), strict=False
        )
    ]
    if subject is None:
        opening = _ROOT_OPENINGS[choice % len(_ROOT_OPENINGS)] if len(targets) > 1 else _ROOT_OPENING_OF_ONE
        return " ".join([opening, *sentences, _ROOT_CLOSINGS[choice // 7 % len(_ROOT_CLOSINGS)]])
    noun, count = _noun(as_label(subject[0])), subject[1]
    name, pronoun = noun.definite(count), "them" if noun.is_plural(count) else "it"
    opening = _SUBJECT_OPENINGS[choice % len(_SUBJECT_OPENINGS)].format(name, pronoun)
    return " ".join([opening[0].upper() + opening[1:], *sentences])


def spoken_label(known: str) -> str:
    """
    A label of any origin as a noun phrase that is a valid label, "unknown" if nothing of it can be used.

    Example:
        >>> spoken_label("wall-brick"), spoken_label("Traffic_Light (red)"), spoken_label("17")
        ('brick wall', 'traffic light red', 'unknown')
    """
    try:
        return as_label(readable(known).name)
    except ValueError:  # nothing but blanks and suffixes
        return UNKNOWN


def as_label(text: str) -> str:
    """The last words of a text, as many as a label may have; "unknown" if it has none."""
    words = re.findall(r"[a-z]+(?:['-][a-z]+)*", clean_label(text))[-MAX_LABEL_WORDS:]
    while len(" ".join(words)) > MAX_LABEL_LENGTH:
        words = words[1:]  # the last word says most
    return clean_label(" ".join(words)) or UNKNOWN


def _caption(facts: ObjectFacts, label: str) -> str:
    noun = _noun(label)
    named = not says_nothing(label)
    first = noun.indefinite() if named else "something that is hard to name"
    plural = named and noun.is_plural()
    subject, verb, ending = ("they", "are", "") if plural else ("it", "is", "s")
    parent = as_label(facts.parent)
    belongs = "" if says_nothing(parent) else f", where {subject} belong{ending} to {_noun(parent).definite()}"
    size = next(name for least, name in _SIZES if facts.area_percent >= least)
    x, y, width, height = facts.box
    across, down = (
        f"{_percent(start)} to {_percent(start + length)} percent" for start, length in ((x, width), (y, height))
    )
    return (
        f"{first[0].upper()}{first[1:]} can be seen {place_of(facts.box)} of the scene{belongs}. {subject.capitalize()} "
        f"{verb} {size} and reach{'' if plural else 'es'} from {across} of the width and from {down} of the height."
    )


def place_of(box: Box, frame: Box = WHOLE) -> str:
    """
    Where a box lies in another one.

    Example:
        >>> place_of((0.1, 0.7, 0.1, 0.1)), place_of((0, 0, 1, 0.3)), place_of((0.0, 0.0, 1.0, 1.0))
        ('in the lower left', 'at the top', 'in the middle')
    """
    column, row = (
        min(2, max(0, int(3 * (box[axis] + box[axis + 2] / 2 - frame[axis]) / frame[axis + 2])))
        if frame[axis + 2]
        else 1
        for axis in (0, 1)
    )
    return _PLACES[row][column]


def _branches(targets: Sequence[TargetFacts]) -> Iterator[tuple[TargetFacts, Sequence[TargetFacts]]]:
    """Each target that is no part of another one here, with what follows and lies deeper."""
    start = 0
    while start < len(targets):
        end = start + 1
        while end < len(targets) and targets[end].depth > targets[start].depth:
            end += 1
        yield targets[start], targets[start + 1 : end]
        start = end


def _parts(targets: Sequence[TargetFacts], mentions: Counter[str], level: int = 0) -> str:
    """What a thing has: " with a door showing a handle and two windows"."""
    clauses = [_mention(target, mentions) + _parts(parts, mentions, level + 1) for target, parts in _branches(targets)]
    return f" {_HOLDING[level % len(_HOLDING)]} {listed(clauses)}" if clauses else ""


def _mention(target: TargetFacts, mentions: Counter[str]) -> str:
    """The tagged phrase, "another" for what was named before."""
    label = as_label(target.label)
    noun = _noun(label)
    before = mentions[label]
    mentions[label] += 1
    if noun.kind == "count" and target.count > 1:
        number = _NUMBERS[target.count - 2] if target.count <= 10 else "many"
        plural = noun.bare(target.count)
        if not same_word(plural.split()[-1], label.split()[-1]):
            plural = label  # no English word
        phrase = f"{number}{' more' if before and len(label.split()) < MAX_LABEL_WORDS else ''} {plural}"
    elif noun.kind == "count" and before:
        phrase = f"another {noun.name}"
    else:
        phrase = noun.indefinite(target.count)
    return f"<{target.id}>{phrase}</{target.id}>"


def _noun(label: str) -> Noun:
    """The label as a noun; how it counts is what its last words say."""
    head = label.split()[-1]
    for name in (label, head):
        if (noun := readable(name)).name == name and noun.kind != "count":
            return Noun(label, noun.kind)
    return Noun(label, "count" if normalize_label(head) == head else "plural")


def _grouped(clauses: Sequence[tuple[str, int]], count: int) -> list[list[str]]:
    """Clauses (and how many targets each holds) in order, in at most `count` or `MAX_SENTENCES` groups of similar size."""
    count = min(count, MAX_SENTENCES)
    total = sum(size for _, size in clauses)
    groups: list[list[str]] = []
    done = 0
    for clause, size in clauses:
        if done >= total * len(groups) / count:
            groups.append([])
        groups[-1].append(clause)
        done += size
    return groups


def _around(boxes: Sequence[Box]) -> Box:
    left, top = min(box[0] for box in boxes), min(box[1] for box in boxes)
    return (left, top, max(box[0] + box[2] for box in boxes) - left, max(box[1] + box[3] for box in boxes) - top)


def _percent(share: float) -> int:
    return round(100 * share)
