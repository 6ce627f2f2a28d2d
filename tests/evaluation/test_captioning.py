"""Captioning without METEOR's real process: hand-computed values, clean-up, and what happens when something is missing."""

import math
import os
import shutil
import sys

import evaluate
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mglmm.evaluation import caption_scorers, java
from mglmm.evaluation.caption_scorers import CaptionSet, ptb_tokenize, python_tokenize, score_captions
from mglmm.evaluation.metrics import captioning
from mglmm.evaluation.metrics.captioning import CaptioningScore, clean_caption, original_caption

pytest.importorskip("pycocoevalcap", reason="needs mglmm[eval]")
needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="needs Java")
WITHOUT_JAVA = "needs Java: there is no program `java` on the PATH"


@pytest.fixture
def no_java(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.fixture
def fake_java(monkeypatch, tmp_path):
    """Puts a Python script in Java's place; `program` sees the arguments as `sys.argv`."""

    def write(program: str) -> None:
        script = tmp_path / "java"
        script.write_text(f"#!{sys.executable}\nimport json, signal, sys\n{program}\n")
        script.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))

    before = set(psutil.Process().children())
    yield write
    assert set(psutil.Process().children()) <= before, "a process was left behind"


@pytest.mark.parametrize(
    ("decoded", "caption"),
    [
        ("<s> USER: Hi ASSISTANT: <p> A dog </p> [SEG] .</s>", "A dog ."),  # a space stays before the full stop
        ("USER: Hi ASSISTANT:<p> A dog </p> [SEG].", "USER: Hi ASSISTANT: A dog ."),  # no space: the prompt leaks
        ("ASSISTANT: no ASSISTANT: A dog", "A dog"),  # the last one counts
        ("A dog\nruns", "A dogruns"),  # line breaks are deleted
        ("ASSISTANT:\n A dog", "A dog"),  # so a line break is in nobody's way
        ("ASSISTANT:  A dog", "A dog"),  # double space to single before the split
        ("a < b and c > d", "a d"),  # text between angles is lost
        ("'A dog' '", "A dog'"),  # quotes go before the last strip, one run on each side
        ("", ""),
    ],
)
def test_original_caption_keeps_to_the_order_of_the_originals(decoded, caption):
    assert original_caption(decoded) == caption


@pytest.mark.parametrize(
    ("answer", "caption"),
    [
        ("<p> A dog </p> [SEG] .</s>", "A dog."),
        ("A dog\nruns", "A dog runs"),
        ("a < b and c > d", "a < b and c > d"),  # what only looks like a tag stays
        ("The bicycle , with the sky .", "The bicycle, with the sky."),
        ("costs .5 dollars", "costs .5 dollars"),  # a point that begins a number keeps its space
        ("<s> Sure: <p> x </p> [SEG]</s></s>", "Sure: x"),
    ],
)
def test_clean_caption_is_the_parsed_text(answer, caption):
    assert clean_caption(answer) == caption


@given(st.text() | st.lists(st.sampled_from(["<p>", "</p>", "[SEG]", "</s>", "\n", " ", ",", "dog", "'"])).map("".join))
def test_any_text_becomes_one_line_of_words(text):
    assert len(clean_caption(text).splitlines()) <= 1
    assert len(original_caption(text).splitlines()) <= 1
    words = python_tokenize(text).split(" ")
    assert words == [""] or all(word and word not in caption_scorers._PUNCTUATION for word in words)


def test_values_computed_by_hand(no_java):
    score = CaptioningScore(["BLEU", "ROUGE_L", "CIDEr"])
    score.update("a", "A dog runs.", ["A dog runs on grass!"])
    score.update("b", "red cats", ["Red cats", "something else"])
    result = score.compute(per_image=True)
    clean = result["clean"]
    # precision 1, recall 3/5, beta 1.2: 2.44 * 0.6 / (0.6 + 1.44)
    assert clean["per_image"]["a"]["ROUGE_L"] == pytest.approx(2.44 * 0.6 / 2.04)
    assert clean["ROUGE_L"] == pytest.approx((2.44 * 0.6 / 2.04 + 1) / 2)
    # 5 of 5 words, brevity 5 against the closest references 5 + 2
    assert clean["Bleu_1"] == pytest.approx(math.exp(1 - 7 / 5))
    # "red cats" equals one of its two references: cosine 1 for 1- and 2-grams, none of 3 and 4, half for two references
    assert clean["per_image"]["b"]["CIDEr"] == pytest.approx(10 * 2 / 4 / 2)
    assert result["parity"] == clean
    assert (result["clean"]["images"], result["missing"]) == (2, 0)


def test_cider_of_equal_captions_is_10_and_of_one_image_0(no_java):
    score = CaptioningScore(["CIDEr"])
    score.update(1, "a dog runs on green grass", ["a dog runs on green grass"])
    assert score.compute()["clean"]["CIDEr"] == 0
    score.update(2, "two red cats sleep all day", ["two red cats sleep all day"])
    assert score.compute()["clean"]["CIDEr"] == pytest.approx(10)


def test_a_missing_prediction_is_an_empty_caption_in_clean_only(no_java):
    score = CaptioningScore(["ROUGE_L", "BLEU"])
    score.update(1, "a dog", ["a dog"])
    score.update(2, None, ["a cat"])
    result = score.compute()
    assert (result["parity"]["ROUGE_L"], result["parity"]["images"]) == (1, 1)
    assert (result["clean"]["ROUGE_L"], result["clean"]["images"], result["missing"]) == (0.5, 2, 1)


def test_no_prediction_at_all(no_java):
    score = CaptioningScore(["ROUGE_L"])
    score.update(1, None, ["a dog"])
    result = score.compute()
    assert result["parity"] == {} and result["clean"] == {"ROUGE_L": 0, "images": 1}
    assert result["skipped"]["parity"] == "none of 1 images has a prediction"


ODD = {
    "line break": "a dog\nruns\r\nfar\u2028away",
    "separator of METEOR": "a ||| dog|||b",
    "empty": "",
    "space": " \t ",
    "other scripts": "猫が座っている。 Кошка сидит. कुत्ता naïve",
    "quotes": "\"a\" 'dog' ``x'' ’“",
    "brackets": "a (dog) [x] {y} <z>",
    "end of sequence": "a dog</s>",
    "half a character": "a dog \ud83d",
    "zero": "a\x00dog",
}


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
def test_odd_captions_leave_the_others_alone(odd, no_java):
    score = CaptioningScore(["BLEU", "ROUGE_L", "CIDEr"])
    for image_id, caption in enumerate(["a red dog", odd, "two cats sleep"]):
        score.update(image_id, caption, [caption, "a bird"])
    result = score.compute(per_image=True)
    assert set(result["skipped"]) == {"PTB"}
    for mode in captioning.MODES:
        assert [result[mode]["per_image"][i]["ROUGE_L"] for i in (0, 2)] == [1, 1]


def test_without_java_the_rest_is_scored_and_marked(no_java):
    score = CaptioningScore()
    score.update(1, "a dog", ["a dog"])
    result = score.compute()
    assert result["skipped"] == dict.fromkeys(["PTB", "METEOR", "SPICE"], WITHOUT_JAVA)
    assert result["marked"] == {"tokenizer": "python"}
    assert set(result["clean"]) == {"Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr", "images"}


def test_without_the_package_every_metric_names_the_extra(monkeypatch):
    monkeypatch.setattr(caption_scorers, "find_spec", lambda name: None)
    scores = score_captions([CaptionSet([["a"]], ["a"], True)], ["BLEU", "SPICE"])
    assert scores.skipped == dict.fromkeys(
        ["BLEU", "SPICE"], "needs the package pycocoevalcap: pip install 'mglmm[eval]'"
    )
    assert scores.sets == [({}, {})]


@pytest.mark.parametrize(
    ("program", "tokenizer", "meteor"),
    [
        # dies at once
        (
            "sys.exit('no memory')",
            "Java stopped with exit code 1: no memory",
            "METEOR stopped early: no memory",
        ),
        # never answers
        (
            "signal.pause()",
            "Java took longer than 0.5 s for 2 sentences",
            "METEOR took longer than 0.7 s for 4 sentences",
        ),
        # answers what nobody asked
        (
            "print('what?\\n' * 9, flush=True); sys.stdin.read()",
            "the PTB tokeniser returned 11 lines for 4",
            "could not convert string to float: 'what?'",
        ),
    ],
    ids=["dies", "hangs", "garbage"],
)
def test_a_failing_java_is_named_stopped_and_costs_only_its_metrics(program, tokenizer, meteor, fake_java, monkeypatch):
    fake_java(program)
    if "pause" in program:
        monkeypatch.setattr(java, "START_SECONDS", 0.3)
        monkeypatch.setattr(java, "SECONDS_PER_SENTENCE", 0.1)
    scores = score_captions(
        [CaptionSet([["a dog"]], ["a dog"], True), CaptionSet([["b"]], ["c"], True)], ["METEOR", "ROUGE_L"]
    )
    assert scores.skipped == {"PTB": tokenizer, "METEOR": meteor}
    assert [numbers for numbers, _ in scores.sets] == [{"ROUGE_L": 1.0}, {"ROUGE_L": 0.0}]


def test_spice_downloads_nothing(fake_java, monkeypatch):
    from pycocoevalcap.spice import get_stanford_models

    def refuse(*arguments, **settings):
        raise AssertionError("a download")

    monkeypatch.setattr(get_stanford_models, "urlretrieve", refuse)
    monkeypatch.setattr(get_stanford_models, "JAR", "not-there")
    fake_java("")
    scores = score_captions([CaptionSet([["a"]], ["a"], True)], ["SPICE"])
    assert "not-there-models.jar) are not there" in scores.skipped["SPICE"] and "\n" not in scores.skipped["SPICE"]


@pytest.mark.parametrize(
    ("scores_of_images", "expected"),
    [
        ([0.5, 0.25], 0.375),  # the mean
        ([0.5, math.nan], "SPICE gave no number for 1 of 2 captions"),
        ([0.5], "SPICE gave no number for 1 of 2 captions"),  # fewer than asked
    ],
)
def test_spice_reads_what_its_program_writes(scores_of_images, expected, fake_java, monkeypatch):
    monkeypatch.setattr(os.path, "isfile", lambda path: True)  # the models
    fake_java(
        "if 'edu.stanford.nlp.process.PTBTokenizer' in sys.argv: sys.stdout.write(sys.stdin.read()); sys.exit()\n"
        "asked = json.load(open(sys.argv[4])); target = sys.argv[sys.argv.index('-out') + 1]\n"
        "assert [sorted(one) for one in asked] == [['image_id', 'refs', 'test']] * 2 and asked[1]['refs'] == ['b', 'c']\n"
        f"scores = json.loads('{str(scores_of_images).replace('nan', 'NaN')}')\n"
        "json.dump([{'image_id': one['image_id'], 'scores': {'All': {'f': score}}} for one, score in zip(asked, scores)],"
        " open(target, 'w'))"
    )
    scores = score_captions([CaptionSet([["a"], ["b", "c"]], ["a", "b"], True)], ["SPICE"])
    assert (scores.sets[0][0] or scores.skipped)["SPICE"] == expected


def test_references_without_a_word_skip_cider_by_name(no_java):
    score = CaptioningScore(["CIDEr", "ROUGE_L"])
    score.update(1, "a dog", ["..."])
    result = score.compute()
    assert result["skipped"]["CIDEr"] == "none of the references of 1 images holds a word"
    assert result["clean"] == {"ROUGE_L": 0, "images": 1}


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ((1, "again", ["a"]), "image id 1 occurs twice"),
        ((2, math.nan, ["a"]), "image id 2: the caption must be text or None, got nan"),
        ((2, "a", "a dog"), "image id 2: the references must be a list of texts, got 'a dog'"),  # not its letters
        ((2, "a", []), "image id 2: the references must be"),
        ((2, "a", ["a", None]), "image id 2: the references must be"),
    ],
)
def test_bad_samples_are_named(sample, message):
    score = CaptioningScore()
    score.update(1, "a dog", ["a dog"])
    with pytest.raises(ValueError, match=message):
        score.update(*sample)


def test_nothing_to_score_and_unknown_names():
    with pytest.raises(ValueError, match="call update first"):
        CaptioningScore().compute()
    score = CaptioningScore(["Meteor"])
    score.update(1, "a", ["a"])
    with pytest.raises(ValueError, match="unknown metrics"):
        score.compute()
    with pytest.raises(ValueError, match="unknown modes"):
        score.compute(modes=["both"])


@needs_java
def test_python_tokenizer_is_like_ptb():
    texts = [
        'He said: "It isn\'t a T-shirt (3.5 dollars)..."',
        "The man's dogs' bowls, and/or 1,000 U.S. flags at 5 p.m.",
        "I cannot; they've 50% off £2 -- wow!! Mr. Smith & AT&T",
        "猫が座っている。 Кошка сидит. कुत्ता café",  # PTB keeps the ideographic full stop
        "a ||| b </s> <p> [SEG] C++ #1 'n' '90s ½",
    ]
    lines = ptb_tokenize(texts, apart=True)
    assert [python_tokenize(text) for text in texts] == lines
    assert lines[0] == "he said it is n't a t-shirt -lrb- 3.5 dollars -rrb-"


@needs_java
def test_ptb_keeps_the_lines_of_odd_captions():
    texts = ["first", *ODD.values(), "last", "", ""]
    for apart in (True, False):
        lines = ptb_tokenize(texts, apart=apart)
        assert len(lines) == len(texts) and (lines[0], lines[-3]) == ("first", "last")
        assert lines[1] == "a dog runs far away"


@needs_java
def test_the_order_of_images_changes_nothing_in_clean():
    # In one text with a digit after it, "no." would keep its full stop.
    samples = [(1, "sign says no.", ["a sign says no."]), (2, "3 dogs", ["3 dogs"]), (3, "the dog", ["the dog no"])]
    results = []
    for order in (samples, samples[::-1]):
        score = CaptioningScore(["BLEU", "ROUGE_L", "CIDEr"])
        for sample in order:
            score.update(*sample)
        clean = score.compute(modes=["clean"], per_image=True)["clean"]
        results.append(clean.pop("per_image") | {"all": clean})
    for image_id, numbers in results[0].items():
        assert results[1][image_id] == pytest.approx(numbers, rel=1e-12)
    assert ptb_tokenize(["no.", "3 dogs"], apart=False) != ptb_tokenize(["no.", "3 dogs"], apart=True)


def test_metric_of_evaluate_gives_the_same(no_java, tmp_path):
    metric = captioning.Captioning(cache_dir=str(tmp_path))
    assert isinstance(metric, evaluate.Metric)
    result = metric.compute(
        predictions=["", "<p> a dog </p> [SEG]"],
        references=[["a cat"], ["a dog", "dogs"]],
        image_ids=["1", "2"],
        metrics=["ROUGE_L"],
    )
    assert result["parity"] == result["clean"] == {"ROUGE_L": 0.5, "images": 2}
