"""DINOv2's forward pass, written from its paper and its key names alone: what the loaders are compared with, no timm in it.

A state in the published names goes in (``blocks.0.attn.qkv.weight``, ``ls1.gamma``, ``mlp.w12``…), the normed patch tokens of every block
come out. Also writes such a state in the names of other publishers.
"""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor
from torch.nn import functional


def published_state(
    dim: int, depth: int, *, patch_px: int = 14, registers: int = 0, swiglu: int = 0, scaled: bool = True, side: int = 16, seed: int = 0
) -> dict[str, Tensor]:
    """Random weights in DINOv2's names. ``swiglu``: hidden width, 0 for a plain MLP. ``scaled``: with LayerScale. ``side`` of positions."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int, std: float = 0.02, mean: float = 0.0) -> Tensor:
        return torch.randn(shape, generator=g).mul_(std).add_(mean)

    state = {"cls_token": draw(1, 1, dim), "mask_token": draw(1, dim), "pos_embed": draw(1, side * side + 1, dim, std=0.5)}
    if registers:
        state["register_tokens"] = draw(1, registers, dim)
    state |= {"patch_embed.proj.weight": draw(dim, 3, patch_px, patch_px), "patch_embed.proj.bias": draw(dim)}
    linear = {"attn.qkv": (3 * dim, dim), "attn.proj": (dim, dim)}
    linear |= {"mlp.w12": (2 * swiglu, dim), "mlp.w3": (dim, swiglu)} if swiglu else {"mlp.fc1": (4 * dim, dim), "mlp.fc2": (dim, 4 * dim)}
    for i in range(depth):
        for name, (rows, columns) in linear.items():
            state[f"blocks.{i}.{name}.weight"] = draw(rows, columns, std=2 / math.sqrt(columns))
            state[f"blocks.{i}.{name}.bias"] = draw(rows)
        for name in ("norm1", "norm2"):
            state |= {f"blocks.{i}.{name}.weight": draw(dim, mean=1.0, std=0.1), f"blocks.{i}.{name}.bias": draw(dim)}
        for name in ("ls1", "ls2") if scaled else ():
            state[f"blocks.{i}.{name}.gamma"] = draw(dim, mean=0.5, std=0.1)
    return state | {"norm.weight": draw(dim, mean=1.0, std=0.1), "norm.bias": draw(dim)}


def patch_tokens(state: dict[str, Tensor], x_BCHW: Tensor, heads: int, eps: float = 1e-6) -> list[Tensor]:
    """The normed patch tokens of every block as maps (B, D, h, w)."""
    dim = state["norm.weight"].shape[0]
    weight = state["patch_embed.proj.weight"]
    patches_BDhw = functional.conv2d(x_BCHW, weight, state["patch_embed.proj.bias"], stride=weight.shape[-1])
    batch, _, h, w = patches_BDhw.shape
    position = state["pos_embed"]
    side = math.isqrt(position.shape[1] - 1)
    grid_1Dhw = position[:, 1:].reshape(1, side, side, dim).permute(0, 3, 1, 2)
    if (h, w) != (side, side):
        grid_1Dhw = functional.interpolate(grid_1Dhw, size=(h, w), mode="bicubic", antialias=True)
    first = [(state["cls_token"] + position[:, :1]).expand(batch, -1, -1)]
    if "register_tokens" in state:
        first.append(state["register_tokens"].expand(batch, -1, -1))
    x = torch.cat([*first, (patches_BDhw + grid_1Dhw).flatten(2).transpose(1, 2)], 1)
    prefix = x.shape[1] - h * w

    def norm(y: Tensor, name: str) -> Tensor:
        return functional.layer_norm(y, (dim,), state[f"{name}.weight"], state[f"{name}.bias"], eps)

    def linear(y: Tensor, name: str) -> Tensor:
        return functional.linear(y, state[f"{name}.weight"], state[f"{name}.bias"])

    maps = []
    for i in range(sum(key.endswith("norm1.weight") for key in state)):
        b = f"blocks.{i}"
        q, k, v = linear(norm(x, f"{b}.norm1"), f"{b}.attn.qkv").reshape(batch, -1, 3, heads, dim // heads).permute(2, 0, 3, 1, 4)
        attention = (q @ k.transpose(-1, -2) / math.sqrt(dim // heads)).softmax(-1)
        y = linear((attention @ v).transpose(1, 2).reshape(batch, -1, dim), f"{b}.attn.proj")
        x = x + y * state.get(f"{b}.ls1.gamma", torch.ones(()))
        y = norm(x, f"{b}.norm2")
        if f"{b}.mlp.w12.weight" in state:
            gate, value = linear(y, f"{b}.mlp.w12").chunk(2, -1)
            y = linear(functional.silu(gate) * value, f"{b}.mlp.w3")
        else:
            y = linear(functional.gelu(linear(y, f"{b}.mlp.fc1")), f"{b}.mlp.fc2")
        x = x + y * state.get(f"{b}.ls2.gamma", torch.ones(()))
        maps.append(norm(x, "norm")[:, prefix:].transpose(1, 2).reshape(batch, dim, h, w))
    return maps


# DINOv2's names -> transformers' (conversion scripts of Dinov2Model and ViTModel), q, k and v apart.
DINOV2_NAMES = (
    (r"^(cls_token|mask_token|register_tokens)$", r"embeddings.\1"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj", "embeddings.patch_embeddings.projection"),
    (r"^norm\.", "layernorm."),
    (r"^blocks\.", "encoder.layer."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
)
DINOV2_BLOCKS = (
    (r"\.ls([12])\.gamma", r".layer_scale\1.lambda1"),
    (r"\.mlp\.w12\.", ".mlp.weights_in."),
    (r"\.mlp\.w3\.", ".mlp.weights_out."),
)
VIT_BLOCKS = (
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)


def as_transformers(state: dict[str, Tensor], *, vit: bool) -> dict[str, Tensor]:
    """The same weights as transformers' Dinov2Model, or ViTModel with a pooler, would save them, in the order that safetensors keeps."""
    out = {}
    for key, value in state.items():
        name = key
        for pattern, new in (*DINOV2_NAMES, *(VIT_BLOCKS if vit else DINOV2_BLOCKS)):
            name = re.sub(pattern, new, name)
        if ".attn.qkv." in name:
            for part, third in zip(("query", "key", "value"), value.chunk(3), strict=True):
                out[name.replace(".attn.qkv.", f".attention.attention.{part}.")] = third.contiguous()
        elif not (vit and "mask_token" in name):
            out[name] = value
    if vit:
        out["pooler.dense.weight"] = torch.zeros(4, 4)
    return dict(sorted(out.items()))
