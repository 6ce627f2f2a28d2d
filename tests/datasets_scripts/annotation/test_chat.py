import asyncio
from dataclasses import replace

import pytest

from mglmm.datasets_scripts.annotation.chat import (
    ChatRequest,
    ChatResult,
    Verdict,
    Violation,
    ask,
    image_part,
    text_message,
)

QUESTION = ChatRequest((text_message("system", "Be brief."), text_message("user", "Name it.")), max_tokens=100)


class Scripted:
    """Gives its answers in turn and keeps the requests."""

    model = "scripted"

    def __init__(self, *answers: str | ChatResult):
        self.answers = [a if isinstance(a, ChatResult) else ChatResult(a, "stop", 10, 2) for a in answers]
        self.requests: list[ChatRequest] = []

    async def complete(self, request: ChatRequest) -> ChatResult:
        self.requests.append(request)
        return self.answers[len(self.requests) - 1]


def no_bees(text: str, last: bool) -> Verdict[str]:
    """Answers must be without 'b'; in the last attempt it is cut out."""
    if "b" in text and not last:
        return Verdict(None, [Violation("B1", "It holds a b.")])
    return Verdict(text.replace("b", ""), flags=["cut"] if "b" in text else [])


def run_ask(client: Scripted, attempts: int = 3, request: ChatRequest = QUESTION):
    return asyncio.run(ask(client, request, no_bees, about=["m0001"], attempts=attempts))


def test_a_good_answer_is_taken_at_once() -> None:
    asked = run_ask(client := Scripted("cat"))
    assert (asked.value, asked.flags, len(client.requests)) == ("cat", [], 1)
    assert asked.exchange == {
        "about": ["m0001"],
        "attempts": [[]],
        "request": QUESTION.key("scripted"),
        "prompt_tokens": 10,
        "completion_tokens": 2,
    }


def test_a_bad_answer_is_shown_with_what_is_wrong() -> None:
    asked = run_ask(client := Scripted("bear", "boar", "cat"))
    assert asked.value == "cat" and asked.exchange["attempts"] == [["B1"], ["B1"], []]
    assert asked.exchange["prompt_tokens"] == 30 and asked.exchange["completion_tokens"] == 6
    _, second, third = client.requests
    assert [message["role"] for message in second.messages] == ["system", "user", "assistant", "user"]
    assert second.messages[2]["content"] == "bear" and "- It holds a b." in second.messages[3]["content"]
    # The third attempt sees the second answer alone, or its prompt would grow with each.
    assert [m["content"] for m in third.messages if m["role"] == "assistant"] == ["boar"] and len(third.messages) == 4
    assert [request.temperature for request in client.requests] == [0.2, 0.0, 0.4]
    assert asked.exchange["request"] == third.key("scripted")


def test_the_last_attempt_may_repair() -> None:
    asked = run_ask(Scripted("bear", "boar"), attempts=2)
    assert (asked.value, asked.flags) == ("oar", ["cut"])


def test_a_cut_answer_gets_more_room() -> None:
    asked = run_ask(client := Scripted(ChatResult("ca", "length", 10, 100), "cat"))
    assert asked.exchange["attempts"] == [["finish:length"], []]
    assert [request.max_tokens for request in client.requests] == [100, 150]


def test_no_value_after_the_last_failure() -> None:
    filtered = ChatResult("", "content_filter", 10, 0)
    asked = run_ask(Scripted(filtered, filtered), attempts=2)
    assert asked.value is None and asked.exchange["attempts"] == [["finish:content_filter"]] * 2


CHANGES = [
    {"temperature": 0.3},
    {"max_tokens": 101},
    {"seed": 1},  # a retried image must not read the answer that failed
    {"schema": {"type": "object"}},
    {"messages": (text_message("system", "Be brief."), text_message("user", "Name it!"))},
    {"messages": (text_message("user", "Be brief."), text_message("user", "Name it."))},  # roles count
]


@pytest.mark.parametrize("change", CHANGES)
def test_keys_differ_by_all_that_an_answer_depends_on(change: dict) -> None:
    assert replace(QUESTION, **change).key("m") != QUESTION.key("m")


def test_keys_differ_by_model_and_pictures() -> None:
    def about(jpeg: bytes, sizes: tuple = ()) -> ChatRequest:
        content = [{"type": "text", "text": "Name it."}, image_part(jpeg)]
        return replace(QUESTION, messages=({"role": "user", "content": content},), image_sizes=sizes)

    keys = {QUESTION.key("m"), QUESTION.key("n"), about(b"one").key("m"), about(b"two").key("m")}
    assert len(keys) == 4
    assert about(b"one", ((8, 8),)).key("m") == about(b"one").key("m")  # only for the estimate
    # 8 characters of text, one tile and the base of one picture; then six tiles.
    assert about(b"one", ((512, 100),)).prompt_tokens() == 2 + 170 + 85
    assert about(b"one", ((1025, 600),)).prompt_tokens() == 2 + 6 * 170 + 85
