"""Makes the random numbers of a model (as of dropout) repeatable: the same for the same seed, whatever else runs at the same time.

torch has one generator for all threads of a process, and another for each GPU. So a step that draws random numbers locks the generators and seeds
them until it is done. Random numbers for a GPU are drawn on the CPU, so that both train with the same numbers. Models of known deterministic layers
have no overhead. Other models are observed: their steps run in parallel as long as they draw nothing.

Random numbers drawn outside torch, as with numpy, are not seeded; the check "repeatable" of plug-ins detects them.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

_GENERATORS = threading.RLock()
"""Held while torch's global generators are seeded for one step."""

_LAYERS = tuple(
    f"torch.nn.modules.{name}"
    for name in (
        "activation", "batchnorm", "container", "conv", "flatten", "instancenorm", "linear", "module", "normalization", "padding",
        "pixelshuffle", "pooling", "upsampling",
    )
)  # fmt: skip
_RANDOM_LAYERS = ("FractionalMaxPool2d", "FractionalMaxPool3d", "MultiheadAttention", "RReLU")
"""Layers in the modules of ``_LAYERS`` that draw random numbers."""
_SWITCHES = ("dropout_p", "train", "training")
"""Arguments that switch randomness off: attention with ``dropout_p = 0`` draws nothing."""
_ON_DEVICE = ("_", "rrelu", "rnn", "lstm", "gru", "miopen")
"""Prefixes of operations that draw on their own device: fused GPU kernels without an equal on the CPU."""


class ModelRandomness:
    """The random numbers of one model."""

    def __init__(self, model: nn.Module) -> None:
        self._weight = next(model.parameters())  # gives the device; a reference to the model would be a cycle, which delays freeing memory
        self.never_draws = all(_is_deterministic(module) for module in model.modules())
        """Whether the model is known to draw no random numbers."""
        self.may_draw = not self.never_draws
        """Whether the next step may draw random numbers: for unknown layers, until a step has drawn none."""

    @contextlib.contextmanager
    def seeded(self, *seed: int) -> Iterator[SeededDraws | None]:
        """For one step, backward pass included: random numbers drawn inside depend on ``seed`` only.

        ``seed``: non-negative integers. Yields None if the model never draws.
        """
        if self.never_draws:
            yield None
            return
        with SeededDraws(seed, self._device, at_once=self.may_draw) as drawing:
            yield drawing
        self.may_draw = drawing.drew

    @contextlib.contextmanager
    def fixed(self) -> Iterator[None]:
        """For one forward pass in eval mode: even a model that draws there gives the same output for the same batch."""
        if self.never_draws:
            yield
            return
        with SeededDraws((), self._device):
            yield

    @property
    def _device(self) -> torch.device:
        return self._weight.device


class SeededDraws(TorchDispatchMode):
    """Context in which torch's random operations in this thread use generators seeded with ``seed``.

    They are seeded at the first draw, or immediately with ``at_once``. Activation checkpointing needs that: it reads the generators' state
    before the first draw.
    """

    def __init__(self, seed: Sequence[int], device: torch.device, *, at_once: bool = False) -> None:
        super().__init__()
        self._seed, self._device, self._at_once = seed, device, at_once
        self._begun = contextlib.ExitStack()
        self._is_begun = self._is_open = self.drew = False

    def __enter__(self) -> SeededDraws:
        if self._at_once:
            self._begin()
        super().__enter__()
        self._is_open = True
        return self

    def __exit__(self, *error: Any) -> None:
        try:
            self._close()
        finally:
            self._begun.close()

    def backward(self) -> None:
        """Marks the end of the forward pass. If it drew nothing, neither will the backward pass, which only repeats draws; observation ends."""
        if not self.drew:
            self._close()

    def _close(self) -> None:
        if self._is_open:
            self._is_open = False
            super().__exit__(None, None, None)

    def _begin(self) -> None:
        if self._is_begun:
            return
        self._is_begun = True
        on_gpu = self._device.type == "cuda"
        self._begun.enter_context(_GENERATORS)
        self._begun.enter_context(torch.random.fork_rng(devices=[self._device] if on_gpu else []))
        number = int(np.random.SeedSequence([len(self._seed), *self._seed]).generate_state(1, np.uint64)[0] >> 1)
        torch.default_generator.manual_seed(number)  # torch.manual_seed would initialise an unused GPU
        if on_gpu:
            with torch.cuda.device(self._device):
                torch.cuda.manual_seed(number)

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if not _is_random(func) or any(not value for value in _switches(func, args, kwargs)):
            return func(*args, **kwargs)
        self.drew = True
        self._begin()
        # A generator that belongs to the model would not be saved in checkpoints.
        args, kwargs = tree_map(lambda x: None if isinstance(x, torch.Generator) else x, (tuple(args), dict(kwargs)))
        if self._device.type == "cpu" or func._schema.name.removeprefix("aten::").startswith(_ON_DEVICE):
            return func(*args, **kwargs)
        return draw_on_cpu(func, args, kwargs, self._device)


def draw_on_cpu(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], device: torch.device) -> Any:
    """The result of ``func`` with random numbers drawn on the CPU, moved to ``device``. ``func`` may change its first argument in place, no other."""
    copies: list[tuple[Tensor, Tensor]] = []

    def down(x: Any) -> Any:
        if isinstance(x, Tensor) and x.device.type != "cpu":
            copies.append((x.cpu(), x))
            return copies[-1][0]
        return torch.device("cpu") if isinstance(x, torch.device) else x

    def up(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        origin = next((origin for copy, origin in copies if copy is x), None)
        return x.to(device) if origin is None else origin.copy_(x)

    here, named = tree_map(down, (tuple(args), dict(kwargs)))
    return tree_map(up, func(*here, **named))


def _is_deterministic(module: nn.Module) -> bool:
    """Whether a module is known to draw no random numbers: torch's plain layers, and those of this package and of smp, which a test checks."""
    kind = type(module)
    known = kind.__module__.startswith(("cellbench.", "segmentation_models_pytorch.")) or (
        kind.__module__ in _LAYERS and kind.__name__ not in _RANDOM_LAYERS
    )
    return known and not module._forward_hooks and not module._forward_pre_hooks


@functools.cache
def _is_random(func: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in func.tags


def _switches(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """The values of an operation's switches that are given or have a default."""
    named = [
        (one.name, args[place] if place < len(args) else kwargs.get(one.name, one.default_value))
        for place, one in enumerate(func._schema.arguments)
    ]
    return [value for name, value in named if name in _SWITCHES and value is not None]
