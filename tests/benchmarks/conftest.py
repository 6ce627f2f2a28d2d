import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="session")
def script() -> Callable[[str], ModuleType]:
    """A script of `benchmarks/` as a module, by its name."""
    sys.path.insert(0, str(FOLDER))  # where Python looks when the script is run
    yield importlib.import_module
    sys.path.remove(str(FOLDER))
