"""
What an answer about objects has to keep, rule by rule (reference C.3).

| code | rule | broken |
|---|---|---|
| L1 | a JSON object with a list `objects` of exactly the ids asked for, each with two texts | asked again |
| L2 | a label of 1 to 4 words, at most 32 letters, blanks, hyphens and apostrophes | asked again |
| L3 | a label that says something | `unlabelled` |
| L4 | a caption of 8 to 80 ASCII words on one line that ends as a sentence, without brackets | asked again |
| L5 | nothing in it about masks, outlines, crops, ids or the picture as a picture | asked again |
| L6 | the caption names the label | `weak` |
| L7 | the label is not that of what the object lies in | flag |
| L8 | no caption twice | asked again |
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .chat import Verdict, Violation
from .facts import ObjectFacts
from .label_merge import normalize_label
from .records import Label

MAX_LABEL_WORDS, MAX_LABEL_LENGTH = 4, 32
MIN_CAPTION_WORDS, MAX_CAPTION_WORDS = 8, 80
MAX_JSON_STARTS = 64  # places of an answer where an object is looked for

# A label of these words alone names nothing.
EMPTY_WORDS = frozenset(
    "a an the some other whole object objects thing things item items part parts piece region regions area areas mask segment "
    "section background foreground image picture photo photograph scene unknown unidentified unclear unrecognizable "
    "unrecognisable unlabelled unlabeled undefined something stuff none na nothing".split()
)
# Of the drawing and not of the object: (pattern, what the model is told). Common things of the same name are let be.
OF_THE_DRAWING = tuple(
    (re.compile(pattern, re.IGNORECASE), name)
    for pattern, name in (
        (r"(?<!face )(?<!surgical )(?<!gas )(?<!ski )(?<!diving )(?<!eye )(?<!sleep )\bmask(?:s|ed)?\b", "mask"),
        (r"\boutlin(?:e|es|ed|ing)\b", "outline"),
        (r"\bcontours?\b", "contour"),
        (r"\bhighlighted\b", "highlighted"),
        (r"\bcrop\b(?! tops?\b)|\bcropped (?:image|picture|photo|photograph|view|area|region)\b", "crop"),
        (r"\bbounding[ -]box(?:es)?\b", "bounding box"),
        (r"\bin (?:the|this) (?:image|picture|photo|photograph)\b(?! frame)", "in the image"),
        (r"\bm\d{4,}\b", "ids"),
    )
)
_TYPOGRAPHY = str.maketrans("‘’‚“”„–—−‐‑", "'''\"\"\"-----")
_WORD = re.compile(r"[^\W\d_]+(?:['-][^\W\d_]+)*")


def judge_labels(text: str, asked: Sequence[ObjectFacts], parents: Mapping[str, str]) -> Verdict[dict[str, Label]]:
    """
    All rules on one answer.

    Args:
        text: As the model gave it.
        asked: The objects of the request.
        parents: Label of what an object lies in, by the object's id, as far as there is one.

    Returns:
        The labels by id. An object whose label says nothing keeps neither label nor caption, which no rule looks at then.
    """
    objects, violations = read_answer(text, [facts.id for facts in asked])
    labels: dict[str, Label] = {}
    first_with: dict[str, str] = {}
    for facts in asked:
        if facts.id not in objects:
            continue
        label, caption = clean_label(objects[facts.id][0]), to_ascii(objects[facts.id][1].strip())
        if says_nothing(label):
            labels[facts.id] = {"label": "", "caption": "", "status": "unlabelled", "flags": ["L3"]}
            continue
        broken = [("L2", breaks_label_form(label)), ("L4", breaks_caption_form(caption))]
        broken.append(("L5", talks_of_drawing(caption, facts.color, f"{label} {parents.get(facts.id, '')}")))
        same = " ".join(caption.lower().split())
        if same in first_with:
            broken.append(("L8", f"its caption is that of {first_with[same]}"))
        first_with.setdefault(same, facts.id)
        violations += [Violation(code, f"{facts.id}: {problem}") for code, problem in broken if problem]
        weak = not names_label(caption, label)
        repeats = facts.id in parents and normalize_label(label) == normalize_label(parents[facts.id])
        labels[facts.id] = {
            "label": label,
            "caption": caption,
            "status": "weak" if weak else "ok",
            "flags": [code for code, flagged in (("L6", weak), ("L7", repeats)) if flagged],
        }
    return Verdict(labels if not violations else None, violations)


def read_answer(text: str, ids: Sequence[str]) -> tuple[dict[str, tuple[str, str]], list[Violation]]:
    """L1: label and caption by id, of the objects that are as they should be, and what is wrong with the others."""
    found = _find_objects(text)
    if found is None:
        return {}, [Violation("L1", 'The answer is no JSON object of the form {"objects": [...]}.')]
    objects: dict[str, tuple[str, str]] = {}
    problems = []
    seen = []
    for entry in found:
        name = entry.get("id") if isinstance(entry, dict) else None
        if not isinstance(name, str) or name not in ids:
            shown = repr(name[:20]) if isinstance(name, str) else "that is no text"
            problems.append(f"an entry has an id {shown}, which was not asked for")
        elif name in seen:
            problems.append(f"{name} is there twice")
        elif not isinstance(entry.get("label"), str) or not isinstance(entry.get("caption"), str):
            problems.append(f"{name} lacks a label or a caption that is a text")
        else:
            objects[name] = (entry["label"], entry["caption"])
        seen.append(name)
    if missing := [name for name in ids if name not in seen]:
        problems.append(f"missing: {', '.join(missing)}")
    return objects, [Violation("L1", f"{'; '.join(problems[:8])}.")] if problems else []


def clean_label(label: str) -> str:
    """In lower case, without an article before or a full stop behind it."""
    label = " ".join(to_ascii(label).lower().split())
    return re.sub(r"^(?:an?|the) (?=\S)", "", label.strip(" .,;:'\"-"))


def breaks_label_form(label: str) -> str | None:
    """L2, of a cleaned label: what is wrong with it."""
    if not re.fullmatch(r"[a-z][a-z' -]*", label):
        return f"the label {label[:40]!r} must be letters, blanks, hyphens and apostrophes"
    if len(label.split()) > MAX_LABEL_WORDS or len(label) > MAX_LABEL_LENGTH:
        return f"the label {label[:60]!r} must have 1 to 3 words and at most {MAX_LABEL_LENGTH} characters"
    return None


def says_nothing(label: str) -> bool:
    """L3, of a cleaned label. One without a letter is not meant: that breaks L2."""
    words = _WORD.findall(label)
    return bool(words) and set(words) <= EMPTY_WORDS


def breaks_caption_form(caption: str) -> str | None:
    """L4: what is wrong with a caption."""
    count = len(caption.split())
    if not MIN_CAPTION_WORDS <= count <= MAX_CAPTION_WORDS:
        return f"the caption has {count} words, it must have {MIN_CAPTION_WORDS} to {MAX_CAPTION_WORDS}"
    if not caption.endswith((".", "!", "?")):
        return "the caption must end with a full stop"
    if not caption.isascii() or not caption.isprintable():
        return "the caption must be one line of plain English letters and punctuation"
    if re.search(r"[<>\[\]]", caption):
        return "the caption must not hold <, >, [ or ]"
    return None


def talks_of_drawing(caption: str, color: str, own_words: str = "") -> str | None:
    """
    L5: what a caption says of the drawing.

    Args:
        color: Name of the colour of the object's outline.
        own_words: Of labels; what they name may be named in the caption, such as a "mask" that is worn.
    """
    if words := _WORD.findall(own_words):
        caption = re.sub(rf"\b(?:{'|'.join(map(re.escape, words))})s?\b", "thing", caption, flags=re.IGNORECASE)
    found = [name for pattern, name in OF_THE_DRAWING if pattern.search(caption)]
    if re.search(rf"\b{re.escape(color)} (?:outline|border)", caption, re.IGNORECASE):
        found.append(f"the {color} outline")
    return f"the caption must not speak of {', '.join(found)}: only of the thing itself" if found else None


def names_label(caption: str, label: str) -> bool:
    """L6: whether a caption holds the last word of a label, in singular or plural."""
    return bool(label) and any(same_word(word, label.split()[-1]) for word in words_of(caption))


def same_word(first: str, second: str) -> bool:
    """Whether two words in lower case are the same up to singular and plural."""
    shorter, longer = sorted((first, second), key=len)
    # The endings are compared as well, for no short rule knows the singular of both "vases" and "gases".
    return longer in (shorter, f"{shorter}s", f"{shorter}es") or normalize_label(first) == normalize_label(second) != ""


def words_of(text: str) -> list[str]:
    """The words of a text in lower case."""
    return _WORD.findall(text.lower())


def to_ascii(text: str) -> str:
    """Typographic punctuation as it is typed, and letters without accents; other characters stay as they are."""
    decomposed = unicodedata.normalize("NFKD", text.translate(_TYPOGRAPHY))
    return unicodedata.normalize("NFKC", "".join(char for char in decomposed if not unicodedata.combining(char)))


def in_one_field(text: str, length: int = 64) -> str:
    """A text of any origin as it may stand between the bars of a line of a prompt."""
    printable = "".join(char if char.isprintable() and char != "|" else " " for char in text)
    return " ".join(printable.split())[:length].strip()


def _find_objects(text: str) -> list[Any] | None:
    """The list `objects` of the first JSON object that has one, whatever stands around it."""
    for value in _json_values(text):
        if isinstance(value, dict) and isinstance(value.get("objects"), list):
            return value["objects"]
    return None


def _json_values(text: str) -> Iterator[Any]:
    decoder = json.JSONDecoder()
    for start, _ in zip(re.finditer(r"\{", text), range(MAX_JSON_STARTS), strict=False):
        try:
            yield decoder.raw_decode(text, start.start())[0]
        except (ValueError, RecursionError):  # no JSON, a number of thousands of digits, or brackets too deep
            continue
