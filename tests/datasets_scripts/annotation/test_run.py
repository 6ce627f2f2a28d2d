"""Whole runs against a server on loopback: they converge, fail as the rules say, go on after a kill, and pay for nothing twice."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mglmm.datasets_scripts.annotation.annotators import Annotator
from mglmm.datasets_scripts.annotation.chat import BudgetSpent, texts_of
from mglmm.datasets_scripts.annotation.config import AnnotationConfig, ContextConfig
from mglmm.datasets_scripts.annotation.export import export
from mglmm.datasets_scripts.annotation.facts import CONTEXT_HEAD, LABELING_HEAD
from mglmm.datasets_scripts.annotation.run import RunSummary, Source, list_work, plan_run, read_run, run_local
from mglmm.datasets_scripts.annotation.store import ImageFolder, finished_images
from tests.chat_server import ChatServer, Received, Reply, When, always, chat_server, nth
from tests.datasets_scripts.annotation.sa1b import knowing_answer, picture_number, write_images

ROOT = Path(__file__).resolve().parents[3]
KEY = "sk-loopback-secret-0123456789"
REQUESTS_PER_IMAGE = 4  # three objects, their five parts, the whole, the house; the car has wheels alone


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"), 4)


@pytest.fixture(scope="module")
def reference(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, bytes]]:
    """Every file of a run that nothing disturbed, and of its export."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENAI_API_KEY", KEY)
        folder = tmp_path_factory.mktemp("reference")
        with chat_server(knowing_answer) as server:
            summary = annotate(images, folder / "run", server)
        assert (summary.done, summary.failed, summary.stopped) == (4, 0, None)
        assert summary.requests == len(server.requests) == 4 * REQUESTS_PER_IMAGE
        yield files_of(folder / "run", folder / "export")


def annotate(
    images: Path,
    run: Path,
    server: ChatServer,
    *,
    config: AnnotationConfig | None = None,
    shard: tuple[int, int] = (0, 1),
    retry: bool = False,
    **options: Any,
) -> RunSummary:
    config = config or AnnotationConfig()
    who = Annotator(model="loopback", base_url=server.url, **{"timeout": 20.0, **options})
    items = list_work(Source("sa1b", images), run, config, who, shard=shard, limit=None)
    return run_local(items, run, config, who, shard=shard, num_proc=1, retry=retry)


def files_of(run: Path, destination: Path | None = None) -> dict[str, bytes]:
    """The stage files of all images, and of an export made of them."""
    files = {str(path.relative_to(run)): path.read_bytes() for path in run.glob("images/*/*/*") if path.is_file()}
    if destination:
        export(run, destination)
        files |= {
            f"export/{path.relative_to(destination)}": path.read_bytes()
            for path in destination.rglob("*")
            if path.is_file() and "imgs" not in path.relative_to(destination).parts
        }
    return files


def without_attempts(files: dict[str, bytes]) -> dict[str, bytes]:
    """Without the stage files that record how often something was asked."""
    return {name: content for name, content in files.items() if not name.endswith(("labels.json", "contexts.json"))}


def command(images: Path, run: Path, server: ChatServer, *options: str) -> list[str]:
    arguments = ["annotate", "run", str(images), str(run), "--layout", "sa1b", "--model", "loopback"]
    return [sys.executable, "-m", "mglmm.cli", *arguments, "--base-url", server.url, "--num-proc", "1", *options]


def payloads(run: Path, stage: str) -> dict[str, Any]:
    return {status["image_id"]: folder.read(stage) for folder, status in finished_images(run)}  # type: ignore[arg-type]


# ---------------------------------------------------------------- what comes out


def test_descriptions_name_everything_that_has_a_mask(
    images: Path, reference: dict[str, bytes], tmp_path: Path
) -> None:
    for name in ("sa_1", "sa_4"):
        folder = ImageFolder(tmp_path, name).path.relative_to(tmp_path)
        tree = json.loads(reference[f"{folder}/tree.json"])["payload"]
        assert Counter((node["label"], node["count"]) for node in tree["nodes"]) == Counter(
            {("house", 1): 1, ("car", 1): 1, ("tree", 1): 1, ("window", 2): 1, ("door", 1): 1, ("wheel", 2): 1}
        )
        items = json.loads(reference[f"{folder}/contexts.json"])["payload"]["items"]
        labels = {node["id"]: node["label"] for node in tree["nodes"]}
        described = {
            labels.get(item["about"], "root"): {labels[target] for target in item["targets"]} for item in items
        }
        assert described == {"root": {"house", "tree", "car"}, "house": {"window", "door"}}
    assert sum("annotations/" in name for name in reference) == 4


def asked_first(number: int, head: str) -> When:
    """The first questions about a picture with these lines; not those that say what was wrong with an answer."""

    def when(received: Received) -> bool:
        texts = " ".join(text for message in received.body["messages"] for text in texts_of(message))
        return head in texts and not received.is_repair and picture_number(received.body) == number

    return when


FAULTY = [
    (nth(0), "429"),  # tried again by the client
    (nth(1), "500"),
    (asked_first(1, LABELING_HEAD), "bad_json"),  # asked again with what was wrong
    (asked_first(2, LABELING_HEAD), "missing_ids"),
    (asked_first(3, LABELING_HEAD), "duplicate_tag"),
    (asked_first(4, LABELING_HEAD), "refuse"),
    (asked_first(1, CONTEXT_HEAD), "missing_ids"),
    (asked_first(2, CONTEXT_HEAD), "duplicate_tag"),
    (asked_first(3, CONTEXT_HEAD), "truncated"),
    (always, "400 response_format"),  # learnt once
]


def test_a_faulty_server_changes_nothing_but_the_attempts(
    images: Path, reference: dict[str, bytes], tmp_path: Path
) -> None:
    with chat_server(knowing_answer, FAULTY) as server:
        summary = annotate(images, tmp_path / "run", server, concurrency=2)
    assert (summary.done, summary.failed) == (4, 0)
    assert without_attempts(files_of(tmp_path / "run", tmp_path / "export")) == without_attempts(reference)
    statuses = Counter(received.status for received in server.requests)
    assert statuses[429] == statuses[500] == 1 and 2 <= statuses[400] <= 4  # a schema, then any JSON; by two at a time
    assert server.max_in_flight <= 2
    exchanges = [
        exchange
        for labels, contexts in zip(
            payloads(tmp_path / "run", "labels").values(), payloads(tmp_path / "run", "contexts").values(), strict=True
        )
        for exchange in [*labels["exchanges"], *(item["exchange"] for item in contexts["items"])]
    ]
    failed = Counter(code for exchange in exchanges for codes in exchange["attempts"] for code in codes)
    # Two levels of labels, and the whole of one picture each; a crop of a house is not told by its sky.
    assert failed["L1"] == 8 and failed["C2"] >= 2 and failed["finish:length"] >= 1
    assert all(exchange["attempts"][-1] == [] for exchange in exchanges)


def test_what_is_broken_fails_alone_and_is_retried_alone(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", 5)
    (images / "sa_2.json").write_text('{"image": ')
    (images / "sa_3.jpg").write_bytes(b"no picture")
    run = tmp_path / "run"
    with chat_server(knowing_answer, [(lambda received: picture_number(received.body) == 4, "refuse")]) as server:
        summary = annotate(images, run, server)
        refused = len(server.requests)
        again = annotate(images, run, server)
    assert (summary.done, summary.failed, again.done, again.kept, again.requests) == (2, 3, 2, 3, 0)
    assert refused == len(server.requests)
    reasons = {status["image_id"]: status.get("reason", "") for _, status in finished_images(run)}
    assert "JSON" in reasons["sa_2"] and "image cannot be read" in reasons["sa_3"]
    assert "never kept the rules: " in reasons["sa_4"] and reasons["sa_1"] == reasons["sa_5"] == ""
    assert not any("sa_" in reason for reason in reasons.values())  # or `stats` could not count them

    write_images(images, 5)  # the files are mended
    with chat_server(knowing_answer) as server:
        summary = annotate(images, run, server, retry=True)
        assert (summary.done, summary.failed, summary.kept) == (3, 0, 2)
        assert summary.requests == len(server.requests) == 3 * REQUESTS_PER_IMAGE
        again = annotate(images, run, server, retry=True)
        assert (again.done, again.kept, again.requests) == (0, 5, 0)


def test_a_retry_that_is_interrupted_goes_on_with_the_same_questions(images: Path, tmp_path: Path) -> None:
    runs = [tmp_path / name for name in ("whole", "interrupted")]
    for run in runs:
        with chat_server(knowing_answer, [(always, "refuse")]) as server:
            assert annotate(images, run, server).failed == 4
    with chat_server(knowing_answer) as server:
        assert annotate(images, runs[0], server, retry=True).done == 4
        asked = {received.hash for received in server.requests}
    with chat_server(knowing_answer) as server:
        spent = sum(
            json.loads(line)["prompt_tokens"] + json.loads(line)["completion_tokens"] for line in cache_lines(runs[1])
        )
        assert isinstance(
            annotate(images, runs[1], server, retry=True, max_total_tokens=spent + 5_000).stopped, BudgetSpent
        )
        assert annotate(images, runs[1], server, retry=True).failed == 0
        assert {received.hash for received in server.requests} == asked and len(server.requests) == len(asked)
    assert files_of(runs[0]) == files_of(runs[1])


def test_a_dry_run_leaves_a_run_as_it_is(images: Path, tmp_path: Path) -> None:
    run, config = tmp_path / "run", AnnotationConfig()
    with chat_server(knowing_answer) as server:
        annotate(images, run, server)
    other = Annotator(model="another", base_url="http://127.0.0.1:9/v1")
    items = list_work(Source("sa1b", images), run, config, other, begin=False)
    assert plan_run(items, run, config, "another", num_proc=1).estimate.requests == 4 * (REQUESTS_PER_IMAGE + 1)
    assert plan_run(items, run, config, "loopback", num_proc=1).finished == 4
    assert read_run(run)[2].model == "loopback"


def test_other_settings_ask_only_what_they_change(images: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    fewer = AnnotationConfig(context=ContextConfig(max_subtrees=0))
    with chat_server(knowing_answer) as server:
        first = annotate(images, run, server, config=fewer)
        second = annotate(images, run, server)
    assert first.requests == 4 * 3
    assert second.done == 4 and second.requests + first.requests == len(server.requests) == 4 * REQUESTS_PER_IMAGE


def test_a_dry_run_counts_the_requests_and_makes_none(images: Path, tmp_path: Path) -> None:
    config, who = AnnotationConfig(), Annotator(model="loopback", base_url="http://127.0.0.1:9/v1")
    items = list_work(Source("sa1b", images), tmp_path, config, who, shard=(0, 1), limit=None)
    plan = plan_run(items, tmp_path, config, "loopback", num_proc=1)
    assert (plan.images, plan.finished, plan.broken.total()) == (4, 0, 0)
    assert plan.estimate.requests == 4 * (
        REQUESTS_PER_IMAGE + 1
    )  # that merging leaves the car one part is not known yet
    assert plan.cost(1, 0) == plan.estimate.prompt_tokens / 1e6 > 0


def test_two_shards_are_one_run(images: Path, reference: dict[str, bytes], tmp_path: Path) -> None:
    with chat_server(knowing_answer) as server:
        halves = [annotate(images, tmp_path / "run", server, shard=(number, 2)) for number in (0, 1)]
    assert sum(half.done for half in halves) == 4 and all(half.done for half in halves)
    assert files_of(tmp_path / "run", tmp_path / "export") == reference


# ---------------------------------------------------------------- limits


def test_the_budget_is_never_exceeded_and_the_run_goes_on_with_a_larger_one(
    images: Path, reference: dict[str, bytes], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with chat_server(knowing_answer) as server:
        summary = annotate(images, run, server, max_total_tokens=5_000)
        spent = sum(
            json.loads(line)["prompt_tokens"] + json.loads(line)["completion_tokens"] for line in cache_lines(run)
        )
        assert isinstance(summary.stopped, BudgetSpent) and 0 < spent <= 5_000
        assert 0 < summary.requests == len(server.requests) < 4 * REQUESTS_PER_IMAGE
        summary = annotate(images, run, server, max_total_tokens=10**9)
        assert summary.stopped is None and len(server.requests) == 4 * REQUESTS_PER_IMAGE
    assert files_of(run, tmp_path / "export") == reference


def cache_lines(run: Path) -> list[str]:
    return [line for file in run.glob("cache/requests-*.jsonl") for line in file.read_text().splitlines()]


def test_a_key_that_is_not_accepted_stops_the_run_and_is_written_nowhere(
    images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    with chat_server(knowing_answer, [(always, "401")]) as server:
        done = subprocess.run(
            command(images, run, server),
            capture_output=True,
            text=True,
            env=environment(OPENAI_LOG="debug"),
            timeout=120,
        )
    assert done.returncode == 2 and "does not accept the key in OPENAI_API_KEY (401)" in done.stdout
    assert 1 <= len(server.requests) <= 8 and server.requests[0].authorization == f"Bearer {KEY}"
    written = b"".join(path.read_bytes() for path in run.rglob("*") if path.is_file())
    assert KEY.encode() not in written and KEY not in done.stdout + done.stderr
    assert read_run(run)[2].api_key_env == "OPENAI_API_KEY"


# ---------------------------------------------------------------- interruptions


class Held:
    """A fault that holds one request until it is let go, and says when it is there."""

    __name__ = "held"

    def __init__(self) -> None:
        self.reached, self.release = threading.Event(), threading.Event()

    def __call__(self, reply: Reply, _: Received) -> Reply:
        self.reached.set()
        assert self.release.wait(60)
        return reply


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **more}


def started(images: Path, run: Path, server: ChatServer, held: Held) -> subprocess.Popen[str]:
    """A process whose request has reached the server and waits there."""
    process = subprocess.Popen(
        command(images, run, server, "--concurrency", "3"),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    if not held.reached.wait(90):
        process.kill()
        pytest.fail(process.communicate()[1])
    return process


@pytest.mark.parametrize("number", [2, 8, 14], ids=["labels", "middle", "end"])
def test_killed_it_goes_on_and_ends_with_the_same_bytes(
    number: int, images: Path, reference: dict[str, bytes], tmp_path: Path
) -> None:
    run, held = tmp_path / "run", Held()
    with chat_server(knowing_answer, [(nth(number), held)]) as server:
        process = started(images, run, server, held)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        for stage in run.glob("images/*/*/geometry.json"):  # it may also have died in the middle of a file
            stage.with_name("contexts.json.x1.partial").write_text('{"items": [')
        answered = {json.loads(line)["key"] for line in cache_lines(run) if line.endswith("}")}
        before = len(server.requests)
        assert before > number
        held.release.set()
        summary = annotate(images, run, server)
    assert summary.requests == 4 * REQUESTS_PER_IMAGE - len(answered) == len(server.requests) - before
    lost = before - len(answered)
    assert 1 <= lost <= 3  # those in flight
    assert files_of(run, tmp_path / "export") == reference


def test_interrupted_it_finishes_what_is_in_flight(images: Path, reference: dict[str, bytes], tmp_path: Path) -> None:
    run, held = tmp_path / "run", Held()
    with chat_server(knowing_answer, [(nth(4), held)]) as server:
        process = started(images, run, server, held)
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        for line in process.stderr:
            if "stopping: requests in flight are finished first" in line:
                break
        held.release.set()
        output, errors = process.communicate(timeout=60)
        assert process.returncode == 130, errors
        assert "stopped: " in output and "Traceback" not in errors
        interrupted = len(server.requests)
        assert 4 < interrupted < 4 * REQUESTS_PER_IMAGE and len(cache_lines(run)) == interrupted
        summary = annotate(images, run, server)
        assert (summary.done, summary.stopped) == (4, None)
    assert len({received.hash for received in server.requests}) == len(server.requests) == 4 * REQUESTS_PER_IMAGE
    assert files_of(run, tmp_path / "export") == reference


def test_an_image_that_was_interrupted_is_not_failed(images: Path, tmp_path: Path) -> None:
    with chat_server(knowing_answer) as server:
        annotate(images, tmp_path, server, max_total_tokens=2_500)
    finished = [status["state"] for _, status in finished_images(tmp_path)]
    assert len(finished) < 4 and set(finished) <= {"done"}


def test_a_key_in_the_address_is_refused_before_anything_is_written() -> None:
    with pytest.raises(ValueError, match="^the address of the server holds more than scheme, host and path") as error:
        Annotator(model="m", base_url=f"https://me:{KEY}@host/v1")
    assert KEY not in str(error.value)


def test_another_source_needs_another_folder(images: Path, tmp_path: Path) -> None:
    who = Annotator(model="loopback")
    list_work(Source("sa1b", images), tmp_path / "run", AnnotationConfig(), who, shard=(0, 1), limit=None)
    other = write_images(tmp_path / "other", 1)
    with pytest.raises(ValueError, match="was begun with sa1b of .*: choose another folder for this source"):
        list_work(Source("sa1b", other), tmp_path / "run", AnnotationConfig(), who, shard=(0, 1), limit=None)
    with pytest.raises(ValueError, match="lies in .*, whose files are read"):
        list_work(Source("sa1b", other), other / "run", AnnotationConfig(), who)
    with pytest.raises(ValueError, match="shard 2/2 does not exist"):
        list_work(Source("sa1b", images), tmp_path / "run", AnnotationConfig(), who, shard=(2, 2), limit=None)


# ---------------------------------------------------------------- Ray


def test_ray_gives_the_same_bytes(
    images: Path, reference: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    ray = pytest.importorskip("ray", reason="the extra ray is not installed")
    import ray.data  # noqa: F811

    from mglmm.datasets_scripts.annotation.ray_engine import run_ray

    run, config = tmp_path / "run", AnnotationConfig()
    ray.init(
        num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}}
    )
    # Nothing begins before both workers are there, or the first one could be done before the second.
    ray.data.DataContext.get_current().wait_for_min_actors_s = 600
    try:
        with chat_server(knowing_answer) as server:
            who = Annotator(model="loopback", base_url=server.url, timeout=20.0)
            items = list_work(Source("sa1b", images), run, config, who, shard=(0, 1), limit=None)
            summary = run_ray(items, run, config, replace(who, concurrency=4), workers=2)
            assert (summary.done, summary.failed, summary.left) == (4, 0, 0)
            assert summary.requests == len(server.requests) == 4 * REQUESTS_PER_IMAGE
            assert len(list(run.glob("cache/requests-ray-*.jsonl"))) == 2  # both workers had a part in it
            again = run_ray(items, run, config, who, workers=2)
            assert (again.done, again.requests) == (4, 0)
    finally:
        ray.shutdown()
    assert files_of(run, tmp_path / "export") == reference
