"""Region captioning: one predicted text for each box (RefCOCOg, Visual Genome)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import evaluate

from mglmm.evaluation.metrics.captioning import FEATURES, INPUTS, MODES, CaptioningScore, ImageId

METRICS = ("METEOR", "CIDEr")
ORIGINALS = ("mglmm", "glamm")


class RegionCaptioningScore(CaptioningScore):
    """
    METEOR and CIDEr of region captions; otherwise as `CaptioningScore`.

    In the annotation files of both benchmarks an entry is one box, and its image id is the id of the annotation. The
    originals spread the entries over processes by a DistributedSampler, which repeats some so that each gets as many.

    - "parity": of an id that occurs again, `original="mglmm"` keeps the first caption. GLaMM keeps all, and its scoring stops
      at the second caption of an image: `original="glamm"` has no numbers then, which "skipped" says.
    - "clean": an id that occurs again with the same caption counts once; with another caption it is an error.

    Args:
        original: "mglmm" or "glamm".
        metrics: See `CaptioningScore`.
    """

    def __init__(self, original: str = "mglmm", metrics: Sequence[str] = METRICS) -> None:
        if original not in ORIGINALS:
            raise ValueError(f"no region captions by {original!r}, known are {', '.join(ORIGINALS)}")
        super().__init__(metrics)
        self.original = original
        self._repeated: dict[ImageId, None] = {}  # in the order of their coming
        self._contradictory: dict[ImageId, tuple[str | None, str | None]] = {}

    def update(self, image_id: ImageId, caption: str | None, references: Sequence[str]) -> None:
        """
        Add a box; see `CaptioningScore.update`. An id may occur again.

        Raises:
            ValueError: caption or references are no text, or the references of an id differ.
        """
        if image_id not in self._samples:
            super().update(image_id, caption, references)
            return
        first, known = self._samples[image_id]
        again, texts = self._check(image_id, caption, references)
        if texts != known:
            raise ValueError(f"image id {image_id!r} occurs twice with other references: {known!r:.80}, {texts!r:.80}")
        self._repeated[image_id] = None
        if again != first:
            self._contradictory.setdefault(image_id, (first, again))

    def compute(self, *, modes: Sequence[str] = MODES, per_image: bool = False) -> dict[str, Any]:
        """
        See `CaptioningScore.compute`; "repeated" is the number of ids that occurred again.

        Raises:
            ValueError: an id occurred with two captions and "clean" is among the modes.
        """
        if self._contradictory and "clean" in modes:
            image_id, (first, again) = next(iter(self._contradictory.items()))
            raise ValueError(
                f"{len(self._contradictory)} image ids have two captions, the first is {image_id!r} with {first!r:.60} and "
                f'{again!r:.60}; remove one of each, or compute(modes=["parity"]), which keeps the first as MGLMM does'
            )
        return {**super().compute(modes=modes, per_image=per_image), "repeated": len(self._repeated)}

    def _impossible(self, modes: Sequence[str]) -> dict[str, str]:
        if self.original == "glamm" and "parity" in modes and self._repeated:
            first = next(iter(self._repeated))
            return {"parity": f"GLaMM's scoring stops at repeated image ids: {len(self._repeated)}, first {first!r}"}
        return super()._impossible(modes)


class RegionCaptioning(evaluate.Metric):
    """`RegionCaptioningScore` as a metric of the library evaluate."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=RegionCaptioningScore.__doc__,
            citation="",
            inputs_description=f'{INPUTS}    original: "mglmm" or "glamm".\n',
            features=FEATURES,
        )

    def _compute(
        self,
        predictions: Sequence[str],
        references: Sequence[Sequence[str]],
        image_ids: Sequence[str],
        original: str = "mglmm",
    ) -> dict[str, Any]:
        score = RegionCaptioningScore(original)
        for sample in zip(image_ids, predictions, references, strict=True):
            score.update(*sample)
        return score.compute()
