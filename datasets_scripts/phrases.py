"""Turns about free phrases: referring expressions, reasoning questions, grounded captions and regions.

`conversations.py` words questions about labels, whose grammar it knows; here the wording comes from an annotator.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mglmm.processing.uscdf import CONTROL_TOKENS, REGION_TOKEN, escape_control_tokens, render_list, render_phrase

from . import phrase_templates, templates
from .conversations import Turn, listed
from .templates import choose, loosen

Rle = Mapping[str, Any]


@dataclass(frozen=True)
class Expression:
    """What somebody asked for, and the union of what it means; `mask` is `None` where nothing fits."""

    text: str
    mask: Rle | None = None


@dataclass(frozen=True)
class Span:
    """Characters `start:end` of a caption and the mask they carry."""

    start: int
    end: int
    mask: Rle


def unquote(text: str) -> str:
    """The text without blanks and quotes around it; the quotes of a quotation in it stay, at its ends too."""
    inner = text.strip().strip('"').strip()
    return text.strip() if '"' in inner else inner


def clean(text: str) -> str:
    """An annotator's text without control tokens, with single blanks, and without blanks or quotes around it."""
    return unquote(re.sub(r"\s+", " ", _escaped(text)))


def clean_lines(text: str) -> str:
    """A text of several lines without control tokens, blanks at line ends, and more than one empty line in a row."""
    text = "\n".join(line.rstrip() for line in _escaped(text).splitlines())
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def clean_caption(text: str) -> str:
    """The same as `clean` for a caption, which raises if nothing is left."""
    caption = clean(text)
    if not caption:
        raise ValueError("empty caption")
    return caption


def clean_phrase(text: str) -> str:
    """The same for what goes between `<p>` and `</p>`: lower case, without a final full stop. Raises if nothing is left."""
    phrase = clean(text).rstrip(" .,;:").lower()
    if not phrase:
        raise ValueError("empty phrase")
    return phrase


def ask_for_expression(rng: random.Random, expression: Expression) -> Turn:
    """One expression: its mask, or a refusal that names it."""
    phrase = clean_phrase(expression.text)
    question = loosen(rng, choose(rng, phrase_templates.EXPRESSION_QUESTIONS).format(x=phrase))
    if expression.mask is None:
        answer = choose(rng, phrase_templates.ABSENT_EXPRESSION_ANSWERS, first=0.4)
        return Turn(question, answer.format(y=f'"{phrase}"'))
    answer = choose(rng, templates.PRESENT_ANSWERS, first=0.6).format(p=render_phrase(phrase))
    return Turn(question, answer, (expression.mask,))


def ask_for_expressions(rng: random.Random, expressions: Sequence[Expression]) -> Turn:
    """One question for several expressions, in their order; those that nothing fits are refused by name after the others."""
    phrases = [clean_phrase(expression.text) for expression in expressions]
    quoted = [f'"{phrase}"' for phrase in phrases]
    question = loosen(rng, choose(rng, phrase_templates.SEVERAL_EXPRESSIONS_QUESTIONS).format(x=listed(quoted)))
    masks = tuple(expression.mask for expression in expressions if expression.mask is not None)
    present = [phrase for phrase, e in zip(phrases, expressions, strict=True) if e.mask is not None]
    absent = [name for name, e in zip(quoted, expressions, strict=True) if e.mask is None]
    if not present:
        return Turn(
            question, choose(rng, phrase_templates.ABSENT_EXPRESSION_ANSWERS, first=0.4).format(y=listed(absent, "or"))
        )
    answers = templates.SEVERAL_ANSWERS if len(present) > 1 else templates.PRESENT_ANSWERS
    answer = choose(rng, answers, first=0.6).format(p=render_list(present))
    if absent:
        answer += " " + choose(rng, templates.PARTLY_ABSENT_TAILS).format(y=listed(absent, "or"))
    return Turn(question, answer, masks)


def refer_to(rng: random.Random, expressions: Sequence[Expression], per_row: int = 3) -> list[list[Turn]]:
    """
    All expressions of one image as conversations of at most `per_row` expressions each (the originals' three per sample),
    in random order; now and then two or three of a conversation are asked for in one question.
    """
    order = rng.sample(list(expressions), len(expressions))
    conversations = []
    for start in range(0, len(order), per_row):
        group = order[start : start + per_row]
        turns = []
        while group:
            count = min(len(group), rng.choice((1, 1, 1, 1, 2, 3)))
            taken, group = group[:count], group[count:]
            if count == 1:
                turns.append(ask_for_expression(rng, taken[0]))
            else:
                turns.append(ask_for_expressions(rng, taken))
        conversations.append(turns)
    return conversations


def grounded(caption: str, spans: Iterable[Span]) -> tuple[str, tuple[Rle, ...]]:
    """
    A caption with `<p> span </p> [SEG]` for each span, and the masks in that order.

    Spans are trimmed of white space and outer punctuation; of overlapping ones the longest stays; those that are empty or lie
    outside the caption are dropped with their masks. Control tokens in the caption are broken up.
    """
    chosen: list[Span] = []
    for span in sorted(spans, key=lambda s: (s.start - s.end, s.start)):
        start, end = max(span.start, 0), min(span.end, len(caption))
        words = re.search(r"[^\s,.;:\"'](.*[^\s,.;:\"'])?", caption[start:end], re.DOTALL)
        start, end = (start + words.start(), start + words.end()) if words else (end, end)
        if start < end and all(end <= other.start or start >= other.end for other in chosen):
            chosen.append(Span(start, end, span.mask))
    chosen.sort(key=lambda span: span.start)
    pieces, position = [], 0
    for span in chosen:
        pieces += [_escaped(caption[position : span.start]), render_phrase(_escaped(caption[span.start : span.end]))]
        position = span.end
    answer = "".join([*pieces, _escaped(caption[position:])])
    return re.sub(r"\s+", " ", answer).strip(), tuple(span.mask for span in chosen)


def _escaped(text: str) -> str:
    return escape_control_tokens(text, (*CONTROL_TOKENS, REGION_TOKEN))
