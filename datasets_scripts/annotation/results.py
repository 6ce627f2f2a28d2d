"""What a run has made, read back: for the export, the statistics and the review page."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from .records import Contexts, Geometry, Labels, Tree
from .store import ImageFolder, Status, finished_images, read_plan

NOT_WHOLE = "a stage file is missing or broken"


class RunSettings(NamedTuple):
    """Where the pictures of a run lie, who answered its requests, and the layout of its masks."""

    image_root: Path
    model: str
    kind: str


class Result(NamedTuple):
    """A finished image and its stage files, `None` where one is not there or not whole. `name` is that of its folder."""

    status: Status
    name: str
    geometry: Geometry | None
    labels: Labels | None
    tree: Tree | None
    contexts: Contexts | None

    @property
    def problem(self) -> str | None:
        """Why there is nothing to use of the image."""
        if self.status["state"] == "failed":
            return self.status.get("reason", "unknown reason")
        whole = self.geometry and self.labels and self.tree and self.contexts
        return None if whole else NOT_WHOLE


def read_settings(run: Path) -> RunSettings:
    """Raises `ValueError` if the folder is of no run."""
    plan = read_plan(run)
    return RunSettings(Path(plan["image_root"]), plan["model"], plan["source"]["kind"])


def read_results(run: Path) -> Iterator[Result]:
    """Every image that is done or failed, by id."""
    for folder, status in finished_images(run):
        yield read_result(folder, status)


def read_result(folder: ImageFolder, status: Status) -> Result:
    return Result(
        status,
        folder.path.name,
        folder.read("geometry"),
        folder.read("labels"),
        folder.read("tree"),
        folder.read("contexts"),
    )
