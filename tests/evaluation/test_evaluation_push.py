"""Results into a card on a hub on loopback."""

import os
import subprocess
import sys
from pathlib import Path

from mglmm.evaluation.push import eval_results
from tests.evaluation.test_report import results
from tests.hub_server import TOKEN, Repository, hub_server

ROOT = Path(__file__).resolve().parents[2]
CARD = """---
license: apache-2.0
tags:
- hats
model-index:
- name: Hats 1
  results:
  - task:
      type: image-segmentation
    dataset:
      name: mine
      type: mine
    metrics:
    - type: dice
      value: 0.5
---
# Hats

Written by hand.
"""


def with_numbers(value: float, **more) -> dict:
    return results("refcoco", limit=None, numbers={"clean": {"gIoU": value, "questions": 7}}, **more)


def test_one_result_for_each_number_that_is_a_metric() -> None:
    numbers = {"clean": {"gIoU": 0.5, "questions": 9, "object": {"cIoU": 0.25}}, "parity": {"lisa": {"gIoU": 1 / 3}}}
    found = list(eval_results(results("refcoco+", numbers=numbers)))
    assert [(each.metric_type, each.metric_name, each.metric_value) for each in found] == [
        ("gIoU", "gIoU (clean; 7 questions, a subset)", 0.5),
        ("cIoU", "cIoU (clean object; 7 questions, a subset)", 0.25),
        ("gIoU", "gIoU (parity lisa; 7 questions, a subset)", 0.333333),
    ]
    assert (found[0].dataset_type, found[0].dataset_name, found[0].dataset_split) == (
        "refcoco+",
        "RefCOCO+",
        "validation",
    )


def test_a_card_keeps_what_somebody_wrote(tmp_path) -> None:
    """In a process of its own: the hub's address is read at import."""
    pushes = [with_numbers(value) for value in (0.25, 0.75)]  # the second replaces the first
    code = f"from mglmm.evaluation.push import push_results\nfor each in {pushes!r}: push_results(each, 'me/hats')"
    with hub_server() as hub:
        repository = hub.repositories["me/hats"] = Repository()
        repository.files["README.md"] = CARD.encode()
        repository.commits = 1
        online = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        env = os.environ | online | {"HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr[-3000:]
        card = repository.files["README.md"].decode()
    assert repository.commits == 3
    assert "Written by hand." in card and "license: apache-2.0" in card and "- hats" in card
    assert card.count("name: RefCOCO") == 1 and "value: 0.75" in card and "value: 0.25" not in card
    assert "name: Hats 1" in card and "type: dice" in card and "value: 0.5\n" in card
