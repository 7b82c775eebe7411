"""cellbench: which frozen foundation model, with which segmentation head, outlines your cells best, and is the difference real?

The names in ``__all__`` are the public Python API. Importing the package loads none of them and changes nothing in the process: each is
imported at its first use. The functions and :meth:`Segmenter.load` switch off the telemetry of MLflow and the Hugging Face
hub, by the environment variables in :data:`cellbench.startup.ENVIRONMENT`; a variable that is set already keeps its value.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from cellbench.api.checks import DataCheck, check
    from cellbench.api.experiments import grid, results, score
    from cellbench.api.results import Comparison, Results
    from cellbench.api.searches import SearchResult, search
    from cellbench.config.cards import BackboneCard, DatasetCard
    from cellbench.data.dataset import Sample
    from cellbench.data.layouts import Layout, paired_folders
    from cellbench.data.scan import Listing
    from cellbench.errors import CellbenchError, WeightsUnavailable
    from cellbench.inference.segmenter import Prediction, Segmenter
    from cellbench.metrics.catalog import ScoredImage
    from cellbench.metrics.instances import Instances
    from cellbench.models.backbones.base import Backbone, Level
    from cellbench.models.heads.base import Head, conv_bn_relu, resize

_PLACES = {
    "api.checks": ("DataCheck", "check"),
    "api.experiments": ("grid", "results", "score"),
    "api.results": ("Comparison", "Results"),
    "api.searches": ("SearchResult",),
    "config.cards": ("BackboneCard", "DatasetCard"),
    "data.dataset": ("Sample",),
    "data.layouts": ("Layout", "paired_folders"),
    "data.scan": ("Listing",),
    "errors": ("CellbenchError", "WeightsUnavailable"),
    "inference.segmenter": ("Prediction", "Segmenter"),
    "metrics.catalog": ("ScoredImage",),
    "metrics.instances": ("Instances",),
    "models.backbones.base": ("Backbone", "Level"),
    "models.heads.base": ("Head", "conv_bn_relu", "resize"),
}
# `search` is a package too, which Python sets as an attribute when it is imported: calling the package calls the function.
_PACKAGES = ("search",)
_PLACE = {name: place for place, names in _PLACES.items() for name in names}

__all__ = [  # noqa: RUF022  grouped by use
    # Compare models.
    "check",
    "DataCheck",
    "grid",
    "results",
    "Results",
    "Comparison",
    "score",
    "search",
    "SearchResult",
    # Segment images.
    "Segmenter",
    "Prediction",
    # Parts of your own: see docs/extending.md.
    "Head",
    "Backbone",
    "BackboneCard",
    "Level",
    "resize",
    "conv_bn_relu",
    "ScoredImage",
    "Instances",
    "Layout",
    "Listing",
    "Sample",
    "DatasetCard",
    "paired_folders",
    # Errors.
    "CellbenchError",
    "WeightsUnavailable",
]


if not TYPE_CHECKING:  # a type checker reads the imports above, and reports an unknown name

    def __getattr__(name: str) -> Any:
        if name in _PACKAGES:
            return importlib.import_module(f"cellbench.{name}")
        if name not in _PLACE:
            raise AttributeError(f"module 'cellbench' has no attribute '{name}'. Public are: {', '.join(__all__)}.")
        value = getattr(importlib.import_module(f"cellbench.{_PLACE[name]}"), name)
        globals()[name] = value  # found at once from now on
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
