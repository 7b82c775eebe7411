"""Renames the tensors of published weight files to timm's names, and loads them strictly.

Training heads, mask tokens and poolers may be left out. Any other key that the network does not have, any key that it lacks, and any shape
that differs is an error that lists them.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cellbench.errors import CellbenchError, first_names, quantity
from cellbench.models.backbones.weight_files import check_types

# The patch embedding (or a ConvNet's stem) shows under which prefix a file holds the network.
ANCHORS = (
    "patch_embed.proj.weight", "embeddings.patch_embeddings.projection.weight", "stem.0.weight", "stem_0.weight",
    "conv_stem.weight", "_conv_stem.weight",
)  # fmt: skip

# Parts that are only for training or classification, beside the network or inside it.
HEADS = re.compile(r"(.*\.)?(dino_head|ibot_head|dino_loss|ibot_patch_loss|head|classifier|_fc|pooler)\..*|(.*\.)?mask_token|student\..*")

# transformers' ViTModel and Dinov2Model (also Hibou's own copy of the latter) -> timm, after q, k and v are joined.
TRANSFORMERS = (
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.register_tokens$", "register_tokens"),
    (r"^encoder\.layer\.(\d+)\.", r"blocks.\1."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.(layernorm_before)\.", ".norm1."),
    (r"\.(layernorm_after)\.", ".norm2."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"\.mlp\.weights_in\.", ".mlp.fc1."),
    (r"\.mlp\.weights_out\.", ".mlp.fc2."),
    (r"^layernorm\.", "norm."),
)

# The modules of a block in EfficientNet-PyTorch -> timm, for blocks with and without an expansion.
EXPANDED = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
NOT_EXPANDED = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
AROUND = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2"}


def to_timm_names(state: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """The network's tensors under timm's names; ``where`` names the file in errors.

    Knows timm's own layout, DINOv2's (SwiGLU's ``w12``/``w3``, ``register_tokens``), training checkpoints with a ``teacher``,
    transformers' ViT and Dinov2 with or without registers, and EfficientNet-PyTorch's without squeeze-and-excitation. Tensors are views of
    the given ones, apart from joined q, k, v and class tokens.
    """
    root = _root(state, where)
    outside = [key for key in state if not key.startswith(root) and not HEADS.fullmatch(key)]
    if outside:
        raise CellbenchError(f"{where}: {_keys(outside)} beside the network '{root}*', not known to be training heads.")
    inside = {key[len(root) :]: value for key, value in state.items() if key.startswith(root)}
    inside = {key: value for key, value in inside.items() if not HEADS.fullmatch(key)}
    if ANCHORS[1] in inside:
        inside = _from_transformers(inside)
    if ANCHORS[5] in inside:
        inside = _from_efficientnet_pytorch(inside)
    inside = {re.sub(r"\.mlp\.w3\.", ".mlp.fc2.", re.sub(r"\.mlp\.w12\.", ".mlp.fc1.", key)): value for key, value in inside.items()}
    if "register_tokens" in inside and {"cls_token", "pos_embed"} <= inside.keys():
        # DINOv2 adds a position to the class token and none to the registers; timm's reg4 models keep positions for patches only.
        position = inside.pop("pos_embed")
        inside |= {"reg_token": inside.pop("register_tokens"), "pos_embed": position[:, 1:]}
        inside["cls_token"] = inside["cls_token"] + position[:, :1]
    return inside


def _root(state: dict[str, Tensor], where: str) -> str:
    roots = {key[: -len(anchor)] for anchor in ANCHORS for key in state if key == anchor or key.endswith("." + anchor)}
    teachers = {root for root in roots if root.startswith("teacher")}
    roots = teachers or {root for root in roots if not root.startswith("student")}
    if len(roots) != 1:
        found = "no known vision network" if not roots else f"{len(roots)} networks ({', '.join(sorted(roots))})"
        raise CellbenchError(f"{where}: holds {found}. Expected one patch embedding; its keys begin {_keys(list(state))}.")
    return roots.pop()


def _from_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        match = re.fullmatch(r"encoder\.layer\.(\d+)\.attention\.attention\.(query|key|value)\.(weight|bias)", key)
        if match:
            name = f"blocks.{match[1]}.attn.qkv.{match[3]}"
            names = [key.replace(f".{match[2]}.", f".{part}.") for part in ("query", "key", "value")]
            if name not in renamed and all(part in state for part in names):
                renamed[name] = torch.cat([state[part] for part in names])
            if name in renamed:
                continue
        for pattern, name in TRANSFORMERS:
            key = re.sub(pattern, name, key)
        renamed[key] = value
    return renamed


def _from_efficientnet_pytorch(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names of timm for a file of lukemelas/EfficientNet-PyTorch: it numbers the blocks throughout, timm by stage and within the stage.

    The blocks of a stage have the same number of output channels, and no two successive stages of an EfficientNet do.
    """
    places: dict[str, str] = {}
    stage, number, width = -1, 0, 0
    for index in itertools.count():
        output = state.get(f"_blocks.{index}._project_conv.weight")
        if output is None:
            break
        stage, number = (stage, number + 1) if len(output) == width else (stage + 1, 0)
        places[str(index)], width = f"blocks.{stage}.{number}", len(output)
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        match = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", key)
        module, _, tensor = key.rpartition(".")
        if match and match[1] in places:
            table = EXPANDED if f"_blocks.{match[1]}._expand_conv.weight" in state else NOT_EXPANDED
            key = f"{places[match[1]]}.{table.get(match[2], match[2])}.{match[3]}"
        elif module in AROUND:
            key = f"{AROUND[module]}.{tensor}"
        renamed[key] = value
    return renamed


def pretrained_tile_px(state: dict[str, Tensor], patch_px: int) -> int | None:
    """The tile side in px of a timm state's position grid; None without a square grid."""
    if "pos_embed" not in state:
        return None
    tokens = state["pos_embed"].shape[1]
    prefixes = 1 + (state["reg_token"].shape[1] if "reg_token" in state else 0)
    for prefix in (0, 1, prefixes):
        side = math.isqrt(max(tokens - prefix, 0))
        if side * side == tokens - prefix and side > 0:
            return side * patch_px
    return None


def load_strictly(net: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Loads a float32 copy of ``state`` into ``net``, on any device; both must have the same tensor names and shapes.

    Batch norm's counters of training steps may be missing: files converted from TensorFlow have none, and a frozen network reads none.
    A copy, since overwriting the memory-mapped file would change the weights. Peak memory: the file and one copy.
    """
    wanted = net.state_dict()
    state = {key: torch.zeros((), dtype=torch.int64) for key in wanted if key.endswith(".num_batches_tracked")} | state
    missing, extra = [k for k in wanted if k not in state], [k for k in state if k not in wanted]
    odd = [f"{k} {tuple(state[k].shape)} for {tuple(wanted[k].shape)}" for k in wanted if k in state and state[k].shape != wanted[k].shape]
    if missing or extra or odd:
        parts = (("lacks", missing), ("has too many:", extra), ("has another shape:", odd))
        differences = "; ".join(f"{what} {_keys(keys)}" for what, keys in parts if keys)
        raise CellbenchError(
            f"{where}: does not fit the network that the card describes: {differences}. Is it the right file for this card?"
        )
    check_types(state, wanted, where)
    own = {key: state[key].detach().to(wanted[key].dtype, copy=True).contiguous() for key in wanted}
    net.load_state_dict(own, strict=True, assign=True)
    stranded = [name for name, tensor in (*net.named_parameters(), *net.named_buffers()) if tensor.is_meta]
    assert not stranded, f"left without values: {stranded}"


def _keys(names: Sequence[str]) -> str:
    return f"{quantity(len(names), 'key')} ({first_names(names, 5)})"
