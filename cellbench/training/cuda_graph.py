"""Runs a head's training step as a CUDA graph: one launch instead of several hundred, which for small mini-batches take longer than the work itself.

The captured step runs the same kernels as the usual one; only the rounding order of AdamW's bias corrections differs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from cellbench.features.extractor import Batch

WARM_UP_STEPS = 2
"""Steps before a capture, in which cuDNN chooses kernels and the optimiser creates its state."""


class GraphedStep:
    """One training step for mini-batches of one shape. Calling it copies a batch into the graph's own memory and replays the step.

    Args:
        step: zeroes the gradients, computes the loss, its gradients and the optimiser's update; returns the loss, a scalar.
        batch: any batch of the shape. Its values do not matter: weights and optimiser state are restored after the capture.
        pool: memory shared by the graphs of a process; an output is valid until the next replay of any of them.

    Raises RuntimeError if the step cannot be captured, for example because of a transfer to the CPU.

    """

    def __init__(
        self, step: Callable[[Batch], Tensor], batch: Batch, model: nn.Module, optimiser: torch.optim.Optimizer, pool: Any
    ) -> None:
        self._batch = _clone(batch)
        here = torch.cuda.current_stream()
        with _unchanged(model, optimiser):
            beside = torch.cuda.Stream()
            beside.wait_stream(here)
            with torch.cuda.stream(beside):
                for _ in range(WARM_UP_STEPS):
                    step(self._batch)
            here.wait_stream(beside)
        optimiser.zero_grad(set_to_none=True)  # gradients then lie in the graph's memory
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool):
            self._loss = step(self._batch).detach()

    def __call__(self, batch: Batch) -> Tensor:
        """The loss of ``batch``, a scalar on the device, after the step. It is overwritten by the next step."""
        for to, of in zip(_tensors(self._batch), _tensors(batch), strict=True):
            to.copy_(of, non_blocking=True)
        self._graph.replay()
        return self._loss


@contextlib.contextmanager
def _unchanged(model: nn.Module, optimiser: torch.optim.Optimizer) -> Iterator[None]:
    """Restores weights, buffers and the optimiser's state after the block; new state is set to zero."""
    before = {x: x.detach().clone() for x in (*model.parameters(), *model.buffers())}
    moments = {p: {name: x.clone() for name, x in state.items()} for p, state in optimiser.state.items()}
    yield
    with torch.no_grad():
        for x, value in before.items():
            x.copy_(value)
        for p, state in optimiser.state.items():
            for name, x in state.items():
                x.copy_(moments[p][name]) if p in moments else x.zero_()


def _clone(batch: Batch) -> Batch:
    return batch._replace(
        maps={index: x.clone() for index, x in batch.maps.items()},
        pixels=batch.pixels.clone(),
        target=batch.target.clone(),
        cell_targets={name: x.clone() for name, x in batch.cell_targets.items()},
    )


def _tensors(batch: Batch) -> list[Tensor]:
    return [*batch.maps.values(), batch.pixels, batch.target, *batch.cell_targets.values()]
