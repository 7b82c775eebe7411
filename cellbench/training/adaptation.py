"""Batch norm at test time: its statistics of training fused with those of each tile (FUSION, arXiv 2208.14206).

Only the norms of the trained part are adapted. The frozen backbone's stay as they are: its features then do not depend on a run, so that a cohort
shares them and caches hold them. A tile's own statistics need no second pass over an image, which may be larger than the memory.
"""

from __future__ import annotations

from collections.abc import Sequence

from cellbench.features.extractor import Features
from cellbench.metrics.pixel import pixel_scores, pooled_classes
from cellbench.parallel import WorkerPool
from cellbench.training.model import SegmentationModel
from cellbench.training.tiled_inference import score_tiles

SHARES = (0.0, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0)
"""The shares of a tile's own statistics that are tried on validation images."""


def tune_shares(models: Sequence[SegmentationModel], features: Features) -> list[float]:
    """Sets the share of a tile's own statistics of each model that adapts to the one with the best Dice over all pixels of the validation images.

    Returns the share of every model, 0 where it does not adapt. Of equal shares the smallest is taken. Costs a pass over the cached validation
    features for each share.
    """
    adapting = [model for model in models if model.adapts]
    best = [(-1.0, 0.0)] * len(adapting)
    with WorkerPool(features.backbone.machine.lanes) as pool:
        for share in SHARES if adapting else ():
            for model in adapting:
                model.set_own_share(share)
            counts = score_tiles(adapting, features, "val", lambda *_: None, pool)
            dices = [pixel_scores(one).of(pooled_classes(one))["dice"] for one in counts]
            best = [max(old, (dice, share), key=lambda pair: pair[0]) for old, dice in zip(best, dices, strict=True)]
    for model, (_, share) in zip(adapting, best, strict=True):
        model.set_own_share(share)
    return [model.own_share for model in models]
