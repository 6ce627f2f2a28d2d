"""The USCDF text format: answers in which phrases carry masks, `<p> a red hat </p> [SEG]`.

This module is the only place that knows the grammar. An answer that was written by us is built with `render_phrase` and
`render_list`; an answer that a model wrote is read with `parse`, which accepts anything and always yields one mention
for each `[SEG]`, so that mentions and masks stay aligned.

Parsing rule, left to right: a `[SEG]` belongs to the phrase of the last closed `<p>...</p>` before it if no other `[SEG]`
came between, otherwise it has no phrase and stands for the query; a phrase without `[SEG]` is plain text. An inner `<p>`
restarts the phrase, a `</p>` without `<p>` and a `<p>` without `</p>` are ignored, an empty phrase counts as none.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

IMAGE_TOKEN = "<image>"
REGION_TOKEN = "<region>"
SEG_TOKEN = "[SEG]"
PHRASE_START = "<p>"
PHRASE_END = "</p>"
CONTROL_TOKENS = (IMAGE_TOKEN, SEG_TOKEN, PHRASE_START, PHRASE_END)
"""The tokens of the grammar that are tokens of the model too; `<region>` is rewritten before tokenisation."""

Piece = tuple[str, bool]
"""A piece of model output: its text, and whether it is a control token (a model may also spell "[SEG]" literally)."""

_TAG = re.compile("|".join(map(re.escape, CONTROL_TOKENS)))
_PHRASE = re.compile(rf"{re.escape(PHRASE_START)}[^<]*{re.escape(PHRASE_END)}\s*(?={re.escape(SEG_TOKEN)})")
_OPENING = frozenset("([{“‘«（【「『")
_CLOSING = frozenset(".,;:!?)]}”’»…、。，；：！？）】」』")


@dataclass(frozen=True)
class Mention:
    """What one `[SEG]` stands for.

    Attributes:
        phrase (`str`): the phrase before the `[SEG]`, or the query where it has none.
        span (`tuple[int, int]`, *optional*): character offsets with `clean_text[start:end] == phrase`; None where the
            `[SEG]` has no phrase.
    """

    phrase: str
    span: tuple[int, int] | None


@dataclass(frozen=True)
class ParsedAnswer:
    """A parsed answer.

    Attributes:
        text (`str`): the answer as it came, with its tags.
        clean_text (`str`): the answer without control tokens and without the spaces they leave behind.
        mentions (`tuple[Mention, ...]`): one for each `[SEG]` control token, in reading order.
    """

    text: str
    clean_text: str
    mentions: tuple[Mention, ...]


def render_phrase(phrase: str) -> str:
    """`"red hat"` -> `"<p> red hat </p> [SEG]"`; runs of whitespace become one space.

    Raises:
        ValueError: the phrase is empty or holds a control token.
    """
    words = " ".join(phrase.split())
    if not words:
        raise ValueError("a phrase that carries a mask must not be empty.")
    if _TAG.search(words) or REGION_TOKEN in words:
        raise ValueError(f"the phrase {phrase!r} holds a control token; escape it with escape_control_tokens first.")
    return f"{PHRASE_START} {words} {PHRASE_END} {SEG_TOKEN}"


def render_list(phrases: Sequence[str]) -> str:
    """Render phrases as an enumeration: "A", "A and B", "A, B, and C" with each of them as in `render_phrase`.

    Raises:
        ValueError: there is no phrase, or one of them is empty or holds a control token.
    """
    if not phrases:
        raise ValueError("render_list needs at least one phrase; an answer with nothing present carries no tags.")
    *head, last = map(render_phrase, phrases)
    if not head:
        return last
    return f"{head[0]} and {last}" if len(head) == 1 else f"{', '.join(head)}, and {last}"


def parse(pieces: str | Iterable[Piece], query: str = "") -> ParsedAnswer:
    """Read an answer; never raises on what a model emits.

    Args:
        pieces (`str` or iterable of `(text, is_control)`): a string is split at the control tokens. In pieces only
            those marked as control count as such: a text piece "[SEG]" is text, and stays in the clean text. Control
            pieces that the grammar does not know are dropped from the clean text.
        query (`str`, *optional*, defaults to `""`): the phrase of a `[SEG]` that has none of its own.

    Returns:
        `ParsedAnswer`: with as many mentions as there are `[SEG]` control tokens, for example for
        `"Sure, <p> dog </p> [SEG]."` the clean text `"Sure, dog."` and the mention `("dog", (6, 9))`.
    """
    texts, tags = _alternate(pieces)
    query = query.strip()
    clean: list[str] = []
    length = 0
    last_char = ""
    gap = ""  # whitespace since the last word that is not padding inside or between the tags of a phrase
    open_phrase = False
    start: int | None = None
    phrase: tuple[int, int] | None = None  # the last closed phrase, until a [SEG] takes it
    spans: list[tuple[int, int] | None] = []
    for text, before, after in zip(texts, ["", *tags], [*tags, ""], strict=True):
        word = text.strip()
        padded_left, padded_right = before == PHRASE_START, after in (PHRASE_END, SEG_TOKEN)
        if word:
            gap += "" if padded_left else text[: len(text) - len(text.lstrip())]
            joint = _joint(last_char, word[0], gap)
            tidy = _tidy(word)
            clean += [joint, tidy]
            if open_phrase and start is None:
                start = length + len(joint)
            length += len(joint) + len(tidy)
            last_char = word[-1]
            gap = "" if padded_right else text[len(text.rstrip()) :]
        elif not (padded_left or padded_right):
            gap += text
        if after == PHRASE_START:
            open_phrase, start = True, None
        elif after == PHRASE_END and open_phrase:
            open_phrase, phrase = False, None if start is None else (start, length)
        elif after == SEG_TOKEN:
            spans.append(phrase)
            phrase = None
    clean_text = "".join(clean)
    mentions = tuple(Mention(clean_text[slice(*span)] if span else query, span) for span in spans)
    raw = "".join(text + tag for text, tag in zip(texts, [*tags, ""], strict=True))
    return ParsedAnswer(text=raw, clean_text=clean_text, mentions=mentions)


def is_well_formed(pieces: str | Iterable[Piece]) -> bool:
    """Whether an answer keeps to the grammar: tags balanced and not nested, no phrase empty, each phrase followed by its
    `[SEG]` and each `[SEG]` directly after a phrase (whitespace between them allowed), no other control token."""
    texts, tags = _alternate(pieces)
    expected = {"": PHRASE_START, PHRASE_START: PHRASE_END, PHRASE_END: SEG_TOKEN, SEG_TOKEN: PHRASE_START}
    before = ""
    for text, tag in zip(texts, tags, strict=False):  # the text after the last tag is free
        blank = not text.strip()
        if tag != expected[before] or (tag == PHRASE_END and blank) or (tag == SEG_TOKEN and not blank):
            return False
        before = tag
    return before in ("", SEG_TOKEN)


def escape_control_tokens(text: str, tokens: Iterable[str]) -> str:
    """Make a user's text harmless: each occurrence of a token gets a space after its first character.

    `"[SEG]"` becomes `"[ SEG]"` and `"<p>"` becomes `"< p>"`, repeated until no token is left; idempotent.

    Args:
        text (`str`): what the user typed.
        tokens (iterable of `str`): all strings that the tokenizer would turn into a control token.

    Raises:
        ValueError: the text holds a token that a space cannot break, such as one of a single character.
    """
    tokens = sorted(set(tokens) - {""}, key=len, reverse=True)
    for token in tokens:
        if token in text and (token[0].isspace() or not token[1:].strip()):
            raise ValueError(f"the text holds the control token {token!r}, which cannot be escaped; remove it.")
    if not tokens:
        return text
    pattern = re.compile("|".join(map(re.escape, tokens)))
    while pattern.search(text):
        text = pattern.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)
    return text


def drop_phrases(answer: str) -> str:
    """Leave the phrases out and keep the masks: `"Sure, <p> the hat </p> [SEG]."` becomes `"Sure, [SEG]."`."""
    return _PHRASE.sub("", answer)


def count_seg(messages: Iterable[Mapping[str, str]]) -> int:
    """Number of `[SEG]` in the assistant turns of `[{"role", "content"}]`, which is the number of masks they need."""
    return sum(message["content"].count(SEG_TOKEN) for message in messages if message["role"] == "assistant")


def validate_row(row: Mapping[str, Any], image_size: tuple[int, int] | None = None) -> None:
    """Check the invariant of a USCDF row; masks are compared by their `size` and not decoded.

    - as many `[SEG]` in assistant turns as masks, as many `<region>` in user turns as regions;
    - `<p>` and `</p>` balanced and not nested in each assistant turn;
    - `<image>` exactly once, in the first user turn; not at all in a row without image;
    - every mask has the image's size;
    - no other control token where it does not belong: `[SEG]`, `<p>`, `</p>` only in assistant turns, `<image>` and
      `<region>` only in user turns.

    Args:
        row (`Mapping`): `image_id`, `messages` (`[{"role", "content"}]`), `masks` (`[{"size": [h, w], "counts": str}]`),
            `regions` (`[[x1, y1, x2, y2]]`) and, where it is loaded, `image`.
        image_size (`tuple[int, int]`, *optional*): (height, width) of the image. Without it the masks are compared with
            each other.

    Raises:
        ValueError: lists everything that is wrong, with the counts.
    """
    messages, masks, regions = row["messages"], row["masks"], row["regions"]
    problems = list(_turn_problems(messages))

    n_seg, n_masks = count_seg(messages), len(masks)
    if n_seg != n_masks:
        problems.append(f"{n_seg} {SEG_TOKEN} in assistant turns but {n_masks} masks")
    user_turns = [message["content"] for message in messages if message["role"] == "user"]
    n_region = sum(turn.count(REGION_TOKEN) for turn in user_turns)
    if n_region != len(regions):
        problems.append(f"{n_region} {REGION_TOKEN} in user turns but {len(regions)} regions")

    has_image = image_size is not None or row.get("image") is not None or bool(masks or regions)
    n_image = [turn.count(IMAGE_TOKEN) for turn in user_turns]
    if sum(n_image) > 1 or any(n_image[1:]):
        problems.append(f"{IMAGE_TOKEN} must stand once, in the first user turn; user turns hold {n_image}")
    elif has_image and sum(n_image) == 0:
        problems.append(f"the row has an image but no {IMAGE_TOKEN} in its first user turn")
    elif not has_image and "image" in row and sum(n_image) == 1:
        problems.append(f"the row has an {IMAGE_TOKEN} but no image")

    sizes = [tuple(mask["size"]) for mask in masks]
    expected = tuple(image_size) if image_size is not None else (sizes[0] if sizes else None)
    wrong = [(index, size) for index, size in enumerate(sizes) if size != expected]
    if wrong:
        index, size = wrong[0]
        problems.append(
            f"{len(wrong)} of {n_masks} masks do not have the size (h, w) = {expected}, the first is mask {index}: {size}"
        )
    if problems:
        raise ValueError(f"USCDF row {row['image_id']!r}: " + "; ".join(problems) + ".")


def _turn_problems(messages: Sequence[Mapping[str, str]]) -> Iterator[str]:
    """What is wrong with the roles and tags of single turns."""
    if not any(message["role"] == "user" for message in messages):
        yield f"no user turn among {len(messages)} messages"
    for index, message in enumerate(messages):
        role, content = message["role"], message["content"]
        if role not in ("system", "user", "assistant"):
            yield f"message {index} has the role {role!r}, expected system, user or assistant"
            continue
        allowed = {"user": (IMAGE_TOKEN, REGION_TOKEN), "assistant": (SEG_TOKEN, PHRASE_START, PHRASE_END)}.get(
            role, ()
        )
        for token in (*CONTROL_TOKENS, REGION_TOKEN):
            if token in content and token not in allowed:
                yield f"message {index} ({role}) holds {content.count(token)} {token}"
        tags = [tag for tag in _TAG.findall(content) if tag in (PHRASE_START, PHRASE_END)]
        if role == "assistant" and tags != [PHRASE_START, PHRASE_END] * (len(tags) // 2):
            n_start, n_end = tags.count(PHRASE_START), tags.count(PHRASE_END)
            yield f"message {index} has unbalanced or nested tags: {n_start} {PHRASE_START}, {n_end} {PHRASE_END}"


def _alternate(pieces: str | Iterable[Piece]) -> tuple[list[str], list[str]]:
    """Texts and control tokens in alternation, `len(texts) == len(tags) + 1`."""
    if isinstance(pieces, str):
        return _TAG.split(pieces), _TAG.findall(pieces)
    chunks: list[list[str]] = [[]]
    tags: list[str] = []
    for text, is_control in pieces:
        if is_control:
            tags.append(text)
            chunks.append([])
        else:
            chunks[-1].append(text)
    return ["".join(chunk) for chunk in chunks], tags


def _tidy(text: str) -> str:
    """Collapse whitespace, keeping line breaks."""
    return re.sub(r" ?\n ?", "\n", re.sub(r"[^\S\n]+", " ", text))


def _joint(left: str, right: str, gap: str) -> str:
    """What stands in the clean text between two characters from which control tokens and `gap` were removed."""
    if not left or right in _CLOSING or left in _OPENING:
        return ""
    if gap:
        return "\n" * gap.count("\n") or " "
    # Some tokenizers swallow the spaces around special tokens: give words that would run together their space back.
    return " " if _is_word(right) and (_is_word(left) or left in ".,;:!?") else ""


def _is_word(char: str) -> bool:
    """A letter or digit of a script that puts spaces between words (CJK blocks begin at U+2E80)."""
    return char.isalnum() and ord(char) < 0x2E80


def conversation_of(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Messages of a USCDF row in the form of `apply_chat_template`: the first user turn's `<image>` becomes the image."""
    conversation: list[dict[str, Any]] = []
    for message in row["messages"]:
        text: str = message["content"]
        content: list[dict[str, Any]] = []
        if message["role"] == "user" and not conversation and IMAGE_TOKEN in text:
            content.append({"type": "image", "image": row["image"]})
            text = text.replace(IMAGE_TOKEN, "", 1).strip()
        content.append({"type": "text", "text": text})
        conversation.append({"role": message["role"], "content": content})
    return conversation
