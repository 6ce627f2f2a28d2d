"""
Speed and memory of `generate(output_masks=True)` on the CPU, beside the bare parts it is made of.

```shell
python benchmarks/inference.py
python benchmarks/inference.py --small path/to/mglmm-small --repeats 5 --threads 4
```

The first line measures the small checkpoint (assembled on first use) and a mid-size random model and writes the tables of
`benchmarks/README.md`, where the columns are explained. About ten minutes on two idle cores.
"""

import argparse
import copy
import os
import platform
import resource
import sys
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from tables import README, in_own_process, markdown_table, write_tables
from transformers import AutoModelForCausalLM, LogitsProcessor, LogitsProcessorList, PreTrainedModel, SamModel

import mglmm
from mglmm import MglmmConfig, MglmmForConditionalGeneration
from mglmm.small.checkpoint import assemble

SMALL, MID_SIZE = "mglmm-small", "mid-size"
BATCH_SIZES = (1, 8)
TEXT_TOKENS = 44  # of a prompt, beside the image tokens
NEW_TOKENS = 64
SEG_STEPS = (10, 22, 34, 46, 58)  # of the NEW_TOKENS: one mask each
PLAIN_TOKEN = 100  # an id that is text in every vocabulary here
PARTS = ("vision tower", "pixel encoder", "pixel neck", "projector", "language model", "mask decoder")

MID_SIZE_CONFIG: dict[str, Any] = {
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 384,
        "intermediate_size": 1536,
        "num_hidden_layers": 12,
        "num_attention_heads": 6,
        "image_size": 224,
        "patch_size": 14,
        "initializer_range": 0.02,
    },
    "text_config": {
        "model_type": "llama",
        "vocab_size": 32007,
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "pad_token_id": 0,
        "initializer_range": 0.02,
    },
    "sam_config": {
        "vision_config": {
            "hidden_size": 384,
            "mlp_dim": 1536,
            "num_hidden_layers": 8,
            "num_attention_heads": 6,
            "image_size": 1024,
            "patch_size": 16,
            "window_size": 14,
            "global_attn_indexes": [3, 7],
            "initializer_range": 0.02,  # SAM's own default, 1e-10, makes every picture look the same
        },
        "initializer_range": 0.02,
    },
    "image_token_id": 32000,
    "seg_token_id": 32001,
    "initializer_range": 0.02,
}


@dataclass(frozen=True)
class Case:
    """One row of the tables; each is measured in a process of its own, so that peaks of memory do not mix."""

    model: str
    folder: Path | None
    batch_size: int
    repeats: int
    threads: int


@dataclass
class Figures:
    """Seconds of each repetition: the whole, each part, and the second question; bytes of memory."""

    whole: list[float] = field(default_factory=list)
    parts: dict[str, list[float]] = field(default_factory=dict)
    second: list[float] = field(default_factory=list)
    peak_memory: int = 0

    @property
    def sum_of_parts(self) -> list[float]:
        return [sum(times) for times in zip(*self.parts.values(), strict=True)]

    @property
    def ratio(self) -> float:
        """Whole to the sum of its parts: each repetition compared with its own neighbour, so that drift cancels."""
        return median(whole / parts for whole, parts in zip(self.whole, self.sum_of_parts, strict=True))

    @property
    def second_share(self) -> float:
        return median(second / whole for second, whole in zip(self.second, self.whole, strict=True))


class ForcedTokens(LogitsProcessor):
    """Makes every row emit the given ids, one per step; for one call of `generate`."""

    def __init__(self, tokens: Sequence[int]):
        self.tokens = iter(tokens)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        forced = torch.full_like(scores, -torch.inf)
        forced[:, next(self.tokens)] = 0.0
        return forced


def generation_kwargs(seg_token_id: int) -> dict[str, Any]:
    """For one call of `generate`: greedy, exactly `NEW_TOKENS` new tokens with a `[SEG]` at each of `SEG_STEPS`."""
    tokens = [seg_token_id if step in SEG_STEPS else PLAIN_TOKEN for step in range(NEW_TOKENS)]
    processors = LogitsProcessorList([ForcedTokens(tokens)])
    return {"max_new_tokens": NEW_TOKENS, "do_sample": False, "logits_processor": processors}


def random_inputs(model: MglmmForConditionalGeneration, batch_size: int) -> dict[str, torch.Tensor]:
    """One random picture and one prompt of `TEXT_TOKENS` per row; time does not depend on what they show or say."""
    config = model.config
    shared = config.share_vision_tower
    frame = config.sam_config.prompt_encoder_config.image_size
    vision = frame if shared else config.vision_config.image_size
    num_image_tokens = (vision // config.vision_config.patch_size // config.image_token_stride) ** 2
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(3, 256, (batch_size, TEXT_TOKENS), generator=generator)
    image = torch.full((batch_size, num_image_tokens), config.image_token_id)
    input_ids = torch.cat([text[:, : TEXT_TOKENS // 2], image, text[:, TEXT_TOKENS // 2 :]], dim=1)
    inputs = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "pixel_values": torch.randn((batch_size, 3, vision, vision), generator=generator),
    }
    if not shared:
        inputs["sam_pixel_values"] = torch.randn((batch_size, 3, frame, frame), generator=generator)
    return inputs


# ---------------------------------------------------------------------- the bare parts


def bare_language_model(model: MglmmForConditionalGeneration) -> PreTrainedModel:
    """transformers' own causal language model around the same weights."""
    with torch.device("meta"):
        bare = AutoModelForCausalLM.from_config(copy.deepcopy(model.config.text_config))
    setattr(bare, bare.base_model_prefix, model.model.language_model)
    bare.set_output_embeddings(model.lm_head)
    bare.generation_config = copy.deepcopy(model.generation_config)
    return bare.eval()


def bare_sam(model: MglmmForConditionalGeneration) -> SamModel:
    """transformers' own SAM around the same prompt encoder and mask decoder; its vision encoder has no weights."""
    with torch.device("meta"):
        bare = SamModel(copy.deepcopy(model.config.sam_config))
    bare.prompt_encoder, bare.mask_decoder = model.model.prompt_encoder, model.model.mask_decoder
    bare.shared_image_embedding = model.model.prompt_encoder.shared_embedding
    return bare.eval()


@torch.no_grad()
def bare_parts(
    model: MglmmForConditionalGeneration, inputs: dict[str, torch.Tensor]
) -> tuple[dict[str, Callable[[], Any]], torch.Tensor]:
    """
    The parts of `model`, each a call of a plain module with its input at hand. Every part runs once here and feeds the
    next; what lies between them (choosing layers, pooling, placing the image tokens, gathering states) is in no part.

    Returns:
        The calls by name, and the mask logits `(batch * len(SEG_STEPS), h, w)` they lead to.
    """
    config, modules = model.config, model.model
    calls: dict[str, Callable[[], Any]] = {}

    def run(name: str, call: Callable[[], Any]) -> Any:
        calls[name] = call
        return call()

    pixel_values, input_ids = inputs["pixel_values"], inputs["input_ids"]
    vision = run("vision tower", lambda: modules.vision_tower(pixel_values, output_hidden_states=True))
    layers = config.vision_feature_layer
    side = pixel_values.shape[-1] // config.vision_config.patch_size
    layers, details = [layers] if isinstance(layers, int) else layers, config.pixel_detail_layers or []
    states = [vision.hidden_states[i][:, -(side**2) :] for i in [*layers, *details]]
    if config.normalize_vision_features:
        states = [F.layer_norm(state, state.shape[-1:]) for state in states]
    grid = torch.cat(states[: len(layers)], dim=-1).unflatten(1, (side, side))
    if config.share_vision_tower:
        pixels = torch.cat(states, dim=-1).unflatten(1, (side, side))
        embeddings = run("pixel neck", lambda: modules.pixel_neck(pixels))
    else:
        sam_pixel_values = inputs["sam_pixel_values"]
        embeddings = run("pixel encoder", lambda: modules.pixel_encoder(sam_pixel_values)).last_hidden_state

    pooled = F.avg_pool2d(grid.permute(0, 3, 1, 2), config.image_token_stride).flatten(2).transpose(1, 2).contiguous()
    image_tokens = run("projector", lambda: modules.multi_modal_projector(pooled))

    language_model = bare_language_model(model)
    embed = language_model.get_input_embeddings()
    prompt = embed(input_ids)
    prompt[input_ids == config.image_token_id] = image_tokens.flatten(0, 1)
    arguments = {"inputs_embeds": prompt, "attention_mask": inputs["attention_mask"]}
    generated = run(
        "language model", lambda: language_model.generate(**arguments, **generation_kwargs(config.seg_token_id))
    )
    # The states that predicted each new token, by one pass over prompt and answer: independent of how generation keeps them.
    answered = torch.cat([prompt, embed(generated)], dim=1)
    predicting = language_model.base_model(inputs_embeds=answered).last_hidden_state[:, prompt.shape[1] - 1 : -1]
    seg_states = predicting[generated == config.seg_token_id]

    sam = bare_sam(model)

    def decode() -> torch.Tensor:
        prompts = modules.mask_projector(seg_states)[:, None, None]
        positional = sam.get_image_wide_positional_embeddings()
        dense = sam.prompt_encoder(None, None, None, None)[1]
        images = embeddings.repeat_interleave(len(SEG_STEPS), dim=0)
        return sam.mask_decoder(images, positional, prompts, dense, multimask_output=False)[0][:, 0, 0]

    return calls, run("mask decoder", decode)


# ---------------------------------------------------------------------- measuring


def seconds(call: Callable[[], Any]) -> float:
    start = perf_counter()
    call()
    return perf_counter() - start


def peak_memory() -> int:
    """Most bytes of RAM this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@torch.no_grad()
def measure(model: MglmmForConditionalGeneration, inputs: dict[str, torch.Tensor], repeats: int) -> Figures:
    """
    Times whole, parts and second question in turn, `repeats` times after one warm-up of each.

    Raises:
        AssertionError: the parts lead to other masks than the whole, so that comparing them would mean nothing.
    """
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}

    def whole() -> Any:
        return model.generate(**inputs, output_masks=True, **generation_kwargs(model.config.seg_token_id))

    def second() -> Any:
        arguments = text | {"image_features": features, "output_masks": True}
        return model.generate(**arguments, **generation_kwargs(model.config.seg_token_id))

    outputs = whole()
    figures = Figures(peak_memory=peak_memory())  # before the parts, which hold their inputs
    parts, masks = bare_parts(model, inputs)
    torch.testing.assert_close(torch.cat(outputs.pred_masks), masks, atol=1e-3, rtol=1e-3)
    features = model.encode_images(inputs["pixel_values"], inputs.get("sam_pixel_values"))
    second()
    figures.parts = {name: [] for name in parts}
    for i in range(repeats):
        figures.whole.append(seconds(whole))
        for name, part in parts.items():
            figures.parts[name].append(seconds(part))
        figures.second.append(seconds(second))
        print(
            f"  {i + 1}/{repeats}: whole {figures.whole[-1]:.2f} s, sum of parts {figures.sum_of_parts[-1]:.2f} s, "
            f"second question {figures.second[-1]:.2f} s",
            flush=True,
        )
    return figures


def mid_size_model() -> MglmmForConditionalGeneration:
    torch.manual_seed(0)
    model = MglmmForConditionalGeneration(MglmmConfig(**MID_SIZE_CONFIG)).eval()
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, 2
    return model


def run_case(case: Case) -> Figures:
    torch.set_num_threads(case.threads)
    if case.folder is None:
        model = mid_size_model()
    else:
        model = MglmmForConditionalGeneration.from_pretrained(case.folder, dtype=torch.float32).eval()
    print(f"  {sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters; warming up ...", flush=True)
    return measure(model, random_inputs(model, case.batch_size), case.repeats)


# ---------------------------------------------------------------------- tables


def render(results: dict[Case, Figures], notes: Sequence[str], command: str, threads: int, repeats: int) -> str:
    """The text between the two markers of the README."""
    columns = [
        "model",
        "batch",
        "images/s",
        "whole, s",
        "sum of parts, s",
        "whole / parts",
        "second question / first",
        "peak memory, GiB",
    ]
    summary, details = [], []
    for case, figures in results.items():
        name = [case.model, str(case.batch_size)]
        whole = median(figures.whole)
        summary.append(
            [
                *name,
                f"{case.batch_size / whole:.3f}",
                f"{whole:.2f}",
                f"{median(figures.sum_of_parts):.2f}",
                f"{figures.ratio:.2f}",
                f"{figures.second_share:.2f}",
                f"{figures.peak_memory / 2**30:.1f}",
            ]
        )
        details.append([*name, *(f"{median(figures.parts[p]):.3f}" if p in figures.parts else "–" for p in PARTS)])
    lines = [
        f"`{command}`: {repeats} repetitions, {threads} threads on {os.cpu_count()} cores, float32; "
        f"mglmm {mglmm.__version__}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"Python {platform.python_version()}.\n",
        markdown_table(columns, summary),
        "Seconds of each part, run alone:\n",
        markdown_table(["model", "batch", *PARTS], details),
        *(f"{note}\n" for note in notes),
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--small", type=Path, metavar="FOLDER", help="the small checkpoint (default: assemble it)")
    parser.add_argument("--repeats", type=int, default=3, help="repetitions after the warm-up (default: 3)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: torch's own choice")
    parser.add_argument("--readme", type=Path, default=README, help="file whose tables are replaced")
    args = parser.parse_args()
    if args.repeats < 1 or args.threads < 1:
        parser.error(f"--repeats ({args.repeats}) and --threads ({args.threads}) must be at least 1")

    notes, folder = [], args.small
    try:
        folder = folder or in_own_process(assemble)
    except (ImportError, OSError, RuntimeError) as error:
        print(f"{SMALL} is left out, it cannot be assembled: {error}", flush=True)
        notes.append(f"{SMALL} is left out: it could not be assembled.")
    models = ([(SMALL, folder)] if folder else []) + [(MID_SIZE, None)]
    cases = [Case(name, path, size, args.repeats, args.threads) for name, path in models for size in BATCH_SIZES]

    results = {}
    for i, case in enumerate(cases):
        print(f"[{i + 1}/{len(cases)}] {case.model}, batch {case.batch_size}", flush=True)
        try:
            results[case] = in_own_process(run_case, case)
        except BrokenProcessPool:
            print("  ended by the system, most likely for want of memory", flush=True)
            notes.append(f"{case.model} with batch {case.batch_size} did not fit into memory.")
    if not results:
        sys.exit("nothing was measured")
    command = f"python benchmarks/inference.py --repeats {args.repeats} --threads {args.threads}"
    tables = render(results, notes, command, args.threads, args.repeats)
    print(f"\n{tables}")
    write_tables(args.readme, Path(__file__).name, tables)
    print(f"written to {os.path.relpath(args.readme)}")


if __name__ == "__main__":
    main()
