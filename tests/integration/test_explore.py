"""``explore`` reports correct statistics, places features correctly, and does not change the data."""

from __future__ import annotations

import hashlib
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from cohorts import FP32, dataset_of, features_of, run_of, trainers_of
from scipy import ndimage

from cellbench.config.registry import Registry
from cellbench.data.audit.image_statistics import measure_images, summarize
from cellbench.data.transforms.framing import Framing
from cellbench.features.frozen_backbone import FrozenBackbone
from cellbench.features.token_maps import cosine_map, feature_maps, pca_rgb
from cellbench.models.backbones.build import open_backbone
from cellbench.reporting.plots import dataset as dataset_plots
from cellbench.run import main
from cellbench.tracking.store import newest_experiment
from cellbench.training.memory_check import _step_bytes

WAYS = [("tile", 1.0), ("tile", 2.0), ("tile", 0.5), ("pad", 1.0), ("resize", 1.0)]


def views(image: np.ndarray, kinds=WAYS):
    frozen = FrozenBackbone(open_backbone(Registry().backbone("vit-tiny-random")), FP32, [1])
    return [feature_maps(frozen, Framing.of(run_of(framing=kind, tile_scale=scale)), image) for kind, scale in kinds]


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (100, 170, 3), np.uint8)


def test_the_figures_are_those_of_the_masks(small_folder) -> None:
    dataset = dataset_of(small_folder)
    found = measure_images(dataset, dataset.test)
    for one, sample in zip(found, dataset.test, strict=True):
        picture, mask = dataset.read(sample)
        regions, _ = ndimage.label(mask)
        areas = np.bincount(regions.ravel())[1:]
        assert one.num_cells == (areas >= 100).sum()
        assert one.cell_share == pytest.approx((mask > 0).mean())
        assert one.cell_rgb == pytest.approx(picture[mask > 0].mean(0).tolist())
        edge = set(np.concatenate([regions[0], regions[-1], regions[:, 0], regions[:, -1]]).tolist())
        inner = [area for number, area in enumerate(areas, 1) if area >= 100 and number not in edge]
        assert sorted(one.diameters_px) == pytest.approx(sorted(np.sqrt(4 * np.array(inner) / np.pi)))
    facts = summarize(found)
    assert (facts["images"], facts["width_px"], facts["height_px"], facts["sizes"]) == (2, 160, 120, 1)


def test_feature_values_lie_at_their_locations(image) -> None:
    for view in views(image):
        number = torch.arange(len(view.tokens), dtype=torch.float32)
        laid = view.to_image(number[:, None])[..., 0]
        assert laid.shape == (100, 170)
        for y, x in ((0, 0), (99, 169), (50, 80), (13, 140), (77, 5)):
            assert 0 <= view.place(y, x) < len(number)
            if view.framing.exact:
                assert laid[y, x] == view.place(y, x)


def test_a_patch_is_seen_where_it_is(image) -> None:
    """Repainting one 16-px patch changes the places there most, in every framing."""
    other = image.copy()
    other[48:64, 112:128] = 255
    for before, after in zip(views(image), views(other), strict=True):
        change = before.to_image((after.tokens - before.tokens).norm(dim=1)[:, None])[..., 0]
        y, x = np.unravel_index(change.argmax(), change.shape)
        # Half the block, and a place of the map in own pixels.
        reach = 8 + before.stride_px * max(
            own / framed for own, framed in zip(image.shape, before.framing.framed_px((100, 170)), strict=False)
        )
        assert abs(y - 56) <= reach
        assert abs(x - 120) <= reach


def test_colours_are_principal_components_shared_by_all_views_and_the_same_again(image) -> None:
    some = views(image, [("tile", 1.0), ("pad", 1.0)])
    pictures = pca_rgb(some)
    assert all(picture.shape == (100, 170, 3) and 0 <= picture.min() <= picture.max() <= 1 for picture in pictures)
    assert all(np.array_equal(a, b) for a, b in zip(pictures, pca_rgb(some), strict=True))
    # Against numpy's SVD of the one view alone: the same plane, so each shown channel follows one component.
    alone = pca_rgb(some[:1])[0]
    tokens = some[0].tokens.double().numpy()
    _, _, axes = np.linalg.svd(tokens - tokens.mean(0), full_matrices=False)
    for channel in range(3):
        component = some[0].to_image(torch.from_numpy((tokens - tokens.mean(0)) @ axes[channel]).float()[:, None])[..., 0]
        inside = (alone[..., channel] > 0) & (alone[..., channel] < 1)  # the outer 2 % are cut off
        assert abs(np.corrcoef(alone[..., channel][inside], component[inside])[0, 1]) > 0.999


def test_the_most_similar_location_is_the_location_itself(image) -> None:
    for view in views(image, WAYS[:1]):
        found = cosine_map(view, 50, 80)
        assert found[50, 80] == pytest.approx(1, abs=1e-5)
        assert found.max() <= 1 + 1e-5
        assert (found < 0.999).any()


def content(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(str(path).encode() + path.read_bytes() for path in files)).hexdigest()


def test_explore_writes_plots_logs_on_request_and_does_not_change_the_data(small_folder, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    before = content(small_folder)
    assert main(["explore", str(small_folder), "--log"]) == 0
    assert {path.name for path in Path("explored/smears").iterdir()} == {"samples.png", "statistics.png", "statistics.json"}
    assert "8 images with masks" in capsys.readouterr().out
    asked = ["explore", str(small_folder), "--features", "--backbone", "vit-tiny-random", "--tile-px", "64", "--device", "cpu"]
    assert main([*asked, "--point", "80,60", "--out", "o", "--image", "b 2", "--framing", "tile:2", "--framing", "pad", "--log"]) == 0
    assert {path.name for path in Path("o").iterdir()} == {"features.png", "likeness.png"}
    assert "in its class" in capsys.readouterr().out
    assert content(small_folder) == before
    runs = mlflow.search_runs(experiment_names=["explore smears"], output_format="list")
    assert len(runs) == 2
    assert newest_experiment() is None  # there is nothing in them that a report could be made of


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--features", "--point", "500,20"], ["500,20", "160 x 120"]),
        (["--features", "--point", "20"], ["--point 20", "X,Y"]),
        (["--features", "--image", "nobody.png"], ["nobody.png", "a0.png"]),
        (["--features", "--framing", "cut"], ["--framing cut", "resize"]),
        (["--features", "--framing", "tile:x"], ["--framing tile:x"]),
        (["--seed", "-1"], ["--seed -1", "0 or more"]),
        (["--features", "--backbone", "vit-tiny-randon"], ["Did you mean 'vit-tiny-random'"]),
    ],
)
def test_what_cannot_be_plotted_is_a_one_line_error(small_folder, capsys, more, says) -> None:
    extra = [] if "--backbone" in more else ["--backbone", "vit-tiny-random"]
    assert main(["explore", str(small_folder), *more, *extra, "--tile-px", "64"]) == 2
    output = capsys.readouterr().err
    assert output.count("\n") == 1
    assert all(word in output for word in says)


def test_whole_images_that_exceed_memory_are_skipped_with_a_reason_and_tiles_are_shown(small_folder, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.setattr("cellbench.training.memory_check.free_bytes", lambda _: 2**20)
    (tmp_path / "p.toml").write_text(
        "experiment = 'p'\ndataset = 'folder'\n[grid]\nbackbone = ['vit-tiny-random']\nhead = ['bilinear']\nframing = ['pad', 'tile']\n"
        "[run]\ntile_px = 64\nepochs = 1\ncrops_per_image = 2\n"
    )
    grid = ["grid", "p.toml", "--data", str(small_folder), "--device", "cpu"]
    assert main([*grid, "--dry-run"]) == 0
    assert "would be skipped: a whole image of 192 x 128 px needs about" in capsys.readouterr().out
    assert main(grid) == 0
    output = capsys.readouterr().out
    assert "a whole image of 192 x 128 px needs about" in output
    assert "framing = 'tile'" in output
    runs = [run for run in mlflow.search_runs(experiment_names=["p"], output_format="list") if "framing" in run.data.params]
    status = {run.data.params["framing"]: run.data.tags["cellbench.status"] for run in runs}
    assert status == {"pad": "skipped", "tile": "finished"}


def test_a_heads_memory_is_counted_and_the_model_is_left_as_it_was(small_folder) -> None:
    dataset = dataset_of(small_folder)
    runs = [run_of("bilinear", framing="pad"), run_of("transposed-conv", framing="pad")]
    features = features_of(dataset, runs)
    models = [trainer.model for trainer in trainers_of(dataset, runs, features)]
    before = {name: x.clone() for name, x in models[1].state_dict().items()}
    light, heavy = (_step_bytes(run, model, features) for run, model in zip(runs, models, strict=True))
    # At least the logits of two classes in float32 for each pixel; the published head keeps maps of up to 256 channels beside.
    assert 8 <= light < heavy
    assert heavy > 100
    assert all(torch.equal(x, before[name]) for name, x in models[1].state_dict().items())


def test_a_dark_picture_is_shown_brighter_and_says_how_much():
    dark, mask = np.full((8, 8, 3), 30, np.uint8), np.zeros((8, 8), np.uint8)
    with_cells = dataset_plots.plot_samples([("dark.png", dark, mask), ("light.png", dark * 8, mask)], ("background", "cell")).axes
    titles, shown = [axes.get_title(loc="left") for axes in with_cells[:2]], [axes.images[0].get_array() for axes in with_cells[:2]]
    assert titles == ["dark.png, 8 x as bright", "light.png"]
    assert np.array_equal(shown[0], shown[1])
