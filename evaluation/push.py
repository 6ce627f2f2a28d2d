"""Results into the metadata of a model card on the Hub."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from huggingface_hub import EvalResult, HfApi, ModelCard, metadata_update
from huggingface_hub.repocard_data import eval_results_to_model_index

from mglmm.evaluation.benchmarks import BENCHMARKS

# What the Hub calls the tasks.
TASKS = {"captions": "image-to-text", "regions": "image-to-text"}
PRIMARY = frozenset(
    "cIoU gIoU P@0.5 N-acc T-acc AP50 mIoU mIoU_gt mask_recall METEOR CIDEr Bleu_4 ROUGE_L SPICE PQ SQ RQ refused "
    "false_refusals".split()
)


def push_results(results: Mapping[str, Any], repo_id: str, *, token: str | None = None) -> str:
    """
    Add results to a model card; those of the same benchmark, split, mode and number of rows are replaced. The rest of the
    card stays.

    Args:
        results: Of `run.evaluate`.
        repo_id: Of a model that is there.

    Returns:
        Where the change can be seen.

    Raises:
        huggingface_hub.errors.HfHubHTTPError: the Hub refuses: no such model, or no token that may write.
    """
    found = list(eval_results(results))
    name = _model_name(repo_id, token)
    metadata = {"model-index": eval_results_to_model_index(name, found)}
    settings = results["settings"]
    message = f"Results on {settings['benchmark']} ({settings['split']})"
    return metadata_update(repo_id, metadata, overwrite=True, token=token, commit_message=message)


def eval_results(results: Mapping[str, Any]) -> Iterator[EvalResult]:
    """Each number of the results that is a metric, with what it was measured on."""
    settings = results["settings"]
    benchmark = BENCHMARKS[settings["benchmark"]]
    count = f"{results['rows']:,} questions" + ("" if results["limit"] is None else ", a subset")
    for path, value in _metrics(results["numbers"]):
        *modes, name = path
        yield EvalResult(
            task_type=TASKS.get(benchmark.family, "image-segmentation"),
            dataset_type=settings["benchmark"],
            dataset_name=benchmark.title,
            dataset_config=benchmark.config,
            dataset_split=settings["split"],
            metric_type=name,
            metric_name=f"{name} ({' '.join(modes)}; {count})",
            metric_value=round(value, 6),
        )


def _metrics(values: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], float]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _metrics(value, (*path, name))
        elif name in PRIMARY:
            yield (*path, name), value


def _model_name(repo_id: str, token: str | None) -> str:
    """The name under which the card lists its results."""
    if HfApi(token=token).file_exists(repo_id, "README.md"):
        name = ModelCard.load(repo_id, token=token).data.get("model_name")
        if name:
            return str(name)
    return repo_id.rpartition("/")[2]
