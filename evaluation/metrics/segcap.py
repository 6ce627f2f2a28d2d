"""Segmentation captioning (GCG and MGSC): descriptions whose phrases carry masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import datasets
import evaluate
import numpy as np
from pycocotools import mask as mask_utils

from mglmm.evaluation.average_precision import AveragePrecision, Detections
from mglmm.evaluation.mask_pairs import admissible_pairs, greedy_pairs, original_pairs
from mglmm.evaluation.metrics.captioning import CaptioningScore
from mglmm.evaluation.metrics.referring_segmentation import MASK_FEATURE
from mglmm.evaluation.text_similarity import DEFAULT_ENCODER, BertSimilarity, TextSimilarity, load_text_similarity
from mglmm.processing.rle import check_mask, check_size, encode_mask

CAPTION_METRICS = ("METEOR", "CIDEr")

ImageId = str | int
Mask = np.ndarray | Mapping[str, Any]


class SegCapScore:
    """
    AP50, mIoU and mask recall of descriptions, and METEOR and CIDEr where there are captions.

    `clean`: every ground truth stays in every denominator, and neither the order of the images nor that of the objects of
    an image changes anything.

    - `mask_recall`: share of the ground truths that are matched with a predicted mask of IoU >= 0.5 and a phrase of
      similarity >= 0.5. In each image as many are matched, one to one, as can be; of several ways to do that the one with
      the highest sum of IoUs counts (Hungarian method). A mask without a phrase matches nothing.
    - `AP50`: COCO's average precision of the masks at IoU 0.5, without classes and phrases, ranked by their scores.
    - `mIoU`: mean over the images of the mean IoU of their pairs, 0 without any. Pairs are one to one, the highest IoU
      first, whatever the phrases; what finds no partner is not counted.
    - `mIoU_gt`: mean over the ground-truth masks of the IoU of their pair, 0 without one.

    `parity`: what the scripts of MGLMM and GLaMM print, with all of COCO's twelve numbers (`COCO_STATS`; -1: no ground truth
    of that size).

    - All scores are 1, so the ids of the images (sorted) and the order within an answer rank the predictions.
    - `mIoU`: as above, but 0 for an image where a predicted and a ground-truth mask are both empty.
    - `mask_recall`: pairs are taken by the highest IoU alone, and the first one that fails a threshold ends the image; a
      pair of two empty masks passes that of the IoU. Phrases and labels belong to masks by their index. Where a pair lacks
      one the scripts fail and count no match of the image; GLaMM keeps its labels in the denominator, MGLMM drops them.

    No mask is kept: of an image there remain its numbers and which detections match at COCO's thresholds, about 3 KB.

    Args:
        similarity: Of phrases. The default is the originals', `BertSimilarity()`.
        original: "mglmm" or "glamm", whose script `parity` follows.

    Raises:
        ValueError: the text encoder is not at hand, or there is no such original.
    """

    def __init__(self, similarity: TextSimilarity | None = None, original: Literal["mglmm", "glamm"] = "mglmm") -> None:
        if original not in ("mglmm", "glamm"):
            raise ValueError(f'no script of {original!r} scores descriptions: original is "mglmm" or "glamm"')
        self._similarity = BertSimilarity() if similarity is None else similarity
        self._original = original
        self._images: dict[ImageId, _Image] = {}
        self._coco, self._coco50 = AveragePrecision(), AveragePrecision(only_ap50=True)
        self._captions: dict[str | None, CaptioningScore] = {}  # for each split; None: for all images

    def update(
        self,
        image_id: ImageId,
        masks: Sequence[Mask],
        phrases: Sequence[str],
        scores: Sequence[float] | None,
        gt_masks: Sequence[Mask],
        gt_labels: Sequence[str],
        caption: str | None = None,
        gt_captions: Sequence[str] | None = None,
        split: str | None = None,
    ) -> dict[str, Any]:
        """
        Add the description of one image.

        Args:
            image_id: Another one for each image.
            masks, gt_masks: bool `(H, W)` or COCO compressed RLE `{"size": [H, W], "counts": str}`, all of one size. No
                prediction: no masks.
            phrases, gt_labels: Of the masks, by index. Where there are fewer, the last masks have none; in `clean` a blank
                one is none. Phrases beyond the masks are ignored; labels beyond the masks are missed ground truths.
            scores: Confidence of each predicted mask, ranks it in `clean`. None: 1 for each, which `compute` marks.
            caption: The description, with its tags or without. None: no prediction, see `CaptioningScore`.
            gt_captions: Its references. None: captions are not scored.
            split: "root" or "subtree" in MGSC; `compute` also gives the results of each split.

        Returns:
            The image's own numbers: `image_id`, `masks` (ground-truth masks), `predicted_masks`, and
            - `clean`: `mIoU`, `mIoU_gt`, `mask_recall` (each 0 for 0/0), `ious` (one for each ground-truth mask, 0 without
              pair), `pairs` (the recalled ones, `[ground truth, prediction]`);
            - `parity`: `mIoU`, `pairs` (None where the scripts fail).

        Raises:
            ValueError: the id was there before, a mask is broken or of another size, the scores do not fit the masks or are
                not finite, or a caption has no reference.
        """
        name = f"image {image_id!r}"
        if image_id in self._images:
            raise ValueError(f"{name} was scored before: an image has one description")
        values = np.ones(len(masks)) if scores is None else np.array(scores, dtype=np.float64)
        if values.shape != (len(masks),) or not np.isfinite(values).all():
            raise ValueError(f"{name}: {len(masks)} predicted masks need as many finite scores, got {scores!r:.200}")
        if caption is not None and gt_captions is None:
            raise ValueError(f"{name} has a caption but no reference caption to compare it with")
        predicted = [_rle(mask, f"{name}, predicted mask {index}") for index, mask in enumerate(masks)]
        references = [_rle(mask, f"{name}, ground-truth mask {index}") for index, mask in enumerate(gt_masks)]
        sizes = {tuple(rle["size"]) for rle in predicted + references}
        if len(sizes) > 1:
            raise ValueError(
                f"{name}: the {len(predicted)} predicted and {len(references)} ground-truth masks must have one size "
                f"(height, width), got {sorted(sizes)}"
            )

        # What the order could decide (equal IoUs or scores) is decided by the content in `clean`.
        order = sorted(range(len(predicted)), key=lambda index: (-values[index], predicted[index]["counts"]))
        gt_order = sorted(range(len(references)), key=lambda index: references[index]["counts"])
        areas, gt_areas = np.asarray(mask_utils.area(predicted)), np.asarray(mask_utils.area(references))
        ious = np.zeros((len(predicted), len(references)))
        if ious.size:
            ious = mask_utils.iou(predicted, references, [0] * len(references))
        similarities = self._similarity(list(gt_labels), list(phrases))

        # The originals divide the pixel counts: 0 / 0 is NaN, which pycocotools gives as 0.
        raw = np.where((areas == 0)[:, None] & (gt_areas == 0), np.nan, ious)
        parity_ious = [raw[pair] for pair in greedy_pairs(raw)]
        parity_pairs = original_pairs(raw.T, similarities)
        paired = np.zeros(len(references))
        for row, column in greedy_pairs(ious[np.ix_(order, gt_order)]):
            paired[gt_order[column]] = ious[order[row], gt_order[column]]
        pairs = admissible_pairs(ious.T, _of_masks(similarities, gt_labels, phrases, ious.T.shape))

        lost = parity_pairs is None and self._original == "mglmm"
        image = _Image(
            split=split,
            masks=len(references),
            truths=max(len(references), len(gt_labels)),
            predicted=len(predicted),
            unequal=len(masks) != len(phrases),
            unscored=scores is None and len(masks) > 0,
            captioned=gt_captions is not None,
            failed=parity_pairs is None,
            parity_miou=_mean(parity_ious),
            parity_matches=len(parity_pairs or []),
            parity_labels=0 if lost else len(gt_labels),
            miou=_mean(paired[paired > 0]),
            iou_sum=float(paired.sum()),
            matches=len(pairs),
            detections=self._coco.match(ious, np.ones(len(predicted)), areas, gt_areas),
            detections50=self._coco50.match(
                ious[np.ix_(order, gt_order)], values[order], areas[order], gt_areas[gt_order]
            ),
        )
        if gt_captions is not None:
            for part in {None, split}:
                captions = self._captions.setdefault(part, CaptioningScore(CAPTION_METRICS))
                captions.update(image_id, caption, gt_captions)
        self._images[image_id] = image
        return {
            "image_id": image_id,
            "masks": image.masks,
            "predicted_masks": image.predicted,
            "clean": {
                "mIoU": image.miou,
                "mIoU_gt": image.iou_sum / max(image.masks, 1),
                "mask_recall": image.matches / max(image.truths, 1),
                "ious": paired.tolist(),
                "pairs": pairs,
            },
            "parity": {"mIoU": image.parity_miou, "pairs": parity_pairs},
        }

    def compute(self) -> dict[str, Any]:
        """
        Returns:
            - `parity` and `clean`: the metrics of the class's description, as fractions;
            - `images`, `masks` (ground-truth masks), `predicted_masks`, `unequal` (images whose answer has another number
              of phrases than of masks), `original_failures` (images where the originals' recall fails): counts;
            - `skipped`, `marked`: what could not be computed and what was computed another way, with the reason;
            - `splits`: the same for each split, if there are any.

        Raises:
            ValueError: there is no ground-truth mask (in a split).
        """
        # Sorted as COCOeval sorts: numbers by value, strings by character.
        ids = sorted(self._images, key=lambda image_id: (isinstance(image_id, str), image_id))
        images = [self._images[image_id] for image_id in ids]
        result = self._compute(images, None)
        splits = sorted({image.split for image in images if image.split is not None})
        if splits:
            result["splits"] = {
                split: self._compute([image for image in images if image.split == split], split) for split in splits
            }
        return result

    def _compute(self, images: list[_Image], split: str | None) -> dict[str, Any]:
        total = {name: sum(getattr(image, name) for image in images) for name in _SUMMED}
        where = "" if split is None else f" of the split {split!r}"
        if total["masks"] == 0:
            raise ValueError(f"there is no ground-truth mask in {len(images)} images{where}: nothing can be recalled")
        result: dict[str, Any] = {
            "parity": {
                **self._coco.compute([image.detections for image in images]),
                "mIoU": _mean([image.parity_miou for image in images]),
                "mask_recall": total["parity_matches"] / max(total["parity_labels"], 1),
            },
            "clean": {
                **self._coco50.compute([image.detections50 for image in images]),
                "mIoU": _mean([image.miou for image in images]),
                "mIoU_gt": total["iou_sum"] / total["masks"],
                "mask_recall": total["matches"] / total["truths"],
            },
            "images": len(images),
            "masks": total["masks"],
            "predicted_masks": total["predicted"],
            "unequal": total["unequal"],
            "original_failures": total["failed"],
            "skipped": {},
            "marked": {"text_similarity": self._similarity.name},
        }
        if total["unscored"]:
            result["marked"]["AP50"] = f"the masks of {total['unscored']} images had no scores and count as 1"
        if total["predicted"] == 0:
            result["marked"]["parity"] = "no mask was predicted: the original scripts fail, the numbers are 0"
        if total["captioned"] == 0:
            result["skipped"] = dict.fromkeys(CAPTION_METRICS, "there are no reference captions")
            return result
        if total["captioned"] < len(images):
            reason = f"of the {total['captioned']} among {len(images)} images that have reference captions"
            result["marked"] |= dict.fromkeys(CAPTION_METRICS, reason)
        captions = self._captions[split].compute()
        for mode in ("parity", "clean"):
            result[mode] |= {name: captions[mode][name] for name in CAPTION_METRICS if name in captions[mode]}
        # Where a whole mode has no captions, `captions` names the mode.
        result["skipped"] |= {f"captions ({x})" if x in result else x: why for x, why in captions["skipped"].items()}
        result["marked"] |= captions["marked"]
        return result


@dataclass(slots=True)
class _Image:
    """What is kept of an image."""

    split: str | None
    masks: int
    truths: int  # masks or labels, whichever are more
    predicted: int
    unequal: bool
    unscored: bool
    captioned: bool
    failed: bool
    parity_miou: float
    parity_matches: int
    parity_labels: int
    miou: float
    iou_sum: float
    matches: int
    detections: Detections | None
    detections50: Detections | None


_SUMMED = (
    "masks truths predicted unequal unscored captioned failed parity_matches parity_labels iou_sum matches".split()
)


def _rle(mask: Mask, name: str) -> dict[str, Any]:
    """`{"size": [H, W], "counts": str}`, safe for pycocotools, which reads beyond the end of broken counts."""
    try:
        if isinstance(mask, np.ndarray):
            return encode_mask(mask)
        height, width = check_size(mask)
        counts = mask.get("counts")
        if isinstance(counts, bytes):
            counts = counts.decode("ascii", "replace")
        check_mask({"size": [height, width], "counts": counts})
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return {"size": [height, width], "counts": counts}


def _of_masks(
    similarities: np.ndarray, labels: Sequence[str], phrases: Sequence[str], shape: tuple[int, ...]
) -> np.ndarray:
    """Similarities `(ground-truth masks, predicted masks)`, 0 where a mask has no label or phrase, or a blank one."""
    named = np.outer([bool(text.strip()) for text in labels], [bool(text.strip()) for text in phrases])
    result = np.zeros(shape)
    rows, columns = min(shape[0], len(labels)), min(shape[1], len(phrases))
    result[:rows, :columns] = np.where(named, similarities, 0)[:rows, :columns]
    return result


def _mean(values: Sequence[float] | np.ndarray) -> float:
    return float(np.mean(values)) if len(values) else 0.0


class SegCapMetric(evaluate.Metric):
    """`SegCapScore` for `evaluate`: a row is an image, its masks COCO RLE."""

    def _info(self) -> evaluate.MetricInfo:
        strings = datasets.List(datasets.Value("string"))
        return evaluate.MetricInfo(
            description=SegCapScore.__doc__,
            citation="",
            inputs_description="""
    predictions, references: For each image the predicted and the ground-truth masks as COCO RLE.
    phrases, labels: For each image the phrases of the predicted and the labels of the ground-truth masks, by index.
    scores: For each image the confidence of each predicted mask; [] if there is none.
    captions, reference_captions: For each image the description and its references; [] if captions are not scored.
    image_ids: For each image its id.
    splits: For each image "root" or "subtree"; "" if there are no splits.
    original: See `SegCapScore`.
    text_similarity: "exact", "exact-noun", or the name or folder of a text encoder.
    device: Where the text encoder runs.
""",
            features=datasets.Features(
                {
                    "predictions": datasets.List(MASK_FEATURE),
                    "references": datasets.List(MASK_FEATURE),
                    "phrases": strings,
                    "labels": strings,
                    "scores": datasets.List(datasets.Value("float64")),
                    "captions": datasets.Value("string"),
                    "reference_captions": strings,
                    "image_ids": datasets.Value("string"),
                    "splits": datasets.Value("string"),
                }
            ),
        )

    def _compute(
        self,
        predictions: Sequence[Sequence[Mask]],
        references: Sequence[Sequence[Mask]],
        phrases: Sequence[Sequence[str]],
        labels: Sequence[Sequence[str]],
        scores: Sequence[Sequence[float]],
        captions: Sequence[str],
        reference_captions: Sequence[Sequence[str]],
        image_ids: Sequence[str],
        splits: Sequence[str],
        original: Literal["mglmm", "glamm"] = "mglmm",
        text_similarity: str = DEFAULT_ENCODER,
        device: str = "cpu",
    ) -> dict[str, Any]:
        score = SegCapScore(load_text_similarity(text_similarity, device), original)
        for row in range(len(predictions)):
            score.update(
                image_ids[row],
                predictions[row],
                phrases[row],
                scores[row] or None,
                references[row],
                labels[row],
                captions[row] if reference_captions[row] else None,  # "" is an empty caption, None is no prediction
                reference_captions[row] or None,
                splits[row] or None,
            )
        return score.compute()
