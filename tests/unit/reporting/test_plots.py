"""Figures: they can be drawn from the fewest and worst scores, nothing is cut off, and they are readable in grey."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from cellbench.data.io.images import thumbnail
from cellbench.metrics import catalog
from cellbench.metrics.calibration import expected_calibration_error
from cellbench.metrics.instance import OUTCOMES, CellOutcomes, CellPairs
from cellbench.metrics.instances import connected_instances
from cellbench.reporting.plot_rows import PlotRow
from cellbench.reporting.plots import comparison as comparison_plots
from cellbench.reporting.plots import example, style
from cellbench.reporting.plots import run as run_plots
from cellbench.reporting.plots import significance as significance_plots
from cellbench.reporting.plots.comparison import pareto_front
from cellbench.statistics.bootstrap import Interval, mean_interval
from cellbench.statistics.comparison import compare_all
from cellbench.statistics.ranking import critical_difference
from cellbench.statistics.scores import ModelScores


def pixels(figure):
    """The drawn picture (H, W, 3), 0..255."""
    return np.asarray(Image.open(io.BytesIO(style.to_png(figure))).convert("RGB"))


def uncut(figure):
    """Nothing is drawn on the picture's rim, where it would be cut."""
    picture = pixels(figure)
    rim = np.concatenate(
        [picture[:2].reshape(-1, 3), picture[-2:].reshape(-1, 3), picture[:, :2].reshape(-1, 3), picture[:, -2:].reshape(-1, 3)]
    )
    return bool((rim > 250).all())


def models(num, images=12, spread=0.01):
    rng = np.random.default_rng(0)
    hard = rng.normal(0, 0.03, images)
    names = [f"backbone-{k} · a-rather-long-head" for k in range(num)]
    return [ModelScores(model=name, images=[str(n) for n in range(images)], values=0.9 - spread * k + hard) for k, name in enumerate(names)]


def lines(num, **more):
    return [
        PlotRow(
            model=m.model,
            baseline=k == num - 1,
            backbone=m.model.split(" ")[0],
            head="a-rather-long-head",
            metrics={"Dice": mean_interval(m.per_image)},
        )
        for k, m in enumerate(models(num, **more))
    ]


@pytest.mark.slow
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize(("num", "images"), [(1, 1), (2, 40), (9, 2), (40, 12)])
def test_pictures_of_few_and_many_models_on_few_and_many_images_are_whole(num, images, narrow):
    here = lines(num, images=images)
    assert uncut(comparison_plots.plot_leaderboard(here, narrow=narrow))
    values = [m.per_image for m in models(num, images)]
    assert uncut(comparison_plots.plot_distributions([line.model for line in here], values, narrow=narrow))
    costs = {"training, s": [0.0, *range(1, num)], "prediction, s an image": [0.1 * (k + 1) for k in range(num)]}
    assert uncut(comparison_plots.plot_pareto(here, costs, narrow=narrow))


def one_model_far_away():
    here = lines(5)
    far = Interval(mean=0.3, low=0.25, high=0.35, num=12)
    return [*here, PlotRow(model="far away", baseline=False, backbone="b", head="h", metrics={"Dice": far})]


@pytest.mark.parametrize("narrow", [False, True])
def test_a_model_far_away_is_an_arrow_and_does_not_squeeze_the_axis(narrow):
    figure = comparison_plots.plot_leaderboard(one_model_far_away(), narrow=narrow)
    (axes,) = figure.axes
    assert axes.get_xlim()[0] > 0.75
    assert [line.get_marker() for line in axes.get_lines()].count("<") == 1
    assert "Arrows: outside the range of the axis." in style.get_caption(figure)
    assert any(text.get_text() == "0.3000" for text in axes.texts)


def test_costs_tell_backbones_by_colour_and_heads_by_shape():
    score = {"Dice": mean_interval(np.array([0.9, 0.91, 0.92]))}
    pairs = [(backbone, head) for backbone in ("uni", "gpfm") for head in ("fpn", "detail")]
    here = [PlotRow(model=f"{b} · {h}", baseline=False, backbone=b, head=h, metrics=score) for b, h in pairs]
    figure = comparison_plots.plot_pareto(here, {"training, s": [1.0, 2.0, 3.0, 4.0]})
    points = [(tuple(mark.get_edgecolor()[0]), mark.get_paths()[0].vertices.tobytes()) for mark in figure.axes[0].collections]
    assert len(set(points)) == 4
    assert (len({colour for colour, _ in points}), len({shape for _, shape in points})) == (2, 2)
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {"backbone uni", "backbone gpfm", "head fpn", "head detail"}


def test_the_leaderboard_draws_models_that_are_significantly_worse_open():
    figure = comparison_plots.plot_leaderboard(lines(3), {lines(3)[1].model})
    fills = [line.get_markerfacecolor() for line in figure.axes[0].get_lines() if line.get_marker() in "os"]
    assert [fill == "white" for fill in fills] == [False, True, False]


def test_a_picture_of_a_file_holds_its_caption_and_that_of_the_page_does_not():
    figure = comparison_plots.plot_leaderboard(lines(3))
    svg = style.to_svg(figure)
    assert b"Mean Dice of each model" not in svg
    assert b"backbone-0" in svg  # text is text
    plain = comparison_plots.plot_leaderboard(lines(3))
    style.set_caption(plain)
    assert len(pixels(figure)) > len(pixels(plain)) + 10


@pytest.mark.slow
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("num", [2, 20])
def test_differences_and_ranks_are_whole(num, narrow):
    found = compare_all(models(num), against=models(num)[0].model)
    assert uncut(significance_plots.plot_pairs([m.model for m in models(num)], compare_all(models(num)), narrow=narrow))
    assert uncut(significance_plots.plot_differences(found, models(num)[0].model, narrow=narrow))
    if num > 2:
        assert uncut(significance_plots.plot_critical_difference(critical_difference(models(num)), narrow=narrow))
        assert uncut(significance_plots.plot_critical_difference(critical_difference(models(num, spread=0)), narrow=narrow))


def test_equal_scores_and_missing_intervals_are_drawn():
    flat = Interval(mean=1.0, low=None, high=None, num=1, note="one image")
    here = [PlotRow(model=name, baseline=False, metrics={"Dice": flat, "AP50": flat}) for name in "ab"]
    assert uncut(comparison_plots.plot_leaderboard(here))
    assert uncut(comparison_plots.plot_metrics(here))


def test_a_heat_map_with_holes_is_whole():
    values = np.array([[0.9, np.nan], [np.nan, 0.8]])
    assert uncut(comparison_plots.plot_heatmap(["uni", "dinobloom-s"], ["fpn", "bilinear"], values))


def test_names_with_dollars_and_emoji_are_drawn_as_they_are():
    here = [
        PlotRow(model=name, baseline=False, metrics={"Dice": Interval(mean=0.9, low=0.8, high=0.95, num=3)})
        for name in ("a$b$c", "x, y/z_{")
    ]
    assert uncut(comparison_plots.plot_leaderboard(here))


def test_the_pareto_front_holds_what_nothing_beats_in_both():
    cost, score = np.array([1.0, 2.0, 2.0, 3.0, 4.0]), np.array([0.5, 0.7, 0.6, 0.7, 0.9])
    assert pareto_front(cost, score) == [0, 1, 4]


@pytest.mark.slow
@pytest.mark.parametrize(("num", "num_classes"), [(1, 2), (3, 5), (159, 3)])
def test_a_report_card_is_whole(num, num_classes):
    rng = np.random.default_rng(0)
    each = {name: rng.uniform(0.5, 1, num) for name in [metric.key for metric in catalog.per_image()]}
    pooled = {f"class {k}": dict.fromkeys(run_plots.POOLED, 0.9) for k in range(num_classes)}
    calibration = {"pixels": [10] * 20, "probability": np.linspace(0, 1, 20).tolist(), "share_cell": np.linspace(0, 1, 20).tolist()}
    assert uncut(run_plots.plot_scores("a run", each, pooled, calibration))
    assert expected_calibration_error(calibration) == 0


def test_a_method_without_probabilities_has_a_card_and_a_case():
    each = {"dice": np.array([1.0, 1.0])}
    run_plots.plot_scores("otsu", each, {"cell": dict.fromkeys(run_plots.POOLED, 1.0)}, None)
    blank = np.zeros((30, 40), np.uint8)
    png = example.draw_example(np.full((30, 40, 3), 200, np.uint8), blank, blank, None, "nothing in either")
    assert Image.open(io.BytesIO(png)).width > 2 * 40


def test_errors_differ_in_grey_too():
    image = np.full((2, 3, 3), 150, np.uint8)
    truth, classes = np.array([[1, 0, 1], [0, 0, 0]], np.uint8), np.array([[1, 1, 0], [0, 0, 0]], np.uint8)
    grey = example.error_overlay(image, truth, classes) @ [0.299, 0.587, 0.114]
    found, false, missed = grey[0] / 255
    assert found - false > 0.08
    assert false - missed > 0.15


def test_curves_mark_the_best_epoch():
    history = [{"train/loss": 1 / (k + 1), "val/loss": 1 / (k + 1), "val/dice": 0.9 - 0.01 * abs(k - 3)} for k in range(8)]
    figure = run_plots.plot_curves(history, 3)
    assert "epoch 4" in figure.axes[1].get_title(loc="left")
    assert uncut(figure)


@pytest.mark.parametrize("size", [(20, 30), (900, 200), (64, 1000)])
def test_an_example_fits_images_of_every_shape_and_long_names(size):
    image = np.full((*size, 3), 90, np.uint8)
    truth = np.zeros(size, np.uint8)
    truth[size[0] // 4 : size[0] // 2, size[1] // 4 : size[1] // 2] = 1
    cell = thumbnail(truth * np.uint8(200))
    page = Image.open(io.BytesIO(example.draw_example(image, truth, thumbnail(truth), cell, f"{'long' * 60}.png\nthe second line")))
    assert page.mode == "RGB"
    drawn = np.asarray(page)
    rim = np.concatenate([drawn[:2].reshape(-1, 3), drawn[-2:].reshape(-1, 3), drawn[:, :2].reshape(-1, 3), drawn[:, -2:].reshape(-1, 3)])
    assert (rim == 255).all()
    assert (drawn == example.YELLOW).all(-1).any()
    assert (drawn == example.CYAN).all(-1).any()


def test_the_outline_of_each_cell_says_what_became_of_it():
    """Two cells in one predicted cell, one in two, one found and one not; and a predicted cell where there is none."""
    truth, found = (np.zeros((60, 200), np.uint8) for _ in range(2))
    for left, right in ((2, 20), (22, 40), (60, 90), (110, 130), (150, 170)):
        truth[10:40, left:right] = 1
    for left, right in ((2, 40), (60, 74), (76, 90), (110, 130), (180, 198)):
        found[10:40, left:right] = 1
    cells = CellOutcomes.of(CellPairs.of(connected_instances(truth), connected_instances(found)))
    assert [OUTCOMES[code] for code in cells.outcomes[1:]] == ["merged", "merged", "split", "found", "missed"]
    assert cells.matched.tolist() == [False, False, False, False, True, False]
    drawn = np.asarray(Image.open(io.BytesIO(example.draw_example(np.full((60, 200, 3), 90, np.uint8), truth, found, None, "", cells))))
    for colour in (*example.OUTCOME_COLOURS.values(), example.EXTRA_COLOUR):
        assert (drawn == colour).all(-1).sum() > 14 * 10 + 100  # more than its key


def test_a_wide_image_is_shown_four_times_one_below_the_other():
    def size(height: int, width: int) -> tuple[int, int]:
        blank = np.zeros((height, width), np.uint8)
        return Image.open(io.BytesIO(example.draw_example(np.full((height, width, 3), 90, np.uint8), blank, blank, blank, "one"))).size

    wide, square = size(40, 400), size(400, 400)
    assert 1200 < wide[0] < 1250  # three times as large
    assert 4 * 120 < wide[1] < 4 * 160 + 40
    assert 800 < square[0] < 850
    assert 800 < square[1] < 950


def test_ignored_pixels_are_no_errors_and_have_no_outline():
    image, truth = np.full((60, 60, 3), 90, np.uint8), np.full((60, 60), 255, np.uint8)
    predicted = np.ones((60, 60), np.uint8)
    assert len(np.unique(example.error_overlay(image, truth, predicted))) == 1
    truth[:, 30:] = 0
    drawn = example.draw_example(image, truth, np.zeros_like(truth), np.zeros_like(truth), "half is ignored")
    yellow = (np.asarray(Image.open(io.BytesIO(drawn))) == example.YELLOW).all(-1)
    assert yellow.sum() == 14 * 10  # of the legend alone
