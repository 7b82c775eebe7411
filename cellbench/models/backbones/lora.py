"""LoRA (Hu et al. 2022): frozen linear layers with a trained update of low rank beside them, for the last blocks of a backbone."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cellbench.errors import CellbenchError


class LoRALinear(nn.Module):
    """``x W^T + b + x A^T B^T`` with A of ``rank`` rows and B zero at first. W and b are frozen and in no state: they are the backbone's."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.register_buffer("weight", base.weight.detach(), persistent=False)
        self.register_buffer("bias", None if base.bias is None else base.bias.detach(), persistent=False)
        self.down = nn.Parameter(torch.empty(rank, base.in_features))
        self.up = nn.Parameter(torch.zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) + F.linear(F.linear(x, self.down), self.up)


def with_lora(tail: nn.Module, rank: int) -> nn.Module:
    """The same module with LoRA in every linear layer, all else frozen. Draws A from torch's generator; gives what it gave until it is trained.

    Raises CellbenchError where it has no linear layer.
    """
    tail.requires_grad_(False)
    found = [(module, name, child) for module in tail.modules() for name, child in module.named_children() if type(child) is nn.Linear]
    if not found:
        raise CellbenchError(
            f"lora_rank = {rank}: the last blocks of this backbone have no linear layers. Set lora_rank = 0 to train them whole."
        )
    for module, name, linear in found:
        setattr(module, name, LoRALinear(linear, rank).to(linear.weight.device))
    return tail
