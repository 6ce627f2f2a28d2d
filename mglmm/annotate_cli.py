"""`mglmm annotate`: run, retry, export, stats."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from .datasets_scripts.annotation.run import RunSummary

BUDGET_SPENT, INTERRUPTED = 3, 130  # exit statuses

annotate = typer.Typer(
    no_args_is_help=True, help="Turn images with masks into multi-granularity descriptions with aligned masks (MGSC)."
)

Run = Annotated[Path, typer.Argument(help="Folder of the run; a stopped run goes on there.")]


@annotate.command()
def run(
    annotations: Annotated[Path, typer.Argument(help="File or folder of the masks.")],
    run: Run,
    layout: Annotated[
        Literal["sa1b", "coco", "coco_panoptic", "index_png", "uscdf"], typer.Option(help="Form of the masks.")
    ],
    images: Annotated[Path | None, typer.Option(help="Folder of the pictures, if they lie elsewhere.")] = None,
    annotator: Annotated[
        Literal["openai", "local", "rules"],
        typer.Option(help="A server of the chat-completions protocol, a transformers model, or templates."),
    ] = "openai",
    model: Annotated[str | None, typer.Option(help="Name of the model; folder or hub id of a local one.")] = None,
    base_url: Annotated[str | None, typer.Option(help="Of the server, such as http://localhost:8000/v1.")] = None,
    api_key_env: Annotated[str, typer.Option(help="Environment variable that holds the key.")] = "OPENAI_API_KEY",
    concurrency: Annotated[int, typer.Option(min=1, help="Requests in flight at most.")] = 8,
    requests_per_minute: Annotated[int | None, typer.Option(min=1, help="Limit of the server.")] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(min=1, help="Limit of the server.")] = None,
    max_total_tokens: Annotated[
        int | None, typer.Option(min=1, help="Hard budget of the folder over all runs; exit status 3 when it is spent.")
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds until a request is given up and tried again.")] = 120.0,
    max_retries: Annotated[int, typer.Option(min=0, help="Of a request that the server did not answer.")] = 5,
    config: Annotated[
        Path | None, typer.Option(help="YAML file of settings: geometry, labeling, merging, context.")
    ] = None,
    shard: Annotated[str, typer.Option(help="'0/4': the first of four parts of the images.")] = "0/1",
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first images.")] = None,
    num_proc: Annotated[
        int | None, typer.Option(min=1, help="Processes for the geometry; one a core by default.")
    ] = None,
    engine: Annotated[
        Literal["local", "ray"], typer.Option(help="This machine, or Ray Data (needs the extra ray).")
    ] = "local",
    workers: Annotated[int, typer.Option(min=1, help="Actors of --engine ray.")] = 2,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only make the mask trees, and estimate requests, tokens and cost.")
    ] = False,
    price_prompt: Annotated[float | None, typer.Option(help="With --dry-run: per million tokens.")] = None,
    price_answer: Annotated[float | None, typer.Option(help="With --dry-run: per million tokens.")] = None,
) -> None:
    """Annotate images: mask tree, labels, descriptions. Stop it at any time; the same command goes on."""
    import yaml

    from .datasets_scripts.annotation.annotators import Annotator
    from .datasets_scripts.annotation.config import AnnotationConfig
    from .datasets_scripts.annotation.run import Source, list_work, plan_run, run_local

    who = Annotator(
        kind=annotator,
        model=model,
        base_url=base_url,
        api_key_env=api_key_env,
        concurrency=concurrency,
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        max_total_tokens=max_total_tokens,
        timeout=timeout,
        max_retries=max_retries,
    )
    if (price_prompt is None) != (price_answer is None):
        raise ValueError("--price-prompt and --price-answer go together")
    try:
        settings = AnnotationConfig.from_dict(yaml.safe_load(config.read_text("utf-8")) or {} if config else {})
    except yaml.YAMLError as error:
        raise ValueError(f"{config} is not valid YAML: {error}") from error
    part = _shard(shard)
    items = list_work(
        Source(layout, annotations, images), run, settings, who, shard=part, limit=limit, begin=not dry_run
    )
    if dry_run:
        plan = plan_run(items, run, settings, who.model_name, num_proc)
        print(plan)
        if price_prompt is not None and price_answer is not None:
            print(f"cost: about {plan.cost(price_prompt, price_answer):,.2f}")
        return
    if engine == "ray":
        from .datasets_scripts.annotation.ray_engine import run_ray

        summary = run_ray(items, run, settings, who, workers=workers)
    else:
        summary = run_local(items, run, settings, who, shard=part, num_proc=num_proc)
    _finish(summary)


@annotate.command()
def retry(
    run: Run,
    max_total_tokens: Annotated[int | None, typer.Option(min=1, help="Another budget than the run's.")] = None,
) -> None:
    """Ask anew about what failed in a run, and about nothing else; what cannot be read is read again."""
    from .datasets_scripts.annotation.run import list_work, read_run, run_local

    source, settings, who = read_run(run)
    if max_total_tokens is not None:
        who = replace(who, max_total_tokens=max_total_tokens)
    items = list_work(source, run, settings, who)
    _finish(run_local(items, run, settings, who, retry=True))


@annotate.command()
def export(
    run: Run,
    output: Annotated[Path, typer.Argument(help="Folder to make.")],
    images: Annotated[
        Literal["path", "embed"], typer.Option(help="Rows name the pictures, or hold them (mind their licence).")
    ] = "path",
    with_templates: Annotated[
        bool, typer.Option("--with-templates", help="Also descriptions that a template took the place of.")
    ] = False,
) -> None:
    """Write what a run has made: MGSC JSON, and Parquet for load_dataset(OUTPUT, "mgsc")."""
    from .datasets_scripts.annotation.export import export as export_run

    print(export_run(run, output, images=images, with_templates=with_templates))


@annotate.command()
def stats(
    run: Run,
    html: Annotated[Path | None, typer.Option(help="File for a page to look at sampled images.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Images on that page.")] = 12,
) -> None:
    """Say what a run has made: images, items, coverage, rules that answers broke, tokens."""
    from .datasets_scripts.annotation.review_page import write_review
    from .datasets_scripts.annotation.statistics import collect

    print(collect(run))
    if html is not None:
        write_review(run, html, samples=samples)
        print(f"written to {html}", file=sys.stderr)


def _shard(text: str) -> tuple[int, int]:
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal()):
        raise ValueError(f"--shard takes a number and a count such as 0/4, not {text!r}")
    return int(number), int(count)


def _finish(summary: RunSummary) -> None:
    from .datasets_scripts.annotation.chat import BudgetSpent, Interrupted

    print(summary)
    if isinstance(summary.stopped, Interrupted):
        raise typer.Exit(INTERRUPTED)
    if summary.stopped is not None:
        raise typer.Exit(BUDGET_SPENT if isinstance(summary.stopped, BudgetSpent) else 2)
