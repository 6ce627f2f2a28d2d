"""Prepared data as the source of masks: rows of a picture together, read from Parquet once into a database."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import sqlite3
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq

from mglmm.processing.uscdf import parse

from ..mgscdata import definite_phrase
from ..sources import displayed_size, inside
from .image_item import ImageItem, Size, hint_of, reasons
from .records import InputMask, Rle

COLUMNS = ("image", "image_id", "source", "messages", "masks")
BATCH = 100  # rows in memory, with their pictures
PRONOUNS = frozenset("it he she they him her them this that these those one ones".split())
_ARTICLE = re.compile(r"^the (?:(?:all|both) (?:of )?the )?")
SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif"}


def find_uscdf(annotations: Path, images: Path | None, cache: Path) -> list[ImageItem]:
    """Every picture with a mask; see `inputs.find_images`."""
    rows = PreparedRows(annotations, cache)
    return [
        _UscdfItem(f"{_file_name(source)}/{_file_name(image_id)}", rows, source, image_id, images)
        for source, image_id in rows.keys()
    ]


class PreparedRows:
    """
    The masks and pictures of prepared data by (source, image_id), as SQLite below `cache`: in Parquet, rows of a picture
    may be anywhere, and each holds the picture again. It is made once and found again by names, sizes and times of change.

    Raises `ValueError` if a file is broken or has other columns.
    """

    def __init__(self, folder: Path, cache: Path):
        files = sorted(folder.rglob("*.parquet"))
        stamps = [f"{file.resolve()}|{file.stat().st_size}|{file.stat().st_mtime_ns}" for file in files]
        digest = hashlib.sha256("\n".join(stamps).encode()).hexdigest()
        self.file = cache / f"rows-{digest[:16]}.sqlite"
        if not self.file.is_file():
            cache.mkdir(parents=True, exist_ok=True)
            self._build(files)

    def _build(self, files: Sequence[Path]) -> None:
        handle, partial = tempfile.mkstemp(suffix=".partial", dir=self.file.parent)
        os.close(handle)
        try:
            with closing(sqlite3.connect(partial)) as connection:
                connection.execute("PRAGMA journal_mode=OFF")
                connection.execute("PRAGMA synchronous=OFF")
                connection.execute("CREATE TABLE rows (source, image_id, answers, masks)")
                connection.execute(
                    "CREATE TABLE pictures (source, image_id, content, path, PRIMARY KEY (source, image_id))"
                )
                for file in files:
                    for row in _masked_rows(file):
                        self._insert(connection, row)
                connection.execute("CREATE INDEX of_picture ON rows (source, image_id)")
                connection.commit()
            Path(partial).replace(self.file)
        finally:
            Path(partial).unlink(missing_ok=True)

    def _insert(self, connection: sqlite3.Connection, row: Mapping[str, Any]) -> None:
        key, image = (str(row["source"]), str(row["image_id"])), row["image"]
        answers = [message["content"] for message in row["messages"] if message["role"] == "assistant"]
        connection.execute(
            "INSERT INTO rows VALUES (?, ?, ?, ?)", (*key, json.dumps(answers), json.dumps(row["masks"]))
        )
        reference = {"bytes": None, "path": image} if isinstance(image, str) else image
        connection.execute(
            "INSERT OR IGNORE INTO pictures VALUES (?, ?, ?, ?)", (*key, reference["bytes"], reference["path"])
        )

    def _select(self, query: str, *values: str) -> list[Any]:
        with closing(sqlite3.connect(f"file:{self.file}?mode=ro", uri=True)) as connection:
            return connection.execute(query, values).fetchall()

    def keys(self) -> list[tuple[str, str]]:
        return self._select("SELECT source, image_id FROM pictures")

    def answers(self, source: str, image_id: str) -> list[tuple[list[str], list[Rle]]]:
        """Texts of the assistant's turns and masks of each row, in the order of the files."""
        query = "SELECT answers, masks FROM rows WHERE source = ? AND image_id = ? ORDER BY rowid"
        return [(json.loads(answers), json.loads(masks)) for answers, masks in self._select(query, source, image_id)]

    def picture(self, source: str, image_id: str) -> tuple[bytes | None, str | None]:
        """Encoded content or, without it, path."""
        query = "SELECT content, path FROM pictures WHERE source = ? AND image_id = ?"
        return self._select(query, source, image_id)[0]


def _masked_rows(file: Path) -> Iterator[Mapping[str, Any]]:
    try:
        with pq.ParquetFile(file) as parquet:
            if missing := [name for name in COLUMNS if name not in parquet.schema_arrow.names]:
                raise ValueError(f"{file} has no columns {missing}: is it of a folder that `mglmm prepare` wrote?")
            for batch in parquet.iter_batches(BATCH, columns=list(COLUMNS)):
                yield from (row for row in batch.to_pylist() if row["masks"] and row["messages"] and row["image"])
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file} cannot be read ({type(error).__name__}): is it whole?") from error


@dataclass(frozen=True)
class _UscdfItem(ImageItem):
    rows: PreparedRows
    source: str
    number: str
    images: Path | None

    def store_picture(self, folder: Path) -> None:
        with reasons():
            content = self._picture()
            target = folder / self._name(content)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
        partial.write_bytes(content)
        partial.replace(target)

    def _annotation(self) -> Any:
        return self.rows.answers(self.source, self.number)

    def _picture(self) -> bytes:
        content, path = self.rows.picture(self.source, self.number)
        if content is None:
            if not path:
                raise ValueError("row without a picture")
            file = inside(self.images, path) if self.images else Path(path)
            if not file.is_file():
                raise ValueError("image file is missing")
            displayed_size(file)  # rows of somebody else may name any file: only pictures are read and copied
            content = file.read_bytes()
        displayed_size(io.BytesIO(content))
        return content

    def _name(self, content: bytes) -> str:
        with PIL.Image.open(io.BytesIO(content)) as image:
            kind = str(image.format)
        return f"{self.image_id}.{SUFFIXES.get(kind, kind.lower())}"

    def _load(self) -> tuple[str, Size, list[InputMask]]:
        content = self._picture()
        size = displayed_size(io.BytesIO(content))
        found: dict[str, list[str]] = {}  # counts -> phrases
        invalid: list[str] = []
        for answers, rles in self.rows.answers(self.source, self.number):
            phrases = [mention.phrase for answer in answers for mention in parse(answer).mentions]
            if len(phrases) != len(rles):
                invalid.append("tags and masks of its row do not match")
                continue
            for phrase, rle in zip(phrases, rles, strict=True):
                if tuple(rle["size"]) != size:
                    invalid.append("mask size differs from the image size")
                else:
                    found.setdefault(rle["counts"], []).append(phrase)
        masks = [
            InputMask(number, {"size": list(size), "counts": counts}, known_label=_shortest(phrases))
            for number, (counts, phrases) in enumerate(found.items(), 1)
        ]
        masks += [InputMask(number, {}, invalid=reason) for number, reason in enumerate(invalid, len(masks) + 1)]
        return self._name(content), size, masks


def _shortest(phrases: Sequence[str]) -> str | None:
    """The shortest phrase that names something, without its article."""
    names = [_ARTICLE.sub("", definite_phrase(phrase)) for phrase in phrases if hint_of(phrase)]
    return hint_of(min((name for name in names if name not in PRONOUNS), key=len, default=None))


def _file_name(name: str) -> str:
    """A name that no file system takes amiss; one that is not kept as it is gets a piece of its hash."""
    safe = re.sub(r"[^\w.-]", "_", name).lstrip(".")[:80]
    return safe if safe == name and safe else f"{safe}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
