"""Losses over class scores, from segmentation-models-pytorch, weighted by name as the experiment file writes them.

Always computed in float32: smp's Dice and Lovász give NaN in half precision (measured).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cellbench.config.run import loss_weights
from cellbench.data.transforms.cell_targets import FULL, TARGETS
from cellbench.metrics.pixel import IGNORE

Loss = Callable[[Tensor, Tensor], Tensor]


def parse_loss(text: str) -> Callable[..., Tensor]:
    """The loss that ``text`` writes, for example ``0.5 ce + 0.5 dice``: (logits (B, C, H, W), target (B, H, W) int64) -> scalar; or,
    for N models that see the same tiles, (logits (N, B, C, H, W), the same target) -> (N,).

    ``ce`` is cross-entropy over classes, ``bce`` binary cross-entropy of each class against the rest; the others are smp's
    multi-class losses. Dice, Jaccard and Tversky there sum over the batch, so their value depends on the batch's size.

    With a third argument True, pixels whose target is ``IGNORE`` are left out, as if the batch had no such pixels; 0 where it has no others.
    It must be True where there are any: a GPU would have to wait for the answer if this were looked up here.
    """
    weights = {name: weight for name, weight in loss_weights(text).items() if weight}
    terms = [(weight, _term(name)) for name, weight in weights.items()]

    def total(logits_BCHW: Tensor, target_BHW: Tensor, ignoring: bool = False) -> Tensor:
        if ignoring:
            kept_BHW = target_BHW != IGNORE
            if not kept_BHW.any():
                return 0 * logits_BCHW.float().flatten(-4).sum(-1)
            # One row of pixels: all terms are means or sums over the batch's pixels, wherever these lie.
            logits_BCHW = logits_BCHW.movedim(-3, -1).flatten(-4, -2)[..., kept_BHW.flatten(), :].movedim(-1, -2)[..., None, :, :, None]
            target_BHW = target_BHW[kept_BHW][None, :, None]
        if logits_BCHW.shape[-3] == 2 and weights.keys() <= {"ce", "dice"}:
            return two_classes(logits_BCHW, target_BHW, weights.get("ce", 0.0), weights.get("dice", 0.0))
        if logits_BCHW.dim() > 4:
            return torch.stack([total(one, target_BHW) for one in logits_BCHW])
        logits = logits_BCHW.float()
        return sum((weight * term(logits, target_BHW) for weight, term in terms), start=logits.new_zeros(()))

    return total


def two_classes(logits_B2HW: Tensor, target_BHW: Tensor, ce: float, dice: float) -> Tensor:
    """``ce`` times cross-entropy plus ``dice`` times smp's multi-class Dice loss, for two classes; (N,) where the logits are (N, B, 2, H, W).

    The same value and gradient to rounding, for a quarter of the time: two classes have one number that decides, the margin, and their sums
    follow from three. Measured for a tile of 224 px on one core, backwards included: 2.0 ms by torch and smp, nearly as much as the
    `bilinear` head with everything else.
    """
    return _TwoClasses.apply(logits_B2HW, target_BHW, ce, dice)


class _TwoClasses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_B2HW: Tensor, target_BHW: Tensor, ce: float, dice: float) -> Tensor:
        # Wide sums; a Mac's GPU has none wider than its own numbers.
        wide, pixels = torch.float32 if logits_B2HW.device.type == "mps" else torch.float64, (-3, -2, -1)
        margin, cell = logits_B2HW.select(-3, 1).float() - logits_B2HW.select(-3, 0).float(), (target_BHW == 1).float()
        found, num = margin.sigmoid(), cell.numel()
        loss = margin.new_zeros((), dtype=wide)
        if ce:
            # log(1 + exp(-|m|)) by log, not log1p: that is not vectorised (ten times slower), and what it adds is below 6e-8.
            smooth = margin.abs().neg_().exp_().add_(1).log_().sum(pixels, dtype=wide)
            loss = loss + ce / num * (smooth + margin.clamp_min(0).sum(pixels, dtype=wide) - (margin * cell).sum(pixels, dtype=wide))
        both, predicted, true = (x.sum(pixels, dtype=wide) for x in (found * cell, found, cell))
        hit = torch.stack([num - predicted - true + both, both])
        sizes = torch.stack([2 * num - predicted - true, predicted + true]).clamp_min(1e-7)
        # As smp has it, a class that is not there counts as got right.
        there = (torch.stack([num - true, true]) > 0).view(2, *(1,) * both.dim())
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
        steep, flat, grad = (_everywhere(x) for x in ((steep * there).sum(0).float(), (2 / sizes * there).sum(0).float(), grad))
        by_found = (cell * flat).add_(steep).mul_(-dice / 2)
        by_margin = by_found.mul_(found * (1 - found)).add_(found - cell, alpha=ce).mul_(grad)
        out = ctx.layout
        out.select(-3, 1).copy_(by_margin)
        out.select(-3, 0).copy_(by_margin.neg_())
        return out, None, None, None


def _everywhere(x: Tensor) -> Tensor:
    """One number a model, for all its pixels (B, H, W)."""
    return x[..., None, None, None]


def _term(name: str) -> Loss:
    if name == "ce":
        return F.cross_entropy
    if name == "bce":
        return lambda logits, target: F.binary_cross_entropy_with_logits(logits, F.one_hot(target, logits.shape[1]).movedim(-1, 1).float())
    # Imported here: smp brings timm and torchvision along, 2 s that cross-entropy does not need.
    from segmentation_models_pytorch import losses as smp

    kinds = {"dice": smp.DiceLoss, "jaccard": smp.JaccardLoss, "tversky": smp.TverskyLoss, "focal": smp.FocalLoss, "lovasz": smp.LovaszLoss}
    return kinds[name](mode="multiclass")


def targets_loss(logits_BAHW: Tensor, truth_BHW2: Tensor, which: tuple[str, ...], kept_BHW: Tensor | None = None) -> Tensor:
    """Binary cross-entropy of the requested targets, each a mean over all pixels, summed; the truth as :func:`make_targets` gives it, (B, H, W, 2) uint8.

    ``kept_BHW`` bool: the pixels that count; None: all. 0 where none does.
    """
    wanted = truth_BHW2[..., [TARGETS.index(aim) for aim in which]].movedim(-1, 1).float() / FULL
    if kept_BHW is not None:
        if not kept_BHW.any():
            return 0 * logits_BAHW.float().sum()
        logits_BAHW, wanted = (x.movedim(1, -1)[kept_BHW] for x in (logits_BAHW, wanted))
    return F.binary_cross_entropy_with_logits(logits_BAHW.float(), wanted) * len(which)
