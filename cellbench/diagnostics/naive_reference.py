"""The published protocol in its usual form, as the baseline of ``bench``.

One run at a time; at every step the images of the batch are opened, cropped, passed through the frozen backbone in float32 and decoded. It
sees the same views in the same order as a run of cellbench.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cellbench.config.run import RunSpec
from cellbench.data.dataset import Dataset
from cellbench.data.transforms.augmentation import apply_all, rotate_flip
from cellbench.data.transforms.sampling import SamplingPlan
from cellbench.data.transforms.tiling import TileGrid, cut_tile
from cellbench.metrics.pixel import IGNORE, confusion_matrix, pixel_scores, pooled_classes
from cellbench.models.backbones.base import Backbone
from cellbench.training.losses import parse_loss
from cellbench.training.trainer import batch_sizes


class PublishedHead(nn.Module):
    """1x1 to 256, three times [transposed 4x4, 3x3], a bilinear resize, and after it the 1x1 to classes."""

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(dim, 256, 1), nn.BatchNorm2d(256), nn.ReLU()]
        for a, b in ((256, 128), (128, 64), (64, 32)):
            layers += [nn.ConvTranspose2d(a, b, 4, stride=2, padding=1), nn.BatchNorm2d(b), nn.ReLU()]
            layers += [nn.Conv2d(b, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU()]
        self.layers = nn.Sequential(*layers)
        self.score = nn.Conv2d(32, num_classes, 1)

    def forward(self, maps: list[Tensor], pixels_BCHW: Tensor) -> Tensor:
        x = F.interpolate(self.layers(maps[-1]), size=pixels_BCHW.shape[-2:], mode="bilinear", align_corners=False)
        return self.score(x)


def train(
    run: RunSpec,
    head: nn.Module,
    backbone: Backbone,
    indices: tuple[int, ...],
    dataset: Dataset,
    num_epochs: int,
    *,
    rate: Callable[[int], float],
    reopen: bool,
) -> float:
    """Trains one run and validates after each epoch; returns the last validation Dice.

    ``rate`` gives the learning rate of each step. ``reopen`` opens an image for every crop, as the published data loader does; else decoded
    images are held in memory.
    """
    plan = SamplingPlan(tuple(sample.size_px for sample in dataset.train), run)
    held = {} if reopen else {k: dataset.read(sample) for k, sample in enumerate(dataset.train)}
    val = [dataset.read(sample) for sample in dataset.val]
    optimiser = torch.optim.AdamW(head.parameters(), lr=run.lr, weight_decay=run.weight_decay)
    loss_fn, step, dice, device = parse_loss(run.loss), 0, 0.0, next(head.parameters()).device
    for epoch in range(num_epochs):
        head.train()
        views, order = plan.views(plan.cycle(epoch)), plan.order(epoch)
        for rows in torch.from_numpy(order).split(batch_sizes(len(order), run.batch_size)):
            batch = views.take(rows.numpy())
            pairs = [held[view.image] if held else dataset.read(dataset.train[view.image]) for view in batch]
            tiles = [
                (rotate_flip(cut_tile(a, v.y, v.x, run.tile_px), v.turn), rotate_flip(cut_tile(m, v.y, v.x, run.tile_px), v.turn))
                for (a, m), v in zip(pairs, batch, strict=True)
            ]
            pixels = torch.stack([torch.from_numpy(tile.copy()) for tile, _ in tiles]).permute(0, 3, 1, 2).float().to(device) / 255
            pixels = apply_all(plan.augmentations, pixels, batch.draws)
            target = torch.stack([torch.from_numpy(mask.copy()) for _, mask in tiles]).long().to(device)
            with torch.no_grad():
                maps = [m.clone() for m in backbone(pixels, indices)]
            optimiser.param_groups[0]["lr"] = rate(step)
            step += 1
            optimiser.zero_grad()
            loss_fn(head(maps, pixels), target, bool((target == IGNORE).any())).backward()
            optimiser.step()
        dice = _validate(run, head, backbone, indices, val, len(dataset.classes))
    return dice


@torch.no_grad()
def _validate(
    run: RunSpec, head: nn.Module, backbone: Backbone, indices: tuple[int, ...], val: list[tuple[np.ndarray, np.ndarray]], num_classes: int
) -> float:
    head.eval()
    device = next(head.parameters()).device
    counts = np.zeros((num_classes, num_classes), np.int64)
    for image, mask in val:
        grid = TileGrid.over(mask.shape[0], mask.shape[1], run.tile_px, run.val_overlap)
        for (y, x), own in zip(grid, grid.owned(), strict=True):
            pixels = torch.from_numpy(cut_tile(image, y, x, run.tile_px).copy()).permute(2, 0, 1)[None].float().to(device) / 255
            found = head([m.clone() for m in backbone(pixels, indices)], pixels).argmax(1)[0].byte().cpu().numpy()
            counts = counts + confusion_matrix(cut_tile(mask, y, x, run.tile_px)[own], found[own], num_classes)
    return pixel_scores(counts).of(pooled_classes(counts))["dice"]
