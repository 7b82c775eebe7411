"""Heads of one kind that learn as one: the operations of several runs' steps become one operation each, with all their weights in it.

A small head leaves a GPU idle: a step is some hundred short operations, and handing one over takes longer than computing it. The members of a
team take the same mini-batches in the same order, so they can step together: convolutions become grouped ones, batch norms wider ones, and
AdamW runs once over all weights, each with its own member's rate and decay. Everything else that a run has stays its own: when it ends, its
numbers, its state. A team lives for one epoch; at its end the weights and AdamW's state are back in the members, which know nothing of it.
So who ends is simply not in the next epoch's team. The numbers agree with a lone run's to rounding.

Letters: N members, B tiles, C and O channels in and out, h x w places.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap

from cellbench.features.extractor import Batch, Features
from cellbench.training.model import SegmentationModel
from cellbench.training.trainer import HeadTrainer, MiniBatches, fail_single_values

M = TypeVar("M", bound=nn.Module)


def group_stackable(learners: Sequence[HeadTrainer], features: Features) -> list[HeadTrainer | StackedHeads]:
    """Who steps together in an epoch: teams where the machine wants them, of learners that are :func:`same_architecture`, and the others alone."""
    most = features.trunk.machine.most_as_one if not features.framing.whole else 1  # a whole image keeps a GPU busy, and takes its memory
    groups: dict[Hashable, list[HeadTrainer]] = {}
    for k, learner in enumerate(learners):
        groups.setdefault(same_architecture(learner) if stackable(learner.model) else k, []).append(learner)
    parts = [group[at : at + most] for group in groups.values() for at in range(0, len(group), most)]
    return [StackedHeads(part) if len(part) > 1 else part[0] for part in parts]


def same_architecture(learner: HeadTrainer) -> Hashable:
    """The same for learners of one cohort whose heads are built alike and learn the same from the same mini-batches."""
    run = learner.run
    weights = tuple((name, x.shape, x.dtype) for name, x in learner.model.state_dict().items())
    return run.head, run.baseline, repr(run.options), run.targets, run.loss, run.batch_size, learner.num_views, weights


def stackable(model: SegmentationModel) -> bool:
    """Whether a model can be a member: its head says so and draws no random numbers, all its weights learn and are in layers that can be made
    one, and it trains no backbone's blocks."""
    learns = all(weight.requires_grad for weight in model.parameters())
    says = getattr(model.head, "stackable", False) and not model.draws.expected
    return model.tail is None and says and learns and has_layers_to_stack(model)


def has_layers_to_stack(module: nn.Module) -> bool:
    """Whether all weights and buffers are in layers that can be made one."""
    owners = [layer for layer in module.modules() if [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]]
    return all(type(layer) in _STACKED and _plain(layer) for layer in owners)


def _plain(layer: nn.Module) -> bool:
    if isinstance(layer, nn.BatchNorm2d):
        return layer.affine and layer.track_running_stats and layer.momentum is not None
    return layer.groups == 1 and layer.padding_mode == "zeros"


class StackedHeads:
    """Two or more learners that are :func:`same_architecture` and :func:`stackable`, for one epoch."""

    def __init__(self, members: Sequence[HeadTrainer]) -> None:
        self.members = list(members)

    @property
    def train_s(self) -> float:
        """Spent by all members in learning so far."""
        return sum(member.train_s for member in self.members)

    def begin(self) -> None:
        """A new epoch: copies the members' weights and state into the team's."""
        for member in self.members:
            member.begin()
        first, models = self.members[0], [member.model for member in self.members]
        self._batches = MiniBatches(first.num_views, first.run.batch_size)
        self._model = stack(first.model)
        self._buffers = {name: torch.stack([model.get_buffer(name) for model in models]) for name, _ in first.model.named_buffers()}
        self._names = [name for name, _ in first.model.named_parameters()]
        self._optimiser = _Optimiser(self.members)
        self._sums_N = torch.zeros(len(models), device=first.device)

    def take(self, chunk: Batch) -> None:
        """As :meth:`HeadTrainer.take`, for all members; each is charged its share of the time."""
        if self.members[0].ended:
            return
        start, start_cpu = time.perf_counter(), time.thread_time()
        with fail_single_values(self.members):
            for batch in self._batches.of(chunk):
                self._learn(batch)
        share_s, share_cpu_s = (
            (now - then) / len(self.members) for now, then in ((time.perf_counter(), start), (time.thread_time(), start_cpu))
        )
        for member in self.members:
            member.train_s += share_s
            member.train_cpu_s += share_cpu_s

    def _learn(self, batch: Batch) -> None:
        first, weights = self.members[0], self._optimiser.weights
        with first.autocast():
            logits_NBKTT = vmap(lambda own: functional_call(self._model, own, (batch,)))(
                dict(zip(self._names, weights, strict=True)) | self._buffers
            )
        losses_N = first.loss(logits_NBKTT, batch)
        self._optimiser.step(torch.autograd.grad(losses_N.sum(), weights))
        self._sums_N += losses_N.detach() * batch.num

    def end(self) -> None:
        """Copies weights, statistics and AdamW's state back to the members."""
        self._optimiser.end()
        with torch.no_grad():
            for k, member in enumerate(self.members):
                member.loss_sum = self._sums_N[k].clone()
                for name, x in self._buffers.items():
                    member.model.get_buffer(name).copy_(x[k])


class _Optimiser:
    """torch's AdamW over the weights of all members at once, each with its own rate, decay and number of steps.

    Weights lie in one long row, and so do both moments: all members' first weight, then all members' second, and so on. A step is a dozen
    operations then, however many weights and members there are.
    """

    def __init__(self, members: Sequence[HeadTrainer]) -> None:
        self._members, self._at = members, 0
        self._columns = list(zip(*(member.model.parameters() for member in members), strict=True))
        defaults = members[0].optimiser.defaults
        self._betas, self._eps = defaults["betas"], defaults["eps"]
        states = [[member.optimiser.state.get(x, {}) for member, x in zip(members, column, strict=True)] for column in self._columns]
        self._steps = [int(state.get("step", 0)) for state in states[0]]
        self._row = self._joined(self._columns)
        self._mean, self._square = (
            self._joined(
                [
                    [state.get(name, torch.zeros_like(x)) for state, x in zip(*both, strict=True)]
                    for both in zip(states, self._columns, strict=True)
                ]
            )
            for name in _MOMENTS
        )
        self.weights = [x.requires_grad_() for x in self._pieces(self._row)]
        """All members' (N, …), views of the row."""
        self._owners = self._joined([[torch.full(x.shape, k, device=x.device) for k, x in enumerate(column)] for column in self._columns])
        factors = [self._factors(step) for step in range(members[0].num_steps)]
        self._factors_S3N = torch.tensor(factors, dtype=torch.float64).float().to(self._row.device)

    def _factors(self, step: int) -> list[list[float]]:
        """Of a step of the epoch, for each member: what is left of a weight by decay, how far it moves, and the square's correction."""
        first, second = self._betas
        rates = [member.lr(member.epoch * member.num_steps + step) for member in self._members]
        taken = [steps + step + 1 for steps in self._steps]
        return [
            [1 - rate * member.run.weight_decay for rate, member in zip(rates, self._members, strict=True)],
            [rate / (1 - first**num) for rate, num in zip(rates, taken, strict=True)],
            [math.sqrt(1 - second**num) for num in taken],
        ]

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor]) -> None:
        """One step of all members, with the gradients (N, …) of :attr:`weights`."""
        left, size, root = self._factors_S3N[self._at][:, self._owners]
        gradient, (first, second) = torch.cat([_in_order(x).reshape(-1) for x in gradients]), self._betas
        self._row.mul_(left)
        self._mean.lerp_(gradient, 1 - first)
        self._square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        self._row.sub_(self._mean.div(self._square.sqrt().div_(root).add_(self._eps)).mul_(size))
        self._at += 1

    @torch.no_grad()
    def end(self) -> None:
        """Copies weights and state to the members, as their own AdamW would have left them."""
        rows = zip(self._columns, *(self._pieces(row) for row in (self._row, self._mean, self._square)), strict=True)
        for column, weights, *moments in rows:
            for k, (member, x) in enumerate(zip(self._members, column, strict=True)):
                x.copy_(weights[k])
                state = member.optimiser.state[x]
                state["step"] = torch.tensor(float(self._steps[k] + self._at))
                for name, moment in zip(_MOMENTS, moments, strict=True):
                    state[name] = torch.empty_like(x).copy_(moment[k])
        for member in self._members:
            member.optimiser.param_groups[0]["lr"] = member.lr(member.epoch * member.num_steps + self._at - 1)

    def _joined(self, columns: Sequence[Sequence[Tensor]]) -> Tensor:
        return torch.cat([_in_order(x.detach()).reshape(-1) for column in columns for x in column])

    def _pieces(self, row: Tensor) -> list[Tensor]:
        shapes = [_in_order(column[0]).shape for column in self._columns]
        parts = row.split([len(self._members) * shape.numel() for shape in shapes])
        pieces = [part.view(-1, *shape) for part, shape in zip(parts, shapes, strict=True)]
        return [x.movedim(-1, -3) if x.dim() > 3 else x for x in pieces]


_MOMENTS = ("exp_avg", "exp_avg_sq")


def _in_order(x: Tensor) -> Tensor:
    """Dimensions as they lie in memory: a convolution's weight, of one (O, C, h, w) or of all members, has its channels last."""
    return x.movedim(-3, -1) if x.dim() > 3 else x


# --- the layers of all members as one ---------------------------------------------------------------------------------------------------------


def stack(module: M) -> M:
    """A copy of a model or head whose layers, under ``vmap``, do the work of all members in one operation."""
    made = copy.deepcopy(module).train()
    for layer in made.modules():
        layer.__class__ = _STACKED.get(type(layer), type(layer))
        if getattr(layer, "inplace", False):
            layer.inplace = False  # in place on a view, as all members' parts of one tensor are, costs more than a new tensor
    return made


class _StackedModule(torch.autograd.Function):
    """``work(x, N, *weights)`` under ``vmap``. Torch's own rules for these layers know no autocast: a convolution refuses mixed precision, and a
    batch norm becomes four operations (torch 2.14)."""

    @staticmethod
    def forward(work: Callable[..., Tensor], x: Tensor, *weights: Tensor) -> Tensor:
        raise AssertionError("only under vmap")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], work: Callable[..., Tensor], x: Tensor, *weights: Tensor) -> tuple[Tensor, int]:
        num = info.batch_size
        y = work(x if in_dims[1] is None else x.movedim(in_dims[1], 1), num, *weights)
        return y.unflatten(1, (num, -1)), 1


def _side_by_side(x: Tensor, num: int) -> Tensor:
    """Each member's channels beside the others', (B, N C, h, w), from (B, N, C, h, w), or from what all see, (B, C, h, w)."""
    return (x if x.dim() > 4 else x.unsqueeze(1).expand(-1, num, -1, -1, -1)).flatten(1, 2)


def _given(*weights: Tensor | None) -> list[Tensor]:
    return [x for x in weights if x is not None]


class _Conv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return _StackedModule.apply(self._work, x, *_given(self.weight, self.bias))

    def _work(self, x: Tensor, num: int, weight_NOChw: Tensor, bias_NO: Tensor | None = None) -> Tensor:
        shared = x.dim() == 4  # read once, for all members' channels
        bias = None if bias_NO is None else bias_NO.flatten()
        x, groups = (x, 1) if shared else (x.flatten(1, 2), num)
        return F.conv2d(x, weight_NOChw.flatten(0, 1), bias, self.stride, self.padding, self.dilation, groups)


class _Transposed(nn.ConvTranspose2d):
    def forward(self, x: Tensor) -> Tensor:
        return _StackedModule.apply(self._work, x, *_given(self.weight, self.bias))

    def _work(self, x: Tensor, num: int, weight_NCOhw: Tensor, bias_NO: Tensor | None = None) -> Tensor:
        bias = None if bias_NO is None else bias_NO.flatten()
        weight = weight_NCOhw.flatten(0, 1)
        return F.conv_transpose2d(_side_by_side(x, num), weight, bias, self.stride, self.padding, self.output_padding, num, self.dilation)


class _Norm(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        self.num_batches_tracked.add_(1)
        return _StackedModule.apply(self._work, x, self.weight, self.bias, self.running_mean, self.running_var)

    def _work(self, x: Tensor, num: int, *weights_NC: Tensor) -> Tensor:
        weight, bias, mean, var = (x_NC.flatten() for x_NC in weights_NC)  # views: the running statistics are changed in place
        x = _side_by_side(x, num)
        # Of a single tile's strides some mean nothing, and torch's way back on a CPU then takes channels-last for channels-first (2.14: wrong
        # gradients, silently). A row of places cannot be mistaken.
        rows = x.flatten(2) if len(x) == 1 else x
        return F.batch_norm(rows, mean, var, weight, bias, True, self.momentum, self.eps).view_as(x)


_STACKED = {nn.Conv2d: _Conv, nn.ConvTranspose2d: _Transposed, nn.BatchNorm2d: _Norm}
