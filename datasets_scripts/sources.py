"""Reading foreign annotation files safely: large JSON as tables on disk, pickles without code, names that stay inside."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import sqlite3
import tempfile
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import ijson
import PIL.Image
from PIL import ExifTags

MAX_JSON_BYTES = 64 * 2**20  # of a file read in one piece; larger ones go through `JsonTables`
MAX_PICKLE_BYTES = 2**30
ROTATED = (5, 6, 7, 8)  # EXIF orientations that swap width and height
BATCH = 1000


def inside(folder: Path, name: str, kind: str = "image file") -> Path:
    """
    The absolute path of a file that an annotation names.

    Raises:
        ValueError: the name leads out of `folder`, or there is no such file.
    """
    folder = folder.resolve()
    path = (folder / name).resolve()
    if not path.is_relative_to(folder):
        raise ValueError(f"{kind} name leads out of the data folder")
    if not path.is_file():
        raise ValueError(f"{kind} is missing")
    return path


def first_existing(root: Path, *names: str) -> Path:
    """
    The first of several places below `root` where published layouts put a file or folder; names may be glob patterns.

    Raises `FileNotFoundError` that lists them all.
    """
    for name in names:
        if found := sorted(root.glob(name)):
            return found[0]
    raise FileNotFoundError(f"{root} holds none of {', '.join(names)}: is it the folder of this dataset?")


def displayed_size(path: Path | BinaryIO) -> tuple[int, int]:
    """
    (height, width) of an image as it is displayed, from its header alone.

    Raises:
        ValueError: Pillow cannot read the header, or the image has more pixels than Pillow's decompression limit.
    """
    try:
        with PIL.Image.open(path) as image:
            width, height = image.size
            rotated = image.getexif().get(ExifTags.Base.Orientation) in ROTATED
    except (OSError, SyntaxError, PIL.Image.DecompressionBombError) as error:
        raise ValueError(f"image cannot be read ({type(error).__name__})") from error
    if width * height > (PIL.Image.MAX_IMAGE_PIXELS or 0):
        raise ValueError(f"image has {width}x{height} pixels, more than Pillow's limit")
    return (width, height) if rotated else (height, width)


def check_image_size(path: Path, height: int, width: int) -> None:
    """
    Raises `ValueError` if the displayed image differs from the annotated size; an image whose EXIF tag turns it away from
    its annotation is told apart from one that was resized.
    """
    size = displayed_size(path)
    if size == (height, width):
        return
    if size == (width, height):
        raise ValueError("image is EXIF-rotated and its annotation is not: apply the rotation to one of them")
    raise ValueError("image size differs from its annotation")


def read_json(path: Path) -> Any:
    """
    A small JSON file, in UTF-8 or, failing that, Windows-1252 (some of ReasonSeg).

    Raises `ValueError` if it is broken or larger than `MAX_JSON_BYTES`.
    """
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise ValueError(f"{path.name} has {size:,} bytes, more than the {MAX_JSON_BYTES:,} of a per-image file")
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("cp1252", errors="replace")
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path.name} is not valid JSON: {error}") from error


class _DataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"refused to load {module}.{name}: annotations hold plain data only")


def load_pickle(path: Path) -> Any:
    """
    A pickle of plain data: dict, list, tuple, str, numbers, booleans, None. Nothing in it is executed.

    Raises `ValueError` if it is broken, names a class or function, or is larger than `MAX_PICKLE_BYTES`.
    """
    if path.stat().st_size > MAX_PICKLE_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes, more than {MAX_PICKLE_BYTES:,}")
    try:
        with path.open("rb") as file:
            return _DataUnpickler(file, encoding="utf-8").load()
    except (pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a pickle of plain data: {error}") from error


class JsonTables:
    """
    A JSON file of any size as tables in SQLite, read as a stream, so that memory stays flat. Made once and found again
    by path, size and time of change; several processes may read it.

    Args:
        path: The JSON file.
        tables: What to keep: table name -> (ijson prefix of its items, field whose value is the key). A prefix ending in
            `.*` takes the values of an object and its names as keys (the field is then ignored); an empty field numbers
            the items.
        folder: Where the database lies.

    Raises:
        ValueError: the file is not valid JSON.
    """

    def __init__(self, path: Path, tables: Mapping[str, tuple[str, str]], folder: Path):
        stat = path.stat()
        stamp = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|{sorted(tables.items())}"
        self.path, self.tables = path, dict(tables)
        self.file = folder / f"{path.stem}-{hashlib.sha256(stamp.encode()).hexdigest()[:16]}.sqlite"
        if not self.file.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            self._build()

    def _build(self) -> None:
        handle, partial = tempfile.mkstemp(suffix=".partial", dir=self.file.parent)
        os.close(handle)
        connection = sqlite3.connect(partial)
        try:
            connection.execute("PRAGMA journal_mode=OFF")
            connection.execute("PRAGMA synchronous=OFF")
            for table, (prefix, field) in self.tables.items():
                connection.execute(f'CREATE TABLE "{table}" (key, value TEXT)')
                rows = ((key, json.dumps(value)) for key, value in self._stream(prefix, field))
                while batch := [row for _, row in zip(range(BATCH), rows, strict=False)]:
                    connection.executemany(f'INSERT INTO "{table}" VALUES (?, ?)', batch)
                connection.execute(f'CREATE INDEX "{table}_key" ON "{table}" (key)')
            connection.commit()
        except ijson.JSONError as error:
            Path(partial).unlink()
            raise ValueError(f"{self.path} is not valid JSON: {error}") from error
        finally:
            connection.close()
        Path(partial).replace(self.file)

    def _stream(self, prefix: str, field: str) -> Iterator[tuple[Any, Any]]:
        with self.path.open("rb") as file:
            if prefix.endswith(".*") or prefix == "*":
                yield from ijson.kvitems(file, prefix.removesuffix("*").removesuffix("."), use_float=True)
                return
            for number, item in enumerate(ijson.items(file, prefix, use_float=True)):
                key = item.get(field) if field and isinstance(item, dict) else number
                yield key if isinstance(key, str | int) else json.dumps(key), item

    @cached_property
    def _connection(self) -> sqlite3.Connection:
        return sqlite3.connect(f"file:{self.file}?mode=ro", uri=True)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_connection"}

    def keys(self, table: str) -> list[Any]:
        """Distinct keys in the order of the file."""
        query = f'SELECT key FROM "{table}" GROUP BY key ORDER BY MIN(rowid)'
        return [key for (key,) in self._connection.execute(query)]

    def get(self, table: str, key: Any) -> list[Any]:
        """All items of a key, in the order of the file."""
        query = f'SELECT value FROM "{table}" WHERE key IS ? ORDER BY rowid'
        return [json.loads(value) for (value,) in self._connection.execute(query, (key,))]

    def one(self, table: str, key: Any) -> Any:
        """The first item of a key; raises `ValueError` if there is none."""
        items = self.get(table, key)
        if not items:
            raise ValueError(f"{self.path.name} has no {table} {key!r}")
        return items[0]

    def all(self, table: str) -> Iterator[tuple[Any, Any]]:
        """Every (key, item), in the order of the file, as a stream."""
        for key, value in self._connection.execute(f'SELECT key, value FROM "{table}" ORDER BY rowid'):
            yield key, json.loads(value)
