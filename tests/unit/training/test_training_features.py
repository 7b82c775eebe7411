"""A prediction knows how far its image is from the training images, whatever its framing and size."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from cohorts import FP32, REGISTRY, dataset_of, features_of, run_of, trainers_of
from small_data import write_pair

from cellbench.data.io.images import read_image
from cellbench.inference.segmenter import Segmenter
from cellbench.inference.trained_run import TrainedRun
from cellbench.metrics.calibration import Calibration
from cellbench.training.training_features import describe_training_images


@pytest.mark.parametrize(
    "settings", [{"overlap": 0.0}, {"framing": "pad", "overlap": 0.0}, {"framing": "resize"}, {"tile_scale": 0.5, "overlap": 0.0}], ids=str
)
def test_a_training_image_has_the_distance_0_and_noise_is_far(tmp_path, settings: dict[str, object]) -> None:
    for seed in range(7):
        write_pair(tmp_path / "set" / ("test" if seed > 5 else "train"), f"{seed}.png", seed, height_px=120, width_px=160)
    dataset = dataset_of(tmp_path / "set")
    run = run_of("fpn", "filter-bank", **settings)
    features = features_of(dataset, [run])
    model = trainers_of(dataset, [run], features)[0].model
    trained = TrainedRun(
        name="r",
        run=run,
        classes=dataset.classes,
        preparation=features.preparation,
        weights=model.state_dict(),
        training_features=describe_training_images(features),
        calibration=Calibration(temperature=2.0, dice_shift=-0.1, dice_error=0.05),
    )
    segmenter = Segmenter(trained, REGISTRY, FP32)
    image = read_image(dataset.train[0].image)
    found = segmenter.predict(image)
    assert found.distance == pytest.approx(0, abs=0.02)
    noise = np.random.default_rng(0).integers(0, 256, (100, 230, 3), np.uint8)
    assert (segmenter.predict(noise).distance or 0) > 2

    segmenter.trained = replace(trained, calibration=Calibration(), training_features=None)
    raw = segmenter.predict(image)
    assert raw.distance is None
    assert raw.trust.dice is None
    assert np.array_equal(found.probability, trained.calibration.table[raw.probability])
    assert np.array_equal(found.classes, raw.classes)
    assert found.trust.dice == trained.calibration.estimated_dice(np.bincount(raw.probability.ravel(), minlength=256))
