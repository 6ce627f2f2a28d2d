"""Answers of language models by what was asked, so that nothing is paid twice: not by the next run, nor by another shard."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .chat import ChatClient, ChatRequest, ChatResult, RunStopped

KEY = re.compile(r"[0-9a-f]{64}")
SHARD = re.compile(r"\w[\w.-]*")


class AnswerCache:
    """
    Every `folder/requests-*.jsonl`, and the one of them to which this process adds lines.

    Lines that are not whole, as a killed process leaves them, are passed over. Files of other shards are read once, when the
    cache is opened; an answer stays on disk until it is asked for.

    Args:
        shard: Names the file of this process, `folder/requests-<shard>.jsonl`. Letters, digits, "_", "." and "-".

    Raises:
        ValueError: another process adds to the same file, or the name is none.
    """

    def __init__(self, folder: Path, shard: str):
        if not SHARD.fullmatch(shard):
            raise ValueError(f"{shard!r} is no name of a shard: use letters, digits, '_', '.' and '-'")
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"requests-{shard}.jsonl"
        self._file = path.open("ab")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise ValueError(
                f"another process is at work on shard {shard} of {folder.parent}: wait for it, or give this one another shard"
            ) from None
        # The own file comes last: of two answers to one question the one that this shard has used counts.
        self._paths = [*sorted(set(folder.glob("requests-*.jsonl")) - {path}), path]
        self._index: dict[bytes, tuple[int, int]] = {}  # key -> (number of the file, offset of the line)
        self.spent_tokens = 0  # by all answers of the folder
        whole = True
        for number, file in enumerate(self._paths):
            whole = self._read_index(number, file)
        self._at_line_start = whole

    def _read_index(self, number: int, path: Path) -> bool:
        """Whether the file ends with a whole line."""
        offset, line = 0, b"\n"
        with path.open("rb") as file:
            for line in file:
                if entry := _entry_of(line):
                    self._index[bytes.fromhex(entry["key"])] = (number, offset)
                    self.spent_tokens += entry["prompt_tokens"] + entry["completion_tokens"]
                offset += len(line)
        return line.endswith(b"\n")

    def __len__(self) -> int:
        return len(self._index)

    def get(self, key: str) -> ChatResult | None:
        if (place := self._index.get(bytes.fromhex(key))) is None:
            return None
        number, offset = place
        with self._paths[number].open("rb") as file:
            file.seek(offset)
            entry = _entry_of(file.readline())
        if entry is None or entry["key"] != key:  # somebody changed the file
            return None
        return ChatResult(*(entry[name] for name in ChatResult._fields))

    def put(self, key: str, result: ChatResult, model: str) -> None:
        """On disk when this returns. Raises `OSError` if that fails; the next answer then starts on a line of its own."""
        created = datetime.now(UTC).isoformat(timespec="seconds")
        entry = {"key": key, **result._asdict(), "model": model, "created": created}
        line = json.dumps(entry).encode() + b"\n"
        if not self._at_line_start:
            line = b"\n" + line
        self._at_line_start = False
        self._file.write(line)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._at_line_start = True
        offset = self._file.tell() - len(line.lstrip(b"\n"))
        self._index[bytes.fromhex(key)] = (len(self._paths) - 1, offset)
        self.spent_tokens += result.prompt_tokens + result.completion_tokens

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> AnswerCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class CachedClient:
    """
    Asks `client` only what the cache cannot answer; equal requests at the same time are asked once.

    A request that has gone out comes home, even if whoever waits for it is cancelled: its answer is paid for.

    Attributes:
        hits: Answers for which `client` was not asked.
        misses: Requests that it was asked.
    """

    def __init__(self, client: ChatClient, cache: AnswerCache):
        self.model = client.model
        self.hits = self.misses = 0
        self._client, self._cache = client, cache
        self._asked: dict[str, asyncio.Task[ChatResult]] = {}

    async def complete(self, request: ChatRequest) -> ChatResult:
        key = request.key(self.model)
        task = self._asked.get(key)
        if task is None:
            if (known := self._cache.get(key)) is not None:
                self.hits += 1
                return known
            self.misses += 1
            task = self._asked[key] = asyncio.create_task(self._ask(key, request))
            task.add_done_callback(lambda task: self._forget(key, task))
        else:
            self.hits += 1
        return await asyncio.shield(task)

    async def _ask(self, key: str, request: ChatRequest) -> ChatResult:
        try:
            result = await self._client.complete(request)
        except RunStopped:
            self.misses -= 1  # it never went out
            raise
        try:
            self._cache.put(key, result, self.model)
        except OSError as error:  # a full disk: each further answer would be lost, too
            raise RunStopped(f"answers cannot be kept: {error.strerror}") from error
        return result

    def _forget(self, key: str, task: asyncio.Task[ChatResult]) -> None:
        del self._asked[key]
        if not task.cancelled():
            task.exception()  # seen, or asyncio would complain if nobody waits any more


def _entry_of(line: bytes) -> dict[str, Any] | None:
    """The entry of a line; `None` if it is none."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(entry, dict):
        return None
    texts = all(isinstance(entry.get(name), str) for name in ("key", "text", "finish_reason"))
    counts = [entry.get(name) for name in ("prompt_tokens", "completion_tokens")]
    # `type`, because `True` is an int, too.
    whole = texts and KEY.fullmatch(entry["key"]) and all(type(count) is int and count >= 0 for count in counts)
    return entry if whole else None
