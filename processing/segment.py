"""One phrase of an answer with its mask."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True, eq=False)
class Segment:
    """A phrase and the pixels it stands for.

    Args:
        phrase (`str`): the phrase, or the query where the answer gave the mask no phrase.
        span (`tuple[int, int]`, *optional*): character offsets of the phrase in the answer's clean text.
        mask (`np.ndarray`): bool, shape (H, W), at the size of the image. Kept as a read-only view.
        score (`float`): confidence, 0 to 1.

    Raises:
        ValueError: the mask is not bool, not two-dimensional or has no pixels, or the score is not in 0..1.
    """

    phrase: str
    span: tuple[int, int] | None
    mask: np.ndarray
    score: float

    def __post_init__(self) -> None:
        if self.mask.dtype != np.bool_ or self.mask.ndim != 2 or self.mask.size == 0:
            raise ValueError(
                f"a segment's mask must be bool with shape (H, W), got {self.mask.dtype} {self.mask.shape}; "
                "threshold logits with mask > 0 first."
            )
        if not 0 <= self.score <= 1:
            raise ValueError(f"the score of segment {self.phrase!r} is {self.score}, expected 0..1.")
        # The box and the area are cached, so the mask must not change under them.
        mask = self.mask.view()
        mask.flags.writeable = False
        object.__setattr__(self, "mask", mask)
        object.__setattr__(self, "score", float(self.score))

    @cached_property
    def area(self) -> int:
        """Number of pixels of the mask."""
        return int(self.mask.sum())

    @cached_property
    def box(self) -> tuple[int, int, int, int]:
        """`(x1, y1, x2, y2)` in pixels, half-open: `mask[y1:y2, x1:x2]` holds the whole mask; zeros for an empty mask."""
        xs, ys = np.flatnonzero(self.mask.any(axis=0)), np.flatnonzero(self.mask.any(axis=1))
        if xs.size == 0:
            return 0, 0, 0, 0
        return int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Segment):
            return NotImplemented
        mine, others = (self.phrase, self.span, self.score), (other.phrase, other.span, other.score)
        return mine == others and np.array_equal(self.mask, other.mask)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        height, width = self.mask.shape
        return f"Segment({self.phrase!r}, score={self.score:.2f}, box={self.box}, area={self.area}, image={height}x{width})"
