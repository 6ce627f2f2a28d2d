"""`parity` of `SegCapScore` against what GLaMM's script printed for thirty synthetic images of every odd kind."""

import json

import numpy as np
import pytest

from mglmm.evaluation.average_precision import COCO_STATS
from mglmm.evaluation.metrics.segcap import SegCapScore
from mglmm.evaluation.text_similarity import BertSimilarity, ExactSimilarity
from mglmm.processing.rle import encode_mask


@pytest.fixture(scope="module")
def golden(shared_dir):
    folder = shared_dir / "golden/evaluation"
    if not folder.is_dir():
        pytest.skip("needs the folder `shared/golden/evaluation`")
    return folder


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def images(golden, split: str):
    """The arguments of `update` for each image of a split, in the order of the file."""
    masks, captions = (read(golden / f"data/gt/{split}_{kind}_gt.json") for kind in ("mask", "caption"))
    for name in (image["id"] for image in captions["images"]):
        described = [each for each in captions["annotations"] if each["image_id"] == name]  # two of some images
        prediction = read(golden / f"data/pred/{name}.json")
        references = [each["segmentation"] for each in masks["annotations"] if each["image_id"] == name]
        yield {
            "image_id": name,
            "masks": prediction["pred_masks"],
            "phrases": prediction["phrases"],
            "scores": None,
            "gt_masks": references,
            "gt_labels": described[0]["labels"],
        }


class PrintedSimilarity:
    """The similarities that the original computed, so that recall is compared without an encoder."""

    name = "printed"

    def __init__(self, values: dict[str, float]) -> None:
        self.values = values

    def __call__(self, first, second) -> np.ndarray:
        pairs = [[self.values.get(f"{a} ||| {b}", np.nan) for b in second] for a in first]
        return np.array(pairs).reshape(len(first), len(second))


@pytest.mark.parametrize("kind", ["exact", "bert", "printed"])
def test_every_number_is_the_one_printed(golden, kind) -> None:
    printed = read(golden / f"results/glamm_gcg_{'exact' if kind == 'exact' else 'bert'}.json")["val"]
    if kind == "exact":
        similarity = ExactSimilarity(normalize=False)
    else:
        similarity = (
            BertSimilarity(golden / "bert-base-uncased") if kind == "bert" else PrintedSimilarity(printed["sims"])
        )
    score = SegCapScore(similarity, original="glamm")
    for row in images(golden, "val_gcg_coco"):
        result, expected = score.update(**row)["parity"], printed["per_image"][row["image_id"]]
        assert result["mIoU"] == pytest.approx(expected["miou"], abs=1e-6)
        assert (result["pairs"] and sorted(result["pairs"])) == expected["pairs"]
        assert (result["pairs"] is None) == (expected["error"] is not None)
    result = score.compute()
    parity = result["parity"]
    assert [parity[name] for name in COCO_STATS] == pytest.approx(printed["ap_stats"], abs=1e-6)
    assert (parity["mIoU"], parity["mask_recall"]) == pytest.approx((printed["miou"], printed["recall"]), abs=1e-6)
    assert (result["original_failures"], result["unequal"]) == (2, 4)
    assert result["marked"]["text_similarity"] == similarity.name


def test_the_other_original_drops_the_images_where_it_fails(golden) -> None:
    score = SegCapScore(ExactSimilarity(normalize=False), original="mglmm")
    for row in images(golden, "val_gcg_coco"):
        score.update(**row)
    result = score.compute()
    # 67 matches as GLaMM; the labels of the two images that fail, 3 and 2 of 109, leave the denominator
    assert result["parity"]["mask_recall"] == pytest.approx(67 / (109 - 5))
    # clean: the 67, and those behind the first wrong phrase; all 109 stay
    assert result["clean"]["mask_recall"] > 67 / 109
    assert result["clean"]["mask_recall"] * 109 == pytest.approx(round(result["clean"]["mask_recall"] * 109))
    assert result["masks"] == 109


def test_the_similarities_are_the_originals(golden) -> None:
    printed = read(golden / "results/glamm_gcg_bert.json")["val"]["sims"]
    pairs = [pair.split(" ||| ") for pair in printed]
    similarity = BertSimilarity(golden / "bert-base-uncased")
    labels = [similarity([first], [second])[0, 0] for first, second in pairs]
    assert labels == pytest.approx(list(printed.values()), abs=1e-6)


def test_mgsc_has_the_results_of_each_split_and_of_all(golden) -> None:
    scores = {name: SegCapScore(ExactSimilarity(normalize=False)) for name in ("both", "root", "subtree", "all")}
    for split in ("root", "subtree"):
        for row in images(golden, f"{split}_mgsc"):
            scores[split].update(**row)
            scores["both"].update(**row, split=split)
    for row in images(golden, "all_mgsc"):
        scores["all"].update(**row)
    both, expected = scores["both"].compute(), scores["all"].compute()
    for split in ("root", "subtree"):
        assert both["splits"].pop(split) == scores[split].compute()
    assert both.pop("splits") == {}
    assert both == expected


def test_an_empty_mask_that_meets_an_empty_one(golden) -> None:
    facts = read(golden / "results/edge_facts.json")
    rows = list(images(golden, "val_gcg_coco"))[:4]  # those of the facts
    shape = rows[0]["masks"][0]["size"]

    def check(name: str) -> None:
        score = SegCapScore(ExactSimilarity(normalize=False))
        for row in rows:
            score.update(**row)
        result, expected = score.compute()["parity"], facts[name]["metrics"]
        values = result["mIoU"], result["mask_recall"]
        assert values == pytest.approx((expected["miou"], expected["recall"]), abs=1e-6)

    check("baseline")
    rows[0]["masks"][0] = rows[0]["gt_masks"][0] = encode_mask(np.zeros(shape, dtype=bool))
    check("empty_pred_and_empty_gt_mask")


def test_captions_are_scored_beside_the_masks(golden, monkeypatch) -> None:
    monkeypatch.setattr("mglmm.evaluation.metrics.segcap.CAPTION_METRICS", ("CIDEr",))  # METEOR takes long to start
    references = read(golden / "data/gt/val_gcg_coco_caption_gt.json")["annotations"]
    score = SegCapScore(ExactSimilarity(normalize=False))
    for row in images(golden, "val_gcg_coco"):
        name = row["image_id"]
        caption = read(golden / f"data/pred/{name}.json")["caption"]
        score.update(**row, caption=caption, gt_captions=[x["caption"] for x in references if x["image_id"] == name])
    result = score.compute()
    if "CIDEr" in result["skipped"] or "tokenizer" in result["marked"]:
        pytest.skip("needs Java and pycocoevalcap for the originals' tokeniser")
    printed = read(golden / "results/glamm_gcg_exact.json")["val"]["caption"]
    assert result["parity"]["CIDEr"] == pytest.approx(printed["CIDEr"], abs=1e-6)
