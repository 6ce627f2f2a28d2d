"""The frame of the masks: where a picture lies in what the pixel encoder sees, and masks from there and to there."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

IGNORE_VALUE = 255  # in mask labels: padding, void


class MglmmFrameMixin:
    """The mask side of `MglmmProcessor`."""

    sam_image_size: int | None
    vision_size: tuple[int, int]

    def frame_of(self, size: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """
        Where a picture of `size` (height, width) lies in the square that the pixel encoder sees.

        Returns the picture's extent (height, width) in the frame, from its top left corner, and the frame's own size.
        Raises `ValueError` for a picture so thin that it would vanish.
        """
        if self.sam_image_size is None:
            return self.vision_size, self.vision_size
        side = self.sam_image_size
        scale = side / max(size)
        extent = int(size[0] * scale + 0.5), int(size[1] * scale + 0.5)
        if 0 in extent:
            raise ValueError(
                f"an image of {size[1]} x {size[0]} pixels is too thin to be seen at {side}: crop it first"
            )
        return extent, (side, side)

    def mask_labels(self, masks: Sequence[np.ndarray], side: int) -> torch.Tensor:
        """
        Masks of one picture as training labels in the pixel encoder's frame.

        Args:
            masks: `(H, W)` bool (or {0, 1, 255 = ignored}) arrays of the upright picture's size.
            side: Height and width of the labels.

        Returns:
            uint8 `(len(masks), side, side)`: 1 where at least half of a cell is mask, 255 in the padding and in cells that
            lie partly in it.
        """
        labels = np.full((len(masks), side, side), IGNORE_VALUE, dtype=np.uint8)
        for label, mask in zip(labels, masks, strict=True):
            extent, frame = self.frame_of(mask.shape)
            height, width = (max(1, e * side // f) for e, f in zip(extent, frame, strict=True))
            covered = (min(1.0, n * f / side / e) for n, e, f in zip((height, width), extent, frame, strict=True))
            bottom, right = (size * part for size, part in zip(mask.shape, covered, strict=True))
            cells = [
                np.asarray(
                    Image.fromarray(part.astype(np.uint8) * 255).resize(
                        (width, height), Image.Resampling.BOX, box=(0, 0, right, bottom)
                    )
                )
                for part in (mask == 1, mask == IGNORE_VALUE)
            ]
            label[:height, :width] = np.where(cells[1] > 127, IGNORE_VALUE, cells[0] > 127)
        return torch.from_numpy(labels)

    def post_process_masks(
        self, mask_logits: torch.Tensor, target_size: tuple[int, int], threshold: float = 0.0
    ) -> np.ndarray:
        """
        Mask logits `(n, h, w)` in the pixel encoder's frame to bool `(n, H, W)` at the original `target_size`.

        As in SAM: bilinear to the frame, crop the padding, bilinear to the picture, foreground where > `threshold`. In
        the frame of a shared tower, which has no padding: bilinear to the picture at once.
        """
        extent, frame = self.frame_of(target_size)
        masks = np.zeros((len(mask_logits), *target_size), dtype=bool)
        for mask, logits in zip(masks, mask_logits.float().cpu(), strict=True):  # one at a time: pictures can be large
            logits = logits[None, None]
            if self.sam_image_size is not None:
                logits = F.interpolate(logits, frame, mode="bilinear", align_corners=False)
                logits = logits[..., : extent[0], : extent[1]]
            logits = F.interpolate(logits, target_size, mode="bilinear", align_corners=False)
            mask[:] = (logits[0, 0] > threshold).numpy()
        return masks
