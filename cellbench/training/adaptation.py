"""What is tuned on validation images for the use of a trained model: the statistics of its batch norms, and regions at the frame of an image.

Batch norms: their statistics of training are fused with those of each tile (FUSION, arXiv 2208.14206).

Only the norms of the trained part are adapted. The frozen backbone's stay as they are: its features then do not depend on a run, so that a cohort
shares them and caches hold them. A tile's own statistics need no second pass over an image, which may be larger than the memory.
"""

from __future__ import annotations

from collections.abc import Sequence

from cellbench.features.extractor import Features
from cellbench.metrics.edge_regions import EdgeShareTuner
from cellbench.metrics.pixel import pixel_scores, pooled_classes
from cellbench.parallel import WorkerPool
from cellbench.training.model import SegmentationModel
from cellbench.training.tiled_inference import score_tiles, segment_images

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


def tune_edges(models: Sequence[SegmentationModel], features: Features) -> list[float]:
    """Sets the share of a cell below which regions at the frame are dropped, of each model that tunes it, from its own validation predictions.

    Returns the share of every model, 0 where it keeps all.
    """
    tuning = [model for model in models if model.tunes_edges]
    tuners = [EdgeShareTuner(model.num_classes) for model in tuning]
    for model in tuning:
        model.edge_share = 0.0
    for image, found in segment_images(tuning, features, "val") if tuning else ():
        for tuner, one in zip(tuners, found, strict=True):
            tuner.add(features.pixels["val"][image][1], one.classes)
    for model, tuner in zip(tuning, tuners, strict=True):
        model.edge_share = tuner.best()
    return [model.edge_share for model in models]
