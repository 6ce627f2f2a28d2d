"""Limits of requests and tokens, on a clock that goes on only when somebody waits."""

import asyncio
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mglmm.datasets_scripts.annotation.chat import BudgetSpent, Interrupted
from mglmm.datasets_scripts.annotation.request_limits import RequestLimits


class Time:
    """Stands still but for `sleep`."""

    def __init__(self) -> None:
        self.now = 1000.0

    async def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds


def most_in_a_minute(sent: Sequence[tuple[float, int]]) -> int:
    """The largest sum of amounts in any 60 seconds, each of which may begin with a request."""
    return max(sum(amount for time, amount in sent if start <= time < start + 60) for start, _ in sent)


gaps = st.floats(0, 90, allow_nan=False)


@given(st.lists(gaps, min_size=1, max_size=30), st.integers(1, 5))
def test_no_minute_has_more_requests_than_the_limit_and_none_waits_longer_than_it_must(
    arrivals: list[float], limit: int
) -> None:
    async def run() -> list[tuple[float, int]]:
        time = Time()
        limits = RequestLimits(requests_per_minute=limit, clock=lambda: time.now, sleep=time.sleep)
        sent: list[tuple[float, int]] = []
        for gap in arrivals:
            time.now += gap
            # By the definition of the limit: the request that was `limit` requests ago must be a minute away.
            earliest = max(time.now, sent[-limit][0] + 60) if len(sent) >= limit else time.now
            await limits.attempt()
            assert time.now == pytest.approx(earliest)
            sent.append((time.now, 1))
        return sent

    assert most_in_a_minute(asyncio.run(run())) <= limit


@given(st.lists(st.tuples(gaps, st.integers(1, 100), st.floats(0, 1)), min_size=1, max_size=30))
def test_no_minute_has_more_tokens_than_the_limit(requests: list[tuple[float, int, float]]) -> None:
    async def run() -> list[tuple[float, int]]:
        time = Time()
        limits = RequestLimits(tokens_per_minute=100, clock=lambda: time.now, sleep=time.sleep)
        sent = []
        for gap, estimate, share in requests:
            time.now += gap
            async with limits.slot(estimate) as slot:
                cost = int(estimate * share)
                sent.append((time.now, cost))
                slot.settle(cost)
        return sent

    assert most_in_a_minute(asyncio.run(run())) <= 100


@pytest.mark.parametrize(
    ("tokens", "waited"),
    [
        ([(60, 60), (40, 40)], 0),  # fill the minute
        ([(60, 60), (41, 41)], 60),  # one too many
        ([(90, 30), (70, 70)], 0),  # the first one cost less than estimated
        ([(90, None), (70, 70)], 60),  # it failed: the server may have counted it
        ([(500, 500), (1, 1)], 60),  # more than the limit: goes alone
        ([(1, 1), (500, 500), (1, 1)], 120),  # likewise
    ],
)
def test_tokens_per_minute_count_by_cost_once_it_is_known(tokens: list[tuple[int, int | None]], waited: float) -> None:
    async def run() -> float:
        time = Time()
        limits = RequestLimits(tokens_per_minute=100, clock=lambda: time.now, sleep=time.sleep)
        for estimate, cost in tokens:
            async with limits.slot(estimate) as slot:
                if cost is not None:
                    slot.settle(cost)
        return time.now - 1000

    assert asyncio.run(run()) == waited


@given(
    st.lists(st.tuples(st.integers(1, 60), st.floats(0, 1), st.integers(0, 5), st.booleans()), max_size=25),
    st.integers(1, 400),
    st.integers(1, 6),
)
def test_the_budget_is_never_exceeded_and_stops_only_what_does_not_fit(
    requests: list[tuple[int, float, int, bool]], budget: int, concurrency: int
) -> None:
    """Requests of (estimate, share of it that they cost, turns of the loop that they take, whether they are answered)."""
    in_flight = [0, 0]  # now, at most

    async def one(limits: RequestLimits, estimate: int, share: float, turns: int, answered: bool) -> int:
        try:
            async with limits.slot(estimate) as slot:
                in_flight[0] += 1
                in_flight[1] = max(in_flight)
                for _ in range(turns):
                    await asyncio.sleep(0)
                in_flight[0] -= 1
                if not answered:
                    raise ConnectionError
                slot.settle(int(estimate * share))
                return int(estimate * share)
        except ConnectionError:
            return 0
        except BudgetSpent:
            assert limits.spent_tokens + estimate > budget
            return 0

    async def run() -> tuple[int, int]:
        limits = RequestLimits(concurrency, max_total_tokens=budget)
        costs = await asyncio.wait_for(asyncio.gather(*(one(limits, *request) for request in requests)), 10)
        return sum(costs), limits.spent_tokens

    paid, spent = asyncio.run(run())
    assert paid == spent <= budget
    assert in_flight[1] <= concurrency


def test_a_request_that_may_still_fit_waits_for_those_in_flight() -> None:
    async def run() -> list[str]:
        limits = RequestLimits(max_total_tokens=1100, spent_tokens=1000)
        log = []
        first_runs, first_may_end = asyncio.Event(), asyncio.Event()

        async def first() -> None:
            async with limits.slot(60) as slot:
                first_runs.set()
                await first_may_end.wait()
                slot.settle(40)
                log.append("first")

        async def second() -> None:
            await first_runs.wait()
            asyncio.get_running_loop().call_soon(first_may_end.set)
            async with limits.slot(60) as slot:
                log.append("second")
                slot.settle(60)

        await asyncio.gather(first(), second())
        return log

    assert asyncio.run(run()) == ["first", "second"]


def test_a_spent_budget_says_what_is_left_and_how_to_go_on() -> None:
    async def run() -> None:
        limits = RequestLimits(max_total_tokens=20_000, spent_tokens=19_000)
        async with limits.slot(1500):
            pass

    message = (
        r"^budget of 20,000 tokens is spent: 19,000 are used and the next request may need 1,500; "
        r"raise --max-total-tokens$"
    )
    with pytest.raises(BudgetSpent, match=message):
        asyncio.run(run())


def test_a_cancelled_request_gives_its_place_and_its_reservation_back() -> None:
    async def run() -> int:
        limits = RequestLimits(concurrency=1, max_total_tokens=100)
        running = asyncio.Event()

        async def hang() -> None:
            async with limits.slot(100):
                running.set()
                await asyncio.Event().wait()

        task = asyncio.create_task(hang())
        await running.wait()
        task.cancel()
        async with limits.slot(100) as slot:
            slot.settle(90)
        return limits.spent_tokens

    assert asyncio.run(asyncio.wait_for(run(), 10)) == 90


@pytest.mark.parametrize("name", ["concurrency", "requests_per_minute", "tokens_per_minute", "max_total_tokens"])
def test_limits_below_one_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be at least 1, not 0$"):
        RequestLimits(**{name: 0})


def test_who_waits_for_a_turn_is_let_go_by_a_stop() -> None:
    """Or requests that have not gone out would still do so minutes after an interrupt, one by one."""

    async def run() -> None:
        stop = asyncio.Event()
        limits = RequestLimits(requests_per_minute=1, stop=stop)
        await limits.attempt()
        waiting = asyncio.create_task(limits.attempt())
        await asyncio.sleep(0)
        stop.set()
        with pytest.raises(Interrupted, match="^stopped by a signal$"):
            await waiting
        with pytest.raises(Interrupted):  # nor does anything begin for which there would be room
            await RequestLimits(stop=stop).attempt()

    asyncio.run(run())
