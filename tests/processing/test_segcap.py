"""SegCap: its invariants, lossless serialisation, COCO records, and the pictures and pages made of it."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from matplotlib.path import Path as PolygonPath
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mglmm.processing.rle import decode_mask, encode_mask
from mglmm.processing.segcap import SegCap, Segment
from mglmm.processing.segcap_html import mask_outline
from mglmm.processing.segcap_plot import caption_parts, ink_color, segment_color
from mglmm.processing.uscdf import parse, render_list


def box_mask(height, width, x1, y1, x2, y2):
    mask = np.zeros((height, width), dtype=bool)
    mask[y1:y2, x1:x2] = True
    return mask


def make(phrases=("a dog", "the hat"), size=(60, 80), image=True, query="the query"):
    """A result with one box per phrase, each inside the one before, on a grey picture."""
    height, width = size
    answer = parse(f"I see {render_list(phrases)}.", query) if phrases else parse("Sorry, there is nothing.")
    segments = [
        Segment(
            mention.phrase,
            mention.span,
            box_mask(height, width, 5 * i, 5 * i, width - 5 * i, height - 5 * i),
            0.9 - i / 100,
        )
        for i, mention in enumerate(answer.mentions)
    ]
    picture = Image.new("RGB", (width, height), (128, 128, 128)) if image else None
    return SegCap(answer.text, answer.clean_text, segments, size, picture)


@pytest.mark.parametrize(
    ("mask", "box", "area"),
    [
        (np.zeros((3, 4), bool), (0, 0, 0, 0), 0),  # empty
        (np.ones((3, 4), bool), (0, 0, 4, 3), 12),  # full: half-open, x before y
        (np.ones((1, 1), bool), (0, 0, 1, 1), 1),
        (box_mask(3, 4, 2, 1, 3, 2), (2, 1, 3, 2), 1),  # one pixel
        (box_mask(5, 5, 0, 0, 1, 1) | box_mask(5, 5, 4, 3, 5, 4), (0, 0, 5, 4), 2),  # two components
    ],
)
def test_box_and_area(mask, box, area):
    segment = Segment("x", None, mask, 1.0)
    assert segment.box == box and segment.area == area
    assert all(type(side) is int for side in (*segment.box, segment.area))


def test_segment_guards_its_mask():
    mask = np.zeros((2, 2), bool)
    segment = Segment("x", None, mask, np.float32(0.5))
    with pytest.raises(ValueError, match="read-only"):
        segment.mask[0, 0] = True
    mask[1, 1] = True  # the caller's array stays writable
    assert type(segment.score) is float


@pytest.mark.parametrize(
    ("mask", "score", "message"),
    [
        (np.ones((2, 2)), 0.5, "must be bool"),
        (np.ones((1, 2, 2), bool), 0.5, r"\(H, W\)"),
        (np.ones((0, 2), bool), 0.5, r"\(H, W\)"),
        (np.ones((2, 2), bool), 1.01, "score"),
        (np.ones((2, 2), bool), float("nan"), "score"),
    ],
)
def test_segment_refuses(mask, score, message):
    with pytest.raises(ValueError, match=message):
        Segment("x", None, mask, score)


def test_equality_sees_every_field():
    mask = box_mask(3, 3, 0, 0, 2, 2)
    segment = Segment("a", (0, 1), mask, 0.5)
    assert segment == Segment("a", (0, 1), mask.copy(), 0.5)
    others = [Segment("b", (0, 1), mask, 0.5), Segment("a", None, mask, 0.5), Segment("a", (0, 1), ~mask, 0.5)]
    assert segment not in [*others, Segment("a", (0, 1), mask, 0.6), Segment("a", (0, 1), mask[:2], 0.5)]
    assert make(image=True) == make(image=False)  # the image takes no part
    assert make() != make(phrases=("a dog",))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": (80, 60)}, r"mask of \(60, 80\), the image \(80, 60\)"),
        ({"image": Image.new("RGB", (60, 80))}, "the image is 80x60 pixels .* masks are 60x80"),
        ({"clean_text": "I see"}, r"span \(6, 11\) of the clean text \(5 characters\)"),
        ({"clean_text": "I see a cat, and the hat."}, "does not hold the phrase 'a dog'"),
    ],
)
def test_segcap_refuses(arguments, message):
    result = make(image=False)
    with pytest.raises(ValueError, match=message):
        SegCap(**{**vars(result), **arguments})


@st.composite
def segcaps(draw):
    shape = draw(hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=12))
    phrases = draw(st.lists(st.sampled_from(["a dog", "狗", "<script>", 'x"y', "é\\"]), max_size=4))
    answer = parse("[SEG]" + (render_list(phrases) if phrases else ""), draw(st.text(max_size=5)))
    mask = st.one_of(hnp.arrays(bool, shape), st.sampled_from([np.zeros(shape, bool), np.ones(shape, bool)]))
    segments = [Segment(m.phrase, m.span, draw(mask), draw(st.floats(0, 1))) for m in answer.mentions]
    return SegCap(answer.text, answer.clean_text, segments, shape)


@settings(max_examples=300)
@given(segcaps())
def test_json_round_trip_is_lossless(result):
    loaded = SegCap.from_dict(json.loads(json.dumps(result.to_dict())))
    assert loaded == result
    assert [segment.box for segment in loaded.segments] == [segment.box for segment in result.segments]
    assert loaded.to_dict() == result.to_dict()


def broken(path, value):
    """`make().to_dict()` with one field replaced; `...` removes it."""
    data = json.loads(json.dumps(make().to_dict()))
    target = data
    for key in path[:-1]:
        target = target[key]
    if value is ...:
        del target[path[-1]]
    else:
        target[path[-1]] = value
    return data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "'image_size'"),
        ({}, "'image_size'"),
        (broken(["text"], ...), "'text' of a SegCap must be str"),
        (broken(["clean_text"], 5), "'clean_text' of a SegCap must be str"),
        (broken(["image_size"], [60]), "positive ints"),
        (broken(["image_size"], [60, "80"]), "positive ints"),
        (broken(["image_size"], [10**9, 10**9]), "exceeds the limit"),
        (broken(["image_size"], [60, 81]), r"mask has the size \[60, 80\], the image \[60, 81\]"),
        (broken(["segments"], {"0": {}}), "'segments'"),
        (broken(["segments", 0], "x"), "'span'"),
        (broken(["segments", 0, "span"], ...), "'span' of a SegCap must be list or null"),
        (broken(["segments", 0, "span"], [0]), r"\[start, end\]"),
        (broken(["segments", 0, "span"], [6.0, 11]), r"\[start, end\]"),
        (broken(["segments", 0, "span"], [-9, 3]), "does not hold"),
        (broken(["segments", 0, "phrase"], None), "'phrase'"),
        (broken(["segments", 0, "phrase"], "cat"), "does not hold"),
        (broken(["segments", 0, "score"], True), "'score'"),
        (broken(["segments", 0, "score"], 2.0), "score"),
        (broken(["segments", 0, "mask"], "abc"), "'mask'"),
        (broken(["segments", 0, "mask", "counts"], "1"), "cover 1 pixels"),
        (broken(["segments", 0, "mask", "size"], [80, 60]), r"mask has the size \[80, 60\]"),
    ],
)
def test_from_dict_refuses(data, message):
    with pytest.raises(ValueError, match=message):
        SegCap.from_dict(data)


def test_to_coco_values():
    result = make(phrases=("a dog", "the hat"), size=(60, 80))
    records = json.loads(json.dumps(result.to_coco(image_id=7, category_id=3)))
    assert records[1] == {
        "image_id": 7,
        "category_id": 3,
        "segmentation": encode_mask(result.segments[1].mask),
        "bbox": [5, 5, 70, 50],
        "area": 3500,
        "iscrowd": 0,
        "score": 0.89,
        "caption": "the hat",
    }


def test_to_coco_is_scored_perfectly_by_pycocotools(tmp_path, capsys):
    records = make(phrases=("a", "b", "c")).to_coco(image_id=1)
    truth = COCO()
    truth.dataset = {
        "images": [{"id": 1, "height": 60, "width": 80}],
        "categories": [{"id": 1, "name": "phrase"}],
        "annotations": [{**record, "id": number} for number, record in enumerate(records, start=1)],
    }
    truth.createIndex()
    results = tmp_path / "results.json"
    results.write_text(json.dumps(records))
    evaluation = COCOeval(truth, truth.loadRes(str(results)), "segm")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1)  # AP
    assert evaluation.stats[4] == pytest.approx(1)  # AP of medium objects: the areas arrive as areas of masks
    capsys.readouterr()


def test_to_table():
    result = make(phrases=("a dog", "a\x1b[31m very long phrase " + "x" * 40), size=(60, 80))
    assert result.to_table().splitlines() == [
        "#  phrase                                    score  area px  area %      box x1 y1 x2 y2",
        "----------------------------------------------------------------------------------------",
        "1  a dog                                      0.90     4800  100.0%     0    0   80   60",
        "2  a [31m very long phrase xxxxxxxxxxxxxxx…   0.89     3500   72.9%     5    5   75   55",
    ]


def test_repr_is_one_short_line():
    assert repr(make()) == "SegCap('I see a dog and the hat.', 2 segments: a dog 0.90, the hat 0.89, image=60x80)"
    assert repr(make(phrases=())) == "SegCap('Sorry, there is nothing.', 0 segments, image=60x80)"
    assert len(repr(make(phrases=[f"thing {i} " * 9 for i in range(40)], size=(400, 400)))) < 320
    assert repr(make().segments[1]) == "Segment('the hat', score=0.89, box=(5, 5, 75, 55), area=3500, image=60x80)"


@pytest.mark.parametrize(
    ("caption", "spans", "parts"),
    [
        ("a dog.", [(0, 5)], [("a dog", [0]), (".", [])]),
        ("a dog.", [None], [("a dog.", [])]),
        ("a b", [(2, 3), (0, 1)], [("a", [1]), (" ", []), ("b", [0])]),  # segments out of reading order
        ("dogs", [(0, 4), (0, 4)], [("dogs", [0, 1])]),  # one phrase, two masks
        ("red hat", [(0, 7), (4, 7)], [("red hat", [0])]),  # overlap: the later one is left to the legend
        ("a\x00\ud800b\n", [], [("a  b\n", [])]),  # what cannot be shown keeps its place
        ("", [], []),
    ],
)
def test_caption_parts(caption, spans, parts):
    mask = np.ones((1, 1), bool)
    segments = [Segment(caption[slice(*span)] if span else "q", span, mask, 1.0) for span in spans]
    assert caption_parts(caption, segments) == parts


def test_colors_are_distinct_and_readable():
    colors = [segment_color(index) for index in range(60)]
    assert len(set(colors)) == 60
    for color in colors:
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in np.array(ink_color(color)) / 255]
        assert 1.05 / (np.dot([0.2126, 0.7152, 0.0722], linear) + 0.05) >= 4.5  # WCAG contrast on white


def test_plot_tints_exactly_the_masks():
    answer = parse("I see <p> a dog </p> [SEG].")
    mask = box_mask(60, 80, 40, 0, 80, 60)
    result = SegCap(answer.text, answer.clean_text, [Segment("a dog", (6, 11), mask, 0.5)], (60, 80), make().image)
    page = result.plot()
    assert page.mode == "RGB" and page.size == (24 + 960 + 24 + 300 + 24, 24 + 720 + 24 + 38 + 24)
    pixels = np.asarray(page).astype(int)
    red, green, blue = segment_color(0)
    picture = pixels[24:744, 24:984]
    assert (picture[:, :470] == 128).all()  # left of the mask
    np.testing.assert_allclose(picture[40, 520], 0.6 * 128 + 0.4 * np.array([red, green, blue]), atol=1.5)
    assert np.abs(picture[300, 478:488] - [red, green, blue]).sum(axis=-1).min() < 30  # its outline
    # The phrase stands in its colour in the legend and in the caption.
    ink = np.array(ink_color((red, green, blue)))
    for region in (pixels[24:80, 1008:], pixels[760:]):
        assert (np.abs(region - ink).sum(axis=-1) < 30).any()


@pytest.mark.parametrize(
    ("size", "phrases"),
    [
        ((1, 1), ("a",)),  # one pixel
        ((20, 20_000), ("a", "b")),  # strips
        ((3000, 4), ("a",)),
        ((60, 80), ()),  # nothing found
        ((60, 80), ("狗" * 200,)),  # a phrase wider than the page
        ((60, 80), ("word " * 80,)),
        ((600, 600), [f"thing {i}" for i in range(59)]),  # more rows than the picture is tall
    ],
)
def test_plot_and_page_of_odd_results(size, phrases):
    result = make(phrases, size)
    page = np.asarray(result.plot())
    assert max(page.shape) < 3000
    # Nothing is cut off at the edges (the last punctuation may hang over the margin).
    for edge in (page[:8], page[-8:], page[:, :8], page[:, -3:]):
        assert (edge == 255).all()
    assert read_page(result.to_html()).text("caption") == result.clean_text


def test_empty_masks_and_segments_without_span_are_listed():
    masks = [np.zeros((60, 80), bool), np.ones((60, 80), bool)]
    segments = [Segment("the query", None, mask, 0.5) for mask in masks]
    result = SegCap("It is [SEG] [SEG].", "It is.", segments, (60, 80), make().image)
    assert result.plot().size[0] == 24 + 960 + 24 + 300 + 24
    page = read_page(result.to_html())
    assert page.text("rows") == "1the queryscore 0.50 · area 0.0%2the queryscore 0.50 · area 100.0%"
    assert [attributes["d"] == "" for tag, attributes in page.tags if tag == "path"] == [False, True]


@pytest.mark.parametrize("method", ["plot", "to_html"])
def test_drawing_needs_the_right_image(method):
    result = make(image=False)
    with pytest.raises(ValueError, match="carries no image"):
        getattr(result, method)()
    with pytest.raises(ValueError, match="80x60 pixels"):
        getattr(result, method)(Image.new("RGB", (60, 80)))
    assert getattr(result, method)(Image.new("RGBA", (80, 60)))  # any mode


class PageReader(HTMLParser):
    """Tags with their attributes, and the texts of the caption and of the legend."""

    def __init__(self):
        super().__init__()
        self.tags, self.open, self.texts = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta",):
            self.open.append((tag, dict(attributes)))

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag, "the page is not well formed"

    def handle_data(self, data):
        self.texts.append((list(self.open), data))

    def text(self, part):
        inside = {"caption": ("p", {"class": "caption"}), "rows": ("ol", {})}[part]
        return "".join(data for parents, data in self.texts if inside in parents).strip().replace("\n", "")


def read_page(page):
    page.encode("utf-8")
    reader = PageReader()
    reader.feed(page)
    assert reader.open == []
    return reader


def test_page_escapes_every_text_and_loads_nothing():
    hostile = [
        "<script>alert(1)</script>",
        '"><img src=x onerror=alert(1)>',
        "' onmouseover='alert(1)",
        "&lt;b&gt; {0} %s",
    ]
    answer = parse(
        [("</title><script>x</script> ", False), *[p for h in hostile for p in mention(h)], (" \ud800\x00", False)]
    )
    mask = np.ones((6, 8), bool)
    segments = [Segment(m.phrase, m.span, mask, 0.5) for m in answer.mentions]
    page = SegCap(answer.text, answer.clean_text, segments, (6, 8), Image.new("RGB", (8, 6))).to_html()
    reader = read_page(page)
    assert {tag for tag, _ in reader.tags} == set(
        "html head meta title style body main svg image path ol li b span small p mark".split()
    )
    assert not [name for _, attributes in reader.tags for name in attributes if name.startswith("on")]
    links = [value for _, attributes in reader.tags for name, value in attributes.items() if name in ("href", "src")]
    assert len(links) == 1 and links[0].startswith("data:image/jpeg;base64,")
    assert "url(" not in page and "@import" not in page
    assert "default-src &#x27;none&#x27;" in page or "default-src 'none'" in page
    assert " ".join(reader.text("caption").split()) == " ".join(
        ["</title><script>x</script>", *" ".join(hostile).split()]
    )


def mention(phrase):
    return [("<p>", True), (f" {phrase} ", False), ("</p>", True), ("[SEG]", True), (" ", False)]


def test_page_ties_phrases_rows_and_masks_together():
    result = make(phrases=("a dog", "the hat", "the tail"))
    page = result.to_html()
    reader = read_page(page)
    tied = {tag: [a["data-s"] for t, a in reader.tags if t == tag] for tag in ("path", "mark", "li")}
    assert tied == {"path": ["0", "1", "2"], "mark": ["0", "1", "2"], "li": ["0", "1", "2"]}
    for tag, attributes in reader.tags:
        if "data-s" in attributes:
            color = "#" + bytes(segment_color(int(attributes["data-s"]))).hex()
            assert f"--c:{color};" in attributes["style"]
            assert tag == "path" or attributes["tabindex"] == "0"  # the keyboard reaches what can be read
    for element in ("path", "mark", "li"):
        assert f'main:has([data-s~="2"]:is(:hover, :focus-visible)) {element}[data-s~="2"]' in page
    # an object around its parts is drawn as a rim, the innermost part is not
    assert [attributes.get("class") for tag, attributes in reader.tags if tag == "path"] == ["whole", "whole", None]


def test_page_carries_the_picture_at_a_bounded_size():
    image = Image.linear_gradient("L").resize((3200, 800)).convert("RGB")
    result = SegCap("", "", [Segment("q", None, box_mask(800, 3200, 0, 0, 1, 1), 1.0)], (800, 3200), image)
    page = result.to_html()
    inside = Image.open(io.BytesIO(base64.b64decode(re.search(r"base64,([^\"]+)", page)[1])))
    assert inside.size == (1600, 400)
    difference = np.abs(np.asarray(inside).astype(int) - np.asarray(image.resize((1600, 400))))
    assert difference.mean() < 2
    assert ' d="M1,0' in page  # a mask of one pixel survives the reduction


def test_notebook_shows_the_page_in_a_frame():
    result = make()
    frame = PageReader()
    frame.feed(result._repr_html_())
    assert [(tag, attributes["srcdoc"] == result.to_html()) for tag, attributes in frame.tags] == [("iframe", True)]
    assert make(image=False)._repr_html_() is None


@pytest.mark.parametrize(
    ("mask", "path"),
    [
        ([[0]], ""),
        ([[1]], "M1,0l1,1 -1,1 -1,-1z"),  # corners cut at half pixels
        ([[1, 1, 1]], "M1,0l4,0 1,1 -1,1 -4,0 -1,-1z"),
    ],
)
def test_mask_outline_values(mask, path):
    assert mask_outline(np.array(mask, dtype=bool)) == path


@settings(max_examples=300)
@given(hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=9)))
def test_mask_outline_encloses_exactly_the_mask(mask):
    ys, xs = np.indices(mask.shape)
    centers = np.stack([2 * xs.ravel() + 1, 2 * ys.ravel() + 1], axis=1)
    inside = np.zeros(mask.size, dtype=bool)
    for loop in mask_outline(mask).split("z")[:-1]:
        start, moves = loop[1:].split("l")
        steps = [[float(number) for number in pair.split(",")] for pair in [start, *moves.split(" ")]]
        inside ^= PolygonPath(np.cumsum(steps, axis=0)).contains_points(centers)  # even-odd
    np.testing.assert_array_equal(inside.reshape(mask.shape), mask)


def test_real_photo(shared_dir):
    photos = shared_dir / "data" / "photos"
    annotations = json.loads((photos / "annotations.json").read_text())
    info = next(image for image in annotations["images"] if image["source"] == "clothing-co-parsing")
    parts = [part for part in annotations["annotations"] if part["image_id"] == info["id"]]
    answer = parse(render_list([f"the {part['label']}" for part in parts]))
    masks = [decode_mask(part["segmentation"]) for part in parts]
    segments = [Segment(m.phrase, m.span, mask, 0.5) for m, mask in zip(answer.mentions, masks, strict=True)]
    with Image.open(photos / "images" / info["file_name"]) as image:
        result = SegCap(answer.text, answer.clean_text, segments, (info["height"], info["width"]), image.convert("RGB"))
    # COCO's own areas and boxes
    assert [record["area"] for record in result.to_coco(1)] == [part["area"] for part in parts]
    assert [record["bbox"] for record in result.to_coco(1)] == [part["bbox"] for part in parts]
    assert result.plot().height > 960
    assert len(read_page(result.to_html()).tags) > 4 * len(parts)
