"""The package as a whole: who imports whom, what a wheel and an sdist hold, and that requirements are declared."""

import ast
import os
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]

# Which rooms a room may import; `mglmm` is the face. hub_cards holds templates only.
ALLOWED = {
    "modeling_mglmm": set(),
    "processing": set(),
    "hub_cards": set(),
    "datasets_scripts": {"processing", "hub_cards"},
    "trainer": {"datasets_scripts", "processing", "modeling_mglmm", "hub_cards"},
    "evaluation": {"datasets_scripts", "processing", "modeling_mglmm", "hub_cards"},
    "mglmm": {"trainer", "evaluation", "datasets_scripts", "processing", "modeling_mglmm", "hub_cards"},
}
ROOMS = sorted(set(ALLOWED) - {"mglmm"})
STANDALONE = {"modeling_mglmm", "processing"}  # their files travel to the Hub as remote code

# Import names that differ from the name of the distribution that holds them.
DISTRIBUTIONS = {"PIL": "pillow", "yaml": "pyyaml", "skimage": "scikit-image"}
# Top-level modules of the extras. `import mglmm` works without any of them.
OPTIONAL_MODULES = [
    "evaluate",
    "gguf",
    "onnx",
    "openai",
    "ray",
    "scipy",
    "segment_anything",
    "skimage",
    "torchvision",
    "trl",
]

SOURCES = [path for room in ALLOWED for path in sorted((ROOT / room).rglob("*.py"))]


def imports(source: str, path: Path) -> Iterator[tuple[int, int, str]]:
    """Yields (line, number of leading dots, absolute name) of each import; for `from a import b` the name is `a.b`."""
    package = path.parts[:-1] if path.parts[0] == "mglmm" else ("mglmm", *path.parts[:-1])
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, 0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, node.level, f"{module}.{alias.name}") for alias in node.names)


def import_defects(source: str, path: Path) -> list[str]:
    """The imports of a file that break the rule between the rooms, as "path:line: what"."""
    room = path.parts[0]
    defects = []
    for line, dots, name in imports(source, path):
        top, *rest = name.split(".")
        if top in ROOMS:
            defects.append(f"{path}:{line}: imports `{top}` as a top-level module, its name is `mglmm.{top}`")
        elif top == "mglmm":
            target = rest[0] if rest and rest[0] in ROOMS else "mglmm"
            if target != room and target not in ALLOWED[room]:
                defects.append(f"{path}:{line}: {room} must not import {target}")
            elif room in STANDALONE and dots != 1:
                defects.append(f"{path}:{line}: {room} imports its siblings with exactly one dot")
    return defects


@pytest.mark.parametrize("room", ALLOWED)
def test_rooms_import_only_downwards(room: str) -> None:
    files = [path.relative_to(ROOT) for path in SOURCES if path.is_relative_to(ROOT / room)]
    assert files, f"the room {room} has no Python file"
    assert [
        defect for path in files for defect in import_defects((ROOT / path).read_text(encoding="utf-8"), path)
    ] == []


@pytest.mark.parametrize(
    ("path", "source", "defects"),
    [
        ("processing/a.py", "from .uscdf import parse", 0),  # a sibling
        ("processing/a.py", "from mglmm.processing.uscdf import parse", 1),  # would break as remote code
        ("processing/a.py", "from ..processing import uscdf", 1),  # likewise: one dot only
        ("processing/a.py", "from ..modeling_mglmm import x", 1),  # another room
        ("processing/a.py", "def f():\n    import mglmm.trainer", 1),  # inside a function counts as well
        ("trainer/a.py", "from mglmm.processing.uscdf import parse", 0),  # downwards
        ("trainer/a.py", "from ..processing.uscdf import parse", 0),  # the same, relative
        ("trainer/a.py", "from mglmm import processing", 0),  # the same again
        ("trainer/a.py", "from mglmm import MglmmProcessor", 1),  # the face lies above
        ("trainer/recipes/a.py", "from ...evaluation import b", 1),  # a neighbour, from a nested package
        ("evaluation/a.py", "import processing.uscdf", 1),  # a second copy of the module
        ("evaluation/a.py", "import processing_tools, trainers", 0),  # only similar names
        ("datasets_scripts/a.py", "from mglmm.modeling_mglmm import x", 1),  # data knows no model
        ("mglmm/a.py", "from . import small\nfrom .trainer import x", 0),  # the face sees everything
    ],
)
def test_the_import_rule_sees_each_kind_of_import(path: str, source: str, defects: int) -> None:
    assert len(import_defects(source, Path(path))) == defects


def run_python(code: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_checkout_imports_each_room_once_as_a_subpackage() -> None:
    code = f"""
import sys, mglmm
{"".join(f"import mglmm.{room}; " for room in ROOMS)}
print([name for name in {ROOMS} if name in sys.modules])
"""
    assert run_python(code, cwd=ROOT).strip() == "[]"


@pytest.fixture(scope="module")
def build_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources (no stale build/ of the checkout gets in) with dist/ (sdist and the wheel made from it) and
    wheel/ (the wheel made from the tree)."""
    copy = tmp_path_factory.mktemp("build") / "mglmm"
    copy.mkdir()
    for folder in [*ALLOWED, "tests"]:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    for file in ["setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "Makefile", "constraints.txt"]:
        shutil.copy(ROOT / file, copy)
    pip_wheel = ["pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", "wheel", "-q"]
    for command in [["build", "--no-isolation", "--outdir", "dist"], pip_wheel]:
        done = subprocess.run([sys.executable, "-m", *command], cwd=copy, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return copy


@pytest.fixture(scope="module")
def wheel(build_dir: Path) -> Path:
    return next((build_dir / "wheel").glob("mglmm-*.whl"))


def wheel_files(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def test_the_wheel_holds_every_module_and_data_file_and_nothing_else(wheel: Path) -> None:
    expected = {
        path.relative_to(ROOT).as_posix() if room == "mglmm" else f"mglmm/{path.relative_to(ROOT).as_posix()}"
        for room in ALLOWED
        for path in (ROOT / room).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")
    }
    assert wheel_files(wheel) == expected


def test_the_wheel_carries_licence_and_command(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (licence,) = [name for name in archive.namelist() if name.endswith(".dist-info/licenses/LICENSE")]
        assert "Apache License" in archive.read(licence).decode()
        (commands,) = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
        assert archive.read(commands).decode().split() == ["[console_scripts]", "mglmm", "=", "mglmm.cli:main"]
    assert "mglmm/cli.py" in wheel_files(wheel)


def test_the_sdist_builds_the_same_wheel_and_holds_the_tests(build_dir: Path, wheel: Path) -> None:
    assert wheel_files(next((build_dir / "dist").glob("*.whl"))) == wheel_files(wheel)
    with tarfile.open(next((build_dir / "dist").glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"tests/conftest.py", "tests/test_package.py", "constraints.txt", "Makefile", "LICENSE"} <= names


def test_an_installed_wheel_imports_without_the_checkout_and_the_extras(wheel: Path, tmp_path: Path) -> None:
    install = ["pip", "install", "-q", "--no-deps", "--no-index", "--target", str(tmp_path / "site"), str(wheel)]
    subprocess.run([sys.executable, "-m", *install], check=True)
    code = f"""
import sys
for name in {OPTIONAL_MODULES}:
    sys.modules[name] = None  # importing it raises ImportError
import mglmm
{"".join(f"import mglmm.{room}; " for room in ROOMS)}
print(*{{module.__file__ for name, module in sys.modules.items() if name.split(".")[0] == "mglmm"}}, sep="\\n")
"""
    files = run_python(code, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site")).split()
    assert len(files) > len(ROOMS)
    assert [file for file in files if not file.startswith(str(tmp_path / "site" / "mglmm"))] == []


@pytest.fixture(scope="module")
def requirements() -> dict[str, list[Requirement]]:
    """What setup.py passes to `setup()`: requirements by extra, the core ones under ""."""
    with patch.object(setuptools, "setup") as setup:
        exec(compile((ROOT / "setup.py").read_text(), ROOT / "setup.py", "exec"), {"__file__": str(ROOT / "setup.py")})
    passed = setup.call_args.kwargs
    named = {"": passed["install_requires"], **passed["extras_require"]}
    return {extra: [Requirement(line) for line in lines] for extra, lines in named.items()}


def test_the_lock_satisfies_every_lower_bound(requirements: dict[str, list[Requirement]]) -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    locked = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    installed_by_setup = [r for extra in ("", "dev", "small", "demo", "eval") for r in requirements[extra]]
    assert [str(r) for r in installed_by_setup if canonicalize_name(r.name) not in locked] == []
    assert [str(r) for r in installed_by_setup if not r.specifier.contains(locked[canonicalize_name(r.name)])] == []
    assert locked["torch"] == "2.13.0"  # no local suffix: it would tie the lock to one kind of build


def test_every_import_is_declared(requirements: dict[str, list[Requirement]]) -> None:
    declared = {canonicalize_name(r.name) for extra, group in requirements.items() if extra != "dev" for r in group}
    known = sys.stdlib_module_names | {"mglmm"}
    undeclared = {}
    for path in SOURCES:
        for line, _, name in imports(path.read_text(encoding="utf-8"), path.relative_to(ROOT)):
            module = name.split(".")[0]
            if module not in known and canonicalize_name(DISTRIBUTIONS.get(module, module)) not in declared:
                undeclared[module] = f"{path.relative_to(ROOT)}:{line}"
    assert undeclared == {}


def test_no_file_names_this_machine() -> None:
    """Home and working folders, this computer's name, and addresses that only exist inside one network."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs git and a clone: only files under version control are read")
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(listing, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    patterns = [
        r"(?<![\w.~<>*-])/(?:home|root|Users|work|mnt|scratch)/\w",
        r"(?<![\d.])(?:10\.\d{1,3}|192\.168|172\.(?:1[6-9]|2\d|3[01]))(?:\.\d{1,3}){2}(?![\d.])",
        r"\bhttps?://[\w.-]+\.(?:internal|local|lan|corp|intranet)\b",
        rf"(?<![\w.]){re.escape(str(ROOT))}/",
        *([rf"\b{re.escape(socket.gethostname())}\b"] if len(socket.gethostname()) > 8 else []),
    ]
    machine = re.compile("|".join(patterns))
    found = []
    for name in filter(None, files):
        path = ROOT / name
        if path.is_file() and path.stat().st_size < 2_000_000 and b"\0" not in (data := path.read_bytes()):
            lines = data.decode("utf-8", errors="replace").splitlines()
            found += [f"{name}:{n}: {hit.group()}" for n, line in enumerate(lines, 1) if (hit := machine.search(line))]
    assert found == []
