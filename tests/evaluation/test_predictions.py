"""Answers on disk: each picture encoded once, nothing lost and nothing asked twice after a kill."""

import json
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch

from mglmm.evaluation.predictions import Predictions, Question, merge_parts, part_path, predict
from mglmm.processing import MglmmProcessor, SegCap
from mglmm.processing.rle import decode_mask
from tests.tiny import picture, script_tokens, tiny_model, tiny_processor

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


def questions_of(data, rows=None, lengths=LENGTHS) -> list[Question]:
    questions = []
    for index in range(len(data)) if rows is None else rows:
        row = data[index]
        text = row["messages"][0]["content"].removeprefix("<image>\n")
        facts = {name: row[name] for name in ("image_id", "source", "task")}
        questions.append(
            Question(row=index, turns=((text, ""),), rows=(index,), max_new_tokens=lengths[row["task"]], **facts)
        )
    return questions


def ask(tiny, data, path, rows=None, lengths=LENGTHS, **kwargs) -> int:
    """Answers what is not in the file yet."""
    done = Predictions(path) if path.exists() else ()
    settings = {"done": done, "batch_size": 3, "do_sample": False} | kwargs
    return predict(tiny.model, tiny.processor, data, questions_of(data, rows, lengths), path, **settings)


def read_predictions(path) -> dict[int, dict]:
    return {row: record for (_, row), record in Predictions(path).items()}


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
    ask(tiny, rows, path, lengths=limits, batch_size=4, logits_processor=script)
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
    path.rename(part_path(path, 0))
    with open(part_path(path, 0), "ab") as file:  # the kill came in the middle of a line
        file.write(b'{"row": 9, "ima')
    merge_parts(path)

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


def test_parts_of_several_processes_become_one_file_in_the_order_of_the_rows(tiny, rows, tmp_path) -> None:
    whole, path = tmp_path / "whole.jsonl", tmp_path / "p.jsonl"
    ask(tiny, rows, whole, batch_size=2)
    for index in (0, 1):
        ask(tiny, rows, part_path(path, index), batch_size=2, process_index=index, num_processes=2)
    assert {index: len(Predictions(part_path(path, index))) for index in (0, 1)} == {
        0: 8,
        1: 2,
    }  # two pictures, and one
    # The run was killed while it deleted the parts: they are there beside the merged file.
    merge_parts(path)
    part_path(path, 1).write_bytes(path.read_bytes())
    merge_parts(path)
    assert [row for _, row in Predictions(path)] == list(range(10))
    assert read_predictions(path) == read_predictions(whole)
    assert [file.name for file in tmp_path.iterdir() if "part" in file.name] == []


def test_a_batch_that_was_half_done_is_answered_as_the_whole_one(tiny, rows, tmp_path) -> None:
    whole, path = tmp_path / "whole.jsonl", tmp_path / "p.jsonl"
    ask(tiny, rows, whole, batch_size=4)
    path.write_text("".join(whole.read_text().splitlines(keepends=True)[:5]))
    assert ask(tiny, rows, path, batch_size=4) == 5
    assert read_predictions(path) == read_predictions(whole)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda row: {**row, "image": {"bytes": b"no picture", "path": None}}, "not a picture that Pillow can read"),
        (lambda row: {**row, "image": picture(1, 2000)}, "too thin"),  # would vanish in the encoders
        (lambda row: {**row, "messages": [{"role": "user", "content": "<image>\n" + "dog " * 600}]}, "context"),
    ],
)
def test_a_question_that_cannot_be_asked_is_written_down_and_the_others_are_answered(
    tiny, rows, tmp_path, change, reason
) -> None:
    raw = rows.cast_column("image", datasets.Image(decode=False)).to_list()
    raw[4] = {**change(raw[4] | {"image": rows[4]["image"]}), "image_id": "broken"}
    data = datasets.Dataset.from_list(raw, features=rows.features)
    good, path = tmp_path / "good.jsonl", tmp_path / "p.jsonl"
    ask(tiny, rows, good, batch_size=4)
    assert ask(tiny, data.cast_column("image", datasets.Image(decode=False)), path, batch_size=4) == 10
    records = read_predictions(path)
    assert reason in records[4]["error"] and records[4]["segments"] == []
    assert [row for row, record in records.items() if "error" in record] == [4]
    assert {records[row]["text"] for row in (0, 1, 2, 3)} == {
        read_predictions(good)[row]["text"] for row in (0, 1, 2, 3)
    }


def test_teacher_forcing_gives_the_masks_of_every_turn(tiny, rows, tmp_path) -> None:
    """Each mask is that of a forward pass of its conversation alone, whatever else is in the batch."""
    found = "Sure, <p> hat </p> [SEG]."
    turns = (
        (("Segment the hat.", found),),
        (("A dog?", "It is [SEG]."), ("And the long red coat?", found), ("?", found)),
    )
    forced = [
        Question(0, "1", rows[0]["source"], "object", turns[0], (0,), protocol="each"),
        Question(4, "2", rows[4]["source"], "object", turns[1], (4, 5, 6), protocol="each"),
    ]
    path = tmp_path / "p.jsonl"
    assert predict(tiny.model, tiny.processor, rows, forced, path, batch_size=2) == 2
    for question, count in zip(forced, (1, 3), strict=True):
        record = Predictions(path)[question.key]
        size = rows[question.row]["image"].size[::-1]
        assert (len(record["masks"]), tuple(record["image_size"])) == (count, size)
        conversation = []
        for text, answer in question.turns:
            shown = [] if conversation else [{"type": "image", "image": rows[question.row]["image"]}]
            conversation.append({"role": "user", "content": [*shown, {"type": "text", "text": text}]})
            conversation.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        inputs = tiny.processor.apply_chat_template(
            [conversation], tokenize=True, return_dict=True, return_tensors="pt"
        )
        inputs.pop("original_sizes")
        with torch.inference_mode():
            logits = tiny.model(**inputs).pred_masks
        expected = tiny.processor.post_process_masks(logits, size)
        for mask, reference in zip(record["masks"], expected, strict=True):
            assert np.mean(decode_mask(mask) != reference) < 0.002


def test_boxes_reach_a_model_with_a_region_encoder(tmp_path) -> None:
    """Rows with and without a box in one batch: each answer is that of its question asked alone."""
    processor = tiny_processor()
    processor = MglmmProcessor(
        processor.image_processor, processor.tokenizer, sam_image_size=64, patch_size=14, region_token="<bbox>"
    )
    model = tiny_model(
        processor, region_feature_layers=[1, 2], region_token_id=processor.region_token_id, region_hidden_size=16
    )
    boxes = ((), ((8.0, 4.0, 30.0, 36.0),), ((8.0, 4.0, 30.0, 36.0), (20.0, 0.0, 50.0, 40.0)))
    questions = [
        Question(
            row, "1", "s", "region", ((f"What is {'in <region> ' * len(each)}here?", ""),), (row,), "generate", 12, each
        )
        for row, each in enumerate(boxes)
    ]
    data = datasets.Dataset.from_dict(
        {"image": [picture()] * 3}, features=datasets.Features({"image": datasets.Image()})
    )
    predict(model, processor, data, questions, tmp_path / "together.jsonl", batch_size=3, do_sample=False)
    predict(model, processor, data, questions, tmp_path / "alone.jsonl", batch_size=1, do_sample=False)
    together, alone = (read_predictions(tmp_path / f"{name}.jsonl") for name in ("together", "alone"))
    assert not any("error" in record for record in together.values())
    assert [together[row]["text"] for row in range(3)] == [alone[row]["text"] for row in range(3)]


def test_a_model_without_phrases_is_forced_without_them(tiny, rows, tmp_path) -> None:
    processor = MglmmProcessor(
        tiny.processor.image_processor,
        tiny_processor().tokenizer,
        sam_image_size=64,
        patch_size=14,
        keep_to_grammar=False,
        control_tokens=["<image>", "[SEG]"],
    )
    asked = [
        Question(row, "1", rows[0]["source"], "object", (("The hat?", answer),), (row,), protocol="each")
        for row, answer in enumerate(("Sure, <p> hat </p> [SEG].", "Sure, [SEG]."))
    ]
    predict(tiny.model, processor, rows, asked, tmp_path / "p.jsonl")
    tagged, plain = Predictions(tmp_path / "p.jsonl").values()
    assert tagged["masks"] == plain["masks"] and len(plain["masks"]) == 1


def test_a_region_may_be_cut_out(tiny, rows, tmp_path) -> None:
    question = Question(0, "1", rows[0]["source"], "region", (("What is it?", ""),), (0,), max_new_tokens=8)
    cropped = replace(question, row=1, crop=(10.4, 5.0, 30.2, 5.0))  # a box without height still is a row of pixels
    path = tmp_path / "p.jsonl"
    predict(tiny.model, tiny.processor, rows, [question, cropped], path, do_sample=False)
    assert [record["image_size"] for record in Predictions(path).values()] == [[40, 60], [1, 21]]


def test_lines_are_plain_json(tiny, rows, tmp_path) -> None:
    path = tmp_path / "predictions.jsonl"
    script = script_tokens(tiny.model, tiny.processor, ["<p> hat </p> [SEG]"])
    ask(tiny, rows, path, rows=[0], lengths={"object": 20}, logits_processor=script)
    (line,) = path.read_text().splitlines()
    record = json.loads(line)
    assert (record["text"], record["clean_text"]) == ("<p> hat </p> [SEG]", "hat")
    assert record["segments"][0]["mask"]["size"] == [40, 60]
