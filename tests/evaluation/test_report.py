"""The page: which samples it shows, that texts of data and models stay texts, and that it loads nothing."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from mglmm.evaluation.benchmarks import BENCHMARKS, plan
from mglmm.evaluation.predictions import Predictions
from mglmm.evaluation.report import render_report, to_markdown
from mglmm.processing.rle import encode_mask
from tests.evaluation.benchmark_rows import SIZES, dataset
from tests.evaluation.conftest import columns

EVIL = "<script>alert(1)</script> <p> </p> | \ud800"


def results(benchmark: str, **more) -> dict:
    return {
        "numbers": {"clean": {"gIoU": 0.25, "questions": 1234}, "parity": {"lisa": {"gIoU": 0.5}}},
        "skipped": {},
        "marked": {},
        "failures": {},
        "counts": {},
        "mode": "both",
        "settings": {
            "benchmark": benchmark,
            "split": "validation",
            "checkpoint_sha256": "0123456789abcdef",
            "dtype": "float32",
            "max_new_tokens": {"referring": 48},
        },
        "limit": 7,
        "seed": 0,
        "rows": 7,
        "rows_answered": 7,
        "seconds": 12.3,
        "device": "cpu (x86_64)",
        "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
    } | more


def render(tmp_path, benchmark: str, values, text: str = "a hat", phrases=None, **more) -> str:
    """The page of answers with one mask each; `values` by row."""
    data = dataset(benchmark)
    questions = plan(BENCHMARKS[benchmark], data, mode="clean")
    with open(tmp_path / "p.jsonl", "w") as file:
        for question in questions:
            mask = encode_mask(columns(SIZES[question.image_id], 0, 12))
            segments = [{"phrase": text, "span": None, "score": 1.0, "mask": mask}]
            facts = {"row": question.row, "image_id": question.image_id, "clean_text": text, "segments": segments}
            file.write(json.dumps(facts) + "\n")
    samples = [(question, values.get(question.row)) for question in questions]
    path = tmp_path / "report.html"
    render_report(path, results(benchmark, **more), samples, phrases or {}, data, Predictions(tmp_path / "p.jsonl"))
    return path.read_text(encoding="utf-8")


class Tags(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs) -> None:
        self.names.append(tag)


def test_best_median_and_worst_are_shown_once_each(tmp_path) -> None:
    values = {0: 0.9, 1: 0.1, 2: 0.5, 3: 0.4, 4: 0.6, 5: 0.2}  # row 6 has no target
    page = render(tmp_path, "refcoco", values)
    sections = dict(re.findall(r"<h2>(Best|Median|Worst)</h2>(.*?)(?=<h2>)", page, flags=re.DOTALL))
    shown = {title: re.findall(r"<b>IoU ([\d.]+)</b>", part) for title, part in sections.items()}
    assert shown == {"Best": ["0.900", "0.600"], "Median": ["0.400", "0.500"], "Worst": ["0.100", "0.200"]}
    pictures = re.findall(r"data:image/jpeg;base64,([\w+/=]+)", page)
    assert len(pictures) == 12
    sizes = {Image.open(io.BytesIO(base64.b64decode(picture))).size for picture in pictures}
    assert sizes == {(60, 40), (30, 50)}
    answer, truth = (Image.open(io.BytesIO(base64.b64decode(picture))) for picture in pictures[:2])
    red = [[picture.getpixel((x, 20))[0] > 180 for x in (11, 30)] for picture in (answer, truth)]
    assert red[0][0]  # the outline of the answer's mask, columns 0 to 12
    assert "mean 0.450, median 0.450" in page and page.count('title="1 of 6"') == 6


def test_texts_of_data_and_models_are_escaped_and_nothing_is_loaded(tmp_path) -> None:
    more = {"marked": {"x": EVIL}, "failures": {EVIL: 2}, "skipped": {EVIL: "y"}}
    page = render(tmp_path, "refcoco", {0: 1.0}, text=EVIL, phrases={EVIL: [1, 2]}, **more)
    allowed = set(Tags(render(tmp_path, "refcoco", {0: 1.0}, phrases={"a": [1, 2]}, marked={"x": "y"})).names)
    assert set(Tags(page).names) == allowed and "script" not in allowed
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert not re.search(r'(?:src|href)="(?!data:image/jpeg;base64)', page)
    assert "default-src 'none'" in page
    markdown = to_markdown(results("refcoco", **more))
    assert "<script>" not in markdown and "&lt;script&gt;" in markdown and "\\|" in markdown


@pytest.mark.parametrize("benchmark", ["flickr30k", "vg_region", "coco_panoptic", "mgsc"])
def test_every_family_has_its_page(tmp_path, benchmark) -> None:
    page = render(tmp_path, benchmark, dict.fromkeys(range(20), 0.5))
    unit = "CIDEr" if benchmark in ("flickr30k", "vg_region") else "IoU"
    assert f"<b>{unit} 0.500</b>" in page and "cannot be shown" not in page
    if benchmark == "flickr30k":
        assert "A dog on the grass.; The dog runs." in page  # all references


def test_a_page_without_samples_still_has_the_numbers(tmp_path) -> None:
    page = render(tmp_path, "refcoco", {}, phrases={"the dog": [1, 4]})
    assert "<td>1,234</td>" in page and "<h2>Best</h2>" not in page
    assert "<td>the dog</td><td>1</td><td>4</td><td>25%</td>" in page


def test_the_table_has_a_column_for_each_rule() -> None:
    lines = to_markdown(results("refcoco", skipped={"SPICE": "no Java"})).splitlines()
    assert lines[:4] == [
        "|  | clean | parity lisa |",
        "| --- | ---: | ---: |",
        "| gIoU | 0.2500 | 0.5000 |",
        "| questions | 1,234 | – |",
    ]
    assert "- skipped: SPICE: no Java" in lines
    assert lines[-1].startswith(
        "7 rows (a subset, seed 0) of the split validation, mode both, checkpoint 0123456789ab, float32, greedy"
    )
