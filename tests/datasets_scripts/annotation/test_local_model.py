"""A transformers model as annotator: a random LLaVA of toy size, saved and loaded like any other."""

import asyncio
import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from mglmm.datasets_scripts.annotation.chat import ChatRequest, RequestFailed, image_part, text_message
from mglmm.datasets_scripts.annotation.local_model import LocalModelClient
from tests.tiny import CLIP, LLAMA

TEMPLATE = (
    "{% for message in messages %}{{ message['role'][0] }}:"
    "{% for part in message['content'] %}{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)
CONTEXT = 256
PATCHES = 4  # of a picture of 28 x 28 pixels in patches of 14


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One token a byte, so that numbers of tokens are numbers of characters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", "<image>", *alphabet])}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
        chat_template=TEMPLATE,
    )
    size = {"height": 28, "width": 28}
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=size),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    config = LlavaConfig(
        vision_config=dict(CLIP),
        text_config={**LLAMA, "vocab_size": len(tokenizer), "max_position_embeddings": CONTEXT},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(config).eval()
    model.generation_config.update(eos_token_id=2, pad_token_id=0)
    path = tmp_path_factory.mktemp("llava")
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def client(folder: Path) -> LocalModelClient:
    return LocalModelClient(str(folder), device="cpu")


def request(color: str = "red", text: str = "name it", temperature: float = 0.0, max_tokens: int = 12) -> ChatRequest:
    file = io.BytesIO()
    Image.new("RGB", (28, 28), color).save(file, "JPEG")
    content = [{"type": "text", "text": text}, image_part(file.getvalue())]
    messages = (text_message("system", "be brief"), {"role": "user", "content": content})
    return ChatRequest(messages, max_tokens, temperature)


def test_an_answer_has_its_token_counts_and_was_cut_at_the_limit(client: LocalModelClient) -> None:
    result = asyncio.run(client.complete(request()))
    assert result.prompt_tokens == len("s:be briefu:name ita:") + PATCHES
    assert (result.finish_reason, result.completion_tokens) == ("length", 12)


def test_the_picture_arrives(client: LocalModelClient) -> None:
    seen = []

    def see(module, args, kwargs):
        seen.append(kwargs.get("pixel_values", *args))

    with client._network.model.vision_tower.register_forward_pre_hook(see, with_kwargs=True):
        asyncio.run(client.complete(request("red")))
        asyncio.run(client.complete(request("blue")))
    assert [tuple(values.shape) for values in seen] == [(1, 3, 28, 28)] * 2
    # Red is strong in the first channel, blue in the third: the pictures are neither lost nor their channels swapped.
    assert [int(values.mean((0, 2, 3)).argmax()) for values in seen] == [0, 2]


def test_an_end_token_ends_the_answer(client: LocalModelClient, monkeypatch: pytest.MonkeyPatch) -> None:
    # Every token is an end token: the first one drawn is the last.
    everything = list(range(client._network.config.text_config.vocab_size))
    monkeypatch.setattr(client._network.generation_config, "eos_token_id", everything)
    result = asyncio.run(client.complete(request()))
    assert (result.finish_reason, result.completion_tokens) == ("stop", 1)


def test_drawn_answers_are_the_same_each_time_and_differ_between_seeds(client: LocalModelClient) -> None:
    drawn = request(temperature=2.0)
    before = torch.get_rng_state()
    first = asyncio.run(client.complete(drawn))
    torch.rand(3)  # whatever else draws numbers in between
    assert asyncio.run(client.complete(drawn)) == first
    assert asyncio.run(client.complete(replace(drawn, seed=1))).text != first.text
    torch.set_rng_state(before)
    asyncio.run(client.complete(drawn))
    assert torch.equal(torch.get_rng_state(), before)  # others' random numbers are not disturbed


def test_greedy_answers_do_not_depend_on_the_seed(client: LocalModelClient) -> None:
    answers = {asyncio.run(client.complete(replace(request(), seed=seed))).text for seed in (0, 1)}
    assert len(answers) == 1


def test_a_name_from_a_file_is_no_picture(client: LocalModelClient) -> None:
    # As a token, `<image>` in a text would ask for a picture that is not there.
    result = asyncio.run(client.complete(request(text="<image>")))
    assert result.prompt_tokens == len("s:be briefu:<image>a:") + PATCHES


def test_the_event_loop_goes_on_meanwhile(client: LocalModelClient) -> None:
    async def two() -> list[str]:
        order = []

        async def answer() -> None:
            await client.complete(request())
            order.append("answer")

        async def other() -> None:
            order.append("other")

        await asyncio.gather(answer(), other())
        return order

    assert asyncio.run(two()) == ["other", "answer"]


@pytest.mark.parametrize(
    ("spare", "outcome"),
    [
        (12, ("length", 12)),  # fits
        (5, ("length", 5)),  # the answer is cut where the context ends
        (1, ("length", 1)),
        (0, "the prompt takes 256 tokens, the model's context has 256"),
    ],
)
def test_prompts_as_long_as_the_context(client: LocalModelClient, spare: int, outcome: tuple[str, int] | str) -> None:
    text = "x" * (CONTEXT - PATCHES - len("s:be briefu:a:") - spare)
    if isinstance(outcome, str):
        with pytest.raises(RequestFailed, match=outcome):
            asyncio.run(client.complete(request(text=text)))
    else:
        result = asyncio.run(client.complete(request(text=text)))
        assert (result.finish_reason, result.completion_tokens) == outcome


def test_no_memory_fails_the_request_alone(client: LocalModelClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(**_):
        raise torch.OutOfMemoryError("tried to allocate")

    with monkeypatch.context() as patch:
        patch.setattr(client._network, "generate", exhausted)
        with pytest.raises(RequestFailed, match="memory does not suffice for a prompt of 25 tokens") as caught:
            asyncio.run(client.complete(request()))
    assert caught.value.__context__ is None
    assert asyncio.run(client.complete(request())).completion_tokens == 12


def test_a_model_without_chat_template_is_refused(folder: Path, tmp_path: Path) -> None:
    bare = LlavaProcessor.from_pretrained(folder)
    bare.chat_template = bare.tokenizer.chat_template = None
    bare.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no chat template"):
        LocalModelClient(str(tmp_path))
