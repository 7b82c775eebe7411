"""Collecting and reporting: fair pairing, everything left out is named, one page that needs nothing else."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import re
from contextlib import closing
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import mlflow
import numpy as np
import pytest
from finished_runs import EXPERIMENT, IMAGES, log_finished_run, per_image_scores

from cellbench.background import BackgroundCalls
from cellbench.config.run import RunSpec
from cellbench.errors import CellbenchError
from cellbench.execution.artifacts import round_metric
from cellbench.inference import run_lookup
from cellbench.metrics import catalog
from cellbench.reporting.collect import collect_runs
from cellbench.reporting.grouping import group_models
from cellbench.reporting.leaderboard import LeaderboardRow, leaderboard_rows, terminal_table, to_json
from cellbench.reporting.model_groups import FinishedRun, ModelGroup, TestSet
from cellbench.reporting.render import to_html
from cellbench.reporting.report import REPORTED_RUNS, report_dir, write_report
from cellbench.reporting.report_data import draw
from cellbench.reporting.sections import build_report
from cellbench.reporting.stored_records import RunRequest
from cellbench.reporting.verdict import describe_absent_classes, describe_best
from cellbench.run import main
from cellbench.statistics.bootstrap import mean_interval
from cellbench.tracking import ui_view
from cellbench.tracking.schema import DATA, LIMIT, RunRecord
from cellbench.tracking.store import newest_experiment
from cellbench.tracking.tracker import Tracker


def results():
    return collect_runs([Tracker(EXPERIMENT, make=False)])


class ParsedPage(HTMLParser):
    """What a page refers to, and whether its elements are closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.addresses, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "img", "link", "br", "source"):
            self.open.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "srcset", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_seeds_are_one_model_and_the_best_comes_first(project):
    (here,) = results().sets
    assert [model.name for model in here.models] == ["dinobloom-s · fpn", "dinobloom-s · bilinear", "uni · fpn", "uni · bilinear", "otsu"]
    assert [len(model.runs) for model in here.models] == [2, 2, 2, 2, 1]
    best = leaderboard_rows(here)[0]
    scores = here.best.scores()
    assert best.image_dice == pytest.approx(scores.values.mean())
    interval = mean_interval(scores.per_image)
    assert (best.low, best.high) == (interval.low, interval.high)
    assert all(d.b == "dinobloom-s · fpn" and d.better == d.b for d in here.differences_to_best())


@pytest.mark.slow
def test_the_page_needs_nothing_else_and_tables_are_the_same_in_every_format(project, capsys, pictures):
    assert main(["report", EXPERIMENT, "--out", "out"]) == 0
    said = capsys.readouterr().out
    text = Path("out/report.html").read_text(encoding="utf-8")
    page = ParsedPage(text)
    assert page.open == []
    assert all(address.startswith(("data:image/", "#")) for address in page.addresses)
    words = " ".join(page.words)
    assert EXPERIMENT in words
    for expected in ("dinobloom-s · fpn", "Are the differences significant?", "Cost", "fingerprint", "d" * 16, "smear-0"):
        assert expected in words
    assert "Best on average is dinobloom-s · fpn" in said
    assert "Best on average is dinobloom-s · fpn" in words
    for name in ("leaderboard", "differences", "cost"):
        lines = list(csv.reader(Path(f"out/{name}.csv").read_text(encoding="utf-8").splitlines()))
        markdown = Path(f"out/{name}.md").read_text(encoding="utf-8").splitlines()
        tex = Path(f"out/{name}.tex").read_text(encoding="utf-8")
        assert len(lines) == len(markdown) - 1 == tex.count(r"\\")
        assert markdown[2].count("|") == len(lines[0]) + 1
    lead = text.partition("<section")[0]
    assert (lead.count("<picture>"), lead.count("<table")) == (1, 1)  # one figure and the leaderboard; the rest is folded
    assert text.count("<section") == text.count('<section class="folded"><details>') >= 6
    pictures = {path.stem for path in Path("out/figures").iterdir()}
    assert pictures >= {"leaderboard", "measures", "images", "heatmap", "differences", "ranks", "cost"}


@pytest.mark.slow
def test_the_report_is_kept_on_the_parent_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a store of its own: MLflow remembers the places of runs by id, and copies have the same
    mlflow.set_tracking_uri(None)
    tracker = Tracker("kept")
    with tracker.run("grid: kept", "parent", tags={"cellbench.kind": "grid"}) as top:
        log_finished_run(tracker, RunSpec(backbone="uni", head="fpn"), per_image_scores(0.9, 0), top.run_id)
    main(["report", "kept", "--out", "out"])
    (parent,) = collect_runs([tracker]).parents
    assert tracker.artifact(parent, "report.html") == Path("out/report.html").read_bytes()


@pytest.mark.slow
def test_runs_on_other_images_are_never_paired_and_the_report_names_them(project, capsys):
    other = tuple(f"other-{k}.png" for k in range(20))
    for seed in (0, 1):
        log_finished_run(Tracker(EXPERIMENT), RunSpec(backbone="uni", head="fpn", seed=seed), per_image_scores(0.99, seed, other, "e" * 16))
    newest, older = results().sets
    assert older.best.name == "dinobloom-s · fpn"
    assert [model.name for model in newest.models] == ["uni · fpn"]
    assert len(older.differences_to_best()) == 4
    assert newest.differences_to_best() == []
    assert main(["report", EXPERIMENT, "--out", "out"]) == 0
    assert "Scores are paired within one set only" in Path("out/report.html").read_text(encoding="utf-8")


def quick_try(tracker, head="detail"):
    """A finished run on two images of each split, with a score that no other reaches."""
    record = per_image_scores(0.999, 5, ("smear-00.png", "smear-01.png"), "a" * 16) | {"num_images": {"train": 2, "val": 2, "test": 2}}
    return log_finished_run(tracker, RunSpec(backbone="uni", head=head, seed=0), record, **{LIMIT: "2"})


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_quick_try_never_stands_before_whole_data(tmp_path, monkeypatch, capsys, when):
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(None)
    tracker = Tracker("tiny")
    whole = {"num_images": {"train": 19, "val": 5, "test": 16}}
    if when == "before":
        quick_try(tracker, "fpn")
    ids = {
        log_finished_run(tracker, RunSpec(backbone="uni", head=head), per_image_scores(mean, 0) | whole)
        for head, mean in (("fpn", 0.9), ("bilinear", 0.7))
    }
    if when == "after":
        quick_try(tracker, "fpn")
    first, second = collect_runs([tracker]).sets
    assert (first.limit, second.limit) == ("", "2")
    other = "drawn: 2 training, 2 validation and 2 test images (a part of the data, --limit 2)"
    for asked in ("best", "best:tiny", "uni · fpn · seed 0"):
        _, stored, chosen = run_lookup.find_run(asked)
        assert stored.run_id in ids
        if asked.startswith("best"):
            assert "chosen by its test score, the highest mean Dice over images among 2 models; its score is optimistic" in chosen
            assert other in chosen
        else:
            assert chosen == "2 runs have this name; this is the newest finished one on all data."
    # The view that MLflow's UI opens shows no quick try, whose score would stand on top.
    assert {run.info.run_id for run in tracker.client.search_runs([tracker.experiment_id], ui_view.WHOLE)} == ids
    if when == "before":
        return
    assert main(["report", "tiny", "--out", "out"]) == 0
    said = capsys.readouterr().out
    for text in (said, Path("out/report.html").read_text(encoding="utf-8")):
        assert "Best on average is uni · fpn: Dice" in text
        assert "The best was chosen by its test score, the highest mean Dice over images among 2 models; its score is optimistic" in text
        assert "newest whole test set, drawn: 19 training, 5 validation and 16 test images" in text
        assert other in text
    assert "<dt>data</dt><dd>drawn: 19 training, 5 validation and 16 test images</dd>" in text
    lead = text.partition("<section")[0]
    assert "drawn: 19 training, 5 validation and 16 test images" in re.search(r'<p class="sub">(.*?)</p>', lead)[1]
    assert "a" * 16 not in lead
    assert [line.split(",")[4] for line in Path("out/leaderboard.csv").read_text().splitlines()[1:]] == [
        f"{row.image_dice:.4f}" for row in leaderboard_rows(first)
    ]


@pytest.mark.slow
def test_where_there_are_quick_tries_only_the_newest_of_them_is_the_best(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(None)
    run_id = quick_try(Tracker("tiny"))
    assert run_lookup.find_run("best")[1].run_id == run_id


@pytest.mark.slow
def test_neither_a_quick_try_nor_an_evaluation_makes_an_experiment_the_newest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(None)
    run_id = log_finished_run(Tracker("real"), RunSpec(backbone="uni", head="fpn"), per_image_scores(0.9, 0))
    quick_try(Tracker("tried"))
    older = Tracker("evaluated")
    with older.run("evaluate: a run", "e", tags={"cellbench.kind": "evaluation"}):
        pass
    assert (newest_experiment(), newest_experiment(whole=True)) == ("tried", "real")
    _, stored, chosen = run_lookup.find_run("best")
    assert stored.run_id == run_id
    assert "Newer runs, of 'tried', are on a part of their data and are not considered." in chosen


@pytest.mark.slow
def test_of_two_whole_sets_the_one_whose_grid_was_started_last_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(None)
    tracker = Tracker("two")

    def grid(digest, name):
        known = tracker.known(digest).get(digest)
        with tracker.run("grid", digest, known=known, tags={"cellbench.kind": "grid", DATA: digest}) as top:
            about = {"question": name, "experiment": "", "command": name, "dataset": {"digest": digest, "root": name, "notes": []}}
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / "about.json").write_text(json.dumps(about))
            top.log_artifacts(tmp_path / name)
            if known is None:
                log_finished_run(tracker, RunSpec(backbone="uni", head="fpn"), per_image_scores(0.9, 0, digest=digest), top.run_id)

    for digest, name in (("a" * 16, "first"), ("b" * 16, "second"), ("a" * 16, "first")):
        grid(digest, name)
        assert collect_runs([tracker]).sets[0].digest == digest
        assert main(["report", "two", "--out", "out"]) == 0
        _, _, data = Path("out/report.html").read_text(encoding="utf-8").partition("<h2>The data</h2>")
        assert f"<dd>{name}</dd>" in data  # what is said of the data is of the same set
        assert digest in data.partition("</section>")[0]


def test_settings_that_differ_name_models_and_are_no_seeds(project):
    log_finished_run(Tracker(EXPERIMENT), RunSpec(backbone="uni", head="fpn", seed=0, epochs=3), per_image_scores(0.95, 7))
    (here,) = results().sets
    names = {model.name: len(model.runs) for model in here.models}
    assert names["uni · fpn · epochs 3"] == 1
    assert names["uni · fpn · epochs 20"] == 2
    assert names["otsu"] == 1


@pytest.mark.slow
def test_unusable_runs_are_left_out_with_a_sentence(project, capsys):
    tracker = Tracker(EXPERIMENT)
    log_finished_run(tracker, RunSpec(backbone="uni", head="detail", seed=0), None)
    damaged = log_finished_run(tracker, RunSpec(backbone="uni", head="detail", seed=1), per_image_scores(0.9, 0))
    stored = {run.run_id: run for run in tracker.stored()}
    path = Path(unquote(stored[damaged].artifact_uri.removeprefix("file://"))) / "per_image.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "dice": [0.5]}))
    nan = log_finished_run(
        tracker, RunSpec(backbone="uni", head="detail", seed=2), {**per_image_scores(0.9, 0), "dice": [float("nan")] * len(IMAGES)}
    )
    with tracker.run("uni · gated · seed 0", "skip") as run:
        run.end("skipped", "log in | first & <b>")
    mlflow.set_tracking_uri(None)
    with mlflow.start_run(experiment_id=tracker.experiment_id, run_name="someone's notebook"):
        mlflow.log_metric("test/dice", 1.0)
    gone = log_finished_run(tracker, RunSpec(backbone="uni", head="fpn", seed=9), per_image_scores(0.9, 0))
    mlflow.MlflowClient().delete_run(gone)
    found = results()
    assert sum(len(model.runs) for model in found.sets[0].models) == 9
    said = " ".join(found.left_out)
    for expected in (
        "is gone",
        "one score an image",
        "NaN",
        "1 run in the experiment is not cellbench's",
        "1 run of",
        "deleted in MLflow",
    ):
        assert expected in said
    assert nan not in {run.record.run_id for model in found.sets[0].models for run in model.runs}
    main(["report", EXPERIMENT, "--out", "out"])
    text = Path("out/report.html").read_text(encoding="utf-8")
    assert "log in | first &amp; &lt;b&gt;" in text
    assert "not cellbench&#39;s" in text


@pytest.mark.slow
def test_one_model_alone_is_reported_without_tests(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(None)
    log_finished_run(Tracker("alone"), RunSpec(backbone="uni", head="fpn"), per_image_scores(0.9, 0, images=("one.png",)))
    assert main(["report"]) == 0
    text = (tmp_path / "reports" / "alone" / "report.html").read_text(encoding="utf-8")
    assert "There is only one model" in text
    assert "nan" not in re.sub(r"base64,[^\"]*", "", text).lower()


@pytest.mark.slow
def test_another_process_draws_the_same_figures(project, pictures):
    figures = list(build_report(results()).figures())
    with closing(BackgroundCalls(1)) as pool:
        elsewhere = [pool.submit(draw, figure) for figure in figures]
        assert [draw(figure) for figure in figures] == [job.result(60) for job in elsewhere]
    assert len(figures) > 3


@pytest.mark.slow
def test_a_page_that_says_that_nothing_can_be_decided_separates_no_models(tmp_path, monkeypatch):
    """Nine models always in the same order: on three images Friedman's p is 0.002, and no pair's can fall below 0.25."""
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(None)
    tracker = Tracker("few")
    for k, (backbone, head) in enumerate(itertools.product(("dinobloom-s", "uni", "gpfm"), ("fpn", "bilinear", "detail"))):
        log_finished_run(tracker, RunSpec(backbone=backbone, head=head), per_image_scores(0.9 - 0.02 * k, 0, IMAGES[:3]))
    made = build_report(collect_runs([tracker]))
    assert "With 3 test images no difference can be significant (p over 36 pairs cannot fall below 1)" in to_html(made)
    assert not {"ranks", "ranks-backbones", "ranks-heads"} & {figure.name for figure in made.figures()}
    (table,) = (table for table in made.tables() if table.name == "leaderboard")
    assert {row[table.headings.index("95 %")] for row in table.rows} == {""}


def scores_with_empty_images(mean, seed, num_found):
    """Scores of a model on images of which the first four have no cell; it finds something in ``num_found`` of them."""
    record = per_image_scores(mean, seed)
    empty = [0.0] * num_found + [None] * (4 - num_found)
    for name in ("dice", "iou", "precision", "recall", "accuracy", "nsd", "boundary_dice", "ap50", "ap50_95", "aji", "pq"):
        record[name] = empty + record[name][4:]
    pixels = [[[90, 10 * (k < num_found)], [0, 0]] for k in range(4)] + [[[50, 5], [5, 40]]] * 12
    outcome = {"num_true": 10, "num_found": 7, "num_missed": 1, "num_split": 2, "num_merged": 0, "num_extra": 3}
    return record | {"confusion": pixels} | {name: [0] * 4 + [num] * 12 for name, num in outcome.items()}


@pytest.mark.slow
def test_empty_images_are_counted_beside_the_means_and_a_find_in_one_is_never_free(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    silent, alarmed = scores_with_empty_images(0.9, 0, 0), scores_with_empty_images(0.9, 0, 2)
    for head, record in (("fpn", silent), ("detail", alarmed)):
        metrics_of = {**record, "dice": [value for value in record["dice"] if value is not None]}
        run = RunSpec(backbone="uni", head=head)
        log_finished_run(Tracker("empty"), run, record, mean=float(np.mean(metrics_of["dice"])))
    assert main(["report", "empty", "--out", "out"]) == 0
    said = capsys.readouterr().out
    assert (
        "Note: 4 of 16 test images have no cell. Cells were predicted there by uni · detail (2): these images score 0. Means leave out those where"
        in said
    )
    assert "2 images without a cell where only one of the two predicts a cell" in said
    (here,) = collect_runs([Tracker("empty", make=False)]).sets
    assert [model.name for model in here.models] == ["uni · fpn", "uni · detail"]
    first, second = leaderboard_rows(here)
    scored = np.array(silent["dice"][4:])
    assert (first.image_dice, first.num_empty, first.num_empty_found) == (pytest.approx(scored.mean()), 4, 0)
    assert (second.image_dice, second.num_empty_found) == (pytest.approx(scored.sum() / 14), 2)
    (d,) = here.differences()
    assert (d.interval.mean, d.wins, d.ties) == (pytest.approx(2 / 14), 2, 12)
    page = re.sub(r"base64,[^\"]*", "", (tmp_path / "out" / "report.html").read_text())
    assert not re.search(r"\bnan\b", page, re.IGNORECASE)
    assert (tmp_path / "out" / "cells.csv").read_text().splitlines()[1] == "uni · fpn,120,1456,84,12,24,0,36"
    json.dumps(to_json(leaderboard_rows(here)), allow_nan=False)


def test_a_class_that_no_test_mask_holds_is_named_with_who_predicts_it():
    stray, clean = [[90, 1, 1], [0, 8, 0], [0, 0, 0]], [[90, 2, 0], [0, 8, 0], [0, 0, 0]]
    record = per_image_scores(0.9, 0) | {"classes": ["background", "red", "white"], "confusion": [stray] * 3 + [clean] * 13}
    stored = RunRecord(run_id="r", name="n", status="finished", params={"baseline": "otsu"})
    ((here,), _) = group_models([FinishedRun(record=stored, per_image=record)])
    (words,) = describe_absent_classes(here)
    assert words.startswith(
        "Note: no test mask holds 'white'; of 16 test images some have it predicted: otsu (3). Pooled means leave it out"
    )
    ((here,), _) = group_models([FinishedRun(record=stored, per_image=record | {"unused": ["white"], "confusion": [clean] * 16})])
    assert describe_absent_classes(here) == ["Note: no mask of the data holds 'white'; no model predicts it. Means leave it out."]


@pytest.mark.slow
def test_of_several_cell_classes_the_words_say_what_one_number_is(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    record = per_image_scores(0.9, 0) | {"classes": ["background", "cytoplasm", "nucleus"]}
    log_finished_run(Tracker("three"), RunSpec(baseline="otsu"), record)
    assert main(["report", "three"]) == 0
    assert "means over cytoplasm, nucleus" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["cells, a/b & u"], "Did you mean 'cells, a/b & ü 🔬'?"),
        (["empty"], "no finished run"),
        ([EXPERIMENT, "nothing like it"], "no experiment called"),
    ],
)
def test_a_report_without_results_is_a_one_line_error(project, capsys, arguments, expected):
    Tracker("empty")
    assert main(["report", *arguments]) == 2
    said = capsys.readouterr().err.strip()
    assert expected in said
    assert "\n" not in said


@pytest.mark.parametrize("verb", ["report", "ui"])
def test_a_folder_without_a_store_is_an_error_and_creates_none(tmp_path, monkeypatch, capsys, verb):
    monkeypatch.chdir(tmp_path)
    assert main([verb]) == 2
    assert "no MLflow store" in capsys.readouterr().err
    assert not (tmp_path / "mlflow.db").exists()


def test_experiments_together_are_one_comparison(project):
    log_finished_run(Tracker("second"), RunSpec(backbone="gpfm", head="fpn"), per_image_scores(0.97, 3))
    found = collect_runs([Tracker(EXPERIMENT, make=False), Tracker("second", make=False)])
    assert found.sets[0].best.name == "gpfm · fpn"
    assert len(found.sets[0].models) == 6


def test_metrics_are_as_exact_as_they_are_worth_and_counts_stay_whole():
    assert round_metric("test/dice", 2 / 3) == 0.666667
    assert round_metric("cost/train_s", 123.456) == 123.5
    assert round_metric("cost/backbone_params", 303_350_784) == 303_350_784


@pytest.mark.parametrize("name", ["a/b", "../..", "🔬", "x" * 300, "cells, ü"])
def test_a_report_of_any_name_lies_below_reports(name):
    where = report_dir(name)
    assert where.parent == Path("reports")
    assert where.name not in ("", ".", "..")
    assert len(where.name) <= 80


@pytest.mark.slow
def test_a_thousand_models_are_compared_in_seconds(monkeypatch):
    import time

    names = tuple(f"{k}.png" for k in range(60))
    stored = RunRecord(run_id="r", name="n", status="finished", metrics={"test/dice": 0.9})
    runs = [FinishedRun(record=stored, per_image=per_image_scores(0.8 + k / 1e4, k, names)) for k in range(1000)]
    models = tuple(
        ModelGroup(name=f"m{k}", backbone="b", head=f"h{k}", baseline=False, plain=True, runs=(one,)) for k, one in enumerate(runs)
    )[::-1]  # fmt: skip
    here = TestSet(dataset="d", digest="e", images=names, models=models)
    start = time.process_time()
    assert len(leaderboard_rows(here)) == 1000
    assert describe_best(here)[0].startswith("Best on average is m999")
    assert time.process_time() - start < 20  # 3 s measured; np.random and ranks, on a busy machine
    assert np.isfinite([row.low for row in leaderboard_rows(here)]).all()


@pytest.mark.slow
def test_a_metric_of_a_user_is_in_every_table_and_figure_and_the_lower_one_wins_where_that_is_better(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(None)
    metric = catalog.Metric(
        key="area-error", label="area error", meaning="error of the area", unit="px", direction="minimize", per_image=True, compared=True,
        in_leaderboard=True, in_figures=True,
    )  # fmt: skip
    for head, mean, error in (("fpn", 0.9, 30.0), ("bilinear", 0.8, 10.0)):
        scores = per_image_scores(mean, 0) | {"own_metrics": catalog.to_record([metric])}
        scores["area-error"] = [error + k / 100 for k in range(len(IMAGES))]
        log_finished_run(Tracker("own"), RunSpec(backbone="uni", head=head), scores)
    assert main(["report", "own", "--out", "out"]) == 0
    heading, first, _ = csv.reader(Path("out/leaderboard.csv").read_text(encoding="utf-8").splitlines())
    assert dict(zip(heading, first, strict=True))["area error"] == "30.075"
    text = Path("out/report.html").read_text(encoding="utf-8")
    assert "By area error the best is uni · bilinear (10.075, significantly better than 1 of 1 others)." in text
    assert {"area error", "error of the area"} <= set(ParsedPage(text).words)


@pytest.mark.slow
def test_a_model_is_found_by_its_name_in_the_table_whatever_separates_its_words(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(None)
    tracker = Tracker("tiny")
    ids = {}
    for spec in (RunSpec(backbone="uni", head="fpn"), RunSpec(backbone="uni", head="detail", seed=1), RunSpec(baseline="otsu")):
        ids[spec.model] = log_finished_run(tracker, spec, per_image_scores(0.9, spec.seed))
    for asked in ("uni · detail", "uni detail", "uni/detail", "UNI,detail", "detail", "uni · detail · seed 1", "uni/detail/seed 1"):
        assert run_lookup.find_run(asked)[1].run_id == ids["uni · detail"], asked
    assert run_lookup.find_run("otsu (baseline)")[1].run_id == run_lookup.find_run("otsu")[1].run_id == ids["otsu"]
    with pytest.raises(CellbenchError, match=r"^'uni' may be uni · detail, uni · fpn\. Name one of these 2\.$"):
        run_lookup.find_run("uni")
    with pytest.raises(CellbenchError, match=r"^'tiny' is an experiment\. Its best model is best:tiny\.$"):
        run_lookup.find_run("tiny")
    with pytest.raises(CellbenchError, match="no model or run called 'unet'"):
        run_lookup.find_run("unet")


def test_the_table_of_a_terminal_fits_80_columns_and_says_which_differences_are_significant(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    rows = [
        LeaderboardRow(
            **{field.name: {} if field.name in ("scores", "costs", "further") else () for field in dataclasses.fields(LeaderboardRow)}
            | {"model": model, "baseline": baseline, "image_dice": dice, "low": dice - 0.01, "high": dice + 0.01, "rough": True}
            | {"p_to_best": p, "num_seeds": 3, "seed_sd": 0.01, "scores": {"dice": dice, "ap50": 0.8}, "costs": {"images_per_s": 2.0}}
            | {"lowest_dice": None}
        )
        for model, baseline, dice, p in (("otsu", True, 0.95, None), ("vit-tiny-random · transposed-conv", False, 0.9, 0.0004))
    ]
    lines = terminal_table(rows).splitlines()
    assert max(map(len, lines)) <= 80
    assert "0.950  ≈0.940–0.960" in lines[2]
    assert "best" in lines[2]
    assert "< 0.001" in lines[3]
    assert all(heading in terminal_table(rows, wide=True) for heading in ("seeds", "IoU", "precision", "p vs best"))


def test_a_report_over_fewer_runs_leaves_the_one_over_more(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(None)
    tracker, said = Tracker("fuller"), []
    with tracker.run("grid: fuller", "parent", tags={"cellbench.kind": "grid", REPORTED_RUNS: "9-abc"}) as top:
        one = log_finished_run(tracker, RunSpec(backbone="uni", head="fpn"), per_image_scores(0.9, 0), top.run_id)
        write_report(tracker, top, {one}, RunRequest(), {}, {}, {}, said.append)
    assert said == [
        "the parent run has a report over 9 runs, which is kept; this call has 1. `cellbench report fuller` writes one over all runs that are there now."
    ]
    (parent,) = [run for run in tracker.stored() if run.is_parent]
    assert parent.tags[REPORTED_RUNS] == "9-abc"
    assert tracker.artifact(parent, "report.html") is None
