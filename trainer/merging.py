"""`mglmm merge ADAPTER OUTPUT`: an adapter and its base become one plain checkpoint."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

from huggingface_hub import ModelCard
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from peft.utils import load_peft_weights
from peft.utils.constants import DUMMY_TARGET_MODULES
from transformers import PreTrainedConfig
from transformers.utils import CONFIG_NAME, PROCESSOR_NAME, cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from mglmm.hub_cards.cards import model_card
from mglmm.modeling_mglmm import MglmmConfig, MglmmForConditionalGeneration
from mglmm.processing import MglmmProcessor

from .checks import examine

CARD = "README.md"
TRAINING_SECTION = re.compile(r"^## Training\n(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)  # of a card of this package
IMAGE = re.compile(r"!\[[^\]]*\]\([^)]*\)")  # a curve, which stays in the adapter's folder
FROZEN_PARTS = ("prompt_encoder",)  # saved with an adapter, not trained


def merge(adapter: str, output: Path, base: str | None = None) -> Path:
    """
    Writes a checkpoint that `from_pretrained` loads without PEFT: model, processor, generation config and card.

    Args:
        adapter: Folder or hub id of what a run wrote.
        output: Folder to make. It appears when all of it is written.
        base: Folder or hub id of the adapter's base; by default the one that its `adapter_config.json` names. The merged
            weights have its dtypes; those of modules that were trained in full are float32.

    Raises:
        FileExistsError: `output` is there already and not empty.
        FileNotFoundError: there is no such adapter or base.
        ValueError: `adapter` is no adapter, `base` no MGLMM model, the two do not fit, or a check of `mglmm doctor` fails.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output} exists and is not empty: name another folder for the merged model")
    config = _adapter_config(adapter)
    base = base or config.base_model_name_or_path
    if not base:
        raise ValueError(f"{adapter} does not say to which model it belongs: name it with --base")
    model = _apply(_load_base(base), adapter, base)
    source = adapter if _file(adapter, PROCESSOR_NAME) is not None else base
    processor = MglmmProcessor.from_pretrained(source)
    if failed := [check for check in examine(model, processor, trained=False) if not check.ok]:
        found = "; ".join(f"{check.name}: {check.message}" for check in failed)
        raise ValueError(f"the adapter {adapter} and the base {base} give no sound model: {found}")
    card = _card(model, processor, output.resolve().name, adapter, config, base)

    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as folder:
        partial = Path(folder) / "merged"  # inside, because a temporary directory is private to its user
        model.save_pretrained(partial)
        processor.save_pretrained(partial)
        card.save(partial / CARD)
        if output.exists():
            output.rmdir()
        partial.replace(output)
    return output


def _file(name: str, filename: str) -> str | None:
    """Path of a file of a folder or of a repository of the Hub, `None` if it is not there."""
    return cached_file(
        name,
        filename,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )


def _require_folder(name: str, remedy: str) -> None:
    if name.startswith(("/", ".", "~")) and not Path(name).is_dir():
        raise FileNotFoundError(f"there is no folder {name!r}: {remedy}")


def _adapter_config(adapter: str) -> LoraConfig:
    _require_folder(adapter, "name the output folder of a run, or its hub id")
    if find_adapter_config_file(adapter) is None:
        plain = _file(adapter, CONFIG_NAME) is not None
        remedy = "it is a plain checkpoint, with nothing to merge" if plain else "name the output folder of a run"
        raise ValueError(f"{adapter} is no adapter, it has no adapter_config.json: {remedy}")
    config = PeftConfig.from_pretrained(adapter)
    if not isinstance(config, LoraConfig):
        raise ValueError(
            f"{adapter} is an adapter of type {config.peft_type}: only those of `mglmm train` can be merged"
        )
    return config


def _load_base(base: str) -> MglmmForConditionalGeneration:
    _require_folder(base, "the adapter's base is not there, name where it is with --base")
    try:
        kind = PreTrainedConfig.get_config_dict(base)[0].get("model_type")
        if kind == MglmmConfig.model_type:
            return MglmmForConditionalGeneration.from_pretrained(base)
    except OSError as error:
        reason = " ".join(str(error).split())[:200]
        raise FileNotFoundError(
            f"the base {base!r} cannot be loaded: name where it is with --base ({reason})"
        ) from error
    raise ValueError(
        f"the base {base!r} is a model of type {kind!r}, not {MglmmConfig.model_type!r}: name it with --base"
    )


def _apply(model: MglmmForConditionalGeneration, adapter: str, base: str) -> MglmmForConditionalGeneration:
    """The model with the adapter's weights in place of its own; `ValueError` unless they are exactly those it can take."""
    misfit = f"the adapter {adapter} and the base {base} do not fit"
    try:
        peft_model = PeftModel.from_pretrained(model, adapter)
    except (IndexError, KeyError, RuntimeError, ValueError) as error:  # as PEFT happens to notice it
        raise ValueError(f"{misfit}: {' '.join(str(error).split())[:200]} (another --base?)") from error
    # A weight that one of the two lacks is passed over by PEFT, with a warning at most.
    saved, wanted = load_peft_weights(adapter, device="cpu").keys(), get_peft_model_state_dict(peft_model).keys()
    if saved != wanted:
        raise ValueError(
            f"{misfit}: {len(wanted - saved)} weights that the model needs are not in the adapter and {len(saved - wanted)} "
            f"of the adapter are not in the model, such as {min(wanted ^ saved)} (another --base?)"
        )
    return peft_model.merge_and_unload(safe_merge=True)  # raises for NaN


def _card(
    model: MglmmForConditionalGeneration,
    processor: MglmmProcessor,
    name: str,
    adapter: str,
    config: LoraConfig,
    base: str,
) -> ModelCard:
    """What is known of data and parts from the cards of adapter and base, and of training from the adapter itself."""
    adapter_card = _read_card(adapter)
    in_full = [part for part in config.modules_to_save or [] if part not in FROZEN_PARTS]
    what = [*(["LoRA on the language model"] if config.target_modules != DUMMY_TARGET_MODULES else [])]
    what += ["the rows of the new tokens"] if config.trainable_token_indices else []
    training = f"Trained: {', '.join([*what, *in_full])}."
    if adapter_card and (section := TRAINING_SECTION.search(adapter_card.text)):
        training = IMAGE.sub("", section[1]).strip()
    has_head = config.trainable_token_indices and not model.config.tie_word_embeddings
    trained = [*in_full, *(["language_model"] if what else []), *(["lm_head"] if has_head else [])]
    return model_card(
        model,
        processor,
        model_name=name,
        base_model=parents_of(base),
        datasets=(adapter_card.data.get("datasets") if adapter_card else None) or [],
        trained=trained,
        training=f"{training}\n\nThe adapter was then merged into its base, `{public_name(base)}`.",
    )


def parents_of(model: str) -> list[str]:
    """Hub ids for a card: the model's own, or for a path, which nobody else has, what its card says it was made of."""
    if not Path(model).exists():
        return [model]
    card = _read_card(model) if Path(model).is_dir() else None
    parents = (card.data.get("base_model") if card else None) or []
    return [parents] if isinstance(parents, str) else parents


def public_name(model: str) -> str:
    """Hub id, or name of a folder or file without where it lies."""
    return Path(model).name if Path(model).exists() else model


def _read_card(name: str) -> ModelCard | None:
    path = _file(name, CARD)
    return None if path is None else ModelCard.load(path)
