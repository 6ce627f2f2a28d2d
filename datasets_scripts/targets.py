"""What can be asked for in an image: all instances of one label, with their mask, place and colour."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .labels import Noun


@dataclass(frozen=True)
class Target:
    """All instances of one label in an image; parts: of one label below owners of one label.

    Attributes:
        noun: What it is called.
        count: Number of instances merged in `mask`.
        owner: What it is a part of, for parts.
        owner_count: Number of such owners in the image.
        shared: Whether other targets of the image have the same name, so that the owner must be named.
        mask: COCO compressed RLE of the union of the instances, or `None` for a thing that is absent.
        area: Pixels of the union.
        box: Bounding box of the union, xywh in pixels.
        instances: The instances one by one, where they are from 2 to `MAX_INSTANCES` and each a thing of its own.
        colour: The one colour that clearly covers the mask, where it was looked for and found.
    """

    noun: Noun
    count: int = 1
    owner: Noun | None = None
    owner_count: int = 1
    shared: bool = False
    mask: dict[str, Any] | None = None
    area: int = 0
    box: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    instances: tuple[Target, ...] = ()
    colour: str | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the image; (1, 1) for what is absent."""
        height, width = self.mask["size"] if self.mask is not None else (1, 1)
        return height, width

    @property
    def corners(self) -> tuple[float, float, float, float]:
        """Bounding box as shares of the image's sides: xyxy in [0, 1]."""
        (height, width), (x, y, w, h) = self.size, self.box
        return x / width, y / height, (x + w) / width, (y + h) / height

    @property
    def centre(self) -> tuple[float, float]:
        """Centre (x, y) of the box in [0, 1]."""
        left, top, right, bottom = self.corners
        return (left + right) / 2, (top + bottom) / 2

    def named(self, *, coloured: bool = True) -> Noun:
        """The noun, with the colour before it if there is one and it is wanted: "red car"."""
        return self.noun.coloured(self.colour) if coloured and self.colour else self.noun

    @property
    def place(self) -> str | None:
        """
        Where in the picture it is: "on the left", "on the right", "at the top", "at the bottom", "in the middle"; `None`
        where that is not clear at a glance. To be on one side a thing lies wholly in that half of the picture, with its
        centre in the outer third or nearly so.
        """
        left, top, right, bottom = self.corners
        x, y = self.centre
        if self.mask is None or self.area < 0.35 * self.box[2] * self.box[3]:
            return None  # two things far apart may be one mask
        if not {"left", "right"} & set(self.noun.name.split()):  # those of a car are its own, not the picture's
            if right <= 0.5 and x < 0.35:
                return "on the left"
            if left >= 0.5 and x > 0.65:
                return "on the right"
        if bottom <= 0.5 and y < 0.3:
            return "at the top"
        if top >= 0.5 and y > 0.7:
            return "at the bottom"
        if max(right - left, bottom - top) <= 0.5 and 0.4 < x < 0.6 and 0.38 < y < 0.62:
            return "in the middle"
        return None
