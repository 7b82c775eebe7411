"""Checks whether a whole image fits into memory as one backbone input. Estimated before anything is computed.

Measured with a ViT-Ti/16 in float32, twice each: a peak of 124 and 136 bytes per place and feature dimension for a frame of 672x896 px, 80 and
104 for 1344x1792. This includes attention, since torch's kernels do not materialise it. The head's part is measured: the bytes that one training
step saves for the backward pass, on a small frame.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import psutil
import torch
from torch import Tensor, nn

from cellbench.config.run import RunSpec
from cellbench.data.transforms.framing import Size
from cellbench.errors import CellbenchError
from cellbench.features.extractor import Batch, Features
from cellbench.features.frozen_backbone import FrozenBackbone
from cellbench.training.losses import parse_loss
from cellbench.training.model import SegmentationModel


class InsufficientMemoryError(CellbenchError):
    """A whole image does not fit into memory. The message gives the required and the free memory, and a remedy."""


BYTES_PER_VALUE = 136
"""Peak memory of the backbone per place and feature dimension."""


def free_bytes(device: torch.device) -> int:
    """Free memory of the device now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def backbone_bytes(backbone: FrozenBackbone, frame_px: Size) -> int:
    """Peak memory of the backbone for one frame."""
    if backbone.module is None:
        return 0
    return max(
        BYTES_PER_VALUE * level.dim * (frame_px[0] // level.stride_px) * (frame_px[1] // level.stride_px)
        for level in backbone.module.levels
    )


def why_too_large(backbone: FrozenBackbone, frame_px: Size, more_bytes: int = 0) -> str:
    """Why one frame and ``more_bytes`` do not fit into memory; empty if they do."""
    needed, there = backbone_bytes(backbone, frame_px) + more_bytes, free_bytes(backbone.machine.device)
    if needed <= there:
        return ""
    return (
        f"a whole image of {frame_px[1]} x {frame_px[0]} px needs about {needed / 2**30:.1f} GiB, and {there / 2**30:.1f} GiB are free. "
        "Use framing = 'tile', a smaller tile_scale, batch_size or backbone."
    )


def why_frames_too_large(runs: Sequence[RunSpec], models: Sequence[SegmentationModel], features: Features) -> str:
    """Why the runs of a cohort with whole images cannot be trained here; empty if they can, or if they use tiles."""
    if not features.framing.whole:
        return ""
    frame_px = max(features.tile_px.values())
    area = frame_px[0] * frame_px[1]
    # A batch is processed at once, one run after the other.
    most = max(
        (
            run.batch_size * area * _step_bytes(run, model, features)
            for run, model in zip(runs, models, strict=True)
            if run.ensemble == "none"
        ),
        default=0,
    )
    return why_too_large(features.backbone, frame_px, int(most))


def _step_bytes(run: RunSpec, model: SegmentationModel, features: Features) -> float:
    """Bytes per pixel of a frame that a training step of a head saves for the backward pass, its maps included."""
    side = features.framing.side_px
    device = features.backbone.machine.device
    pixels = torch.zeros(1, 3, side, side, device=device)
    batch = Batch(features.backbone.maps(pixels), pixels, torch.zeros(1, side, side, dtype=torch.long, device=device))
    probe = copy.deepcopy(model).train()  # batch norm would include the zeros in its statistics
    kept: dict[int, int] = {}

    def count(x: Tensor) -> Tensor:
        if not isinstance(x, nn.Parameter):
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.random.fork_rng(devices=[]), torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        with features.backbone.machine.autocast():
            logits = probe(batch)
        parse_loss(run.loss, features.plan.registry)(logits[:, : probe.num_classes], batch.target)
    return sum(kept.values()) / side**2
