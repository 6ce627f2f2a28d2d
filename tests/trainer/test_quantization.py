"""Training on a 4- or 8-bit language model: what is quantised, what is not, and that it learns and loads back."""

import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.integrations.bitsandbytes import dequantize_bnb_weight

from mglmm.modeling_mglmm import MglmmForConditionalGeneration
from mglmm.processing import MglmmProcessor
from mglmm.processing.uscdf import PHRASE_END, PHRASE_START, SEG_TOKEN
from mglmm.trainer import curves, train
from mglmm.trainer.checks import examine
from mglmm.trainer.config import RunConfig
from mglmm.trainer.data_collator import MglmmDataCollator
from mglmm.trainer.doctor import examine_trainable, require
from mglmm.trainer.trainable import make_trainable
from tests.tiny import tiny_config, tiny_model, tiny_processor
from tests.trainer.conftest import training_arguments

KINDS = ("4bit", "8bit")
COMBINATIONS = [("4bit", "bfloat16"), ("8bit", "float32")]  # and dtype of what is not quantised in the language model
WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 4, "head_dim": 16}  # blocks of 64 weights
PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
PROJECTIONS += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
LINEARS = {f"model.language_model.layers.{layer}.{name}" for layer in range(2) for name in PROJECTIONS}
MASK_PATH = ("mask_projector", "prompt_encoder", "mask_decoder")


class Base(NamedTuple):
    folder: Path
    processor: MglmmProcessor


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    pytest.importorskip("bitsandbytes", reason="quantisation needs the extra 'quantization'")
    folder, processor = tmp_path_factory.mktemp("base"), tiny_processor()
    text = tiny_config(processor).text_config.to_dict() | WIDE
    tiny_model(processor, text_config=text).save_pretrained(folder)
    processor.save_pretrained(folder)
    return Base(folder, processor)


def load(base: Base, kind: str | None, dtype: str = "float32") -> MglmmForConditionalGeneration:
    config = RunConfig(model=str(base.folder), data=[], training={}, quantization=kind, language_model_dtype=dtype)
    return train.load_model(config)[0]


def batch_for(model: nn.Module, processor: MglmmProcessor, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    device = next(model.parameters()).device
    return {name: value.to(device) for name, value in MglmmDataCollator(processor, 16)(rows).items()}


def quantized(model: nn.Module) -> dict[str, nn.Module]:
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    return {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit | Linear8bitLt)}


def test_without_bitsandbytes_its_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.nn", None)
    with pytest.raises(ImportError, match=r"pip install 'mglmm\[quantization\]'"):
        train.load_model(RunConfig(model="nowhere", data=[], training={}, quantization="4bit"))


@pytest.mark.parametrize(("kind", "dtype"), COMBINATIONS)
def test_exactly_the_linear_layers_of_the_language_model_are_quantised(base, kind, dtype):
    model = load(base, kind, dtype)
    layers = quantized(model)
    assert layers.keys() == LINEARS
    assert {layer.weight.dtype for layer in layers.values()} == {torch.uint8 if kind == "4bit" else torch.int8}
    others = {name: p.dtype for name, p in model.named_parameters() if name.removesuffix(".weight") not in LINEARS}
    text = {name for name in others if name.startswith(("model.language_model.", "lm_head."))}
    assert {others[name] for name in text} == {getattr(torch, dtype)}
    assert {others[name] for name in others.keys() - text} == {torch.float32}


@pytest.mark.parametrize("kind", KINDS)
def test_masks_stay_in_float32_under_any_quantization_config(base, kind, rows):
    """As a user passes it, without a list of modules to skip."""
    config = BitsAndBytesConfig(load_in_4bit=kind == "4bit", load_in_8bit=kind == "8bit")
    model = MglmmForConditionalGeneration.from_pretrained(base.folder, quantization_config=config)
    assert quantized(model).keys() >= LINEARS
    for name in MASK_PATH:
        module = getattr(model.model, name)
        assert not quantized(module) and {p.dtype for p in module.parameters()} == {torch.float32}, name


@pytest.mark.parametrize(
    ("kind", "weight_error", "output_error"),
    [
        ("4bit", 0.12, 1e-4),  # NormalFloat's 16 values; the weights are restored before they multiply
        ("8bit", 0.01, 0.1),  # the activations are rounded, too
    ],
)
def test_outputs_are_those_of_the_rounded_weights(base, rows, kind, weight_error, output_error):
    """FP4 in place of NF4 would be worse than the first limit."""
    model, plain = load(base, kind).eval(), load(base, None).eval()
    for name, layer in quantized(model).items():
        weight = plain.get_submodule(name).weight
        rounded = dequantize_bnb_weight(layer.weight, getattr(layer, "state", None)).float().cpu()
        assert (rounded - weight).abs().mean() < weight_error * weight.abs().mean(), name
        weight.data = rounded
    with torch.no_grad():
        outputs = model(**batch_for(model, base.processor, rows))
        expected = plain(**batch_for(plain, base.processor, rows))
    for name in ("logits", "pred_masks"):
        difference = (outputs[name].cpu() - expected[name]).abs().mean()
        assert difference < output_error * expected[name].abs().mean(), name
    assert outputs.pred_masks.dtype == torch.float32


@pytest.mark.parametrize(("kind", "dtype"), COMBINATIONS)
def test_an_adapter_learns_and_loads_back(base, rows, kind, dtype, tmp_path):
    base_model = load(base, kind, dtype)
    processor = base.processor
    require(examine(base_model, processor))
    args = training_arguments(tmp_path / "run")
    new_ids = processor.tokenizer.convert_tokens_to_ids([PHRASE_START, PHRASE_END, SEG_TOKEN])
    model = make_trainable(base_model, args, new_ids)
    require(examine_trainable(model, new_ids, args))
    batch = batch_for(model, processor, rows)
    with torch.no_grad():  # on some CPUs bitsandbytes then packs 4-bit weights, after which no gradient passes them
        before = model.eval()(**batch)

    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.02)
    model.train()
    for _ in range(2):  # the first step leaves LoRA's A, as its B is zero
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    model.eval()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, start[name]) != parameter.requires_grad, name
    with torch.no_grad():
        expected = model(**batch)
    assert expected.loss < before.loss

    model.save_pretrained(tmp_path / "adapter")
    assert {v.dtype for v in load_file(tmp_path / "adapter" / "adapter_model.safetensors").values()} == {torch.float32}
    loaded = PeftModel.from_pretrained(load(base, kind, dtype), tmp_path / "adapter").eval()
    with torch.no_grad():
        outputs = loaded(**batch)
    assert torch.equal(outputs.logits, expected.logits) and torch.equal(outputs.pred_masks, expected.pred_masks)


@pytest.mark.parametrize("kind", ["4bit"])
def test_a_run_with_evaluation(base, kind, dataset_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(curves, "plot_curves", lambda *args, **kwargs: None)
    training = {
        "output_dir": str(tmp_path / "run"),
        "max_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "mask_size": 16,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
    }
    values = {"model": str(base.folder), "data": {"path": dataset_folder}, "eval_data": {"path": dataset_folder}}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values | {"quantization": kind, "training": training}))
    train.main([str(path)])
    saved = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert all(value.any() for name, value in saved.items() if "lora_B" in name)
    text = (tmp_path / "run" / "training_log.jsonl").read_text()
    assert text.count("eval_loss") == 2
