"""What is tuned on validation images for the use of a trained model: the statistics of its batch norms, and regions at the frame of an image.

Batch norms: their statistics of training are fused with those of each tile (FUSION, arXiv 2208.14206).

Only the norms of the trained part are adapted. The frozen backbone's stay as they are: its features then do not depend on a run, so that a cohort
shares them and caches hold them. A tile's own statistics need no second pass over an image, which may be larger than the memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cellbench.features.extractor import Features
from cellbench.metrics.edge_regions import small_edge_regions
from cellbench.metrics.pixel import confusion_matrix, pixel_scores, pooled_classes
from cellbench.parallel import WorkerPool
from cellbench.training.model import SegmentationModel
from cellbench.training.tiled_inference import score_tiles, segment_images

SHARES = (0.0, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0)
"""The shares of a tile's own statistics that are tried on validation images."""
EDGE_SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7)
"""The shares of a cell that are tried, below which regions at the frame are dropped."""


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


def tune_edges(models: Sequence[SegmentationModel], features: Features) -> list[float]:
    """Sets the share of a cell below which regions at the frame are dropped, of each model that tunes it, as :func:`tune_shares` does."""
    tuning = [model for model in models if model.tunes_edges]
    counts = [np.zeros((len(EDGE_SHARES), model.num_classes, model.num_classes), np.int64) for model in tuning]
    for model in tuning:
        model.edge_share = 0.0
    for image, found in segment_images(tuning, features, "val") if tuning else ():
        truth = features.pixels["val"][image][1]
        for mine, model, one in zip(counts, tuning, found, strict=True):
            for k, share in enumerate(EDGE_SHARES):
                kept = np.where(small_edge_regions(one.classes, share), np.uint8(0), one.classes)
                mine[k] += confusion_matrix(truth, kept, model.num_classes)
    for mine, model in zip(counts, tuning, strict=True):
        model.edge_share = EDGE_SHARES[int(np.argmax([pixel_scores(one).of(pooled_classes(one))["dice"] for one in mine]))]
    return [model.edge_share for model in models]
