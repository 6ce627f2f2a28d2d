"""What a run has come to, in numbers: how much there is, how good its form is, and what it cost."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..masks import area, union
from .records import ROOT, Context, Exchange, Tree
from .results import Result, read_results, read_settings

# Rules whose breach makes a model answer again, as they stand in `label_rules` and `context_rules`.
HARD_RULES = {
    "L1": "answers about what was asked",
    "L2": "short label",
    "L4": "one or more plain sentences",
    "L5": "silent about the drawing",
    "L8": "no caption twice",
    "C1": "tags well formed",
    "C2": "each target tagged once",
    "C3": "short phrases",
    "C4": "phrases name their targets",
    "C5": "plain prose",
    "C7": "no list of labels",
}
# Those whose breach is noted, and of what.
SOFT_RULES = {
    "L3": "label says nothing",
    "L6": "caption does not name the label",
    "L7": "label of what it lies in",
    "C2": "tags were repaired",
    "C4": "phrase does not name its target",
    "C6": "singular for several things",
    "C8": "sentence was repeated",
}
MAX_LABELS = 30
MASKS_PER_ITEM, SUBTREES_PER_IMAGE = (6, 16), (1, 3)  # about those of the paper's dataset
DESCRIBED = ("ok", "partial")
_TAG = re.compile(r"</?obj_\d+>")
_NUMBER = re.compile(r":m\d+$")  # in duplicate_of:m0003


@dataclass
class RuleCount:
    """Of `asked` exchanges, how many broke a rule with the first answer, and how many with the last one."""

    asked: int = 0
    first: int = 0
    last: int = 0

    @property
    def passed_first(self) -> float:
        return 1 - self.first / self.asked

    @property
    def passed(self) -> float:
        return 1 - self.last / self.asked


@dataclass
class Statistics:
    """
    Attributes:
        done, failed: Images.
        reasons: Why images failed.
        items: Descriptions by status.
        subtrees: Described objects; `described` is the number of all descriptions that are ok or partial, and `masks` and
            `words` are theirs.
        objects: Masks that were labelled, by status.
        rules: By code, of those whose breach makes a model answer again.
        flags: Number of masks (L..) and descriptions (C..) with a breach that is only noted, by code.
        exchanges, requests: Conversations, and answers in them.
        labels: Objects of the trees by label.
        dropped: Masks that did not come into a tree, by reason.
        coverage: Share of the image that the targets of its description cover, mean over images; `None` without any.
    """

    done: int = 0
    failed: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    items: Counter[str] = field(default_factory=Counter)
    subtrees: int = 0
    described: int = 0
    masks: int = 0
    words: int = 0
    objects: Counter[str] = field(default_factory=Counter)
    rules: dict[str, RuleCount] = field(default_factory=dict)
    flags: Counter[str] = field(default_factory=Counter)
    exchanges: int = 0
    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    labels: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    coverages: list[float] = field(default_factory=list, repr=False)

    @property
    def retries(self) -> int:
        return self.requests - self.exchanges

    @property
    def masks_per_item(self) -> float:
        return self.masks / max(self.described, 1)

    @property
    def words_per_item(self) -> float:
        return self.words / max(self.described, 1)

    @property
    def subtrees_per_image(self) -> float:
        return self.subtrees / max(self.done, 1)

    @property
    def coverage(self) -> float | None:
        return sum(self.coverages) / len(self.coverages) if self.coverages else None

    @property
    def top_labels(self) -> list[tuple[str, int]]:
        """The most frequent labels; of equally frequent ones in the order of the alphabet."""
        return sorted(self.labels.items(), key=lambda label: (-label[1], label[0]))[:MAX_LABELS]

    @property
    def warnings(self) -> list[str]:
        """What differs much from the paper's dataset."""
        if not self.described:
            return []
        return [
            f"{value:.1f} {what}, not {low} to {high} as in MGSCData"
            for value, what, (low, high) in (
                (self.masks_per_item, "masks a description", MASKS_PER_ITEM),
                (self.subtrees_per_image, "described objects an image", SUBTREES_PER_IMAGE),
            )
            if not low <= value <= high
        ]

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "images": {"done": self.done, "failed": self.failed, "reasons": dict(self.reasons.most_common())},
            "items": dict(self.items.most_common()),
            "masks_per_item": round(self.masks_per_item, 4),
            "words_per_item": round(self.words_per_item, 4),
            "subtrees_per_image": round(self.subtrees_per_image, 4),
            "coverage": None if self.coverage is None else round(self.coverage, 4),
            "objects": dict(self.objects.most_common()),
            "rules": {
                code: {
                    "asked": rule.asked,
                    "passed_first": round(rule.passed_first, 4),
                    "passed": round(rule.passed, 4),
                }
                for code, rule in self.rules.items()
            },
            "flags": dict(sorted(self.flags.items())),
            "requests": self.requests,
            "retries": self.retries,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "labels": dict(self.top_labels),
            "dropped": dict(self.dropped.most_common()),
            "warnings": self.warnings,
        }

    def __str__(self) -> str:
        coverage = "-" if self.coverage is None else f"{self.coverage:.1%}"
        lines = [
            f"images            {self.done:,} done, {self.failed:,} failed",
            f"descriptions      {_counts(self.items)}",
            f"  masks           {self.masks_per_item:.1f} each",
            f"  words           {self.words_per_item:.1f} each",
            f"  of objects      {self.subtrees_per_image:.1f} an image",
            f"  coverage        {coverage} of an image",
            f"labelled masks    {_counts(self.objects)}",
            f"dropped masks     {_counts(self.dropped)}",
            f"requests          {self.requests:,}, of which {self.retries:,} to answer again",
            f"tokens            {self.prompt_tokens:,} in prompts, {self.completion_tokens:,} in answers",
        ]
        if self.rules:
            lines += ["", f"{'rule':<36}{'answers':>10}{'first kept':>12}{'last kept':>12}"]
        for code, rule in self.rules.items():
            name = f"{code} {HARD_RULES.get(code, '')}".rstrip()
            lines.append(f"{name:<36}{rule.asked:>10,}{rule.passed_first:>12.1%}{rule.passed:>12.1%}")
        if self.flags:
            lines += ["", f"{'noted':<36}{'times':>10}"]
        for code, count in sorted(self.flags.items()):
            name = f"{code} {SOFT_RULES.get(code, '')}".rstrip()
            lines.append(f"{name:<36}{count:>10,}")
        if self.labels:
            lines += ["", "labels: " + ", ".join(f"{label} {count:,}" for label, count in self.top_labels)]
        lines += [f"failed {count:,} x {reason}" for reason, count in self.reasons.most_common()]
        return "\n".join([*lines, *(f"warning: {warning}" for warning in self.warnings)])


def collect(run: Path) -> Statistics:
    """Read all stage files of a run. Raises `ValueError` if the folder is of no run."""
    read_settings(run)
    statistics = Statistics()
    for result in read_results(run):
        _add(statistics, result)
    counted = statistics.rules
    others = sorted(counted.keys() - HARD_RULES.keys())  # an answer that was cut, at either step
    for code in others:
        counted[code].asked = statistics.exchanges
    statistics.rules = {code: counted[code] for code in [*HARD_RULES, *others] if code in counted}
    return statistics


def _add(statistics: Statistics, result: Result) -> None:
    """Count one image; what a failed one cost is counted, too."""
    items = result.contexts["items"] if result.contexts else []
    _add_exchanges(statistics, "L", result.labels["exchanges"] if result.labels else [])
    _add_exchanges(statistics, "C", [item["exchange"] for item in items if "exchange" in item])
    if result.geometry:
        statistics.dropped.update(_NUMBER.sub("", mask["reason"]) for mask in result.geometry["dropped"])
    if result.problem:
        statistics.failed += 1
        statistics.reasons[result.problem] += 1
        return
    assert result.geometry and result.labels and result.tree
    statistics.done += 1
    for label in result.labels["objects"].values():
        statistics.objects[label["status"]] += 1
        statistics.flags.update(label["flags"])
    statistics.labels.update(node["label"] for node in result.tree["nodes"])
    for item in items:
        statistics.items[item["status"]] += 1
        statistics.flags.update(item["flags"])
        if item["status"] in DESCRIBED:
            statistics.described += 1
            statistics.subtrees += item["about"] != ROOT
            statistics.masks += len(item["targets"])
            statistics.words += len(_TAG.sub("", item["tagged"]).split())
            if item["about"] == ROOT:
                image = result.geometry["image"]
                statistics.coverages.append(_covered(item, result.tree) / (image["width"] * image["height"]))


def _covered(item: Context, tree: Tree) -> int:
    """Pixels of the union of an item's targets."""
    rles = [node["segmentation"] for node in tree["nodes"] if node["id"] in item["targets"]]
    return area(union(rles)) if rles else 0


def _add_exchanges(statistics: Statistics, stage: str, exchanges: Iterable[Exchange]) -> None:
    for exchange in exchanges:
        attempts = exchange["attempts"]
        statistics.exchanges += 1
        statistics.requests += len(attempts)
        statistics.prompt_tokens += exchange["prompt_tokens"]
        statistics.completion_tokens += exchange["completion_tokens"]
        for code in HARD_RULES:
            if code.startswith(stage):
                statistics.rules.setdefault(code, RuleCount()).asked += 1
        for code in set(attempts[0]):
            statistics.rules.setdefault(code, RuleCount()).first += 1
        for code in set(attempts[-1]):
            statistics.rules.setdefault(code, RuleCount()).last += 1


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counter.most_common()) or "none"
