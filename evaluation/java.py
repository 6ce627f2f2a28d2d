"""Java programs of the caption metrics: found, run with a limit of time, and never left behind."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

# METEOR reads a large table at its start, SPICE parses every sentence.
START_SECONDS = 600.0
SECONDS_PER_SENTENCE = 1.0


class JavaError(RuntimeError):
    """Java is missing, or a Java program failed or took too long."""


def find_java() -> str:
    """Path of the program `java`. Raises `JavaError` if there is none."""
    java = shutil.which("java")
    if java is None:
        raise JavaError("needs Java: there is no program `java` on the PATH")
    return java


def time_limit(sentences: int) -> float:
    """Seconds after which a program that works on so many sentences is stopped."""
    return START_SECONDS + SECONDS_PER_SENTENCE * sentences


def run_java(arguments: Sequence[str], sentences: int, text: bytes = b"", cwd: Path | None = None) -> bytes:
    """
    What a Java program prints when it is given `text`.

    Raises:
        JavaError: Java is missing, the program fails, or it takes longer than `time_limit`.
    """
    command = [find_java(), *arguments]
    try:
        run = subprocess.run(command, input=text, capture_output=True, cwd=cwd, timeout=time_limit(sentences))
    except subprocess.TimeoutExpired as error:
        raise JavaError(f"Java took longer than {error.timeout:.1f} s for {sentences} sentences") from error
    if run.returncode != 0:
        raise JavaError(f"Java stopped with exit code {run.returncode}: {last_line(run.stderr)}")
    return run.stdout


def last_line(messages: bytes) -> str:
    """The last line of what a program wrote to its error output, where Java says what went wrong."""
    lines = messages.decode(errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else "it said nothing"
