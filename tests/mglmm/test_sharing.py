"""Folders and hub repositories: what is saved loads again, with the package and without it."""

import ast
import copy
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import EvalResult, ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline
from transformers.dynamic_module_utils import get_imports

import mglmm
from mglmm.hub_cards.cards import model_card
from mglmm.modeling_mglmm.configuration_mglmm import CUSTOM_PIPELINES
from mglmm.sharing import export
from mglmm.small.checkpoint import TRAINED
from tests.hub_server import TOKEN, HubServer, hub_server
from tests.mglmm.remote_code import TASK, answers
from tests.tiny import Tiny, picture, tiny_model

ROOT = Path(__file__).resolve().parents[2]
REMOTE_CODE = Path(__file__).with_name("remote_code.py")
SMALL_SHARDS = "100KB"  # the toy model becomes several files

ENTRIES = [
    "modeling_mglmm/configuration_mglmm.py",
    "modeling_mglmm/modeling_mglmm.py",
    "processing/processing_mglmm.py",
    "processing/pipeline_mglmm.py",
]
# What everybody has who runs a vision-language model with transformers.
COMES_ALONG = {"httpx2", "huggingface_hub", "numpy", "PIL", "tokenizers", "torch", "transformers"}


def code_files() -> dict[str, Path]:
    """Name to path of the entries and of all that they import, as Python sees it (transformers looks for a pattern)."""
    files: dict[str, Path] = {}
    waiting = [ROOT / entry for entry in ENTRIES]
    while waiting:
        path = waiting.pop()
        if path.name not in files:
            files[path.name] = path
            nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            siblings = [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.level]
            waiting += [path.with_name(f"{sibling}.py") for sibling in siblings]
    return files


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    picture().save(path)
    return path


@pytest.fixture(scope="module")
def folder(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy model and its processor, each saved by its own `save_pretrained`."""
    folder = tmp_path_factory.mktemp("saved") / "mglmm-tiny"
    copy.deepcopy(tiny.model).save_pretrained(folder, max_shard_size=SMALL_SHARDS)
    copy.deepcopy(tiny.processor).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def expected(tiny: Tiny, photo: Path) -> dict[str, np.ndarray]:
    pipe = pipeline(TASK, model=tiny.model, processor=tiny.processor, device="cpu")
    return answers(tiny.model, tiny.processor, pipe, photo)


def assert_equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert set(found) == set(expected)
    assert [name for name in expected if not np.array_equal(found[name], expected[name])] == []


def run_python(*arguments: object, home: Path, **environment: str) -> None:
    """A new process in an empty folder, with caches of its own."""
    env = {**os.environ, "HF_HOME": str(home / "hf"), "HF_HUB_DISABLE_XET": "1", **environment}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=home, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-5000:]


# ---------------------------------------------------------------------- folders


def test_save_pretrained_writes_weights_and_all_the_code(folder: Path) -> None:
    files = {path.name for path in folder.iterdir()}
    assert {name for name in files if name.endswith(".py")} == set(code_files())
    assert [name for name, path in code_files().items() if (folder / name).read_bytes() != path.read_bytes()] == []
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 2
    assert {"config.json", "model.safetensors.index.json", "processor_config.json", "chat_template.jinja"} <= files
    assert not list(folder.glob("*.bin")) + list(folder.glob("*.pt*"))


def test_the_folder_answers_the_same_where_the_package_is_not_installed(
    folder: Path, photo: Path, expected: dict[str, np.ndarray], tmp_path: Path
) -> None:
    run_python("-I", REMOTE_CODE, folder, photo, tmp_path, home=tmp_path)
    with np.load(tmp_path / "answers.npz") as found:
        assert_equal(dict(found), expected)
    assert expected["generated_masks"].shape == (3, 16, 16)  # the script of tokens did produce masks
    # What remote code saves is again a complete folder.
    again = tmp_path / "resaved"
    assert {path.name for path in again.glob("*.py")} == set(code_files())
    config, config_again = (json.loads((saved / "config.json").read_text()) for saved in (folder, again))
    assert [config_again[key] for key in ("auto_map", "custom_pipelines")] == [config["auto_map"], CUSTOM_PIPELINES]
    weights, weights_again = (mglmm.MglmmModel.from_pretrained(saved).state_dict() for saved in (folder, again))
    assert set(weights) == set(weights_again)
    assert [name for name in weights if not torch.equal(weights[name], weights_again[name])] == []
    assert type(AutoProcessor.from_pretrained(again)) is mglmm.MglmmProcessor


@pytest.mark.parametrize("trust", [None, True])  # with the package at hand, the copies are never run
def test_the_installed_package_wins_over_the_code_in_the_folder(
    folder: Path, photo: Path, expected: dict[str, np.ndarray], trust: bool | None
) -> None:
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=trust).eval()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=trust)
    pipe = pipeline(TASK, model=str(folder), trust_remote_code=trust, device="cpu")
    assert type(model) is mglmm.MglmmForConditionalGeneration
    assert type(processor) is mglmm.MglmmProcessor
    assert type(AutoConfig.from_pretrained(folder, trust_remote_code=trust)) is mglmm.MglmmConfig
    assert type(AutoModel.from_pretrained(folder, trust_remote_code=trust)) is mglmm.MglmmModel
    assert type(pipe).__module__ == "mglmm.processing.pipeline_mglmm"
    assert type(pipe.model) is mglmm.MglmmForConditionalGeneration
    assert [name for name in sys.modules if name.startswith("transformers_modules.")] == []
    assert_equal(answers(model, processor, pipe, photo), expected)


def test_the_configuration_names_the_pipeline_that_is_registered(folder: Path) -> None:
    saved = json.loads((folder / "config.json").read_text())
    assert saved["custom_pipelines"] == CUSTOM_PIPELINES
    assert saved["auto_map"] == {
        "AutoConfig": "configuration_mglmm.MglmmConfig",
        "AutoModel": "modeling_mglmm.MglmmModel",
        "AutoModelForImageTextToText": "modeling_mglmm.MglmmForConditionalGeneration",
    }
    from mglmm.processing.pipeline_mglmm import MglmmPipeline

    assert list(CUSTOM_PIPELINES) == [TASK]
    assert CUSTOM_PIPELINES[TASK]["impl"] == f"pipeline_mglmm.{MglmmPipeline.__name__}"


def test_saving_again_changes_nothing(folder: Path, tmp_path: Path) -> None:
    """Beyond the data types and the loading options that transformers writes down the first time it has loaded."""
    saved = []
    for source, target in (
        (folder, tmp_path / "a"),
        (tmp_path / "a", tmp_path / "b"),
        (tmp_path / "a", tmp_path / "b"),
    ):
        AutoModelForImageTextToText.from_pretrained(source).save_pretrained(target, max_shard_size=SMALL_SHARDS)
        AutoProcessor.from_pretrained(source).save_pretrained(target)
        saved.append({path.name: path.read_bytes() for path in target.iterdir()})
    assert [set(files) for files in saved] == [set(saved[0])] * 3
    assert [name for name in saved[0] if not saved[0][name] == saved[1][name] == saved[2][name]] == []


def test_copied_code_says_which_package_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what the copies need, only pycocotools does not come with transformers, torch and pillow."""
    named = {name for path in code_files().values() for name in get_imports(path)}
    assert named - sys.stdlib_module_names <= COMES_ALONG
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    spec = importlib.util.spec_from_file_location("copied_rle", folder / "rle.py")
    with pytest.raises(ImportError, match="pip install pycocotools"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_export_writes_a_card_beside_the_model(tiny: Tiny, tmp_path: Path) -> None:
    export(copy.deepcopy(tiny.model), copy.deepcopy(tiny.processor), tmp_path / "hats")
    card = ModelCard.load(tmp_path / "hats" / "README.md")
    assert card.text.lstrip().startswith("# hats\n")
    assert type(AutoProcessor.from_pretrained(tmp_path / "hats")) is mglmm.MglmmProcessor


def test_an_adapter_is_saved_and_loaded_alone(tiny: Tiny, tmp_path: Path) -> None:
    config = LoraConfig(target_modules=r"model\.language_model\..*q_proj", init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        wrapped = get_peft_model(tiny_model(tiny.processor), config).eval()
    wrapped.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    }
    ids = torch.arange(20)[None]
    with torch.no_grad():
        loaded = PeftModel.from_pretrained(tiny_model(tiny.processor), tmp_path).eval()
        assert torch.equal(loaded(input_ids=ids).logits, wrapped(input_ids=ids).logits)
        assert not torch.equal(loaded(input_ids=ids).logits, tiny.model(input_ids=ids).logits)


# ---------------------------------------------------------------------- hub

PUSH = """
import json, sys
from huggingface_hub import HfApi, ModelCard
from transformers.utils import logging
import mglmm

folder, token, output = sys.argv[1:]
model = mglmm.MglmmForConditionalGeneration.from_pretrained(folder)
processor = mglmm.MglmmProcessor.from_pretrained(folder)
seen = []

def look():
    card = ModelCard.load("me/hats", token=token)
    seen.append({"files": HfApi(token=token).list_repo_files("me/hats"), "card": str(card)})

processor.push_to_hub("hats", token=token)  # transformers adds a card of its own
look()
model.push_to_hub("hats", token=token)
look()
card = ModelCard.load("me/hats", token=token)
card.text += "\\nTrained on my own hats."
card.push_to_hub("me/hats", token=token)
model.push_to_hub("me/hats", processor=processor, token=token, max_shard_size="100KB", tags=["hats"])
look()
with open(output, "w") as file:
    json.dump(seen, file)
"""


@pytest.fixture(scope="module")
def hub(folder: Path, tmp_path_factory: pytest.TempPathFactory):
    """A hub to which the toy model was pushed as `me/hats`, and what the repository held after each push."""
    home = tmp_path_factory.mktemp("push")
    with hub_server() as server:
        environment = {"HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0", "PYTHONPATH": str(ROOT)}
        run_python("-c", PUSH, folder, TOKEN, home / "seen.json", home=home, **environment)
        yield server, json.loads((home / "seen.json").read_text())


def test_a_push_replaces_the_empty_card_and_keeps_a_written_one(hub: tuple[HubServer, list[dict]]) -> None:
    after_processor, after_model, after_words = (ModelCard(seen["card"]) for seen in hub[1])
    assert "automatically generated" in after_processor.text
    assert after_model.text.lstrip().startswith("# hats\n")
    assert 'model="me/hats"' in after_model.text
    assert after_model.data.library_name == "transformers"
    assert after_model.data.pipeline_tag == "image-text-to-text"
    assert after_model.data.tags == ["mglmm", "image-segmentation", "grounded-captioning"]
    assert after_words.text.rstrip().endswith("Trained on my own hats.")
    assert after_words.data.tags == ["mglmm", "image-segmentation", "grounded-captioning", "hats"]


def test_a_push_with_smaller_shards_removes_the_old_weights(hub: tuple[HubServer, list[dict]]) -> None:
    server, seen = hub
    _, whole, sharded = ({name for name in repository["files"] if name.endswith(".safetensors")} for repository in seen)
    assert whole == {"model.safetensors"}
    index = json.loads(server.repositories["me/hats"].files["model.safetensors.index.json"])
    assert len(sharded) > 2
    assert sharded == set(index["weight_map"].values())  # `from_pretrained` would prefer `model.safetensors`


def test_a_pushed_model_loads_back_where_the_package_is_not_installed(
    hub: tuple[HubServer, list[dict]], photo: Path, expected: dict[str, np.ndarray], tmp_path: Path
) -> None:
    server, _ = hub
    environment = {"HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0"}
    run_python("-I", REMOTE_CODE, "me/hats", photo, tmp_path, home=tmp_path, **environment)
    with np.load(tmp_path / "answers.npz") as found:
        assert_equal(dict(found), expected)
    read = {path for method, path in server.requests if method == "GET"}
    assert "/me/hats/resolve/" in str(read) and "model-00001-of" in str(read)


# ---------------------------------------------------------------------- card


def test_results_on_two_datasets_are_not_listed_as_of_one(tiny: Tiny) -> None:
    results = [EvalResult("image-segmentation", "photos", name, "giou", 0.5) for name in ("Cars", "Scenes")]
    with pytest.raises(
        ValueError, match="results on Cars and Scenes as of one dataset: give them another dataset_type"
    ):
        model_card(tiny.model, model_name="hats", metrics=results)
    results[1].dataset_config = "scenes"
    again = ModelCard(str(model_card(tiny.model, model_name="hats", metrics=results)))
    assert [result.dataset_name for result in again.data.eval_results] == ["Cars", "Scenes"]


def test_the_small_checkpoints_card_lists_the_results_of_its_table() -> None:
    card = ModelCard.load(TRAINED / "README.md")
    table = re.findall(r"^\| (.+) \(held out\) \| (.+) \| ([\d.]+) \|$", card.text, re.MULTILINE)
    assert len(table) > 5 and table == [
        (result.dataset_name, result.metric_name, str(result.metric_value)) for result in card.data.eval_results
    ]


def test_the_card_says_what_was_given_and_nothing_else(tiny: Tiny) -> None:
    result = EvalResult("image-segmentation", "me/photos", "Photos", "giou", 0.75, dataset_split="val")
    card = model_card(
        tiny.model,
        tiny.processor,
        model_name="hats",
        base_model=["a/tower", "b/llm"],
        datasets=["me/photos"],
        license="apache-2.0",
        trained=["mask_decoder", "mask_projector"],
        training="Two epochs.",
        metrics=[result],
        limits=["Only hats."],
    )
    again = ModelCard(str(card))
    assert (again.data.base_model, again.data.datasets, again.data.license) == (
        ["a/tower", "b/llm"],
        ["me/photos"],
        "apache-2.0",
    )
    (found,) = again.data.eval_results
    assert (found.dataset_name, found.dataset_split, found.metric_type, found.metric_value) == (
        "Photos",
        "val",
        "giou",
        0.75,
    )
    assert again.data.model_name == "hats"
    text = again.text
    assert "| `vision_tower` | `clip_vision_model` | 44,768 | no |\n" in text
    assert "| `mask_decoder` | SamMaskDecoder | 40,608 | yes |\n" in text
    assert "| Photos (val) | giou | 0.75 |\n" in text
    for line in ("## Training\n\nTwo epochs.", "- Only hats.", "28 x 28 pixels and becomes 4 tokens", "16 x 16 cells"):
        assert line in text, line

    bare = str(model_card(tiny.model, model_name="hats"))
    assert "| `vision_tower` | `clip_vision_model` | 44,768 |\n" in bare
    assert "No results were reported" in bare and "No licence was stated" in bare
    assert "## Training" not in bare and "base_model" not in bare and "model-index" not in bare


def test_a_head_tied_to_the_embeddings_is_counted_once(tiny: Tiny) -> None:
    text_config = {**tiny.model.config.text_config.to_dict(), "tie_word_embeddings": True}
    card = str(model_card(tiny_model(tiny.processor, text_config=text_config), model_name="hats"))
    assert "`language_model`" in card and "`lm_head`" not in card


@pytest.mark.parametrize(
    "trained",
    [
        ["mask_decoder", "neck"],  # no such part
        ["vision_tower"],  # its encoder runs without gradients
        ["pixel_neck"],  # this model has none
    ],
)
def test_a_card_names_no_part_as_trained_that_cannot_be(tiny: Tiny, trained: list[str]) -> None:
    with pytest.raises(ValueError, match=re.escape(f"trained names ['{trained[-1]}']")):
        model_card(tiny.model, model_name="hats", trained=trained)


def test_the_code_in_the_card_runs(
    tiny: Tiny, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    picture().save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    card = model_card(tiny.model, tiny.processor, model_name="hats", repo_id=str(folder))
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    assert len(code.strip().splitlines()) <= 6
    exec(code, {})
    assert capsys.readouterr().out.strip()
    assert (tmp_path / "answer.png").is_file()
