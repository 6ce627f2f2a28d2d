"""Captioning: one predicted text for each image, against its references."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import datasets
import evaluate

from mglmm.evaluation.caption_scorers import METRICS, CaptionSet, score_captions
from mglmm.processing.uscdf import parse

ImageId = int | str

MODES = ("parity", "clean")
_SEQUENCE_MARKS = re.compile(r"</?s>")
_SPACE_BEFORE_POINT = re.compile(r"\s+([,.;:!?])(?=\s|$)")


def original_caption(decoded_text: str) -> str:
    """
    The caption that GLaMM and MGLMM make of a decoded answer, in their order (`eval/gcg/infer.py`).

    Line breaks are deleted, not replaced by a space; double spaces become single ones in one pass; what follows the last
    "ASSISTANT: " counts, or all of it where the space is missing; everything between "<" and the next ">" is removed.

    Args:
        decoded_text: The sequence, decoded with its special tokens; with or without the prompt.

    Example:
        >>> original_caption("USER: Describe it. ASSISTANT: <p> A dog </p> [SEG] runs , <p> fast </p> [SEG] .</s>")
        'A dog runs , fast .'
    """
    text = decoded_text.replace("\n", "").replace("  ", " ").split("ASSISTANT: ")[-1]
    text = re.sub(r"<.*?>", "", text).replace("[SEG]", "")
    return " ".join(text.split()).strip("'").strip()


def clean_caption(text: str) -> str:
    """
    The text of an answer (`SegCap.text` or plain text) without tags and marks of the sequence, on one line.

    Example:
        >>> clean_caption("<p> A dog </p> [SEG] runs , <p> fast </p> [SEG] .</s>")
        'A dog runs, fast.'
    """
    words = " ".join(_SEQUENCE_MARKS.sub(" ", parse(text).clean_text).split())
    return _SPACE_BEFORE_POINT.sub(r"\1", words)


class CaptioningScore:
    """
    BLEU, METEOR, ROUGE-L, CIDEr and SPICE of pycocoevalcap, in its units: fractions, CIDEr up to 10.

    - "parity": the clean-up of GLaMM and MGLMM (`original_caption`), and only images with a prediction, as their caption
      files hold no others (their GCG script stops where one is missing).
    - "clean": the parsed text (`clean_caption`); an image without a prediction counts as an empty caption.

    CIDEr weighs words by the references of exactly the images scored, so it changes with their number and is 0 for a single
    image. Without Java METEOR, SPICE and COCO's tokeniser are skipped, and the others are marked `tokenizer: python`. SPICE
    needs models of its own, see `score_captions`.

    Captions and references are kept until `compute`: CIDEr needs them all.

    Args:
        metrics: Of "BLEU", "METEOR", "ROUGE_L", "CIDEr", "SPICE".

    Example:
        >>> score = CaptioningScore(metrics=["ROUGE_L"])
        >>> score.update(7, "<p> A dog </p> [SEG] runs.", ["A dog runs on grass."])
        >>> score.update(8, None, ["A cat."])
        >>> result = score.compute()
        >>> result["parity"]["images"], result["clean"]["images"]
        (1, 2)
    """

    def __init__(self, metrics: Sequence[str] = METRICS) -> None:
        self.metrics = tuple(metrics)
        self._samples: dict[ImageId, tuple[str | None, tuple[str, ...]]] = {}

    def update(self, image_id: ImageId, caption: str | None, references: Sequence[str]) -> None:
        """
        Add an image.

        Args:
            caption: The answer, with its tags or without; None where there is no prediction.
            references: At least one, plain text.

        Raises:
            ValueError: the image is there already, or caption or references are no text.
        """
        if image_id in self._samples:
            raise ValueError(f"image id {image_id!r} occurs twice; every image is scored once: remove one of the two")
        self._samples[image_id] = self._check(image_id, caption, references)

    def compute(self, *, modes: Sequence[str] = MODES, per_image: bool = False) -> dict[str, Any]:
        """
        Args:
            modes: Which of "parity" and "clean" to compute.
            per_image: Whether to add the numbers of each image: `"per_image": {image_id: {...}}` in each mode.

        Returns:
            `{"parity": {...}, "clean": {...}, "missing", "skipped", "marked"}`: for each mode "Bleu_1" ... "Bleu_4",
            "METEOR", "ROUGE_L", "CIDEr", "SPICE" and "images" (how many are scored); `missing`, the number of images without
            a prediction; `skipped`, what could not be computed and why; `marked`, what was computed in another way.

        Raises:
            ValueError: there is no image, or a mode or metric is unknown.
        """
        unknown = [mode for mode in modes if mode not in MODES]
        if unknown:
            raise ValueError(f"unknown modes {unknown}, known are {', '.join(MODES)}")
        if not self._samples:
            raise ValueError("there is no image to score: call update first")
        skipped = self._impossible(modes)
        result: dict[str, Any] = {}
        ids: dict[str, list[ImageId]] = {}
        sets: list[CaptionSet] = []
        for mode in modes:
            result[mode] = {}
            if mode in skipped:
                continue
            parity = mode == "parity"
            ids[mode] = [one for one, (caption, _) in self._samples.items() if caption is not None or not parity]
            clean_up = original_caption if parity else clean_caption
            sets.append(
                CaptionSet(
                    references=[self._samples[one][1] for one in ids[mode]],
                    captions=[clean_up(self._samples[one][0] or "") for one in ids[mode]],
                    apart=not parity,
                )
            )
        scored = score_captions(sets, self.metrics)
        for mode, (scores, each) in zip(ids, scored.sets, strict=True):
            result[mode] = {**scores, "images": len(ids[mode])}
            if per_image:
                result[mode]["per_image"] = {
                    image_id: {name: values[index] for name, values in each.items()}
                    for index, image_id in enumerate(ids[mode])
                }
        missing = sum(caption is None for caption, _ in self._samples.values())
        return {**result, "missing": missing, "skipped": skipped | scored.skipped, "marked": scored.marked}

    def _impossible(self, modes: Sequence[str]) -> dict[str, str]:
        """Modes that have no numbers, and why."""
        if "parity" in modes and all(caption is None for caption, _ in self._samples.values()):
            return {"parity": f"none of {len(self._samples)} images has a prediction"}
        return {}

    @staticmethod
    def _check(image_id: ImageId, caption: Any, references: Any) -> tuple[str | None, tuple[str, ...]]:
        if not (caption is None or isinstance(caption, str)):
            raise ValueError(f"image id {image_id!r}: the caption must be text or None, got {caption!r:.80}")
        if isinstance(references, str) or not references or not all(isinstance(text, str) for text in references):
            raise ValueError(f"image id {image_id!r}: the references must be a list of texts, got {references!r:.80}")
        return caption, tuple(references)


FEATURES = datasets.Features(
    {
        "predictions": datasets.Value("string"),
        "references": datasets.List(datasets.Value("string")),
        "image_ids": datasets.Value("string"),
    }
)
INPUTS = """
Args:
    predictions: For each image the answer. No prediction: an empty text, which "parity" counts as an empty caption.
    references: For each image a list of texts.
    image_ids: For each image a text.
"""


class Captioning(evaluate.Metric):
    """`CaptioningScore` as a metric of the library evaluate."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=CaptioningScore.__doc__,
            citation="",
            inputs_description=f"{INPUTS}    metrics: Which to compute, all of them by default.\n",
            features=FEATURES,
        )

    def _compute(
        self,
        predictions: Sequence[str],
        references: Sequence[Sequence[str]],
        image_ids: Sequence[str],
        metrics: Sequence[str] = METRICS,
    ) -> dict[str, Any]:
        score = CaptioningScore(metrics)
        for sample in zip(image_ids, predictions, references, strict=True):
            score.update(*sample)
        return score.compute()
