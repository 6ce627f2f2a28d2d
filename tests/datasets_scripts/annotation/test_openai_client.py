"""The client of OpenAI-compatible servers against a real one on loopback."""

import asyncio
import json
import logging
import socket
import sys
import threading
import traceback
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

from mglmm.datasets_scripts.annotation.answer_cache import AnswerCache, CachedClient
from mglmm.datasets_scripts.annotation.chat import (
    BudgetSpent,
    ChatRequest,
    ChatResult,
    RequestFailed,
    RunStopped,
    image_part,
    text_message,
)
from mglmm.datasets_scripts.annotation.openai_client import UNAVAILABLE_AFTER, OpenAIClient
from mglmm.datasets_scripts.annotation.request_limits import RequestLimits
from tests.chat_server import ChatServer, Fault, Received, Reply, always, chat_server, nth, once

SECRET = "sk-loopback-Zx81_spectrum"
SCHEMA = {"type": "object", "properties": {}, "required": [], "additionalProperties": False}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_BASE_URL", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_CUSTOM_HEADERS", "OPENAI_ADMIN_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture(autouse=True)
def delays(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long `openai` waits before each retry; it does not really."""
    waited: list[float] = []

    async def sleep(seconds: float) -> None:
        waited.append(seconds)

    monkeypatch.setattr(anyio, "sleep", sleep)
    return waited


def echo(body: dict[str, Any]) -> str:
    content = body["messages"][-1]["content"]
    return "echo: " + (content if isinstance(content, str) else content[0]["text"])


def request(text: str = "hello", **fields: Any) -> ChatRequest:
    return ChatRequest((text_message("user", text),), 50, **fields)


def with_client(
    server: ChatServer,
    work: Callable[[OpenAIClient], Awaitable[Any]],
    limits: RequestLimits | None = None,
    **options: Any,
) -> Any:
    async def run() -> Any:
        client = OpenAIClient("model-7", server.url, limits=limits or RequestLimits(), **options)
        try:
            return await work(client)
        finally:
            await client.close()

    return asyncio.run(run())


def error_of(server: ChatServer, asked: ChatRequest, **options: Any) -> Exception:
    with pytest.raises((RequestFailed, RunStopped)) as caught:
        with_client(server, lambda client: client.complete(asked), **options)
    return caught.value


def statuses(server: ChatServer) -> list[int]:
    return [received.status for received in server.requests]


def test_a_request_arrives_as_it_is_and_the_answer_with_its_costs() -> None:
    content = [{"type": "text", "text": "what is it?"}, image_part(b"jpeg")]
    messages = (text_message("system", "be brief"), {"role": "user", "content": content})
    asked = ChatRequest(messages, 300, 0.4, SCHEMA, seed=5, image_sizes=((512, 512),))
    with chat_server(echo) as server:
        result = with_client(server, lambda client: client.complete(asked))
    assert server.requests[0].body == {
        "model": "model-7",
        "messages": [
            {"role": "system", "content": "be brief"},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "what is it?"},
                    {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64,anBlZw==", "detail": "auto"}},
                ],
            },
        ],
        "temperature": 0.4,
        "max_tokens": 300,
        "seed": 5,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "answer", "strict": True, "schema": SCHEMA},
        },
    }
    assert server.requests[0].authorization == f"Bearer {SECRET}"
    assert result == ChatResult("echo: what is it?", "stop", 4, 5)


# ---------------------------------------------------------------- retries


@pytest.mark.parametrize("fault", ["429", "500"])
def test_it_tries_again_when_the_server_says(delays: list[float], fault: str) -> None:
    with chat_server(echo, [(once(always), fault)]) as server:
        result = with_client(server, lambda client: client.complete(request()))
    assert result.text == "echo: hello"
    assert statuses(server) == [int(fault), 200]
    assert delays == [0.01]  # Retry-After; openai's own choice would be 0.4 s or more


def test_retries_count_for_the_requests_per_minute() -> None:
    now, waited = [0.0], []

    async def sleep(seconds: float) -> None:
        waited.append(seconds)
        now[0] += seconds

    limits = RequestLimits(requests_per_minute=2, clock=lambda: now[0], sleep=sleep)
    with chat_server(echo, [(nth(0, 1), "500")]) as server:
        with_client(server, lambda client: client.complete(request()), limits)
    assert statuses(server) == [500, 500, 200]
    assert waited == [60.0]


def test_retries_come_to_an_end() -> None:
    with chat_server(echo, [(always, "500")]) as server:
        error = error_of(server, request(), max_retries=2)
    assert statuses(server) == [500] * 3
    assert type(error) is RequestFailed
    assert str(error) == "no answer after all retries: status 500: The engine is dead"


def test_a_server_that_hangs_fails_the_request() -> None:
    with chat_server(echo, [(always, "hang")]) as server:
        error = error_of(server, request(), max_retries=1, timeout=0.2)
        assert len(server.requests) == 2
    assert type(error) is RequestFailed
    assert str(error) == "no answer after all retries: ReadTimeout"


def test_nobody_at_the_address() -> None:
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))

        async def run() -> None:
            url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
            await OpenAIClient("m", url, limits=RequestLimits(), max_retries=1).complete(request())

        with pytest.raises(RequestFailed, match="^no answer after all retries: ConnectError$"):
            asyncio.run(run())


def test_a_dead_server_stops_the_run_and_a_success_starts_the_count_anew() -> None:
    async def outcomes(client: OpenAIClient) -> list[type]:
        kinds = []
        for number in range(2 * UNAVAILABLE_AFTER):
            try:
                await client.complete(request(str(number)))
                kinds.append(ChatResult)
            except (RequestFailed, RunStopped) as error:
                kinds.append(type(error))
        return kinds

    lives = UNAVAILABLE_AFTER - 1
    with chat_server(echo, [(lambda received: received.number != lives, "500")]) as server:
        kinds = with_client(server, outcomes, max_retries=0)
    assert kinds == [RequestFailed] * lives + [ChatResult] + [RequestFailed] * lives + [RunStopped]


# ---------------------------------------------------------------- features


def lacks(field: str, message: str) -> Fault:
    """A server that refuses bodies in which `field` occurs."""

    def refuse(reply: Reply, received: Received) -> Reply:
        return Reply(message, status=400) if f'"{field}"' in json.dumps(received.body) else reply

    return refuse


PICTURED = (text_message("system", "s"), {"role": "user", "content": [{"type": "text", "text": "t"}, image_part(b"x")]})


@pytest.mark.parametrize(
    ("field", "message", "format_then", "missing"),
    [
        # The one that knows no schemas still gets told to answer JSON.
        ("json_schema", "'response_format.type' must be one of text, json_object", "json_object", set()),
        ("response_format", "Unrecognized request argument supplied: response_format", None, {"response_format"}),
        ("seed", "seed is not supported by this model", "json_schema", {"seed"}),
        ("detail", "Extra inputs are not permitted: messages.1.content.1.image_url.detail", "json_schema", set()),
        ("temperature", "Unsupported value: 'temperature' does not support 0.2", "json_schema", {"temperature"}),
        ("max_tokens", "Unsupported 'max_tokens': use 'max_completion_tokens'", "json_schema", {"max_tokens"}),
    ],
)
def test_what_the_server_lacks_is_left_out_from_then_on(
    field: str, message: str, format_then: str | None, missing: set[str]
) -> None:
    async def twice(client: OpenAIClient) -> None:
        await client.complete(ChatRequest(PICTURED, 50, schema=SCHEMA))
        server.requests.append(None)  # a mark between the two
        await client.complete(ChatRequest(PICTURED, 60, schema=SCHEMA))

    with chat_server(lambda _: "x", [(always, lacks(field, message))]) as server:
        with_client(server, twice)
    mark = server.requests.index(None)
    assert [received.status for received in server.requests[:mark]] == [400] * (mark - 1) + [200]
    assert mark == (3 if field == "response_format" else 2)  # json_schema, json_object, none
    [later] = server.requests[mark + 1 :]
    fields = {"model", "messages", "temperature", "max_tokens", "seed", "response_format"}
    assert fields - later.body.keys() == missing
    assert later.body.get("response_format", {}).get("type") == format_then
    assert ("detail" in json.dumps(later.body)) == (field != "detail")
    assert later.body.get("max_completion_tokens") == (60 if field == "max_tokens" else None)


def test_requests_that_learn_it_at_the_same_time_do_not_drop_more_than_the_server_lacks() -> None:
    together = threading.Barrier(3)

    def no_schemas(reply: Reply, received: Received) -> Reply:
        if received.body["response_format"]["type"] == "json_object":
            return reply
        together.wait(30)  # all three have been sent before the first one is refused
        return Reply("response_format: json_schema is not supported", status=400)

    async def three(client: OpenAIClient) -> None:
        await asyncio.gather(*(client.complete(request(str(number), schema=SCHEMA)) for number in range(3)))

    with chat_server(echo, [(always, no_schemas)]) as server:
        with_client(server, three)
    assert sorted(statuses(server)) == [200] * 3 + [400] * 3


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (
            400,
            {"error": {"message": "picture too large"}},
            r"the server refuses the request \(400\): picture too large",
        ),
        # `detail` is a field of the error here, no complaint about ours.
        (422, {"detail": "bad picture"}, r"the server refuses the request \(422\): bad picture"),
        (400, {"error": {"message": "x" * 1000}}, r"\(400\): x{297}\.\.\.$"),
        (413, "<html>\n too\n large", r"\(413\): <html> too large"),
        (400, {}, "no reason given"),
    ],
)
def test_a_refused_request_fails_with_the_reason(status: int, body: Any, message: str) -> None:
    data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
    with chat_server(echo, [(always, lambda *_: Reply("", status=status, body=data))]) as server:
        error = error_of(server, ChatRequest(PICTURED, 50, schema=SCHEMA))
    assert type(error) is RequestFailed
    with pytest.raises(RequestFailed, match=message):
        raise error
    assert len(server.requests) == 1


# ---------------------------------------------------------------- answers


def completion(message: Any, finish_reason: Any = "stop", usage: Any = None) -> bytes:
    return json.dumps({"choices": [{"message": message, "finish_reason": finish_reason}], "usage": usage}).encode()


@pytest.mark.parametrize(
    ("body", "result"),
    [
        (completion({"content": "a" * 9}), ChatResult("a" * 9, "stop", 1, 3)),  # no usage: by characters
        (completion({"content": "a"}, usage={"prompt_tokens": -5}), ChatResult("a", "stop", 1, 1)),  # nor a usable one
        (completion({"content": "a"}, None), ChatResult("a", "stop", 1, 1)),  # no reason: as it is
        (completion({"content": "a"}, "content_filter"), ChatResult("a", "content_filter", 1, 1)),
        (completion({"content": None}), ChatResult("", "stop", 1, 1)),
        (completion({"content": None, "refusal": "I won't."}), ChatResult("I won't.", "stop", 1, 3)),
        (b'{"choices": [{"message": {"content": "\\ud83d!"}}]}', ChatResult("?!", "stop", 1, 1)),  # half a character
        (b'{"choices": []}', None),
        (b'{"choices": null}', None),
        (b'{"choices": {"0": 1}}', None),
        (b'{"choices": [{"message": {"content": ["a"]}}]}', None),
        (b'{"choices": [{"message": "a"}]}', None),
        (b"[]", None),
        (b"<html>", None),
        (b"", None),
        (b"[" * 100_000, None),
    ],
    ids=range(16),
)
def test_answers_of_all_kinds(body: bytes, result: ChatResult | None) -> None:
    with chat_server(echo, [(always, lambda *_: Reply("", body=body))]) as server:
        if result is not None:
            assert with_client(server, lambda client: client.complete(request())) == result
        else:
            error = error_of(server, request())
            assert type(error) is RequestFailed
            assert str(error) == "the server's answer is not one of the chat-completions protocol"
    assert len(server.requests) == 1


# ---------------------------------------------------------------- keys


def leaks(status: int) -> Fault:
    """Tells the key in its error, in full and masked as OpenAI does."""
    return lambda _, received: Reply(f"bad key {received.authorization} (sk-loop****rum)", status=status)


def leaky_answer(_: Reply, received: Received) -> Reply:
    return Reply(f"you are {received.authorization}", finish_reason=received.authorization)


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        ("401", RunStopped, r"{url} does not accept the key in OPENAI_API_KEY \(401\): Incorrect API key .*\[key\]"),
        (leaks(402), RunStopped, r"OPENAI_API_KEY \(402\): bad key Bearer \[key\] \(\[key\]\)"),
        (leaks(403), RunStopped, r"OPENAI_API_KEY \(403\): bad key Bearer \[key\] \(\[key\]\)"),
        (leaks(404), RunStopped, r"{url} does not know the model model-7 or this address \(404\): bad key"),
        (leaks(400), RequestFailed, r"refuses the request \(400\): bad key Bearer \[key\] \(\[key\]\)"),
        (leaks(429), RequestFailed, r"status 429: bad key Bearer \[key\] \(\[key\]\)"),
        (leaks(503), RequestFailed, r"status 503: bad key Bearer \[key\] \(\[key\]\)"),
        ("hang", RequestFailed, "ReadTimeout"),
        (lambda _, received: Reply("", body=received.authorization.encode()), RequestFailed, "not one of the"),
    ],
    ids=["401", "402", "403", "404", "400", "429", "503", "hang", "malformed"],
)
def test_the_key_is_in_no_error_and_no_log(
    fault: str | Fault, kind: type, message: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with chat_server(echo, [(always, fault)]) as server:
        error = error_of(server, request(), max_retries=1, timeout=0.2)
        assert server.requests[0].authorization == f"Bearer {SECRET}"  # it was there to be told
    assert type(error) is kind
    with pytest.raises(kind, match=message.format(url=server.url)):
        raise error
    assert error.__cause__ is None and error.__context__ is None  # nothing that holds the request
    printed = "".join(traceback.format_exception(error))
    for place in (repr(error), repr(vars(error)), printed, caplog.text, *capfd.readouterr()):
        assert SECRET not in place
    assert "openai" in caplog.text  # the log has been looked at at all


def test_the_key_is_in_no_answer_and_no_cache(tmp_path: Path) -> None:
    async def ask(client: OpenAIClient) -> ChatResult:
        with AnswerCache(tmp_path, "x") as cache:
            return await CachedClient(client, cache).complete(request())

    with chat_server(echo, [(always, leaky_answer)]) as server:
        result = with_client(server, ask)
    assert result[:2] == ("you are Bearer [key]", "Bearer [key]")
    stored = (tmp_path / "requests-x.jsonl").read_text()
    assert "[key]" in stored and SECRET not in stored


def test_a_placeholder_for_a_key_may_be_a_word_of_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "EMPTY")
    with chat_server(echo) as server:
        assert with_client(server, lambda client: client.complete(request("an EMPTY cup"))).text == "echo: an EMPTY cup"


def test_a_local_server_needs_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    with chat_server(echo, [(nth(1), "401")]) as server:
        with_client(server, lambda client: client.complete(request()))
        assert server.requests[0].authorization == "Bearer none"
        error = error_of(server, request())
    assert str(error).startswith(f"{server.url} wants a key in OPENAI_API_KEY (401): ")


def test_a_spent_quota_stops_the_run() -> None:
    body = b'{"error": {"message": "You exceeded your current quota", "code": "insufficient_quota"}}'
    with chat_server(echo, [(always, lambda *_: Reply("", status=429, body=body))]) as server:
        error = error_of(server, request(), max_retries=0)
    assert type(error) is RunStopped
    assert str(error) == "the quota of the key in OPENAI_API_KEY is spent: You exceeded your current quota"


@pytest.mark.parametrize(
    ("key", "url", "message"),
    [
        (None, None, "^no key: set the environment variable MY_KEY, or name a server that needs none$"),
        ("  ", None, "^no key: set the environment variable MY_KEY"),
        ("a b", None, "^the key in MY_KEY holds characters that cannot be sent"),  # two keys, or a sentence
        ("sch\u00fcssel", None, "^the key in MY_KEY holds characters that cannot be sent"),  # no header can hold it
        ("k\x00ey", None, "^the key in MY_KEY holds characters that cannot be sent"),
        ("k", "http://me:secret@host/v1", "^the address of the server holds more than scheme, host and path"),
        ("k", "http://host/v1?key=secret", "^the address of the server holds more than scheme, host and path"),
        ("k", "localhost:8000", "^'localhost:8000' is no address of a server, such as http://localhost:8000/v1$"),
        ("k", "file:///etc/passwd", "is no address of a server"),
        ("k", "http://", "is no address of a server"),
    ],
)
def test_what_cannot_work_is_said_at_once(
    monkeypatch: pytest.MonkeyPatch, key: str | None, url: str | None, message: str
) -> None:
    monkeypatch.delenv("MY_KEY", raising=False)
    if key is not None:
        monkeypatch.setattr("os.environ", {"MY_KEY": key})
    with pytest.raises(ValueError, match=message) as caught:
        OpenAIClient("m", url, api_key_env="MY_KEY", limits=RequestLimits())
    assert "secret" not in str(caught.value)


def test_a_key_read_from_a_file_may_end_with_a_newline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "k-1\n")
    with chat_server(echo) as server:
        with_client(server, lambda client: client.complete(request()), api_key_env="MY_KEY")
    assert server.requests[0].authorization == "Bearer k-1"


def test_the_address_may_come_from_the_environment_and_is_checked_there_too(monkeypatch: pytest.MonkeyPatch) -> None:
    with chat_server(echo) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        asyncio.run(OpenAIClient("m", limits=RequestLimits()).complete(request()))
    assert len(server.requests) == 1
    monkeypatch.setenv("OPENAI_BASE_URL", "http://me:secret@host")
    with pytest.raises(ValueError, match="holds more than scheme, host and path"):
        OpenAIClient("m", limits=RequestLimits())


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    monkeypatch.delitem(sys.modules, OpenAIClient.__module__)
    with pytest.raises(ModuleNotFoundError, match=r"^asking a server needs .*: pip install 'mglmm\[annotate\]'$"):
        import mglmm.datasets_scripts.annotation.openai_client  # noqa: F401


# ---------------------------------------------------------------- limits


@pytest.fixture
def meeting() -> Iterator[Callable[[dict[str, Any]], str]]:
    """An answer that comes only when three requests wait for theirs."""
    together = threading.Barrier(3)

    def answer(body: dict[str, Any]) -> str:
        together.wait(30)
        return echo(body)

    yield answer
    together.abort()


def test_so_many_requests_are_in_flight_and_no_more(meeting: Callable[[dict[str, Any]], str]) -> None:
    async def nine(client: OpenAIClient) -> None:
        await asyncio.gather(*(client.complete(request(str(number))) for number in range(9)))

    with chat_server(meeting) as server:
        with_client(server, nine, RequestLimits(concurrency=3))
    assert server.max_in_flight == 3
    assert statuses(server) == [200] * 9


@pytest.mark.parametrize("budget", [50, 70, 200, 1000])
def test_the_server_never_counts_more_than_the_budget(budget: int) -> None:
    async def twenty(client: OpenAIClient) -> list[Any]:
        asked = (client.complete(request(f"{number:04}" * 5)) for number in range(20))
        return await asyncio.gather(*asked, return_exceptions=True)

    limits = RequestLimits(concurrency=4, max_total_tokens=budget)
    with chat_server(lambda body: "y" * 4 * (len(echo(body)) % 7 + 3)) as server:
        results = with_client(server, twenty, limits)
    paid = [result for result in results if isinstance(result, ChatResult)]
    assert sum(result.prompt_tokens + result.completion_tokens for result in paid) == limits.spent_tokens <= budget
    assert {type(result) for result in results} - {ChatResult} == (set() if budget == 1000 else {BudgetSpent})
    assert len(server.requests) == len(paid)  # what does not fit is not sent
    # Each costs 10 tokens at most of the 55 that it reserves: all but the last few of the budget are used.
    assert len(paid) == 20 or limits.spent_tokens + 55 > budget
