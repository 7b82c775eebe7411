"""Batch norm whose statistics at test time are fused with those of each tile."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FusedBatchNorm(nn.BatchNorm2d):
    """In eval mode, mean and variance are those of training and those of the tile itself, averaged by ``own_share``; in training, batch norm.

    A tile's output does not depend on the rest of its batch. State and names are those of ``nn.BatchNorm2d``.
    """

    own_share = 0.0
    """0: training's statistics alone; 1: the tile's alone, as instance norm."""

    def forward(self, x_BDhw: Tensor) -> Tensor:
        if self.training or not self.own_share or self.running_mean is None or self.running_var is None:
            return super().forward(x_BDhw)
        # Around the mean of training, in single sums: torch's variance takes three times as long on channels-last maps.
        centred_BDhw = x_BDhw.float() - self.running_mean[:, None, None]
        offset_BD = centred_BDhw.mean((2, 3))
        var_BD = (centred_BDhw.square().mean((2, 3)) - offset_BD.square()).clamp_min(0)
        mean_BD = self.running_mean + offset_BD
        mean_BD = torch.lerp(self.running_mean.expand_as(mean_BD), mean_BD, self.own_share)
        var_BD = torch.lerp(self.running_var.expand_as(var_BD), var_BD, self.own_share)
        factor_BD = (var_BD + self.eps).rsqrt()
        if self.weight is not None:
            factor_BD = factor_BD * self.weight
        shift_BD = -mean_BD * factor_BD
        if self.bias is not None:
            shift_BD = shift_BD + self.bias
        return torch.addcmul(shift_BD[..., None, None], x_BDhw.float(), factor_BD[..., None, None]).to(x_BDhw.dtype)


def with_fused_norms(module: nn.Module) -> list[FusedBatchNorm]:
    """Replaces the batch norms inside a module, which keep their parameters and statistics; returns the new ones."""
    made = []
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.BatchNorm2d:
                norm = FusedBatchNorm(child.num_features, child.eps, child.momentum, child.affine, child.track_running_stats)
                norm.load_state_dict(child.state_dict())
                setattr(parent, name, norm)
                made.append(norm)
    return made
