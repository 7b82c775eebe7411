"""``bench --gpu``: how well a GPU is used, by whole processes, by heads, and by the feature pass of larger backbones; each result is printed at once.

It runs on a processor too, where of the larger backbones only the first is measured.
"""

from __future__ import annotations

import copy

from cellbench.diagnostics.benchmark_setup import BenchmarkSetup
from cellbench.diagnostics.script_comparison import cost_of_grid, cost_of_script, settings_of
from cellbench.diagnostics.speed import BenchmarkResult, feature_pass, heads, measuring, whole_processes
from cellbench.models.backbones.build import open_backbone

LARGER = {
    "ViT-S/16": ("vit_small_patch16_224", 384, 12),
    "ViT-B/16": ("vit_base_patch16_224", 768, 12),
    "ViT-L/16": ("vit_large_patch16_224", 1024, 24),
}
"""timm's name, width and depth. Their weights are random, which does not affect times."""
NUM_PLACES = 12
"""Places of the main thread that are printed, those that took most time."""


def measure(setup: BenchmarkSetup) -> BenchmarkResult:
    """Prints each part when it is measured."""
    out = BenchmarkResult(machine=setup.machine.name, backbone=setup.backbone)
    setup.say(f"{out.backbone} on {out.machine}")
    with measuring("heads", setup, out):
        heads(setup, out)
    with measuring("the feature pass", setup, out):
        feature_pass(setup, out)
    if setup.card:
        settings = settings_of(setup)
        with measuring("the main thread of grid", setup, out):
            grid = cost_of_grid(settings, setup, sampled=True)
            for place, spent_s in sorted(grid.places.items(), key=lambda one: -one[1])[:NUM_PLACES]:
                out.add(
                    f"main_thread_{place}_s", f"main thread of grid: {place}", spent_s, "s", f"{spent_s / sum(grid.places.values()):.0%}"
                )
        with measuring("a plain script", setup, out):
            whole_processes(setup, out, cost_of_script(settings), grid)
    for name in list(LARGER)[: 1 if setup.machine.device.type == "cpu" else None]:
        with measuring(f"the feature pass of {name}", setup, out):
            feature_pass(_with_random_vit(setup, name), out, name)
    return out


def _with_random_vit(setup: BenchmarkSetup, name: str) -> BenchmarkSetup:
    """The same images, with another backbone."""
    arch, dim, depth = LARGER[name]
    card = setup.registry.backbone("vit-tiny-random")
    card = card.model_copy(update={"dim": dim, "depth": depth, "probe": (), "arch": {**card.arch, "name": arch}})
    other = copy.copy(setup)
    other.frozen = open_backbone(card)
    return other
