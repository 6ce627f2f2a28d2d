"""Every metric as `evaluate.load` finds it: by the path of its file, in a fresh process, without a network."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import mglmm
from mglmm.evaluation import metrics
from mglmm.evaluation.metrics.generalized_referring_segmentation import GeneralizedReferringSegmentation
from mglmm.evaluation.metrics.panoptic_segmentation import PanopticSegmentation
from mglmm.evaluation.metrics.referring_segmentation import ReferringSegmentation
from mglmm.evaluation.metrics.video_object_segmentation import VideoObjectSegmentation
from mglmm.processing.rle import encode_mask

FILES = sorted(path for path in Path(metrics.__file__).parent.glob("*.py") if not path.stem.startswith("_"))
SCRIPT = """
import json, socket, sys

def no_network(*args):
    raise OSError("a metric wants the network")

socket.socket.connect = socket.getaddrinfo = no_network
import evaluate

found = {}
for path in sys.argv[1:]:
    metric = evaluate.load(path)
    found[path] = [type(metric).__name__, type(metric).__module__.split(".")[0], sorted(metric.features), len(metric.description)]
rle = {"size": [2, 3], "counts": "06"}
metric = evaluate.load(next(path for path in sys.argv[1:] if path.endswith("/referring_segmentation.py")))
metric.add_batch(predictions=[[rle], []], references=[[rle], [rle]])
found["result"] = metric.compute(image_ids=["a", "b"], original="glamm")
print(json.dumps(found))
"""
CLASSES = {
    "captioning": "Captioning",
    "generalized_referring_segmentation": "GeneralizedReferringSegmentation",
    "panoptic_segmentation": "PanopticSegmentation",
    "referring_segmentation": "ReferringSegmentation",
    "region_captioning": "RegionCaptioning",
    "segcap": "SegCapMetric",
    "video_object_segmentation": "VideoObjectSegmentation",
}


def test_every_metric_loads_by_its_path(tmp_path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, FILES)],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout.splitlines()[-1])
    result = found.pop("result")
    assert {Path(path).stem: name for path, (name, *_) in found.items()} == CLASSES
    for _, package, features, description in found.values():
        assert package == "evaluate_modules"  # the loader's copy, not the installed module
        assert {"predictions", "references"} <= set(features)
        assert description > 0
    assert result["clean"]["gIoU"] == 0.5
    assert result["parity"]["cIoU"] == 1.0


BOX = np.zeros((6, 8), dtype=bool)
BOX[1:5, 2:6] = True
HALF = BOX & (np.arange(8) < 4)
ALL, PART = encode_mask(BOX), encode_mask(HALF)
CATEGORIES = [{"id": 1, "isthing": 1}, {"id": 2, "isthing": 0}]


@pytest.mark.parametrize(
    ("metric", "inputs", "expected"),
    [
        (
            ReferringSegmentation,
            {"predictions": [[], [PART]], "references": [[ALL], [ALL]], "ignored": [None, encode_mask(BOX & ~HALF)]},
            {"gIoU": 0.5, "missing": 1},
        ),
        (
            ReferringSegmentation,
            {"predictions": [[PART, ALL], []], "references": [[ALL], []], "merge": True},
            {"gIoU": 1.0, "questions": 2},
        ),
        (
            GeneralizedReferringSegmentation,
            {"predictions": [[], [PART]], "references": [[], [ALL]], "question_ids": ["a", "b"]},
            {"gIoU": 0.75, "N-acc": 1.0, "T-acc": 1.0, "T-acc@50px": 0.0},
        ),
        (
            PanopticSegmentation,
            {
                "predictions": [[], [{"category_id": 1, "segmentation": ALL, "score": 0.5}]],
                "references": [
                    [{"category_id": 2, "segmentation": PART, "iscrowd": 0}],
                    [{"category_id": 1, "segmentation": ALL, "iscrowd": 0}],
                ],
                "categories": CATEGORIES,
            },
            {"PQ": 0.5, "PQ_things": 1.0, "PQ_stuff": 0.0, "mIoU": 0.5, "missing": 1},
        ),
        (
            VideoObjectSegmentation,
            {"predictions": [[[], [PART, ALL], []]], "references": [[[ALL], [ALL], []]], "skip_ends": True},
            {"J": 1.0, "F": 1.0, "frames": 1},
        ),
    ],
)
def test_rows_of_rle_through_evaluate(metric, inputs, expected, tmp_path) -> None:
    result = metric(cache_dir=str(tmp_path)).compute(**inputs)["clean"]
    assert {name: result[name] for name in expected} == pytest.approx(expected)


def test_the_same_image_twice_is_refused_through_evaluate(tmp_path) -> None:
    with pytest.raises(ValueError, match="'a' comes a second time"):
        ReferringSegmentation(cache_dir=str(tmp_path)).compute(
            predictions=[[ALL], [ALL]], references=[[ALL], [ALL]], image_ids=["a", "a"]
        )


def test_load_metric() -> None:
    metric = mglmm.load_metric("referring_segmentation")
    mask = encode_mask(np.ones((2, 3), dtype=bool))
    assert metric.compute(predictions=[[mask]], references=[[mask]])["clean"]["cIoU"] == 1
    with pytest.raises(ValueError, match="there is no metric 'iou'; there are captioning, generalized"):
        mglmm.load_metric("iou")
