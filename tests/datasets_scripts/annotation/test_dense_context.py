"""What is described, how it is asked for, and what becomes of answers that fail."""

import asyncio
import json

import pytest

from mglmm.datasets_scripts.annotation.chat import ChatRequest, RequestFailed, RunStopped, texts_of
from mglmm.datasets_scripts.annotation.config import ContextConfig
from mglmm.datasets_scripts.annotation.context_rules import TAG
from mglmm.datasets_scripts.annotation.dense_context import context_plan, describe, estimate_contexts
from mglmm.datasets_scripts.annotation.facts import CONTEXT_HEAD, read_subject, read_targets
from mglmm.datasets_scripts.annotation.records import ROOT, Context, Tree
from mglmm.datasets_scripts.annotation.rule_annotator import RuleAnnotator, context_text
from tests.datasets_scripts.annotation.scripted_client import ScriptedClient, geometry, picture, prompt_of, tree

HOUSE = tree(
    ("obj_1", "house", [10, 0, 40, 30], ROOT),
    ("obj_2", "lawn", [0, 30, 60, 10], ROOT),
    ("obj_3", "door", [20, 10, 10, 20], "obj_1"),
    ("obj_4", "window", [32, 10, 10, 10], "obj_1", 3),
    ("obj_5", "knob", [22, 18, 2, 2], "obj_3"),
)


def run(objects: Tree, client, seeds: dict[str, int] | None = None, **options) -> list[Context]:
    return asyncio.run(describe(picture(), objects, client, ContextConfig(**options), seeds=seeds or {}))["items"]


def by_rules(request: ChatRequest) -> str:
    prompt = prompt_of(request)
    return context_text(read_targets(prompt), read_subject(prompt))


def is_root(request: ChatRequest) -> bool:
    return read_subject(prompt_of(request)) is None


def root_first(client: ScriptedClient) -> list[ChatRequest]:
    """Which picture is drawn first, and so which request comes first, is up to the threads."""
    return sorted(client.requests, key=is_root, reverse=True)


def chain(depth: int) -> Tree:
    nodes = [("obj_1", "box", [0, 0, 60, 40], ROOT)]
    nodes += [(f"obj_{n}", "box", [0, 0, 60, 40], f"obj_{n - 1}") for n in range(2, depth + 1)]
    return tree(*nodes)


@pytest.mark.parametrize(
    ("objects", "options", "expected"),
    [
        (HOUSE, {}, [(ROOT, [1, 2]), ("obj_1", [3, 5, 4])]),  # depth first, larger parts first
        (HOUSE, {"max_root_targets": 1}, [(ROOT, [1]), ("obj_1", [3, 5, 4])]),
        (HOUSE, {"max_subtrees": 0}, [(ROOT, [1, 2])]),
        (HOUSE, {"min_descendants": 4}, [(ROOT, [1, 2])]),
        (HOUSE, {"min_descendants": 0}, [(ROOT, [1, 2]), ("obj_1", [3, 5, 4])]),  # without parts nothing can be said
        (tree(("obj_1", "dog", [0, 0, 5, 5], ROOT)), {}, [(ROOT, [1])]),  # one target is enough
        (tree(), {}, []),
        (  # root: by area, then in order; subtrees: by descendants, then by area
            tree(
                ("obj_1", "car", [0, 0, 10, 10], ROOT),
                ("obj_2", "bus", [0, 0, 20, 20], ROOT),
                ("obj_3", "van", [0, 0, 10, 10], ROOT),
                ("obj_4", "wheel", [0, 0, 2, 2], "obj_1"),
                ("obj_5", "wheel", [0, 0, 2, 2], "obj_2"),
                ("obj_6", "wheel", [0, 0, 2, 2], "obj_3"),
                ("obj_7", "door", [0, 0, 3, 3], "obj_3"),
            ),
            {"min_descendants": 1, "max_subtrees": 2},
            [(ROOT, [2, 1, 3]), ("obj_3", [7, 6]), ("obj_2", [5])],
        ),
    ],
)
def test_what_is_described(objects, options, expected) -> None:
    plan = context_plan(objects, ContextConfig(**options))
    assert [(about, targets) for about, targets in plan] == [(a, [f"obj_{n}" for n in t]) for a, t in expected]


def test_a_deep_tree_is_no_recursion() -> None:
    plan = context_plan(chain(1500), ContextConfig())
    assert [len(item.targets) for item in plan] == [1, 1499]


def test_the_requests() -> None:
    client = ScriptedClient(by_rules)
    run(HOUSE, client, image_long_side=30)
    root, house = root_first(client)
    assert root.image_sizes == ((30, 20), (30, 20))  # clean and outlined
    assert house.image_sizes == ((30, 22), (30, 22))  # box of 40 x 30 and 20 %: 48 x 36
    for request, task in ((root, "3 to 8 sentences"), (house, "2 to 7 sentences")):
        system, user = request.messages
        assert system["role"] == "system" and "Every target of the list exactly once" in system["content"]
        assert [part["type"] for part in user["content"]] == ["text", "image_url", "image_url"]
        assert user["content"][1] != user["content"][2]
        assert task in prompt_of(request)
        assert request.schema is None and request.max_tokens == 1200
    lines = prompt_of(house).splitlines()
    assert lines[lines.index(CONTEXT_HEAD) - 1 :] == [
        "Described object: house | count: 1",
        CONTEXT_HEAD,
        "obj_3 | door | count: 1 | box: (0.33, 0.25, 0.17, 0.50) | A door of painted wood that stands upright.",
        "  obj_5 | knob | count: 1 | box: (0.37, 0.45, 0.03, 0.05) | A knob of painted wood that stands upright.",
        "obj_4 | window | count: 3 | box: (0.53, 0.25, 0.17, 0.25) | A window of painted wood that stands upright.",
    ]
    assert [target.id for target in read_targets(prompt_of(root))] == ["obj_1", "obj_2"]


def test_the_descriptions() -> None:
    items = run(HOUSE, RuleAnnotator())
    assert [(item["about"], item["status"], item["targets"], item["dropped"], item["flags"]) for item in items] == [
        (ROOT, "ok", ["obj_1", "obj_2"], [], []),
        ("obj_1", "ok", ["obj_3", "obj_5", "obj_4"], [], []),
    ]
    assert all(item["exchange"]["attempts"] == [[]] for item in items)
    assert items[1]["exchange"]["about"] == ["obj_3", "obj_5", "obj_4"]
    assert json.loads(json.dumps(items)) == items


def test_targets_are_in_the_order_of_the_text() -> None:
    text = "A green <obj_2>lawn</obj_2> lies before it all in the sun. Behind it stands <obj_1>an old house</obj_1> of grey wood."
    (item,) = run(HOUSE, ScriptedClient(lambda request: text), max_subtrees=0)
    assert item["tagged"] == text and item["targets"] == ["obj_2", "obj_1"] == [m[1] for m in TAG.finditer(text)]


def test_all_descriptions_are_asked_for_together() -> None:
    assert [item["status"] for item in run(HOUSE, ScriptedClient(by_rules, gather=2))] == ["ok", "ok"]


def test_seeds_belong_to_descriptions() -> None:
    client = ScriptedClient(by_rules)
    run(HOUSE, client, {"obj_1": 2, "m0001": 1})
    assert [request.seed for request in root_first(client)] == [0, 2]


def test_a_second_answer_counts() -> None:
    broken = "<obj_1>An old house</obj_1> of grey wood stands there all alone in the sun. There is grass around it."
    client = ScriptedClient(lambda request: broken if len(client.requests) == 1 else by_rules(request))
    (item,) = run(HOUSE, client, max_subtrees=0)
    assert item["status"] == "ok" and item["exchange"]["attempts"] == [["C2"], []]
    assert "missing: obj_2" in texts_of(client.requests[1].messages[-1])[0]


def test_the_last_answer_is_repaired() -> None:
    """Doubled: taken off. Missing one of two: too much."""
    doubled = (
        "<obj_1>An old house</obj_1> of grey wood stands there all alone in the sun. <obj_2>A lawn</obj_2> lies around "
        "<obj_1>the house</obj_1>."
    )
    (item,) = run(HOUSE, ScriptedClient(lambda request: doubled), max_subtrees=0)
    assert item["status"] == "ok" and item["flags"] == ["C2"] and item["exchange"]["attempts"] == [["C2"], ["C2"], []]
    assert item["tagged"] == doubled.replace("<obj_1>the house</obj_1>", "the house")
    (item,) = run(HOUSE, ScriptedClient(lambda request: doubled.replace("obj_2", "obj_1")), max_subtrees=0)
    assert item["status"] == "failed"


def test_up_to_a_fifth_of_the_targets_may_be_missing() -> None:
    objects = tree(*((f"obj_{n}", "dog", [n, n, 10, 10], ROOT) for n in range(1, 6)))
    text = (
        f"Here there are some dogs: {', '.join(f'<obj_{n}>a dog</obj_{n}>' for n in (4, 1, 2, 3))}. They wait for us."
    )
    (item,) = run(objects, ScriptedClient(lambda request: text))
    assert (item["status"], item["targets"], item["dropped"]) == (
        "partial",
        ["obj_4", "obj_1", "obj_2", "obj_3"],
        ["obj_5"],
    )


def test_a_failed_description_leaves_the_others() -> None:
    client = ScriptedClient(lambda request: "I cannot see it." if is_root(request) else by_rules(request))
    root, house = run(HOUSE, client, attempts=2)
    assert root == {
        "about": ROOT,
        "tagged": "",
        "targets": [],
        "dropped": ["obj_1", "obj_2"],
        "status": "failed",
        "flags": [],
        "exchange": root["exchange"],
    }
    assert root["exchange"]["attempts"] == [["C5", "C2", "C5", "C5"]] * 2 and house["status"] == "ok"


def test_a_template_in_its_place() -> None:
    client = ScriptedClient(lambda request: "no")
    root, house = run(HOUSE, client, template_fallback=True)
    assert root["status"] == house["status"] == "template"
    assert house["tagged"] == by_rules(root_first(client)[-1]) and house["targets"] == ["obj_3", "obj_5", "obj_4"]
    assert house["dropped"] == []


def test_a_refused_request_fails_its_description_only() -> None:
    refused = RequestFailed("the server refuses it")
    root, house = run(HOUSE, ScriptedClient(lambda request: refused if is_root(request) else by_rules(request)))
    assert (root["status"], root["flags"], "exchange" in root) == ("failed", ["request"], False)
    assert house["status"] == "ok"


@pytest.mark.parametrize("template", [False, True])
def test_if_every_request_is_refused_the_image_fails(template: bool) -> None:
    with pytest.raises(RequestFailed, match="the server refuses it"):
        run(HOUSE, ScriptedClient(lambda request: RequestFailed("the server refuses it")), template_fallback=template)


@pytest.mark.parametrize("other", [RequestFailed("refused"), RunStopped("no money"), None])
def test_a_stop_comes_through_after_all_requests_are_finished(other, recwarn, capsys) -> None:
    client = ScriptedClient(
        lambda request: RunStopped("stopped by a signal") if not is_root(request) else other or by_rules(request),
        gather=2,
    )
    with pytest.raises(RunStopped):
        run(HOUSE, client, template_fallback=True)
    assert client.finished == 2
    assert not recwarn.list and "never retrieved" not in capsys.readouterr().err


def test_no_targets_no_requests() -> None:
    client = ScriptedClient(by_rules)
    assert run(tree(), client) == [] and client.requests == []


def test_a_picture_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="mask of 60x40 pixels for a picture of 30x20"):
        asyncio.run(describe(picture().resize((30, 20)), HOUSE, RuleAnnotator(), ContextConfig()))


def test_the_estimate_is_about_what_the_requests_cost() -> None:
    nodes = geometry(
        *(
            (node["id"].replace("obj_", "m000"), node["bbox"], node["parent"].replace("obj_", "m000"))
            for node in HOUSE["nodes"]
        )
    )
    client = ScriptedClient(by_rules)
    run(HOUSE, client)
    estimate = estimate_contexts(nodes, ContextConfig())
    assert (estimate.requests, estimate.completion_tokens) == (2, 2400)
    assert estimate.prompt_tokens >= sum(request.prompt_tokens() for request in client.requests)
    assert estimate.prompt_tokens == pytest.approx(sum(request.prompt_tokens() for request in client.requests), rel=0.3)
    assert estimate_contexts(geometry(), ContextConfig()) == (0, 0, 0)
