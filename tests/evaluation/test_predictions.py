"""Answers on disk: each picture encoded once, nothing lost and nothing asked twice after a kill."""

import json

import numpy as np
import pytest

from mglmm.evaluation.predictions import predict, read_predictions
from mglmm.processing import SegCap
from tests.tiny import script_tokens

LENGTHS = {"object": 6, "part": 6, "absent": 6, "panoptic": 10, "fine": 10}


@pytest.fixture
def calls(tiny, monkeypatch):
    """What `encode_images` and `generate` of the tiny model were called with: numbers of pictures and of rows."""
    model, calls = tiny.model, {"pictures": [], "rows": []}
    encode, generate = model.encode_images, model.generate

    def encode_images(pixel_values, *args, **kwargs):
        calls["pictures"].append(len(pixel_values))
        return encode(pixel_values, *args, **kwargs)

    def spy_generate(**kwargs):
        calls["rows"].append(len(kwargs["input_ids"]))
        return generate(**kwargs)

    monkeypatch.setattr(model, "encode_images", encode_images)
    monkeypatch.setattr(model, "generate", spy_generate)
    return calls


def ask(tiny, data, path, rows=None, **kwargs) -> int:
    rows = range(len(data)) if rows is None else rows
    settings = {"max_new_tokens": LENGTHS, "batch_size": 3, "do_sample": False} | kwargs
    return predict(tiny.model, tiny.processor, data, rows, path, **settings)


def test_each_picture_is_encoded_once_and_each_row_answered_once(tiny, rows, tmp_path, calls) -> None:
    path = tmp_path / "predictions.jsonl"
    assert ask(tiny, rows, path) == 10
    assert calls["pictures"] == [3]
    assert calls["rows"] == [3, 3, 2, 2]  # eight short questions, then two descriptions
    records = read_predictions(path)
    assert sorted(records) == list(range(10))
    for index, record in records.items():
        assert [record[name] for name in ("image_id", "source", "task")] == [
            rows[index][name] for name in ("image_id", "source", "task")
        ]
        assert SegCap.from_dict(record).image_size == rows[index]["image"].size[::-1]


def test_masks_are_those_of_the_question_asked_alone(tiny, rows, tmp_path) -> None:
    """Rows of several pictures in one batch, with different numbers of masks: none may get another's picture or prompt."""
    model, processor = tiny.model, tiny.processor
    answers = ["<p> dog </p> [SEG] [SEG]", "Sorry.", "hat [SEG]"]
    limits = dict.fromkeys(LENGTHS, 40)
    path = tmp_path / "predictions.jsonl"
    script = script_tokens(model, processor, answers)
    ask(tiny, rows, path, max_new_tokens=limits, batch_size=4, logits_processor=script)
    sizes = set()
    for index, record in read_predictions(path).items():
        text = rows[index]["messages"][0]["content"].removeprefix("<image>\n")
        content = [{"type": "image", "image": rows[index]["image"]}, {"type": "text", "text": text}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        target_sizes = inputs.pop("original_sizes")
        outputs = model.generate(
            **inputs,
            output_masks=True,
            max_new_tokens=40,
            do_sample=False,
            logits_processor=script_tokens(model, processor, answers[index % 3 :]),
        )
        expected = processor.post_process_segcap(outputs, target_sizes, queries=[text])[0]
        result = SegCap.from_dict(record)
        assert (result.text, len(result.segments)) == (expected.text, (2, 0, 1)[index % 3])
        for segment, reference in zip(result.segments, expected.segments, strict=True):
            assert (segment.phrase, segment.span) == (reference.phrase, reference.span)
            assert segment.score == pytest.approx(reference.score, abs=1e-4)
            assert np.mean(segment.mask != reference.mask) < 0.002  # logits within rounding of zero may flip
            sizes.add(segment.mask.shape)
        assert record["truncated"] is False
        assert record["well_formed"] is (index % 3 == 1)
    assert sizes == {(40, 60), (50, 30), (32, 32)}


def test_an_answer_that_reaches_the_limit_is_marked(tiny, rows, tmp_path) -> None:
    path = tmp_path / "predictions.jsonl"
    script = script_tokens(tiny.model, tiny.processor, ["hat hat hat hat hat hat hat", "[SEG]"])
    ask(tiny, rows, path, rows=[0, 1], logits_processor=script)
    assert [record["truncated"] for _, record in sorted(read_predictions(path).items())] == [True, False]


def test_a_killed_run_goes_on_where_it_stopped(tiny, rows, tmp_path, calls, monkeypatch) -> None:
    whole, path = tmp_path / "whole.jsonl", tmp_path / "predictions.jsonl"
    ask(tiny, rows, whole)
    calls["rows"].clear()
    generate = tiny.model.generate

    def killed(**kwargs):
        if len(calls["rows"]) == 2:
            raise KeyboardInterrupt
        return generate(**kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tiny.model, "generate", killed)
        ask(tiny, rows, path)
    assert len(read_predictions(path)) == 6
    with open(path, "ab") as file:  # the kill came in the middle of a line
        file.write(b'{"row": 9, "ima')

    calls["rows"].clear()
    assert ask(tiny, rows, path) == 4
    assert sum(calls["rows"]) == 4
    first, second = read_predictions(whole), read_predictions(path)
    assert {row: record["text"] for row, record in first.items()} == {
        row: record["text"] for row, record in second.items()
    }
    calls["pictures"].clear()
    assert ask(tiny, rows, path) == 0
    assert calls["pictures"] == []


def test_a_larger_selection_reuses_the_smaller_one(tiny, rows, tmp_path) -> None:
    path = tmp_path / "predictions.jsonl"
    assert ask(tiny, rows, path, rows=[1, 8]) == 2
    assert ask(tiny, rows, path, rows=[0, 1, 8]) == 1
    assert sorted(read_predictions(path)) == [0, 1, 8]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"row": 1}', "garbage", '{"row": 2}'], "line 2 of"),  # not JSON
        (['{"row": 1}', "[]"], "line 2 of"),  # no object
        (['{"image_id": "1"}'], "line 1 of"),  # no row
        (['{"row": 1}', '{"row": 1}'], "answers row 1 a second time"),
    ],
)
def test_a_broken_file_is_refused(tmp_path, lines, message) -> None:
    path = tmp_path / "predictions.jsonl"
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=message):
        read_predictions(path)


def test_rows_that_cannot_be_asked_are_refused_before_anything_is_generated(tiny, rows, tmp_path, calls) -> None:
    talk = rows[0]["messages"] * 2
    several = rows.select_columns(["image", "image_id", "source", "task", "masks", "regions"]).add_column(
        "messages", [talk] * len(rows)
    )
    with pytest.raises(ValueError, match="row 0 is not one question and one answer"):
        ask(tiny, several, tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match="row 3 is of the task 'fine', known are object, part, absent"):
        ask(tiny, rows, tmp_path / "b.jsonl", max_new_tokens={"object": 1, "part": 1, "absent": 1})
    assert calls == {"pictures": [], "rows": []}


def test_lines_are_plain_json(tiny, rows, tmp_path) -> None:
    path = tmp_path / "predictions.jsonl"
    script = script_tokens(tiny.model, tiny.processor, ["<p> hat </p> [SEG]"])
    ask(tiny, rows, path, rows=[0], max_new_tokens={"object": 20}, logits_processor=script)
    (line,) = path.read_text().splitlines()
    record = json.loads(line)
    assert (record["text"], record["clean_text"]) == ("<p> hat </p> [SEG]", "hat")
    assert record["segments"][0]["mask"]["size"] == [40, 60]
