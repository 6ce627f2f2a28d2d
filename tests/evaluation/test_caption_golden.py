"""Captions against the originals' numbers and against pycocoevalcap's own evaluation; METEOR is started once for all."""

import contextlib
import json
import random
import shutil
import threading

import pytest
from pycocotools.coco import COCO

from mglmm.evaluation import caption_scorers
from mglmm.evaluation.caption_scorers import CaptionSet, Meteor, score_captions
from mglmm.evaluation.metrics.captioning import CaptioningScore

pytest.importorskip("pycocoevalcap", reason="needs mglmm[eval]")
needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="needs Java")

WITHOUT_METEOR = ("BLEU", "ROUGE_L", "CIDEr")
NUMBERS = ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "METEOR", "ROUGE_L", "CIDEr")


@pytest.fixture(scope="module")
def samples(shared_dir) -> dict[str, tuple[str, list[str]]]:
    """Caption and references of the 30 golden images, by image id, in the order of the file."""
    data = shared_dir / "golden" / "evaluation" / "data"
    truth = json.loads((data / "gt" / "val_gcg_coco_caption_gt.json").read_text())
    references: dict[str, list[str]] = {image["id"]: [] for image in truth["images"]}
    for annotation in truth["annotations"]:
        references[annotation["image_id"]].append(annotation["caption"])
    return {
        image_id: (json.loads((data / "pred" / f"{image_id}.json").read_text())["caption"], texts)
        for image_id, texts in references.items()
    }


@pytest.fixture(scope="module")
def meteor():
    process = Meteor(100_000)
    with process:
        yield process
    assert process.process.returncode is not None and process.process.stdout.closed


@pytest.fixture
def one_meteor(meteor, monkeypatch):
    """Lets every scoring use the process that runs already."""
    monkeypatch.setattr(caption_scorers, "Meteor", lambda sentences: contextlib.nullcontext(meteor))


def golden(shared_dir, name: str) -> dict:
    return json.loads((shared_dir / "golden" / "evaluation" / "results" / f"{name}.json").read_text())


@needs_java
def test_golden_numbers_of_every_split_and_image(samples, shared_dir, one_meteor):
    score = CaptioningScore()
    for image_id, (caption, references) in samples.items():
        score.update(image_id, caption, references)
    result = score.compute(per_image=True)
    assert set(result["skipped"]) <= {"SPICE"} and result["marked"] == {}
    for file in ("glamm_gcg_exact", "glamm_gcg_bert"):
        for split in golden(shared_dir, file).values():
            for mode in ("parity", "clean"):  # nothing in these captions tells the two apart
                for name in NUMBERS:
                    assert result[mode][name] == pytest.approx(split["caption"][name], abs=1e-6), (mode, name)
                    for image_id, expected in split["per_image"].items():
                        value = result[mode]["per_image"][image_id][name]
                        assert value == pytest.approx(expected[name], abs=1e-6), (mode, name, image_id)


@needs_java
@pytest.mark.parametrize(
    ("run", "emptied"),
    [
        ("baseline", None),  # the first four images
        ("empty_caption", "230037"),  # the same with an empty caption
    ],
)
def test_golden_edge_cases(run, emptied, samples, shared_dir, one_meteor):
    expected = golden(shared_dir, "edge_facts")[run]["metrics"]
    score = CaptioningScore()
    for image_id, (caption, references) in list(samples.items())[:4]:
        score.update(image_id, "" if image_id == emptied else caption, references)
    result = score.compute()
    for name in NUMBERS:
        assert result["parity"][name] == pytest.approx(expected[name], abs=1e-6), name


def test_python_tokenizer_on_the_golden_captions(samples, shared_dir, monkeypatch, tmp_path):
    """Without Java the golden numbers come out, too: these captions hold nothing on which the tokenisers differ."""
    monkeypatch.setenv("PATH", str(tmp_path))
    score = CaptioningScore(WITHOUT_METEOR)
    for image_id, (caption, references) in samples.items():
        score.update(image_id, caption, references)
    result = score.compute()
    expected = golden(shared_dir, "glamm_gcg_exact")["val"]["caption"]
    for name in ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr"):
        assert result["parity"][name] == pytest.approx(expected[name], abs=1e-6), name


WORDS = (
    "a the dog cat red man's isn't (left) [x] well-known 3.5 U.S. no. café 猫 , . ... -- ! ? \" ' ` ; : & AT&T 50% $5 on in "
    "with two dogs cannot it's o'clock and/or ||| </s> “sign” – … 1/2 C++ Mr. St. p.m. #1 *"
).split()


def random_captions(seed: int, images: int) -> dict[int, tuple[str, list[str]]]:
    """Captions made of words and odd tokens, the first an empty one; one to five references."""
    choose = random.Random(seed)
    return {
        image_id: (
            " ".join(choose.choices(WORDS, k=choose.randint(0, 12))) if image_id > 1 else "",
            [" ".join(choose.choices(WORDS, k=choose.randint(1, 12))) for _ in range(choose.randint(1, 5))],
        )
        for image_id in range(1, images + 1)
    }


@needs_java
def test_agreement_with_cocos_caption_evaluation(meteor, one_meteor, monkeypatch, capsys):
    from pycocoevalcap import eval as coco_eval

    class SameProcess(coco_eval.Meteor):
        """pycocoevalcap's wrapper around the process that runs already."""

        def __init__(self):
            self.meteor_p, self.lock = meteor.process, threading.Lock()

        def __del__(self):
            pass

    class NoSpice:
        def compute_score(self, references, captions):
            return 0.0, [0.0] * len(references)

        def method(self):
            return "SPICE"

    monkeypatch.setattr(coco_eval, "Meteor", SameProcess)
    monkeypatch.setattr(coco_eval, "Spice", NoSpice)
    captions = random_captions(seed=0, images=60)
    truth = COCO()
    truth.dataset = {
        "images": [{"id": image_id} for image_id in captions],
        "annotations": [
            {"id": 10 * image_id + index, "image_id": image_id, "caption": text}
            for image_id, (_, references) in captions.items()
            for index, text in enumerate(references)
        ],
    }
    truth.createIndex()
    theirs = coco_eval.COCOEvalCap(
        truth, truth.loadRes([{"image_id": image_id, "caption": text} for image_id, (text, _) in captions.items()])
    )
    theirs.evaluate()

    texts, references = zip(*captions.values(), strict=True)
    scores = score_captions([CaptionSet(references, texts, apart=False)], (*WITHOUT_METEOR, "METEOR"))
    assert scores.skipped == {} and scores.marked == {}
    ((total, each),) = scores.sets
    assert set(total) == set(NUMBERS)
    for name in NUMBERS:
        assert total[name] == pytest.approx(theirs.eval[name], abs=1e-9), name
        assert each[name] == pytest.approx([theirs.imgToEval[i][name] for i in captions], abs=1e-9), name


@needs_java
def test_python_tokenizer_is_close_on_random_captions(monkeypatch, tmp_path):
    """On captions odder than any model's ROUGE-L differs by 6e-5, BLEU and CIDEr not at all."""
    texts, references = zip(*random_captions(seed=1, images=300).values(), strict=True)
    one = CaptionSet(references, texts, apart=True)
    ptb = score_captions([one], WITHOUT_METEOR)
    monkeypatch.setenv("PATH", str(tmp_path))
    python = score_captions([one], WITHOUT_METEOR)
    assert (ptb.marked, python.marked) == ({}, {"tokenizer": "python"})
    for name, value in ptb.sets[0][0].items():
        assert python.sets[0][0][name] == pytest.approx(value, abs=1e-4), name


@needs_java
def test_meteor_of_odd_captions_and_of_texts_seen_before(meteor):
    references = {0: ["the cat sat"], 1: ["кошка сидит", "猫"], 2: ["a ||| dog"], 3: ["a dog"]}
    captions = {0: ["the cat sat"], 1: ["кошка сидит"], 2: ["a |||dog"], 3: [""]}
    total, each = meteor.score(references, captions)
    assert each == pytest.approx([1, 1, 1, 0], abs=1e-9)
    assert meteor.score(references, captions) == (total, each)
