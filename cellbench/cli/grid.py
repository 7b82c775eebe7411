"""``grid``: runs an experiment, or with ``--dry-run`` estimates what it would take."""

from __future__ import annotations

from cellbench import startup
from cellbench.config.options import GridOptions
from cellbench.console import say
from cellbench.execution.experiment_run import ExperimentPlan, plan_experiment, run_experiment
from cellbench.execution.grid import group_cohorts
from cellbench.features.cache_admin import parse_cache
from cellbench.features.extractor import CachePolicy
from cellbench.system_load import SystemLoad, describe_load
from cellbench.tracking import relocate
from cellbench.tracking.tracker import Tracker
from cellbench.training.cost_estimate import estimate_cost, format_duration
from cellbench.training.memory_check import InsufficientMemoryError


def grid(options: GridOptions) -> int:
    """Runs an experiment. Returns exit code 0, or 1 if a run failed."""
    startup.set_cache(parse_cache(options.cache)[0], options.cache_url)
    startup.configure_threads(options.device)
    plan = plan_experiment(options, say)
    if options.dry_run:
        _estimate(plan)
        return 0
    for line in relocate.fix_artifact_paths():
        say(line)
    tracker = Tracker(plan.experiment.experiment)
    startup.freeze_imports()  # MLflow's
    return 1 if run_experiment(plan, tracker, say).failed else 0


def _estimate(plan: ExperimentPlan) -> None:
    """Prints the runs, and the estimated tiles, time and memory of each cohort, from timing a few tiles."""
    for resolved in plan.runs:
        say(f"  {resolved.name}" + (f"  skipped: {resolved.unavailable}" if resolved.unavailable else ""))
    wall_s, memory_mib, disk_mib, load = 0.0, 0.0, 0.0, SystemLoad()
    for number, cohort in enumerate(group_cohorts(plan.runs), 1):
        run = cohort[0].run
        title = f"cohort {number}: {run.backbone or run.baseline}, {len(cohort)} run{'s' if len(cohort) > 1 else ''}"
        if cohort[0].unavailable:
            say(f"{title}: skipped")
            continue
        if not cohort[0].trained:
            say(f"{title}: nothing to train")
            continue
        resources = plan.resources
        policy = CachePolicy(
            memory_bytes=resources.machine.memory_bytes * 2 // 3,
            disk_bytes=resources.disk_bytes,
            prefer_disk=resources.prefer_disk,
            key="estimate",
        )
        try:
            cost = estimate_cost(
                [one.run for one in cohort], resources.registry, plan.datasets[run.fold], resources.machine, resources.weights, policy
            )
        except InsufficientMemoryError as error:
            say(f"{title}: would be skipped: {error}")
            continue
        speed = f", backbone {cost.backbone_tiles_per_s:.0f} tiles/s" if run.backbone else ""
        say(
            f"{title}: {cost.train_tiles} training tiles an epoch, {cost.val_tiles} validation and {cost.test_tiles} test tiles{speed}; "
            f"about {format_duration(cost.wall_s)}, {cost.memory_mib / 1024:.1f} GiB of memory; {cost.source}"
        )
        wall_s, memory_mib, disk_mib = wall_s + cost.wall_s, max(memory_mib, cost.memory_mib), disk_mib + cost.disk_mib
    load_text = describe_load(load.others_pct())
    say(
        f"in all about {format_duration(wall_s)}, up to {memory_mib / 1024:.1f} GiB of memory and {disk_mib:.0f} MiB of disk for results "
        f"(from a few tiles timed now{', ' if load_text else ''}{load_text})"
    )
