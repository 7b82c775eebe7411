"""Losses over class scores, from segmentation-models-pytorch, weighted by name as the experiment file writes them.

Always computed in float32: smp's Dice and Lovász give NaN in half precision (measured).
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from cellbench.spec import loss_weights

Loss = Callable[[Tensor, Tensor], Tensor]


def loss_of(text: str) -> Loss:
    """The loss that ``text`` writes, for example ``0.5 ce + 0.5 dice``: (logits (B, C, H, W), target (B, H, W) int64) -> scalar.

    ``ce`` is cross-entropy over classes, ``bce`` binary cross-entropy of each class against the rest; the others are smp's
    multi-class losses. Dice, Jaccard and Tversky there sum over the batch, so their value depends on the batch's size.
    """
    terms = [(weight, _term(name)) for name, weight in loss_weights(text).items() if weight]

    def total(logits_BCHW: Tensor, target_BHW: Tensor) -> Tensor:
        logits = logits_BCHW.float()
        return sum((weight * term(logits, target_BHW) for weight, term in terms), start=logits.new_zeros(()))

    return total


def _term(name: str) -> Loss:
    if name == "ce":
        return F.cross_entropy
    if name == "bce":
        return lambda logits, target: F.binary_cross_entropy_with_logits(logits, F.one_hot(target, logits.shape[1]).movedim(-1, 1).float())
    # Imported here: smp brings timm and torchvision along, 2 s that cross-entropy does not need.
    from segmentation_models_pytorch import losses as smp

    kinds = {"dice": smp.DiceLoss, "jaccard": smp.JaccardLoss, "tversky": smp.TverskyLoss, "focal": smp.FocalLoss, "lovasz": smp.LovaszLoss}
    return kinds[name](mode="multiclass")
