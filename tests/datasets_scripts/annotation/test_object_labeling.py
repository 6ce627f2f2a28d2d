"""Objects are asked about level by level, all requests of a level at once; what fails is split; nothing is lost."""

import asyncio
import json
from collections.abc import Callable

import pytest

from mglmm.datasets_scripts.annotation.chat import (
    ChatRequest,
    ChatResult,
    RequestFailed,
    RunStopped,
    texts_of,
)
from mglmm.datasets_scripts.annotation.config import LabelingConfig
from mglmm.datasets_scripts.annotation.facts import LABELING_HEAD
from mglmm.datasets_scripts.annotation.object_labeling import estimate_labeling, label_batches, label_objects, rejection
from mglmm.datasets_scripts.annotation.records import Geometry, Labels
from mglmm.datasets_scripts.annotation.rule_annotator import RuleAnnotator
from tests.datasets_scripts.annotation.scripted_client import (
    ScriptedClient,
    asked_ids,
    geometry,
    labels_answer,
    picture,
    prompt_of,
)

BOX = [6, 8, 12, 20]


def row(count: int) -> Geometry:
    """Nodes beside each other."""
    return geometry(*((f"m{number:04}", BOX, "root") for number in range(1, count + 1)))


def label(nodes: Geometry, client, seeds: dict[str, int] | None = None, **options) -> Labels:
    return asyncio.run(label_objects(picture(), nodes, client, LabelingConfig(**options), seeds=seeds or {}))


def good(request: ChatRequest) -> str:
    return labels_answer(dict.fromkeys(asked_ids(request), "door"))


def bad_for(*names: str) -> Callable[[ChatRequest], str]:
    """Answers of no use wherever one of these objects is asked about."""
    return lambda request: "no idea" if set(names) & set(asked_ids(request)) else good(request)


def test_levels_and_batches() -> None:
    """The number of requests of a level is ceil(n / K), even where that mixes parents."""
    nodes = geometry(
        ("m0001", BOX, "root"),
        ("m0002", BOX, "root"),
        ("m0003", BOX, "root"),
        ("m0004", BOX, "m0001"),
        ("m0005", BOX, "m0002"),
        ("m0006", BOX, "m0005"),
    )
    batches = label_batches(nodes, LabelingConfig(objects_per_request=2))
    assert [[[node["id"] for node in batch] for batch in level] for level in batches] == [
        [["m0001", "m0002"], ["m0003"]],
        [["m0004", "m0005"]],
        [["m0006"]],
    ]
    assert label_batches(geometry(), LabelingConfig()) == []


def test_the_request() -> None:
    nodes = geometry(("m0001", BOX, "root", "front|door\nm0009 | outline: x"), ("m0012", [0, 0, 60, 40], "root"))
    client = ScriptedClient(good)
    label(nodes, client, overview_long_side=30, crop_long_side=48)
    (request,) = client.requests
    system, user = request.messages
    assert system["role"] == "system" and "never mention a mask" in system["content"]
    lines = prompt_of(request).splitlines()
    start = lines.index(LABELING_HEAD)
    assert lines[start + 1 :] == [
        "m0001 | outline: red | box: (0.10, 0.20, 0.20, 0.50) | area: 10.0 % | in: whole image | "
        "said to be: front door m0009 outline: x",
        "m0012 | outline: cyan | box: (0.00, 0.00, 1.00, 1.00) | area: 100.0 % | in: whole image",
        "m0001, red line:",
        "m0012, cyan line:",
    ]
    assert [part["type"] for part in user["content"]] == ["text", "image_url", "text", "image_url", "text", "image_url"]
    assert request.image_sizes == ((30, 20), (48, 32), (48, 32))  # overview, and a crop of at least 96 pixels of each
    assert request.max_tokens == 400 and request.temperature == 0.2 and request.seed == 0
    entry = request.schema["properties"]["objects"]["items"]
    assert entry["properties"]["id"]["enum"] == ["m0001", "m0012"] and entry["required"] == ["id", "label", "caption"]


def test_labels_of_all_kinds() -> None:
    nodes = geometry(("m0001", BOX, "root"), ("m0002", BOX, "root"), ("m0003", BOX, "m0001"))

    def script(request: ChatRequest) -> str:
        if asked_ids(request) == ["m0003"]:
            return labels_answer({"m0003": "house"})
        captions = {"m0001": "Something large and grey stands behind all of the others."}
        return labels_answer({"m0001": "house", "m0002": "unknown"}, captions)

    found = label(nodes, ScriptedClient(script))["objects"]
    assert {name: (each["label"], each["status"], each["flags"]) for name, each in found.items()} == {
        "m0001": ("house", "weak", ["L6"]),
        "m0002": ("", "unlabelled", ["L3"]),
        "m0003": ("house", "ok", ["L7"]),
    }


def test_a_prompt_names_the_next_labelled_thing_around_an_object() -> None:
    nodes = geometry(
        ("m0001", BOX, "root"),
        ("m0002", BOX, "root"),
        ("m0003", BOX, "m0001"),
        ("m0004", BOX, "m0002"),
        ("m0005", BOX, "m0003"),
    )
    names = {"m0001": "house", "m0002": "unknown", "m0003": "thing", "m0004": "wheel", "m0005": "knob"}
    client = ScriptedClient(lambda request: labels_answer({name: names[name] for name in asked_ids(request)}))
    label(nodes, client)
    prompts = [prompt_of(request) for request in client.requests]
    assert "in: house" in prompts[1].split("m0003 |")[1].splitlines()[0]
    assert "in: whole image" in prompts[1].split("m0004 |")[1].splitlines()[0]  # its parent has no name
    assert "in: house" in prompts[2]  # the name of its parent's parent


def test_requests_of_a_level_are_under_way_together() -> None:
    """None of the three is answered before all of them are there; asking in turn would time out."""
    client = ScriptedClient(good, gather=3)
    found = label(row(6), client, objects_per_request=2)
    assert len(client.requests) == 3 and len(found["objects"]) == 6


def test_exchanges_do_not_depend_on_which_answer_comes_first() -> None:
    def in_turn(first: int) -> Labels:
        done = asyncio.Event()

        class Slow(ScriptedClient):
            async def complete(self, request: ChatRequest) -> ChatResult:
                number = int(asked_ids(request)[0][1:])
                if number != first:
                    await asyncio.wait_for(done.wait(), timeout=5)
                result = await super().complete(request)
                done.set()
                return result

        return label(row(4), Slow(good), objects_per_request=2)

    assert in_turn(1) == in_turn(3)
    assert [exchange["about"] for exchange in in_turn(3)["exchanges"]] == [["m0001", "m0002"], ["m0003", "m0004"]]


def test_a_second_answer_counts() -> None:
    answers = iter(
        [
            "{",
            labels_answer({"m0001": "door", "m0002": "a red, big door"}),
            labels_answer({"m0001": "door", "m0002": "knob"}),
        ]
    )
    client = ScriptedClient(lambda request: next(answers))
    found = label(row(2), client)
    (exchange,) = found["exchanges"]
    assert exchange["attempts"] == [["L1"], ["L2"], []] and exchange["prompt_tokens"] == 300
    assert exchange["request"] == client.requests[-1].key("scripted")
    assert found["objects"]["m0002"]["label"] == "knob"
    assert "m0002: the label 'a red, big door' must be letters" not in texts_of(client.requests[2].messages[-1])[0]
    assert "m0002: the label 'red, big door' must be letters" in texts_of(client.requests[2].messages[-1])[0]


def test_a_batch_that_fails_is_split_in_halves_and_then_object_by_object() -> None:
    client = ScriptedClient(bad_for("m0004"))
    found = label(row(5), client, attempts=2)
    assert [(exchange["about"], exchange["attempts"]) for exchange in found["exchanges"]] == [
        (["m0001", "m0002", "m0003", "m0004", "m0005"], [["L1"], ["L1"]]),
        (["m0001", "m0002", "m0003"], [[]]),
        (["m0004", "m0005"], [["L1"]]),  # one attempt
        (["m0004"], [["L1"]]),
        (["m0005"], [[]]),
    ]
    assert found["objects"]["m0004"] == {"label": "", "caption": "", "status": "failed", "flags": []}
    assert [name for name, each in found["objects"].items() if each["status"] == "ok"] == [
        "m0001",
        "m0002",
        "m0003",
        "m0005",
    ]
    assert list(found["objects"]) == ["m0001", "m0002", "m0003", "m0004", "m0005"]


@pytest.mark.parametrize(
    ("count", "requests"),
    [
        (1, 3),  # nothing to split
        (2, 3 + 2),  # the halves are single objects, which are not asked about twice
        (3, 3 + 2 + 2),
    ],
)
def test_if_everything_fails_the_image_does(count: int, requests: int) -> None:
    client = ScriptedClient(lambda request: '{"objects": []}')
    labels = label(row(count), client)
    assert rejection(labels) == f"the model's answers never kept the rules: L1 x {requests}"
    assert len(client.requests) == requests


def test_the_failure_counts_codes() -> None:
    captions = {"m0001": "A mask.", "m0002": "A door of wood that is painted green."}
    client = ScriptedClient(
        lambda request: labels_answer(dict.fromkeys(asked_ids(request), "door") | {"m0001": "d2"}, captions)
    )
    labels = label(row(1), client, attempts=2)
    assert str(rejection(labels)).endswith("rules: L2 x 2, L4 x 2, L5 x 2")


def test_a_cut_answer_is_asked_for_again() -> None:
    client = ScriptedClient(
        lambda request: ChatResult(good(request), "length" if len(client.requests) == 1 else "stop", 1, 1)
    )
    assert label(row(1), client)["exchanges"][0]["attempts"] == [["finish:length"], []]


def test_after_a_retry_only_what_failed_is_asked_anew() -> None:
    """Requests with an object that did not fail keep their seed, and are answered from the cache."""
    first, second = ScriptedClient(bad_for("m0002")), ScriptedClient(bad_for())
    label(row(3), first, attempts=1)

    def replay(request: ChatRequest) -> str:
        known = {each.key("scripted"): bad_for("m0002")(each) for each in first.requests}
        return known.get(request.key("scripted")) or bad_for()(request)

    second.script = replay
    found = label(row(3), second, {"m0002": 1}, attempts=1)
    assert [asked_ids(request) for request in second.requests if request.seed == 1] == [["m0002"]]
    assert {each["label"] for each in found["objects"].values()} == {"door"}


@pytest.mark.parametrize(
    ("errors", "raised"),
    [
        ({"m0001": RequestFailed("refused")}, RequestFailed),
        ({"m0003": RunStopped("no money")}, RunStopped),
        ({"m0001": RequestFailed("refused"), "m0003": RunStopped("no money")}, RunStopped),  # the run matters more
    ],
)
def test_errors_come_through_after_all_requests_are_finished(errors, raised, recwarn, capsys) -> None:
    client = ScriptedClient(lambda request: errors.get(asked_ids(request)[0]) or good(request), gather=3)
    with pytest.raises(raised):
        label(row(3), client, objects_per_request=1)
    assert client.finished == 3
    assert not recwarn.list and "never retrieved" not in capsys.readouterr().err


def test_no_level_begins_after_a_stop() -> None:
    nodes = geometry(("m0001", BOX, "root"), ("m0002", BOX, "m0001"))
    client = ScriptedClient(lambda request: RunStopped("stopped by a signal"))
    with pytest.raises(RunStopped):
        label(nodes, client)
    assert len(client.requests) == 1


def test_a_picture_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="mask of 60x40 pixels for a picture of 30x20"):
        asyncio.run(label_objects(picture().resize((30, 20)), row(1), ScriptedClient(good), LabelingConfig()))


def test_the_estimate_is_what_the_requests_cost() -> None:
    """Without drawing it finds the same pictures and texts; only names of parents are not known to it."""
    nodes = geometry(
        *((f"m{number:04}", [number, number, 20, 10], "root", "dog") for number in range(1, 8)),
        ("m0008", [5, 5, 3, 3], "m0001", "ear"),
    )
    asked: list[ChatRequest] = []

    class Recorded(RuleAnnotator):
        async def complete(self, request: ChatRequest) -> ChatResult:
            asked.append(request)
            return await super().complete(request)

    label(nodes, Recorded())
    estimate = estimate_labeling(nodes, LabelingConfig())
    assert estimate.requests == len(asked) == 3
    assert estimate.completion_tokens == sum(request.max_tokens for request in asked) == 8 * 200
    assert estimate.prompt_tokens == pytest.approx(sum(request.prompt_tokens() for request in asked), abs=5)


def test_no_objects_no_requests() -> None:
    client = ScriptedClient(good)
    assert label(geometry(), client) == {"objects": {}, "exchanges": []} and client.requests == []


def test_labels_are_plain_json() -> None:
    found = label(row(2), ScriptedClient(good))
    assert json.loads(json.dumps(found)) == found
