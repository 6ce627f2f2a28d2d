"""Answers on the terminal and on disk: progress while they are made, text with a table, PNG, HTML and JSON files."""

import json
from pathlib import Path
from types import TracebackType

import torch
from tqdm import tqdm
from transformers.generation.streamers import BaseStreamer

from .processing import SegCap


class TokenProgress(BaseStreamer):
    """A progress bar over generated tokens: `with TokenProgress("photo") as bar: pipe(..., streamer=bar)`."""

    def __init__(self, description: str):
        self.description = description

    def __enter__(self) -> "TokenProgress":
        self.bar = tqdm(desc=self.description, unit=" tokens", leave=False)
        self.at_prompt = True
        return self

    def __exit__(self, *exception: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.bar.close()

    def put(self, value: torch.Tensor) -> None:
        if not self.at_prompt:  # the first call brings the prompt
            self.bar.update()
        self.at_prompt = False

    def end(self) -> None:
        self.at_prompt = True


def format_answer(answer: SegCap) -> str:
    """The text of an answer and, if it has segments, their table."""
    return f"{answer.clean_text}\n\n{answer.to_table()}" if answer.segments else f"{answer.clean_text}\n\n(no segments)"


def save_answer(answer: SegCap, folder: Path, name: str) -> list[Path]:
    """Writes `name.png`, `name.html` and `name.json` (`SegCap.to_dict`) and returns their paths; existing ones are replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    png, html, data = (folder / f"{name}.{kind}" for kind in ("png", "html", "json"))
    answer.plot().save(png)
    html.write_text(answer.to_html(), encoding="utf-8")
    data.write_text(json.dumps(answer.to_dict(), ensure_ascii=False, indent=2), encoding="utf-8")
    return [png, html, data]
