"""Every defect that is put into clean data is reported once, with the row it is in, and nothing else is."""

import copy
import io
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import pytest
from datasets.arrow_writer import ParquetWriter

from mglmm.cli import main
from mglmm.datasets_scripts.explorer import Sample, Sampler, render_explorer
from mglmm.datasets_scripts.features import FEATURES
from mglmm.datasets_scripts.lint import MIN_PHRASES, lint
from mglmm.datasets_scripts.prepare import prepare
from tests.datasets_scripts.conftest import box_rle
from tests.tiny import Tiny

SIZE = (40, 60)
Rows = dict[tuple[str, str], list[dict[str, Any]]]


def jpeg(color: int, size: tuple[int, int] = (60, 40), **options: Any) -> bytes:
    """A picture of noise that differs from color to color; noise has many bytes, so that half of it is no picture."""
    noise = np.random.default_rng(color).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(noise).save(file, "JPEG", **options)
    return file.getvalue()


def rotated(color: int) -> bytes:
    """A picture that is stored lying and displayed standing."""
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    return jpeg(color, exif=exif)


def row(number: int) -> dict[str, Any]:
    names = [f"hat {number}", f"dog {number}"]
    return {
        "image": {"bytes": jpeg(number), "path": f"{number}.jpg"},
        "image_id": str(number),
        "source": "test",
        "task": "referring",
        "messages": [
            {"role": "user", "content": f"<image>\nSegment the {names[0]} and the {names[1]} in <region>."},
            {"role": "assistant", "content": f"Sure, <p> {names[0]} </p> [SEG] and <p> {names[1]} </p> [SEG]."},
            {"role": "user", "content": "And a cat?"},
            {"role": "assistant", "content": "There is no cat."},
        ],
        "masks": [box_rle(SIZE, (5, 5, 20, 20)), box_rle(SIZE, (30, 5, 50, 30))],
        "regions": [[0, 0, 40, 40]],
        "ignore_mask": None,
    }


@pytest.fixture
def clean() -> Rows:
    """`default` and `benchmark` share their held-out pictures, and one picture has two rows."""
    return {
        ("default", "train"): [row(0), row(1), row(1)],
        ("default", "validation"): [row(2), row(3)],
        ("benchmark", "validation"): [row(2), row(3)],
    }


@pytest.fixture
def write(tmp_path: Path) -> Callable[[Rows], Path]:
    """Writes rows as `prepare` does: Parquet and a card."""

    def write(rows: Rows) -> Path:
        folder, configs = tmp_path / "rows", {}
        for (config, split), of_split in rows.items():
            (folder / config).mkdir(parents=True, exist_ok=True)
            file = folder / config / f"{split}-00000-of-00001.parquet"
            with ParquetWriter(features=FEATURES, path=str(file)) as writer:
                for one in of_split:
                    writer.write(one)
                writer.finalize()
            configs.setdefault(config, []).append(f"  - split: {split}\n    path: {config}/{split}-*.parquet\n")
        text = "".join(f"- config_name: {name}\n  data_files:\n{''.join(files)}" for name, files in configs.items())
        (folder / "README.md").write_text(f"---\nconfigs:\n{text}---\n")
        return folder

    return write


def test_clean_rows_are_clean(clean: Rows, write: Callable[[Rows], Path]) -> None:
    report = lint(write(clean))
    assert report.clean and report.issues == []
    assert report.rows == {("default", "train"): 3, ("default", "validation"): 2, ("benchmark", "validation"): 2}
    assert str(report).splitlines()[-1] == "clean"


def answer(text: str) -> Callable[[dict], None]:
    return lambda row: row["messages"][1].update(content=text)


def question(text: str) -> Callable[[dict], None]:
    return lambda row: row["messages"][0].update(content=text)


def mask(rle: dict[str, Any]) -> Callable[[dict], None]:
    return lambda row: row["masks"].__setitem__(1, rle)


def picture(content: bytes | None, path: str = "a.jpg") -> Callable[[dict], None]:
    return lambda row: row.update(image={"bytes": content, "path": path})


def region(*box: float) -> Callable[[dict], None]:
    return lambda row: row.update(regions=[list(box)])


TAGS, TEXT = "tags differ from masks", "malformed conversation"
ASKED = "<image>\nSegment the hat and the dog in <region>."


@pytest.mark.parametrize(
    ("break_", "kind", "message"),
    [
        # one [SEG] too few, too many, and one in the wrong turn
        (answer("Sure, <p> a hat </p> [SEG]."), TAGS, "1 [SEG] in assistant turns but 2 masks"),
        (answer("<p> a </p> [SEG], <p> b </p> [SEG] and <p> c </p> [SEG]"), TAGS, "3 [SEG] in assistant turns but 2"),
        (lambda row: row["masks"].pop(), TAGS, "2 [SEG] in assistant turns but 1 masks"),
        (question(f"{ASKED} Answer with [SEG]."), TEXT, "message 0 (user) holds 1 [SEG]"),
        # tags: not closed, not opened, nested, in the wrong order, without a mask
        (answer("<p> a hat [SEG] and <p> dog </p> [SEG]."), "unbalanced tags", "2 <p>, 1 </p>"),
        (answer("a hat </p> [SEG] and <p> dog </p> [SEG]."), "unbalanced tags", "1 <p>, 2 </p>"),
        (answer("<p> a <p> hat </p> [SEG] </p> [SEG]."), "unbalanced tags", "2 <p>, 2 </p>"),
        (answer("</p> a hat <p> [SEG] and [SEG]."), "unbalanced tags", "1 <p>, 1 </p>"),
        (answer("<p> a </p> [SEG], <p> b </p> [SEG] and <p> c </p>"), "unbalanced tags", "a phrase without [SEG]"),
        # conversation
        (question("Segment the hat and the dog in <region>."), TEXT, "no <image>"),
        (question("<image>\nSegment the hat."), TEXT, "0 <region> in user turns but 1 regions"),
        (lambda row: row["messages"][2].update(role="human"), TEXT, "the role 'human'"),
        (lambda row: row["messages"][2].update(content=None), TEXT, "no role or no text"),
        # masks
        (mask(box_rle(SIZE, (0, 0, 0, 0))), "empty mask", "mask 1 of 2"),
        (mask(box_rle(SIZE, (0, 0, 60, 40))), "full mask", "mask 1 of 2 covers every pixel"),
        (mask(box_rle((20, 30), (0, 0, 9, 9))), "wrong-size mask", "mask 1: (20, 30)"),
        (
            mask({"size": [40, 60], "counts": box_rle(SIZE, (5, 5, 20, 20))["counts"][:-3]}),
            "broken mask",
            "mask 1 of 2",
        ),
        (mask({"size": None, "counts": None}), "broken mask", "mask 1 of 2"),
        # pictures: one that is displayed standing, half a file, no picture, no file
        (picture(rotated(9)), "wrong-size mask", "2 of 2 masks do not have the size (h, w) = (60, 40)"),
        (picture(jpeg(9)[:2000]), "broken image", "truncated"),
        (picture(b"<html>404</html>"), "broken image", "cannot be read"),
        (picture(None, "/nowhere/a.jpg"), "broken image", "FileNotFoundError"),
        # regions: out on either side, without extent
        (region(10, 10, 61, 20), "region outside the image", "region 0: [10.0, 10.0, 61.0, 20.0] in 60x40"),
        (region(-2, 10, 20, 20), "region outside the image", "[-2.0, 10.0"),
        (region(10, 10, 10, 20), "region outside the image", "[10.0, 10.0, 10.0, 20.0]"),
        (region(10, float("nan"), 10, 20), "region outside the image", "nan"),
        # a picture of train
        (picture(jpeg(1)), "image in train and held out", "same file as in default/train/1"),
    ],
)
def test_each_defect_is_found_once(
    clean: Rows, write: Callable[[Rows], Path], break_: Callable[[dict], None], kind: str, message: str
) -> None:
    rows = copy.deepcopy(clean)
    break_(rows["default", "validation"][1])
    report = lint(write(rows))
    (issue,) = report.issues
    assert (issue.kind, issue.row, issue.image_id) == (kind, "default/validation/1", "3")
    assert message in issue.message
    assert report.counts == {kind: 1} and not report.clean
    assert re.search(rf"^{re.escape(kind)}: 1\n  default/validation/1 \(image 3\): ", str(report), re.MULTILINE)


def test_a_picture_shared_by_many_rows_is_one_duplicate(clean: Rows, write: Callable[[Rows], Path]) -> None:
    clean["benchmark", "validation"] += [row(1), row(1)]
    assert [issue.row for issue in lint(write(clean)).issues] == ["benchmark/validation/2"]


def test_rows_without_picture_are_checked_too(clean: Rows, write: Callable[[Rows], Path]) -> None:
    text = {**row(7), "image": None, "masks": [], "regions": [], "messages": [{"role": "user", "content": "Hello."}]}
    clean["default", "train"].append(text)
    assert lint(write(clean)).clean
    text["messages"] = [{"role": "user", "content": "<image>\nHello."}]
    assert [issue.message for issue in lint(write(clean)).issues] == ["the row has an <image> but no image"]


def test_a_phrase_that_never_varies(clean: Rows, write: Callable[[Rows], Path]) -> None:
    rows = [row(number) for number in range(4, 4 + MIN_PHRASES // 2)]
    for one in rows:
        one["messages"][1]["content"] = "Sure, <p> The object </p> [SEG] and <p> the object </p> [SEG]."
        one["task"] = "part"
    clean["default", "train"] += rows
    (issue,) = lint(write(clean)).issues
    assert (issue.kind, issue.row) == ("phrase never varies", "default/train/3")
    assert issue.message == f"all {MIN_PHRASES} phrases of default/train, task part are 'the object'"
    rows[-1]["messages"][1]["content"] = "Sure, <p> the object </p> [SEG] and <p> a hat </p> [SEG]."
    assert lint(write(clean)).clean


def test_segs_beyond_the_context(clean: Rows, write: Callable[[Rows], Path], tiny: Tiny) -> None:
    one = clean["default", "validation"][1]
    one["messages"][1]["content"] = "Sure, <p> a hat </p> [SEG]" + " and so on" * 100 + " <p> a dog </p> [SEG]."
    path = write(clean)
    assert lint(path, processor=tiny.processor, max_length=100_000).clean
    (issue,) = lint(path, processor=tiny.processor).issues
    assert (issue.kind, issue.row) == ("[SEG] lost to truncation", "default/validation/1")
    assert issue.message.startswith("1 of 2 [SEG] lie beyond 512 tokens (of ")


def test_positions_of_segs_are_those_of_the_collator(clean: Rows, write: Callable[[Rows], Path], tiny: Tiny) -> None:
    from mglmm.trainer.data_collator import MglmmDataCollator

    one = row(0) | {"regions": []}  # which a model without region encoder cannot be trained on
    one["messages"][0]["content"] = one["messages"][0]["content"].replace(" in <region>", "")
    batch = MglmmDataCollator(tiny.processor)([{**one, "image": PIL.Image.open(io.BytesIO(one["image"]["bytes"]))}])
    last = int((batch["input_ids"][0] == tiny.processor.seg_token_id).nonzero().max())
    path = write({("default", "train"): [one]})
    assert lint(path, processor=tiny.processor, max_length=last + 1).clean
    assert lint(path, processor=tiny.processor, max_length=last).counts == {"[SEG] lost to truncation": 1}


def test_the_list_of_issues_is_bounded(clean: Rows, write: Callable[[Rows], Path]) -> None:
    bad = row(1)
    bad["masks"].pop()
    clean["default", "train"] += [bad] * 150
    report = lint(write(clean), config="default")
    assert len(report.issues) == 100 and report.counts == {TAGS: 150}
    assert "  and 140 more" in str(report).splitlines()
    assert {config for config, _ in report.rows} == {"default"}


def test_other_data_is_refused(tmp_path: Path) -> None:
    datasets.Dataset.from_list([{"text": "a"}]).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"the columns \['image', .* are missing"):
        lint(tmp_path)


@pytest.mark.parametrize("images", ["embed", "path"])
def test_what_is_prepared_is_clean_and_can_be_looked_at(tiny_dataset: Path, tmp_path: Path, images: str) -> None:
    for number, file in enumerate(sorted((tiny_dataset / "images").iterdir())):  # the fixture's pictures are all alike
        file.write_bytes(jpeg(number))
    prepare("photos", tiny_dataset, tmp_path / "rows", images=images, num_proc=1)
    page = tmp_path / "page.html"
    assert lint(tmp_path / "rows", html=page, samples=8).clean
    assert page.read_text(encoding="utf-8").count("<article") == 8


@pytest.mark.parametrize(
    ("options", "status", "shown"),
    [
        ([], 1, "tags differ from masks: 1"),
        (["--config", "benchmark"], 0, "clean"),
        (["--max-length", "100"], 2, "name the --model whose tokens are meant"),
        (["--config", "nothing"], 2, "nothing"),
    ],
)
def test_the_exit_status_says_whether_it_is_clean(
    clean: Rows,
    write: Callable[[Rows], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    status: int,
    shown: str,
) -> None:
    clean["default", "train"][0]["masks"].pop()
    monkeypatch.setenv("MGLMM_DEBUG", "")
    monkeypatch.setattr(sys, "argv", ["mglmm", "lint", str(write(clean)), *options])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert (exit_.value.code or 0) == status
    captured = capsys.readouterr()
    assert shown in captured.out + captured.err and "Traceback" not in captured.err


# ------------------------------------------------------------------ the page


def undecoded(number: int) -> dict[str, Any]:
    one = row(number)
    return {**one, "task": "referring" if number else "absent"}


def test_the_page_shows_phrases_masks_and_regions_and_is_safe() -> None:
    evil = undecoded(1)
    evil["messages"][1]["content"] = "<script>x</script> <p> <b>hat</b> </p> [SEG] and <p> dog </p> [SEG]."
    evil["source"] = "<i>s</i>"
    bad = undecoded(2)
    bad["masks"].pop()
    samples = [Sample("a/b/0", undecoded(0)), Sample("a/b/1", evil), Sample("a/b/2", bad, ("tags & masks",))]
    page = render_explorer(samples, "my <rows>", "a/b: 3 rows\n1 issues")
    assert "3 sampled rows" in page and "my &lt;rows&gt;" in page
    assert page.count("<article") == 3 and page.count("<path") == 2 * 3  # a region and two masks
    assert page.count(">region 1</mark>") == 2 and ">dog</mark>" in page
    assert "&lt;script&gt;" in page and "<script" not in page and "<b>hat" not in page and "<i>s" not in page
    assert '<p class="note">tags &amp; masks</p>' in page and "cannot be shown: tags and masks do not match" in page
    assert page.count('<label><input type="radio"') == 3  # all, absent, referring
    assert "src=" not in page and "http" not in re.sub(r'http-equiv="[^"]*"', "", page)
    assert 'class="user"' in page and page.count("There is no cat.</span>") == 2


def test_the_page_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mglmm.datasets_scripts.explorer.MAX_PAGE_BYTES", 20_000)
    page = render_explorer([Sample(f"a/b/{n}", undecoded(n)) for n in range(8)], "rows")
    assert len(page) < 40_000 and "more were too large for this page" in page


def test_every_group_is_sampled_in_the_same_way_each_time() -> None:
    def sample(seed: int) -> list[str]:
        sampler = Sampler(8, seed)
        for number in range(100):
            sampler.offer("many", Sample(f"m{number}", {}))
        sampler.offer("few", Sample("f", {}))
        return [sample.row_id for sample in sampler.samples()]

    assert sample(0) == sample(0) != sample(1)
    assert "f" in sample(0) and len(sample(0)) == 3  # at most a quarter of one group
