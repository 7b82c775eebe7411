"""Random numbers that a model draws while it computes, as dropout does: the same for the same seed, whoever else computes at the same time.

torch draws from one generator for all threads of a process, and a GPU has another. So a step that draws has the generators to itself, seeded for
it, until it is done; and what a GPU would draw is drawn on the processor, so that both learn from the same numbers. A model of the package's own
layers draws nothing, and pays nothing for it. Others are watched: a step of theirs waits for no other as long as it draws nothing.

Drawn elsewhere than by torch's functions, with numpy say, numbers are not seeded; the contract "repeatable" says so.
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
"""Held while torch's generators, which are the whole process's, are seeded for one step."""

_LAYERS = tuple(
    f"torch.nn.modules.{name}"
    for name in (
        "activation", "batchnorm", "container", "conv", "flatten", "instancenorm", "linear", "module", "normalization", "padding",
        "pixelshuffle", "pooling", "upsampling",
    )
)  # fmt: skip
_RANDOM_LAYERS = ("FractionalMaxPool2d", "FractionalMaxPool3d", "MultiheadAttention", "RReLU")
"""Those of ``_LAYERS`` that draw."""
_SWITCHES = ("dropout_p", "train", "training")
"""Arguments by which an operation that may draw says whether it does: attention with ``dropout_p = 0`` draws nothing."""
_ON_DEVICE = ("_", "rrelu", "rnn", "lstm", "gru", "miopen")
"""Operations, by how their names begin, that draw where their tensors are: fused ones, which no processor has in the same form."""


class ModelRandomness:
    """The random numbers of one model."""

    def __init__(self, model: nn.Module) -> None:
        self._weight = next(model.parameters())  # says where the model is; the model itself would make a circle, which frees memory late
        self.never = all(_is_quiet(module) for module in model.modules())
        """Whether the model is known to draw nothing."""
        self.expected = not self.never
        """Whether its next step may draw: unknown for a layer that is not ours until a step has drawn nothing."""

    @contextlib.contextmanager
    def seeded(self, *seed: int) -> Iterator[SeededDraws | None]:
        """For one step, backward pass included: random numbers drawn inside follow from ``seed`` alone.

        ``seed``: non-negative integers. Yields None where nothing can be drawn.
        """
        if self.never:
            yield None
            return
        with SeededDraws(seed, self._device, at_once=self.expected) as drawing:
            yield drawing
        self.expected = drawing.drew

    @contextlib.contextmanager
    def fixed(self) -> Iterator[None]:
        """For one forward pass in eval mode: a model that draws even there gives the same for the same batch."""
        if self.never:
            yield
            return
        with SeededDraws((), self._device):
            yield

    @property
    def _device(self) -> torch.device:
        return self._weight.device


class SeededDraws(TorchDispatchMode):
    """Inside ``with``, this thread's random operations of torch draw from generators seeded with ``seed``.

    They are seeded at the first draw, or ``at_once``: needed where the state of the generators is read before anything is drawn, as activation
    checkpointing does.
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
        """Says that the forward pass is done. What drew nothing need not be watched any longer: a backward pass draws only what is drawn again."""
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
        torch.default_generator.manual_seed(number)  # torch.manual_seed would wake a GPU that nobody uses
        if on_gpu:
            with torch.cuda.device(self._device):
                torch.cuda.manual_seed(number)

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if not _is_random(func) or any(not value for value in _switches(func, args, kwargs)):
            return func(*args, **kwargs)
        self.drew = True
        self._begin()
        # A generator of the model's own would be in no checkpoint.
        args, kwargs = tree_map(lambda x: None if isinstance(x, torch.Generator) else x, (tuple(args), dict(kwargs)))
        if self._device.type == "cpu" or func._schema.name.removeprefix("aten::").startswith(_ON_DEVICE):
            return func(*args, **kwargs)
        return draw_on_cpu(func, args, kwargs, self._device)


def draw_on_cpu(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], device: torch.device) -> Any:
    """What ``func`` gives with the numbers that it would draw on a processor, on ``device``. It may change its first argument in place, no other."""
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


def _is_quiet(module: nn.Module) -> bool:
    """Whether a module is known to draw nothing: one of torch's plain layers, or of the package, whose heads a test watches."""
    kind = type(module)
    known = kind.__module__.startswith("cellbench.") or (kind.__module__ in _LAYERS and kind.__name__ not in _RANDOM_LAYERS)
    return known and not module._forward_hooks and not module._forward_pre_hooks


@functools.cache
def _is_random(func: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in func.tags


def _switches(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """The values of an operation's switches, as far as they are given or have a default."""
    named = [
        (one.name, args[place] if place < len(args) else kwargs.get(one.name, one.default_value))
        for place, one in enumerate(func._schema.arguments)
    ]
    return [value for name, value in named if name in _SWITCHES and value is not None]
