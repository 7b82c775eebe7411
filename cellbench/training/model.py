"""The trainable part of a run, built from its cards: the head with seeded weights, and an unfrozen tail of the backbone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from cellbench.config.cards import BaselineCard, HeadCard
from cellbench.config.registry import load
from cellbench.config.run import RunSpec
from cellbench.data.cell_targets.base import CellTarget
from cellbench.data.cell_targets.catalog import TARGETS
from cellbench.errors import CellbenchError, blaming, one_line
from cellbench.features.extractor import Batch
from cellbench.features.frozen_backbone import TOKENS, FrozenBackbone
from cellbench.metrics.calibration import Calibration
from cellbench.models.backbones.base import Backbone, Level
from cellbench.models.backbones.lora import with_lora
from cellbench.models.backbones.pixel_adapter import PixelAdapter
from cellbench.models.fused_norm import FusedBatchNorm, with_fused_norms
from cellbench.models.heads.base import Head
from cellbench.models.heads.ensemble import Ensemble
from cellbench.training.randomness import ModelRandomness
from cellbench.training.test_time import CODES


class SegmentationModel(nn.Module):
    """A head, the levels that it reads, and the backbone's last blocks (the tail) if the run trains them.

    Of an ensemble the head is an ``Ensemble``, and ``tail`` and ``adapter`` are lists of those of the members.
    """

    def __init__(
        self,
        head: Head,
        levels: tuple[Level, ...],
        tail: nn.Module | None = None,
        num_frozen: int = 0,
        cell_target: CellTarget | None = None,
        tta_codes: tuple[int, ...] = (0,),
        adapter: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.head, self.tail, self.adapter = head, tail, adapter
        self.cell_target = cell_target
        """What the head learns beside the classes. Its output channels follow those of the classes."""
        self.tta_codes = tta_codes
        """The poses in which a tile is decoded in test and prediction (``training.test_time``)."""
        self.num_classes = head.num_classes - (len(cell_target.channels) if cell_target else 0)
        self._levels, self._num_frozen = levels, num_frozen
        self.tunes_edges, self.edge_share = False, 0.0
        """Whether small regions at an image's frame are dropped from masks, and below which share of a cell: tuned on validation."""
        self.seconds = 0.0
        """Wall time of this model for decoding whole images so far."""
        self.cpu_seconds = 0.0
        """CPU time of the decoding threads."""
        self.randomness = ModelRandomness(self)

    def forward(self, batch: Batch) -> Tensor:
        """Class scores (B, K, T, T) before softmax, for every pixel of the batch's tiles, then the logits of the cell target."""
        scores = self._scores(batch)
        if torch.compiler.is_exporting():  # a comparison would fix the number of tiles in the exported network
            return scores
        expected = (len(batch.pixels), self.head.num_classes, *batch.pixels.shape[-2:])
        if not isinstance(scores, Tensor) or tuple(scores.shape) != expected:
            what = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise CellbenchError(f"the head {type(self.head).__name__} returned {what} where scores {expected} are expected (B, K, H, W).")
        return scores

    def _scores(self, batch: Batch) -> Tensor:
        if self.tail is None:
            return self.head([batch.maps[level.index] for level in self._levels], batch.pixels)
        if isinstance(self.head, Ensemble):
            return self.head.mean(
                member(self._maps(batch, tail, adapter), batch.pixels)
                for member, (tail, adapter) in zip(self.head.members, self._tails, strict=True)
            )
        ((tail, adapter),) = self._tails
        return self.head(self._maps(batch, tail, adapter), batch.pixels)

    @property
    def _tails(self) -> list[tuple[nn.Module, nn.Module | None]]:
        """Each trained tail with its pixel adapter: one, or one for each member of an ensemble."""
        if self.tail is None:
            return []
        if not isinstance(self.tail, nn.ModuleList):
            return [(self.tail, self.adapter)]
        adapters = [None] * len(self.tail) if self.adapter is None else list(cast(nn.ModuleList, self.adapter))
        return list(zip(self.tail, adapters, strict=True))

    def _maps(self, batch: Batch, tail: nn.Module, adapter: nn.Module | None) -> list[Tensor]:
        """The maps of the head's levels, the deep ones from a trained tail."""
        deep = tuple(level.index for level in self._levels if level.index >= self._num_frozen)
        stride = self._levels[-1].stride_px
        places = (batch.pixels.shape[-2] // stride, batch.pixels.shape[-1] // stride)
        tokens_BND = batch.maps[TOKENS].squeeze(-1).transpose(1, 2)
        if adapter is not None:
            tokens_BND = adapter(tokens_BND, batch.pixels, places)
        maps = dict(zip(deep, tail(tokens_BND, deep, places), strict=True))
        return [maps[level.index] if level.index in maps else batch.maps[level.index] for level in self._levels]

    def decode(self, batch: Batch) -> Tensor:
        """As :meth:`forward`, in eval mode and deterministic."""
        with blaming(self), self.randomness.fixed():
            return self(batch)

    @property
    def adapts(self) -> bool:
        """Whether its batch norms can use statistics of each tile at test time."""
        return any(isinstance(module, FusedBatchNorm) for module in self.modules())

    @property
    def own_share(self) -> float:
        """The share of a tile's own statistics in its batch norms at test time."""
        return next((module.own_share for module in self.modules() if isinstance(module, FusedBatchNorm)), 0.0)

    def set_own_share(self, share: float) -> None:
        """Sets :attr:`own_share`; without effect on a model that does not adapt."""
        for module in self.modules():
            if isinstance(module, FusedBatchNorm):
                module.own_share = share

    def adapt_as(self, calibration: Calibration) -> None:
        """Predicts from here on as was tuned on validation images."""
        self.set_own_share(calibration.own_share)
        self.edge_share = calibration.edge_share

    def groups(self, run: RunSpec) -> list[dict[str, Any]]:
        """Parameter groups for the optimiser, each with its share of the learning rate.

        The share is 1 for the head and the pixel adapter, ``tail_lr_scale`` for the tail's norm and last block, and ``layer_decay`` times less for
        each earlier block (Clark et al. 2020, ELECTRA). It is 1 for LoRA as well, which begins with no change.
        """
        adapter = [] if self.adapter is None else list(self.adapter.parameters())
        groups: list[dict[str, Any]] = [{"params": [*self.head.parameters(), *adapter], "share": 1.0}]
        for tail, _ in self._tails:
            if run.lora_rank:
                groups.append({"params": [p for p in tail.parameters() if p.requires_grad], "share": 1.0})
                continue
            groups.append({"params": list(cast(nn.Module, tail.norm).parameters()), "share": run.tail_lr_scale})
            for back, block in enumerate(reversed(list(cast(nn.ModuleList, tail.blocks)))):
                groups.append({"params": list(block.parameters()), "share": run.tail_lr_scale * run.layer_decay**back})
        return groups

    def state_of(self, members: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The state of an ensemble, from those of the models of its members."""
        out = {}
        for k, state in enumerate(members):
            for name, x in state.items():
                part, rest = name.split(".", 1)
                out[f"head.members.{k}.{rest}" if part == "head" else f"{part}.{k}.{rest}"] = x
        return out

    @property
    def method(self) -> str:
        """How cells are found in the predictions: a key of ``cellbench.metrics.separation.METHODS``."""
        return self.cell_target.method if self.cell_target else "watershed"

    @property
    def patch_px(self) -> int:
        """As of :class:`FrozenBackbone`."""
        return self._levels[-1].stride_px if self._levels else 1

    @property
    def num_fields(self) -> int:
        """Channels that are blended beside the probabilities of the classes."""
        return self.cell_target.num_fields if self.cell_target else 0

    @property
    def num_params(self) -> int:
        """Number of trained parameters: of the head and of the tail."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)


def num_levels(card: HeadCard | BaselineCard) -> int:
    """How many depths of the backbone a run of this card reads; 0 for a baseline."""
    return card.levels if isinstance(card, HeadCard) else 0


def build_model(run: RunSpec, card: HeadCard | BaselineCard, backbone: FrozenBackbone, num_classes: int) -> SegmentationModel:
    """Builds the run's trainable part from the card of its head or baseline, on the backbone's device. Its weights depend on the seed only."""
    levels = () if run.baseline else backbone.levels(num_levels(card))
    build, cell_target = load(card), TARGETS[run.targets]
    num_learned = len(cell_target.channels) if cell_target else 0
    heads: list[Head] = []
    with torch.random.fork_rng(devices=[]):  # other random numbers must not depend on the number of heads built
        try:
            for member in run.members:
                torch.manual_seed(member.seed)
                heads.append(build(levels, num_classes + num_learned, **run.options))
        except (ValueError, TypeError, KeyError, RuntimeError, ZeroDivisionError) as error:  # raised by libraries for a width of 0
            raise CellbenchError(f"{card.path}: cannot be built with {run.options or 'no options'}: {one_line(error)}.") from error
    head = heads[0] if len(heads) == 1 else Ensemble(heads, num_learned)
    if run.adapt == "batchnorm" and not with_fused_norms(head):
        raise CellbenchError(
            f'adapt = "batchnorm": {card.id} has no batch norm. Leave adapt out for it, as in [head.{card.id}] adapt = "none".'
        )
    trained = [_trained_part(run, member.seed, backbone.module) for member in run.members] if run.unfreeze and backbone.module else []
    tails, adapters = [tail for tail, _ in trained], [adapter for _, adapter in trained if adapter is not None]
    num_frozen = len(backbone.module.levels) - run.unfreeze if backbone.module is not None else 0
    model = SegmentationModel(head, levels, _one_or_list(tails), num_frozen, cell_target, CODES[run.tta], _one_or_list(adapters))
    model.tunes_edges = run.edge_cells == "tuned"
    return model.to(backbone.machine.device).to(memory_format=torch.channels_last)


def _trained_part(run: RunSpec, seed: int, backbone: Backbone) -> tuple[nn.Module, PixelAdapter | None]:
    """The backbone's last blocks as a run trains them, and its pixel adapter."""
    if run.pixel_adapter and len({level.stride_px for level in backbone.levels}) > 1:
        raise CellbenchError(
            f"pixel_adapter = {run.pixel_adapter}: it feeds the tokens of a plain transformer, and {run.backbone} is a pyramid, whose first "
            "levels see the pixels. Set pixel_adapter = 0."
        )
    tail = backbone.tail(run.unfreeze)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if run.lora_rank:
            tail = with_lora(tail, run.lora_rank)
        return tail, PixelAdapter(backbone.levels[-1].dim, run.pixel_adapter) if run.pixel_adapter else None


def _one_or_list(modules: Sequence[nn.Module]) -> nn.Module | None:
    return None if not modules else modules[0] if len(modules) == 1 else nn.ModuleList(modules)
