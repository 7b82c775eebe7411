"""A star in each pixel: the distances to the edge of its cell along rays (StarDist, Schmidt et al. 2018, doi 10.1007/978-3-030-00934-2_30).

The first channel is the object probability: a pixel's distance to the edge of its cell, divided by the maximum in the cell. The others are the
rays, in pixels of the image, on a logarithmic scale, so that errors are shares of a cell's size.

Letters: B tiles, H x W pixels, A channels, R rays.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from cellbench.data.cell_targets.base import CellTarget, ChannelTurns, as_share, stored, weighted_cross_entropy
from cellbench.data.cell_targets.depth import edge_distance
from cellbench.metrics.instances import Instances
from cellbench.metrics.star_polygons import LOG2_LONGEST, RAYS, distance_to_share, ray_directions


class Stars(CellTarget):
    """Object probability and rays."""

    channels = ("object", *(f"ray{ray}" for ray in range(RAYS)))
    num_fields = 1 + RAYS
    turns = field_turns = ChannelTurns.of_rays(RAYS, 1)
    method = "stars"
    fields_meaning = (
        f"the probability of an object, and {RAYS} rays from right over down, each as log2(1 + px of the image) / {LOG2_LONGEST}"
    )

    def encode(self, cells: Instances, scale: tuple[float, float]) -> np.ndarray:
        """The probability, and the rays in image pixels."""
        out = np.zeros((*cells.ids.shape, 1 + RAYS), np.uint8)
        out[..., 0] = edge_distance(cells.ids, cells.ignored)
        inside = np.flatnonzero(cells.ids)
        out.reshape(-1, 1 + RAYS)[inside, 1:] = stored(distance_to_share(_rays(cells.ids, inside, scale)))
        return out

    def loss(self, logits_BAHW: Tensor, truth_BHWA: Tensor, kept_BHW: Tensor | None) -> Tensor:
        """Binary cross-entropy of the probability over all pixels, and of the rays, averaged, over pixels of cells weighted by the probability."""
        wanted = as_share(truth_BHWA)
        everywhere = wanted.new_ones(()).expand_as(wanted[:, :1])
        of_object = weighted_cross_entropy(logits_BAHW[:, :1], wanted[:, :1], everywhere, kept_BHW)
        return of_object + weighted_cross_entropy(logits_BAHW[:, 1:], wanted[:, 1:], wanted[:, :1], kept_BHW) / RAYS


def _rays(ids: np.ndarray, inside: np.ndarray, scale: tuple[float, float]) -> np.ndarray:
    """The distance (num, R) float32 in image pixels from each pixel ``inside`` to where its cell ends along each ray.

    Steps of one framed pixel, the last pixel of the cell counting to its end, as in StarDist; a ray that leaves the image ends there.
    """
    height, width = ids.shape
    y, x = np.divmod(inside, width)
    own, out = ids.ravel()[inside], np.zeros((len(inside), RAYS), np.float32)
    for ray, (down, right) in enumerate(ray_directions() * np.array(scale)):
        step = 1 / max(abs(down), abs(right))  # image pixels for one framed pixel along the longer axis
        going, reach = np.arange(len(inside)), 0
        while len(going):
            reach += 1
            row = np.rint(y[going] + reach * step * down).astype(np.intp)
            column = np.rint(x[going] + reach * step * right).astype(np.intp)
            within = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            flat = np.where(within, row * width + column, 0)
            same = within & (ids.ravel()[flat] == own[going])
            out[going[~same], ray] = (reach - 0.5) * step
            going = going[same]
    return out
