"""Framing: converts images to backbone input, and scores back to image size. The same for training, validation, test and prediction.

- ``tile``: the image, scaled by ``tile_scale``, is cut into squares of ``tile_px``.
- ``pad``: the whole scaled image, padded by mirroring on the right and at the bottom to multiples of ``tile_px``.
- ``resize``: the whole image, resized to one square of ``tile_px * tile_scale``, whatever its shape.

A *framed* image is the scaled or resized one, before it is cut. ``back`` resizes scores to the image; without
scaling they are unchanged.

Letters: C classes, H x W image.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cellbench.config.run import RunSpec
from cellbench.data.transforms.tiling import TileGrid

if TYPE_CHECKING:
    from torch import Tensor

Size = tuple[int, int]
"""Height, width."""


@dataclass(frozen=True, kw_only=True)
class Framing:
    """One way of framing, for images of any size."""

    kind: str
    """``tile``, ``pad`` or ``resize``, as in a run's ``framing``."""
    side_px: int
    """Side of a tile, or of the square that an image is resized to, or the multiple to which an image is padded."""
    scale: float = 1.0
    """Framed pixels per image pixel; 1 if ``kind`` is ``resize``, whose scale differs between images."""

    @classmethod
    def of(cls, run: RunSpec) -> Framing:
        """The framing of a run."""
        if run.framing == "resize":
            return cls(kind="resize", side_px=round(run.tile_px * run.tile_scale))
        return cls(kind=run.framing, side_px=run.tile_px, scale=run.tile_scale)

    @property
    def exact(self) -> bool:
        """Whether framing leaves the pixels unchanged."""
        return self.kind != "resize" and self.scale == 1

    @property
    def whole(self) -> bool:
        """Whether the backbone sees a whole image at once."""
        return self.kind == "pad"

    def framed_px(self, size_px: Size) -> Size:
        """The size of the framed image, before any padding."""
        if self.kind == "resize":
            return self.side_px, self.side_px
        return max(1, round(size_px[0] * self.scale)), max(1, round(size_px[1] * self.scale))

    def tile_px(self, sizes_px: Iterable[Size]) -> Size:
        """The common tile size for images of these sizes, so that they fit into one batch. ``pad`` takes the largest."""
        if not self.whole:
            return self.side_px, self.side_px
        framed = [self.framed_px(size) for size in sizes_px] or [(1, 1)]
        tall, wide = (-(-max(lengths) // self.side_px) * self.side_px for lengths in zip(*framed, strict=True))
        return tall, wide

    def grid(self, size_px: Size, tile_px: Size, overlap: float) -> TileGrid:
        """Where the tiles of an image of this size lie, in framed pixels; ``tile_px`` as :meth:`tile_px` gives it."""
        return TileGrid.over(*self.framed_px(size_px), tile_px, 0.0 if self.whole else overlap)

    def image(self, image: np.ndarray) -> np.ndarray:
        """The framed image (H', W', 3) of an image (H, W, 3), both uint8: bilinear; when shrinking, each pixel is a mean of those it covers."""
        return image if self.exact else self._resized(image, "bilinear")

    def mask(self, mask: np.ndarray) -> np.ndarray:
        """The framed class map (H', W') of a class map (H, W), both uint8: the class at the middle of each pixel."""
        return mask if self.exact else self._resized(mask[..., None], "nearest-exact")[..., 0]

    def numbers(self, ids: np.ndarray) -> np.ndarray:
        """The framed numbers of cells (H', W') int64 of numbers (H, W), whole: the cell at the middle of each pixel."""
        if self.exact:
            return ids
        known, place = np.unique(ids, return_inverse=True)  # floats represent positions exactly, whatever the cell numbers
        return known[self._resized(place.reshape(*ids.shape, 1).astype(np.float32), "nearest-exact")[..., 0].astype(np.int64)]

    def _resized(self, array_HWC: np.ndarray, mode: str) -> np.ndarray:
        import torch
        import torch.nn.functional as F

        size = self.framed_px(array_HWC.shape[:2])
        x = torch.from_numpy(np.ascontiguousarray(array_HWC)).permute(2, 0, 1)[None]
        # With antialias, as PIL does it: without, a shrunk image keeps one pixel in four and cell outlines flicker.
        out = F.interpolate(x, size=size, mode=mode, antialias=mode == "bilinear")
        return out[0].permute(1, 2, 0).contiguous().numpy()

    def back(self, scores_CHW: Tensor, size_px: Size) -> Tensor:
        """Scores (C, H', W') of a framed image, float, resized to the image (C, H, W): bilinear, and a mean when shrinking."""
        if self.exact:
            return scores_CHW
        import torch.nn.functional as F

        return F.interpolate(scores_CHW[None], size=size_px, mode="bilinear", antialias=True)[0]
