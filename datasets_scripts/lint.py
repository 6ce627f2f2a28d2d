"""
Checks of prepared data: every row of every configuration and split, read as a stream.

Memory stays flat but for one digest per distinct image. Images are compared by a digest of their encoded bytes: this finds
copies under any name at the speed of reading, and misses pictures that were encoded again; a digest of decoded pixels would
cost some ten milliseconds a picture and miss them, too, where the encoder loses anything. Images are decoded only where
their last bytes look cut off.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
from PIL import Image
from tqdm import tqdm

from mglmm.processing.images import load_image
from mglmm.processing.rle import decode_mask
from mglmm.processing.uscdf import PHRASE_END, SEG_TOKEN, conversation_of, parse, validate_row

from .explorer import Sample, Sampler, render_explorer
from .features import FEATURES
from .sources import displayed_size

if TYPE_CHECKING:
    from mglmm.processing import MglmmProcessor

KINDS = (
    "tags differ from masks",
    "unbalanced tags",
    "malformed conversation",
    "empty mask",
    "full mask",
    "broken mask",
    "wrong-size mask",
    "region outside the image",
    "broken image",
    "image in train and held out",
    "[SEG] lost to truncation",
    "phrase never varies",
)
MIN_PHRASES = 20  # fewer of one task may be the same by chance
MAX_LISTED = 100  # issues of a kind that are kept; all are counted
SHOWN = 10  # issues of a kind that the printed report names
TOLERANCE = 0.01  # pixels by which a box may leave the image: boxes are stored as float32

# What `validate_row` says -> the kind.
_PROBLEMS = (
    (re.compile(r"\d+ \[SEG\] in assistant turns"), "tags differ from masks"),
    (re.compile(r"message \d+ has unbalanced"), "unbalanced tags"),
    (re.compile(r"\d+ of \d+ masks do not have the size"), "wrong-size mask"),
)
_WITHOUT_MASK = re.compile(rf"{re.escape(PHRASE_END)}(?!\s*{re.escape(SEG_TOKEN)})")


@dataclass(frozen=True)
class Issue:
    """One defect of one row; `row` is "config/split/index"."""

    kind: str
    row: str
    image_id: str
    message: str

    def __str__(self) -> str:
        return f"{self.row} (image {self.image_id}): {self.message}"


@dataclass
class LintReport:
    """
    What was read and found.

    Attributes:
        rows: Number of rows by (config, split).
        counts: Number of issues by kind.
        issues: The first `MAX_LISTED` of each kind, in the order of reading.
    """

    rows: Counter[tuple[str, str]] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    issues: list[Issue] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        return not self.counts

    def add(self, issue: Issue) -> None:
        self.counts[issue.kind] += 1
        if self.counts[issue.kind] <= MAX_LISTED:
            self.issues.append(issue)

    def __str__(self) -> str:
        lines = [f"{config}/{split}: {rows:,} rows" for (config, split), rows in self.rows.items()]
        for kind in KINDS:
            if self.counts[kind]:
                named = [issue for issue in self.issues if issue.kind == kind][:SHOWN]
                lines += [f"{kind}: {self.counts[kind]:,}", *(f"  {issue}" for issue in named)]
                if self.counts[kind] > len(named):
                    lines.append(f"  and {self.counts[kind] - len(named):,} more")
        return "\n".join([*lines, "clean" if self.clean else f"{self.counts.total():,} issues"])


def lint(
    path: str | Path,
    *,
    config: str | None = None,
    processor: MglmmProcessor | None = None,
    max_length: int | None = None,
    html: Path | None = None,
    samples: int = 24,
    seed: int = 0,
) -> LintReport:
    """
    Check a prepared dataset.

    Args:
        path: Folder or hub id.
        config: Read only this configuration.
        processor: With it, answers are checked for `[SEG]`s that lie beyond the context.
        max_length: Of the context in tokens, image tokens included; the processor's own by default.
        html: File for a page of `samples` rows, drawn with `seed` from all configurations, splits and tasks.

    Raises:
        ValueError: there is nothing to read, or the columns are not those of USCDF.
    """
    context = None if processor is None else _Context(processor, max_length)
    report, sampler = LintReport(), Sampler(samples if html else 0, seed)
    duplicates, variety = _Duplicates(), _Variety()
    for name in [config] if config else _configs_of_rows(str(path)):
        for split, dataset in datasets.load_dataset(str(path), name, streaming=True).items():
            total = dataset.info.splits[split].num_examples if dataset.info.splits else None
            for index, row in enumerate(tqdm(_undecoded(dataset), f"{name}/{split}", total, unit="row")):
                row_id, facts = f"{name}/{split}/{index}", facts_of(row["image"])
                found = [*row_issues(row, facts)]
                if facts is not None:
                    found += duplicates.look(facts.digest, split, row_id)
                if context is not None and not found:
                    found += context.look(row)
                variety.look(row, f"{name}/{split}", row_id)
                report.rows[name, split] += 1
                for kind, message in found:
                    report.add(Issue(kind, row_id, row["image_id"], message))
                sampler.offer(
                    (name, split, row["task"]), Sample(row_id, row, tuple(f"{kind}: {what}" for kind, what in found))
                )
    for issue in variety.issues():
        report.add(issue)
    if html is not None:
        html.write_text(render_explorer(sampler.samples(), str(path), str(report)), encoding="utf-8")
    return report


def _configs_of_rows(path: str) -> list[str]:
    """The configurations of a dataset, without those that hold something else than conversations beside them."""
    names = datasets.get_dataset_config_names(path)
    features = [datasets.load_dataset_builder(path, name).info.features or FEATURES for name in names]
    return [name for name, found in zip(names, features, strict=True) if "messages" in found] or names


def _undecoded(dataset: datasets.IterableDataset) -> datasets.IterableDataset:
    columns = dataset.features or {}
    if missing := [name for name in FEATURES if name not in columns]:
        raise ValueError(f"the columns {missing} are missing: is this data that `mglmm prepare` wrote?")
    if not isinstance(columns["image"], datasets.Image):
        raise ValueError("the column image holds references: join them with load_with_images first")
    return dataset.cast_column("image", datasets.Image(decode=False))


# ------------------------------------------------------------------ one image


@dataclass(frozen=True)
class ImageFacts:
    """Digest of the encoded image, (height, width) as displayed, or what keeps it from being read."""

    digest: bytes = b""
    size: tuple[int, int] | None = None
    problem: str = ""


def facts_of(image: Mapping[str, Any] | None) -> ImageFacts | None:
    """Of an undecoded image as `datasets` gives it; `None` for a row without image."""
    if image is None:
        return None
    return _facts_of_bytes(image["bytes"]) if image["bytes"] is not None else _facts_of_file(image["path"])


@lru_cache(maxsize=256)  # the rows of one image follow each other
def _facts_of_file(path: str) -> ImageFacts:
    try:
        return _facts_of_bytes(Path(path).read_bytes())
    except OSError as error:
        return ImageFacts(problem=f"image file cannot be read ({type(error).__name__})")


def _facts_of_bytes(content: bytes) -> ImageFacts:
    digest = hashlib.blake2b(content, digest_size=16).digest()
    try:
        size = displayed_size(io.BytesIO(content))
        if not _looks_complete(content):
            load_image(content)
    except ValueError as error:
        return ImageFacts(digest, problem=str(error))
    return ImageFacts(digest, size)


def _looks_complete(content: bytes) -> bool:
    """Whether a JPEG ends after its last scan, a PNG with its last chunk; of other formats nobody knows."""
    if content.startswith(b"\xff\xd8"):
        return content.rfind(b"\xff\xd9") > content.rfind(b"\xff\xda")
    return content.startswith(b"\x89PNG") and b"IEND" in content[-12:]


# ------------------------------------------------------------------ one row


def row_issues(row: Mapping[str, Any], facts: ImageFacts | None) -> Iterator[tuple[str, str]]:
    """(kind, message) of everything that is wrong within one row; at most one of each kind."""
    size = facts.size if facts else None
    if facts and facts.problem:
        yield "broken image", facts.problem
    of_masks = list(_mask_problems(row["masks"]))
    for kind in dict.fromkeys(kind for _, kind, _ in of_masks):
        numbers = [number for number, of_kind, _ in of_masks if of_kind == kind]
        reason = next((why for _, of_kind, why in of_masks if of_kind == kind), "")
        yield kind, f"{_numbered('mask', numbers)} of {len(row['masks'])}{reason}"
    if size is not None:
        outside = [number for number, region in enumerate(row["regions"]) if not _lies_inside(region, size)]
        if outside:
            first = [round(side, 1) for side in row["regions"][outside[0]]]
            yield (
                "region outside the image",
                f"{_numbered('region', outside)}: {first} in {size[1]}x{size[0]} (width x height)",
            )
    if any(message["role"] is None or message["content"] is None for message in row["messages"]):
        yield "malformed conversation", "a message has no role or no text"
        return
    yield from _conversation_problems(row, [number for number, kind, _ in of_masks if kind == "broken mask"], size)


def _mask_problems(masks: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, str, str]]:
    for number, mask in enumerate(masks):
        try:
            pixels = decode_mask(mask)
        except ValueError as error:
            yield number, "broken mask", f": {error}"
            continue
        if not pixels.any():
            yield number, "empty mask", ""
        elif pixels.all():
            yield number, "full mask", " covers every pixel"


def _conversation_problems(
    row: Mapping[str, Any], broken: Sequence[int], size: tuple[int, int] | None
) -> Iterator[tuple[str, str]]:
    masks = row["masks"]
    sizes = [mask["size"] for number, mask in enumerate(masks) if number not in broken]
    # Broken masks are named elsewhere: here they have the size that is expected.
    whole = {"size": size or (sizes[0] if sizes else (1, 1))}
    checked = [whole if number in broken else mask for number, mask in enumerate(masks)]
    problems: dict[str, list[str]] = {}
    try:
        validate_row({**row, "masks": checked}, size)
    except ValueError as error:
        for problem in str(error).partition(": ")[2].removesuffix(".").split("; "):
            kind = next((kind for pattern, kind in _PROBLEMS if pattern.match(problem)), "malformed conversation")
            problems.setdefault(kind, []).append(problem)
    if not problems:
        for number, message in enumerate(row["messages"]):
            if message["role"] == "assistant" and _WITHOUT_MASK.search(message["content"]):
                problems["unbalanced tags"] = [f"message {number} has a phrase without {SEG_TOKEN}"]
    for kind, messages in problems.items():
        yield kind, "; ".join(messages)


def _lies_inside(region: Sequence[float], size: tuple[int, int]) -> bool:
    left, top, right, bottom = region
    if not all(map(math.isfinite, region)) or left >= right or top >= bottom:
        return False
    height, width = size
    return min(left, top) >= -TOLERANCE and right <= width + TOLERANCE and bottom <= height + TOLERANCE


def _numbered(noun: str, numbers: Sequence[int]) -> str:
    """ "mask 3", "masks 1, 2, 5"; at most eight numbers."""
    listed = ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
    return f"{noun}{'s' * (len(numbers) > 1)} {listed}"


# ------------------------------------------------------------------ across rows


class _Duplicates:
    """Images that are in train and in a held-out split. In several configurations, or held out twice, they may be."""

    def __init__(self) -> None:
        self._first: dict[bytes, tuple[bool, str] | None] = {}  # None: told already

    def look(self, digest: bytes, split: str, row_id: str) -> Iterator[tuple[str, str]]:
        trained = split.startswith("train")
        first = self._first.setdefault(digest, (trained, row_id)) if digest else None
        if first is not None and first[0] != trained:
            self._first[digest] = None
            yield "image in train and held out", f"same file as in {first[1]}"


class _Variety:
    """Whether the phrases of each task are more than one: else the text carries nothing to learn."""

    def __init__(self) -> None:
        self._phrases: dict[str, tuple[str, int, str, str]] = {}
        self._varied: set[str] = set()

    def look(self, row: Mapping[str, Any], split: str, row_id: str) -> None:
        group = f"{split}, task {row['task']}"
        if group in self._varied:
            return
        answers = [message["content"] for message in row["messages"] if message["role"] == "assistant"]
        for answer in answers:
            for mention in parse(answer or "").mentions:
                phrase = mention.phrase.casefold()
                first, count, *where = self._phrases.get(group, (phrase, 0, row_id, row["image_id"]))
                self._phrases[group] = (first, count + 1, *where)
                if mention.span is not None and phrase != first:
                    self._varied.add(group)

    def issues(self) -> Iterator[Issue]:
        for group, (phrase, count, row_id, image_id) in self._phrases.items():
            if group not in self._varied and phrase and count >= MIN_PHRASES:
                message = f"all {count:,} phrases of {group} are {phrase!r}"
                yield Issue("phrase never varies", row_id, image_id, message)


class _Context:
    """Where the `[SEG]`s of a row lie among its tokens, as the collator makes them."""

    def __init__(self, processor: MglmmProcessor, max_length: int | None) -> None:
        self._processor = processor
        self._max_length = max_length or processor.tokenizer.model_max_length
        self._picture = Image.new("RGB", (1, 1))  # every picture becomes the same number of tokens

    def look(self, row: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        processor, tokenizer = self._processor, self._processor.tokenizer
        text = processor.apply_chat_template(conversation_of({**row, "image": self._picture}), tokenize=False)
        begun = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
        position, positions = 0, []
        for token in tokenizer(text, add_special_tokens=not begun)["input_ids"]:
            if token == processor.seg_token_id:
                positions.append(position)
            position += processor.num_image_tokens if token == processor.image_token_id else 1
        lost = sum(position >= self._max_length for position in positions)
        if lost:
            message = f"{lost} of {len(positions)} {SEG_TOKEN} lie beyond {self._max_length:,} tokens (of {position:,})"
            yield "[SEG] lost to truncation", message
