"""Losses over class scores, from segmentation-models-pytorch, weighted by name as the experiment file writes them.

Always computed in float32: smp's Dice and Lovász give NaN in half precision (measured).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cellbench.spec import loss_weights

Loss = Callable[[Tensor, Tensor], Tensor]


def loss_of(text: str) -> Loss:
    """The loss that ``text`` writes, for example ``0.5 ce + 0.5 dice``: (logits (B, C, H, W), target (B, H, W) int64) -> scalar.

    ``ce`` is cross-entropy over classes, ``bce`` binary cross-entropy of each class against the rest; the others are smp's
    multi-class losses. Dice, Jaccard and Tversky there sum over the batch, so their value depends on the batch's size.
    """
    weights = {name: weight for name, weight in loss_weights(text).items() if weight}
    terms = [(weight, _term(name)) for name, weight in weights.items()]

    def total(logits_BCHW: Tensor, target_BHW: Tensor) -> Tensor:
        if logits_BCHW.shape[1] == 2 and weights.keys() <= {"ce", "dice"}:
            return two_classes(logits_BCHW, target_BHW, weights.get("ce", 0.0), weights.get("dice", 0.0))
        logits = logits_BCHW.float()
        return sum((weight * term(logits, target_BHW) for weight, term in terms), start=logits.new_zeros(()))

    return total


def two_classes(logits_B2HW: Tensor, target_BHW: Tensor, ce: float, dice: float) -> Tensor:
    """``ce`` times cross-entropy plus ``dice`` times smp's multi-class Dice loss, for two classes.

    The same value and gradient to rounding, for a quarter of the time: two classes have one number that decides, the margin, and their sums
    follow from three. Measured for a tile of 224 px on one core, backwards included: 2.0 ms by torch and smp, nearly as much as the
    `bilinear` head with everything else.
    """
    return _TwoClasses.apply(logits_B2HW, target_BHW, ce, dice)


class _TwoClasses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_B2HW: Tensor, target_BHW: Tensor, ce: float, dice: float) -> Tensor:
        margin, cell = logits_B2HW[:, 1].float() - logits_B2HW[:, 0].float(), (target_BHW == 1).float()
        found, num = margin.sigmoid(), cell.numel()
        loss = margin.new_zeros((), dtype=torch.float64)
        if ce:
            # log(1 + exp(-|m|)) by log, not log1p: that is not vectorised (ten times slower), and what it adds is below 6e-8.
            smooth = margin.abs().neg_().exp_().add_(1).log_().sum(dtype=torch.float64)
            loss = loss + ce / num * (smooth + margin.clamp_min(0).sum(dtype=torch.float64) - (margin * cell).sum(dtype=torch.float64))
        both, predicted, true = ((x).sum(dtype=torch.float64) for x in (found * cell, found, cell))
        hit = torch.stack([num - predicted - true + both, both])
        sizes = torch.stack([2 * num - predicted - true, predicted + true]).clamp_min(1e-7)
        there = torch.stack([num - true, true]) > 0  # as smp has it, a class that is not there counts as got right
        loss = loss + dice * ((1 - 2 * hit / sizes) * there).mean()
        ctx.save_for_backward(found, cell, hit, sizes, there)
        ctx.weights, ctx.layout = (ce / num, dice), torch.empty_like(logits_B2HW)
        return loss.float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        found, cell, hit, sizes, there = ctx.saved_tensors
        ce, dice = ctx.weights
        # Of the score 2 hit / size of each class by the probability of "cell" at a pixel: steep + (flat where the pixel is a cell).
        steep = torch.stack([2 * (hit[0] - sizes[0]) / sizes[0] ** 2, -2 * hit[1] / sizes[1] ** 2])
        flat = 2 / sizes
        by_found = (cell * (flat * there).sum().float()).add_((steep * there).sum().float()).mul_(-dice / 2)
        by_margin = by_found.mul_(found * (1 - found)).add_(found - cell, alpha=ce).mul_(grad)
        out = ctx.layout
        out[:, 1] = by_margin
        out[:, 0] = by_margin.neg_()
        return out, None, None, None


def _term(name: str) -> Loss:
    if name == "ce":
        return F.cross_entropy
    if name == "bce":
        return lambda logits, target: F.binary_cross_entropy_with_logits(logits, F.one_hot(target, logits.shape[1]).movedim(-1, 1).float())
    # Imported here: smp brings timm and torchvision along, 2 s that cross-entropy does not need.
    from segmentation_models_pytorch import losses as smp

    kinds = {"dice": smp.DiceLoss, "jaccard": smp.JaccardLoss, "tversky": smp.TverskyLoss, "focal": smp.FocalLoss, "lovasz": smp.LovaszLoss}
    return kinds[name](mode="multiclass")
