"""Captions and conversations in plain text -> USCDF rows without masks.

Layouts, below the data folder or in the sub-folder that the published code gives them:

- COCO Caption 2017: `annotations/captions_{train,val}2017.json`, `{train,val}2017/`. The JSON holds `images` (`id`,
  `file_name`) and `annotations` (`image_id`, `caption`).
- Flickr30k: `mdetr_annotations/final_flickr_mergedGT_{train,val}.json`, whose `images` (`id`, `file_name`, `caption`) are
  one entry per sentence; `final_flickr_mergedGT_test_caption.json` as COCO Caption; `images/`.
- NoCaps: `annotations/nocaps_val_4500_captions.json` as COCO Caption, `images/`.
- LLaVA-Instruct-150k: `llava_instruct_150k.json`, a list of `id`, `image` (of COCO train2017) and `conversations` of
  `from` (human or gpt) and `value`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from random import Random
from typing import Any

from mglmm.processing.uscdf import IMAGE_TOKEN

from . import templates
from .builder import Row, UscdfBuilder, make_row, reason_of
from .conversations import Turn
from .layouts import FLICKR_IMAGES, SplitPatterns, SplitTables, coco_images, flickr_annotations, split_sources
from .phrases import clean_caption, clean_lines
from .sources import inside
from .templates import choose, loosen


class CaptionBuilder(SplitTables):
    """
    COCO-style captions. In train each variant takes another caption of the image; in the other splits every caption is a
    row, and those of one image share the question, so that they are references of one answer.
    """

    def rows(self, item: tuple[str, Any]) -> Iterator[Row]:
        split, key = item
        tables, folder = self._sources[split]
        image = tables.one("images", key)
        path = inside(folder, image["file_name"])
        one_sentence = "caption" in image
        image_id = path.stem if one_sentence else key  # the entries of one photograph have an id of their own each
        texts = [image["caption"]] if one_sentence else [a["caption"] for a in tables.get("annotations", key)]
        captions = list(self._captions(texts))
        if not captions:
            raise ValueError("image without a caption")
        if split == "train":
            rng = self.generator(self.SOURCE, split, key)
            captions = rng.sample(captions, len(captions))
            chosen = [captions[variant % len(captions)] for variant in range(self.config.variants)]
            questions = [caption_question(rng) for _ in chosen]
        else:
            chosen = captions
            questions = [caption_question(self.generator(self.SOURCE, split, image_id))] * len(chosen)
        for question, caption in zip(questions, chosen, strict=True):
            yield make_row(path, image_id, self.SOURCE, "caption", [Turn(question, caption)])

    def _captions(self, texts: Sequence[Any]) -> Iterator[str]:
        for text in texts:
            try:
                yield clean_caption(text)
            except (AttributeError, TypeError, ValueError) as error:
                self.skipped[reason_of(error)] += 1


def caption_question(rng: Random) -> str:
    return loosen(rng, choose(rng, templates.CAPTION_QUESTIONS))


class CocoCaptions(CaptionBuilder):
    SOURCE = "coco_captions"
    LICENSE = "cc-by-4.0 (annotations), Flickr terms of use (images)"
    SPLITS = {
        split: (
            tuple(f"{root}annotations/captions_{name}2017.json" for root in ("", "coco/", "coco_2017/")),
            coco_images(f"{name}2017"),
        )
        for split, name in (("train", "train"), ("validation", "val"))
    }


class Flickr30kCaptions(CaptionBuilder):
    SOURCE = "flickr30k_captions"
    LICENSE = "non-commercial research (annotations), Flickr terms of use (images)"
    SPLITS = {
        split: (flickr_annotations(part), FLICKR_IMAGES)
        for split, part in (("train", "train"), ("validation", "val"), ("test", "test_caption"))
    }


class NoCaps(CaptionBuilder):
    SOURCE = "nocaps"
    ROWS_PER_ITEM = 10
    LICENSE = "cc-by-2.0"
    SPLITS = {
        "validation": (
            tuple(f"{root}nocaps_val_4500_captions.json" for root in ("nocaps/annotations/", "annotations/", "")),
            ("nocaps/images", "images"),
        )
    }


class LlavaInstruct(UscdfBuilder):
    """Conversations of several turns; the validation split of the published code has no images of its own, hence train only."""

    SOURCE = "llava_instruct"
    LICENSE = "cc-by-4.0 (annotations made with GPT-4: OpenAI terms of use), Flickr terms of use (images)"
    SPLITS: SplitPatterns = {
        "train": (
            tuple(f"{root}llava_instruct_150k.json" for root in ("", "llava_dataset/", "LLaVA-Instruct-150K/")),
            coco_images("train2017"),
        )
    }

    def items(self) -> dict[str, Sequence[Any]]:
        file, self._images = split_sources(self, self.SPLITS)["train"]
        self._tables = self.tables(file, entries=("item", ""))
        return {"train": self._tables.keys("entries")}

    def rows(self, item: Any) -> Iterator[Row]:
        entry = self._tables.one("entries", item)
        path = inside(self._images, entry["image"])
        turns, unanswered = read_conversation(entry["conversations"])
        if unanswered:
            self.skipped["last question without an answer"] += 1
        yield make_row(path, entry["id"], self.SOURCE, "conversation", turns)


def read_conversation(messages: Sequence[Mapping[str, str]]) -> tuple[list[Turn], bool]:
    """
    The turns of a LLaVA conversation, and whether its last question has no answer. A leading answer is left out, and
    `<image>`, which stands before or after the first question, is taken out.

    Raises `ValueError` if the roles do not alternate, a text is empty, or several images are meant.
    """
    messages = list(messages)[1:] if messages and messages[0]["from"] == "gpt" else list(messages)
    if not messages:
        raise ValueError("conversation without a question")
    if any(message["from"] != ("human", "gpt")[index % 2] for index, message in enumerate(messages)):
        raise ValueError("conversation whose roles do not alternate")
    if sum(message["value"].count(IMAGE_TOKEN) for message in messages[::2]) > 1:
        raise ValueError("conversation about several images")
    questions = [clean_lines(message["value"].replace(IMAGE_TOKEN, "")) for message in messages[::2]]
    answers = [clean_lines(message["value"]) for message in messages[1::2]]
    if not all(questions) or not all(answers):
        raise ValueError("conversation with an empty text")
    if not answers:
        raise ValueError("conversation without an answer")
    turns = [Turn(question, answer) for question, answer in zip(questions, answers, strict=False)]
    return turns, len(questions) > len(answers)
