"""What the contracts share: how a reason is had from a contract that raises, and when two results are the same."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cellbench.errors import one_line


def failure_reason(contract: Callable[[], str]) -> str:
    """What the contract says, or, where the code under it raises, what it raised."""
    try:
        return contract()
    except Exception as error:  # a stranger's code may raise anything, and whatever it raises breaks the contract
        return f"{type(error).__name__}: {one_line(error)[:200]}"


def all_close(a: Tensor, b: Tensor) -> bool:
    """The same to 1e-4: batches of another size sum in another order, which costs about 1e-6 in float32."""
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-4)
