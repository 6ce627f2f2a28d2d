"""
What a prompt says of each object, as one line and back.

Prompts are made of these lines; who answers by rules, in place of a language model, reads them back from the prompt.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

LABELING_HEAD, CONTEXT_HEAD = "Objects:", "Targets:"  # the line before the objects of a prompt
SUBJECT_HEAD = "Described object:"  # before what a description is about, where that is not the whole image


@dataclass(frozen=True)
class ObjectFacts:
    """
    A mask that is to be named.

    Args:
        id: `m0001`.
        color: Name of its outline's colour.
        box: x, y, width, height as shares of the image, with two decimals.
        area_percent: Of the image, with one decimal.
        parent: Label of what it lies in, or "whole image".
        known: What its source calls it, or "".
    """

    id: str
    color: str
    box: tuple[float, float, float, float]
    area_percent: float
    parent: str
    known: str = ""

    def __str__(self) -> str:
        known = f" | said to be: {self.known}" if self.known else ""
        return (
            f"{self.id} | outline: {self.color} | box: {_box(self.box)} | area: {self.area_percent:.1f} % | "
            f"in: {self.parent}{known}"
        )


@dataclass(frozen=True)
class TargetFacts:
    """
    An object that a description has to name.

    Args:
        id: `obj_1`.
        depth: 1 for a child of what is described, 2 for a part of that; its line is indented so.
        box: x, y, width, height as shares of the image, with two decimals.
    """

    id: str
    label: str
    count: int
    box: tuple[float, float, float, float]
    caption: str
    depth: int = 1

    def __str__(self) -> str:
        indent = "  " * (self.depth - 1)
        return f"{indent}{self.id} | {self.label} | count: {self.count} | box: {_box(self.box)} | {self.caption}"


OBJECT_LINE = re.compile(
    r"(?P<id>m\d+) \| outline: (?P<color>[^|]+) \| box: \((?P<box>[\d., ]+)\) \| area: (?P<area>[\d.]+) % \| "
    r"in: (?P<parent>[^|]+?)(?: \| said to be: (?P<known>[^|]+))?$"
)
TARGET_LINE = re.compile(
    r"(?P<indent> *)(?P<id>obj_\d+) \| (?P<label>[^|]+) \| count: (?P<count>\d+) \| box: \((?P<box>[\d., ]+)\) \| "
    r"(?P<caption>[^|]*)$"
)


SUBJECT_LINE = re.compile(rf"{SUBJECT_HEAD} (?P<label>[^|]+) \| count: (?P<count>\d+)$", re.MULTILINE)


def subject_line(label: str, count: int) -> str:
    """What a description is about."""
    return f"{SUBJECT_HEAD} {label} | count: {count}"


def read_subject(text: str) -> tuple[str, int] | None:
    """Label and count of what a prompt wants described; `None` for the whole image."""
    found = SUBJECT_LINE.search(text)
    return (found["label"], int(found["count"])) if found else None


def read_objects(text: str) -> list[ObjectFacts]:
    """The object lines of a prompt, in order."""
    return [
        ObjectFacts(m["id"], m["color"], _numbers(m["box"]), float(m["area"]), m["parent"], m["known"] or "")
        for m in map(OBJECT_LINE.match, text.splitlines())
        if m
    ]


def read_targets(text: str) -> list[TargetFacts]:
    """The target lines of a prompt, in order."""
    return [
        TargetFacts(m["id"], m["label"], int(m["count"]), _numbers(m["box"]), m["caption"], len(m["indent"]) // 2 + 1)
        for m in map(TARGET_LINE.match, text.splitlines())
        if m
    ]


def _box(box: tuple[float, float, float, float]) -> str:
    return f"({', '.join(f'{side:.2f}' for side in box)})"


def _numbers(text: str) -> Any:
    return tuple(float(number) for number in text.split(","))
