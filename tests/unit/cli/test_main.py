"""The command line answers at once where nothing is computed; a mistake costs one line and exit code 2, and nothing is written."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import cellbench
from cellbench.cli import main as command_line
from cellbench.config.cards import KINDS
from cellbench.config.options import ExploreOptions, GridOptions, PredictOptions
from cellbench.config.registry import Registry, shipped
from cellbench.run import main

HEAVY = ("torch", "mlflow", "numpy", "scipy", "matplotlib", "timm", "huggingface_hub", "PIL", "skimage", "optuna")


@pytest.fixture(autouse=True)
def own_signals() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on stderr of a command that ends with exit code 2; nothing on stdout, nothing written."""
    try:
        code = main(list(arguments))
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert code == 2
    assert out == ""
    assert err.startswith("cellbench: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert os.listdir() == []
    assert not Path(os.environ["CELLBENCH_CACHE"]).exists()
    return err


def answered(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


@pytest.mark.slow
@pytest.mark.parametrize("arguments", ["['list']", "['list', 'heads']", "['show', 'backbones/uni']", "['show', 'quickstart']", "['-h']"])
def test_list_show_and_help_import_nothing_heavy(arguments: str) -> None:
    code = f"""
import sys
from cellbench.run import main
try:
    main({arguments})
except SystemExit as stop:
    assert not stop.code
print(*sorted(set({HEAVY}) & set(sys.modules)), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == ""
    assert len(done.stdout) > 100


def test_list_names_every_card_and_experiment(capsys: pytest.CaptureFixture[str]) -> None:
    lines = answered(capsys, "list").splitlines()
    listed = {line.split()[0] for line in lines if line.startswith("  ")}
    for kind in KINDS:
        assert any(line.split(" ")[0] == f"{kind}:" for line in lines)
        assert set(Registry().names(kind)) <= listed
    assert "quickstart" in listed


@pytest.mark.parametrize("kind", KINDS)
def test_list_of_a_kind_is_that_kind_alone_with_a_sentence_each(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines = answered(capsys, "list", kind).splitlines()
    assert lines[0].split(" ")[0] == f"{kind}:"
    entries = [line for line in lines[1:] if line[2] != " "]  # the others continue a sentence
    assert [line.split()[0] for line in entries] == Registry().names(kind)
    assert all(len(line.split()) > 3 for line in entries)


@pytest.mark.parametrize("kind", KINDS)
def test_show_gives_each_card_as_it_lies_on_disk(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    for name in Registry().names(kind):
        card = Registry().card(kind, name)
        shown = answered(capsys, "show", f"{kind}/{name}")
        assert shown.startswith(card.path)
        assert Path(card.path).read_text(encoding="utf-8").rstrip() in shown


@pytest.mark.parametrize("arguments", [("list",), ("doctor",)], ids=" ".join)
def test_a_table_fits_80_columns_in_a_pipe(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = answered(capsys, *arguments).splitlines()
    table = [line for line in lines if line.startswith("  ") or "hf.co/" in line or "zenodo.org/" in line]
    assert len(table) > 30
    assert max(map(len, table)) <= 80


def test_show_takes_a_plain_name_and_counts_an_experiments_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert answered(capsys, "show", "uni") == answered(capsys, "show", "backbones/uni")
    tree = tomllib.loads((shipped("experiments") / "quickstart.toml").read_text(encoding="utf-8"))
    backbones, heads, seeds = (len(tree["grid"][key]) for key in ("backbone", "head", "seed"))
    assert seeds == 1  # so that trained and untrained baselines count alike
    num_runs, num_cohorts = backbones * heads + len(tree["baselines"]), backbones + len(tree["baselines"])
    assert f"{num_runs} runs in {num_cohorts} cohorts." in answered(capsys, "show", "experiments/quickstart")


def test_a_users_registry_is_listed_and_shown(capsys: pytest.CaptureFixture[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    own = tmp_path_factory.mktemp("own")
    (own / "heads").mkdir()
    (own / "heads" / "mine.toml").write_text('# My head, which is best\nbuilder = "mine.py:Mine"\n')
    assert re.search(r"^ +mine +My head, which is best$", answered(capsys, "list", "heads", "--registry", str(own)), re.MULTILINE)
    assert "My head, which is best" in answered(capsys, "show", "mine", "--registry", str(own))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["list", "heds"], ["'heds'", "'heads'"]),
        (["show", "heads/fpm"], ["'fpm'", "Did you mean 'fpn'?"]),
        (["show", "head/fpn"], ["'head'", "Did you mean 'heads'?"]),
        (["show", "dinoblom-s"], ["'dinoblom-s'", "Did you mean 'dinobloom-s'?"]),
        (["show", "experiments/quikstart"], ["'quikstart'", "Did you mean 'quickstart'?"]),
        (["grid", "quikstart"], ["'quikstart'", "Did you mean 'quickstart'?"]),
        (["grid", "experiments/missing.toml"], ["'experiments/missing.toml'"]),
        (["list", "--registry", "missing"], ["--registry missing", "no such folder"]),
        (["gird"], ["'gird'", "'grid'"]),
        (["grid", "--lmit", "3"], ["--lmit"]),
        (["grid", "--limit", "many"], ["--limit", "'many'"]),
        (["grid", "--epochs", "3"], ["grid has no option --epochs", "--set run.epochs=VALUE"]),
        (["grid", "--wrokers", "2"], ["Did you mean --workers?"]),
        (["check", "My", "smears"], ["no further argument 'smears'", "quotes"]),
        (["--data", "x", "grid"], ["the command comes first"]),
        (["show", "vit"], ["Did you mean 'vit-small-in1k' or", "`cellbench list` lists all"]),
    ],
    ids=" ".join,
)
def test_a_misspelt_name_is_reported_with_the_nearest_known_name(
    arguments: list[str], says: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, *arguments)
    assert [part for part in says if part not in line] == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("run.epohcs=3", ["'run.epohcs'", "Did you mean run.epochs?"]),
        ("rnu.epochs=3", ["'rnu.epochs'", "Did you mean run.epochs?"]),
        ("run.epochs=0", ["epochs = 0", "greater than or equal to 1"]),
        ("run.epochs=three", ["epochs = 'three'"]),
        ("run.epochs=", ["epochs = ''"]),
        ("epochs=3", ["'epochs'", "Did you mean run.epochs?"]),
        ("run.folds=5", ["Did you mean data.folds?"]),
        ("seed=3", ["Did you mean grid.seed?"]),
        ("run.lr=5", ["lr = 5", "less than or equal to 1"]),
        ("run.loss=0.5 cee", ["'cee'", "Did you mean 'ce'?"]),
        ("run.tile_px=100000", ["tile_px = 100000", "4096"]),
        ("data.limit=0", ["data.limit = 0", "greater than or equal to 1"]),
        ('grid.head=["bilinaer"]', ["no head called 'bilinaer'", "Did you mean 'bilinear'?"]),
        ('grid.backbone=["filter-bnak"]', ["no backbone called 'filter-bnak'", "Did you mean 'filter-bank'?"]),
        ("grid.head=fpn", ["grid.head = 'fpn'"]),
        ("grid.seed=[]", ["[grid] seed is an empty list"]),
        ('baselines=["otsi"]', ["no baseline called 'otsi'", "Did you mean 'otsu'?"]),
        ("dataset=smear", ["no dataset called 'smear'", "Did you mean 'smears'?"]),
        ("head.fpn.widht=3", ["[head.fpn]", "'widht'", "Did you mean 'width'?"]),
        ("head.fpn.width=wide", ["[head.fpn] width = 'wide'", "whole number"]),
        ("head.fnp.width=3", ["no head called 'fnp'", "Did you mean 'fpn'?"]),
        ("baseline.unte.width=3", ["no baseline called 'unte'", "Did you mean 'unet'?"]),
        ("run.epochs", ["--set run.epochs", "KEY=VALUE"]),
        ("=3", ["--set =3", "KEY=VALUE"]),
        ("run..epochs=3", ["--set run..epochs=3", "KEY=VALUE"]),
        ("run.epochs.more=3", ["'epochs' is not a table"]),
    ],
)
def test_a_wrong_setting_is_one_line_that_names_it_before_any_image_is_drawn(
    change: str, says: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, "grid", "quickstart", "--set", change)
    assert [part for part in says if part not in line] == []


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("grid = [", "cannot be read as an experiment"),
        ('dataset = "smears"', "'experiment' is missing"),
        ('experiment = "e"', "'dataset' is missing"),
    ],
)
def test_a_wrong_file_is_named(text: str, says: str, capsys: pytest.CaptureFixture[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("own") / "mine.toml"
    path.write_text(text)
    line = refused(capsys, "grid", str(path))
    assert str(path) in line
    assert says in line


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--data", "missing"], "--data missing: there is no such folder"),
        (["--weights", "missing"], "--weights missing: there is no such folder"),
        (["--limit", "0"], "data.limit = 0"),
        (["bccd"], "Give --data DIR"),
    ],
)
def test_a_missing_path_is_named(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert says in refused(capsys, "grid", *arguments)


def test_the_module_and_its_exit_code_work_from_the_shell() -> None:
    done = subprocess.run([sys.executable, "-m", "cellbench.run", "show", "nothing-like-it"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("cellbench: no card called 'nothing-like-it'.")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "record"),
    [
        (["grid"], GridOptions()),
        (
            ["grid", "my.toml", "--set", "run.epochs=3", "--set", "run.lr=1", "--dry-run", "--gpu-share", "0.5"],
            GridOptions(file="my.toml", changes=("run.epochs=3", "run.lr=1"), dry_run=True, gpu_share=0.5),
        ),
        (
            ["predict", "best", "a.png", "b", "--out", "o", "--um-per-px", "0.25"],
            PredictOptions(run="best", images=(Path("a.png"), Path("b")), out=Path("o"), um_per_px=0.25),
        ),
        (["explore", "--framing", "pad", "--tile-px", "64"], ExploreOptions(framing=("pad",), tile_px=64)),
    ],
    ids=["grid", "grid-options", "predict", "explore"],
)
def test_a_command_gets_its_options_as_one_record(monkeypatch: pytest.MonkeyPatch, arguments: list[str], record: object) -> None:
    got = []
    monkeypatch.setattr(command_line.importlib, "import_module", lambda name: sys.modules[__name__])
    monkeypatch.setattr(sys.modules[__name__], arguments[0], lambda options: got.append(options) or 0, raising=False)
    assert main(arguments) == 0
    assert got == [record]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["export", "best", "--out", "o", "--backbone", "all"], "invalid choice: 'all'"),
        (["predict", "best", "a.png"], "required: --out"),
        (["predict", "--out", "o"], "required: RUN, IMAGE"),
        (["grid", "--workers", "1.5"], "invalid int value: '1.5'"),
    ],
    ids=" ".join,
)
def test_a_wrong_option_is_one_line(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert says in refused(capsys, *arguments)


@pytest.mark.parametrize("command", command_line.COMMANDS)
def test_the_help_of_a_command_explains_each_of_its_options(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for one in dataclasses.fields(command_line.COMMANDS[command].options):
        text = " ".join(one.metadata["help"].split())
        assert text.replace("-", "") in shown.replace("- ", "").replace("-", "")


def test_without_a_command_the_first_steps_are_shown_and_each_exists(capsys: pytest.CaptureFixture[str]) -> None:
    lines = answered(capsys).splitlines()
    calls = [line.split()[1] for line in lines if line.startswith("  cellbench ")]
    assert len(calls) == 5
    assert set(calls) <= set(command_line.COMMANDS)
    assert max(map(len, lines)) <= 80


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert not stop.value.code
    assert capsys.readouterr().out == f"cellbench {cellbench.__version__}\n"


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "cellbench"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert "cellbench grid" in done.stdout


@pytest.mark.parametrize("command", command_line.COMMANDS)
def test_the_example_of_a_command_is_understood(command: str) -> None:
    read, _ = command_line.read_arguments(command_line.COMMANDS[command].example.split())
    assert read is command_line.COMMANDS[command]
