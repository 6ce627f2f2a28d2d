"""Saving a model with its processor and card as one folder, and sharing it on the Hub."""

from __future__ import annotations

import tempfile
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError

from mglmm.hub_cards.cards import model_card
from mglmm.modeling_mglmm import MglmmForConditionalGeneration
from mglmm.processing import MglmmProcessor

# transformers' own card for a push without one; it says nothing, so ours takes its place.
GENERIC_CARD = "This model card has been automatically generated."


def export(
    model: MglmmForConditionalGeneration,
    processor: MglmmProcessor,
    folder: str | Path,
    *,
    card: ModelCard | None = None,
    max_shard_size: int | str = "5GB",
) -> None:
    """
    Writes a folder to load, copy or upload: weights as safetensors, configuration, processor, code and card.

    The folder loads with `from_pretrained`, or with `trust_remote_code=True` where `mglmm` is not installed.

    Args:
        card: From `mglmm.hub_cards.cards.model_card`; by default one that states what the configuration says.
        max_shard_size: Of one weight file, as in `save_pretrained`.
    """
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    processor.save_pretrained(folder)
    card = card or model_card(model, processor, model_name=Path(folder).resolve().name)
    card.save(Path(folder) / "README.md")


def push_to_hub(
    model: MglmmForConditionalGeneration,
    repo_id: str,
    processor: MglmmProcessor | None = None,
    *,
    card: ModelCard | None = None,
    commit_message: str = "Upload MGLMM",
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str = "5GB",
    tags: list[str] | None = None,
) -> CommitInfo:
    """
    Uploads the model, its code, a card and, if given, the processor in one commit; also a method of the model.

    Args:
        repo_id: "name" or "owner/name"; created if it does not exist.
        processor: Its `MglmmProcessor`. Without it the processor is shared with `processor.push_to_hub(repo_id)`.
        card: From `mglmm.hub_cards.cards.model_card`; replaces the repository's. By default a card that somebody wrote
            is kept, and a repository without one gets what the configuration says.
        private, token, revision, create_pr, commit_message, commit_description, max_shard_size, tags:
            As in transformers' `push_to_hub`.

    Raises:
        huggingface_hub.errors.HfHubHTTPError: if the Hub refuses, for example without a token that may write.
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    card = card or _written_card(api, repo_id)
    card = card or model_card(model, processor, model_name=repo_id.partition("/")[2], repo_id=repo_id)
    card.data["tags"] = list(dict.fromkeys([*(card.data["tags"] or []), *(tags or [])]))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        if processor is not None:
            processor.save_pretrained(folder)
        card.save(Path(folder) / "README.md")
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message,
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
            # A weight file of an earlier push with other shard sizes would win over the new ones.
            delete_patterns=["model.safetensors", "model-*.safetensors", "model.safetensors.index.json"],
        )


def _written_card(api: HfApi, repo_id: str) -> ModelCard | None:
    """The card of the repository, unless there is none or nobody wrote it."""
    try:
        card = ModelCard.load(api.hf_hub_download(repo_id, "README.md"))
    except EntryNotFoundError:
        return None
    return None if GENERIC_CARD in card.text else card
