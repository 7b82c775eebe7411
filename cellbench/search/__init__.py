"""Hyperparameter search, and the only package that knows Optuna.

Its name is also that of the public function: ``cellbench.search(...)`` calls :func:`cellbench.api.searches.search`.
"""

import importlib
import sys
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return importlib.import_module("cellbench.api.searches").search(*arguments, **named)


sys.modules[__name__].__class__ = _CallablePackage
