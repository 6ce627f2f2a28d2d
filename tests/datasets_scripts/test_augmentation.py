import json
import multiprocessing
import os
import random
import signal
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from mglmm.cli import app
from mglmm.datasets_scripts import augmentation
from mglmm.datasets_scripts import prepare as prepare_module
from mglmm.datasets_scripts.augmentation import augment, save_picture, swap_sides
from mglmm.datasets_scripts.builder import UscdfBuilder
from mglmm.datasets_scripts.captions import CocoCaptions
from mglmm.datasets_scripts.hierarchical_coco import HierarchicalCoco
from mglmm.datasets_scripts.prepare import prepare
from mglmm.processing.rle import decode_mask
from tests.datasets_scripts.conftest import annotation, box_rle
from tests.datasets_scripts.test_prepare import files_of, load

SIZE = (40, 60)
YELLOW, BLUE = (230, 210, 40), (20, 30, 120)  # far apart in brightness, so that they are in grey, too


def record(*annotations: dict, **fields) -> tuple[PIL.Image.Image, dict, list[dict]]:
    """A blue picture of height 40 and width 60 whose first annotation is yellow."""
    pixels = np.full((*SIZE, 3), BLUE, dtype=np.uint8)
    pixels[decode_mask(annotations[0]["segmentation"])] = YELLOW
    image = {"id": 1, "file_name": "a.jpg", "height": SIZE[0], "width": SIZE[1], "source": "test", **fields}
    return PIL.Image.fromarray(pixels), image, list(annotations)


def thing(number: int, label: str, box: tuple[int, int, int, int], parent: int | None = None, **fields) -> dict:
    level = "object" if parent is None else "part"
    return {**annotation(number, 1, label, level, parent, SIZE, box), **fields}


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch):
    """Lets chance no say: what is named happens always, a crop to the given rows and columns, and nothing else ever."""

    def choose(*, flip: bool = False, window: tuple[slice, slice] | None = None, colour: bool = False) -> None:
        monkeypatch.setattr(augmentation, "FLIP_SHARE", float(flip))
        monkeypatch.setattr(augmentation, "CROP_SHARE", float(window is not None))
        monkeypatch.setattr(augmentation, "COLOUR_SHARE", float(colour))
        monkeypatch.setattr(augmentation, "_draw_window", lambda *_: window)

    return choose


@pytest.mark.parametrize(
    ("label", "swapped"),
    [
        ("front_left_door", "front_right_door"),
        ("right-hand side", "left-hand side"),
        ("Left/RIGHT", "Right/LEFT"),  # each as it was written
        ("left2 (right)", "right2 (left)"),  # digits and brackets end a word
        ("leftover upright bright", "leftover upright bright"),  # other words
        ("éright", "éright"),  # a letter that is not ASCII does not end one
    ],
)
def test_left_and_right_change_places(label: str, swapped: str) -> None:
    assert swap_sides(label) == swapped and swap_sides(swapped) == label


def test_a_mirrored_left_door_is_a_right_door_on_the_other_side(only) -> None:
    only(flip=True)
    door = thing(2, "front_left_door", (5, 10, 20, 35), parent=1, area=375, bbox=[5, 10, 15, 25], iscrowd=0)
    car = thing(1, "car", (5, 5, 50, 35))
    picture, image, annotations = record(
        door, car, ignore_mask=box_rle(SIZE, (0, 0, 4, 40)), known=frozenset({"left mirror"})
    )
    before = json.dumps(annotations)
    mirrored, described, found = augment(picture, image, annotations, random.Random(0))

    expected = {"label": "front_right_door", "segmentation": box_rle(SIZE, (40, 10, 55, 35)), "bbox": [40, 10, 15, 25]}
    assert found[0] == {**door, **expected}
    assert found[1] == {**car, "segmentation": box_rle(SIZE, (10, 5, 55, 35))}
    assert described["ignore_mask"] == box_rle(SIZE, (56, 0, 60, 40))
    assert described["known"] == {"right mirror", "front right door", "car"}
    assert mirrored.getpixel((40, 10)) == YELLOW == mirrored.getpixel((54, 34))
    assert mirrored.getpixel((39, 10)) == BLUE == mirrored.getpixel((55, 34))
    assert json.dumps(annotations) == before and image["known"] == {"left mirror"}


def boxes(draw, least: int) -> tuple[int, int, int, int]:
    left, top = draw(st.integers(0, SIZE[1] - least)), draw(st.integers(0, SIZE[0] - least))
    return left, top, draw(st.integers(left + least, SIZE[1])), draw(st.integers(top + least, SIZE[0]))


@settings(max_examples=60)
@given(data=st.data(), seed=st.integers(0, 10**9))
def test_masks_stay_on_what_they_are_of(data: st.DataObject, seed: int) -> None:
    largest, other = data.draw(st.composite(boxes)(8)), data.draw(st.composite(boxes)(2))
    picture, image, annotations = record(
        thing(1, "left box", largest), {**thing(2, "box", other), "level": "stuff"}, ignore_mask=box_rle(SIZE, largest)
    )
    view, described, found = augment(picture, image, annotations, random.Random(seed))

    height, width = described["height"], described["width"]
    assert view.size == (width, height) and 20 <= height <= 40 and 30 <= width <= 60
    assert 0.75 <= (width / 60) / (height / 40) <= 4 / 3
    grey = np.asarray(view.convert("L")).astype(int)
    first = decode_mask(found[0]["segmentation"])
    # Two colours go in, and two come out: where it is bright, there is the box.
    bright = np.ones_like(first) if np.ptp(grey) < 5 else grey > (grey.min() + grey.max()) / 2
    np.testing.assert_array_equal(first, bright)
    assert described["ignore_mask"] == found[0]["segmentation"]
    whole = (largest[2] - largest[0]) * (largest[3] - largest[1])
    assert first.sum() >= 0.6 * whole and "asked" not in found[0]

    whole = (other[2] - other[0]) * (other[3] - other[1])
    left = decode_mask(found[1]["segmentation"]).sum() if len(found) == 2 else 0
    enough = left == whole or (left >= 0.25 * whole and left >= 16)
    assert (len(found) == 2) == (left > 0) and (left == 0 or found[1].get("asked", True) == enough)
    assert described["known"] in ({"left box", "box"}, {"right box", "box"})


@pytest.mark.parametrize(
    ("things", "expected"),
    [
        # Columns 0 to 30 stay. What does not reach beyond them is as it was, however small.
        ([("cup", (0, 0, 3, 3), None)], [("cup", (0, 0, 3, 3), True)]),
        # A quarter is enough to ask for, less is not, and of what lies outside nothing is left.
        ([("dog", (20, 0, 60, 10), None)], [("dog", (20, 0, 30, 10), True)]),
        ([("dog", (21, 0, 60, 10), None)], [("dog", (21, 0, 30, 10), False)]),
        ([("dog", (30, 0, 60, 10), None)], []),
        ([("pen", (27, 0, 35, 5), None)], [("pen", (27, 0, 30, 5), False)]),  # 15 pixels of 40
        # Parts of what is hardly there are not asked for, nor are their parts; of what is asked for they are.
        (
            [("car", (20, 0, 60, 30), None), ("door", (20, 0, 28, 9), 0), ("handle", (20, 0, 26, 4), 1)],
            [("car", (20, 0, 30, 30), True), ("door", (20, 0, 28, 9), True), ("handle", (20, 0, 26, 4), True)],
        ),
        (
            [("car", (22, 0, 60, 30), None), ("door", (22, 0, 29, 9), 0), ("handle", (22, 0, 26, 4), 1)],
            [("car", (22, 0, 30, 30), False), ("door", (22, 0, 29, 9), False), ("handle", (22, 0, 26, 4), False)],
        ),
        # A part that sticks out of its owner keeps it, though the owner's own mask is gone.
        (
            [("bag", (30, 0, 60, 30), None), ("strap", (10, 0, 40, 3), 0), ("buckle", (50, 0, 60, 9), 0)],
            [("bag", (10, 0, 30, 3), False), ("strap", (10, 0, 30, 3), False)],
        ),
    ],
)
def test_what_a_crop_leaves(things: list, expected: list, only) -> None:
    only(window=(slice(0, 40), slice(0, 30)))
    annotations = [thing(index, *each) for index, each in enumerate(things)]
    _, described, found = augment(*record(*annotations), random.Random(0))
    assert [(each["label"], each["segmentation"], each.get("asked", True)) for each in found] == [
        (label, box_rle((40, 30), box), asked) for label, box, asked in expected
    ]
    assert described["known"] == {label for label, _, _ in things} and described["width"] == 30


def test_a_crowd_stays_unasked_and_an_emptied_ignore_mask_goes(only) -> None:
    only(window=(slice(0, 40), slice(0, 30)))
    crowd = thing(1, "person", (0, 0, 10, 10), iscrowd=True, asked=False)
    _, described, found = augment(*record(crowd, ignore_mask=box_rle(SIZE, (40, 0, 50, 40))), random.Random(0))
    assert (found[0]["iscrowd"], found[0]["asked"], described["ignore_mask"]) == (True, False, None)


def test_a_circle_of_parts_ends(only) -> None:
    only(window=(slice(0, 40), slice(0, 30)))
    circle = [thing(1, "hub", (0, 0, 10, 10), 2), thing(2, "rim", (30, 0, 40, 10), 1)]
    found = augment(*record(*circle), random.Random(0))[2]
    assert [each["label"] for each in found] == ["hub", "rim"]


def test_a_picture_of_another_size_is_refused() -> None:
    picture, image, annotations = record(thing(1, "box", (0, 0, 9, 9)))
    with pytest.raises(ValueError, match=r"picture of \(40, 60\) pixels, image of \(60, 40\)"):
        augment(picture.transpose(PIL.Image.Transpose.ROTATE_90), image, annotations, random.Random(0))
    with pytest.raises(ValueError, match=r"mask size \[40, 60\], image size \[41, 60\]"):
        augment(picture, {**image, "height": 41}, annotations, random.Random(0))


def test_a_folder_that_cannot_be_written_ends_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RuntimeError, match="augmented pictures cannot be written into"):
        save_picture(PIL.Image.new("RGB", (2, 2)), tmp_path / "file")


# ------------------------------------------------------------------ the rows


class Recorder(HierarchicalCoco):
    """Keeps what the questions of each view are drawn from."""

    def turns(self, scene, absent, generator):
        self.drawn = [*getattr(self, "drawn", []), (scene, absent)]
        return super().turns(scene, absent, generator)


def test_what_a_crop_took_away_is_never_refused(tiny_dataset: Path, tiny_content: dict, tmp_path: Path) -> None:
    # A second photograph of the source shows a cat, so that there is something to refuse.
    content = {
        "images": [{**tiny_content["images"][0], "id": number, "file_name": "person.jpg"} for number in (1, 2)],
        "annotations": [
            *[each for each in tiny_content["annotations"] if each["image_id"] == 1],
            annotation(50, 1, "left_shoe", "part", 1, SIZE, (20, 36, 25, 40)),
            annotation(51, 2, "cat", "object", None, SIZE, (0, 0, 30, 30)),
        ],
    }
    (tiny_dataset / "annotations.json").write_text(json.dumps(content))
    builder = Recorder(cache_dir=str(tmp_path / "cache"), data_dir=str(tiny_dataset), augment=40)
    builder.split_items()
    assert builder.usable_rows(1)

    fewer = 0
    for scene, absent in builder.drawn:
        refusable = {label.name for label in (*absent.same_source, *absent.other_source)}
        # The shoe is the left one, as in the vocabulary, unless the view is mirrored.
        assert refusable == ({"cat"} if "left shoe" in scene.names else {"cat", "left shoe"})
        fewer += "bag" not in {target.noun.name for target in scene.objects}
        # What is asked for was asked for before; the ring is too small in any view.
        assert {part.noun.name for part in scene.parts} <= {"hair", "coat", "jeans", "left shoe", "right shoe"}
    assert len(builder.drawn) == 41 and fewer > 5
    sides = {name for scene, _ in builder.drawn for name in scene.names if "shoe" in name}
    assert sides == {"left shoe", "right shoe"}


def test_a_rest_of_an_instance_is_neither_counted_nor_told_apart(tiny_dataset: Path, tmp_path: Path, only) -> None:
    only(window=(slice(0, 40), slice(0, 47)))  # a fifth of the right dog
    builder = Recorder(cache_dir=str(tmp_path / "cache"), data_dir=str(tiny_dataset), augment=1)
    builder.split_items()
    assert builder.usable_rows(2)
    dogs = [next(target for target in scene.objects if target.noun.name == "dog") for scene, _ in builder.drawn]
    assert [len(target.instances) for target in dogs] == [2, 0]
    # It is in the mask of all dogs nevertheless.
    assert decode_mask(dogs[1].mask).sum() == 10 * 10 + 2 * 10


def test_no_colours_are_told_of_a_grey_view(tiny_dataset: Path, tmp_path: Path, only, monkeypatch) -> None:
    only(colour=True)
    monkeypatch.setattr(augmentation, "GREY_SHARE", 1.0)
    builder = Recorder(cache_dir=str(tmp_path / "cache"), data_dir=str(tiny_dataset), augment=1)
    builder.split_items()
    assert builder.usable_rows(4)
    told = [{target.colour for target in (*scene.objects, *scene.parts)} - {None} for scene, _ in builder.drawn]
    assert told[0] and not told[1]


def without_pictures(output: Path, config: str, split: str, tmp_path: Path) -> list[dict]:
    return load(output, config, split, tmp_path).remove_columns("image").to_list()


def test_only_training_rows_of_other_views_are_added(tiny_dataset: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(prepare_module, "ROWS_PER_SHARD", 1)  # an item in each shard: three processes have work
    plain = prepare("photos", tiny_dataset, tmp_path / "plain", num_proc=1, seed=3)
    one = prepare("photos", tiny_dataset, tmp_path / "one", num_proc=1, seed=3, augment=2)
    prepare("photos", tiny_dataset, tmp_path / "three", num_proc=3, seed=3, augment=2)
    before, after = files_of(tmp_path / "plain"), files_of(tmp_path / "one")
    assert before.keys() == after.keys()  # with embedded pictures there is no folder of them
    assert {name for name in before if before[name] != after[name]} - {"README.md"} == {
        f"default/train-0000{number}-of-00003.parquet" for number in range(3)
    }
    three = files_of(tmp_path / "three")
    del after["README.md"], three["README.md"]  # the summary in it names the folder
    assert after == three

    rows = without_pictures(tmp_path / "one", "default", "train", tmp_path)
    originals = [row for row in rows if "/" not in row["image_id"]]
    assert originals == without_pictures(tmp_path / "plain", "default", "train", tmp_path)
    assert {row["image_id"] for row in rows} == {f"{n}{view}" for n in (1, 2, 4) for view in ("", "/view1", "/view2")}
    assert len({json.dumps(row["messages"]) for row in rows}) > 2 * len(originals)  # each view has words of its own
    assert one.skipped == plain.skipped
    for row in load(tmp_path / "one", "default", "train", tmp_path):
        assert all(mask["size"] == list(row["image"].size[::-1]) for mask in row["masks"])


def die_at_the_last_shard(data_dir: Path, output: Path, options: dict) -> None:
    """Runs in a process of its own, so that nothing needs to be undone."""
    write_shard = prepare_module.write_shard

    def dying(builder: UscdfBuilder, shard: prepare_module.Shard) -> None:
        if shard.path.name == "train-00002-of-00003.parquet":
            os.kill(os.getppid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)
        write_shard(builder, shard)

    dying.__module__, dying.__qualname__ = write_shard.__module__, write_shard.__qualname__  # it goes to the workers
    prepare_module.write_shard = dying
    prepare("photos", data_dir, output, num_proc=1, **options)


def test_a_killed_run_ends_in_the_same_rows_and_pictures(tiny_dataset: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(prepare_module, "ROWS_PER_SHARD", 1)
    output = tmp_path / "out"
    options = {"images": "path", "augment": 2}
    whole = prepare("photos", tiny_dataset, output, **options)
    expected = files_of(output)
    pictures = {name for name in expected if name.startswith("augmented/")}
    assert len(pictures) == 6 and all(name.endswith(".jpg") for name in pictures)
    rows = load(output, "default", "train", tmp_path).cast_column("image", datasets.Image(decode=False))
    used = {row["image"]["path"] for row in rows if "/" in row["image_id"]}
    assert used == {str(output / name) for name in pictures}

    output.rename(tmp_path / "whole")
    killed = multiprocessing.get_context("fork").Process(
        target=die_at_the_last_shard, args=(tiny_dataset, output, options)
    )
    killed.start()
    killed.join(300)
    assert killed.exitcode == -signal.SIGKILL
    left = files_of(output)
    assert left.keys() & pictures and not left.keys() >= pictures
    (output / "augmented" / "0.1.partial").write_bytes(b"half a picture")
    with pytest.raises(ValueError, match="begun with augment 2 instead of 1: use the same options"):
        prepare("photos", tiny_dataset, output, images="path", augment=1)
    again = prepare("photos", tiny_dataset, output, **options)
    assert again == whole and files_of(output) == expected


def test_the_builder_streams_other_views_from_its_cache(tiny_dataset: Path, tmp_path: Path) -> None:
    builder = HierarchicalCoco(
        config_name="default", data_dir=str(tiny_dataset), cache_dir=str(tmp_path / "cache"), augment=1
    )
    rows = {row["image_id"]: row for row in builder.as_streaming_dataset("train") if row["masks"]}
    assert list(rows) == ["1", "1/view1", "2", "2/view1", "4", "4/view1"]
    assert rows["4/view1"]["image"].size[::-1] == tuple(rows["4/view1"]["masks"][0]["size"])
    assert len(list((tmp_path / "cache" / "augmented").glob("*.jpg"))) == 3


def test_a_damaged_picture_keeps_the_rows_of_its_own(tiny_dataset: Path, hierarchical, monkeypatch) -> None:
    monkeypatch.setattr(HierarchicalCoco, "READS_PICTURES", False)  # what is read for its colours is skipped before
    file = tiny_dataset / "images" / "park.jpg"
    file.write_bytes(file.read_bytes()[:-12])
    builder = hierarchical(tiny_dataset, augment=3)
    builder.split_items()
    assert {row["image_id"] for row in builder.usable_rows(2)} == {"2"}
    assert builder.skipped == {"augmented views of an image that cannot be read": 1}


def test_texts_that_are_given_are_not_augmented(tiny_dataset: Path, tmp_path: Path) -> None:
    message = "augment=1 needs a family that draws its questions from labelled masks, .* CocoCaptions are given"
    with pytest.raises(ValueError, match=message):
        prepare("coco_captions", tiny_dataset, tmp_path / "out", augment=1)
    with pytest.raises(ValueError, match="at least 0, not -1"):
        prepare("photos", tiny_dataset, tmp_path / "out", augment=-1)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=message):
        CocoCaptions(cache_dir=str(tmp_path / "cache"), data_dir=str(tiny_dataset), augment=1).split_items()


def test_the_command(tiny_dataset: Path, tmp_path: Path) -> None:
    command = ["prepare", "photos", "--data-dir", str(tiny_dataset), "--output", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*command, "--images", "path", "--num-proc", "1", "--augment", "1"])
    assert result.exit_code == 0, result.output
    assert len(list((tmp_path / "out" / "augmented").iterdir())) == 3
