import re
from pathlib import Path

import pytest

from mglmm.datasets_scripts.annotation import review_page
from mglmm.datasets_scripts.annotation.review_page import write_review
from tests.datasets_scripts.annotation.run_folder import (
    both_contexts,
    context,
    exchange,
    house_tree,
    tree_node,
    write_image,
    write_run,
)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", tmp_path / "images")


def page_of(run: Path, samples: int = 12) -> str:
    write_review(run, run / "page.html", samples=samples)
    return (run / "page.html").read_text()


def test_an_image_with_its_tree_and_descriptions(run: Path) -> None:
    write_image(run, tree=house_tree(obj_4=True))
    page = page_of(run)
    assert page.count("<article") == 1 and page.count("<path ") == 4 and page.count("data:image/jpeg;base64,") == 1
    tree = page[page.index('<ul class="tree">') :]
    # nested: the house's list holds windows and door, the tree follows it
    names = re.findall(r"<b>(\d)</b><span>([a-z]+)(?: <i>× (\d)</i>)?</span>|(</?ul)", tree)
    parts = [number + label + count or tag for number, label, count, tag in names]
    assert parts == ["<ul", "1house", "<ul", "3window2", "4door", "</ul", "2tree", "</ul"]
    assert 'title="A window with clean lines that stands in plain view."' in tree
    assert tree.count('class="node weak"') == 1
    # a phrase, its mask and its place in the tree share a number, by which the styles light them
    assert re.search(r'<mark data-s="2"[^>]*>two windows</mark>', page)
    assert re.search(r'<mark data-s="1"[^>]*>A tall tree</mark> stands beside', page)
    assert 'main:has([data-s~="3"]:is(:hover, :focus-visible)) .node[data-s~="3"]' in page
    assert "<b>the whole image</b>" in page and "<b>house (1)</b>The house has" in page
    assert "37.5%" in tree  # the house


def test_statistics_failures_and_reasons(run: Path) -> None:
    root, house = both_contexts()
    house |= {"status": "failed", "tagged": "", "targets": [], "exchange": exchange(["C2", "C5", "C2"], ["C2"])}  # type: ignore[typeddict-item]
    write_image(run, items=[root, house], dropped=[(1, "too_small")])
    write_image(run, "sa_2", reason="image is a <riddle>")
    page = page_of(run)
    assert "No description of house (1): 2 answers broke the rules C2 C5, then C2" in page
    assert "<dd>1</dd>" in page and "<dt>images failed</dt>" in page and "<dd>56%</dd>" in page
    row = page.partition("<b>C2</b>")[2].partition("</tr>")[0]
    assert re.findall(r"</em>(.*?)<", row) == ["75%", "75%"]  # one of four, for those of the failed image count
    assert "<th>too_small</th>" in page
    assert "<tr><th>sa_2</th><td>image is a &lt;riddle&gt;</td></tr>" in page
    assert '<p class="note">2.0 masks a description, not 6 to 16 as in MGSCData</p>' in page


def test_texts_are_escaped_and_nothing_runs_or_loads(run: Path) -> None:
    evil = tree_node(1, "<script>alert(1)</script>", (0, 0, 9, 9), caption='"><img src=x onerror=alert(1)>')
    items = [context("root", "A <script>x</script> <obj_1>thing <i></obj_1> & <obj_1>a cat\x00</obj_1>.", ["obj_1"])]
    write_image(run, "<b>name</b>", tree={"nodes": [evil]}, items=items)
    page = page_of(run)
    assert "<script" not in page and "<img" not in page and "<b>name" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page and "&lt;b&gt;name" in page
    assert "src=" not in page.replace("&lt;img src=x", "")
    assert "http" not in re.sub(r'http-equiv="[^"]*"', "", page)
    assert "script-src" not in page and "default-src 'none'" in page


def test_a_missing_or_other_picture_is_said(run: Path, tmp_path: Path) -> None:
    write_image(run)
    (tmp_path / "images" / "sa_1.jpg").unlink()
    page = page_of(run)
    assert "the picture cannot be shown: image file is missing" in page and page.count("<path ") == 4
    folder = write_image(run)
    (folder.path / "tree.json").unlink()
    assert "a stage file is missing or broken" in page_of(run)


def test_samples_and_the_size_of_the_page(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(6):
        write_image(run, f"sa_{number}")
    page = page_of(run, samples=4)
    assert page.count("<article") == 4 and "4 of 6 images that are done" in page
    assert page_of(run, samples=4) == page
    monkeypatch.setattr(review_page, "MAX_PAGE_BYTES", len(page[page.index("<article") :]) // 2)
    smaller = page_of(run, samples=4)
    assert 1 <= smaller.count("<article") < 4 and "more were too large for this page" in smaller


def test_an_empty_run(run: Path) -> None:
    page = page_of(run)
    assert "0 of 0 images" in page and "<article" not in page
