"""Annotator behind any server that speaks OpenAI's chat-completions protocol: OpenAI itself, vLLM, SGLang, LM Studio ..."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from typing import Any

from .annotators import checked_address
from .chat import CHARACTERS_PER_TOKEN, ChatRequest, ChatResult, Message, RequestFailed, RunStopped
from .request_limits import RequestLimits

try:
    import openai
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("asking a server needs the package openai: pip install 'mglmm[annotate]'") from error

UNAVAILABLE_AFTER = 8  # requests in a row without an answer, each with all its retries
LONGEST_REASON = 300  # characters of what a server says about an error
SECRET = re.compile(r"\bsk-[\w*.-]+")  # also half-masked ones, as servers quote them
SHORTEST_SECRET = 8  # characters; shorter keys are placeholders such as "EMPTY", which answers may contain as a word

# What a refusal (400, 422) speaks of -> the feature that this server or model does not have.
REFUSED = {
    "json_schema": re.compile("response_format|json_schema|json_object"),
    "json_object": re.compile("response_format|json_schema|json_object"),
    "seed": re.compile(r"\bseed\b"),
    "detail": re.compile(r"\bdetail\b"),
    "temperature": re.compile(r"\btemperature\b"),  # models that think first take only their own
    "max_tokens": re.compile("max_completion_tokens"),  # the newer name of the same thing
}


class OpenAIClient:
    """
    A `ChatClient`. Retries with backoff, `Retry-After` and timeouts are those of the package `openai`. Features that the
    server refuses (a schema, a seed, ...) are left out from then on.

    The key comes from the environment only. It is kept out of errors, logs and answers.

    Args:
        model: As the server names it.
        base_url: Such as "http://localhost:8000/v1"; without it the environment variable OPENAI_BASE_URL, then OpenAI's own.
        api_key_env: Environment variable that holds the key. Where it is not set, a server named by `base_url` is asked
            without a key.
        timeout: Seconds without a sign of life from the server.
        max_retries: Of each request.

    Raises:
        ValueError: there is no key, or none that can be sent, or the address is none or carries a secret.
    """

    def __init__(
        self,
        model: str,
        base_url: str | None = None,
        *,
        api_key_env: str = "OPENAI_API_KEY",
        limits: RequestLimits,
        timeout: float = 120.0,
        max_retries: int = 5,
    ):
        self.model = model
        self._limits = limits
        self._api_key_env = api_key_env
        base_url = base_url or os.environ.get("OPENAI_BASE_URL") or None
        self._server = checked_address(base_url) if base_url else "https://api.openai.com"
        self._key = _read_key(api_key_env, needed=base_url is None)
        self._client = openai.AsyncOpenAI(
            api_key=self._key or "none",
            base_url=base_url,
            timeout=timeout,
            max_retries=max_retries,
            # The hook comes before each attempt, retries among them, and its wait does not count for the timeout.
            http_client=openai.DefaultAsyncHttpxClient(event_hooks={"request": [self._before_attempt]}),
        )
        self._refused: set[str] = set()  # keys of REFUSED
        self._unanswered = 0  # requests in a row

    async def complete(self, request: ChatRequest) -> ChatResult:
        """
        Raises:
            RequestFailed: the server refuses this request, or did not answer it.
            RunStopped: it does not accept the key or the model, it did not answer `UNAVAILABLE_AFTER` requests in a row, or
                the budget of tokens is spent.
        """
        async with self._limits.slot(request.prompt_tokens() + request.max_tokens) as slot:
            result = self._read(await self._send(request), request)
            slot.settle(result.prompt_tokens + result.completion_tokens)
            return result

    async def close(self) -> None:
        await self._client.close()

    def redacted(self, text: str) -> str:
        """`text` without the key and anything that looks like one."""
        if self._key:
            text = text.replace(self._key, "[key]")
        return SECRET.sub("[key]", text)

    async def _before_attempt(self, request: Any) -> None:
        # First attempts have had their turn: what is raised in here openai would take for a broken connection.
        if request.headers.get("x-stainless-retry-count", "0") != "0":
            await self._limits.attempt_again()

    async def _send(self, request: ChatRequest) -> str:
        """The body of the answer, JSON if the server keeps the protocol."""
        while True:
            await self._limits.attempt()
            body = self._body(request)
            try:
                response = await self._client.chat.completions.with_raw_response.create(**body)
            except openai.APIError as error:
                refused = _refused(error, body) if isinstance(error, openai.APIStatusError) else set()
                failure = self._failure(error)
            else:
                return response.text
            if not refused:
                raise failure  # out here, so that it does not carry the original error, whose request holds the key
            # Another request may have learnt the same in the meantime; a further one then only asks again.
            self._refused |= refused

    def _body(self, request: ChatRequest) -> dict[str, Any]:
        """What is sent, without what the server is known to refuse."""
        body: dict[str, Any] = {"model": self.model, "messages": list(request.messages)}
        if "detail" in self._refused:
            body["messages"] = [_without_detail(message) for message in request.messages]
        name = "max_completion_tokens" if "max_tokens" in self._refused else "max_tokens"
        body[name] = request.max_tokens
        if "temperature" not in self._refused:
            body["temperature"] = request.temperature
        if "seed" not in self._refused:
            body["seed"] = request.seed
        if request.schema is not None and "json_schema" not in self._refused:
            schema = {"name": "answer", "strict": True, "schema": request.schema}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        elif request.schema is not None and "json_object" not in self._refused:
            body["response_format"] = {"type": "json_object"}
        return body

    def _failure(self, error: openai.APIError) -> RequestFailed | RunStopped:
        """What an error means for the run; nothing of the original is in it but redacted text."""
        if isinstance(error, openai.APIStatusError):
            status = error.status_code
            reason = self._reason(error)
            if status in (401, 402, 403):
                wants = "does not accept the key in" if self._key else "wants a key in"
                return RunStopped(f"{self._server} {wants} {self._api_key_env} ({status}): {reason}")
            if status == 404:
                return RunStopped(
                    f"{self._server} does not know the model {self.model} or this address (404): {reason}"
                )
            if error.code == "insufficient_quota":
                return RunStopped(f"the quota of the key in {self._api_key_env} is spent: {reason}")
            if status not in (408, 409, 429) and status < 500:
                return RequestFailed(f"the server refuses the request ({status}): {reason}")
            what = f"status {status}: {reason}"
        else:
            # The kind of the cause only: its text can hold headers, or the address of a proxy with its password.
            what = type(error.__cause__ or error).__name__
        return self._unavailable(f"no answer after all retries: {what}")

    def _unavailable(self, what: str) -> RequestFailed | RunStopped:
        self._unanswered += 1
        if self._unanswered < UNAVAILABLE_AFTER:
            return RequestFailed(what)
        return RunStopped(
            f"the server {self._server} does not answer: {self._unanswered} requests in a row failed, the last with {what}"
        )

    def _reason(self, error: openai.APIStatusError) -> str:
        """What the server says, in one line."""
        message = error.body.get("message") if isinstance(error.body, dict) else None
        said = message if isinstance(message, str) else "; ".join(_texts_in(error.body))
        said = " ".join(self.redacted(said or "no reason given").split())
        return said if len(said) <= LONGEST_REASON else said[: LONGEST_REASON - 3] + "..."

    def _read(self, text: str, request: ChatRequest) -> ChatResult:
        try:
            content = json.loads(text)
            choice = content["choices"][0]
            message = choice["message"]
            answer = message.get("content") or message.get("refusal") or ""
            finish_reason = choice.get("finish_reason") or "stop"
            usage = content.get("usage") or {}
            counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
        except (ValueError, TypeError, AttributeError, LookupError, RecursionError):
            answer = finish_reason = None
        if not (isinstance(answer, str) and isinstance(finish_reason, str)):
            raise self._unavailable("the server's answer is not one of the chat-completions protocol")
        self._unanswered = 0
        if self._key and len(self._key) >= SHORTEST_SECRET:
            answer = answer.replace(self._key, "[key]")
        answer = answer.encode("utf-8", "replace").decode()  # half a surrogate pair could not be sent back
        estimates = (request.prompt_tokens(), len(answer) // CHARACTERS_PER_TOKEN + 1)
        prompt, completion = (
            count if type(count) is int and count >= 0 else estimate
            for count, estimate in zip(counts, estimates, strict=True)
        )
        return ChatResult(answer, self.redacted(finish_reason)[:40], prompt, completion)


def _read_key(variable: str, needed: bool) -> str | None:
    key = os.environ.get(variable, "").strip()
    if not key:
        if needed:
            raise ValueError(f"no key: set the environment variable {variable}, or name a server that needs none")
        return None
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise ValueError(
            f"the key in {variable} holds characters that cannot be sent: is it copied in full, and alone?"
        )
    return key


def _refused(error: openai.APIStatusError, body: dict[str, Any]) -> set[str]:
    """Which of the features in use the server complains about."""
    if error.status_code not in (400, 422):
        return set()
    used = {"seed", "temperature", "max_tokens"} & body.keys()
    if "response_format" in body:
        used.add(body["response_format"]["type"])
    if any("detail" in part.get("image_url", ()) for message in body["messages"] for part in _parts(message)):
        used.add("detail")
    said = " ".join(_texts_in(error.body))
    return {feature for feature in used if REFUSED[feature].search(said)}


def _without_detail(message: Message) -> Message:
    if isinstance(message["content"], str):
        return message
    parts = [
        {**part, "image_url": {"url": part["image_url"]["url"]}} if part["type"] == "image_url" else part
        for part in _parts(message)
    ]
    return {**message, "content": parts}


def _parts(message: Message) -> list[dict[str, Any]]:
    return [] if isinstance(message["content"], str) else message["content"]


def _texts_in(body: Any, depth: int = 4) -> Iterator[str]:
    """The strings of a JSON value; not the names of its fields, of which `detail` would be taken for a complaint."""
    if isinstance(body, str):
        yield body
    elif isinstance(body, dict | list) and depth:
        for value in body.values() if isinstance(body, dict) else body:
            yield from _texts_in(value, depth - 1)
