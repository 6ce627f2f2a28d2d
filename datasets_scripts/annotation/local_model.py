"""Annotator in this process: any image-text-to-text model of transformers that has a chat template."""

from __future__ import annotations

import asyncio
import base64
import io
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from PIL import Image

from .chat import ChatRequest, ChatResult, Message, RequestFailed


class LocalModelClient:
    """
    A `ChatClient`. One request at a time is answered, in a thread of its own. The same request gets the same answer (on the
    same machine): what is random when tokens are drawn is seeded by the request's key. `schema` is not enforced, the prompt
    has to say what form the answer shall have.

    Args:
        model_id: Folder or hub id.
        device: Such as "cpu", "cuda:1"; by default the fastest there is.
        dtype: Of the weights: "auto" for the one they were saved in, "bfloat16", ...

    Raises:
        OSError: there is no such model, or it cannot be loaded.
        ValueError: it has no chat template, or is of another kind.
    """

    def __init__(self, model_id: str, *, device: str | None = None, dtype: str = "auto"):
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.model = model_id
        if device is None:
            device = str(torch.accelerator.current_accelerator() or "cpu")
        self._processor = AutoProcessor.from_pretrained(model_id)
        if getattr(self._processor, "chat_template", None) is None:
            raise ValueError(f"{model_id} has no chat template: take a model that was tuned to follow instructions")
        network: Any = AutoModelForImageTextToText.from_pretrained(model_id, dtype=dtype)
        self._network = network.to(device).eval()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="local-model")

    async def complete(self, request: ChatRequest) -> ChatResult:
        """Raises `RequestFailed` if the prompt is longer than the model's context, or memory does not suffice."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._answer, request)

    async def close(self) -> None:
        self._thread.shutdown()

    def _answer(self, request: ChatRequest) -> ChatResult:
        import torch

        inputs = self._processor.apply_chat_template(
            [_with_pictures(message) for message in request.messages],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            sanitize_control_tokens=True,  # names from annotation files must not act as tokens of the template
        ).to(self._network.device, self._network.dtype)
        prompt_tokens = inputs["input_ids"].shape[1]
        context = getattr(self._network.config.get_text_config(), "max_position_embeddings", None)
        max_new_tokens = request.max_tokens if context is None else min(request.max_tokens, context - prompt_tokens)
        if max_new_tokens < 1:
            raise RequestFailed(f"the prompt takes {prompt_tokens:,} tokens, the model's context has {context:,}")
        if request.temperature > 0:
            choice: dict[str, Any] = {"do_sample": True, "temperature": request.temperature}
        else:
            choice = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        # The state of the CPU's generator is put back in any case; of the accelerators only CUDA's take a device here.
        devices = [self._network.device] if self._network.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices), torch.inference_mode():
                torch.manual_seed(int(request.key(self.model)[:15], 16))
                output = self._network.generate(**inputs, max_new_tokens=max_new_tokens, **choice)
        except torch.OutOfMemoryError:
            output = None
        if output is None:  # raised out here, so that the frames of the original error let go of the memory
            raise RequestFailed(f"memory does not suffice for a prompt of {prompt_tokens:,} tokens")
        answer = output[0, prompt_tokens:].tolist()
        ends = self._network.generation_config.eos_token_id
        ended = bool(answer) and answer[-1] in (ends if isinstance(ends, list) else [ends])
        text = self._processor.decode(answer, skip_special_tokens=True)
        return ChatResult(text.strip(), "stop" if ended else "length", prompt_tokens, len(answer))


def _with_pictures(message: Message) -> dict[str, Any]:
    """A message as chat templates of transformers want it: parts only, with pictures in place of their URLs."""
    content = message["content"]
    parts: list[Any] = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return {
        "role": message["role"],
        "content": [
            {"type": "image", "image": _picture(part["image_url"]["url"])} if part["type"] == "image_url" else part
            for part in parts
        ],
    }


def _picture(url: str) -> Image.Image:
    with Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as picture:
        return picture.convert("RGB")
