"""The command `mglmm`: one typed function per verb, which imports what it needs itself."""

import os
import sys
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

import typer

from .annotate_cli import annotate

app = typer.Typer(
    name="mglmm",
    help="Describe images in text whose phrases carry masks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


app.add_typer(annotate, name="annotate")


@app.callback()
def options(
    debug: Annotated[bool, typer.Option(envvar="MGLMM_DEBUG", help="Show the traceback of an error.")] = False,
) -> None:
    os.environ["MGLMM_DEBUG"] = "1" if debug else ""


@app.command()
def segment(
    image: Annotated[str, typer.Argument(help="Path or URL of a picture.")],
    instruction: Annotated[
        str | None, typer.Argument(help='Such as "Segment the dog." Without it: --granularity.')
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Folder or hub id. By default the small checkpoint, assembled if need be.")
    ] = None,
    granularity: Annotated[
        Literal["panoptic", "object", "fine"] | None,
        typer.Option(help="In place of an instruction: everything (the default), one object, or its parts."),
    ] = None,
    target: Annotated[str | None, typer.Option(help="What --granularity is about, such as 'the left person'.")] = None,
    region: Annotated[
        list[str] | None, typer.Option(help="Box 'x1,y1,x2,y2' in pixels for each <region> of the instruction.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for the PNG, HTML and JSON files.")] = Path("out"),
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 512,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, mps …; by default the fastest there is.")
    ] = None,
) -> None:
    """Answer an instruction about a picture with text and masks."""
    from transformers import pipeline

    from .answers import TokenProgress, format_answer, save_answer
    from .processing.images import load_image
    from .processing.pipeline_mglmm import TASK, make_instruction
    from .registration import MglmmPipeline
    from .small.checkpoint import assemble as assemble_small

    # What can be wrong is found before minutes of loading.
    instruction = make_instruction(instruction, granularity, target)
    regions = [[float(side) for side in box.split(",")] for box in region or []]
    picture = load_image(image)
    if model is not None and model.startswith(("/", ".", "~")) and not Path(model).is_dir():
        raise FileNotFoundError(f"there is no folder {model!r}: name a checkpoint folder or a hub id")
    output.mkdir(parents=True, exist_ok=True)
    checkpoint = model if model is not None else str(assemble_small())
    print(f"loading {checkpoint} ...", file=sys.stderr)
    # transformers' overloads list its own tasks only.
    pipe = pipeline(  # type: ignore[call-overload]
        TASK, model=checkpoint, device=device, pipeline_class=MglmmPipeline
    )
    with TokenProgress("answering") as progress:
        answer = pipe(picture, instruction, regions=regions or None, max_new_tokens=max_new_tokens, streamer=progress)
    print(format_answer(answer))
    name = Path(urlsplit(image).path).stem if "://" in image else Path(image).stem
    files = save_answer(answer, output, f"{name or 'image'}-answer")
    print("\nwritten to", *files, sep="\n  ")


@app.command()
def assemble(
    output: Annotated[Path | None, typer.Option(help="Folder to make; by default one in the cache.")] = None,
    untrained: Annotated[bool, typer.Option("--untrained", help="Leave out what this project trained.")] = False,
) -> None:
    """Make the small checkpoint from its parts, as an ordinary folder for from_pretrained."""
    from .small.checkpoint import assemble as assemble_small

    print(assemble_small(output, trained=not untrained))


@app.command()
def prepare(
    name: Annotated[str, typer.Argument(help="Name of the dataset, such as 'refcoco'; an unknown one lists all.")],
    data_dir: Annotated[Path, typer.Option(help="Folder of the dataset in its original layout.")],
    output: Annotated[Path, typer.Option(help="Folder to write.")],
    images: Annotated[Literal["embed", "path"], typer.Option(help="Store pictures, or only where they are.")] = "embed",
    variants: Annotated[int, typer.Option(min=1, help="How often each training image is worded anew.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of all choices.")] = 0,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first images of each split.")] = None,
    num_proc: Annotated[int | None, typer.Option(min=1, help="Number of processes; one a core by default.")] = None,
    answers: Annotated[
        Literal["uscdf", "plain"], typer.Option("--format", help="'plain' leaves the phrases out of the answers.")
    ] = "uscdf",
    augment: Annotated[
        int, typer.Option(min=0, help="Other views of each training image: mirrored, cropped, in other colours.")
    ] = 0,
) -> None:
    """Turn a dataset into USCDF Parquet files that load_dataset opens."""
    from .datasets_scripts.prepare import prepare as prepare_dataset

    summary = prepare_dataset(
        name,
        data_dir,
        output,
        images=images,
        variants=variants,
        seed=seed,
        limit=limit,
        num_proc=num_proc,
        answers=answers,
        augment=augment,
    )
    print(summary)


@app.command()
def lint(
    data: Annotated[str, typer.Argument(help="Folder or hub id of prepared data.")],
    config: Annotated[str | None, typer.Option(help="Read only this configuration.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Folder or hub id: check that its context holds every mask of an answer.")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Context in tokens, image included; the model's own by default.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="File for a page to look at sampled rows.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Rows on that page.")] = 24,
) -> None:
    """Check prepared data row by row; the exit status is 1 if anything is wrong."""
    from .datasets_scripts.lint import lint as lint_data

    if max_length is not None and model is None:
        raise ValueError("--max-length counts tokens: name the --model whose tokens are meant")
    processor = None
    if model is not None:
        from .processing import MglmmProcessor

        processor = MglmmProcessor.from_pretrained(model)
    report = lint_data(data, config=config, processor=processor, max_length=max_length, html=html, samples=samples)
    print(report)
    if not report.clean:
        raise typer.Exit(1)


@app.command("push-dataset")
def push_dataset(
    folder: Annotated[Path, typer.Argument(help="What `mglmm prepare` wrote.")],
    repo_id: Annotated[str, typer.Argument(help="Hub id, such as 'me/hats'; created if it does not exist.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    images: Annotated[
        Literal["embed", "reference"], typer.Option(help="Upload the pictures, or only their paths below --image-root.")
    ] = "embed",
    image_root: Annotated[Path | None, typer.Option(help="Folder that holds all pictures.")] = None,
    license: Annotated[str | None, typer.Option(help="Identifier or terms for the card.")] = None,
) -> None:
    """Upload prepared data to the Hub, with a card."""
    from .datasets_scripts.publish import push_dataset as push

    print(push(folder, repo_id, private=private or None, images=images, image_root=image_root, license=license))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def train(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(help="YAML file of the run; --key value after it changes a setting.")],
    strict: Annotated[
        bool, typer.Option("--strict", help="Stop at the first bad row in place of skipping it.")
    ] = False,
    plan: Annotated[
        bool, typer.Option("--plan", help="Only say what would train, on what, in how much memory.")
    ] = False,
    config_file: Annotated[
        Path | None, typer.Option("--config_file", help="With --plan: accelerate's file, which says the next two.")
    ] = None,
    num_processes: Annotated[int, typer.Option("--num_processes", min=1, help="With --plan: number of GPUs.")] = 1,
    strategy: Annotated[
        Literal["ddp", "fsdp2", "zero2", "zero3"], typer.Option(help="With --plan: how they share the model.")
    ] = "ddp",
) -> None:
    """Train from a recipe; a run that was stopped goes on where it was. Start it by torchrun or accelerate for several GPUs."""
    overrides = [*context.args, *(["--strict", "true"] if strict else [])]
    if plan:
        from .trainer.config import read_config
        from .trainer.plan import plan as make_plan
        from .trainer.plan import read_accelerate

        processes, kind = (num_processes, strategy) if config_file is None else read_accelerate(config_file)
        print(make_plan(read_config(config, overrides), processes, kind))
        return
    from .trainer.train import main as train_main

    train_main([str(config), *overrides])


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def grpo(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(help="YAML file of the run; --key value after it changes a setting.")],
) -> None:
    """Improve a trained model's answers by rewards (needs the extra trl)."""
    from .trainer.grpo import main as grpo_main

    grpo_main([str(config), *context.args])


@app.command()
def merge(
    adapter: Annotated[str, typer.Argument(help="Output folder of a run, or its hub id.")],
    output: Annotated[Path, typer.Argument(help="Folder of the plain checkpoint to write.")],
    base: Annotated[str | None, typer.Option(help="The adapter's base model, if it is not where it was.")] = None,
) -> None:
    """Merge an adapter into its base: a checkpoint that from_pretrained loads without PEFT."""
    from .trainer.merging import merge as merge_adapter

    print(merge_adapter(adapter, output, base))


@app.command()
def doctor(
    model: Annotated[str, typer.Argument(help="Folder or hub id of a model or of an adapter.")],
    overfit: Annotated[
        bool, typer.Option("--overfit/--no-overfit", help="Also learn one drawn picture by heart.")
    ] = True,
) -> None:
    """Check that a model is sound and can learn; the exit status is 1 if anything is wrong."""
    from .trainer.doctor import run_doctor

    if not run_doctor(model, overfit=overfit):
        raise typer.Exit(1)


@app.command()
def evaluate(
    data: Annotated[str, typer.Option(help="Folder or hub id of prepared data.")],
    output: Annotated[Path, typer.Option(help="Folder for predictions and results; a stopped run goes on there.")],
    model: Annotated[str | None, typer.Argument(help="Folder or hub id.")] = None,
    benchmark: Annotated[
        str, typer.Option(help="What to measure, such as refcoco or gcg; an unknown name lists all.")
    ] = "photos",
    split: Annotated[str | None, typer.Option(help="Split to measure; by default the benchmark's own.")] = None,
    mode: Annotated[
        Literal["clean", "parity", "both"], typer.Option(help="The right metric, the original papers' rule, or both.")
    ] = "both",
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many rows, spread over sources and tasks.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions that are answered together.")] = 16,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"],
        typer.Option(help="Of the language model and the encoders; the mask path is float32 always."),
    ] = "float32",
    predictions: Annotated[
        Path | None, typer.Option(help="Score this predictions.jsonl; no model is needed then.")
    ] = None,
    text_similarity: Annotated[
        str | None, typer.Option(help="Text encoder that compares phrases, or exact, or exact-noun.")
    ] = None,
    push: Annotated[str | None, typer.Option(help="Hub id of the model: add the results to its card.")] = None,
) -> None:
    """Measure a model on a benchmark and print the metrics. Start it by torchrun or accelerate for several GPUs."""
    from .evaluation.report import to_markdown
    from .evaluation.run import evaluate as run_benchmark

    results = run_benchmark(
        model,
        data,
        output,
        benchmark,
        split,
        mode=mode,
        limit=limit,
        batch_size=batch_size,
        dtype=dtype,
        predictions=predictions,
        text_similarity=text_similarity,
    )
    if results is None:  # another process speaks
        return
    print(to_markdown(results))
    print(f"written to {output}: results.json, report.html", file=sys.stderr)
    if push is not None:
        from .evaluation.push import push_results

        print(push_results(results, push))


@app.command()
def gallery(
    evaluation: Annotated[Path, typer.Argument(help="Folder that `mglmm evaluate` wrote, of the benchmark photos.")],
    data: Annotated[str, typer.Option(help="Folder or hub id of the prepared data that it measured.")],
    output: Annotated[Path, typer.Option(help="Folder for gallery.md and the pictures in gallery/.")],
    number: Annotated[int, typer.Option(min=1, help="Answers of each kind.")] = 2,
    pictures: Annotated[
        Literal["masks", "photographs"], typer.Option(help="Draw on plain paper, or over photographs for your own use.")
    ] = "masks",
) -> None:
    """Show the best, median and worst held-out answers, chosen by rule."""
    from .evaluation.gallery import make_gallery

    print(make_gallery(evaluation, data, output, number=number, pictures=pictures))


@app.command("import-weights")
def import_weights(
    source: Annotated[str, typer.Argument(help="Folder or hub id of a LISA, GLaMM, MGLMM or LLaVA checkpoint.")],
    output: Annotated[Path, typer.Argument(help="Folder to make.")],
    vision_tower: Annotated[
        str | None, typer.Option(help="Folder or hub id; by default the one that the checkpoint names.")
    ] = None,
    sam: Annotated[str | None, typer.Option(help="For LLaVA: Meta's .pth file, a folder or a hub id.")] = None,
    base: Annotated[
        str | None, typer.Option(help="For a training file without config.json and tokenizer: what it started from.")
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="Of all but the mask path; by default as stored."),
    ] = None,
    template: Annotated[
        Literal["v1", "llama_2"], typer.Option(help="'llama_2' for a LISA trained with such conversations.")
    ] = "v1",
    add_phrase_tags: Annotated[
        bool, typer.Option("--add-phrase-tags", help="Give a LISA the tokens <p> and </p>, to train it on USCDF.")
    ] = False,
    lora_alpha: Annotated[float, typer.Option(help="Of a LoRA that was not merged.")] = 16,
    allow_missing: Annotated[
        list[str] | None, typer.Option(help="Tensor (or pattern with *) that may be missing or left over.")
    ] = None,
    license: Annotated[str | None, typer.Option(help="Identifier for the card; by default the source's own.")] = None,
) -> None:
    """Turn a published checkpoint into an ordinary folder for from_pretrained (needs the extra import)."""
    from .importing import import_weights as import_checkpoint

    report = import_checkpoint(
        source,
        output,
        vision_tower=vision_tower,
        sam=sam,
        base=base,
        dtype=dtype,
        template=template,
        add_phrase_tags=add_phrase_tags,
        lora_alpha=lora_alpha,
        allow_missing=allow_missing or (),
        license=license,
    )
    print(f"{output}: tensors {report}")


@app.command("export-weights")
def export_weights(
    model: Annotated[Path, typer.Argument(help="Folder of a saved model.")],
    output: Annotated[Path, typer.Argument(help="Folder to make.")],
    format: Annotated[Literal["lisa", "glamm"], typer.Option(help="Whose code shall load it.")],
    original: Annotated[
        Path | None, typer.Option(help="Folder with that layout's config.json and tokenizer.model, if not imported.")
    ] = None,
) -> None:
    """Write a model in the layout of LISA or GLaMM, for tools that read nothing else."""
    from .exporting import export_checkpoint

    count = export_checkpoint(model, output, format, original=original)
    print(f"{output}: {count} tensors")


def main() -> None:
    """Entry point: bad input becomes one line on stderr and exit code 2."""
    try:
        app(prog_name="mglmm")
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        if os.environ.get("MGLMM_DEBUG"):
            raise
        message = " ".join(str(error).split())
        if isinstance(error, ModuleNotFoundError):
            message += ": install the extra that holds it, such as pip install 'mglmm[small]'"
        print(f"mglmm: {message}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
