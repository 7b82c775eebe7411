"""Splits grouped items into parts of given shares: keeps groups together and divides every stratum evenly."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from cellbench.errors import CellbenchError


def allocate(groups: Sequence[Hashable], strata: Sequence[Hashable], shares: Sequence[float], seed: Sequence[int]) -> np.ndarray:
    """The part (N,) int of each of N items: part p gets about ``shares[p]`` of all and of each stratum, and a group lies in one part.

    Greedy, the largest groups first, ties in an order drawn from ``seed``: each goes to the part that lacks most of its strata. If every group is a
    single item, parts differ from their shares by less than one item a stratum. Raises CellbenchError if a part would stay empty.

    >>> allocate(["a", "a", "b", "c"], [0, 0, 0, 0], [0.5, 0.5], [0]).tolist()
    [0, 0, 1, 1]
    """
    names, group_N = np.unique(np.array([str(g) for g in groups]), return_inverse=True)
    kinds, stratum_N = np.unique(np.array([str(s) for s in strata]), return_inverse=True)
    if len(names) < len(shares):
        raise CellbenchError(
            f"{len(groups)} images in {len(names)} groups are too few to split into {len(shares)} parts. Group more finely, or ask for fewer parts."
        )
    held_GS = np.zeros((len(names), len(kinds)), np.int64)
    np.add.at(held_GS, (group_N, stratum_N), 1)
    total_S = held_GS.sum(0)
    wanted_PS = np.outer(np.asarray(shares) / np.sum(shares), total_S)
    drawn = np.random.default_rng(list(seed)).permutation(len(names))
    order = drawn[np.argsort(-held_GS[drawn].sum(1), kind="stable")]
    part_G = np.empty(len(names), np.int64)
    empty = set(range(len(shares)))
    for left, g in zip(range(len(order), 0, -1), order, strict=True):
        gain_P = (wanted_PS * (held_GS[g] / total_S)).sum(1)
        # Ties go to the part with the fewest items; otherwise the first parts would get one more of every stratum.
        gain_P = gain_P + 1e-9 * wanted_PS.sum(1)
        if left <= len(empty):  # as many groups as empty parts are left
            gain_P[[p for p in range(len(shares)) if p not in empty]] = -np.inf
        part_G[g] = best = int(gain_P.argmax())
        wanted_PS[best] -= held_GS[g]
        empty.discard(best)
    return part_G[group_N]
