"""The resources of a grid or search, from its options: cards, weights, device, memory and disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cellbench.config.options import TrainingOptions
from cellbench.config.registry import Registry
from cellbench.errors import CellbenchError
from cellbench.features.cache_admin import disk_budget, parse_cache
from cellbench.files import require_cache
from cellbench.hardware import Hardware, detect_hardware
from cellbench.models.backbones.weights import weights_folder
from cellbench.startup import num_threads
from cellbench.temporary import remove_abandoned
from cellbench.training import checkpoints


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What the runs of a command are computed with."""

    registry: Registry
    weights: Path | None = None
    """Folder of backbone weights."""
    machine: Hardware
    """This machine, or the one that is requested on a cluster."""
    disk_bytes: int = 0
    """Limit for cached features."""
    prefer_disk: bool = False
    """Whether to cache features on disk even if they fit in memory."""

    @classmethod
    def of(cls, options: TrainingOptions, *, elsewhere: bool) -> Resources:
        """``elsewhere``: a cluster does the work. May measure the precision of this machine. Raises CellbenchError as :func:`check_options`."""
        disk_bytes, prefer_disk = disk_budget(parse_cache(options.cache)[1])
        return cls(
            registry=Registry(options.registry),
            weights=weights_folder(options.weights),
            machine=_machine(options, options.precision, elsewhere=elsewhere),
            disk_bytes=disk_bytes,
            prefer_disk=prefer_disk,
        )


def prepare_cache() -> None:
    """Removes checkpoints that nobody resumes any more, and what killed processes left. Raises SystemFault if the cache folder cannot be written."""
    require_cache()
    checkpoints.remove_old()
    remove_abandoned()


def _machine(options: TrainingOptions, precision: str, *, elsewhere: bool) -> Hardware:
    threads = num_threads(options.device)  # those that torch is set to where it computes
    return detect_hardware(options.device, precision, options.memory, elsewhere=elsewhere, threads=threads)


def check_options(options: TrainingOptions, *, elsewhere: bool) -> None:
    """Raises CellbenchError for options that this machine cannot satisfy. Measures and writes nothing, so it comes before the data is read."""
    if options.workers is not None and options.on is not None:
        raise CellbenchError("--workers and --on: either processes of this machine or a cluster. Give one of them.")
    if options.on is not None:
        from cellbench.execution import ray_cluster

        ray_cluster.check_address(options.on, options.gpu_share)
    precision = "fp32" if options.precision == "auto" else options.precision
    machine = _machine(options, precision, elsewhere=elsewhere)
    if options.workers is not None:
        from cellbench.execution import multiprocess

        multiprocess.check_num_workers(options.workers, machine)
    parse_cache(options.cache)
    weights_folder(options.weights)
