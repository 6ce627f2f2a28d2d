"""
Descriptions in which every object's phrase is tagged: one of the whole image, and one of each object with many parts.

The model sees a clean picture and one with numbered outlines, and the labels and captions of what it has to name
(reference C.5).
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

from PIL import Image

from .chat import ChatClient, ChatRequest, Estimate, RequestFailed, ask, finish_all, image_part, text_message
from .config import ContextConfig
from .context_rules import TAG, judge_context
from .drawing import Box, Drawing, Outline, color_name, crop_box, draw_outlines, draw_picture, drawn_size
from .facts import CONTEXT_HEAD, TargetFacts, subject_line
from .label_rules import in_one_field
from .records import ROOT, Context, Contexts, Geometry, Tree, TreeNode
from .rule_annotator import context_text

CROP_MARGIN = 0.2
MAX_CAPTION_LENGTH = 480  # characters of a caption that a prompt repeats
LIKELY_LABEL, LIKELY_CAPTION = "label of two words", "x" * 220  # for the estimate: about 40 words

SYSTEM = """You write fluent English descriptions for a corpus in which phrases are linked to regions of photographs.
Rules:
- Wrap the phrase for every target in its tag: <obj_3>a brown dog</obj_3>. Every target of the list exactly once, no other tags.
- A tagged phrase is a natural noun phrase of 1 to 6 words that names its target; in the plural if its count is above 1; \
punctuation stays outside of the tag.
- Running text in one paragraph: no lists, no headings, no ids or numbers of targets outside of the tags.
- Do not invent objects. Do not speak of the picture, the outlines or the list."""
PICTURES = """The first picture is clean; the second one is the same with a numbered line around each target (obj_7 has the \
number 7). Boxes are (x, y, width, height) as shares of the whole image. The captions help, but do not copy them."""
ROOT_TASK = """Describe the whole scene in 3 to 8 sentences, at most 250 words. Stay with things as wholes and how they are \
arranged; do not go into their parts."""
SUBJECT_TASK = """Describe the object below in detail through its components, in 2 to 7 sentences, at most 250 words. An \
indented target is a part of the one above it. Mention the object itself, but do not tag it."""


class ContextPlan(NamedTuple):
    """What a description is about (ROOT or the id of an object), and the ids of its targets in the order of the prompt."""

    about: str
    targets: list[str]


class _InTree(Protocol):
    """What of a node the plan depends on; nodes of a geometry and of a tree both have it."""

    def __getitem__(self, key: str, /) -> Any: ...


async def describe(
    picture: Image.Image,
    tree: Tree,
    client: ChatClient,
    config: ContextConfig,
    *,
    seeds: Mapping[str, int] = MappingProxyType({}),
) -> Contexts:
    """
    All descriptions of an image, asked for at the same time.

    One whose answers all break the rules is `failed`, or with `config.template_fallback` a `template`. So is one that got no
    answer, with the flag "request".

    Args:
        picture: Of the size of the masks.
        tree: Of merged objects.
        seeds: By what a description is about, 0 without one.

    Raises:
        ValueError: the picture has another size than the masks, or a mask is broken.
        RequestFailed: none of the descriptions got an answer.
        RunStopped: from the client. Requests under way are finished first, so that what they cost is not lost.
    """
    picture = await asyncio.to_thread(picture.convert, "RGB")
    plans = context_plan(tree, config)
    step = _Step(picture, {node["id"]: node for node in tree["nodes"]}, client, config, seeds)
    described = await finish_all(step.describe(plan) for plan in plans)
    refused = [error for _, error in described if error is not None]
    if refused and len(refused) == len(plans):
        raise refused[0]
    return {"items": [item for item, _ in described]}


def context_plan(tree: Tree, config: ContextConfig) -> list[ContextPlan]:
    """
    What is described: the image through the largest children of the root, if there is one, and the children of the root
    with most descendants (of equal ones the larger), each through all of these in depth-first order.
    """
    return _plan(tree["nodes"], config)


def estimate_contexts(geometry: Geometry, config: ContextConfig) -> Estimate:
    """
    What describing would cost at most without a second attempt, from the tree before labels are known and siblings merged:
    merging only takes targets away. Nothing is drawn or asked.
    """
    size = (geometry["image"]["width"], geometry["image"]["height"])
    nodes = {node["id"]: node for node in geometry["nodes"]}
    total = [0, 0, 0]
    for plan in _plan(geometry["nodes"], config):
        box = _shown(nodes[plan.about]["bbox"], size) if plan.about != ROOT else None
        shown = (box[2] - box[0], box[3] - box[1]) if box else size
        drawing = Drawing(b"", drawn_size(shown, config.image_long_side))
        facts = [
            TargetFacts(f"obj_{number}", LIKELY_LABEL, 1, (0.0, 0.0, 0.0, 0.0), LIKELY_CAPTION)
            for number, _ in enumerate(plan.targets)
        ]
        subject = None if plan.about == ROOT else (LIKELY_LABEL, 1)
        request = make_request(facts, subject, [drawing, drawing], config)
        total = [total[0] + 1, total[1] + request.prompt_tokens(), total[2] + request.max_tokens]
    return Estimate(*total)


def make_facts(plan: ContextPlan, nodes: Mapping[str, TreeNode], size: tuple[int, int]) -> list[TargetFacts]:
    """What the prompt says of each target; `size` is (width, height) of the image."""
    width, height = size
    depths = {ROOT: 0, plan.about: 0}
    facts = []
    for name in plan.targets:  # what contains a target comes before it
        node = nodes[name]
        depths[name] = depths[node["parent"]] + 1
        x, y, w, h = node["bbox"]
        box = (x / width, y / height, w / width, h / height)
        caption = in_one_field(node["caption"], MAX_CAPTION_LENGTH)
        facts.append(TargetFacts(name, in_one_field(node["label"]), node["count"], box, caption, depths[name]))
    return facts


def make_request(
    facts: Sequence[TargetFacts],
    subject: tuple[str, int] | None,
    drawings: Sequence[Drawing],
    config: ContextConfig,
    seed: int = 0,
) -> ChatRequest:
    """
    The request for one description.

    Args:
        subject: Label and count of what is described; `None` for the whole image.
        drawings: Clean and with outlines.
    """
    task = [SUBJECT_TASK, subject_line(*subject)] if subject else [ROOT_TASK]
    content = [
        {"type": "text", "text": "\n".join([PICTURES, *task, CONTEXT_HEAD, *map(str, facts)])},
        *(image_part(drawing.jpeg) for drawing in drawings),
    ]
    return ChatRequest(
        messages=(text_message("system", SYSTEM), {"role": "user", "content": content}),
        max_tokens=config.max_tokens,
        seed=seed,
        image_sizes=tuple(drawing.size for drawing in drawings),
    )


class _Step:
    def __init__(
        self,
        picture: Image.Image,
        nodes: Mapping[str, TreeNode],
        client: ChatClient,
        config: ContextConfig,
        seeds: Mapping[str, int],
    ):
        self.picture, self.nodes, self.client, self.config, self.seeds = picture, nodes, client, config, seeds

    async def describe(self, plan: ContextPlan) -> tuple[Context, RequestFailed | None]:
        """A description, and why it got no answer if it did not."""
        facts = make_facts(plan, self.nodes, self.picture.size)
        node = self.nodes.get(plan.about)
        subject = (in_one_field(node["label"]), node["count"]) if node else None
        drawings = await asyncio.to_thread(self._draw, plan)
        item: Context = {
            "about": plan.about,
            "tagged": "",
            "targets": [],
            "dropped": list(plan.targets),
            "status": "failed",
            "flags": [],
        }
        refused = None
        try:
            asked = await ask(
                self.client,
                make_request(facts, subject, drawings, self.config, self.seeds.get(plan.about, 0)),
                lambda text, last: judge_context(text, facts, whole_image=subject is None, last=last),
                about=plan.targets,
                attempts=self.config.attempts,
            )
        except RequestFailed as error:
            refused = error
            item["flags"] = ["request"]
        else:
            item["exchange"] = asked.exchange
            if asked.value is not None:
                tagged, targets, dropped, status = asked.value
                item |= {"tagged": tagged, "targets": targets, "dropped": dropped, "status": status}
                item["flags"] = list(asked.flags)
        if item["status"] == "failed" and self.config.template_fallback:
            tagged = context_text(facts, subject)
            targets = [match[1] for match in TAG.finditer(tagged)]
            item = {**item, "tagged": tagged, "targets": targets, "dropped": [], "status": "template"}
        return item, refused

    def _draw(self, plan: ContextPlan) -> list[Drawing]:
        node = self.nodes.get(plan.about)
        box = _shown(node["bbox"], self.picture.size) if node else None
        outlines = [
            Outline(self.nodes[name]["segmentation"], int(name.removeprefix("obj_")), color_name(index))
            for index, name in enumerate(plan.targets)
        ]
        long_side = self.config.image_long_side
        return [draw_picture(self.picture, long_side, box), draw_outlines(self.picture, outlines, long_side, box)]


def _shown(bbox: Sequence[int], size: tuple[int, int]) -> Box:
    return crop_box(bbox, size, CROP_MARGIN)


def _plan(nodes: Sequence[_InTree], config: ContextConfig) -> list[ContextPlan]:
    children: dict[str, list[_InTree]] = {}
    for node in nodes:
        children.setdefault(node["parent"], []).append(node)
    for siblings in children.values():
        siblings.sort(key=lambda node: -node["area"])  # of equal ones the order stays, which is that of ids
    top = children.get(ROOT, [])
    if not top:
        return []
    below = {node["id"]: _descendants(node["id"], children) for node in top}
    with_most = sorted(
        (node for node in top if len(below[node["id"]]) >= max(config.min_descendants, 1)),
        key=lambda node: -len(below[node["id"]]),
    )
    return [
        ContextPlan(ROOT, [node["id"] for node in top[: config.max_root_targets]]),
        *(ContextPlan(node["id"], below[node["id"]]) for node in with_most[: config.max_subtrees]),
    ]


def _descendants(name: str, children: Mapping[str, Sequence[_InTree]]) -> list[str]:
    """Depth-first, without a recursion that a deep tree would exhaust."""
    found = []
    waiting = [node["id"] for node in reversed(children.get(name, ()))]
    while waiting:
        found.append(waiting.pop())
        waiting += [node["id"] for node in reversed(children.get(found[-1], ()))]
    return found
