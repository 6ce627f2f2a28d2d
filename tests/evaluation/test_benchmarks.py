"""What each benchmark asks of tiny data, and its numbers worked out by hand."""

from collections import Counter

import datasets
import numpy as np
import pytest

from mglmm.datasets_scripts.features import FEATURES
from mglmm.datasets_scripts.labels import readable
from mglmm.evaluation import caption_scorers, java
from mglmm.evaluation.benchmarks import BENCHMARKS, choose, ground_truth, plan
from mglmm.evaluation.label_names import ADE20K_LABELS, COCO_PANOPTIC_LABELS, LabelNames
from mglmm.evaluation.scoring import make_scorer
from mglmm.evaluation.text_similarity import ExactSimilarity
from mglmm.processing.rle import encode_mask
from tests.evaluation import benchmark_rows
from tests.evaluation.benchmark_rows import SIZES, dataset, row
from tests.evaluation.conftest import columns


@pytest.fixture(autouse=True)
def no_java(monkeypatch) -> None:
    def missing() -> str:
        raise java.JavaError("needs Java: not in this test")

    for module in (java, caption_scorers):
        monkeypatch.setattr(module, "find_java", missing)


# ------------------------------------------------------------------ what is asked


@pytest.mark.parametrize(
    ("name", "mode", "protocols"),
    [
        ("refcoco", "clean", {"generate": 7}),
        ("refcoco", "parity", {"each": 6, "three": 2}),  # teacher forcing needs a target
        ("refcoco", "both", {"generate": 7, "each": 6, "three": 2}),
        ("grefcoco", "parity", {"generate": 7}),  # the same answers, scored by the originals' rule
        ("reasonseg", "both", {"generate": 2, "each": 2}),
        ("gcg", "both", {"generate": 2}),
        ("mgsc", "both", {"generate": 2}),
        ("flickr30k", "both", {"generate": 2}),  # images, not captions
        ("coco_panoptic", "both", {"generate": 2, "listed": 2}),
        ("ade20k", "both", {"generate": 2}),
        ("vg_region", "both", {"generate": 3}),
        ("photos", "both", {"generate": 8}),
        ("photos_paraphrased", "both", {"generate": 4}),  # only what is there
    ],
)
def test_questions_by_protocol(name, mode, protocols) -> None:
    questions = plan(BENCHMARKS[name], dataset(name), mode=mode)
    assert Counter(question.protocol for question in questions) == protocols
    assert len({question.key for question in questions}) == len(questions)


def test_three_expressions_of_an_image_are_turns_of_one_conversation() -> None:
    data = dataset("refcoco")
    first, second = (q for q in plan(BENCHMARKS["refcoco"], data, mode="parity") if q.protocol == "three")
    assert len(first.turns) == len(set(first.rows)) == 3 and set(first.rows) < set(range(5))
    for number, (question, answer) in zip(first.rows, first.turns, strict=True):
        assert (question, answer) == (f"Segment hat {number}.", f"Sure, <p> hat {number} </p> [SEG].")
    assert second.turns == (("Segment the dog.", "Sure, <p> the dog </p> [SEG]."),)
    again = [q for q in plan(BENCHMARKS["refcoco"], data, mode="parity") if q.protocol == "three"]
    assert again == [first, second]


def test_the_listed_answer_names_every_label_of_the_image() -> None:
    question = next(q for q in plan(BENCHMARKS["coco_panoptic"], dataset("coco_panoptic")) if q.protocol == "listed")
    assert question.rows == (0, 1)
    assert question.turns == (("Describe everything.", "<p> the person </p> [SEG] and <p> the sky </p> [SEG]"),)


def test_all_captions_of_an_image_are_references_of_one_question() -> None:
    assert [q.rows for q in plan(BENCHMARKS["nocaps"], dataset("nocaps"))] == [(0, 1), (2, 3)]


def test_a_model_without_region_encoder_sees_the_region_alone() -> None:
    data = dataset("vg_region")
    with_boxes = plan(BENCHMARKS["vg_region"], data)[0]
    assert (with_boxes.regions, with_boxes.crop) == (((4.0, 4.0, 40.0, 30.0),), None)
    assert "<region>" in with_boxes.turns[0][0]
    without = plan(BENCHMARKS["vg_region"], data, sees_regions=False)[0]
    assert (without.regions, without.crop) == ((), (4.0, 4.0, 40.0, 30.0))
    assert "<region>" not in without.turns[0][0]


def test_wrong_data_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"none of the 2 rows is of a task that RefCOCO asks for \(referring, absent\)"
    ):
        plan(BENCHMARKS["refcoco"], dataset("reasonseg"))
    with pytest.raises(ValueError, match="ADE20K has no parity"):
        plan(BENCHMARKS["ade20k"], dataset("ade20k"), mode="parity")
    turns = [{"role": role, "content": "x"} for role in ("user", "assistant", "user", "assistant")]
    several = datasets.Dataset.from_list([row("1", "referring", "", "") | {"messages": turns}], features=FEATURES)
    with pytest.raises(ValueError, match="row 0 is not one question and one answer but"):
        plan(BENCHMARKS["refcoco"], several)


def test_a_subset_is_spread_over_sources_and_tasks() -> None:
    sizes = {("a", "object"): 100, ("a", "part"): 50, ("b", "object"): 30, ("b", "fine"): 1}
    strata = [pair for pair, count in sizes.items() for _ in range(count)]
    chosen = choose(strata, 18)
    assert len(set(chosen)) == 18 and chosen == sorted(chosen)
    counts = Counter(strata[index] for index in chosen)
    assert counts[("b", "fine")] == 1  # the rare kind is there
    assert [counts[kind] for kind in (("a", "object"), ("a", "part"), ("b", "object"))] == [9, 5, 3]
    assert choose(strata, 18) == chosen
    assert choose(strata, 18, seed=1) != chosen
    assert set(chosen) < set(choose(strata, 60))
    assert choose(strata, 1000) == choose(strata) == list(range(181))
    with pytest.raises(ValueError, match="at least 1, got 0"):
        choose(strata, 0)


# ------------------------------------------------------------------ labels


@pytest.mark.parametrize(("labels", "count"), [(COCO_PANOPTIC_LABELS, 133), (ADE20K_LABELS, 150)])
def test_every_label_is_found_by_what_prepare_calls_it(labels, count) -> None:
    assert len(labels) == len(set(labels)) == count
    names = LabelNames(labels)
    for label in labels:
        noun = readable(label)
        index = names.find(noun.indefinite(1))
        assert index is not None and readable(labels[index]).name == noun.name
        assert index == names.find(noun.definite(2)) == names.find(noun.indefinite(5))


@pytest.mark.parametrize(
    ("phrase", "label"),
    [
        ("all the people", "person"),
        ("Two sofas.", "couch"),  # another word for it
        ("the brick walls", "wall-brick"),
        ("a red car", None),  # not a label: adjectives may change what is meant
        ("the", None),
        ("", None),
    ],
)
def test_phrases_to_labels(phrase, label) -> None:
    index = LabelNames(COCO_PANOPTIC_LABELS).find(phrase)
    assert label == (None if index is None else COCO_PANOPTIC_LABELS[index])


# ------------------------------------------------------------------ how it is scored


def answer(question, *segments, text=None, **more) -> dict:
    """A record whose segments are (phrase, first column, last column)."""
    size = SIZES[question.image_id]
    facts = {name: getattr(question, name) for name in ("row", "image_id", "source", "task")}
    masks = [encode_mask(columns(size, *span)) for _, *span in segments]
    if question.protocol != "generate":
        return {**facts, "protocol": question.protocol, "masks": masks, **more}
    text = " ".join(f"<p> {phrase} </p> [SEG]" for phrase, *_ in segments) if text is None else text
    parts = [
        {"phrase": phrase, "span": [0, 1] if phrase else None, "score": 0.9, "mask": mask}
        for (phrase, *_), mask in zip(segments, masks, strict=True)
    ]
    return {
        **facts,
        "well_formed": True,
        "truncated": False,
        "text": text,
        "clean_text": text,
        "segments": parts,
        **more,
    }


def scored(name, answers, data=None, mode="both"):
    """`answers(question)` for every question."""
    data = dataset(name) if data is None else data
    texts, scorer = data.remove_columns("image"), make_scorer(name, BENCHMARKS[name], ExactSimilarity())
    samples = []
    for question in plan(BENCHMARKS[name], data, mode=mode):
        samples.append(scorer.update(question, [texts[number] for number in question.rows], answers(question)))
    return scorer.compute(), [sample for sample in samples if sample is not None]


def test_referring_by_hand() -> None:
    def respond(question):
        if question.protocol == "generate":
            # Two masks whose union is right, nothing for the dog, and a mask where nothing is.
            return answer(question, *{5: (), 6: (("car", 0, 3),)}.get(question.row, (("", 0, 10), ("", 4, 12))))
        return answer(question, *(("", 0, 12) for _ in question.rows))

    numbers, samples = scored("refcoco", respond)
    ious = [max(0, min(12, 14 + 5 * i) - 4 * i - 0) for i in range(5)]
    targets = [(4 * i, 4 * i + 10 + i) for i in range(5)]
    common = [max(0, min(12, stop) - start) for start, stop in targets]
    together = [12 + stop - start - c for (start, stop), c in zip(targets, common, strict=True)]
    ious = [c / t for c, t in zip(common, together, strict=True)]
    assert numbers.clean["gIoU"] == pytest.approx(sum(ious) / 7)
    assert numbers.clean["cIoU"] == pytest.approx(40 * sum(common) / (40 * sum(together) + 50 * 12 + 50 * 3))
    assert numbers.clean["missing"] == 1
    assert numbers.parity["lisa"]["gIoU"] == pytest.approx((sum(ious) + 1) / 6, abs=1e-5)
    assert numbers.parity["lisa"]["cIoU"] == pytest.approx(
        (40 * sum(common) + 600) / (40 * sum(together) + 600), abs=1e-5
    )
    assert numbers.parity["glamm"] == numbers.parity["mglmm"] and numbers.parity["mglmm"]["questions"] == 4
    assert [sample.value for sample in samples] == [*map(pytest.approx, ious), 0.0, None]


def test_ignored_pixels_count_for_mglmm_only() -> None:
    # The hat is 0..20 and 30..40 is ignored: 0..20 and 30..40 are predicted.
    numbers, _ = scored(
        "reasonseg",
        lambda q: answer(q, ("", 0, 20), ("", 30, 40)) if q.image_id == "1" else answer(q, ("", 0, 12)),
        mode="clean",
    )
    assert numbers.clean["gIoU"] == 1.0
    numbers, _ = scored(
        "reasonseg",
        lambda q: (
            answer(q, *[("", 0, 20)] * len(q.rows)) if q.protocol == "each" else answer(q, ("", 0, 20), ("", 30, 40))
        ),
    )
    assert numbers.parity["mglmm"]["gIoU"] == pytest.approx((20 / 30 + 12 / 20) / 2, abs=1e-5)
    assert numbers.parity["lisa"]["gIoU"] == pytest.approx((1 + 12 / 20) / 2, abs=1e-5)


def test_generalized_by_hand() -> None:
    numbers, _ = scored("grefcoco", lambda q: answer(q) if q.row == 6 else answer(q, ("", 0, 12)))
    assert (numbers.clean["N-acc"], numbers.clean["T-acc"], numbers.clean["no_target"]) == (1.0, 1.0, 1)
    assert numbers.parity["mglmm"]["gIoU"] == pytest.approx(numbers.clean["gIoU"], abs=1e-5)


def test_descriptions_by_hand() -> None:
    """One description is right, the other has one phrase without a mask, so that phrases and masks differ in number."""
    right = (("a hat", 0, 10), ("a dog", 10, 30))
    odd = "<p> a cat </p> on <p> a hat </p> [SEG]"
    numbers, samples = scored("mgsc", lambda q: answer(q, *right) if q.row == 0 else answer(q, right[0], text=odd))
    assert [numbers.clean["root"][name] for name in ("mask_recall", "mIoU_gt")] == [1.0, 1.0]
    assert [numbers.clean["subtree"][name] for name in ("mask_recall", "mIoU_gt")] == [0.5, 0.5]
    assert numbers.clean["mask_recall"] == 0.75
    assert numbers.parity["subtree"]["mask_recall"] == 0.0  # by number the mask's phrase is "a cat"
    assert numbers.parity["subtree"]["mIoU"] == 1.0  # what is missed is not counted
    assert "CIDEr" in numbers.parity and "CIDEr" in numbers.clean["root"]
    assert numbers.skipped.keys() >= {"METEOR"} and numbers.marked["text_similarity"] == "exact-noun"
    assert [sample.phrases for sample in samples] == [
        (("a hat", True), ("a dog", True)),
        (("a hat", True), ("a dog", False)),
    ]


def test_several_descriptions_of_one_image_are_samples_of_their_own() -> None:
    rows = benchmark_rows.descriptions("grounded_caption") * 2
    data = datasets.Dataset.from_list(rows, features=FEATURES)
    numbers, _ = scored("gcg", lambda q: answer(q, ("a hat", 0, 10)) if q.row else answer(q), data)
    assert (numbers.clean["images"], numbers.clean["mask_recall"]) == (2, 0.25)


def test_labels_that_no_caption_says_and_further_captions_are_later_turns() -> None:
    truth = row("1", "grounded_caption", "Describe it.", "There is <p> a hat </p> [SEG].", (0, 10), (10, 30), (30, 36))
    turns = [("What else?", "<p> a dog </p> [SEG] and <p> a cat </p> [SEG]"), ("Again.", "A hat, and two animals.")]
    for question, text in turns:
        truth["messages"] += [{"role": "user", "content": question}, {"role": "assistant", "content": text}]
    data = datasets.Dataset.from_list([truth, *benchmark_rows.descriptions("grounded_caption")], features=FEATURES)
    data = data.map(lambda each, i: {"image_id": str(i + 1)}, with_indices=True)
    assert ground_truth(data[0]) == (["a hat", "a dog", "a cat"], ["There is a hat.", "A hat, and two animals."])
    questions = plan(BENCHMARKS["gcg"], data)
    assert [question.turns for question in questions] == [(("Describe it.", ""),), (("Describe everything.", ""),)]
    both = {1: "A hat, and two animals.", 2: "There is a hat and a dog."}
    numbers, samples = scored(
        "gcg",
        lambda q: answer(q, ("a cat", 30, 36), text=both[q.row + 1]) if q.row == 0 else answer(q, text=both[2]),
        data,
    )
    assert samples[0].phrases == (("a hat", False), ("a dog", False), ("a cat", True))
    assert numbers.clean["mask_recall"] == 1 / 5
    # Both answers are references word for word.
    assert numbers.clean["CIDEr"] > 5
    again = [{**each, "task": "panoptic"} for each in data]
    with pytest.raises(ValueError, match="row 0 is not one question and one answer"):
        plan(BENCHMARKS["mgsc"], datasets.Dataset.from_list(again, features=FEATURES))


def test_captions_count_all_references_and_failures() -> None:
    def respond(question):
        return (
            answer(question, text="A dog on the grass.") if question.row == 0 else answer(question, text="", error="x")
        )

    numbers, _ = scored("nocaps", respond)
    assert (numbers.clean["images"], numbers.clean["missing"], numbers.parity["images"]) == (2, 1, 1)
    assert numbers.clean["Bleu_1"] < numbers.parity["Bleu_1"] == pytest.approx(1, abs=1e-6)
    assert numbers.values.keys() == {0, 2} and numbers.values[2] == 0


def test_region_captions() -> None:
    numbers, _ = scored("refcocog_region", lambda q: answer(q, text="a red hat"))
    assert numbers.clean["images"] == 3 and numbers.clean["CIDEr"] > 0
    assert numbers.marked == {"tokenizer": "python"}


def test_panoptic_by_hand() -> None:
    def respond(question):
        width = {"1": 60, "2": 30}[question.image_id]
        third = (("people", 0, width // 3), ("the sky", width // 3, width))
        if question.protocol == "listed":
            return answer(question, *third)
        return answer(question, *third) if question.image_id == "1" else answer(question, ("a red thing", 0, 30))

    numbers, samples = scored("coco_panoptic", respond)
    assert numbers.parity["mglmm"]["PQ"] == 1.0
    # Of both labels one is found and one is missed; the unknown phrase is left out.
    assert numbers.clean["PQ"] == pytest.approx(1 / 1.5) and numbers.clean["unknown_categories"] == 1
    assert numbers.clean["mIoU"] == pytest.approx(np.mean([800 / 1300, 1600 / 2600]))
    assert [sample.value for sample in samples] == [1.0, 0.0]
    assert samples[1].phrases == (("the person", False), ("the sky", False))


def test_a_target_that_is_no_label_is_named() -> None:
    data = datasets.Dataset.from_list(benchmark_rows.scenes(("unicorn", "sky")), features=FEATURES)
    with pytest.raises(ValueError, match="the target of row 0, 'the unicorn', is no label of this benchmark"):
        scored("ade20k", answer, data)


def test_a_mask_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"masks of \[\(50, 30\)\] in a picture of \(40, 60\)"):
        scored(
            "refcoco",
            lambda q: answer(q, text="") | {"segments": [{"mask": encode_mask(columns((50, 30), 0, 3))}]},
            mode="clean",
        )
