"""The command line: ``python -m cellbench.run VERB``, also installed as ``cellbench``.

Each verb imports what it needs when it is called, so that ``--help`` and ``list`` answer at once. Exit code 0, or 2 with one line that says
what was asked, what is wrong and what to do.
"""

from __future__ import annotations

import argparse
import atexit
import gc
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

from cellbench import startup
from cellbench.errors import CellbenchError
from cellbench.escaping import to_printable


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    arguments = _parser().parse_args(argv)
    atexit.register(
        gc.freeze
    )  # what is there at the end need not be searched for garbage: a second and a half, with torch and MLflow loaded
    signal.signal(signal.SIGTERM, _terminated)
    try:
        return arguments.verb(arguments)
    except CellbenchError as error:
        print(to_printable(f"cellbench: {error}"), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("cellbench: stopped. What is finished is kept; the same command goes on from here.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        sys.stderr.close()
        return 0


def _terminated(number: int, frame: object) -> NoReturn:
    # As an exception, so that open runs are marked and files closed; MLflow would leave them RUNNING for ever.
    raise SystemExit(128 + number)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"cellbench: {message}. `{self.prog} --help` says what there is.\n")  # one line, without argparse's usage


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="cellbench",
        description="Which frozen foundation model, with which segmentation head, outlines your cells best?",
        epilog="Results: `mlflow ui` in this folder. Files that ask questions: experiments/*.toml.",
    )
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    grid = verbs.add_parser("grid", help="train, test and compare every run of an experiment", description=_GRID)
    grid.add_argument(
        "file", nargs="?", default="quickstart", help="an experiment file, or the name of a shipped one (default: quickstart)"
    )
    _about_training(grid, size="; with a size like 50G, features are kept there")
    grid.add_argument(
        "--dry-run", action="store_true", help="print the runs, the cohorts and an estimate of time, memory and disk; train nothing"
    )
    grid.add_argument(
        "--workers", type=int, metavar="N", help="N processes side by side, each on its share of the cores (default: this one alone)"
    )
    grid.add_argument("--on", metavar="ray[://ADDRESS]", help="run on Ray: one that is started here, or the cluster at ray://HOST:PORT")
    grid.add_argument(
        "--gpu-share", type=float, default=1.0, metavar="X", help="with --on: the part of a GPU that a cohort asks for (default: 1)"
    )
    grid.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting for this call, like run.epochs=3; repeatable"
    )
    grid.set_defaults(verb=_grid)

    search = verbs.add_parser(
        "search", help="seek the best setting within a space, many trials to each pass of a backbone", description=_SEARCH
    )
    search.add_argument("file", nargs="?", default="search", help="a search's file, or the name of a shipped one (default: search)")
    search.add_argument(
        "--trials", type=int, metavar="N", help="how many in all, those of earlier calls included (default: as the file says)"
    )
    search.add_argument("--timeout", type=float, metavar="S", help="ask for no more trials after so many seconds")
    search.add_argument("--workers", type=int, default=1, metavar="N", help="processes here that share trials and cores (default: 1)")
    search.add_argument(
        "--storage", metavar="URL", help="where the study is kept (default: OPTUNA_STORAGE, else sqlite:///mlruns/optuna.db)"
    )
    search.add_argument("--on", metavar="ray[://ADDRESS]", help="run on Ray: one that is started here, or the cluster at ray://HOST:PORT")
    search.add_argument(
        "--gpu-share", type=float, default=1.0, metavar="X", help="with --on: the part of a GPU that a process asks for (default: 1)"
    )
    search.add_argument("--helper", type=int, default=0, help=argparse.SUPPRESS)
    _about_training(search, size=" and how much of features may be kept there")
    search.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting for this call, like search.sampler=gp; repeatable"
    )
    search.set_defaults(verb=_search)

    predict = verbs.add_parser(
        "predict", help="masks of your images by a run: `best`, a run's name or id, or an exported folder", description=_PREDICT
    )
    predict.add_argument("run", metavar="RUN", help="best, best:EXPERIMENT, a run's name or MLflow id, or an exported folder")
    predict.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="image files and folders of them")
    predict.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the masks go, as NAME.png")
    predict.add_argument("--probability", action="store_true", help="also NAME.probability.png, 0..255")
    predict.add_argument("--overlay", action="store_true", help="also NAME.overlay.png: the image with outlines")
    predict.add_argument("--geojson", action="store_true", help="also NAME.geojson: outlines of single cells for QuPath")
    predict.add_argument("--coco", action="store_true", help="also coco.json: the outlines of single cells of all images in DIR")
    predict.add_argument(
        "--instances", action="store_true", help="also NAME.instances.png and NAME.cells.csv: single cells; counts.csv for all in DIR"
    )
    predict.add_argument("--min-cell-px", type=int, metavar="N", help="least area of a cell in px (default: the training data's)")
    predict.add_argument(
        "--um-per-px", type=float, metavar="X", help="with --instances: the side of a pixel in all images (default: what each file states)"
    )
    predict.add_argument(
        "--range", metavar="BLACK,WHITE", help="of images of more than 8 bits, like 0,4095 (default: that of the images learned from)"
    )
    _about_a_run(predict)
    predict.set_defaults(verb=_predict)

    evaluate = verbs.add_parser("evaluate", help="test a run again, on any labelled folder", description=_EVALUATE)
    evaluate.add_argument("run", metavar="RUN", help="best, best:EXPERIMENT, a run's name or MLflow id")
    evaluate.add_argument("--data", type=Path, metavar="DIR", help="a folder of images and masks with the run's classes")
    evaluate.add_argument("--visualize", type=int, default=0, metavar="N", help="also error maps of the N worst images")
    _about_a_run(evaluate)
    evaluate.set_defaults(verb=_evaluate)

    export = verbs.add_parser(
        "export", help="a run as a folder that works elsewhere; as ONNX; as a model that MLflow serves", description=_EXPORT
    )
    export.add_argument("run", metavar="RUN", help="best, best:EXPERIMENT, a run's name or MLflow id, or an exported folder")
    export.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    export.add_argument("--onnx", action="store_true", help="also model.onnx: backbone and head, checked against torch")
    export.add_argument("--mlflow", action="store_true", help="also mlflow/, for `mlflow models serve -m DIR/mlflow --env-manager local`")
    export.add_argument(
        "--backbone", choices=("auto", "embed", "reference"), default="auto", help="copy its weights: where the licence allows (auto)"
    )
    _about_a_run(export)
    export.set_defaults(verb=_export)

    report = verbs.add_parser(
        "report", help="what an experiment found: one HTML file, and tables as Markdown, CSV and LaTeX", description=_REPORT
    )
    report.add_argument(
        "experiments", nargs="*", metavar="EXPERIMENT", help="its name in MLflow (default: the one with the newest finished run)"
    )
    report.add_argument("--out", type=Path, metavar="DIR", help="where to write (default: reports/EXPERIMENT)")
    report.set_defaults(verb=_report)

    explore = verbs.add_parser("explore", help="pictures and statistics of a dataset, or of what backbones see in it", description=_EXPLORE)
    explore.add_argument("data", nargs="?", type=Path, metavar="DIR", help="the folder of images and masks (default: drawn smears)")
    explore.add_argument("--dataset", default="", metavar="CARD", help="how to read it (default: folder)")
    explore.add_argument(
        "--features", action="store_true", help="the last maps of backbones, in several framings of one image, side by side"
    )
    explore.add_argument(
        "--backbone", action="append", default=[], metavar="NAME", help="with --features; repeatable (default: those that are here)"
    )
    explore.add_argument(
        "--framing",
        action="append",
        default=[],
        metavar="KIND[:SCALE]",
        help="tile, pad, resize, tile:0.5; repeatable (default: all three)",
    )
    explore.add_argument("--image", default="", metavar="NAME", help="the image to look at (default: the first)")
    explore.add_argument("--point", default="", metavar="X,Y", help="a pixel of the image: how alike is every other place to it")
    explore.add_argument("--tile-px", type=int, default=224, metavar="N", help="the tile's side (default: 224)")
    explore.add_argument("--samples", type=int, default=4, metavar="N", help="images in the picture of samples, up to 6 (default: 4)")
    explore.add_argument("--seed", type=int, default=0, metavar="N", help="decides which images are looked at (default: 0)")
    explore.add_argument("--out", type=Path, metavar="DIR", help="where to write (default: explored/NAME)")
    explore.add_argument("--log", action="store_true", help="keep pictures and figures as a run in MLflow too")
    explore.add_argument("--weights", type=Path, metavar="DIR", help="where backbone weights lie, as <backbone>.safetensors, .pth or .bin")
    explore.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
    explore.add_argument("--registry", type=Path, metavar="DIR", help="a folder of your own cards, laid over the shipped ones")
    explore.set_defaults(verb=_explore)

    ui = verbs.add_parser("ui", help="MLflow's UI for the runs of this folder, light and on this machine alone", description=_UI)
    ui.add_argument("--port", type=int, default=5000, help="the first port to try (default: 5000)")
    ui.set_defaults(verb=_ui)

    bench = verbs.add_parser("bench", help="this machine's speeds, as ratios in one run", description=_BENCH)
    bench.add_argument("--backbone", default="", metavar="NAME", help="default: vit-tiny-in1k where its weights are, else vit-tiny-random")
    bench.add_argument("--data", type=Path, metavar="DIR", help="a folder of images and masks (default: drawn smears)")
    bench.add_argument("--weights", type=Path, metavar="DIR", help="where backbone weights lie")
    bench.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
    bench.add_argument("--precision", default="auto", help="auto, fp32 or bf16 (default: bf16 where the processor has it)")
    bench.add_argument("--out", type=Path, metavar="DIR", help="write bench.json and bench.png there")
    bench.add_argument("--quick", action="store_true", help="fewer images, epochs and repeats: under two minutes, rougher")
    bench.add_argument("--scale", action="store_true", help="instead: 1 to 27 runs, and the images up to a hundred times over, with memory")
    bench.set_defaults(verb=_bench)

    check = verbs.add_parser(
        "check", help="is this data fit to train on? reads every image once, finds faults and leaks", description=_CHECK
    )
    check.add_argument("data", type=Path, metavar="DIR", help="the folder of images and masks, or a manifest or COCO file")
    check.add_argument(
        "--dataset", default="folder", metavar="CARD", help="the card that says what masks mean, like bccd (default: folder)"
    )
    check.add_argument("--out", type=Path, metavar="DIR", help="where check.json and check.html go (default: reports/check-NAME)")
    check.add_argument("--registry", type=Path, metavar="DIR", help="a folder of your own cards, laid over the shipped ones")
    check.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="how it is split, like data.group=prefix; repeatable"
    )
    check.set_defaults(verb=_check)

    cache = verbs.add_parser("cache", help="what features are kept on disk, and pruning them")
    cache.add_argument("--cache", metavar="DIR", help="the cache folder (default: ~/.cache/cellbench)")
    cache.add_argument("--prune", action="store_true", help="remove kept features; they are computed again when needed")
    cache.add_argument("--older-than", type=float, default=0.0, metavar="DAYS", help="with --prune: only those not used for so long")
    cache.set_defaults(verb=_cache)

    lister = verbs.add_parser("list", help="what exists: backbones, heads, baselines, datasets, experiments")
    lister.add_argument("kind", nargs="?", help="one of them; all if left out")
    lister.add_argument("--registry", type=Path, metavar="DIR")
    lister.set_defaults(verb=_list)

    show = verbs.add_parser("show", help="one card or experiment, like backbones/uni")
    show.add_argument("name", help="KIND/NAME, or NAME where only one kind has it")
    show.add_argument("--registry", type=Path, metavar="DIR")
    show.set_defaults(verb=_show)

    doctor = verbs.add_parser("doctor", help="which backbones can be had here and now; with names, a self-test", description=_DOCTOR)
    doctor.add_argument("names", nargs="*", metavar="NAME", help="backbones to load, check and time; all of them in a table if left out")
    doctor.add_argument("--weights", type=Path, metavar="DIR", help="where backbone weights lie, as <backbone>.safetensors, .pth or .bin")
    doctor.add_argument("--registry", type=Path, metavar="DIR", help="a folder of your own cards, laid over the shipped ones")
    doctor.add_argument("--device", default="auto", help="for the self-test: auto, cpu, cuda, cuda:N or mps (default: auto)")
    doctor.add_argument("--cache", type=Path, metavar="DIR", help="for downloads and hashes (default: ~/.cache/cellbench)")
    doctor.add_argument("--deep", action="store_true", help="for the table: also read large files to compare their hashes, once")
    doctor.add_argument("--contracts", action="store_true", help="test what every part must keep: those named, of --registry, or all")
    doctor.add_argument(
        "--services", action="store_true", help="ask what is configured: MLflow's server, the databases, the cache folder, Ray"
    )
    doctor.set_defaults(verb=_doctor)
    return parser


def _about_training(verb: argparse.ArgumentParser, size: str) -> None:
    """What `grid` and `search` train on, and where. ``size``: what the one of ``--cache`` means there."""
    verb.add_argument("--data", type=Path, metavar="DIR", help="the folder of images and masks")
    verb.add_argument("--weights", type=Path, metavar="DIR", help="where backbone weights lie, as <backbone>.safetensors, .pth or .bin")
    verb.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
    verb.add_argument("--precision", default="auto", help="auto, fp32 or bf16 (default: bf16 where the processor has it)")
    verb.add_argument(
        "--memory", default="auto", metavar="SIZE", help="for decoded images and features, like 4G (default: half of what is free)"
    )
    verb.add_argument("--cache", metavar="DIR[:SIZE]", help=f"the cache folder (default: ~/.cache/cellbench){size}")
    verb.add_argument(
        "--cache-url", metavar="URL", help="features that machines share, like s3://bucket/folder (default: CELLBENCH_CACHE_URL)"
    )
    verb.add_argument("--registry", type=Path, metavar="DIR", help="a folder of your own cards, laid over the shipped ones")
    verb.add_argument("--limit", type=int, metavar="N", help="at most N images of each of train, validation and test, for a quick try")


def _about_a_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--weights", type=Path, metavar="DIR", help="where backbone weights lie, as <backbone>.safetensors, .pth or .bin")
    parser.add_argument("--registry", type=Path, metavar="DIR", help="a folder of your own cards, laid over the shipped ones")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
    parser.add_argument("--precision", default="auto", help="auto, fp32 or bf16 (default: bf16 where the processor has it)")


_PREDICT = "The same command again goes on where it stopped. What cannot be read is skipped and named, and the exit code is then 1."


def _predict(arguments: argparse.Namespace) -> int:
    with startup.no_gc_during_import():
        from cellbench.cli.predict import predict

    return predict(
        arguments.run,
        arguments.images,
        out=arguments.out,
        probability=arguments.probability,
        overlay=arguments.overlay,
        geojson=arguments.geojson,
        as_coco=arguments.coco,
        instances=arguments.instances,
        um_per_px=arguments.um_per_px,
        range_text=arguments.range,
        min_cell_px=arguments.min_cell_px,
        weights=arguments.weights,
        extra=arguments.registry,
        device=arguments.device,
        precision=arguments.precision,
    )


_EVALUATE = "Logged in MLflow as a run of its own below the run that it tests; the tables of a report stay as they are."


def _evaluate(arguments: argparse.Namespace) -> int:
    with startup.no_gc_during_import():
        from cellbench.cli.evaluate import evaluate

    return evaluate(
        arguments.run,
        data=arguments.data,
        visualize=arguments.visualize,
        weights=arguments.weights,
        extra=arguments.registry,
        device=arguments.device,
        precision=arguments.precision,
    )


_EXPORT = "The folder holds safetensors, cards and settings. `predict DIR IMAGE` and Segmenter.load(DIR) use it without MLflow."


def _export(arguments: argparse.Namespace) -> int:
    with startup.no_gc_during_import():
        from cellbench.cli.export import export

    return export(
        arguments.run,
        out=arguments.out,
        onnx=arguments.onnx,
        serve=arguments.mlflow,
        backbone=arguments.backbone,
        weights=arguments.weights,
        extra=arguments.registry,
        device=arguments.device,
        precision=arguments.precision,
    )


_GRID = "Runs the product of an experiment's lists. What is finished is not run again; what was interrupted goes on."

_DOCTOR = "Nothing is downloaded. Exit code 0, or 1 where a file, a card, an output or a contract is wrong."


def _doctor(arguments: argparse.Namespace) -> int:
    if arguments.services:
        from cellbench.cli.services import services

        return services()
    from cellbench.cli.doctor import doctor

    return doctor(
        arguments.names,
        weights=arguments.weights,
        extra=arguments.registry,
        device=arguments.device,
        cache=arguments.cache,
        deep=arguments.deep,
        contracts=arguments.contracts,
    )


def _trained_on(arguments: argparse.Namespace) -> dict[str, Any]:
    """What :func:`_about_training` asks for, by the names that the verbs take it under."""
    names = ("data", "weights", "device", "precision", "memory", "cache", "cache_url", "limit")
    return {name: getattr(arguments, name) for name in names} | {"extra": arguments.registry}


def _grid(arguments: argparse.Namespace) -> int:
    with startup.no_gc_during_import():
        from cellbench.cli.grid import grid

    return grid(
        arguments.file,
        changes=arguments.set,
        **_trained_on(arguments),
        dry_run=arguments.dry_run,
        workers=arguments.workers,
        on=arguments.on,
        gpu_share=arguments.gpu_share,
    )


_SEARCH = (
    "Asks, trains, prunes and tells trials in batches; the best one alone is tested at the end. The same command goes on where it stopped."
)


def _search(arguments: argparse.Namespace) -> int:
    with startup.no_gc_during_import():
        from cellbench.search.driver import search

    return search(
        arguments.file,
        trials=arguments.trials,
        timeout_s=arguments.timeout,
        workers=arguments.workers,
        storage=arguments.storage,
        helper=arguments.helper,
        text=sys.stdin.buffer.read().decode() if arguments.helper else None,
        on=arguments.on,
        gpu_share=arguments.gpu_share,
        changes=arguments.set,
        **_trained_on(arguments),
    )


_BENCH = "Measures in one process, checks equalities on the way, and prints ratios, which hold where seconds do not. Exit code 1 where a check fails."


def _bench(arguments: argparse.Namespace) -> int:
    with startup.no_gc_during_import():
        from cellbench.cli.bench import bench

    return bench(
        backbone=arguments.backbone,
        data=arguments.data,
        weights=arguments.weights,
        device=arguments.device,
        precision=arguments.precision,
        out=arguments.out,
        quick=arguments.quick,
        scale=arguments.scale,
    )


_CHECK = (
    "Exit code 0 where the data is fit, 1 where a finding would falsify a result, 2 where it could not look. Nothing is written into DIR."
)


def _check(arguments: argparse.Namespace) -> int:
    with startup.no_gc_during_import():
        from cellbench.cli.check import check
        from cellbench.config.loading import data_spec

    spec = data_spec(arguments.set)
    return check(arguments.data, card=arguments.dataset, spec=spec, extra=arguments.registry, out=arguments.out)


def _cache(arguments: argparse.Namespace) -> int:
    from cellbench.cli.catalog import list_cache

    print(list_cache(arguments.cache, arguments.prune, arguments.older_than))
    return 0


_EXPLORE = "Reads images and masks; writes nothing to their folder. `check` says whether they are fit to train on."


def _explore(arguments: argparse.Namespace) -> int:
    with startup.no_gc_during_import():
        from cellbench.cli.explore import explore

    return explore(
        arguments.data,
        dataset=arguments.dataset,
        features=arguments.features,
        backbones=arguments.backbone,
        framings=arguments.framing,
        image=arguments.image,
        point=arguments.point,
        tile_px=arguments.tile_px,
        num_samples=arguments.samples,
        seed=arguments.seed,
        out=arguments.out,
        log=arguments.log,
        weights=arguments.weights,
        device=arguments.device,
        extra=arguments.registry,
    )


_REPORT = "Reads finished runs from MLflow; trains nothing. Several experiments are taken together; different test images are never paired."

_UI = "Ends with Ctrl-C. Where the folder was moved, the places of the artifacts are set right first."


def _report(arguments: argparse.Namespace) -> int:
    with startup.no_gc_during_import():
        from cellbench.cli.report import report

    return report(arguments.experiments, arguments.out)


def _ui(arguments: argparse.Namespace) -> int:
    from cellbench.cli.ui import ui

    return ui(arguments.port)


def _list(arguments: argparse.Namespace) -> int:
    from cellbench.cli.catalog import list_components

    print(list_components(arguments.kind, arguments.registry))
    return 0


def _show(arguments: argparse.Namespace) -> int:
    from cellbench.cli.catalog import show_component

    print(show_component(arguments.name, arguments.registry))
    return 0
