"""What every dataset family has in common: list the items of each split, turn one item into rows, skip what is broken."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets

from mglmm.processing.uscdf import IMAGE_TOKEN, drop_phrases, validate_row

from .conversations import Turn
from .features import FEATURES
from .sources import JsonTables, displayed_size

Row = dict[str, Any]
PHRASED_TASKS = ("panoptic", "fine", "grounded_caption")  # their phrases are the answer itself, in every format


@dataclass
class UscdfConfig(datasets.BuilderConfig):
    """
    Args:
        seed (`int`, *optional*, defaults to 0): Of all choices of wording and target.
        variants (`int`, *optional*, defaults to 1): How often each item of a family that draws its questions is worded anew.
        images (`str`, *optional*, defaults to `"embed"`):
            `"embed"` stores the encoded image in every row, `"path"` its absolute path.
        limit (`int`, *optional*): Use only the first items of each split.
        answers (`str`, *optional*, defaults to `"uscdf"`):
            `"plain"` leaves the phrases out of answers to questions that name their targets: `Sure, [SEG].` instead of
            `Sure, <p> the hat </p> [SEG].`, the style before USCDF (ablation of the paper's Table 7).
        augment (`int`, *optional*, defaults to 0):
            How many other views of each training image to add (mirrored, cropped, in other colours; `augmentation`), in
            families that draw their questions from labelled masks. Rows for evaluation are never augmented.
        augmented_dir (`str`, *optional*):
            Folder for the pictures of these views, by default one in the builder's cache.
    """

    seed: int = 0
    variants: int = 1
    images: Literal["embed", "path"] = "embed"
    limit: int | None = None
    answers: Literal["uscdf", "plain"] = "uscdf"
    augment: int = 0
    augmented_dir: str | None = None


class UscdfBuilder(datasets.GeneratorBasedBuilder):
    """
    A dataset family. A subclass defines `items` and `rows`; `data_dir` is the folder of its original layout.

    After `download_and_prepare` in one process, `skipped` counts what was left out, by reason.
    """

    BUILDER_CONFIG_CLASS = UscdfConfig
    BUILDER_CONFIGS = [UscdfConfig(name="default")]
    DEFAULT_CONFIG_NAME = "default"
    DEFAULT_WRITER_BATCH_SIZE = 1000
    SOURCE: str = ""  # the value of the rows' `source` column
    LICENSE: str = "unknown"  # of the annotations and images, for the card
    ROWS_PER_ITEM: int = 4  # about, of one variant
    AUGMENTS: bool = False  # whether the option `augment` is for it

    def items(self) -> dict[str, Sequence[Any]]:
        """Split -> its items: small keys that pickle, such as image ids or file names."""
        raise NotImplementedError

    def rows(self, item: Any) -> Iterable[Row]:
        """
        The rows of one item, made with `make_row`: a pure function of the source and `config`.

        Raises `ValueError` (or `KeyError`, `TypeError`, `OSError` on malformed input): the item is skipped and the
        message counted, so it names the reason without the item.
        """
        raise NotImplementedError

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(features=FEATURES)

    @classmethod
    def check_augment(cls, augment: int) -> None:
        """Raises `ValueError` if the family cannot add so many views of an image."""
        if augment < 0:
            raise ValueError(f"augment is a number of views, at least 0, not {augment}")
        if augment and not cls.AUGMENTS:
            raise ValueError(
                f"augment={augment} needs a family that draws its questions from labelled masks, such as photos or "
                f"coco_instances; the texts of {cls.__name__} are given: use augment=0"
            )

    @property
    def data_dir(self) -> Path:
        return Path(self.config.data_dir).resolve()

    def items_per_shard(self, rows: int) -> int:
        """How many items make about so many rows."""
        return max(1, rows // (self.ROWS_PER_ITEM * self.config.variants * (1 + self.config.augment)))

    def tables(self, path: Path, **tables: tuple[str, str]) -> JsonTables:
        """A large JSON file as `JsonTables` in this builder's cache."""
        return JsonTables(path, tables, Path(self._cache_dir_root) / "tables")

    def generator(self, *key: object) -> random.Random:
        """A generator that depends on the seed and `key` alone: the same in every process and on every machine."""
        # Seeding with a string hashes it with SHA-512.
        return random.Random("/".join(map(str, (self.config.seed, *key))))

    def split_items(self) -> dict[str, list[Any]]:
        """`items`, within the limit. Raises `ValueError` if there is none at all, or `augment` is not for this family."""
        self.check_augment(self.config.augment)
        self.skipped: Counter[str] = Counter()
        items = {split: list(of_split)[: self.config.limit] for split, of_split in self.items().items()}
        if not any(items.values()):
            raise ValueError(f"no usable item in {self.data_dir}: {dict(self.skipped)}")
        return {split: of_split for split, of_split in items.items() if of_split}

    def _split_generators(self, dl_manager: datasets.DownloadManager) -> list[datasets.SplitGenerator]:
        return [
            datasets.SplitGenerator(name=split, gen_kwargs={"items": items})
            for split, items in self.split_items().items()
        ]

    def _generate_examples(self, items: Sequence[Any]) -> Iterator[tuple[str, Row]]:
        for item in items:
            for number, row in enumerate(self.usable_rows(item)):
                yield f"{item}-{number}", row

    def usable_rows(self, item: Any) -> list[Row]:
        """The checked rows of an item; none, with a count in `skipped`, if it is broken."""
        try:
            return [self._checked(row) for row in self.rows(item)]
        except (KeyError, TypeError, AttributeError, IndexError, ValueError, OSError) as error:
            self.skipped[reason_of(error)] += 1
            return []

    def _checked(self, row: Row) -> Row:
        size = row.pop("size")
        if self.config.answers == "plain" and row["task"] not in PHRASED_TASKS:
            row["messages"] = [
                {**message, "content": drop_phrases(message["content"])} if message["role"] == "assistant" else message
                for message in row["messages"]
            ]
        try:
            validate_row(row, size)
        except ValueError as error:
            raise ValueError(str(error).partition(": ")[2]) from error  # the same reason for every row
        return row


def make_row(
    image: Path,
    image_id: object,
    source: str,
    task: str,
    turns: Sequence[Turn],
    *,
    size: tuple[int, int] | None = None,
    ignore_mask: Mapping[str, Any] | None = None,
) -> Row:
    """
    A row from its turns; `<image>` is put before the first question.

    Args:
        size: (height, width) of the displayed image, read from its header if not given.
        ignore_mask: COCO RLE of the pixels that nobody labelled.
    """
    messages = []
    for index, turn in enumerate(turns):
        question = turn.question if index else f"{IMAGE_TOKEN}\n{turn.question}"
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": turn.answer}]
    return {
        "image": str(image),
        "image_id": str(image_id),
        "source": source,
        "task": task,
        "messages": messages,
        "masks": [mask for turn in turns for mask in turn.masks],
        "regions": [list(map(float, region)) for turn in turns for region in turn.regions],
        "ignore_mask": dict(ignore_mask) if ignore_mask is not None else None,
        "size": size or displayed_size(image),
    }


def reason_of(error: Exception) -> str:
    """One line that is the same for all items broken in the same way."""
    if isinstance(error, KeyError):
        return f"missing field {error}"
    if isinstance(error, TypeError | AttributeError | IndexError):
        return f"malformed annotation ({type(error).__name__}: {error})"
    return str(error)
