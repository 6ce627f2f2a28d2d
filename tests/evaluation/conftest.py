import datasets
import numpy as np
import pytest

from mglmm.datasets_scripts.features import FEATURES
from mglmm.processing.rle import encode_mask
from tests.tiny import picture

FASHION, CARS, SCENES = "clothing-co-parsing", "Car-Parts-Segmentation", "COCO2017-panoptic"
SIZES = {"1": (40, 60), "2": (50, 30), "3": (32, 32)}  # height, width
CARD = """---
configs:
- config_name: benchmark
  data_files:
  - split: validation
    path: benchmark/photos-validation*.parquet
---
"""


def columns(size: tuple[int, int], start: int, end: int) -> np.ndarray:
    """A mask of the columns `start` to `end` (exclusive)."""
    mask = np.zeros(size, dtype=bool)
    mask[:, start:end] = True
    return mask


def row(source: str, image_id: str, task: str, question: str, answer: str, *spans: tuple[int, int]) -> dict:
    size = SIZES[image_id]
    return {
        "image": picture(*size, seed=int(image_id)),
        "image_id": image_id,
        "source": source,
        "task": task,
        "messages": [
            {"role": "user", "content": f"<image>\n{question}"},
            {"role": "assistant", "content": answer},
        ],
        "masks": [encode_mask(columns(size, *span)) for span in spans],
        "regions": [],
        "ignore_mask": None,
    }


@pytest.fixture(scope="session")
def rows() -> datasets.Dataset:
    """Ten questions about three pictures of different sizes and sources."""
    found = "Sure, <p> {} </p> [SEG]."
    return datasets.Dataset.from_list(
        [
            row(FASHION, "1", "object", "Segment the person.", found.format("the person"), (0, 10)),
            row(FASHION, "1", "part", "hat", found.format("hat"), (0, 4)),
            row(FASHION, "1", "absent", "Segment the car.", "Sorry, I cannot find the car."),
            row(FASHION, "1", "fine", "Describe the person.", "The person wears <p> a hat </p> [SEG].", (0, 4)),
            row(CARS, "2", "object", "Segment the car.", found.format("the car"), (0, 30)),
            row(CARS, "2", "part", "Outline the wheels.", found.format("the wheels"), (0, 5)),
            row(CARS, "2", "absent", "Show me the dog.", "I cannot see the dog here."),
            row(CARS, "2", "absent", "zebra?", "Sorry, I do not see a zebra in the image."),
            row(SCENES, "3", "object", "Cut out the sky.", found.format("the sky"), (0, 16)),
            row(
                SCENES,
                "3",
                "panoptic",
                "What is in this picture? Please mark everything.",
                "I can see <p> the sky </p> [SEG] and <p> two dogs </p> [SEG].",
                (0, 16),
                (16, 32),
            ),
        ],
        features=FEATURES,
    )


@pytest.fixture
def data_folder(rows, tmp_path):
    """The same on disk, as `prepare` writes it."""
    folder = tmp_path / "data"
    (folder / "benchmark").mkdir(parents=True)
    rows.to_parquet(folder / "benchmark" / "photos-validation-00000-of-00001.parquet")
    (folder / "README.md").write_text(CARD)
    return folder
