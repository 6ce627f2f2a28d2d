"""Chat templates of the originals: text, ids and supervision of published conversations; the processor's control tokens."""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from transformers import AutoProcessor, CLIPImageProcessorPil, ProcessorMixin

from mglmm.modeling_mglmm.weight_layouts import GLAMM, LISA
from mglmm.processing import MglmmProcessor
from mglmm.processing.chat_templates import CHATML, GLAMM_V1, LISA_LLAMA_2, LISA_V1
from mglmm.processing.grammar import UscdfGrammar
from mglmm.processing.original_tokenizer import load_original_tokenizer
from mglmm.processing.uscdf import CONTROL_TOKENS, parse
from tests.tiny import picture, tiny_processor

pytest.importorskip("sentencepiece")

GLAMM_IMAGE = "The <im_start><image><im_end> provides an overview of the picture.\n"
LISA_IMAGE = "<im_start><image><im_end>\n"
V1_SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions. "
)
TURNS = {
    "v1": re.compile(r"USER: (.*?) ASSISTANT: (.*?)</s>", re.DOTALL),
    "llama_2": re.compile(r"\[INST\] (?:<<SYS>>\n.*?\n<</SYS>>\n\n)?(.*?) \[/INST\] (.*?) </s>", re.DOTALL),
}


class Layout(NamedTuple):
    folder: str
    template: str
    image: str  # what stands for the picture
    turns: str
    prefix: str  # of the names of its published conversations


LAYOUTS = {
    "glamm": Layout("glamm", GLAMM_V1, GLAMM_IMAGE, "v1", ""),
    "lisa": Layout("lisa", LISA_V1, LISA_IMAGE, "v1", "llava_v1."),
    "lisa_llama_2": Layout("lisa", LISA_LLAMA_2, LISA_IMAGE, "llama_2", "llava_llama_2."),
}


def processor_of(folder: Path, template: str, **options: Any) -> MglmmProcessor:
    images = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    tokenizer = load_original_tokenizer(folder, model_max_length=2048)
    control = CONTROL_TOKENS if "<p>" in tokenizer.get_vocab() else ("<image>", "[SEG]")
    options |= {"keep_to_grammar": False, "control_tokens": control, "chat_template": template}
    return MglmmProcessor(images, tokenizer, sam_image_size=64, **options)


class Published(NamedTuple):
    processor: MglmmProcessor
    layout: Layout
    conversations: dict[str, dict]
    folder: Path


@pytest.fixture(scope="module", params=LAYOUTS)
def published(request, shared_dir) -> Published:
    layout = LAYOUTS[request.param]
    folder = shared_dir / "golden" / layout.folder
    golden = json.loads((folder / "goldens.json").read_text(encoding="utf-8"))["conversations"]
    conversations = {
        name.removeprefix(layout.prefix): golden[name] for name in golden if name.startswith(layout.prefix)
    }
    return Published(processor_of(folder / "ckpt", layout.template), layout, conversations, folder)


@pytest.fixture(scope="module")
def glamm(shared_dir) -> MglmmProcessor:
    return processor_of(shared_dir / "golden" / "glamm" / "ckpt", GLAMM_V1)


@pytest.fixture(scope="module")
def lisa(shared_dir) -> MglmmProcessor:
    return processor_of(shared_dir / "golden" / "lisa" / "ckpt", LISA_V1)


def messages_of(layout: Layout, text: str) -> list[dict[str, Any]]:
    """The questions and answers of an original conversation, the first with a picture."""
    messages: list[dict[str, Any]] = []
    for question, answer in TURNS[layout.turns].findall(text):
        content = [{"type": "text", "text": question.removeprefix(layout.image)}]
        if not messages:
            assert question.startswith(layout.image)
            content.insert(0, {"type": "image", "image": picture()})
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return messages


def collapse(processor: MglmmProcessor, ids: list[int], *others: list[int]) -> list[list[int]]:
    """Ids with -200 for each picture's tokens, and the same places of `others`."""
    image, count = processor.image_token_id, processor.num_image_tokens
    keep = [i for i, token in enumerate(ids) if token != image or ids[:i].count(image) % count == 0]
    return [[-200 if ids[i] == image else ids[i] for i in keep], *([other[i] for i in keep] for other in others)]


def encode(processor: MglmmProcessor, messages: list[dict[str, Any]], **options: Any) -> Any:
    """Not escaped, because published questions hold `<bbox>`; `MglmmProcessor` would spell it out."""
    return ProcessorMixin.apply_chat_template(
        processor, messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **options
    )


# ---------------------------------------------------------------------- published conversations


def test_published_text_and_ids(published) -> None:
    processor = published.processor
    assert len(published.conversations) >= 5
    for conversation in published.conversations.values():
        messages = messages_of(published.layout, conversation["text"])
        assert ProcessorMixin.apply_chat_template(processor, messages) == conversation["text"]
        assert collapse(processor, encode(processor, messages)["input_ids"][0])[0] == conversation["ids"]
        if "<bbox>" not in conversation["text"]:  # nothing else of them is spelt out
            assert processor.apply_chat_template(messages) == conversation["text"]
        prompt = processor.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=True)[0]
        expected = encode(processor, messages)["input_ids"][0][: len(prompt)]
        assert "<bbox>" in conversation["text"] or prompt == expected  # what is generated continues what was trained


CASES = {
    "glamm": {"train_b3": ["s0", "s1", "s2"], "train_multi": ["s3", "s4", "s2"], "train_region": ["r1", "r2"]},
    "lisa": {"train_b3": ["s0", "s1", "s2"], "train_multi": ["s3", "s4", "s2"]},
    "lisa_llama_2": {"labels_llama2": ["s0", "s2", "s4"]},
}


def test_published_supervision(published) -> None:
    arrays = np.load(published.folder / "goldens.npz")
    name = next(key for key, layout in LAYOUTS.items() if layout == published.layout)
    for case, names in CASES[name].items():
        conversations = [messages_of(published.layout, published.conversations[n]["text"]) for n in names]
        batch = encode(published.processor, conversations, processor_kwargs={"padding": True, "padding_side": "right"})
        rows = zip(batch["input_ids"], batch["assistant_masks"], strict=True)
        found = [collapse(published.processor, ids, mask) for ids, mask in rows]
        assert [ids for ids, _ in found] == arrays[f"{case}.input_ids"].tolist()
        labels = [[t if s else -100 for t, s in zip(ids, mask, strict=True)] for ids, mask in found]
        assert labels == arrays[f"{case}.labels"].tolist()


def test_decoding_gives_the_published_text(published) -> None:
    """But for the number of spaces at a tag: the originals put one on each side of it, whatever stands there."""
    for conversation in published.conversations.values():
        ids = [published.processor.image_token_id if token == -200 else token for token in conversation["ids"]]
        answer = ids[ids.index(2) - 8 : ids.index(2)]  # has a tag where there is a mask
        pieces = published.processor.split_pieces(answer)
        text = re.sub(" +", " ", " ".join(piece for piece, _ in pieces)).strip()
        decoded = re.sub(" +", " ", conversation["decoded"].split("</s>")[0]).strip()
        assert text and decoded.endswith(text)


def test_phrases_of_published_answers_are_clean(glamm, shared_dir) -> None:
    golden = json.loads((shared_dir / "golden" / "glamm" / "goldens.json").read_text(encoding="utf-8"))
    ids = golden["conversations"]["s2"]["ids"]
    answer = parse(glamm.split_pieces(ids[ids.index(1005) :]))
    assert [mention.phrase for mention in answer.mentions] == ["The man", "the blue car", "a tree"]
    assert answer.clean_text == "The man stands next to the blue car and looks at a tree."
    ids = golden["conversations"]["s4"]["ids"]
    answer = parse(glamm.split_pieces(ids[ids.index(1005) :]))
    assert answer.clean_text == "The café is behind it." and answer.mentions[0].phrase == "The café"


# ---------------------------------------------------------------------- templates


def conversation(answer: str = "Yes.", system: str | None = None) -> list[dict[str, Any]]:
    picture_and_text = [{"type": "image", "image": picture()}, {"type": "text", "text": "Hat?"}]
    first = [] if system is None else [{"role": "system", "content": system}]
    return [
        *first,
        {"role": "user", "content": picture_and_text},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "And now?"},
    ]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (LISA_V1, f"Be brief. USER: {LISA_IMAGE}Hat? ASSISTANT: Yes.</s>USER: And now? ASSISTANT:"),
        (GLAMM_V1, f"Be brief. USER: {GLAMM_IMAGE}Hat? ASSISTANT: Yes.</s>USER: And now? ASSISTANT:"),
        (
            LISA_LLAMA_2,
            f"[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n{LISA_IMAGE}Hat? [/INST] Yes. </s><s>[INST] And now? [/INST]",
        ),
    ],
)
def test_rendering(tiny, template: str, expected: str) -> None:
    messages = conversation(system="Be brief.")
    assert tiny.processor.apply_chat_template(messages, template, add_generation_prompt=True) == expected
    messages[1]["content"] = "Hat?"  # no picture: nothing says that there is one
    text = tiny.processor.apply_chat_template(messages, template, add_generation_prompt=True)
    assert text == re.sub(r"[^\n:]*<image>[^\n]*\n", " " if "USER" in expected else "", expected)


@pytest.mark.parametrize("template", [LISA_V1, GLAMM_V1, LISA_LLAMA_2, "{{ bos_token }}" + GLAMM_V1])
@pytest.mark.parametrize("answer", ["[SEG].", "Yes, <p> a hat </p> [SEG]", "[SEG]", "  spaced  "])
def test_one_start_and_all_of_the_answer(glamm, template: str, answer: str) -> None:
    """`<s>` is there once, whoever writes it; the first token of an answer is supervised, be it a tag that took a space."""
    batch = glamm.apply_chat_template(
        conversation(answer)[:2],
        template,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    ids, mask = batch["input_ids"][0], batch["assistant_masks"][0]
    assert ids[0] == 1 and ids.count(1) == 1
    prompt = glamm.apply_chat_template(conversation(answer)[:1], template, tokenize=True, add_generation_prompt=True)[0]
    assert ids[: len(prompt)] == prompt
    assert mask == [0] * len(prompt) + [1] * (len(ids) - len(prompt)) and ids[-1] == 2


@pytest.mark.parametrize("token", [*GLAMM.added_tokens, "<image>", "<s>", "</s>", "<unk>"])
def test_users_cannot_forge_tokens(glamm, token: str) -> None:
    index = glamm.tokenizer.convert_tokens_to_ids(token)
    for template in (GLAMM_V1, LISA_LLAMA_2):
        counts = []
        for text in ("Hat?", f"x{token} {token}", f"{token[0]}{token}{token[1:]}"):
            content = [{"type": "image", "image": picture()}, {"type": "text", "text": text}]
            messages = [{"role": "user", "content": content}]
            counts.append(glamm.apply_chat_template(messages, template, tokenize=True)[0].count(index))
        assert counts == [counts[0]] * 3


def test_regions_are_not_spelt_out(glamm) -> None:
    assert "of <region>?" in glamm.apply_chat_template([{"role": "user", "content": "Colour of <region>?"}])


def test_regions_have_the_published_ids(shared_dir) -> None:
    folder = shared_dir / "golden" / "glamm"
    processor = processor_of(folder / "ckpt", GLAMM_V1, region_token="<bbox>")
    golden = json.loads((folder / "goldens.json").read_text(encoding="utf-8"))["conversations"]["r2"]
    messages = messages_of(LAYOUTS["glamm"], golden["text"])
    messages[0]["content"][1]["text"] = messages[0]["content"][1]["text"].replace("<bbox>", "<region>")
    boxes = [[20, 10, 40, 30]] * golden["text"].count("<bbox>")
    ids = processor.apply_chat_template(messages, tokenize=True, processor_kwargs={"regions": boxes})[0]
    assert collapse(processor, ids)[0] == golden["ids"]


# ---------------------------------------------------------------------- control tokens


def test_phrase_tags_of_lisa_are_text(lisa, tmp_path) -> None:
    assert lisa.control_tokens == ["<image>", "[SEG]"] and lisa.control_token_ids == [1003, 1000]
    assert not {"<p>", "</p>"} & set(lisa.tokenizer.get_vocab())
    ids = lisa.tokenizer("It is <p> a hat </p> [SEG].", add_special_tokens=False)["input_ids"]
    assert lisa.split_pieces(ids) == [(" It is <p> a hat </p>", False), ("[SEG]", True), (" .", False)]
    assert parse(lisa.split_pieces(ids), query="the hat").mentions[0].phrase == "the hat"
    messages = conversation("<p> a hat </p> [SEG]")
    assert "ASSISTANT: <p> a hat </p> [SEG]</s>" in lisa.apply_chat_template(messages)
    assert len(lisa.logits_processor(10)) == 0
    lisa.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "processor_config.json").read_text())["control_tokens"] == ["<image>", "[SEG]"]
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert loaded.control_tokens == lisa.control_tokens and len(loaded.tokenizer) == len(lisa.tokenizer) == 1004
    assert not loaded.keep_to_grammar and loaded.chat_template == LISA_V1
    for text in ("It is <p> a hat \x1c[SEG] .", "<im_start>\n x </s> x"):
        assert loaded.tokenizer(text)["input_ids"] == lisa.tokenizer(text)["input_ids"]


@pytest.mark.parametrize(
    ("tokens", "keep", "message"),
    [
        (("<image>", "[SEG]"), True, r"keep_to_grammar=True needs \['<p>', '</p>'\].*set keep_to_grammar=False"),
        (("<image>", "<p>", "</p>"), True, r"needs \['\[SEG\]'\]"),
        (("[SEG]",), False, r"keep_to_grammar=False needs \['<image>'\]"),
        ((), False, r"needs \['<image>', '\[SEG\]'\]"),
    ],
)
def test_missing_control_tokens_are_refused(tokens, keep: bool, message: str) -> None:
    tiny = tiny_processor()
    with pytest.raises(ValueError, match=message):
        MglmmProcessor(tiny.image_processor, tiny.tokenizer, control_tokens=tokens, keep_to_grammar=keep)


def test_other_control_tokens_stay_out_of_answers() -> None:
    """One that the grammar does not know is no word: it is never generated, and not in the clean text."""
    tiny = tiny_processor()
    tokens = (*CONTROL_TOKENS, "<bbox>")
    processor = MglmmProcessor(tiny.image_processor, tiny.tokenizer, control_tokens=tokens, chat_template=CHATML)
    (grammar,) = processor.logits_processor(10)
    assert isinstance(grammar, UscdfGrammar) and set(grammar.inputs) == {
        processor.image_token_id,
        processor.control_token_ids[-1],
    }
    pieces = processor.split_pieces(processor.tokenizer("a <bbox> hat")["input_ids"])
    assert ("<bbox>", True) in pieces and parse(pieces).clean_text == "a hat"


def test_default_control_tokens() -> None:
    assert tiny_processor().control_tokens == list(CONTROL_TOKENS) == ["<image>", "[SEG]", "<p>", "</p>"]
    assert set(LISA.added_tokens) < set(GLAMM.added_tokens)
