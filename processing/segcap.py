"""The result of segmentation captioning: an answer whose phrases carry masks."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from .rle import check_size, decode_mask, encode_mask
from .segcap_html import render_html
from .segcap_plot import printable, render_plot
from .segment import Segment


@dataclass(eq=True, repr=False)
class SegCap:
    """An answer about an image together with the masks of its phrases.

    Args:
        text (`str`): the answer as the model gave it, with its tags.
        clean_text (`str`): the answer without tags; the spans of the segments count its characters.
        segments (`list[Segment]`): one for each `[SEG]` of the answer, in reading order.
        image_size (`tuple[int, int]`): (height, width) of the image in pixels, and of every mask.
        image (`PIL.Image.Image`, *optional*): the image; takes no part in comparison and is not serialised.

    Raises:
        ValueError: a mask or the image has another size, or a span does not hold its segment's phrase.
    """

    text: str
    clean_text: str
    segments: list[Segment]
    image_size: tuple[int, int]
    image: Image.Image | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        self.image_size = height, width = int(self.image_size[0]), int(self.image_size[1])
        if self.image is not None:
            self._check_image(self.image)
        for index, segment in enumerate(self.segments):
            if segment.mask.shape != (height, width):
                raise ValueError(f"segment {index} has a mask of {segment.mask.shape}, the image {(height, width)}.")
            if segment.span is None:
                continue
            start, end = segment.span
            if not 0 <= start < end <= len(self.clean_text) or self.clean_text[start:end] != segment.phrase:
                raise ValueError(
                    f"segment {index}: the span {segment.span} of the clean text ({len(self.clean_text)} characters) "
                    f"does not hold the phrase {segment.phrase!r}."
                )

    def plot(self, image: Image.Image | None = None) -> Image.Image:
        """Draw the masks over the image, with a legend beside it and the answer below.

        Args:
            image (`PIL.Image.Image`, *optional*): the image, where the result does not carry it.

        Returns:
            `PIL.Image.Image`: RGB, at a size fit for a screen whatever the size of the image.

        Raises:
            ValueError: there is no image, or it is not of `image_size`.
        """
        return render_plot(self._check_image(image or self.image), self.clean_text, self.segments)

    def to_html(self, image: Image.Image | None = None) -> str:
        """One self-contained HTML page: pointing at a phrase lights its mask and the other way round.

        It loads nothing and runs no script. Phrases are reached with the keyboard, too.

        Args:
            image (`PIL.Image.Image`, *optional*): the image, where the result does not carry it.

        Raises:
            ValueError: there is no image, or it is not of `image_size`.
        """
        return render_html(self._check_image(image or self.image), self.clean_text, self.segments)

    def to_coco(self, image_id: int | str, category_id: int = 1) -> list[dict[str, Any]]:
        """The segments as COCO annotations that also are COCO results.

        Returns:
            `list[dict]`: for each segment `image_id`, `category_id`, `segmentation` (compressed RLE), `bbox`
            (`[x, y, width, height]` in pixels), `area`, `iscrowd`, `score` and `caption` (the phrase).
        """
        records = []
        for segment in self.segments:
            x1, y1, x2, y2 = segment.box
            records.append(
                {
                    "image_id": image_id,
                    "category_id": category_id,
                    "segmentation": encode_mask(segment.mask),
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": segment.area,
                    "iscrowd": 0,
                    "score": segment.score,
                    "caption": segment.phrase,
                }
            )
        return records

    def to_dict(self) -> dict[str, Any]:
        """Everything but the image in types that `json.dumps` knows; `from_dict` gives back an equal result.

        `box` and `area` of the segments are written for the reader; they follow from the mask and are not read back.
        """
        return {
            "text": self.text,
            "clean_text": self.clean_text,
            "image_size": list(self.image_size),
            "segments": [
                {
                    "phrase": segment.phrase,
                    "span": None if segment.span is None else list(segment.span),
                    "score": segment.score,
                    "box": list(segment.box),
                    "area": segment.area,
                    "mask": encode_mask(segment.mask),
                }
                for segment in self.segments
            ],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], image: Image.Image | None = None) -> SegCap:
        """The inverse of `to_dict`; the data may come from anywhere.

        Raises:
            ValueError: a field is missing or of a wrong type, a mask is broken or has another size than the image, or a
                span does not hold its phrase.
        """
        # `size` and limits of an image are those of a mask.
        image_size = check_size({"size": _field(data, "image_size", list)})
        segments = []
        for item in _field(data, "segments", list):
            span = _field(item, "span", list, type(None))
            if span is not None and (len(span) != 2 or not all(type(offset) is int for offset in span)):
                raise ValueError(f"a span must be [start, end] in characters or null, got {span!r:.80}.")
            mask = _field(item, "mask", Mapping)
            if check_size(mask) != image_size:
                raise ValueError(f"a mask has the size {list(check_size(mask))}, the image {list(image_size)}.")
            segments.append(
                Segment(
                    phrase=_field(item, "phrase", str),
                    span=None if span is None else (span[0], span[1]),
                    mask=decode_mask(mask),
                    score=_field(item, "score", float, int),
                )
            )
        text, clean_text = _field(data, "text", str), _field(data, "clean_text", str)
        return cls(text=text, clean_text=clean_text, segments=segments, image_size=image_size, image=image)

    def to_table(self) -> str:
        """The segments as a text table with the columns phrase, score, area (pixels and share of the image) and box."""
        n_pixels = self.image_size[0] * self.image_size[1]
        rows = [("#", "phrase", "score", "area px", "area %", "box x1 y1 x2 y2")]
        for number, segment in enumerate(self.segments, start=1):
            box = " ".join(f"{side:>4}" for side in segment.box)
            share = f"{segment.area / n_pixels:.1%}"
            rows.append(
                (str(number), _one_line(segment.phrase, 40), f"{segment.score:.2f}", f"{segment.area}", share, box)
            )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = []
        for index, phrase, *figures in rows:
            cells = [index.rjust(widths[0]), phrase.ljust(widths[1])]
            cells += [figure.rjust(width) for figure, width in zip(figures, widths[2:], strict=True)]
            lines.append("  ".join(cells))
        return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])

    def __repr__(self) -> str:
        height, width = self.image_size
        phrases = ", ".join(f"{_one_line(segment.phrase, 24)} {segment.score:.2f}" for segment in self.segments[:6])
        phrases += ", …" if len(self.segments) > 6 else ""
        n = len(self.segments)
        listed = f": {phrases}" if n else ""
        return (
            f"SegCap({_one_line(self.clean_text, 72)!r}, {n} segment{'s' * (n != 1)}{listed}, image={height}x{width})"
        )

    def _repr_html_(self) -> str | None:
        """The page of `to_html` for notebooks, in a frame that keeps its styles off the notebook's."""
        if self.image is None:
            return None
        page = html.escape(self.to_html())
        fit = "this.style.height=this.contentDocument.documentElement.scrollHeight+'px'"
        return f'<iframe srcdoc="{page}" style="width:100%;height:640px;border:0" onload="{fit}"></iframe>'

    def _check_image(self, image: Image.Image | None) -> Image.Image:
        height, width = self.image_size
        if image is None:
            raise ValueError("this SegCap carries no image; pass the one it was made from: plot(image=...).")
        if image.size != (width, height):
            raise ValueError(
                f"the image is {image.height}x{image.width} pixels (height x width), the masks are {height}x{width}; "
                "pass the image as it was given to the processor (with its EXIF rotation applied)."
            )
        return image


def _field(data: Mapping[str, Any], name: str, *types: type) -> Any:
    """`data[name]`, checked for its type."""
    value = data.get(name) if isinstance(data, Mapping) else None
    if not isinstance(value, types) or isinstance(value, bool) or (value is None and name not in data):
        expected = " or ".join("null" if kind is type(None) else kind.__name__.lower() for kind in types)
        raise ValueError(f"the field {name!r} of a SegCap must be {expected}, got {value!r:.80}.")
    return value


def _one_line(text: str, limit: int) -> str:
    """The text without line breaks and terminal control characters, cut to `limit` characters."""
    line = " ".join(printable(text).split())
    return line if len(line) <= limit else line[: limit - 1] + "…"
