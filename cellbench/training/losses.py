"""Losses over class scores, combined as a weighted sum by a run's ``loss``, for example ``0.5 ce + 0.5 dice``.

Each name is a card in ``registry/losses``, whose builder is a function: (logits (B, K, H, W) float32, target (B, H, W) int64) -> scalar. A user's
losses come from ``losses/`` in their registry folder.

Always computed in float32: smp's Dice and Lovász give NaN in half precision (measured).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cellbench.config.registry import Registry, load
from cellbench.config.run import weighted_terms
from cellbench.metrics.pixel import IGNORE
from cellbench.startup import without_compiler

Loss = Callable[[Tensor, Tensor], Tensor]


def parse_loss(text: str, registry: Registry | None = None) -> Callable[..., Tensor]:
    """The loss described by ``text``: (logits (B, K, H, W), target (B, H, W) int64) -> scalar float32. Raises CellbenchError for an unknown name.

    If the third argument is True, pixels whose target is ``IGNORE`` are left out; the loss is 0 if no others remain. It must be True if there
    are any: searching for them here would wait for the GPU.
    """
    registry = registry or Registry()
    weights = {name: weight for name, weight in weighted_terms(text).items() if weight}
    terms: dict[str, Loss] = {name: load(registry.loss(name)) for name in weights}
    fused = all({"ce": cross_entropy, "dice": dice}.get(name) is term for name, term in terms.items())

    def total(logits_BKHW: Tensor, target_BHW: Tensor, ignoring: bool = False) -> Tensor:
        if ignoring:
            kept_BHW = target_BHW != IGNORE
            if not kept_BHW.any():
                return 0 * logits_BKHW.float().sum()
            # One column of pixels: a loss must not depend on where in the batch a pixel lies.
            logits_BKHW = logits_BKHW.movedim(1, -1)[kept_BHW].T[None, ..., None]
            target_BHW = target_BHW[kept_BHW][None, :, None]
        if logits_BKHW.shape[1] == 2 and fused:
            return two_classes(logits_BKHW, target_BHW, weights.get("ce", 0.0), weights.get("dice", 0.0))
        logits = logits_BKHW.float()
        return sum((weights[name] * term(logits, target_BHW) for name, term in terms.items()), start=logits.new_zeros(()))

    return total


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target)


def binary_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Loss of each class against the rest."""
    return F.binary_cross_entropy_with_logits(logits, F.one_hot(target, logits.shape[1]).movedim(-1, 1).float())


def dice(logits: Tensor, target: Tensor) -> Tensor:
    return _smp("DiceLoss")(logits, target)


def jaccard(logits: Tensor, target: Tensor) -> Tensor:
    return _smp("JaccardLoss")(logits, target)


def tversky(logits: Tensor, target: Tensor) -> Tensor:
    return _smp("TverskyLoss")(logits, target)


def focal(logits: Tensor, target: Tensor) -> Tensor:
    return _smp("FocalLoss")(logits, target)


def lovasz(logits: Tensor, target: Tensor) -> Tensor:
    return _smp("LovaszLoss")(logits, target)


@functools.cache
def _smp(name: str) -> Any:
    # Imported here: smp imports timm and torchvision, a second that cross-entropy does not need.
    with without_compiler():
        from segmentation_models_pytorch import losses

    return getattr(losses, name)(mode="multiclass")


def two_classes(logits_B2HW: Tensor, target_BHW: Tensor, ce: float, dice: float) -> Tensor:
    """``ce`` times cross-entropy plus ``dice`` times smp's multi-class Dice loss, for two classes.

    The same value and gradient up to rounding, in a quarter of the time: with two classes everything follows from the difference of the
    logits. Measured for a tile of 224 px on one core, backward pass included: torch and smp take 2.0 ms, nearly as much as the rest of a
    step of the `bilinear` head.
    """
    return _TwoClasses.apply(logits_B2HW, target_BHW, ce, dice)


class _TwoClasses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_B2HW: Tensor, target_BHW: Tensor, ce: float, dice: float) -> Tensor:
        # Sums in double precision, which a Mac's GPU does not have.
        wide, pixels = torch.float32 if logits_B2HW.device.type == "mps" else torch.float64, (0, 1, 2)
        margin, cell = logits_B2HW[:, 1].float() - logits_B2HW[:, 0].float(), (target_BHW == 1).float()
        found, num = margin.sigmoid(), cell.numel()
        loss = margin.new_zeros((), dtype=wide)
        if ce:
            # log(1 + exp(-|m|)) by log, not log1p: log1p is not vectorised (ten times slower), and the difference is below 6e-8.
            smooth = margin.abs().neg_().exp_().add_(1).log_().sum(pixels, dtype=wide)
            loss = loss + ce / num * (smooth + margin.clamp_min(0).sum(pixels, dtype=wide) - (margin * cell).sum(pixels, dtype=wide))
        both, predicted, true = (x.sum(pixels, dtype=wide) for x in (found * cell, found, cell))
        hit = torch.stack([num - predicted - true + both, both])
        sizes = torch.stack([2 * num - predicted - true, predicted + true]).clamp_min(1e-7)
        # As in smp, an absent class has no loss.
        there = torch.stack([num - true, true]) > 0
        loss = loss + dice * ((1 - 2 * hit / sizes) * there).mean(0)
        ctx.save_for_backward(found, cell, hit, sizes, there)
        ctx.weights, ctx.layout = (ce / num, dice), torch.empty_like(logits_B2HW)
        return loss.float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        found, cell, hit, sizes, there = ctx.saved_tensors
        ce, dice = ctx.weights
        # Of the score 2 hit / size of each class by the probability of "cell" at a pixel: steep + (flat where the pixel is a cell).
        steep = torch.stack([2 * (hit[0] - sizes[0]) / sizes[0] ** 2, -2 * hit[1] / sizes[1] ** 2])
        steep, flat = (steep * there).sum(0).float(), (2 / sizes * there).sum(0).float()
        by_found = (cell * flat).add_(steep).mul_(-dice / 2)
        by_margin = by_found.mul_(found * (1 - found)).add_(found - cell, alpha=ce).mul_(grad)
        out = ctx.layout
        out[:, 1].copy_(by_margin)
        out[:, 0].copy_(by_margin.neg_())
        return out, None, None, None
