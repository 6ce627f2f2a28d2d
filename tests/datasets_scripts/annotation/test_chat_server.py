"""The server that stands in for a language model: its faults are what they are called, and come when they should."""

import json
import threading
import urllib.error
import urllib.request
from typing import Any

import pytest

from tests.chat_server import ChatServer, always, chat_server, nth, once, share

LISTED = json.dumps({"objects": [{"id": "m0001", "label": "dog"}, {"id": "m0002", "label": "cat"}]})
TAGGED = "There is <obj_1>a dog</obj_1> beside <obj_2>a cat</obj_2>."
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def post(server: ChatServer, text: str = "q", timeout: float = 30, **fields: Any) -> Any:
    """(text, finish reason), or the status of an error."""
    body = {"model": "m", "messages": [{"role": "user", "content": text}], "max_tokens": 100, **fields}
    asked = urllib.request.Request(f"{server.url}/chat/completions", json.dumps(body).encode())
    try:
        with OPENER.open(asked, timeout=timeout) as response:
            choice = json.load(response)["choices"][0]
    except urllib.error.HTTPError as error:
        return error.code
    return choice["message"]["content"], choice["finish_reason"]


@pytest.mark.parametrize(
    ("fault", "answer", "reply"),
    [
        ("bad_json", LISTED, (LISTED[:-1], "stop")),
        ("bad_json", TAGGED, (TAGGED[:-1], "stop")),
        ("missing_ids", LISTED, ('{"objects": [{"id": "m0001", "label": "dog"}]}', "stop")),
        ("missing_ids", TAGGED, ("There is a dog beside <obj_2>a cat</obj_2>.", "stop")),
        ("duplicate_tag", '{"objects": [1, 2]}', ('{"objects": [1, 1, 2]}', "stop")),
        ("duplicate_tag", "<obj_1>a</obj_1>!", ("<obj_1>a</obj_1> and <obj_1>a</obj_1>!", "stop")),
        ("truncated", "abcdef", ("abc", "length")),
        ("refuse", "x", ("I cannot help with that.", "stop")),
        ("429", "x", 429),
        ("500", "x", 500),
        ("401", "x", 401),
        ("400 response_format", "x", ("x", "stop")),  # none was asked for
    ],
)
def test_faults(fault: str, answer: str, reply: Any) -> None:
    with chat_server(lambda _: answer, [(nth(0), fault)]) as server:
        assert post(server) == reply
        assert post(server) == (answer, "stop")
    assert [received.fault for received in server.requests] == [fault, ""]
    assert server.requests[0].status == (reply if isinstance(reply, int) else 200)


def test_structured_output_is_refused_where_it_is_asked_for() -> None:
    with chat_server(lambda _: "x", [(always, "400 response_format")]) as server:
        assert post(server, response_format={"type": "json_object"}) == 400


def test_answers_end_at_the_limit_of_tokens() -> None:
    with chat_server(lambda _: "12345678") as server:
        assert [post(server, max_tokens=limit) for limit in (1, 2)] == [("1234", "length"), ("12345678", "stop")]


def test_faults_depend_on_the_question_alone() -> None:
    faults = [(share(3), "refuse"), (once(share(3, 1)), "500")]
    questions = [f"question {number}" for number in range(30)]

    def outcomes(asked: list[str]) -> dict[str, str]:
        with chat_server(lambda _: "x", faults) as server:
            for text in asked:
                post(server, text)
        return {received.body["messages"][0]["content"]: received.fault for received in server.requests}

    found = outcomes(questions)
    assert outcomes(questions[::-1]) == found
    assert set(found.values()) == {"", "refuse", "500"}
    with chat_server(lambda _: "x", faults) as server:
        refused, broken = (next(text for text in found if found[text] == fault) for fault in ("refuse", "500"))
        assert [post(server, refused) for _ in range(2)] == [("I cannot help with that.", "stop")] * 2
        assert [post(server, broken) for _ in range(2)] == [500, ("x", "stop")]  # trying again helps
        repair = [{"role": role, "content": refused} for role in ("user", "assistant", "user")]
        assert post(server, messages=repair) == ("x", "stop")


def test_a_hanging_request_ends_with_the_server() -> None:
    outcome = []

    def ask() -> None:
        try:
            outcome.append(post(server))
        except OSError as error:
            outcome.append(error)

    arrived = threading.Event()

    def answer(_: dict[str, Any]) -> str:
        arrived.set()
        return "x"

    thread = threading.Thread(target=ask)
    with chat_server(answer, [(always, "hang")]) as server:
        thread.start()
        assert arrived.wait(30)
        assert outcome == []
        assert server.max_in_flight == 1
    thread.join(30)
    assert isinstance(outcome[0], OSError)
    assert server.requests[0].status == 0


def test_the_usual_answer_is_that_of_the_rules() -> None:
    pytest.importorskip("mglmm.datasets_scripts.annotation.rule_annotator")
    line = "m0001 | outline: red | box: (0.10, 0.20, 0.30, 0.40) | area: 12.0 % | in: whole image | said to be: dog"
    with chat_server() as server:
        text, _ = post(server, f"Objects:\n{line}", max_tokens=1000)
    [answered] = json.loads(text)["objects"]
    assert (answered["id"], answered["label"]) == ("m0001", "dog")
