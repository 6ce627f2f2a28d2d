"""`python -m mglmm.small.demo`: the small checkpoint describes two public-domain photographs."""

import time
from pathlib import Path
from typing import Annotated

import typer
from matplotlib.cbook import get_sample_data
from PIL import Image
from skimage import data
from transformers import pipeline

from mglmm.answers import TokenProgress, format_answer, save_answer
from mglmm.processing.images import load_image
from mglmm.processing.pipeline_mglmm import TASK, make_instruction
from mglmm.registration import MglmmPipeline

from .checkpoint import assemble

EVERYTHING = {"granularity": "panoptic"}
PERSON = {"granularity": "fine", "target": "the person"}
QUESTIONS = {  # name of a photograph -> short name of a question -> the question
    "astronaut": {"everything": EVERYTHING, "person": PERSON, "hair": {"text": "Segment the person's hair."}},
    "hopper": {"everything": EVERYTHING, "person": PERSON, "hat": {"text": "Segment the hat."}},
}
MAX_NEW_TOKENS = 256


def photographs() -> dict[str, Image.Image]:
    """Portraits of Eileen Collins (NASA) and Grace Hopper (U.S. Navy), from scikit-image and matplotlib."""
    return {
        "astronaut": load_image(data.astronaut()),
        "hopper": load_image(get_sample_data("grace_hopper.jpg", asfileobj=False)),
    }


def main(
    model: Annotated[str | None, typer.Option(help="Another checkpoint: folder or hub id.")] = None,
    output: Annotated[Path, typer.Option(help="Folder for the PNG, HTML and JSON files.")] = Path("out"),
) -> None:
    """Describe two photographs at two granularities and answer a question about each."""
    started = time.perf_counter()
    print("[1/3] The small checkpoint", flush=True)
    checkpoint = model if model is not None else str(assemble())
    print(f"      {checkpoint}\n[2/3] Loading it", flush=True)
    # transformers' overloads list its own tasks only.
    pipe = pipeline(TASK, model=checkpoint, pipeline_class=MglmmPipeline)  # type: ignore[call-overload]
    pictures = photographs()
    inputs = {
        f"{name}-{topic}": {"image": pictures[name], "text": make_instruction(**question)}
        for name, questions in QUESTIONS.items()
        for topic, question in questions.items()
    }
    print(f"[3/3] {len(inputs)} questions about {len(pictures)} photographs", flush=True)
    with TokenProgress(f"      answering {len(inputs)} at once") as progress:
        answers = pipe(list(inputs.values()), batch_size=len(inputs), max_new_tokens=MAX_NEW_TOKENS, streamer=progress)
    pages = []
    for (name, question), answer in zip(inputs.items(), answers, strict=True):
        print(f"\n{name}: {question['text']}\n\n{format_answer(answer)}", flush=True)
        pages.append(save_answer(answer, output, name)[1])
    print(f"\nPNG, HTML and JSON of each answer are in {output.resolve()}; open a page and point at its phrases:")
    print(*(f"  {page}" for page in pages), f"{time.perf_counter() - started:.0f} seconds", sep="\n")


if __name__ == "__main__":
    typer.run(main)
