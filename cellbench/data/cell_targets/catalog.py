"""The cell targets by the names that a run's ``targets`` takes."""

from __future__ import annotations

from cellbench.data.cell_targets.base import CellTarget
from cellbench.data.cell_targets.depth import Depth
from cellbench.data.cell_targets.flows import CentreOffsets, Flows
from cellbench.data.cell_targets.stars import Stars

TARGETS: dict[str, CellTarget | None] = {
    "cell": None,
    "cell+distance": Depth(border=False),
    "cell+border+distance": Depth(border=True),
    "flows": Flows(),
    "hv": CentreOffsets(),
    "stars": Stars(),
}
"""None: the classes alone."""
