"""How much may be asked of a server: requests at a time, requests and tokens in any minute, tokens in all."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from .chat import BudgetSpent, Interrupted

T = TypeVar("T")

MINUTE = 60.0  # seconds


class RequestLimits:
    """
    Limits that all requests of an event loop share; those that are `None` do not limit.

    `max_total_tokens` is a hard budget: a request goes out only if its estimate fits beside what is spent and what requests
    in flight may still cost. The total stays below it as long as no request costs more than its estimate. What can
    exceed it: a server that counts more tokens for a picture or a text than estimated, and requests that a server bills
    though its answer never arrived.

    Args:
        concurrency: Requests in flight, at most.
        requests_per_minute: HTTP requests in any 60 seconds, those that are tried again among them (`attempt`).
        tokens_per_minute: In any 60 seconds, by estimates until the answer tells the number. A single request of more
            waits until it is alone.
        max_total_tokens: Budget of tokens, `spent_tokens` (those of earlier runs) among them.
        stop: When it is set, whoever waits for a turn gets `Interrupted` in its place.
        clock, sleep: Seconds that never go back, and how to wait for some.
    """

    def __init__(
        self,
        concurrency: int = 8,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
        max_total_tokens: int | None = None,
        spent_tokens: int = 0,
        *,
        stop: asyncio.Event | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ):
        for name, value in (
            ("concurrency", concurrency),
            ("requests_per_minute", requests_per_minute),
            ("tokens_per_minute", tokens_per_minute),
            ("max_total_tokens", max_total_tokens),
        ):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        self.max_total_tokens = max_total_tokens
        self.spent_tokens = spent_tokens
        self._stop = stop or asyncio.Event()
        self._reserved = 0  # by requests in flight
        self._places = asyncio.Semaphore(concurrency)
        self._settled = asyncio.Event()  # replaced each time it is set
        self._requests = _Window(requests_per_minute, clock, sleep)
        self._tokens = _Window(tokens_per_minute, clock, sleep)

    @asynccontextmanager
    async def slot(self, estimated_tokens: int) -> AsyncIterator[Slot]:
        """
        The time of one request. Whoever got an answer calls `settle`; a request without one costs nothing.

        Raises `BudgetSpent` if the estimate does not fit into what is left of the budget. Where it fits if requests in
        flight cost less than their estimates, it waits for them.
        """
        async with self._places:
            await self._unless_stopped(self._reserve(estimated_tokens))
            slot = Slot()
            try:
                entry = await self._unless_stopped(self._tokens.enter(estimated_tokens))
                yield slot
                if slot.tokens is not None:
                    self._tokens.correct(entry, slot.tokens)
            finally:
                self._reserved -= estimated_tokens
                self.spent_tokens += slot.tokens or 0
                self._settled.set()
                self._settled = asyncio.Event()

    async def attempt(self) -> None:
        """Waits until one more HTTP request may go out. Raises `Interrupted` once `stop` is set."""
        await self._unless_stopped(self._requests.enter(1))

    async def attempt_again(self) -> None:
        """As `attempt`, for a request that has been out before and is seen through."""
        await self._requests.enter(1)

    async def _unless_stopped(self, turn: Coroutine[Any, Any, T]) -> T:
        waiting, stopped = asyncio.ensure_future(turn), asyncio.ensure_future(self._stop.wait())
        try:
            await asyncio.wait({waiting, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if self._stop.is_set():
                raise Interrupted("stopped by a signal")
            return waiting.result()
        finally:
            for task in (waiting, stopped):
                task.cancel()

    async def _reserve(self, tokens: int) -> None:
        while self.max_total_tokens is not None and self.spent_tokens + self._reserved + tokens > self.max_total_tokens:
            if self.spent_tokens + tokens > self.max_total_tokens:
                raise BudgetSpent(
                    f"budget of {self.max_total_tokens:,} tokens is spent: {self.spent_tokens:,} are used and the next "
                    f"request may need {tokens:,}; raise --max-total-tokens"
                )
            await self._settled.wait()
        self._reserved += tokens


class Slot:
    """A request in flight."""

    tokens: int | None = None

    def settle(self, tokens: int) -> None:
        """What the request cost, prompt and answer."""
        self.tokens = tokens


class _Window:
    """At most `limit` in any minute, first come first served."""

    def __init__(
        self, limit: int | None, clock: Callable[[], float], sleep: Callable[[float], Awaitable[object]]
    ) -> None:
        self._limit, self._clock, self._sleep = limit, clock, sleep
        self._entries: deque[list[float]] = deque()  # [when it leaves the window, amount], in the order of the former
        self._total = 0.0
        self._turn = asyncio.Lock()

    async def enter(self, amount: float) -> list[float]:
        """Waits until `amount` fits; what is more than the limit waits for an empty window. Returns the entry."""
        if self._limit is None:
            return [0, 0]
        async with self._turn:
            while True:
                now = self._clock()
                while self._entries and self._entries[0][0] <= now:
                    self._total -= self._entries.popleft()[1]
                if not self._entries or self._total + amount <= self._limit:
                    break
                await self._sleep(self._entries[0][0] - now)
            entry = [now + MINUTE, amount]
            self._entries.append(entry)
            self._total += amount
            return entry

    def correct(self, entry: list[float], amount: float) -> None:
        if any(entry is other for other in self._entries):
            self._total += amount - entry[1]
            entry[1] = amount
