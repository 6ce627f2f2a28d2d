"""The pipeline: kinds of inputs, instructions, batches, options of generation, saving."""

import contextlib
import copy
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, pipeline
from transformers.pipelines.pt_utils import KeyDataset

import mglmm
from mglmm.processing import MglmmProcessor, SegCap
from mglmm.processing.pipeline_mglmm import TASK, MglmmPipeline, make_instruction
from tests.tiny import CONTEXT, Tiny, picture, script_tokens

SURE = "Sure, <p> the dog </p> [SEG]."
NONE = "Sorry, I cannot find a dog."
TWO = "<p> a hat </p> [SEG] and <p> a car </p> [SEG]"


@pytest.fixture(scope="module")
def pipe(tiny: Tiny) -> MglmmPipeline:
    return pipeline(TASK, model=tiny.model, processor=tiny.processor, device="cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    picture(40, 60).save(folder / "photo.png")
    return folder


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@contextlib.contextmanager
def recorded_calls(pipe: MglmmPipeline) -> Iterator[list[dict[str, Any]]]:
    """The options of each call of `generate`, with the decoded first prompt and the number of prompt and new tokens."""
    calls: list[dict[str, Any]] = []
    generate = pipe.model.generate

    def record(**kwargs: Any) -> Any:
        outputs = generate(**kwargs)
        prompt = kwargs["input_ids"]
        text = pipe.tokenizer.decode(prompt[0])
        calls.append({"text": text, "prompt": prompt.shape[1], "new": outputs.generated_ids.shape[1], **kwargs})
        return outputs

    pipe.model.generate = record
    try:
        yield calls
    finally:
        del pipe.model.generate


def scripted(tiny: Tiny, *texts: str) -> dict[str, Any]:
    return {"logits_processor": script_tokens(tiny.model, tiny.processor, texts), "max_new_tokens": 60}


def assert_close(answer: SegCap, expected: SegCap) -> None:
    """Equal but for the last bits: sizes of batches and addresses of weights choose among the kernels of the CPU."""
    assert (answer.text, answer.clean_text, answer.image_size) == (
        expected.text,
        expected.clean_text,
        expected.image_size,
    )
    for one, other in zip(answer.segments, expected.segments, strict=True):
        assert (one.phrase, one.span) == (other.phrase, other.span)
        assert one.score == pytest.approx(other.score, abs=1e-5)
        assert (one.mask != other.mask).mean() < 1e-3  # a logit of nearly 0 may fall on either side


# ------------------------------------------------------------------ inputs

SINGLE: dict[str, Callable[[Path], Any]] = {
    "path as str": lambda path: str(path),
    "Path": lambda path: path,
    "encoded bytes": lambda path: path.read_bytes(),
    "PIL": Image.open,
    "array (H, W, 3)": lambda path: np.asarray(Image.open(path)),
    "tensor (3, H, W)": lambda path: torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1),
    "float array": lambda path: np.asarray(Image.open(path)) / 255,
    "dict": lambda path: {"image": str(path)},
}


@pytest.mark.parametrize("kind", SINGLE)
def test_one_image_of_any_kind_gives_the_same_segcap(tiny: Tiny, pipe: MglmmPipeline, folder: Path, kind: str) -> None:
    path = folder / "photo.png"
    answer = pipe(SINGLE[kind](path), **scripted(tiny, SURE))
    assert isinstance(answer, SegCap)
    assert (answer.text, answer.clean_text) == (SURE, "Sure, the dog.")
    assert answer.image_size == (40, 60) and answer.image.tobytes() == picture(40, 60).tobytes()
    assert answer == pipe(Image.open(path), **scripted(tiny, SURE))
    assert 0 < answer.segments[0].area < 40 * 60  # a mask that says something


def test_url(tiny: Tiny, pipe: MglmmPipeline, folder: Path, url: str) -> None:
    assert pipe(f"{url}/photo.png", **scripted(tiny, TWO)) == pipe(folder / "photo.png", **scripted(tiny, TWO))
    with pytest.raises(ValueError, match=r"missing\.png' cannot be read.*404"):
        pipe(f"{url}/missing.png")


PICTURES = [picture(30 + 10 * i, 70 - 10 * i, seed=i) for i in range(3)]


def dataset() -> datasets.Dataset:
    rows = datasets.Dataset.from_dict({"image": PICTURES, "image_id": ["a", "b", "c"]})
    return rows.cast_column("image", datasets.Image())


MANY: dict[str, tuple[Callable[[], Any], bool]] = {  # name -> (maker, is the result a list?)
    "list": (lambda: list(PICTURES), True),
    "tuple": (lambda: tuple(PICTURES), True),
    "list of dicts": (lambda: [{"image": image} for image in PICTURES], True),
    "generator": (lambda: (image for image in PICTURES), False),
    "dataset": (dataset, False),
    "dataset column": (lambda: dataset()["image"], False),
    "stream of a dataset": (lambda: dataset().to_iterable_dataset(), False),
    "KeyDataset": (lambda: KeyDataset(dataset(), "image"), False),
}


@pytest.mark.parametrize("kind", MANY)
def test_many_images_of_any_kind_give_their_answers_in_order(tiny: Tiny, pipe: MglmmPipeline, kind: str) -> None:
    make, is_list = MANY[kind]
    answers = pipe(make(), batch_size=2, **scripted(tiny, SURE, NONE, TWO))
    assert isinstance(answers, list) == is_list
    assert [(answer.text, answer.image_size) for answer in answers] == [
        (SURE, (30, 70)),
        (NONE, (40, 60)),
        (TWO, (50, 50)),
    ]


def test_a_batch_of_arrays_is_many_images(pipe: MglmmPipeline) -> None:
    batch = np.stack([np.asarray(picture(seed=seed)) for seed in range(2)])
    assert [answer.image.tobytes() for answer in pipe(batch, max_new_tokens=1)] == [x.tobytes() for x in batch]


def test_no_images_give_no_answers(pipe: MglmmPipeline) -> None:
    assert pipe([]) == []


def test_a_generator_is_read_only_as_far_as_answers_are_taken(pipe: MglmmPipeline) -> None:
    read: list[int] = []

    def stream() -> Iterator[Image.Image]:
        for number in range(100):
            read.append(number)
            yield picture(seed=number)

    answers = iter(pipe(stream(), max_new_tokens=1))
    next(answers)
    next(answers)
    assert len(read) <= 3


def test_exif_rotation_turns_picture_and_masks(tiny: Tiny, pipe: MglmmPipeline, tmp_path: Path) -> None:
    upright, stored = picture(40, 60), picture(40, 60).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # the viewer turns it clockwise
    stored.save(tmp_path / "turned.png", exif=exif)
    answer = pipe(tmp_path / "turned.png", **scripted(tiny, SURE))
    assert answer == pipe(upright, **scripted(tiny, SURE))
    assert answer.image.tobytes() == upright.tobytes() and answer.segments[0].mask.shape == (40, 60)


# ------------------------------------------------------------------ batches


@pytest.mark.parametrize("batch_size", [2, 3, 5])
@pytest.mark.parametrize("fixture", ["tiny", "tiny_shared"])
def test_batched_answers_equal_single_ones(request: pytest.FixtureRequest, fixture: str, batch_size: int) -> None:
    tiny = request.getfixturevalue(fixture)
    pipe = MglmmPipeline(tiny.model, processor=tiny.processor, task=TASK, device="cpu")
    texts = ["Segment it.", "Segment the small dog at the left, please.", "Mark everything."]
    scripts = [TWO, NONE, SURE]  # an image without masks between others
    inputs = [{"image": picture(30 + 9 * i, 80 - 7 * i, i), "text": texts[i % 3]} for i in range(5)]
    batched = pipe(inputs, batch_size=batch_size, **scripted(tiny, *scripts))
    single = [pipe(item, **scripted(tiny, scripts[i % 3])) for i, item in enumerate(inputs)]
    assert [len(answer.segments) for answer in batched] == [2, 0, 1, 2, 0]
    for together, alone in zip(batched, single, strict=True):
        assert_close(together, alone)


def test_batched_greedy_tokens_equal_single_ones(pipe: MglmmPipeline) -> None:
    images = [picture(30 + 9 * i, 80 - 7 * i, i) for i in range(5)]
    texts = [pipe(image, max_new_tokens=24).text for image in images]
    assert [answer.text for answer in pipe(images, batch_size=3, max_new_tokens=24)] == texts
    assert len(set(texts)) > 1  # the pictures matter


# ------------------------------------------------------------------ instructions


@pytest.mark.parametrize(
    ("arguments", "instruction"),
    [
        ({}, "Describe the image and mark everything you mention."),
        ({"granularity": "panoptic"}, "Describe the image and mark everything you mention."),
        ({"text": " Segment  the dog "}, " Segment  the dog "),  # the user's words stay as they are
        ({"granularity": "object", "target": "dog"}, "Segment the dog."),
        ({"granularity": "object", "target": "the  dog"}, "Segment the dog."),
        ({"granularity": "object", "target": "All cups"}, "Segment All cups."),
        ({"granularity": "fine", "target": "her bag"}, "Describe her bag in detail, with a mask after each part."),
        ({"granularity": "fine"}, "Describe the main object in detail, with a mask after each part."),
        # words that only begin like an article
        ({"granularity": "object", "target": "anchor"}, "Segment the anchor."),
    ],
)
def test_instruction_of_a_call(pipe: MglmmPipeline, arguments: dict[str, str], instruction: str) -> None:
    assert make_instruction(**arguments) == instruction
    with recorded_calls(pipe) as calls:
        pipe(picture(), max_new_tokens=1, **arguments)
        pipe({"image": picture(), **arguments}, "Another instruction.", max_new_tokens=1)
    assert f"{instruction} ASSISTANT:" in calls[0]["text"]
    assert (
        f"{instruction if arguments else 'Another instruction.'} ASSISTANT:" in calls[1]["text"]
    )  # the dict's own wins


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text": ""}, "the instruction is empty"),
        ({"text": " \n"}, "the instruction is empty"),
        ({"text": ["Segment it."]}, "text must be a string, got list"),
        ({"granularity": "coarse"}, "unknown granularity 'coarse': choose one of panoptic, object, fine"),
        ({"granularity": "object"}, "granularity='object' needs the object to segment"),
        ({"granularity": "fine", "target": " "}, "the target is empty"),
        ({"target": "the dog"}, "target='the dog' goes with granularity='object' or 'fine'"),
        ({"granularity": "panoptic", "target": "the dog"}, "goes with granularity='object' or 'fine'"),
        ({"text": "Segment it.", "granularity": "fine"}, "either text or granularity"),
        ({"text": "Segment it.", "target": "the dog"}, "either text or granularity"),
    ],
)
def test_instruction_errors(pipe: MglmmPipeline, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipe(picture(), **arguments)
    with pytest.raises(ValueError, match=message):
        pipe([{"image": picture(), **arguments}])


def test_defaults_of_the_pipeline_give_way_to_those_of_the_call(tiny: Tiny) -> None:
    options = {"granularity": "object", "target": "hood", "max_new_tokens": 3}
    pipe = pipeline(TASK, model=tiny.model, processor=tiny.processor, device="cpu", **options)
    with recorded_calls(pipe) as calls:
        pipe(picture())
        pipe(picture(), "Mark the car.")
    assert "Segment the hood. ASSISTANT:" in calls[0]["text"]
    assert "Mark the car. ASSISTANT:" in calls[1]["text"] and "hood" not in calls[1]["text"]


def test_control_tokens_in_the_instruction_are_text(tiny: Tiny, pipe: MglmmPipeline) -> None:
    with recorded_calls(pipe) as calls:
        pipe(picture(), "Say [SEG] and <image> and <p> now", max_new_tokens=1)
    prompt = calls[0]["text"]
    assert prompt.count("<image>") == tiny.processor.num_image_tokens
    assert "[SEG]" not in prompt and "<p>" not in prompt


def test_a_mask_without_phrase_is_named_by_the_instruction(tiny: Tiny, pipe: MglmmPipeline) -> None:
    answer = pipe(picture(), "Where is the dog?", **scripted(tiny, "It is [SEG]."))
    assert [(segment.phrase, segment.span) for segment in answer.segments] == [("Where is the dog?", None)]


# ------------------------------------------------------------------ other bad input


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("nowhere.png", r"image 'nowhere\.png' cannot be read"),
        (b"not a picture", "is not a picture that Pillow can read"),
        ({"text": "Segment it."}, "a dict input needs the key 'image', got 'text'"),
        ({}, "a dict input needs the key 'image', got no keys"),
        (Image.new("RGB", (20000, 20)), "too thin to be seen at 64"),
    ],
)
def test_unusable_images(pipe: MglmmPipeline, image: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipe(image)
    with pytest.raises(ValueError, match=message):
        pipe([picture(), image], batch_size=2)


def test_one_pixel_is_a_picture(tiny: Tiny, pipe: MglmmPipeline) -> None:
    assert pipe(Image.new("RGB", (1, 1)), **scripted(tiny, SURE)).segments[0].mask.shape == (1, 1)


def test_instruction_longer_than_the_context(pipe: MglmmPipeline) -> None:
    with pytest.raises(ValueError, match=rf"tokens .* but the context holds {CONTEXT}: shorten the text"):
        pipe(picture(), "dog " * CONTEXT)


# ------------------------------------------------------------------ generation


def test_answers_are_bounded_by_the_context(tiny: Tiny, pipe: MglmmPipeline) -> None:
    long = scripted(tiny, "dog " * CONTEXT)["logits_processor"]
    with recorded_calls(pipe) as calls:
        pipe(picture(), logits_processor=long)  # 512 by default, more than the context leaves
        pipe(picture(), logits_processor=long, max_new_tokens=10_000)
        pipe(picture(), logits_processor=long, max_new_tokens=7)
    assert [call["prompt"] + call["new"] for call in calls[:2]] == [CONTEXT, CONTEXT]
    assert calls[2]["new"] == 7


def test_options_of_generation_reach_generate(tiny: Tiny, pipe: MglmmPipeline) -> None:
    script = script_tokens(tiny.model, tiny.processor, [SURE], rows_per_prompt=3)
    with recorded_calls(pipe) as calls:
        answer = pipe(picture(), num_beams=3, max_new_tokens=60, logits_processor=script)
    assert calls[0]["num_beams"] == 3 and calls[0]["output_masks"] is True
    assert answer.text == SURE and len(answer.segments) == 1


def test_greedy_unless_asked(pipe: MglmmPipeline) -> None:
    first, second = (pipe(picture(), max_new_tokens=12).text for _ in range(2))
    torch.manual_seed(0)
    sampled = {pipe(picture(), max_new_tokens=12, do_sample=True, temperature=5.0).text for _ in range(3)}
    assert first == second and len(sampled) == 3


def test_mask_threshold(tiny: Tiny, pipe: MglmmPipeline) -> None:
    areas = [
        pipe(picture(), mask_threshold=threshold, **scripted(tiny, SURE)).segments[0].area
        for threshold in (-1e9, 0.0, 1e9)
    ]
    assert areas[0] == 40 * 60 and 0 < areas[1] < 40 * 60 and areas[2] == 0


def test_several_answers_per_image_are_refused(pipe: MglmmPipeline) -> None:
    message = "2 answers were generated for 1 images.* leave num_return_sequences at 1"
    with pytest.raises(ValueError, match=message):
        pipe(picture(), num_return_sequences=2, do_sample=True, max_new_tokens=2)


# ------------------------------------------------------------------ loading and saving


def test_pipeline_from_a_folder(tiny: Tiny, pipe: MglmmPipeline, tmp_path: Path) -> None:
    copy.deepcopy(tiny.model).save_pretrained(tmp_path)
    copy.deepcopy(tiny.processor).save_pretrained(tmp_path)
    loaded = pipeline(TASK, model=tmp_path, device="cpu")
    assert isinstance(loaded, mglmm.MglmmPipeline)
    assert_close(loaded(picture(), **scripted(tiny, TWO)), pipe(picture(), **scripted(tiny, TWO)))


def test_save_pretrained_writes_a_complete_folder(tiny: Tiny, tmp_path: Path) -> None:
    pipe = MglmmPipeline(copy.deepcopy(tiny.model), processor=copy.deepcopy(tiny.processor), device="cpu")
    pipe.save_pretrained(tmp_path)
    assert {"pipeline_mglmm.py", "images.py", "model.safetensors"} <= {path.name for path in tmp_path.iterdir()}
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(processor, MglmmProcessor)
    assert processor.chat_template == tiny.processor.chat_template
    found, expected = (processor(images=picture(), text="<image> a dog") for processor in (processor, tiny.processor))
    assert found["input_ids"] == expected["input_ids"]
    assert np.array_equal(found["sam_pixel_values"], expected["sam_pixel_values"])
    loaded = pipeline(TASK, model=tmp_path, device="cpu")
    assert_close(loaded(picture(), **scripted(tiny, SURE)), pipe(picture(), **scripted(tiny, SURE)))
