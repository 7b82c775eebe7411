"""Stars: the distance to the edge along each ray, in pixels of the image, in any framing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cellbench.data.cell_targets.stars import Stars
from cellbench.metrics.instances import Instances, numbered_instances
from cellbench.metrics.star_polygons import RAYS, StarPolygons, ray_directions, share_to_distance


def disc(radius: float, scale: tuple[float, float] = (1, 1)) -> tuple[Instances, int, int]:
    """A disc, drawn in an image that is scaled, and the pixel at its middle."""
    height, width = round(100 * scale[0]), round(120 * scale[1])
    y, x = np.mgrid[:height, :width]
    ids = (np.hypot(y / scale[0] - 50, x / scale[1] - 60) < radius).astype(np.int32)
    return numbered_instances(ids, ids.astype(np.uint8)), round(50 * scale[0]), round(60 * scale[1])


@pytest.mark.parametrize("scale", [(1, 1), (2, 2), (0.5, 0.5), (2, 1), (1, 2.5)])
def test_rays_from_the_middle_of_a_disc_are_its_radius_at_any_scale(scale):
    cells, y, x = disc(30, scale)
    found = Stars().encode(cells, scale)[y, x]
    assert found[0] >= 250
    assert np.abs(share_to_distance(found[1:] / 255) - 30).max() < 1.5 / min(scale)


def test_each_ray_ends_where_its_cell_does_or_at_the_frame():
    ids = np.zeros((40, 60), np.int32)
    ids[10:30, :20], ids[10:30, 20:33] = 1, 2
    found = share_to_distance(Stars().encode(numbered_instances(ids, (ids > 0).astype(np.uint8)), (1, 1))[15, 10, 1:] / 255)
    along = {
        tuple(direction): float(found[ray]) for ray, direction in enumerate(np.rint(ray_directions()).astype(int)) if ray % (RAYS // 4) == 0
    }
    assert along == pytest.approx({(0, 1): 9.5, (1, 0): 14.5, (0, -1): 10.5, (-1, 0): 5.5}, rel=0.03)


def test_rays_are_stardist_s():
    star_dist = pytest.importorskip("stardist.geometry").star_dist
    cells, _, _ = disc(30)
    found = share_to_distance(Stars().encode(cells, (1, 1))[..., 1:] / 255)
    assert np.abs(found - star_dist(cells.ids.astype(np.uint16), RAYS))[cells.ids > 0].mean() < 1


def test_the_loss_weighs_rays_by_the_probability_and_ignores_pixels_out_of_the_count():
    stars, generator = Stars(), torch.Generator().manual_seed(0)
    logits = torch.randn(1, 1 + RAYS, 6, 8, generator=generator)
    truth = torch.randint(0, 256, (1, 6, 8, 1 + RAYS), generator=generator, dtype=torch.uint8)
    probability, share = logits.double().sigmoid(), truth.double().movedim(-1, 1) / 255
    each = -(share * probability.log() + (1 - share) * (1 - probability).log())
    weight = share[:, 0]
    expected = each[:, 0].mean() + (each[:, 1:].mean(1) * weight).sum() / weight.sum()
    assert stars.loss(logits, truth, None).item() == pytest.approx(expected.item(), rel=1e-4)
    kept = torch.zeros(1, 6, 8, dtype=torch.bool)
    kept[..., :4] = True
    assert stars.loss(logits, truth, kept).item() == pytest.approx(stars.loss(logits[..., :4], truth[:, :, :4], None).item(), rel=1e-5)


@pytest.mark.parametrize("halves", [1, 2])
def test_where_all_pixels_are_as_probable_a_star_is_drawn_for_each_place_not_each_pixel(halves):
    ids = np.ones((100, 120), np.int32)
    ids[:, 60:] = halves
    classes = np.ones(ids.shape, np.uint8)
    fields = np.moveaxis(Stars().encode(numbered_instances(ids, classes), (1, 1)), -1, 0).copy()
    fields[0] = 255
    stars = StarPolygons(classes, fields)
    assert len(stars._polygons) < 500  # of 12,000 pixels
    found = stars.instances(10, min_probability=0.5, max_overlap=0.3)
    assert found.num == halves
    assert np.bincount(found.ids[:, :60].ravel()).max() > 0.95 * 6000
