"""Reads weight files: checks that a file is complete, loads its tensors, and checks that their values are plausible for a trained network.

Reads safetensors, and torch files with ``weights_only=True``, mapped into memory. Code in a weights file is never run.
"""

from __future__ import annotations

import json
import math
import pickle
import re
import struct
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from cellbench.errors import WeightsUnavailable, one_line

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")


def check_whole(path: Path) -> None:
    """Reads the two ends of a file. Raises WeightsUnavailable for a web page, a Git LFS pointer, an empty, truncated or unknown file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(1024)
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not head:
        raise WeightsUnavailable(f"{path}: the file is empty. Delete it and download it again.")
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise WeightsUnavailable(
            f"{path}: is a web page, not weights: a login or error page was saved under this name. "
            "Delete it, and download the file itself (in a browser: its own download link, when logged in)."
        )
    if text.startswith(b"version https://git-lfs"):
        raise WeightsUnavailable(f"{path}: is a Git LFS pointer, not weights. Run 'git lfs pull' there, or download the file itself.")
    if is_safetensors(path):
        _check_safetensors(path, size)
    elif head.startswith(b"PK"):
        # A torch file is a zip file with its table of contents at the end.
        if not zipfile.is_zipfile(path):
            raise _truncated(path, size)
    elif not head.startswith(b"\x80"):
        raise WeightsUnavailable(f"{path}: is neither a torch file nor safetensors (it begins {head[:8]!r}). Put the published file there.")


def is_safetensors(path: Path) -> bool:
    """By content (the length of a JSON header, then the header), since files in the hub's cache have no suffix."""
    with path.open("rb") as file:
        head = file.read(9)
    return len(head) == 9 and head[8:] == b"{" and struct.unpack("<Q", head[:8])[0] < 100_000_000


def _check_safetensors(path: Path, size: int) -> None:
    with path.open("rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        header = file.read(length)
    if len(header) < length:
        raise _truncated(path, size)
    try:
        table = json.loads(header)
        expected = 8 + length + max((row["data_offsets"][1] for name, row in table.items() if name != "__metadata__"), default=0)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise WeightsUnavailable(f"{path}: its safetensors header cannot be read. Delete the file and download it again.") from None
    if size < expected:
        raise _truncated(path, size, expected)
    if size > expected:
        raise WeightsUnavailable(f"{path}: {size - expected} bytes follow the last tensor. Delete the file and download it again.")


def _truncated(path: Path, size: int, expected: int = 0) -> WeightsUnavailable:
    whole = f" of {expected}" if expected else ""
    return WeightsUnavailable(f"{path}: is truncated: it ends after {size}{whole} bytes. Delete it and download it again.")


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, on the CPU, memory-mapped; names of nested dicts are joined with dots (``teacher.backbone.…``).

    Other values (an epoch number) are left out. Raises WeightsUnavailable for a file that is damaged or would run code.
    """
    check_whole(path)
    if is_safetensors(path):
        import safetensors.torch

        try:
            state = safetensors.torch.load_file(path)
        except (safetensors.SafetensorError, KeyError, ValueError) as error:  # KeyError: a type that torch does not have
            raise WeightsUnavailable(f"{path}: is damaged ({one_line(error)[:120]}). Delete it and download it again.") from None
        check_scales(state, str(path))
        return state
    import torch

    with path.open("rb") as file:
        mapped = file.read(2) == b"PK"  # torch before 1.6 wrote plain pickles, which cannot be mapped
    try:
        tree = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL (\S+)", str(error))
        what = f"the object {name[1]}" if name else "objects"
        raise WeightsUnavailable(
            f"{path}: holds {what} beside tensors, which can only be loaded by running code; cellbench never does. "
            "Ask the publisher for safetensors, or, if you trust the file, save its state_dict alone."
        ) from error
    except (RuntimeError, EOFError, zipfile.BadZipFile) as error:
        why = one_line(error)[:120]
        raise WeightsUnavailable(f"{path}: is damaged, torch cannot read it ({why}). Delete it and download it again.") from error
    state = _flat(tree)
    if not state:
        raise WeightsUnavailable(f"{path}: holds no named tensors. Expected a state_dict, or a checkpoint with one inside.")
    check_scales(state, str(path))
    return state


def _flat(tree: object, prefix: str = "") -> dict[str, Tensor]:
    import torch

    if isinstance(tree, torch.Tensor):
        return {prefix: tree}
    found: dict[str, Tensor] = {}
    if isinstance(tree, dict):
        for key, value in tree.items():
            found |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return found


# --- values ---------------------------------------------------------------------------------------------------------------------------

PUBLISHED = "The file is damaged or was converted wrongly: delete it and get the published one again."


def check_scales(state: Mapping[str, Tensor], where: str) -> None:
    """Raises WeightsUnavailable for a quantised file (matrices of 8-bit numbers) that lacks the scales."""
    if any("scale" in name or "absmax" in name for name in state):
        return
    for name, x in state.items():
        if x.element_size() == 1 and is_matrix(x) and str(x.dtype) != "torch.bool":
            raise WeightsUnavailable(
                f"{where}: {name} holds {_type(x)} numbers, and the file has no scales for them: it is quantised. {PUBLISHED}"
            )


def check_types(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], where: str, remedy: str = PUBLISHED) -> None:
    """Raises WeightsUnavailable for an integer or 8-bit tensor where the network's, ``wanted``, is floating-point."""
    for name, x in state.items():
        if name in wanted and wanted[name].is_floating_point() and (not x.is_floating_point() or x.element_size() == 1):
            raise WeightsUnavailable(f"{where}: {name} holds {_type(x)} numbers where the network has floating-point weights. {remedy}")


def check_values(
    state: Mapping[str, Tensor],
    parameters: Collection[str],
    where: str,
    remedy: str = PUBLISHED,
    *,
    names: Collection[str] = (),
    built: Mapping[str, Tensor] | None = None,
) -> None:
    """Raises WeightsUnavailable, with the tensor's name, for values that training cannot produce.

    These are values that are not finite, weight matrices of zeros (a file that was never filled) or of integers only (quantised, without
    scales), and a network in which all matrices are constant. Vectors, position tables and gates may be zero; buffers may hold -inf, as
    attention masks do.

    ``parameters``: the names in ``state`` that are trained; the others are buffers. ``names``: those in the file, for the message.
    ``built``: the network's tensors before loading; a matrix that was constant already is allowed. Takes 0.2 s for 10**9 values.
    """
    import torch

    constant: dict[str, bool] = {}
    for name, x in state.items():
        if not x.is_floating_point() or x.is_meta or not x.numel():
            continue
        low, high = (float(value) for value in torch.aminmax(x))  # NaN if any value is
        trained = name in parameters
        as_built = built is not None and low == high and name in built and bool((built[name] == low).all())
        if low != low or high == math.inf or (low == -math.inf and trained):
            what = f"holds {int((~torch.isfinite(x)).sum())} of {x.numel()} values that are not finite (NaN or infinite)"
        elif as_built or not trained or not name.endswith("weight") or not is_matrix(x):
            continue
        elif low == high == 0:
            what = "holds only zeros, where the network has a matrix of weights"
        elif max(-low, high) < 2**16 and _all_integers(x):  # all floats above 2**24 are integers
            what = f"holds only integers ({low:g} to {high:g}), as a quantised file without its scales does"
        else:
            constant[name] = low == high
            continue
        shown = next((known for known in names if name == known or name.endswith(f".{known}")), name)
        raise WeightsUnavailable(f"{where}: {shown} {what}. {remedy}")
    if len(constant) > 1 and all(constant.values()):
        raise WeightsUnavailable(f"{where}: {next(iter(constant))} and all its other weight matrices hold one value each. {remedy}")


def is_matrix(x: Tensor) -> bool:
    """Whether a tensor has at least two axes longer than 1: the weights of a layer, not a vector, gate or token."""
    return sum(side > 1 for side in x.shape) > 1


def _all_integers(x: Tensor) -> bool:
    flat = x.flatten()
    some = flat[:: max(1, len(flat) // 1024)]  # nearly always enough to find a non-integer
    return bool((some == some.round()).all()) and bool((flat == flat.round()).all())


def _type(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")
