"""A server on loopback that speaks the chat-completions protocol, with answers made from the request and faults on demand."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

from mglmm.datasets_scripts.annotation.chat import CHARACTERS_PER_TOKEN, ChatRequest


@dataclass
class Received:
    """
    A request.

    Args:
        body: As sent.
        authorization: The header, or "".
        number: How many requests came before it.
        hash: Of the body.
        attempt: How many requests with this hash came before it.
        time: When it came, in seconds of `time.monotonic`.
        fault: Name of the fault that it met, or "".
        status: Of the reply; 0 as long as there is none, and for good if the server hung.
    """

    body: dict[str, Any]
    authorization: str
    number: int
    hash: int
    attempt: int
    time: float
    fault: str = ""
    status: int = 0

    @property
    def is_repair(self) -> bool:
        """Whether it asks again with what was wrong with an answer."""
        return any(message["role"] == "assistant" for message in self.body["messages"])


class Reply(NamedTuple):
    """What goes back: the answer's text, or (for a status other than 200) the error's message, unless there is a `body`."""

    text: str
    finish_reason: str = "stop"
    status: int = 200
    headers: Mapping[str, str] = {}
    body: bytes | None = None


When = Callable[[Received], bool]
Fault = Callable[[Reply, Received], Reply]  # (reply without the fault, request) -> reply


# ---------------------------------------------------------------- when a fault happens


def nth(*numbers: int) -> When:
    """The requests that come as these (from 0). With several requests in flight, which these are is chance."""
    return lambda received: received.number in numbers


def share(of: int, rest: int = 0) -> When:
    """About one of `of` first questions, by their content alone: the same ones in every run, on every try, never repairs."""
    return lambda received: not received.is_repair and received.hash % of == rest


def once(when: When) -> When:
    """Only the first time that such a request comes: trying again helps."""
    return lambda received: received.attempt == 0 and when(received)


def always(_: Received) -> bool:
    return True


# ---------------------------------------------------------------- faults


def bad_json(reply: Reply, _: Received) -> Reply:
    """The last character is missing: JSON does not parse, a description has no full stop."""
    return reply._replace(text=reply.text.rstrip()[:-1])


def missing_ids(reply: Reply, _: Received) -> Reply:
    """The last object of a list is left out, the first tag of a description is taken away."""
    return _changed(
        reply, lambda objects: objects[:-1], lambda text: re.sub(r"<(obj_\d+)>(.*?)</\1>", r"\2", text, count=1)
    )


def duplicate_tag(reply: Reply, _: Received) -> Reply:
    """The first object, or tag, comes twice."""
    return _changed(
        reply,
        lambda objects: [*objects[:1], *objects],
        lambda text: re.sub(r"(<(obj_\d+)>.*?</\2>)", r"\1 and \1", text, count=1),
    )


def truncated(reply: Reply, _: Received) -> Reply:
    """The answer is cut in the middle, and the server says so."""
    return reply._replace(text=reply.text[: len(reply.text) // 2], finish_reason="length")


def no_response_format(reply: Reply, received: Received) -> Reply:
    """A server without structured output."""
    if "response_format" not in received.body:
        return reply
    return Reply("Unrecognized request argument supplied: response_format", status=400)


def unauthorized(reply: Reply, received: Received) -> Reply:
    """Refuses the key, and tells it to whoever reads the error."""
    return Reply(f"Incorrect API key provided: {received.authorization.removeprefix('Bearer ')}", status=401)


FAULTS: dict[str, Fault] = {
    "bad_json": bad_json,
    "missing_ids": missing_ids,
    "duplicate_tag": duplicate_tag,
    "truncated": truncated,
    "429": lambda *_: Reply("Rate limit reached", status=429, headers={"Retry-After": "0.01"}),
    "500": lambda *_: Reply("The engine is dead", status=500, headers={"Retry-After": "0.01"}),
    "hang": lambda reply, _: reply._replace(status=0),  # no reply as long as the server runs
    "refuse": lambda *_: Reply("I cannot help with that."),
    "400 response_format": no_response_format,
    "401": unauthorized,
}


def _changed(reply: Reply, objects: Callable[[list[Any]], list[Any]], text: Callable[[str], str]) -> Reply:
    try:
        content = json.loads(reply.text)
    except ValueError:
        return reply._replace(text=text(reply.text))
    return reply._replace(text=json.dumps({**content, "objects": objects(content["objects"])}))


# ---------------------------------------------------------------- the server


def rule_answer(body: dict[str, Any]) -> str:
    """What the rule-based annotator says to the messages of a request."""
    from mglmm.datasets_scripts.annotation.rule_annotator import RuleAnnotator

    return asyncio.run(RuleAnnotator().complete(_request(body))).text


def _request(body: dict[str, Any]) -> ChatRequest:
    schema = body.get("response_format", {}).get("json_schema", {}).get("schema")
    return ChatRequest(tuple(body["messages"]), body.get("max_tokens") or body["max_completion_tokens"], schema=schema)


class ChatServer(ThreadingHTTPServer):
    """
    Attributes:
        url: Base URL for a client.
        requests: What has come, in order. `[r for r in server.requests if r.status == 200]` has been paid for.
        max_in_flight: How many requests were open at the same time, at most.
    """

    daemon_threads = True

    def __init__(self, answer: Callable[[dict[str, Any]], str], faults: Sequence[tuple[When, str | Fault]]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.requests: list[Received] = []
        self.max_in_flight = 0
        self.answer, self.faults = answer, faults
        self.closing = threading.Event()
        self._lock = threading.Lock()
        self._in_flight = 0
        self._attempts: Counter[int] = Counter()

    def reply_to(self, body: dict[str, Any], authorization: str) -> Reply:
        digest = int(hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest(), 16)
        with self._lock:
            received = Received(
                body, authorization, len(self.requests), digest, self._attempts[digest], time.monotonic()
            )
            self._attempts[digest] += 1
            self.requests.append(received)
            self._in_flight += 1
            self.max_in_flight = max(self.max_in_flight, self._in_flight)
        try:
            reply = Reply(self.answer(body))
            fault = next((fault for when, fault in self.faults if when(received)), None)
            if fault is not None:
                received.fault = fault if isinstance(fault, str) else fault.__name__
                reply = (FAULTS[fault] if isinstance(fault, str) else fault)(reply, received)
            if not reply.status:
                self.closing.wait()
            received.status = reply.status
            return reply
        finally:
            with self._lock:
                self._in_flight -= 1


@contextmanager
def chat_server(
    answer: Callable[[dict[str, Any]], str] | None = None, faults: Sequence[tuple[When, str | Fault]] = ()
) -> Iterator[ChatServer]:
    """
    A running server, for the time of a `with` block.

    Args:
        answer: (body of the request) -> text; the rule-based annotator without one.
        faults: (when, name in `FAULTS` or a function): the first one that applies happens.
    """
    with ChatServer(answer or rule_answer, faults) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        try:
            yield server
        finally:
            server.closing.set()
            server.shutdown()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: ChatServer

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/v1/chat/completions":
            return self._send(Reply(f"there is no {self.path}", status=404), {})
        reply = self.server.reply_to(body, self.headers.get("Authorization", ""))
        if reply.status:
            self._send(reply, body)
        else:
            self.close_connection = True

    def _send(self, reply: Reply, body: dict[str, Any]) -> None:
        content = _completion(body, reply) if reply.status == 200 else {"error": {"message": reply.text}}
        data = json.dumps(content).encode() if reply.body is None else reply.body
        self.send_response(reply.status)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(data), **reply.headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(data)


def _completion(body: dict[str, Any], reply: Reply) -> dict[str, Any]:
    request = _request(body)
    longest = CHARACTERS_PER_TOKEN * request.max_tokens
    finish_reason = reply.finish_reason if len(reply.text) <= longest else "length"
    prompt, completion = request.prompt_tokens(), -(-len(reply.text[:longest]) // CHARACTERS_PER_TOKEN)
    message = {"role": "assistant", "content": reply.text[:longest]}
    choice = {"index": 0, "message": message, "finish_reason": finish_reason}
    usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    return {"id": "x", "object": "chat.completion", "model": body["model"], "choices": [choice], "usage": usage}
