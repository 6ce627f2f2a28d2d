"""The cache of answers: what a kill leaves, two processes, equal requests at the same time."""

import asyncio
import json
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mglmm.datasets_scripts.annotation.answer_cache import AnswerCache, CachedClient
from mglmm.datasets_scripts.annotation.chat import ChatRequest, ChatResult, RequestFailed, RunStopped, text_message

KEYS = [digit * 64 for digit in "0123456789abcdef"]
ONE = ChatResult("a dog", "stop", 10, 2)
TWO = ChatResult('{"label": "caf\u00e9 \U0001f415"}\nand "more"', "length", 20, 3)


def test_answers_are_there_again_when_the_cache_is_opened_again(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "cache"
    with AnswerCache(folder, "0-of-1") as cache:
        assert cache.get(KEYS[0]) is None
        cache.put(KEYS[0], ONE, "m")
        cache.put(KEYS[1], TWO, "m")
        assert [cache.get(key) for key in KEYS[:3]] == [ONE, TWO, None]
    with AnswerCache(folder, "0-of-1") as cache:
        assert [cache.get(key) for key in KEYS[:3]] == [ONE, TWO, None]
        assert (len(cache), cache.spent_tokens) == (2, 35)
    entry = json.loads((folder / "requests-0-of-1.jsonl").read_text().splitlines()[0])
    assert list(entry) == ["key", *ChatResult._fields, "model", "created"]
    assert (entry["key"], entry["model"]) == (KEYS[0], "m")


def test_a_line_cut_anywhere_loses_itself_alone(tmp_path: Path) -> None:
    with AnswerCache(tmp_path, "x") as cache:
        cache.put(KEYS[0], ONE, "m")
        cache.put(KEYS[1], TWO, "m")
    file = tmp_path / "requests-x.jsonl"
    whole = file.read_bytes()
    first = whole.index(b"\n") + 1
    for end in range(first, len(whole) + 1):
        file.write_bytes(whole[:end])
        with AnswerCache(tmp_path, "x") as cache:
            # The line's end alone is missing: the entry is whole.
            second = TWO if end >= len(whole) - 1 else None
            assert [cache.get(KEYS[0]), cache.get(KEYS[1])] == [ONE, second]
            cache.put(KEYS[2], ONE, "m")
            assert cache.get(KEYS[2]) == ONE
        with AnswerCache(tmp_path, "x") as cache:
            assert [cache.get(key) for key in KEYS[:3]] == [ONE, second, ONE], end


ENTRY = {"key": KEYS[1], "text": "x", "finish_reason": "stop", "prompt_tokens": 1, "completion_tokens": 1}


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"\xff\xfe\x00garbage",  # no text at all
        b"[" * 100_000,  # deeper than any parser goes
        b"[1, 2]",
        b"null",
        json.dumps(ENTRY | {"key": "../../etc/passwd"}).encode(),  # no hash
        json.dumps(ENTRY | {"key": 7}).encode(),
        json.dumps(ENTRY | {"text": None}).encode(),
        json.dumps(ENTRY | {"prompt_tokens": "1"}).encode(),
        json.dumps(ENTRY | {"prompt_tokens": -1}).encode(),  # would give budget back
        json.dumps(ENTRY | {"completion_tokens": True}).encode(),
        json.dumps({"key": KEYS[1]}).encode(),  # fields are missing
    ],
    ids=range(12),
)
def test_lines_that_are_no_entries_are_passed_over(tmp_path: Path, line: bytes) -> None:
    with AnswerCache(tmp_path, "x") as cache:
        cache.put(KEYS[0], ONE, "m")
    with (tmp_path / "requests-x.jsonl").open("ab") as file:
        file.write(line + b"\n")
    with AnswerCache(tmp_path, "x") as cache:
        cache.put(KEYS[2], TWO, "m")
    with AnswerCache(tmp_path, "x") as cache:
        assert [cache.get(key) for key in KEYS[:3]] == [ONE, None, TWO]
        assert cache.spent_tokens == 35


def test_a_write_that_failed_does_not_spoil_the_next_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with AnswerCache(tmp_path, "x") as cache:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(OSError, match="No space left"):
                cache.put(KEYS[0], ONE, "m")
        assert cache.get(KEYS[0]) is None
        cache.put(KEYS[1], TWO, "m")
        assert cache.get(KEYS[1]) == TWO
    with AnswerCache(tmp_path, "x") as cache:
        assert cache.get(KEYS[1]) == TWO


def test_shards_read_each_others_answers_and_prefer_their_own(tmp_path: Path) -> None:
    with AnswerCache(tmp_path, "a") as a, AnswerCache(tmp_path, "b") as b:
        a.put(KEYS[0], ONE, "m")
        b.put(KEYS[0], TWO, "m")  # asked at the same time, answered differently
        b.put(KEYS[1], TWO, "m")
    for shard, answer in [("a", ONE), ("b", TWO), ("c", TWO)]:
        with AnswerCache(tmp_path, shard) as cache:
            assert (cache.get(KEYS[0]), cache.get(KEYS[1])) == (answer, TWO)
            assert cache.spent_tokens == 12 + 23 + 23  # both were paid


def test_a_file_changed_behind_our_back_is_a_miss(tmp_path: Path) -> None:
    with AnswerCache(tmp_path, "x") as cache:
        cache.put(KEYS[0], ONE, "m")
        (tmp_path / "requests-x.jsonl").write_text(json.dumps(ENTRY) + "\n")
        assert cache.get(KEYS[0]) is None


@pytest.mark.parametrize("shard", ["", "../x", "a/b", ".hidden", "a b", "a\n", "-"])
def test_names_that_leave_the_folder_are_refused(tmp_path: Path, shard: str) -> None:
    with pytest.raises(ValueError, match="is no name of a shard"):
        AnswerCache(tmp_path, shard)


def _hold_until_killed(folder: Path, ready) -> None:
    with AnswerCache(folder, "0-of-2") as cache:
        cache.put(KEYS[0], ONE, "m")
        ready.send(True)
        ready.recv()  # never comes


def test_two_processes_on_one_shard_are_refused_until_one_is_gone(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    folder = tmp_path / "run" / "cache"
    process = context.Process(target=_hold_until_killed, args=(folder, theirs), daemon=True)
    process.start()
    assert ours.recv()
    message = "another process is at work on shard 0-of-2 of .*/run: wait for it, or give this one another shard"
    with pytest.raises(ValueError, match=message):
        AnswerCache(folder, "0-of-2")
    with AnswerCache(folder, "1-of-2"):
        pass
    process.kill()
    process.join()
    with AnswerCache(folder, "0-of-2") as cache:
        assert cache.get(KEYS[0]) == ONE  # on disk, though the process was killed


# ---------------------------------------------------------------- clients


class Scripted:
    """Waits until it may answer, then says what `answer` gives."""

    model = "m"

    def __init__(self, answer: Callable[[], ChatResult]) -> None:
        self.answer, self.calls = answer, 0
        self.called, self.may_answer = asyncio.Event(), asyncio.Event()

    async def complete(self, _: ChatRequest) -> ChatResult:
        self.calls += 1
        self.called.set()
        await self.may_answer.wait()
        return self.answer()


def request(text: str = "what is it?") -> ChatRequest:
    return ChatRequest((text_message("user", text),), 100)


def test_what_the_cache_knows_is_not_asked_again(tmp_path: Path) -> None:
    async def ask(shard: str) -> tuple[int, int, int]:
        with AnswerCache(tmp_path, shard) as cache:
            scripted = Scripted(lambda: ONE)
            scripted.may_answer.set()
            client = CachedClient(scripted, cache)
            for text in ("a", "b", "a", "a"):
                assert await client.complete(request(text)) == ONE
            return scripted.calls, client.misses, client.hits

    assert asyncio.run(ask("first")) == (2, 2, 2)
    assert asyncio.run(ask("second")) == (0, 0, 4)


def test_equal_requests_at_the_same_time_are_asked_once(tmp_path: Path) -> None:
    async def run() -> None:
        with AnswerCache(tmp_path, "x") as cache:
            scripted = Scripted(lambda: ONE)
            client = CachedClient(scripted, cache)
            waiting = [asyncio.create_task(client.complete(request())) for _ in range(3)]
            await scripted.called.wait()
            scripted.may_answer.set()
            assert await asyncio.gather(*waiting) == [ONE] * 3
            assert (scripted.calls, client.misses, client.hits) == (1, 1, 2)

    asyncio.run(run())
    assert len((tmp_path / "requests-x.jsonl").read_text().splitlines()) == 1


def test_all_who_wait_get_the_error_and_it_is_not_remembered(tmp_path: Path) -> None:
    def fail() -> ChatResult:
        raise RequestFailed("no answer")

    async def run() -> None:
        with AnswerCache(tmp_path, "x") as cache:
            scripted = Scripted(fail)
            client = CachedClient(scripted, cache)
            waiting = [asyncio.create_task(client.complete(request())) for _ in range(3)]
            await scripted.called.wait()
            scripted.may_answer.set()
            errors = await asyncio.gather(*waiting, return_exceptions=True)
            assert [str(error) for error in errors] == ["no answer"] * 3
            assert scripted.calls == 1
            scripted.answer = lambda: ONE
            assert await client.complete(request()) == ONE

    asyncio.run(run())


def test_an_answer_is_kept_though_nobody_waits_for_it_any_more(tmp_path: Path) -> None:
    async def run() -> None:
        with AnswerCache(tmp_path, "x") as cache:
            scripted = Scripted(lambda: ONE)
            client = CachedClient(scripted, cache)
            impatient = asyncio.create_task(client.complete(request()))
            await scripted.called.wait()
            impatient.cancel()
            with pytest.raises(asyncio.CancelledError):
                await impatient
            scripted.may_answer.set()
            assert await client.complete(request()) == ONE
            assert scripted.calls == 1

    asyncio.run(run())


def test_a_full_disk_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a failed image it would cost the answers of all that follow."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    async def run() -> None:
        with AnswerCache(tmp_path, "x") as cache:
            scripted = Scripted(lambda: ONE)
            scripted.may_answer.set()
            monkeypatch.setattr(cache, "put", full)
            with pytest.raises(RunStopped, match="^answers cannot be kept: No space left on device$"):
                await CachedClient(scripted, cache).complete(request())

    asyncio.run(run())
