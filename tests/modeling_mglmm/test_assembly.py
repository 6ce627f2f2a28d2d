"""`from_parts`: weights of the parts bit by bit, fresh layers that are really fresh, new rows, dtypes, sharing."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    SamConfig,
    SamModel,
)

from mglmm.modeling_mglmm import MglmmForConditionalGeneration
from mglmm.modeling_mglmm.sam_checkpoint import original_sam_name
from tests.modeling_mglmm.batches import ROWS, prompts, training_batch
from tests.modeling_mglmm.test_modeling import LANGUAGE_MODELS, TOWERS
from tests.tiny import CLIP, script_tokens, tiny_config

from_parts = MglmmForConditionalGeneration.from_parts
BIG = 0.2  # spread of the pretrained parts' weights; fresh layers get 0.02


def seeded(build):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return build().eval()


def vision_part() -> CLIPVisionModel:
    return seeded(lambda: CLIPVisionModel(CLIPVisionConfig(**CLIP)))


def text_part(processor, name: str = "llama", rows: int | None = None, **options):
    """A language model that knows the tokenizer's vocabulary without the four control tokens, or `rows` tokens."""
    options = {**LANGUAGE_MODELS.get(name, LANGUAGE_MODELS["llama"]), **options}
    options["vocab_size"] = rows or len(processor.tokenizer) - 4
    options["bos_token_id"], options["eos_token_id"] = 1, 2
    config = AutoConfig.for_model(**{**options, "model_type": name})
    return seeded(lambda: AutoModelForCausalLM.from_config(config))


def sam_config(processor, shared: bool = False) -> SamConfig:
    config = tiny_config(processor, shared).sam_config
    config.initializer_range = BIG
    return config


def sam_part(processor) -> SamModel:
    return seeded(lambda: SamModel(sam_config(processor)))


def assert_same_weights(module: torch.nn.Module, part: dict[str, torch.Tensor], dtype=torch.float32) -> None:
    found = module.state_dict()
    assert found.keys() == part.keys()
    for name, value in part.items():
        assert found[name].dtype == dtype and torch.equal(found[name], value.to(dtype)), name


def assert_works(model, processor) -> None:
    side = 4 * model.model.prompt_encoder.image_embedding_size[0]
    with torch.no_grad():
        assert model(**training_batch(processor, ROWS, side=side)).loss.isfinite()
    script = script_tokens(model, processor, [" " + ROWS[0][2]])
    output = model.generate(
        **prompts(processor, ROWS[:1]), output_masks=True, max_new_tokens=60, logits_processor=script
    )
    assert len(output.pred_masks[0]) == 2


@pytest.mark.parametrize("as_folders", [True, False])
@pytest.mark.parametrize("text", ["llama", "qwen2", "gpt2"])
def test_weights_are_those_of_the_parts(tiny, as_folders: bool, text: str, tmp_path) -> None:
    processor = tiny.processor
    parts = {"vision": vision_part(), "text": text_part(processor, text), "sam": sam_part(processor)}
    old = {name: {key: value.clone() for key, value in part.state_dict().items()} for name, part in parts.items()}
    if as_folders:
        for name, part in parts.items():
            part.save_pretrained(tmp_path / name)
        model = from_parts(*(str(tmp_path / name) for name in parts), processor)
    else:
        model = from_parts(*parts.values(), processor)
        assert model.model.vision_tower is parts["vision"] and model.model.language_model is parts["text"].base_model
        assert model.model.mask_decoder is parts["sam"].mask_decoder
    body = model.model
    assert_same_weights(body.vision_tower, old["vision"])
    for name in ("vision_encoder", "prompt_encoder", "mask_decoder"):
        module = body.pixel_encoder.vision_encoder if name == "vision_encoder" else getattr(body, name)
        prefix = name + "."
        assert_same_weights(module, {k.removeprefix(prefix): v for k, v in old["sam"].items() if k.startswith(prefix)})

    rows = old["text"]["lm_head.weight"].shape[0]
    new = sorted(processor.control_token_ids)
    assert new == list(range(rows, rows + 4))
    tables = {"lm_head": model.lm_head.weight, "embeddings": model.get_input_embeddings().weight}
    tied = text != "llama"
    assert (tables["lm_head"] is tables["embeddings"]) == tied == model.config.tie_word_embeddings
    name_in_part = next(k for k in old["text"] if k.endswith(("embed_tokens.weight", "wte.weight")))
    for table, before in ((tables["lm_head"], "lm_head.weight"), (tables["embeddings"], name_in_part)):
        assert torch.equal(table[:rows], old["text"][before])
        torch.testing.assert_close(table[new], old["text"][before].mean(0).expand(4, -1))
    language_model = body.language_model.state_dict()
    prefix = parts["text"].base_model_prefix + "."
    for key, value in old["text"].items():
        if key.startswith(prefix) and key != name_in_part:
            assert torch.equal(language_model[key.removeprefix(prefix)], value), key

    assert not any(module.training for module in model.modules())
    frozen = {name.split(".")[1] for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"vision_tower", "pixel_encoder", "prompt_encoder"}
    generation = model.generation_config
    assert (generation.pad_token_id, generation.bos_token_id, generation.eos_token_id) == (0, 1, 2)
    assert (model.config.image_token_id, model.config.seg_token_id) == (
        processor.image_token_id,
        processor.seg_token_id,
    )
    assert_works(model, processor)

    model.save_pretrained(tmp_path / "whole")
    loaded = MglmmForConditionalGeneration.from_pretrained(tmp_path / "whole")
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True)
    )


class RandomNumbers(TorchDispatchMode):
    """Counts the random numbers that are drawn."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.normal_, torch.ops.aten.uniform_):
            self.count += args[0].numel()
        return function(*args, **(kwargs or {}))


def test_only_fresh_layers_are_initialised(tiny) -> None:
    processor = tiny.processor
    parts = vision_part(), text_part(processor), sam_part(processor)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        with RandomNumbers() as drawn:
            model = from_parts(*parts, processor)
    fresh = [model.model.multi_modal_projector, model.model.mask_projector]
    numbers = sum(p.numel() for module in fresh for p in module.parameters() if p.ndim > 1)
    positions = model.model.prompt_encoder.shared_embedding.positional_embedding.numel()
    tables = 2 * model.lm_head.weight.numel()  # growing the vocabulary
    assert numbers <= drawn.count <= numbers + 2 * positions + tables
    for module in fresh:
        for linear in (module.linear_1, module.linear_2):
            std = float(linear.weight.detach().std())
            assert 0.1 < std < 0.3  # the language model's initializer_range is 0.2
            assert not linear.bias.any()


def test_fresh_sam_parts_from_a_configuration(tiny) -> None:
    model = from_parts(vision_part(), text_part(tiny.processor), sam_config(tiny.processor), tiny.processor)
    body = model.model
    assert 0.6 < float(body.prompt_encoder.shared_embedding.positional_embedding.std()) < 1.5
    assert float(body.mask_decoder.iou_token.weight.detach().std()) > 0.01
    attention = body.mask_decoder.transformer.layers[0].cross_attn_token_to_image
    width = attention.q_proj.in_features + attention.q_proj.out_features
    assert float(attention.q_proj.weight.detach().std()) == pytest.approx((2 / width) ** 0.5, rel=0.1)  # Xavier
    assert torch.equal(attention.q_proj.weight, attention.k_proj.weight)
    assert float(body.pixel_encoder.vision_encoder.patch_embed.projection.weight.std()) > 0.01
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert_works(model, tiny.processor)


def test_one_tower_for_both(tiny_shared, tmp_path) -> None:
    processor = tiny_shared.processor
    tower = vision_part()
    tower.save_pretrained(tmp_path / "tower")
    folder = str(tmp_path / "tower")
    for vision, pixel_encoder in ((folder, folder), (tmp_path / "tower", folder), (tower, tower)):
        model = from_parts(
            vision, text_part(processor), sam_config(processor, True), processor, pixel_encoder=pixel_encoder
        )
        assert model.config.share_vision_tower and model.model.pixel_encoder is None
        assert_same_weights(model.model.vision_tower, tower.state_dict())
        assert float(model.model.pixel_neck.conv1.weight.detach().std()) > 0.01
    assert_works(model, processor)


def test_another_pixel_encoder(tiny) -> None:
    options = {**TOWERS["dinov2"], "image_size": 64, "patch_size": 16}
    encoder = seeded(lambda: Dinov2Model(Dinov2Config(**options)))
    model = from_parts(
        vision_part(), text_part(tiny.processor), sam_part(tiny.processor), tiny.processor, pixel_encoder=encoder
    )
    assert model.model.pixel_encoder is encoder and model.config.pixel_config.model_type == "dinov2"
    assert not any(p.requires_grad for p in encoder.parameters())
    assert_works(model, tiny.processor)


def test_a_whole_clip_gives_its_tower(tiny, tmp_path) -> None:
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPModel.config_class(text_config=text, vision_config=CLIP, projection_dim=16)
    clip = seeded(lambda: CLIPModel(config))
    clip.save_pretrained(tmp_path)
    for part in (tmp_path, clip):
        model = from_parts(part, text_part(tiny.processor), sam_config(tiny.processor), tiny.processor)
        assert type(model.model.vision_tower) is CLIPVisionModel
        assert_same_weights(model.model.vision_tower, clip.vision_model.state_dict())


def test_the_original_sam_file(tiny, tmp_path) -> None:
    config = sam_config(tiny.processor)
    config.mask_decoder_config.num_attention_heads = 8
    sam = seeded(lambda: SamModel(config))
    depth = config.mask_decoder_config.iou_head_depth
    original = {original_sam_name(name, depth): value for name, value in sam.state_dict().items()}
    torch.save(original, tmp_path / "sam.pth")
    model = from_parts(vision_part(), text_part(tiny.processor), tmp_path / "sam.pth", tiny.processor)
    assert_same_weights(model.model.mask_decoder, sam.mask_decoder.state_dict())
    assert_same_weights(model.model.pixel_encoder.vision_encoder, sam.vision_encoder.state_dict())
    assert_works(model, tiny.processor)


def test_half_precision_leaves_the_mask_path_exact(tiny, tmp_path) -> None:
    sam, vision = sam_part(tiny.processor), vision_part()
    decoder = {name: value.clone() for name, value in sam.mask_decoder.state_dict().items()}
    tower = {name: value.clone() for name, value in vision.state_dict().items()}
    model = from_parts(vision, text_part(tiny.processor), sam, tiny.processor, dtype=torch.bfloat16)
    assert_same_weights(model.model.mask_decoder, decoder)
    assert_same_weights(model.model.vision_tower, tower, torch.bfloat16)
    assert model.lm_head.weight.dtype == model.dtype == torch.bfloat16
    assert model.model.mask_projector.linear_1.weight.dtype == torch.float32
    assert model.model.language_model.rotary_emb.inv_freq.dtype == torch.float32
    assert_works(model, tiny.processor)
    model.save_pretrained(tmp_path)
    loaded = MglmmForConditionalGeneration.from_pretrained(tmp_path)
    for (name, a), b in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b), name


@pytest.mark.parametrize("padding", [2, 4, 60])  # rows of the language model beyond its tokenizer's vocabulary
def test_padded_vocabularies(tiny, padding: int) -> None:
    processor = tiny.processor
    known = len(processor.tokenizer) - 4
    text = text_part(processor, rows=known + padding)
    with torch.no_grad():
        text.lm_head.weight[known:] = 1e4  # untrained rows must not count
        text.get_input_embeddings().weight[known:] = 1e4
    before = text.lm_head.weight[:known].clone()
    model = from_parts(vision_part(), text, sam_part(processor), processor)
    assert len(model.lm_head.weight) == max(known + padding, known + 4) == model.config.text_config.vocab_size
    assert torch.equal(model.lm_head.weight[:known], before)
    torch.testing.assert_close(model.lm_head.weight[known : known + 4], before.mean(0).expand(4, -1))
    assert_works(model, processor)


def test_a_tokenizer_that_knew_a_tag_already(tiny) -> None:
    """The mean is over all old rows, also when a control token lies among them."""
    processor = type("Processor", (), {"tokenizer": tiny.processor.tokenizer, "control_token_ids": [3, 400, 401, 402]})
    for name in ("image_token_id", "seg_token_id", "region_token_id"):
        setattr(processor, name, getattr(tiny.processor, name))
    text = text_part(tiny.processor)
    old = torch.cat([text.lm_head.weight[:3], text.lm_head.weight[4:400]]).clone()
    assert len(text.lm_head.weight) == 400
    model = from_parts(vision_part(), text, sam_part(tiny.processor), processor)
    torch.testing.assert_close(model.lm_head.weight[[3, 400, 403]], old.mean(0).expand(3, -1))


def test_unsuitable_parts_are_refused(tiny) -> None:
    processor = tiny.processor
    granite = text_part(processor, "granite", logits_scaling=8.0)
    with pytest.raises(ValueError, match="GraniteForCausalLM does more than one linear layer"):
        from_parts(vision_part(), granite, sam_part(processor), processor)
    with pytest.raises(ValueError, match="vision_tower must be a LlamaModel, got a LlamaForCausalLM"):
        from_parts(text_part(processor), text_part(processor), sam_part(processor), processor)
