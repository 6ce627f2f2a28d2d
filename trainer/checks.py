"""Checks of a loaded model and its processor (see `doctor.py`): one small function per property."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ParamSpec

import torch
from PIL import Image

from mglmm.modeling_mglmm import MglmmForConditionalGeneration
from mglmm.processing import MglmmProcessor
from mglmm.processing.uscdf import IMAGE_TOKEN, render_phrase

# From the mean row, relative to its norm and to other rows' distance from it; rounding to bfloat16 gives less.
INITIAL_DISTANCE = 0.01
SAMPLED_ROWS = 1000  # that say how far rows usually are from their mean
MASK_PATH = ("mask_projector", "prompt_encoder", "mask_decoder", "pixel_neck")
QUESTIONS = ("Segment the hat.", "Where is a bicycle?")
ANSWERS = (f"Sure, {render_phrase('the hat')}.", "Sorry, I cannot find one.")

P = ParamSpec("P")


@dataclass(frozen=True)
class Check:
    """Result of examining one property; `message` says what was found and, if that is not `ok`, what to do."""

    name: str
    ok: bool
    message: str


def check(name: str) -> Callable[[Callable[P, tuple[bool, str]]], Callable[P, Check]]:
    """Makes a function that gives (ok, message) give a `Check`; what cannot be examined has failed, with the reason."""

    def decorate(examine: Callable[P, tuple[bool, str]]) -> Callable[P, Check]:
        @functools.wraps(examine)
        def examined(*args: P.args, **kwargs: P.kwargs) -> Check:
            try:
                return Check(name, *examine(*args, **kwargs))
            except Exception as error:  # a broken model can raise almost anything; the other checks are still to come
                return Check(name, False, f"cannot be examined: {reason_of(error)}")

        return examined

    return decorate


def reason_of(error: Exception) -> str:
    """One line of an error."""
    return f"{' '.join(str(error).split())[:300]} ({type(error).__name__})"


def listed(items: list[str], most: int = 4) -> str:
    """The first of many things, and how many more there are."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more


# ---------------------------------------------------------------------- tokens and text


@check("control tokens")
def control_tokens(processor: MglmmProcessor) -> tuple[bool, str]:
    tokenizer = processor.tokenizer
    ids = {token: tokenizer(token, add_special_tokens=False)["input_ids"] for token in processor.control_tokens}
    split = [f"{token} is {len(found)} tokens" for token, found in ids.items() if len(found) != 1]
    if split:
        return (
            False,
            f"{listed(split)}: load the tokenizer through MglmmProcessor, which adds what is missing, and save it",
        )
    return True, ", ".join(f"{token} {found[0]}" for token, found in ids.items())


@check("ids in the configuration")
def config_ids(model: MglmmForConditionalGeneration, processor: MglmmProcessor) -> tuple[bool, str]:
    pairs = {
        "image_token_id": (model.config.image_token_id, processor.image_token_id),
        "seg_token_id": (model.config.seg_token_id, processor.seg_token_id),
    }
    wrong = [
        f"{name} is {ours} but the tokenizer's is {theirs}" for name, (ours, theirs) in pairs.items() if ours != theirs
    ]
    if wrong:
        return False, f"{listed(wrong)}: correct config.json, or use the processor that was saved with the model"
    return True, ", ".join(f"{name} {ours}" for name, (ours, _) in pairs.items())


@check("tokens in a sentence")
def tokens_in_sentence(processor: MglmmProcessor) -> tuple[bool, str]:
    """Encoding and decoding keep the control tokens: the tags always, `<image>` where special tokens are kept."""
    tokenizer, answer = processor.tokenizer, ANSWERS[0]
    for text, skip in ((answer, True), (f"{IMAGE_TOKEN} {answer}", False)):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        decoded = tokenizer.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
        if "".join(decoded.split()) != "".join(text.split()):
            return False, (
                f"{text!r} comes back as {decoded!r}: the tags must be added tokens with special=False, normalized=False "
                "and without stripping, as MglmmProcessor adds them"
            )
    return True, "come back as they were written"


@check("escaping")
def escaping(processor: MglmmProcessor) -> tuple[bool, str]:
    """Control tokens that a user writes become plain text."""
    tokens = [*processor.control_tokens, *filter(None, [processor.tokenizer.eos_token])]
    counts = []
    for text in ("a picture", f"a {' b '.join(tokens)} picture"):
        ids, _ = _rendered(processor, [{"role": "user", "content": text}])
        counts.append(Counter(processor.tokenizer.convert_ids_to_tokens(ids)))
    passed = [token for token in tokens if counts[1][token] > counts[0][token]]
    if passed:
        return False, f"{listed(passed)} in a user's text become control tokens: use MglmmProcessor.apply_chat_template"
    return True, "control tokens in a user's text are plain text"


def _rendered(processor: MglmmProcessor, messages: list[dict[str, str]]) -> tuple[list[int], list[int]]:
    """Ids of a conversation, and 1 where they are supervised."""
    inputs = processor.apply_chat_template(
        [messages], tokenize=True, return_dict=True, return_tensors="pt", return_assistant_tokens_mask=True
    )
    return inputs["input_ids"][0].tolist(), torch.as_tensor(inputs["assistant_masks"])[0].tolist()


def _conversation() -> list[dict[str, str]]:
    turns = zip(QUESTIONS, ANSWERS, strict=True)
    return [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]


def _supervised_runs(processor: MglmmProcessor) -> list[list[int]]:
    """Supervised ids of a conversation of two turns, in contiguous runs."""
    runs: list[list[int]] = []
    before = 0
    for token, supervised in zip(*_rendered(processor, _conversation()), strict=True):
        if supervised:
            runs = runs if before else [*runs, []]
            runs[-1].append(token)
        before = supervised
    return runs


@check("supervised turns")
def supervised_turns(processor: MglmmProcessor) -> tuple[bool, str]:
    runs = ["".join(processor.tokenizer.decode(run).split()) for run in _supervised_runs(processor)]
    questions, answers = (["".join(text.split()) for text in texts] for texts in (QUESTIONS, ANSWERS))
    whole = len(runs) == len(answers) and all(answer in run for answer, run in zip(answers, runs, strict=True))
    if not whole or any(question in run for question in questions for run in runs):
        return False, (
            f"{len(runs)} supervised spans in a conversation with {len(answers)} answers, or other words than the answers': "
            "wrap what the assistant says, and only that, in {% generation %} ... {% endgeneration %} in the chat template"
        )
    return True, "exactly what the assistant says"


@check("end of answer")
def end_of_answer(model: MglmmForConditionalGeneration, processor: MglmmProcessor) -> tuple[bool, str]:
    """Every answer ends, supervised, with a token at which generation stops."""
    tokenizer = processor.tokenizer
    stops = _stops(model) | {token for token in [tokenizer.eos_token_id] if token is not None}
    stop_tokens = tokenizer.convert_ids_to_tokens(sorted(stops))
    text = processor.apply_chat_template(_conversation())
    ends = [text.partition(answer)[2].lstrip().startswith(tuple(stop_tokens)) for answer in ANSWERS]
    if not all(ends) or not all(run[-1] in stops for run in _supervised_runs(processor)):
        return False, (
            f"an answer does not end with a supervised {' or '.join(stop_tokens)}, so that the model would never stop: put "
            "{{ eos_token }} before {% endgeneration %} in the chat template"
        )
    return True, f"a supervised {' or '.join(stop_tokens)}"


def _stops(model: MglmmForConditionalGeneration) -> set[int]:
    stop = model.generation_config.eos_token_id
    return {stop} if isinstance(stop, int) else set(stop or ())


@check("stop token")
def stop_token(model: MglmmForConditionalGeneration, processor: MglmmProcessor) -> tuple[bool, str]:
    eos = processor.tokenizer.eos_token_id
    if eos is None or eos not in _stops(model):
        stops = sorted(_stops(model))
        return False, f"generation stops at {stops}, not at the tokenizer's {eos}: set generation_config.eos_token_id"
    return True, f"generation stops at {processor.tokenizer.eos_token}"


@check("padding")
def padding(processor: MglmmProcessor) -> tuple[bool, str]:
    tokenizer = processor.tokenizer
    if tokenizer.pad_token_id is None:
        return False, "the tokenizer has no pad token: set tokenizer.pad_token before training or batched generation"
    if tokenizer.pad_token_id in processor.control_token_ids:
        return False, f"{tokenizer.pad_token} pads and carries meaning: give the tokenizer a pad token of its own"
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        return True, f"{tokenizer.pad_token} is also the end of text, which stays supervised"
    return True, tokenizer.pad_token


# ---------------------------------------------------------------------- sizes


@check("image tokens")
@torch.no_grad()
def image_tokens(model: MglmmForConditionalGeneration, processor: MglmmProcessor) -> tuple[bool, str]:
    """One `<image>` becomes as many tokens as the vision tower gives, for pictures of the processor's size."""
    inputs = processor(images=[Image.new("RGB", (64, 48))], text=[IMAGE_TOKEN], return_tensors="pt")
    written = int((inputs["input_ids"] == processor.image_token_id).sum())
    features = model.encode_images(inputs["pixel_values"].to(model.device))
    given = model.model.project_image_features(features).shape[1]
    if written != given:
        return False, (
            f"the processor writes {written} {IMAGE_TOKEN} tokens but the tower gives {given}: patch_size, "
            "image_token_stride and num_prefix_tokens of the processor must be those of the model"
        )
    return True, f"{given} per picture of {processor.vision_size[1]} x {processor.vision_size[0]}"


@check("mask frame")
def mask_frame(model: MglmmForConditionalGeneration, processor: MglmmProcessor) -> tuple[bool, str]:
    """The pixel encoder gives the grid on which the mask decoder works, for pictures of the processor's size."""
    config: Any = model.config
    side = config.sam_config.prompt_encoder_config.image_embedding_size
    if (processor.sam_image_size is None) != config.share_vision_tower:
        wanted = "None" if config.share_vision_tower else "the pixel encoder's image size"
        return False, f"sam_image_size is {processor.sam_image_size}: set it to {wanted} in the processor"
    encoder = (
        config.vision_config if config.share_vision_tower else config.pixel_config or config.sam_config.vision_config
    )
    size = processor.frame_of((64, 48))[1]
    grid = tuple(length // encoder.patch_size for length in size)
    fixed = not config.share_vision_tower and config.pixel_config is None  # SAM's own encoder takes one size only
    if grid != (side, side) or (fixed and size[0] != encoder.image_size):
        return False, (
            f"pictures of {size[1]} x {size[0]} give {grid[1]} x {grid[0]} cells but the mask decoder works on {side} x "
            f"{side}: set the processor's image size to {side * encoder.patch_size}"
        )
    return True, f"{side} x {side} cells of pictures of {size[1]} x {size[0]}"


# ---------------------------------------------------------------------- weights


def _layers(model: MglmmForConditionalGeneration) -> dict[str, torch.Tensor]:
    """Weights of the embedding and, if it has its own, of the head."""
    embedding: Any = model.get_input_embeddings()
    layers = {"embedding": embedding.weight}
    return layers if model.lm_head.weight is embedding.weight else layers | {"head": model.lm_head.weight}


@check("vocabulary")
def vocabulary(model: MglmmForConditionalGeneration, processor: MglmmProcessor) -> tuple[bool, str]:
    """Every token has a row of the embedding and of the head."""
    size = max(processor.tokenizer.get_vocab().values()) + 1
    rows = {name: len(weight) for name, weight in _layers(model).items()}
    if short := [f"the {name} has {count} rows" for name, count in rows.items() if count < size]:
        remedy = "call resize_token_embeddings, or build the model with from_parts"
        return False, f"{listed(short)} but the tokenizer {size} tokens: {remedy}"
    return True, f"{size} tokens, " + ", ".join(f"{count} rows of the {name}" for name, count in rows.items())


@check("new-token rows")
@torch.no_grad()
def new_token_rows(
    model: MglmmForConditionalGeneration, processor: MglmmProcessor, trained: bool = True
) -> tuple[bool, str]:
    """Rows of `[SEG]`, `<p>`, `</p>` are not zero and, once trained, not the mean of the others, as which they start."""
    vocab = processor.tokenizer.get_vocab()
    control = [vocab[token] for token in processor.control_tokens if token in vocab]
    new = {token: vocab[token] for token in processor.control_tokens if token in vocab and token != IMAGE_TOKEN}
    zero, initial = [], []
    for name, weight in _layers(model).items():
        others = sorted(set(range(min(len(weight), len(vocab)))) - set(control))
        total = weight[: len(vocab)].sum(0, dtype=torch.float32)  # no copy of a large embedding
        mean = (total - weight[[i for i in control if i < len(weight)]].float().sum(0)) / len(others)
        sampled = weight[others[:: -(-len(others) // SAMPLED_ROWS)]].float()
        near = INITIAL_DISTANCE * ((sampled - mean).norm(dim=1).median() + mean.norm())
        for token, row in ((token, weight[i].float()) for token, i in new.items() if i < len(weight)):
            if not row.any():
                zero.append(f"{token} of the {name}")
            elif (row - mean).norm() <= near:
                initial.append(f"{token} of the {name}")
    if zero:
        return False, f"zero rows: {listed(zero)}; build the model with from_parts, which starts them at the mean"
    if initial:
        found = f"still at their initial value, the mean of the others: {listed(initial, 6)}"
        remedy = "; train with train_new_tokens=True" if trained else ""
        return not trained, f"{found}; the model was not trained{remedy}"
    return True, f"those of {', '.join(new)} are their own"


@check("finite weights")
def finite_weights(model: MglmmForConditionalGeneration) -> tuple[bool, str]:
    weights = [(n, p) for n, p in model.named_parameters() if p.is_floating_point() and not p.is_meta]
    if bad := [name for name, parameter in weights if not bool(parameter.isfinite().all())]:
        return False, f"NaN or infinity in {listed(bad)}: the training diverged, go back to an earlier checkpoint"
    return True, f"{sum(p.numel() for _, p in weights):,} parameters"


@check("materialised weights")
def materialised_weights(model: MglmmForConditionalGeneration) -> tuple[bool, str]:
    if meta := [name for name, parameter in model.named_parameters() if parameter.is_meta]:
        return False, f"no values for {listed(meta)} (meta device): load the model with from_pretrained"
    return True, ", ".join(sorted({str(parameter.device) for parameter in model.parameters()}))


@check("dtypes")
def dtypes(model: MglmmForConditionalGeneration) -> tuple[bool, str]:
    """The mask path is float32; reports the dtype of every part."""
    found = {
        name: sorted({str(parameter.dtype).removeprefix("torch.") for parameter in part.parameters()})
        for name, part in [*model.model.named_children(), ("lm_head", model.lm_head)]
    }
    report = ", ".join(f"{name} {'/'.join(kinds)}" for name, kinds in found.items())
    if wrong := [name for name in MASK_PATH if name in found and found[name] != ["float32"]]:
        return (
            False,
            f"{report}; masks need float32 in {listed(wrong)}: call .float() on them after any model.to(dtype)",
        )
    return True, report


def examine(model: MglmmForConditionalGeneration, processor: MglmmProcessor, trained: bool = True) -> list[Check]:
    """
    All checks of a loaded model without an adapter; runs the vision tower once and changes nothing.

    Args:
        trained: `False` accepts rows of new tokens that are still at their initial value, as before training.
    """
    return [
        control_tokens(processor),
        config_ids(model, processor),
        tokens_in_sentence(processor),
        escaping(processor),
        supervised_turns(processor),
        end_of_answer(model, processor),
        stop_token(model, processor),
        padding(processor),
        image_tokens(model, processor),
        mask_frame(model, processor),
        vocabulary(model, processor),
        new_token_rows(model, processor, trained),
        finite_weights(model),
        materialised_weights(model),
        dtypes(model),
    ]
