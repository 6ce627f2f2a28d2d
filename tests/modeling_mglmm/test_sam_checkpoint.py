"""Original SAM checkpoints: converted outputs against the `segment_anything` package, inferred sizes, refusals."""

import importlib.util
import json
import os
import pickle
import sys
import types
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import SamConfig, SamImageProcessorPil, SamMaskDecoderConfig, SamModel, SamVisionConfig

from mglmm.modeling_mglmm.sam_checkpoint import convert_sam_state_dict, load_sam_checkpoint

GOLDEN = Path(__file__).parents[2].parent / "shared" / "golden" / "glamm"

# Most sizes differ from the defaults and from each other. A grid of 6 with windows of 4 makes padded windows.
SMALL = {
    "image_size": 96,
    "patch_size": 16,
    "embed_dim": 48,
    "depth": 4,
    "num_heads": 4,
    "mlp_ratio": 3,
    "window_size": 4,
    "global_attn_indexes": [1, 3],
    "prompt_embed_dim": 32,
    "mask_in_chans": 16,
    "decoder_depth": 2,
    "decoder_heads": 8,
    "decoder_mlp_dim": 40,
    "num_multimask_outputs": 3,
    "iou_depth": 3,
    "iou_hidden": 24,
}


@pytest.fixture(scope="module")
def segment_anything() -> Iterator[types.ModuleType]:
    """The original package, without its `__init__`, which imports torchvision."""
    spec = importlib.util.find_spec("segment_anything")
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip("the segment_anything package is not installed")
    package = types.ModuleType("segment_anything")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules["segment_anything"] = package
    importlib.import_module("segment_anything.build_sam")
    yield package
    for name in [name for name in sys.modules if name.partition(".")[0] == "segment_anything"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def build(segment_anything: types.ModuleType) -> Callable[..., nn.Module]:
    """Builds an original `Sam` of the sizes `SMALL`, some replaced, with weights that make every tensor matter."""
    original = importlib.import_module("segment_anything.modeling")

    def build_sam(**replaced: Any) -> nn.Module:
        sizes = SMALL | replaced
        grid, image = sizes["image_size"] // sizes["patch_size"], sizes["image_size"]
        torch.manual_seed(0)
        sam = original.Sam(
            image_encoder=original.ImageEncoderViT(
                img_size=image,
                patch_size=sizes["patch_size"],
                embed_dim=sizes["embed_dim"],
                depth=sizes["depth"],
                num_heads=sizes["num_heads"],
                mlp_ratio=sizes["mlp_ratio"],
                out_chans=sizes["prompt_embed_dim"],
                norm_layer=partial(nn.LayerNorm, eps=1e-6),
                use_rel_pos=True,
                window_size=sizes["window_size"],
                global_attn_indexes=sizes["global_attn_indexes"],
            ),
            prompt_encoder=original.PromptEncoder(
                embed_dim=sizes["prompt_embed_dim"],
                image_embedding_size=(grid, grid),
                input_image_size=(image, image),
                mask_in_chans=sizes["mask_in_chans"],
            ),
            mask_decoder=original.MaskDecoder(
                num_multimask_outputs=sizes["num_multimask_outputs"],
                transformer=original.TwoWayTransformer(
                    depth=sizes["decoder_depth"],
                    embedding_dim=sizes["prompt_embed_dim"],
                    mlp_dim=sizes["decoder_mlp_dim"],
                    num_heads=sizes["decoder_heads"],
                ),
                transformer_dim=sizes["prompt_embed_dim"],
                iou_head_depth=sizes["iou_depth"],
                iou_head_hidden_dim=sizes["iou_hidden"],
            ),
        ).eval()
        with torch.no_grad():
            for parameter in sam.parameters():  # norms and biases too, else swapped ones would go unnoticed
                parameter.add_(0.1 * torch.randn_like(parameter))
        return sam

    return build_sam


@pytest.fixture
def sam(build: Callable[..., nn.Module]) -> nn.Module:
    return build()


def assert_equal(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.std() > 1e-3, "outputs this flat would hide an error"
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def assert_same_outputs(model: SamModel, sam: nn.Module) -> None:
    """Compares two images with three prompts each through every part of the two models."""
    grid, image = sam.prompt_encoder.image_embedding_size[0], sam.image_encoder.img_size
    channels = sam.prompt_encoder.embed_dim
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(2, 3, image, image, generator=generator)
    points = torch.rand(2, 3, 2, 2, generator=generator) * image
    labels = torch.tensor([[[1, 0], [1, 1], [0, 1]], [[1, -1], [0, 0], [1, -1]]])
    corners = torch.rand(2, 3, 2, 2, generator=generator) * image
    boxes = torch.cat([corners.amin(2), corners.amax(2)], dim=-1)
    mask = torch.randn(1, 1, 4 * grid, 4 * grid, generator=generator)
    text = torch.randn(3, 1, channels, generator=generator)

    embeddings = sam.image_encoder(pixels)
    assert_equal(model.get_image_embeddings(pixels), embeddings)
    positions = sam.prompt_encoder.get_dense_pe()
    assert_equal(model.get_image_wide_positional_embeddings(), positions)

    cases = (  # prompts of the original for image i, prompts of transformers for both images
        (lambda i: {"points": (points[i], labels[i])}, {"input_points": points, "input_labels": labels}),
        (lambda i: {"boxes": boxes[i]}, {"input_boxes": boxes}),
        (
            lambda i: {"points": (points[i], labels[i]), "boxes": boxes[i]},
            {"input_points": points, "input_labels": labels, "input_boxes": boxes},
        ),
        (
            lambda i: {"points": (points[i], labels[i]), "masks": mask},
            {"input_points": points, "input_labels": labels, "input_masks": mask},
        ),
    )
    for original_prompts, prompts in cases:
        for multimask in (False, True):
            outputs = model(image_embeddings=embeddings, multimask_output=multimask, **prompts)
            for i in range(2):
                given = {"points": None, "boxes": None, "masks": None} | original_prompts(i)
                sparse, dense = sam.prompt_encoder(**given)
                logits, scores = sam.mask_decoder(embeddings[i : i + 1], positions, sparse, dense, multimask)
                assert_equal(outputs.pred_masks[i], logits)
                assert_equal(outputs.iou_scores[i], scores)

    # A text prompt: one token per mask; three masks over images 1, 0, 1 in one call.
    index = torch.tensor([1, 0, 1])
    _, dense = model.prompt_encoder(input_points=None, input_labels=None, input_boxes=None, input_masks=None)
    masks, scores = model.mask_decoder(
        embeddings[index], model.get_image_wide_positional_embeddings(), text[:, None], dense, multimask_output=False
    )
    for row, i in enumerate(index.tolist()):
        _, no_mask = sam.prompt_encoder(points=None, boxes=None, masks=None)
        logits, score = sam.mask_decoder(embeddings[i : i + 1], positions, text[row : row + 1], no_mask, False)
        assert_equal(masks[row], logits)
        torch.testing.assert_close(scores[row], score, atol=1e-5, rtol=0)

    original_size, reshaped_size = (50, 75), (image * 50 // 75, image)
    (processed,) = SamImageProcessorPil().post_process_masks(
        masks[:1], [original_size], [reshaped_size], binarize=False, pad_size={"height": image, "width": image}
    )
    assert_equal(processed, sam.postprocess_masks(masks[0], reshaped_size, original_size))


@pytest.mark.parametrize(
    "replaced",
    [
        {},
        {"window_size": 6},  # a window as large as the grid: no block differs from a global one
        {"global_attn_indexes": [0, 1, 2, 3]},  # no windows at all
        {"patch_size": 8, "window_size": 5, "mlp_ratio": 2.5, "mask_in_chans": 8, "depth": 3, "num_heads": 6},
        {"decoder_depth": 3, "num_multimask_outputs": 2, "iou_depth": 4, "prompt_embed_dim": 64},
        {"iou_depth": 2, "num_multimask_outputs": 4},  # an IoU head without inner layers
    ],
)
@torch.no_grad()
def test_outputs_equal_the_original(build: Callable[..., nn.Module], tmp_path: Path, replaced: dict[str, Any]) -> None:
    sam = build(**replaced)
    torch.save(sam.state_dict(), tmp_path / "sam.pth")
    assert_same_outputs(load_sam_checkpoint(tmp_path / "sam.pth"), sam)


@torch.no_grad()
def test_golden_checkpoint_equals_the_original(build: Callable[..., nn.Module]) -> None:
    path = GOLDEN / "sam_vit_h_tiny.pth"
    if not path.is_file():
        pytest.skip(f"needs the golden file {path.name}")
    sam = build(**json.loads((GOLDEN / "sam_config.json").read_text()))
    sam.load_state_dict(torch.load(path, weights_only=True))
    model = load_sam_checkpoint(path)
    pixels = torch.randn(1, 3, 1024, 1024, generator=torch.Generator().manual_seed(2))
    embeddings = sam.image_encoder(pixels)  # values up to 3, sums over 4096 patches: hence the relative tolerance
    torch.testing.assert_close(model.get_image_embeddings(pixels), embeddings, atol=1e-5, rtol=1e-5)
    boxes = torch.tensor([[[100.0, 200.0, 600.0, 900.0], [0.0, 0.0, 1023.0, 500.0]]])
    sparse, dense = sam.prompt_encoder(points=None, boxes=boxes[0], masks=None)
    logits, scores = sam.mask_decoder(embeddings, sam.prompt_encoder.get_dense_pe(), sparse, dense, True)
    outputs = model(image_embeddings=embeddings, input_boxes=boxes)
    torch.testing.assert_close(outputs.pred_masks[0], logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(outputs.iou_scores[0], scores, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("size", "vision", "tensors", "elements"),
    [
        ("vit_b", (768, 12, 12, [2, 5, 8, 11]), 314, 93_735_728),
        ("vit_l", (1024, 24, 16, [5, 11, 17, 23]), 482, 312_343_088),
        ("vit_h", (1280, 32, 16, [7, 15, 23, 31]), 594, 641_090_864),
    ],
)
def test_published_sizes_are_inferred(
    segment_anything: types.ModuleType,
    size: str,
    vision: tuple[int, int, int, list[int]],
    tensors: int,
    elements: int,
) -> None:
    with torch.device("meta"):
        state_dict = segment_anything.build_sam.sam_model_registry[size]().state_dict()
    assert len(state_dict) == tensors
    assert sum(tensor.numel() for tensor in state_dict.values()) == elements

    config, weights = convert_sam_state_dict(state_dict)
    hidden_size, depth, heads, global_attn_indexes = vision
    expected = SamConfig(
        vision_config=SamVisionConfig(
            hidden_size=hidden_size,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            global_attn_indexes=global_attn_indexes,
        ),
        mask_decoder_config=SamMaskDecoderConfig(layer_norm_eps=1e-5),
    )
    assert config.to_dict() == expected.to_dict()
    assert len(weights) == tensors + 1  # the positional encoding has two names


def test_prefix_selects_a_sam_inside_a_bigger_checkpoint(sam: nn.Module) -> None:
    alone = sam.state_dict()
    inside = {f"model.visual_model.{name}": tensor for name, tensor in alone.items()}
    inside["model.embed_tokens.weight"] = torch.zeros(3, 2)
    config, weights = convert_sam_state_dict(inside, prefix="model.visual_model.")
    expected_config, expected = convert_sam_state_dict(alone)
    assert config.to_dict() == expected_config.to_dict()
    assert weights.keys() == expected.keys()
    assert all(weights[name] is expected[name] for name in weights)


@torch.no_grad()
def test_loaded_model_is_tied_evaluating_and_owns_its_weights(sam: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "sam.pth"
    torch.save(sam.state_dict(), path)
    before = path.read_bytes()
    model = load_sam_checkpoint(path, dtype=torch.bfloat16)
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.prompt_encoder.shared_embedding.positional_embedding is (
        model.shared_image_embedding.positional_embedding
    )
    full = load_sam_checkpoint(path)
    for parameter in full.parameters():
        parameter.zero_()
    assert path.read_bytes() == before
    full.save_pretrained(tmp_path / "saved")
    assert not any(parameter.any() for parameter in SamModel.from_pretrained(tmp_path / "saved").parameters())


def swap(state_dict: dict[str, Any], one: str, other: str) -> dict[str, Any]:
    return state_dict | {one: state_dict[other], other: state_dict[one]}


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        (
            lambda d: {k: v for k, v in d.items() if k != "mask_decoder.transformer.norm_final_attn.bias"},
            ["of 202 tensors, 1 missing (mask_decoder.transformer.norm_final_attn.bias).", "damaged SAM with 4 image"],
        ),
        (  # a tensor from which a size is read is missing
            lambda d: {k: v for k, v in d.items() if k != "mask_decoder.iou_token.weight"},
            ["mask_decoder.iou_token.weight is missing", "It has 201 entries"],
        ),
        (  # two tensors changed places
            lambda d: swap(d, "image_encoder.neck.0.weight", "image_encoder.neck.2.weight"),
            [
                "2 of the wrong shape",
                "image_encoder.neck.0.weight (32, 32, 3, 3) instead of (32, 48, 1, 1)",
                "image_encoder.neck.2.weight (32, 48, 1, 1) instead of (32, 32, 3, 3)",
            ],
        ),
        (  # transposed
            lambda d: d | {"mask_decoder.transformer.layers.1.mlp.lin2.weight": torch.zeros(40, 32)},
            ["1 of the wrong shape (mask_decoder.transformer.layers.1.mlp.lin2.weight (40, 32) instead of (32, 40))"],
        ),
        (  # wrong number of dimensions where a size is read
            lambda d: d | {"image_encoder.pos_embed": torch.zeros(1, 36, 48)},
            ["image_encoder.pos_embed has shape (1, 36, 48), not 4 dimensions"],
        ),
        (
            lambda d: d | {"image_encoder.pos_embed": torch.zeros(1, 6, 5, 48)},
            ["must be square, not 6x5 patches of 16x16 px"],
        ),
        (
            lambda d: d | {"image_encoder.blocks.2.attn.rel_pos_h": torch.zeros(5, 12)},
            ["several window sizes: [3, 4]"],
        ),
        (  # a positional encoding for another width
            lambda d: d | {"prompt_encoder.pe_layer.positional_encoding_gaussian_matrix": torch.zeros(2, 10)},
            ["differ in width: 32, 32, 32 and 20"],
        ),
        (  # a head size that does not divide the width
            lambda d: d | {"image_encoder.blocks.0.attn.rel_pos_h": torch.zeros(7, 13)},
            ["hidden size 48 is no multiple of the head size 13"],
        ),
        (  # more than five of a kind
            lambda d: d | {f"extra.{i}": torch.zeros(1) for i in range(7)},
            ["7 unexpected (extra.0, extra.1, extra.2, extra.3, extra.4 and 2 more)"],
        ),
        (
            lambda d: d | {"mask_decoder.hf_token.weight": torch.zeros(1, 32)},
            ["1 unexpected (mask_decoder.hf_token.weight)", "It seems to be HQ-SAM"],
        ),
        (
            lambda d: {"model": {"image_encoder.trunk.pos_embed": torch.zeros(1)}},
            ["image_encoder.pos_embed is missing", "It seems to be SAM 2"],
        ),
        (lambda d: convert_sam_state_dict(d)[1], ["load it with SamModel.from_pretrained"]),
        (lambda d: {"model": d, "optimizer": {}}, ["dictionaries (model, optimizer), one of which may hold"]),
        (lambda d: {f"module.{k}": v for k, v in d.items()}, ["It holds a SAM under the prefix 'module.'"]),
        (lambda d: {}, ["It has 0 entries"]),
    ],
)
def test_other_tensors_are_refused(
    sam: nn.Module, tmp_path: Path, change: Callable[[dict[str, Any]], dict[str, Any]], messages: list[str]
) -> None:
    torch.save(change(dict(sam.state_dict())), tmp_path / "other.pth")
    with pytest.raises(ValueError) as caught:
        load_sam_checkpoint(tmp_path / "other.pth")
    for message in [str(tmp_path / "other.pth"), *messages]:
        assert message in str(caught.value)


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.path),)


def test_code_in_a_file_is_refused_not_executed(tmp_path: Path) -> None:
    hacked = tmp_path / "hacked"
    path = tmp_path / "sam.pth"
    torch.save({"image_encoder.pos_embed": Malicious(hacked)}, path)
    with pytest.raises(ValueError, match="would execute code when loaded"):
        load_sam_checkpoint(path)
    path.write_bytes(pickle.dumps(Malicious(hacked)))
    with pytest.raises(ValueError, match="would execute code when loaded"):
        load_sam_checkpoint(path)
    assert not hacked.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read as plain tensors"),
        (b"version https://git-lfs.github.com/spec/v1\n", "cannot be read as plain tensors"),  # a pointer, not the file
        ([torch.zeros(1)], "holds a list, not a dictionary of tensors"),
        ({0: torch.zeros(1)}, "holds a dict, not a dictionary of tensors by their names"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "sam.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=message):
        load_sam_checkpoint(path)


def test_truncated_file_is_refused(sam: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "sam.pth"
    torch.save(sam.state_dict(), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="incomplete download"):
        load_sam_checkpoint(path)


def test_missing_file_keeps_its_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_sam_checkpoint(tmp_path / "absent.pth")
