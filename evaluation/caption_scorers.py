"""Tokenisers and scorers of captions: those of COCO's caption evaluation, each run on its own.

The scorers are pycocoevalcap's. Its wrappers of the three Java programs (tokeniser, METEOR, SPICE) are replaced: they wait
without limit, leave processes behind, lock up after a failure, write beside the installed package, and SPICE's downloads
half a gigabyte without asking.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from .java import JavaError, find_java, last_line, run_java, time_limit

METRICS = ("BLEU", "METEOR", "ROUGE_L", "CIDEr", "SPICE")
"""What can be asked for; "BLEU" gives `Bleu_1` ... `Bleu_4`."""

Scores = tuple[dict[str, float], dict[str, list[float]]]
"""Numbers of a set of captions by their name, and the same for each caption."""


@dataclass(frozen=True)
class CaptionSet:
    """
    Captions to be scored together; CIDEr counts document frequencies in the references of this set.

    Args:
        references: At least one for each caption.
        captions: May be empty strings.
        apart: Whether each line is tokenised as if it stood alone. COCO's evaluation hands over all lines as one text, and a
            line that ends like "no." is cut in another way where the next one begins with a digit: its numbers depend on
            the order of the images.
    """

    references: Sequence[Sequence[str]]
    captions: Sequence[str]
    apart: bool


@dataclass(frozen=True)
class CaptionScores:
    """
    Attributes:
        sets: for each set its `Scores`, without those that are skipped.
        skipped: why a scorer or the tokeniser "PTB" did not run, one line each.
        marked: `{"tokenizer": "python"}` where PTB did not run.
    """

    sets: list[Scores]
    skipped: dict[str, str]
    marked: dict[str, str]


@dataclass(frozen=True)
class _Tokens:
    """A set after tokenising: words and spaces; keyed by position as pycocoevalcap wants it."""

    references: dict[int, list[str]]
    captions: dict[int, list[str]]


def score_captions(sets: Sequence[CaptionSet], metrics: Sequence[str] = METRICS) -> CaptionScores:
    """
    Score sets of captions. A scorer that fails is named in `skipped`, the others go on; METEOR is started once for all sets.

    Without Java METEOR, SPICE and the tokeniser are skipped and the others use `python_tokenize`, which is marked. SPICE
    runs only if its models lie in pycocoevalcap's folder; they are never downloaded.

    Raises:
        ValueError: a metric is unknown, a set is empty, or numbers of captions and references differ.
    """
    unknown = [name for name in metrics if name not in METRICS]
    if unknown:
        raise ValueError(f"unknown metrics {unknown}, known are {', '.join(METRICS)}")
    for number, one in enumerate(sets):
        if not one.captions or len(one.captions) != len(one.references) or not all(one.references):
            raise ValueError(
                f"set {number} has {len(one.captions)} captions and {len(one.references)} groups of references, "
                f"{sum(not group for group in one.references)} of them empty: each caption needs at least one reference"
            )
    if not sets:
        return CaptionScores([], {}, {})
    if find_spec("pycocoevalcap") is None:
        reason = "needs the package pycocoevalcap: pip install 'mglmm[eval]'"
        return CaptionScores([({}, {}) for _ in sets], dict.fromkeys(metrics, reason), {})

    skipped: dict[str, str] = {}
    marked: dict[str, str] = {}
    try:
        tokens = [_tokens(one, _ptb_lines(one)) for one in sets]
    except (JavaError, OSError) as error:
        skipped["PTB"] = _one_line(error)
        marked["tokenizer"] = "python"
        tokens = [_tokens(one, list(map(python_tokenize, [*_references(one), *one.captions]))) for one in sets]
    distinct: list[_Tokens] = []
    for one_set in tokens:
        if one_set not in distinct:
            distinct.append(one_set)
    results: list[Scores] = [({}, {}) for _ in distinct]
    for name in metrics:
        try:
            values = _SCORERS[name](distinct)
        except (JavaError, OSError, ValueError, LookupError) as error:
            skipped[name] = _one_line(error)
            continue
        for (scores, each), (new_scores, new_each) in zip(results, values, strict=True):
            scores.update(new_scores)
            each.update(new_each)
    return CaptionScores([results[distinct.index(one_set)] for one_set in tokens], skipped, marked)


# ---- tokenisers ------------------------------------------------------------------------------------------------------

# Where Java ends a line; a caption must stay one.
_LINE_END = re.compile(r"[\n\r\v\f\u2028\u2029]")
_NEUTRAL = "x"  # a line between two others that keeps the tokeniser from looking at both


def ptb_tokenize(texts: Sequence[str], *, apart: bool) -> list[str]:
    """
    Texts as words with spaces between, by the Penn Treebank tokeniser of CoreNLP 3.4.1, lower case and without the 17
    punctuation tokens of COCO's evaluation. A round bracket becomes "-lrb-" and stays, as in COCO's evaluation.

    Args:
        apart: See `CaptionSet`.

    Raises:
        JavaError: Java is missing, or the program failed.
    """
    from pycocoevalcap.tokenizer import ptbtokenizer

    lines = [_LINE_END.sub(" ", text) for text in texts]
    if apart:
        lines = [line for text in lines for line in (text, _NEUTRAL)]
    command = [
        *("-cp", str(Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR))),
        *("edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"),
    ]
    output = run_java(command, len(texts), "\n".join(lines).encode(errors="replace"))
    found = output.decode(errors="replace").split("\n")
    if len(found) == len(lines) + 1 and not found[-1]:
        found.pop()
    if len(found) != len(lines):
        raise JavaError(f"the PTB tokeniser returned {len(found)} lines for {len(lines)}")
    return [
        " ".join(word for word in line.rstrip().split(" ") if word not in ptbtokenizer.PUNCTUATIONS)
        for line in (found[::2] if apart else found)
    ]


# What PTB keeps a full stop with, besides single letters.
_ABBREVIATIONS = (
    "mr mrs ms dr prof st jr sr vs etc inc co corp ltd ave blvd rd mt jan feb mar apr aug sept sep oct nov dec"
)
_ASSIMILATED = {
    words.replace(" ", ""): words
    for words in ("can not", "gon na", "got ta", "wan na", "gim me", "lem me", "'t is", "'t was")
}
_CHARACTERS = str.maketrans(
    {
        "‘": "'",
        "’": "'",
        "“": '"',
        "”": '"',
        "—": "--",
        "–": "--",
        "…": "...",
        "£": "#",
        "€": "$",
        "½": "1/2",
        "¼": "1/4",
    }
    | {"(": " -lrb- ", ")": " -rrb- ", "[": " -lsb- ", "]": " -rsb- ", "{": " -lcb- ", "}": " -rcb- "}
)
_CONTRACTION = re.compile(r"(?<=\w)(n't|'(?:s|m|d|re|ve|ll))\b")
_WORD = (
    r"[\w\u0300-\u036f\u0900-\u0963\u0966-\u0fff]"  # with the vowel signs of Indic and Thai scripts, which are not \w
)
_TOKEN = re.compile(
    rf"""
    -[lr][rsc]b-
    | </?[a-z][^<>]*>                         # a tag
    | (?:https?://|www\.)\S+[\w/]
    | [\w.+-]+@\w+(?:\.\w+)+                  # a mail address
    | (?:[^\W\d_]\.)+(?![\w.])                # u.s., a.m., plan b.
    | (?:{"|".join(_ABBREVIATIONS.split())}|ph\.d)\.(?!\w) | no\.(?=\s*\d)
    | 'n' | n't\b | '(?:s|m|d|re|ve|ll|t|tis|twas|em|\d\ds)\b
    | [-+]?(?:\d+(?:[.,:/]\d+)+|\.?\d+)(?![\w-])  # 3.5, 1,000, 10:30, -5
    | @?{_WORD}+(?:[-/&.']{_WORD}+)*[+#]*       # words, t-shirt, and/or, o'clock, c++
    | [!?]+ | \.+ | -+ | \#+ | \*+ | [^\w\s]
    """,
    re.VERBOSE,
)
_PUNCTUATION = frozenset("'' ' `` ` . ? ! , : - -- ... ; \"".split())


def python_tokenize(text: str) -> str:
    """
    Words with spaces between, close to `ptb_tokenize`: the same contractions, numbers, abbreviations and brackets.

    Example:
        >>> python_tokenize('He said: "It isn\\'t a T-shirt (3.5 dollars)..."')
        "he said it is n't a t-shirt -lrb- 3.5 dollars -rrb-"
    """
    text = _CONTRACTION.sub(r" \1", text.lower().translate(_CHARACTERS).replace("&amp;", "&"))
    words = [word for word in _TOKEN.findall(text) if word not in _PUNCTUATION and word.strip(".-")]
    return " ".join(_ASSIMILATED.get(word, word) for word in words)


def _ptb_lines(one: CaptionSet) -> list[str]:
    """All references, then all captions."""
    if one.apart:
        return ptb_tokenize([*_references(one), *one.captions], apart=True)
    return ptb_tokenize(_references(one), apart=False) + ptb_tokenize(one.captions, apart=False)


def _references(one: CaptionSet) -> list[str]:
    return [text for group in one.references for text in group]


def _tokens(one: CaptionSet, lines: Sequence[str]) -> _Tokens:
    rest = iter(lines)
    references = {i: [next(rest) for _ in group] for i, group in enumerate(one.references)}
    return _Tokens(references, {i: [caption] for i, caption in enumerate(rest)})


# ---- scorers ---------------------------------------------------------------------------------------------------------


def _bleu(sets: Sequence[_Tokens]) -> list[Scores]:
    from pycocoevalcap.bleu.bleu import Bleu

    results = []
    for one in sets:
        scores, each = Bleu(4).compute_score(one.references, one.captions, verbose=0)
        names = [f"Bleu_{n}" for n in range(1, 5)]
        results.append((dict(zip(names, scores, strict=True)), dict(zip(names, each, strict=True))))
    return results


def _rouge(sets: Sequence[_Tokens]) -> list[Scores]:
    from pycocoevalcap.rouge.rouge import Rouge

    return [_named("ROUGE_L", *Rouge().compute_score(one.references, one.captions)) for one in sets]


def _cider(sets: Sequence[_Tokens]) -> list[Scores]:
    from pycocoevalcap.cider.cider import Cider

    for one in sets:
        if not any(text.strip() for group in one.references.values() for text in group):
            raise ValueError(f"none of the references of {len(one.references)} images holds a word")
    return [_named("CIDEr", *Cider().compute_score(one.references, one.captions)) for one in sets]


def _meteor(sets: Sequence[_Tokens]) -> list[Scores]:
    with Meteor(sum(map(_sentences, sets))) as meteor:
        return [_named("METEOR", *meteor.score(one.references, one.captions)) for one in sets]


def _spice(sets: Sequence[_Tokens]) -> list[Scores]:
    from pycocoevalcap.spice import get_stanford_models
    from pycocoevalcap.spice.spice import SPICE_JAR

    folder = Path(get_stanford_models.__file__).parent
    jar = folder / get_stanford_models.SPICELIB / get_stanford_models.JAR
    needed = [f"{jar}.jar", f"{jar}-models.jar"]
    find_java()  # without Java the models are of no use
    if not all(map(os.path.isfile, needed)):
        raise JavaError(
            f"SPICE's language models ({', '.join(os.path.basename(name) for name in needed)}) are not there; "
            "`python -m pycocoevalcap.spice.get_stanford_models` downloads them"
        )
    results = []
    for one in sets:
        with tempfile.TemporaryDirectory() as scratch:
            asked, answered = Path(scratch) / "captions.json", Path(scratch) / "scores.json"
            records = [
                {"image_id": i, "test": caption, "refs": one.references[i]} for i, (caption,) in one.captions.items()
            ]
            asked.write_text(json.dumps(records))
            # Without SPICE's cache of parses: it changes no number, and does not run on newer Java.
            command = ["-Xmx8G", "-jar", SPICE_JAR, str(asked), "-out", str(answered), "-subset", "-silent"]
            run_java(command, _sentences(one), cwd=folder)
            scores = {record["image_id"]: record["scores"]["All"]["f"] for record in json.loads(answered.read_text())}
        each = [float(scores.get(i, "nan")) for i in one.captions]
        if not np.isfinite(each).all():
            raise ValueError(f"SPICE gave no number for {int((~np.isfinite(each)).sum())} of {len(each)} captions")
        results.append(_named("SPICE", float(np.mean(each)), each))
    return results


_SCORERS: dict[str, Callable[[Sequence[_Tokens]], list[Scores]]] = {
    "BLEU": _bleu,
    "METEOR": _meteor,
    "ROUGE_L": _rouge,
    "CIDEr": _cider,
    "SPICE": _spice,
}


class Meteor:
    """
    METEOR 1.5 (English, normalised) as a process that runs within a `with` block and is gone after it.

    Args:
        sentences: How many captions and references it will get at most; sets the time after which it is stopped.

    Raises:
        JavaError: on entering, Java is missing; later, the process stopped or took too long.
    """

    def __init__(self, sentences: int) -> None:
        self.sentences = sentences
        self._statistics: dict[tuple[str, ...], str] = {}
        self._late = False

    def __enter__(self) -> Meteor:
        from pycocoevalcap.meteor import meteor

        folder = Path(meteor.__file__).parent
        command = [find_java(), "-Xmx2G", "-jar", meteor.METEOR_JAR, "-", "-", "-stdio", "-l", "en", "-norm"]
        self._messages = tempfile.TemporaryFile()  # a pipe that nobody reads would block the process when it is full
        self.process = subprocess.Popen(
            command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._messages
        )
        self._timer = threading.Timer(time_limit(self.sentences), self._stop)
        self._timer.daemon = True
        self._timer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        self.process.kill()
        with suppress(BrokenPipeError):  # what was not written any more
            self.process.__exit__(kind, error, trace)  # closes the pipes and waits
        self._messages.close()

    def score(self, references: dict[int, list[str]], captions: dict[int, list[str]]) -> tuple[float, list[float]]:
        """METEOR of all captions together (of the sums of their statistics, not the mean) and of each one."""
        statistics = []
        for key, (caption,) in captions.items():
            # METEOR's own separator would shift its fields.
            fields = tuple(text.replace("|||", "").replace("  ", " ") for text in (*references[key], caption))
            if fields not in self._statistics:
                (self._statistics[fields],) = self._ask(["SCORE", *fields], 1)
            statistics.append(self._statistics[fields])
        replies = self._ask(["EVAL", *statistics], len(statistics) + 1)
        *each, total = map(float, replies)
        return total, each

    def _ask(self, fields: Sequence[str], replies: int) -> list[str]:
        assert self.process.stdin is not None and self.process.stdout is not None
        with suppress(BrokenPipeError):  # the missing reply tells
            self.process.stdin.write(" ||| ".join(fields).encode(errors="replace") + b"\n")
            self.process.stdin.flush()
        lines = [self.process.stdout.readline() for _ in range(replies)]
        if not lines[-1].endswith(b"\n"):
            raise JavaError(self._why())
        return [line.decode().strip() for line in lines]

    def _stop(self) -> None:
        self._late = True
        self.process.kill()

    def _why(self) -> str:
        self.process.kill()
        self.process.wait()
        if self._late:
            return f"METEOR took longer than {time_limit(self.sentences):.1f} s for {self.sentences} sentences"
        self._messages.seek(0)
        return f"METEOR stopped early: {last_line(self._messages.read())}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _sentences(one: _Tokens) -> int:
    return sum(len(group) + 1 for group in one.references.values())


def _named(name: str, score: float, each: Any) -> Scores:
    return {name: float(score)}, {name: [float(value) for value in each]}
