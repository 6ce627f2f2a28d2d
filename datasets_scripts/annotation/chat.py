"""What a step says to a language model, whoever answers: requests, answers, and the loop that asks again with what was wrong."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from .config import PROMPT_VERSION, digest_of
from .records import Exchange

T = TypeVar("T")
Message = Mapping[str, Any]  # as in the chat-completions protocol

TEMPERATURES = (0.2, 0.0, 0.4)  # of the attempts; the last one also of any later
CHARACTERS_PER_TOKEN = 4  # about, of English
TOKENS_PER_TILE, TOKENS_PER_IMAGE, TILE = 170, 85, 512  # how OpenAI counts a picture; others take fewer or more


@dataclass(frozen=True)
class ChatRequest:
    """
    Args:
        messages: In the form of the chat-completions protocol; pictures are data URLs (see `image_part`).
        max_tokens: Of the answer.
        schema: JSON schema that the answer shall follow; free text without one.
        seed: Differs between rounds of a retried image, so that a cached answer that failed is not read again.
        image_sizes: (width, height) of the pictures, for the estimate of tokens.
    """

    messages: tuple[Message, ...]
    max_tokens: int
    temperature: float = TEMPERATURES[0]
    schema: Mapping[str, Any] | None = None
    seed: int = 0
    image_sizes: tuple[tuple[int, int], ...] = ()

    def key(self, model: str) -> str:
        """sha256 of all that the answer depends on; pictures count by their own hashes."""
        content = [[message["role"], _hashed(message["content"])] for message in self.messages]
        return digest_of(
            [PROMPT_VERSION, model, content, self.temperature, self.max_tokens, self.seed, dict(self.schema or {})]
        )

    def prompt_tokens(self) -> int:
        """About how many tokens the messages cost."""
        text = sum(len(part) for message in self.messages for part in texts_of(message))
        tiles = sum(-(-width // TILE) * -(-height // TILE) for width, height in self.image_sizes)
        return text // CHARACTERS_PER_TOKEN + tiles * TOKENS_PER_TILE + len(self.image_sizes) * TOKENS_PER_IMAGE


class ChatResult(NamedTuple):
    """
    Args:
        finish_reason: "stop" for a whole answer; "length" for one that was cut.
        prompt_tokens, completion_tokens: As the server counts them.
    """

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int


class Estimate(NamedTuple):
    """What a step will cost at most, if every first answer keeps the rules."""

    requests: int
    prompt_tokens: int
    completion_tokens: int


class ChatClient(Protocol):
    """Who answers. `model` names it in the keys of requests."""

    @property
    def model(self) -> str: ...

    async def complete(self, request: ChatRequest) -> ChatResult:
        """Raises `RequestFailed` if this request gets no answer, `RunStopped` if none will."""


class RequestFailed(RuntimeError):
    """One request got no answer: the server refuses it, or went on failing. Its image fails, the others go on."""


class RunStopped(RuntimeError):
    """No request will get an answer: the key is not accepted, the budget is spent, or a stop was asked for."""


class BudgetSpent(RunStopped):
    """A further request could exceed the budget of tokens."""


class Interrupted(RunStopped):
    """Somebody asked to stop."""


class Violation(NamedTuple):
    """A rule that an answer breaks: its code, and what the model is told."""

    code: str
    message: str


class Verdict(NamedTuple, Generic[T]):
    """What an answer is worth: `value` counts if no hard rule is broken; `flags` are codes of broken soft rules."""

    value: T | None
    violations: Sequence[Violation] = ()
    flags: Sequence[str] = ()


class Asked(NamedTuple, Generic[T]):
    """`value` is `None` if every attempt failed."""

    value: T | None
    flags: Sequence[str]
    exchange: Exchange


def text_message(role: str, text: str) -> Message:
    return {"role": role, "content": text}


def image_part(jpeg: bytes) -> dict[str, Any]:
    """A picture as a part of a message's content."""
    url = f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode('ascii')}"
    return {"type": "image_url", "image_url": {"url": url, "detail": "auto"}}


def texts_of(message: Message) -> list[str]:
    """The texts of a message, without its pictures."""
    content = message["content"]
    return [content] if isinstance(content, str) else [part["text"] for part in content if part["type"] == "text"]


async def ask(
    client: ChatClient,
    request: ChatRequest,
    check: Callable[[str, bool], Verdict[T]],
    *,
    about: Sequence[str],
    attempts: int,
) -> Asked[T]:
    """
    Ask until an answer keeps the rules: after a failure the conversation goes on with what was wrong with it.

    Args:
        check: (answer, whether it is the last attempt) -> verdict.
        about: Ids of the targets, for the record.
    """
    codes: list[list[str]] = []
    spent = [0, 0]
    key = ""
    for attempt in range(attempts):
        key = request.key(client.model)
        result = await client.complete(request)
        spent = [spent[0] + result.prompt_tokens, spent[1] + result.completion_tokens]
        verdict = check(result.text, attempt == attempts - 1)
        violations = list(verdict.violations)
        max_tokens = request.max_tokens
        if result.finish_reason != "stop":
            violations = [Violation(f"finish:{result.finish_reason}", "The answer was cut off: give it in full.")]
            max_tokens += max_tokens // 2 if result.finish_reason == "length" else 0
        codes.append([violation.code for violation in violations])
        if not violations:
            return Asked(verdict.value, verdict.flags, _exchange(about, codes, key, spent))
        complaint = "\n".join(
            ["The answer breaks these rules:", *(f"- {violation.message}" for violation in violations)]
            + ["Answer again, in full and in the same form."]
        )
        request = replace(
            request,
            # Only the last answer is shown: a growing conversation would cost more with each attempt.
            messages=(
                *_asked(request.messages),
                text_message("assistant", result.text),
                text_message("user", complaint),
            ),
            temperature=TEMPERATURES[min(attempt + 1, len(TEMPERATURES) - 1)],
            max_tokens=max_tokens,
        )
    return Asked(None, (), _exchange(about, codes, key, spent))


async def finish_all(steps: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """
    Run steps together and wait for all of them, even if one fails: what a request under way costs would be lost with it.

    Raises the first `RunStopped`, else the first error, in the order of the steps.
    """
    results = await asyncio.gather(*steps, return_exceptions=True)
    errors = [result for result in results if isinstance(result, BaseException)]
    if errors:
        raise next((error for error in errors if isinstance(error, RunStopped)), errors[0])
    return [result for result in results if not isinstance(result, BaseException)]


def _asked(messages: Sequence[Message]) -> Sequence[Message]:
    """The messages before the first answer."""
    roles = [message["role"] for message in messages]
    return messages[: roles.index("assistant")] if "assistant" in roles else messages


def _exchange(about: Sequence[str], codes: list[list[str]], key: str, spent: Sequence[int]) -> Exchange:
    return {
        "about": list(about),
        "attempts": codes,
        "request": key,
        "prompt_tokens": spent[0],
        "completion_tokens": spent[1],
    }


def _hashed(content: Any) -> Any:
    if isinstance(content, str):
        return content
    hashed = []
    for part in content:
        if part["type"] == "image_url":
            data = re.sub(r"^data:[^,]*,", "", part["image_url"]["url"])
            hashed.append({"image": hashlib.sha256(data.encode()).hexdigest()})
        else:
            hashed.append(part["text"])
    return hashed
