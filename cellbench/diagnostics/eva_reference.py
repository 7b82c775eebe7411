"""The runs of ``bench`` with kaiko-eva (https://github.com/kaiko-ai/eva), where it is installed: ``bench --peer eva``.

As its offline mode does: the maps of all tiles are written to disk once, then each head is trained on them, with the loss, the rates and the tiles of
:mod:`cellbench.diagnostics.script_reference`. Its decoders are not used: both train cellbench's heads. Loading is done in the training process itself,
which is faster for so few tiles than eva's default, worker processes.

    python -m cellbench.diagnostics.eva_reference '{"dataset": "bccd", …}'        # prints {"dice": …}; needs kaiko-eva[vision]
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

import torch
from eva.core.data import dataloaders, datamodules
from eva.core.data.datasets import MapDataset
from eva.core.metrics.structs import MetricsSchema
from eva.core.models.modules.utils.batch_postprocess import BatchPostProcess
from eva.core.trainers import Trainer, functional
from eva.vision.data.datasets.segmentation.embeddings import EmbeddingsSegmentationDataset
from eva.vision.metrics import DiceScore
from eva.vision.models.modules import SemanticSegmentationModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from cellbench.config.registry import load
from cellbench.diagnostics.script_reference import BATCH_SIZE, CHUNK, SPLITS, STEP_PX, ScriptSettings, Tile, corners, cut, loss, prepare
from cellbench.models.backbones.base import Backbone

MAPS = Path("maps")


class Tiles(MapDataset[tuple[Tensor, Tensor, dict[str, Any]]]):
    """The tiles of a split, each with the name of its file of maps."""

    def __init__(self, split: str, tiles: list[Tile]) -> None:
        self._split, self._tiles = split, tiles

    def __len__(self) -> int:
        return len(self._tiles)

    def filename(self, index: int) -> str:
        return f"{self._split}/{index}.png"

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, dict[str, Any]]:
        image, mask = self._tiles[index]
        return torch.from_numpy(image.copy()).permute(2, 0, 1).float() / 255, torch.from_numpy(mask.copy()).long(), {}


class Encoder(nn.Module):
    """A backbone as eva calls it."""

    def __init__(self, backbone: Backbone, indices: tuple[int, ...]) -> None:
        super().__init__()
        self.backbone, self.indices = backbone, indices

    def forward(self, pixels_BCTT: Tensor) -> list[Tensor]:
        return [level.clone() for level in self.backbone(pixels_BCTT, self.indices)]


class Decoder(nn.Module):
    """A head as eva calls it: with maps alone, since it keeps no pixels beside them."""

    def __init__(self, head: nn.Module, used: list[int], tile_px: int) -> None:
        super().__init__()
        self.head, self.used, self.tile_px = head, used, tile_px

    def forward(self, maps: list[Tensor]) -> Tensor:
        scores: Tensor = self.head([maps[k] for k in self.used], maps[0].new_zeros(len(maps[0]), 3, self.tile_px, self.tile_px))
        return scores


def run(settings: ScriptSettings) -> float:
    """Trains every head at every rate in the current folder; returns the best Dice of the cell class over the test tiles."""
    from eva.core.callbacks import SegmentationEmbeddingsWriter

    registry, num_classes, backbone, levels, train, val, images = prepare(settings)
    test = [(cut(image, y, x), cut(mask, y, x)) for image, mask in images for y, x in corners(mask, STEP_PX)]
    loader = functools.partial(dataloaders.DataLoader, num_workers=0, prefetch_factor=None, persistent_workers=False)
    accelerator = settings.device.partition(":")[0].replace("cuda", "gpu")
    trainer = functools.partial(Trainer, accelerator=accelerator, logger=False, enable_progress_bar=False)

    writer = SegmentationEmbeddingsWriter(str(MAPS), dataloader_idx_map=dict(enumerate(SPLITS)))
    all_tiles = datamodules.DataModule(
        datamodules.DatasetsSchema(predict=[Tiles(split, tiles) for split, tiles in zip(SPLITS, (train, val, test), strict=True)]),
        datamodules.DataloadersSchema(predict=loader(batch_size=CHUNK)),
    )
    whole = SemanticSegmentationModule(nn.Identity(), loss, Encoder(backbone, tuple(level.index for level in levels)))
    functional.infer_model(trainer(callbacks=[writer]), whole, all_tiles)

    maps = [EmbeddingsSegmentationDataset(str(MAPS), "manifest.csv", split) for split in SPLITS]
    data = datamodules.DataModule(
        datamodules.DatasetsSchema(*maps),
        datamodules.DataloadersSchema(loader(batch_size=BATCH_SIZE, shuffle=True), loader(batch_size=CHUNK), loader(batch_size=CHUNK)),
    )
    best = 0.0
    for name in settings.heads:
        card = registry.head(name)
        own = backbone.pick(card.levels)
        for rate in settings.rates:
            torch.manual_seed(0)
            decoder = Decoder(load(card)(own, num_classes, **card.options), [levels.index(level) for level in own], train[0][1].shape[0])
            optimiser = functools.partial(torch.optim.AdamW, lr=rate, weight_decay=1e-4)
            cosine = functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=settings.epochs)
            dice = MetricsSchema(evaluation=DiceScore(num_classes, include_background=False))
            classes = BatchPostProcess(predictions_transforms=[functools.partial(torch.argmax, dim=1)])
            model = SemanticSegmentationModule(decoder, loss, optimizer=optimiser, lr_scheduler=cosine, metrics=dice, postprocess=classes)
            keep = ModelCheckpoint(monitor="val/DiceScore", mode="max")
            session = trainer(max_epochs=settings.epochs, callbacks=[keep], log_every_n_steps=1)
            _, (scores, *_) = functional.run_evaluation(session, model, data, verbose=False)
            best = max(best, scores["test/DiceScore"])
    return best


if __name__ == "__main__":
    print(json.dumps({"dice": run(ScriptSettings(**json.loads(sys.argv[1])))}))
