"""
What a description with tagged phrases has to keep, rule by rule (reference C.5).

| code | rule | broken |
|---|---|---|
| C1 | tags are `<obj_k>phrase</obj_k>`, not nested, and no other < or > is there | asked again |
| C2 | every target is tagged exactly once, and nothing else is | asked again; repaired after the last attempt |
| C3 | a phrase has 1 to 6 words, more than digits, and ends in none of .,;:!? | asked again |
| C4 | a phrase names its target | flag; asked again if more than 30 % do not |
| C5 | 15 to 320 words of plain prose, at least two sentences about a whole image | asked again |
| C6 | a phrase for several things is in the plural | flag |
| C7 | no list of bare labels outside of the tags | asked again |
| C8 | no sentence twice | the second one is removed, flag |

Repair after the last attempt: a second tag of one target and tags of what is no target are taken off (their words stay);
up to 20 % missing targets are given up, which makes the description `partial`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from mglmm.datasets_scripts.labels import MASS, PLURAL, SYNONYMS, UNIQUE
from mglmm.datasets_scripts.phrases import unquote
from mglmm.processing.uscdf import CONTROL_TOKENS, REGION_TOKEN

from .chat import Verdict, Violation
from .facts import TargetFacts
from .label_merge import normalize_label
from .label_rules import same_word, to_ascii, words_of

TAG = re.compile(r"<(obj_\d+)>([^<>]+)</\1>")
_TAG_ENDS = re.compile(r"</?obj_\d+>")
MAX_PHRASE_WORDS = 6
MIN_WORDS, MAX_WORDS = 15, 320
MIN_ROOT_SENTENCES = 2
MAX_MISSING_SHARE = 0.2
MAX_MISNAMED_SHARE = 0.3
MIN_SIMILARITY = 0.66  # of two words of at least five letters: "cat" and "hat" are as similar as "armchair" and "chair"
MIN_SIMILAR_LENGTH = 5
LEAKED_COMMAS = 3

_PUNCTUATION = ".,;:!?"
# Ends a sentence, unless it stands inside a tag.
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?![^<]*</)")
_LIST_LINE = re.compile(r"^\s*(?:[-*+•]|\d+[.)]|#+)\s", re.MULTILINE)
_MARKDOWN = re.compile(r"\*\*|__|```|^\s*\|", re.MULTILINE)
_REFUSAL = re.compile(
    r"\b(?:I cannot|I can't|I can not|I am unable|I'm unable|I am sorry|I'm sorry|as an AI|as a language model)\b",
    re.IGNORECASE,
)
# "Group 2" is how a scene graph speaks; a group of people is none of that.
_INTERNAL = re.compile(r"\bobj(?:_\d+)?\b|\b[Gg]roup \d")
# What may follow the subject of a sentence.
_AFTER_SUBJECT = frozenset(
    "is are was were has have that which who whose with without of in on at by under over above below behind beside near "
    "next between from for to and or against along around across into".split()
)
_PLURAL_WORDS = frozenset(
    "two three four five six seven eight nine ten eleven twelve dozen several many multiple few some both various numerous "
    "pair pairs row rows set sets group groups cluster clusters bunch bunches stack stacks pile piles series collection "
    "lots".split()
)


class Described(NamedTuple):
    """A description that counts; `targets` are the ids in the order of the text."""

    tagged: str
    targets: list[str]
    dropped: list[str]
    status: Literal["ok", "partial"]


def judge_context(text: str, targets: Sequence[TargetFacts], *, whole_image: bool, last: bool) -> Verdict[Described]:
    """
    All rules on one answer.

    Args:
        whole_image: Whether the description is of the image and not of one object.
        last: Whether no further attempt follows, so that what can be repaired is.
    """
    violations = [Violation("C5", problem) for problem in breaks_prose(text)]
    printable = "".join(char if char.isprintable() else " " for char in text)
    text, repeated = drop_repeated_sentences(" ".join(unquote(printable).split()))
    flags = ["C8"] if repeated else []
    if problem := breaks_tags(text):
        # Without whole tags nothing can be said of the phrases.
        return Verdict(None, [Violation("C1", problem), *violations])
    wanted = [target.id for target in targets]
    dropped: list[str] = []
    if problem := breaks_targets(text, wanted):
        found = {match[1] for match in TAG.finditer(text)}
        dropped = [name for name in wanted if name not in found]
        if last and len(dropped) <= MAX_MISSING_SHARE * len(wanted):
            text = keep_first_tags(text, wanted)
            flags.append("C2")
        else:
            violations.append(Violation("C2", problem))
    phrases = {match[1]: match[2] for match in reversed([*TAG.finditer(text)])}
    violations += [
        Violation("C3", f"{name}: {problem}") for name, phrase in phrases.items() if (problem := breaks_phrase(phrase))
    ]
    tagged = [target for target in targets if target.id in phrases]
    misnamed = [target for target in tagged if not names_target(phrases[target.id], target.label, target.caption)]
    if len(misnamed) > MAX_MISNAMED_SHARE * len(tagged):
        shown = ", ".join(f"{phrases[target.id][:40]!r} for {target.label}" for target in misnamed[:6])
        violations.append(Violation("C4", f"These phrases do not name their target: {shown}."))
    elif misnamed:
        flags.append("C4")
    if any(target.count > 1 and not is_plural(phrases[target.id]) for target in tagged):
        flags.append("C6")
    violations += [
        Violation("C5", problem) for problem in breaks_length(text, MIN_ROOT_SENTENCES if whole_image else 1)
    ]
    if problem := leaks_labels(text, [target.label for target in targets]):
        violations.append(Violation("C7", problem))
    order = [match[1] for match in TAG.finditer(text)]
    value = Described(text, order, dropped, "partial" if dropped else "ok")
    return Verdict(value if not violations else None, violations, sorted(flags))


def breaks_tags(text: str) -> str | None:
    """C1: what is wrong with the tags."""
    rest = TAG.sub("", text)
    if "<" not in rest and ">" not in rest:
        return None
    near = rest[max(min(rest.find(char) for char in "<>" if char in rest) - 20, 0) :][:60]
    return f"Every tag must be <obj_k>phrase</obj_k>, closed, not nested, and nothing else in < >; near {near!r}."


def breaks_targets(text: str, wanted: Sequence[str]) -> str | None:
    """C2: which tags are missing, too many, or of no target."""
    found = [match[1] for match in TAG.finditer(text)]
    problems = [
        ("missing", [name for name in wanted if name not in found]),
        ("more than once", [name for name in wanted if found.count(name) > 1]),
        ("not in the list", sorted(set(found) - set(wanted))[:8]),
    ]
    listed = "; ".join(f"{what}: {', '.join(names)}" for what, names in problems if names)
    return f"Every target must be tagged exactly once; {listed}." if listed else None


def keep_first_tags(text: str, wanted: Sequence[str]) -> str:
    """The text with the first tag of each target; the words of other tags stay without them."""
    seen: set[str] = set()

    def untag(match: re.Match[str]) -> str:
        if match[1] not in wanted or match[1] in seen:
            return match[2]
        seen.add(match[1])
        return match[0]

    return TAG.sub(untag, text)


def breaks_phrase(phrase: str) -> str | None:
    """C3: what is wrong with a tagged phrase."""
    words = phrase.split()
    if not 1 <= len(words) <= MAX_PHRASE_WORDS:
        return f"the phrase {phrase[:60]!r} must have 1 to {MAX_PHRASE_WORDS} words"
    if not any(char.isalpha() for char in phrase):
        return f"the phrase {phrase[:60]!r} must name something"
    if phrase.strip()[-1] in _PUNCTUATION:
        return f"punctuation belongs behind the tag, not into {phrase[:60]!r}"
    return None


def names_target(phrase: str, label: str, caption: str = "") -> bool:
    """
    C4: whether a phrase holds the last word of the label, another word for the label, a word much like these, or has the
    subject of the caption as its own.
    """
    words = words_of(to_ascii(phrase))
    label = label.lower()
    names = {label, normalize_label(label), *label.split()[-1:]}
    names |= {other for name in names for other in SYNONYMS.get(name, ())}
    names |= {name for name, others in SYNONYMS.items() if label in others}
    heads = {name.split()[-1] for name in names if name}
    if any(same_word(word, head) for word in words for head in heads):
        return True
    long_words = [word for word in words if len(word) >= MIN_SIMILAR_LENGTH]
    if any(
        difflib.get_close_matches(head, long_words, n=1, cutoff=MIN_SIMILARITY)
        for head in heads
        if len(head) >= MIN_SIMILAR_LENGTH
    ):
        return True
    subject, own = _subject(words_of(caption)), _subject(words)
    return bool(own) and any(same_word(own[-1], word) for word in subject)


def breaks_prose(text: str) -> list[str]:
    """C5, of the answer as it came: what is not plain prose in it."""
    problems = []
    if _LIST_LINE.search(text) or _MARKDOWN.search(text):
        problems.append("Write plain prose: no lists, headings or markdown.")
    if token := next((token for token in (*CONTROL_TOKENS, REGION_TOKEN) if token in text), None):
        problems.append(f"Do not write {token}.")
    if _REFUSAL.search(text.replace("’", "'")):
        problems.append("Describe what is there; do not speak of yourself.")
    if _INTERNAL.search(_TAG_ENDS.sub("", text)):
        problems.append("Do not write ids or numbers of groups outside of the tags.")
    return problems


def breaks_length(text: str, least_sentences: int) -> list[str]:
    """C5, of the text without its tags: what is wrong with its length and end."""
    plain = without_tags(text)
    count, problems = len(plain.split()), []
    if not MIN_WORDS <= count <= MAX_WORDS:
        problems.append(f"The text has {count} words, it must have {MIN_WORDS} to {MAX_WORDS}.")
    if len(sentences_of(plain)) < least_sentences:
        problems.append(f"The text must have at least {least_sentences} sentences.")
    if not plain.endswith((".", "!", "?")):
        problems.append("The text must end with a full stop.")
    return problems


def is_plural(phrase: str) -> bool:
    """C6: whether a phrase may stand for several things; words that have no plural may."""
    words = words_of(phrase)
    head = _subject(words)[-1:]
    return (
        not _PLURAL_WORDS.isdisjoint(words)
        or any(char.isdigit() for char in phrase)
        or any(word in PLURAL | MASS | UNIQUE or normalize_label(word) != word for word in head)
    )


def leaks_labels(text: str, labels: Sequence[str]) -> str | None:
    """C7: whether labels follow each other, divided by commas only, outside of the tags."""
    if not labels:
        return None
    label = rf"(?:an? |the )?(?:{'|'.join(sorted({re.escape(label) for label in labels}))})(?:e?s)?"
    leak = re.search(rf"\b{label}(?:\s*,\s*(?:and )?{label}){{{LEAKED_COMMAS}}}\b", TAG.sub(" ; ", text), re.IGNORECASE)
    return f"Do not list the labels: {leak[0][:60]!r}." if leak else None


def drop_repeated_sentences(text: str) -> tuple[str, bool]:
    """C8: the text with the first of equal sentences, unless a later one tags something new, and whether one was removed."""
    kept: list[str] = []
    seen: set[str] = set()
    tagged: set[str] = set()
    sentences = sentences_of(text)
    for sentence in sentences:
        plain = without_tags(sentence).lower()
        names = {match[1] for match in TAG.finditer(sentence)}
        if plain not in seen or not names <= tagged:
            kept.append(sentence)
        seen.add(plain)
        tagged |= names
    return " ".join(kept), len(kept) < len(sentences)


def sentences_of(text: str) -> list[str]:
    return [sentence for sentence in _SENTENCE_END.split(text) if sentence]


def without_tags(text: str) -> str:
    return TAG.sub(lambda match: match[2], text)


def _subject(words: Sequence[str]) -> list[str]:
    """The words before the first one that cannot belong to the subject, at most six."""

    def until_verb() -> Iterator[str]:
        for word in words:
            if word in _AFTER_SUBJECT:
                return
            if word not in ("a", "an", "the"):
                yield word

    return [*until_verb()][:MAX_PHRASE_WORDS]
