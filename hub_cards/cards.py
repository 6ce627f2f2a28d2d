"""Cards of models and data sets: metadata for the Hub and a text that says what is known, no more."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers
from datasets import DatasetInfo, Features, SplitDict, SplitInfo, Value
from datasets.info import DatasetInfosDict
from huggingface_hub import DatasetCard, DatasetCardData, EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedModel, ProcessorMixin

TAGS = ("mglmm", "image-segmentation", "grounded-captioning")
# The encoders of images run without gradients in this architecture, whatever is trained around them.
FROZEN = ("vision_tower", "pixel_encoder")
SIZE_CATEGORIES = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B")


def model_card(
    model: PreTrainedModel,
    processor: ProcessorMixin | None = None,
    *,
    model_name: str,
    repo_id: str | None = None,
    base_model: Sequence[str] = (),
    datasets: Sequence[str] = (),
    language: str | Sequence[str] = "en",
    license: str | None = None,
    trained: Sequence[str] = (),
    training: str = "",
    source: str = "",
    metrics: Sequence[EvalResult] = (),
    limits: Sequence[str] = (),
) -> ModelCard:
    """
    The card of a checkpoint.

    Args:
        model: `MglmmForConditionalGeneration`.
        processor: Its `MglmmProcessor`; adds the image sizes and the context length.
        model_name: Title, and the name of the results' model.
        repo_id: Folder or hub id in the usage example, `model_name` by default.
        base_model, datasets: Hub ids of the pretrained parts and of the training data.
        language: ISO 639-1 code(s) of the text.
        license: Identifier that the Hub knows, such as "apache-2.0".
        trained: Names of the parts that training changed, as in the card's table of parts.
        training: Markdown on data, steps and hardware.
        source: Markdown on where weights come from that were imported.
        metrics: Results, each with the data it was measured on.
        limits: Sentences on what this checkpoint cannot do, beside those of the architecture.

    Raises:
        ValueError: if `trained` names a part that the model does not have or that is never trained, or if `metrics` call
            data by several names that the Hub takes for one.
    """
    parts = _parts(model, trained)
    _check_names(metrics)
    data = ModelCardData(
        model_name=model_name if metrics else None,  # the name under which the Hub lists the results
        base_model=list(base_model) or None,
        datasets=list(datasets) or None,
        language=language if isinstance(language, str) else list(language),
        license=license,
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=list(TAGS),
        eval_results=list(metrics) or None,
    )
    return ModelCard.from_template(
        data,
        template_path=str(Path(__file__).with_name("model_card.md")),
        model_name=model_name,
        summary=_summary(model),
        repo_id=repo_id or model_name,
        base_model=list(base_model),
        transformers_version=transformers.__version__,
        parts=parts,
        trained=trained,
        training=training,
        source=source,
        facts=_facts(model, processor),
        results=metrics,
        limits=[*_architecture_limits(model), *limits],
    )


def _check_names(metrics: Sequence[EvalResult]) -> None:
    """Results are grouped without looking at `dataset_name`: all of a group would be listed under the first one's."""
    names: dict[tuple[Any, ...], set[str]] = {}
    for result in metrics:
        names.setdefault(result.unique_identifier, set()).add(result.dataset_name)
    for same in names.values():
        if len(same) > 1:
            raise ValueError(
                f"the Hub would list the results on {' and '.join(sorted(same))} as of one dataset: "
                "give them another dataset_type, dataset_config or dataset_split each"
            )


@dataclass
class Contents:
    """Number of rows and masks of a dataset by (config, split), and of rows by task and by source."""

    rows: Counter[tuple[str, str]] = field(default_factory=Counter)
    masks: Counter[tuple[str, str]] = field(default_factory=Counter)
    tasks: Counter[str] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)


def dataset_card(
    contents: Contents,
    features: Features,
    *,
    name: str,
    terms: str,
    repo_id: str,
    skipped: Mapping[str, int] | None = None,
    about: str = "",
) -> DatasetCard:
    """
    The card of a prepared dataset; with its `configs`, `datasets.load_dataset` needs no code.

    Args:
        contents: Counts of its rows, from `mglmm.datasets_scripts.publish.read_contents`.
        features: Of the rows; a column `image` of strings says that the pictures are elsewhere.
        name: Title.
        terms: On which the annotations and pictures may be used; an identifier that the Hub knows, or a text.
        repo_id: Folder or hub id in the usage example.
        skipped: What was left out while preparing, by reason.
        about: Markdown on how it was made, where that is not by templates from a source's annotations.
    """
    configs = sorted({config for config, _ in contents.rows}, key=lambda config: (config != "default", config))
    first = ("train", "validation")
    parts = sorted(
        contents.rows,
        key=lambda part: (configs.index(part[0]), first.index(part[1]) if part[1] in first else len(first), part[1]),
    )
    splits = {config: [split for other, split in parts if other == config] for config in configs}
    is_identifier = re.fullmatch(r"[a-z0-9][a-z0-9.-]*", terms) is not None
    rows = contents.rows.total()
    data = DatasetCardData(
        pretty_name=name,
        license=terms if is_identifier else "other",
        license_name=None if is_identifier else "terms-of-the-sources",
        license_details=None if is_identifier else terms,
        task_categories=["image-segmentation", "image-text-to-text"],
        tags=["uscdf", *TAGS],
        size_categories=[SIZE_CATEGORIES[min(max(len(str(rows)) - 3, 0), len(SIZE_CATEGORIES) - 1)]],
        configs=[
            {
                "config_name": config,
                "data_files": [{"split": split, "path": f"{config}/{split}-*.parquet"} for split in splits[config]],
                **({"default": True} if config == configs[0] else {}),
            }
            for config in configs
        ],
    )
    infos = {
        config: DatasetInfo(
            features=features,
            config_name=config,
            splits=SplitDict(
                {split: SplitInfo(split, num_examples=contents.rows[config, split]) for split in of_config}
            ),
        )
        for config, of_config in splits.items()
    }
    DatasetInfosDict(infos).to_dataset_card_data(data)
    references = features["image"] == Value("string")
    masks = contents.masks.total()
    return DatasetCard.from_template(
        data,
        template_path=str(Path(__file__).with_name("dataset_card.md")),
        name=name,
        summary=f"{rows:,} rows with {masks:,} masks.",
        repo_id=repo_id,
        references=references,
        configs=configs,
        splits=splits[configs[0]],
        parts=[
            {"config": c, "split": s, "rows": f"{contents.rows[c, s]:,}", "masks": f"{contents.masks[c, s]:,}"}
            for c, s in parts
        ],
        tasks=[(task, f"{count:,}") for task, count in contents.tasks.most_common()],
        sources=[(source, f"{count:,}") for source, count in contents.sources.most_common()],
        skipped=[(reason, f"{count:,}") for reason, count in (skipped or {}).items()],
        terms=f"`{terms}`" if is_identifier else terms,
        about=about,
    )


def _summary(model: PreTrainedModel) -> str:
    config = model.config
    return (
        f"A vision-language model of {_millions(model.num_parameters())} parameters: `{config.text_config.model_type}` "
        f"writes the text, `{config.vision_config.model_type}` sees the image, and SAM's mask decoder draws the masks."
    )


def _parts(model: PreTrainedModel, trained: Sequence[str]) -> list[dict[str, str]]:
    """Rows of the table of parts; a head tied to the embeddings has no row of its own."""
    rows = []
    seen: set[int] = set()
    for name, module in [*model.model.named_children(), ("lm_head", model.lm_head)]:
        parameters = [parameter for parameter in module.parameters() if id(parameter) not in seen]
        seen.update(map(id, parameters))
        if not parameters:
            continue
        architecture = f"`{module.config.model_type}`" if isinstance(module, PreTrainedModel) else type(module).__name__
        rows.append(
            {
                "name": name,
                "architecture": architecture,
                "parameters": _millions(sum(parameter.numel() for parameter in parameters)),
                "trained": "yes" if name in trained else "no",
            }
        )
    known = [row["name"] for row in rows if row["name"] not in FROZEN]
    if unknown := [name for name in trained if name not in known]:
        raise ValueError(f"trained names {unknown}; the parts that can be trained are {known}")
    return rows


def _facts(model: PreTrainedModel, processor: Any) -> list[str]:
    config = model.config
    facts = ["The encoders of images are frozen: this architecture runs them without gradients."]
    if config.share_vision_tower:
        facts.append("The vision tower serves as pixel encoder too and runs once per image.")
    if processor is not None:
        height, width = processor.vision_size
        facts.append(f"An image is seen at {width} x {height} pixels and becomes {processor.num_image_tokens} tokens.")
        if processor.sam_image_size is not None:
            facts.append(f"The pixel encoder sees it with its longer side at {processor.sam_image_size} pixels.")
        facts.append(f"The context holds {processor.tokenizer.model_max_length:,} tokens, image tokens included.")
    facts.append(f"Weights: {str(model.dtype).removeprefix('torch.')}; the mask path computes in float32.")
    return facts


def _architecture_limits(model: PreTrainedModel) -> list[str]:
    prompt = model.config.sam_config.prompt_encoder_config
    side = 4 * (prompt.image_size // prompt.patch_size)
    return [
        f"Masks are drawn on a grid of {side} x {side} cells and enlarged: finer detail is lost.",
        "The text may name what is not in the image, and a right phrase may carry a wrong mask. Scores order the segments "
        "of an answer; they are not calibrated probabilities.",
        "It inherits the biases of the pretrained parts and of the data. Do not use it to identify people or where a wrong "
        "mask does harm.",
    ]


def _millions(count: int) -> str:
    """1234567 -> "1.2 M"."""
    return f"{count:,}" if count < 100_000 else f"{count / 1e6:,.1f} M"
