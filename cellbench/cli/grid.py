"""``grid``: runs an experiment, or with ``--dry-run`` estimates what it would take."""

from __future__ import annotations

from cellbench import startup
from cellbench.config.options import GridOptions
from cellbench.console import WIDE, Column, format_table, number_columns, say, say_lines
from cellbench.execution.experiment_run import ExperimentPlan, plan_experiment, run_experiment
from cellbench.execution.grid import describe_skipped, group_cohorts
from cellbench.features.cache_admin import parse_cache
from cellbench.system_load import SystemLoad, describe_load
from cellbench.tracking import relocate
from cellbench.tracking.tracker import Tracker


def grid(options: GridOptions) -> int:
    """Runs an experiment. Returns exit code 0, or 1 if a run failed, is missing, or could not be tested on further images."""
    startup.set_cache(parse_cache(options.cache)[0], options.cache_url)
    startup.limit_heaps()
    plan = plan_experiment(options, say)
    if options.dry_run:
        _estimate(plan)
        return 0
    say_lines(relocate.fix_artifact_paths())
    tracker = Tracker(plan.experiment.experiment)
    startup.freeze_imports()  # MLflow's
    outcome = run_experiment(plan, tracker, say)
    return 1 if outcome.failed or outcome.missing or outcome.untested else 0


def _estimate(plan: ExperimentPlan) -> None:
    """Prints a row for each cohort: its runs, and the estimated time and memory, from timing a few tiles."""
    from cellbench.features.extractor import CachePolicy
    from cellbench.training.cost_estimate import estimate_cost, format_duration
    from cellbench.training.memory_check import InsufficientMemoryError

    startup.configure_threads(plan.options.device)
    rows, wall_s, memory_mib, disk_mib, load = [], 0.0, 0.0, 0.0, SystemLoad()
    resources, skipped = plan.resources, [one for one in plan.runs if one.unavailable]
    policy = CachePolicy(
        memory_bytes=resources.machine.memory_bytes * 2 // 3,
        disk_bytes=resources.disk_bytes,
        prefer_disk=resources.prefer_disk,
        key="estimate",
    )
    for cohort in group_cohorts([one for one in plan.runs if not one.unavailable]):
        run = cohort[0].run
        name = f"{run.backbone or run.baseline}" + (f", fold {run.fold}" if len(plan.datasets) > 1 else "")
        heads = ", ".join(dict.fromkeys(one.run.head or "" for one in cohort))
        if not cohort[0].trained:
            rows.append([name, str(len(cohort)), *[""] * 5, heads, "", "nothing to train"])
            continue
        try:
            cost = estimate_cost(
                [one.run for one in cohort], resources.registry, plan.datasets[run.fold], resources.machine, resources.weights, policy
            )
        except InsufficientMemoryError as error:
            say(f"{name}: would be skipped: {error}")
            continue
        tiles = [f"{num:,}" for num in (cost.train_tiles, cost.val_tiles, cost.test_tiles)]
        speed = f"{cost.backbone_tiles_per_s:.0f}" if run.backbone else ""
        took = [format_duration(cost.wall_s), f"{cost.memory_mib / 1024:.1f} GiB"]
        rows.append([name, str(len(cohort)), *took, *tiles, heads, speed, cost.source])
        wall_s, memory_mib, disk_mib = wall_s + cost.wall_s, max(memory_mib, cost.memory_mib), disk_mib + cost.disk_mib
    columns = [
        Column("backbone or baseline", cut=True),
        *number_columns("runs", "time"),
        Column("memory", right=True, optional=1),
        *number_columns("tiles", "val", "test", optional=2),
        Column("heads", optional=3),
        Column("tiles/s", right=True, optional=4),
        Column("features", optional=5),
    ]
    if rows:
        say("\n".join(["", *format_table(columns, rows, room=WIDE if plan.options.wide else None), ""]))
    say_lines(describe_skipped(skipped))
    load_text = describe_load(load.others_pct())
    say(
        f"in all about {format_duration(wall_s)}, up to {memory_mib / 1024:.1f} GiB of memory and {disk_mib:.0f} MiB of disk for results "
        f"(from a few tiles timed now{', ' if load_text else ''}{load_text})"
    )
