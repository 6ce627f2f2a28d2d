"""GLaMM's region encoder: boxes in a picture to one embedding of the language model each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import initialization as init

NUM_FUSE_CONVS = 5
NUM_GROUPS = 64
ROI_SIZE = 14
ROI_SAMPLES = 2  # of a cell, along each axis
POSITION_WIDTH = 256


class RegionConv(nn.Module):
    """3 x 3 convolution, group norm and ReLU."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(math.gcd(NUM_GROUPS, channels), channels)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        return F.relu(self.norm(self.conv(maps)))


class RegionFuse(nn.Module):
    """
    Mixes the levels of a feature pyramid (GLaMM, `MLVLFuseModule`): before each of the shared convolutions a level keeps
    the first half of its channels, takes the last quarter from the next coarser level and the third from the next finer.
    """

    def __init__(self, channels: int, num_levels: int):
        super().__init__()
        self.input_conv = nn.ModuleList(nn.Conv2d(channels + 2, channels, 1) for _ in range(num_levels))
        self.convs = nn.ModuleList(RegionConv(channels) for _ in range(NUM_FUSE_CONVS))

    def forward(self, maps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Levels `(1, channels, h, w)`, finest first, to levels of the same shapes."""
        levels = [conv(_with_coordinates(level)) for conv, level in zip(self.input_conv, maps, strict=True)]
        half, last = levels[0].shape[1] // 2, levels[0].shape[1] * 3 // 4
        for conv in self.convs:
            mixed = []
            for i, level in enumerate(levels):
                coarser = levels[min(i + 1, len(levels) - 1)][:, last:]
                finer = levels[max(i - 1, 0)][:, half:last]
                size = tuple(level.shape[-2:])
                mixed.append(torch.cat([level[:, :half], _resize(coarser, size), _resize(finer, size)], dim=1))
            levels = [conv(level) for level in mixed]
        return levels


class RegionPooler(nn.Module):
    """One vector per box from the features inside it on every level, and from where it lies."""

    def __init__(self, channels: int, num_levels: int, hidden_size: int, out_features: int):
        super().__init__()
        self.pconvs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(num_levels))
        self.pos_embedd = nn.Sequential(
            nn.Linear(4, POSITION_WIDTH),
            nn.ReLU(),
            nn.LayerNorm(POSITION_WIDTH),
            nn.Linear(POSITION_WIDTH, hidden_size),
            nn.ReLU(),
            nn.LayerNorm(hidden_size),
        )
        self.flatten_linear = nn.Linear(channels * ROI_SIZE**2, hidden_size)
        self.updims = nn.Linear(hidden_size, out_features)

    def forward(self, maps: Sequence[torch.Tensor], boxes: torch.Tensor, cells: float) -> torch.Tensor:
        """
        Args:
            maps: Levels `(1, channels, h, w)`, finest first, each twice as fine as the next.
            boxes: `(n, 4)` float32 x1, y1, x2, y2 in [0, 1].
            cells: Cells of the coarsest level that a box of side 1 spans.
        """
        dtype = self.flatten_linear.weight.dtype
        pooled: Any = 0
        for i, (conv, level) in enumerate(zip(self.pconvs, maps, strict=True)):
            scale = cells * 2 ** (len(maps) - 1 - i)
            pooled = pooled + conv(roi_align(level[0], boxes * scale).to(dtype))
        features = self.flatten_linear(F.relu(pooled).flatten(1))
        return self.updims(features + self.pos_embedd(boxes.to(dtype)))


class MglmmRegionEncoder(nn.Module):
    """
    GLaMM's region encoder. Hidden states of several layers of the vision tower become a pyramid (the first is enlarged
    most, each next one half as much, the last not at all), are mixed, and read inside each box with RoI-align.

    Args:
        channels: Of the vision tower; a multiple of 4.
        num_levels: Layers of the vision tower that are read.
        hidden_size: Of a region, before it is widened for the language model.
        out_features: Width of the language model.
    """

    def __init__(self, channels: int, num_levels: int, hidden_size: int, out_features: int):
        super().__init__()
        self.fuse = RegionFuse(channels, num_levels)
        self.roi = RegionPooler(channels, num_levels, hidden_size, out_features)
        self.channels = channels
        self.gradient_checkpointing = False

    def forward(
        self, hidden_states: torch.Tensor | None, boxes: torch.Tensor, image_index: torch.Tensor, cells: float
    ) -> torch.Tensor:
        """
        Args:
            hidden_states: `(images, levels, tokens, channels)`, patch tokens of a square grid. May be `None` if there are
                no boxes.
            boxes: `(total_regions, 4)` x1, y1, x2, y2, where a side of 1 spans `cells` patches.
            image_index: `(total_regions,)` long, image of each box. Only images with boxes cost anything, and one after
                the other: the finest level of one is large (576 patches of 1024 channels: 151 MB in float32).
            cells: Side in patches of what the boxes are normalised to.

        Returns:
            `(total_regions, out_features)`, in the dtype of the weights.

        Raises:
            ValueError: the patch tokens are no square grid.
        """
        weight = self.roi.updims.weight
        boxes, image_index = boxes.to(weight.device, torch.float32), image_index.to(weight.device)
        if len(boxes) == 0 or hidden_states is None:
            # Run all the same: every rank of a distributed run must see gradients for the same parameters.
            shape = (len(self.roi.pconvs), 4, self.channels)
            blank = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
            return self._encode(blank, torch.tensor([[0.0, 0.0, 1.0, 1.0]], device=weight.device), 2.0)[:0]
        indices, vectors = [], []
        for image in image_index.unique().tolist():
            (index,) = (image_index == image).nonzero(as_tuple=True)
            arguments = (hidden_states[image].to(weight.device), boxes[index], cells)
            if self.training and torch.is_grad_enabled() and self.gradient_checkpointing:
                vectors.append(checkpoint(self._encode, *arguments, use_reentrant=False))
            else:
                vectors.append(self._encode(*arguments))
            indices.append(index)
        return torch.cat(vectors)[torch.cat(indices).argsort()]

    def _encode(self, hidden_states: torch.Tensor, boxes: torch.Tensor, cells: float) -> torch.Tensor:
        return self.roi(self.fuse(self.pyramid(hidden_states)), boxes, cells)

    def pyramid(self, hidden_states: torch.Tensor) -> list[torch.Tensor]:
        """`(levels, tokens, channels)` of one image to levels `(1, channels, h, w)`, finest first."""
        levels, tokens, _ = hidden_states.shape
        side = math.isqrt(tokens)
        if side * side != tokens:
            raise ValueError(f"regions need a square grid of patch tokens, got {tokens}: use a square image size")
        grid = hidden_states.float().transpose(1, 2).unflatten(2, (side, side))
        sides = [side * 2 ** (levels - 1 - i) for i in range(levels)]
        dtype = self.roi.updims.weight.dtype
        return [_resize(grid[i : i + 1], (size, size)).to(dtype) for i, size in enumerate(sides)]

    def init_parameters(self) -> None:
        """Weights of a fresh encoder as GLaMM's: small RoI convolutions, all else by the number of inputs."""
        convolutions = []
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                init.kaiming_uniform_(module.weight, a=math.sqrt(5))
                if module.bias is not None:
                    init.zeros_(module.bias)
            if isinstance(module, RegionConv):
                convolutions.append(module.conv.weight)
        for weight in convolutions:
            init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu")
        for name, weight in self.roi.pconvs.named_parameters():
            if name.endswith("weight"):
                init.normal_(weight, std=0.01)


def roi_align(feature_map: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """
    Average of `ROI_SAMPLES` x `ROI_SAMPLES` bilinear samples in each of `ROI_SIZE` x `ROI_SIZE` cells of every box.

    Equals mmcv's `RoIAlign(14, sampling_ratio=2, pool_mode="avg", aligned=True)`: pixel i spans [i, i + 1] and its value
    stands at its centre; samples more than half a pixel outside of the map are 0, others outside take the border's value.
    Samples lie on a grid, so that weights along the two axes give all of them: matrix products, no loop over boxes, and
    gradients that are the same at every run.

    Args:
        feature_map: `(channels, h, w)`.
        boxes: `(n, 4)` float32 x1, y1, x2, y2 in pixels of the map; may be empty or stick out.

    Returns:
        float32 `(n, channels, ROI_SIZE, ROI_SIZE)`.
    """
    with torch.autocast(feature_map.device.type, enabled=False):  # half precision would move the samples
        along_x = _axis_weights(boxes[:, 0], boxes[:, 2], feature_map.shape[2])
        along_y = _axis_weights(boxes[:, 1], boxes[:, 3], feature_map.shape[1])
        rows = torch.einsum("nph,chw->ncpw", along_y, feature_map.float())
        return torch.einsum("ncpw,nqw->ncpq", rows, along_x)


def _axis_weights(start: torch.Tensor, end: torch.Tensor, size: int) -> torch.Tensor:
    """Weight of each of `size` pixels in each cell along one axis, `(n, ROI_SIZE, size)`."""
    count = ROI_SIZE * ROI_SAMPLES
    steps = (torch.arange(count, device=start.device) + 0.5) / count
    samples = start[:, None] - 0.5 + steps * (end - start)[:, None]
    inside = (samples >= -1) & (samples <= size)
    distance = samples.clamp(0, size - 1)[..., None] - torch.arange(size, device=start.device)
    weights = (1 - distance.abs()).clamp_min(0) * inside[..., None]
    return weights.unflatten(1, (ROI_SIZE, ROI_SAMPLES)).mean(2)


def _resize(maps: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
    if tuple(maps.shape[-2:]) == size:
        return maps
    return F.interpolate(maps, size, mode="bilinear", align_corners=True)


def _with_coordinates(maps: torch.Tensor) -> torch.Tensor:
    """With two more channels: x and y of each pixel, from -1 to 1."""
    _, _, height, width = maps.shape
    options: Any = {"dtype": maps.dtype, "device": maps.device}
    x, y = torch.linspace(-1, 1, width, **options), torch.linspace(-1, 1, height, **options)
    grid = torch.stack([x.expand(height, width), y[:, None].expand(height, width)])
    return torch.cat([maps, grid[None]], dim=1)


__all__ = ["MglmmRegionEncoder", "roi_align"]
