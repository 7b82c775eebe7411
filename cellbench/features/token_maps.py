"""Shows a backbone's last map of an image, resampled to the image: principal components as colours, or similarity to one place.

Letters: B tiles, D features, h x w places of a tile's map, N places in all, H x W pixels of the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cellbench.data.transforms.framing import Framing, Size
from cellbench.data.transforms.tiling import TileGrid, cut_tile
from cellbench.features.frozen_backbone import FrozenBackbone
from cellbench.features.tile_cutting import as_pixels
from cellbench.hardware import to_device


@dataclass(frozen=True, kw_only=True)
class FeatureMaps:
    """The last maps of an image's tiles."""

    framing: Framing
    size_px: Size
    """(height, width) of the image."""
    grid: TileGrid
    """(height, width) of its tiles, in framed pixels."""
    maps: Tensor
    """(B, D, h, w) float32, on the CPU."""

    @property
    def stride_px(self) -> int:
        return self.grid.tile_px[0] // self.maps.shape[2]

    @property
    def tokens(self) -> Tensor:
        """(N, D), tile by tile, row by row."""
        return self.maps.permute(0, 2, 3, 1).flatten(0, 2)

    def to_image(self, values_NC: Tensor) -> np.ndarray:
        """Values of all places, in the order of ``tokens``, as an image (H, W, C) float32 of the original size."""
        num, _, height, width = self.maps.shape
        tiles = values_NC.view(num, height, width, -1).permute(0, 3, 1, 2)
        canvas_CHW = torch.empty(tiles.shape[1], self.grid.height_px, self.grid.width_px)
        for tile_Chw, (y, x), (rows, columns) in zip(tiles, self.grid, self.grid.owned(), strict=True):
            large = tile_Chw.repeat_interleave(self.stride_px, 1).repeat_interleave(self.stride_px, 2)
            canvas_CHW[:, y + rows.start : y + rows.stop, x + columns.start : x + columns.stop] = large[:, rows, columns]
        return self.framing.back(canvas_CHW, self.size_px).permute(1, 2, 0).numpy()

    def place(self, y_px: float, x_px: float) -> int:
        """The number of the place at a pixel of the image, in the tile that owns it."""
        framed = (self.grid.height_px, self.grid.width_px)
        y, x = (min(int((p + 0.5) * f / n), f - 1) for p, f, n in zip((y_px, x_px), framed, self.size_px, strict=True))
        height, width = self.maps.shape[2:]
        for tile, ((top, left), (rows, columns)) in enumerate(zip(self.grid, self.grid.owned(), strict=True)):
            if rows.start <= y - top < rows.stop and columns.start <= x - left < columns.stop:
                return (tile * height + (y - top) // self.stride_px) * width + (x - left) // self.stride_px
        raise AssertionError("tiles own every pixel")


def feature_maps(backbone: FrozenBackbone, framing: Framing, image: np.ndarray) -> FeatureMaps:
    """The last maps of an image (H, W, 3) uint8, in tiles with the least overlap."""
    size = image.shape[:2]
    tile_px = framing.tile_px([size])
    grid, framed = framing.grid(size, tile_px, 0.0), framing.image(image)
    backbone.chunk = 1 if framing.whole else backbone.machine.chunk
    corners, maps = list(grid), []
    for start in range(0, len(corners), backbone.chunk):
        tiles = np.stack([cut_tile(framed, y, x, tile_px) for y, x in corners[start : start + backbone.chunk]])
        pixels = as_pixels(to_device(torch.from_numpy(tiles), backbone.machine.device))
        maps.append(backbone.maps(pixels)[backbone.indices[-1]].float().cpu())
    return FeatureMaps(framing=framing, size_px=size, grid=grid, maps=torch.cat(maps))


def pca_rgb(views: Sequence[FeatureMaps]) -> list[np.ndarray]:
    """The first three principal components of each view's places as images (H, W, 3) in 0..1, red the first.

    One PCA for all views of one backbone, with equal weights, so that a colour means the same in all its framings.
    """
    tokens = [view.tokens for view in views]
    mean_D = torch.stack([t.mean(0) for t in tokens]).mean(0)
    centred = [t - mean_D for t in tokens]
    covariance_DD = torch.stack([t.T.double() @ t.double() / len(t) for t in centred]).mean(0)
    axes_D3 = torch.linalg.eigh(covariance_DD).eigenvectors.flip(1)[:, :3].float()
    # The sign of a component is arbitrary; fixed here, so that two calls give the same colours.
    axes_D3 = axes_D3 * axes_D3[axes_D3.abs().argmax(0), range(axes_D3.shape[1])].sign()
    projected = [t @ axes_D3 for t in centred]
    low, high = (
        torch.cat([torch.quantile(p[:: -(-len(p) // 4000)], torch.tensor([0.02, 0.98]), dim=0) for p in projected]).view(-1, 2, 3).mean(0)
    )
    return [view.to_image(((p - low) / (high - low).clamp_min(1e-6)).clamp(0, 1)) for view, p in zip(views, projected, strict=True)]


def cosine_map(view: FeatureMaps, y_px: float, x_px: float) -> np.ndarray:
    """Cosine similarity (-1 to 1) of every place to the one at this pixel, as an image (H, W)."""
    tokens = torch.nn.functional.normalize(view.tokens, dim=1)
    return view.to_image((tokens @ tokens[view.place(y_px, x_px)])[:, None])[..., 0]
