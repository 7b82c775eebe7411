"""Finds similar descriptors among millions, in time that grows with their number and not with its square.

Descriptors are looked up by visual words (Sivic and Zisserman 2003): each belongs to its nearest word, and is compared with those of the words
nearest to it. The words themselves are looked up in cells (a vocabulary tree of two levels, Nister and Stewenius 2006).

Legend: M descriptors of D = 128 numbers, W words, C cells of words.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

PER_WORD = 150
"""Descriptors a word."""
FLAT = 512
"""Up to this number of words each is compared with all of them."""
CELLS = 6
"""Cells in which the words nearest to a descriptor are looked for. Of 240,000 descriptors, 6 of 40 cells hold the nearest word of 86 %, and 4 of 78 %.
The planted crops that are found are the same with 4 cells as with all words: features of one spot mostly take the same way."""
_CHUNK = 16384


@dataclass(frozen=True, kw_only=True, eq=False)
class Descriptors:
    """SIFT descriptors (M, 128) uint8, as vectors of length 1 where they are needed: as float32 all at once would take four times the memory."""

    values: np.ndarray
    """(M, 128) uint8"""
    order: np.ndarray | None = None
    """Order of the 128 numbers after mirroring; None: as they are."""

    def __len__(self) -> int:
        return len(self.values)

    @cached_property
    def _lengths(self) -> np.ndarray:
        parts = [self.values[k : k + _CHUNK].astype(np.float32) for k in range(0, len(self), _CHUNK)]
        return np.concatenate([np.maximum(np.linalg.norm(part, axis=1), 1) for part in parts]).astype(np.float32)

    def rows(self, which: np.ndarray | slice) -> np.ndarray:
        """Some of them, float32 of length 1."""
        rows = self.values[which].astype(np.float32) / self._lengths[which, None]
        return rows if self.order is None else rows[:, self.order]


class Words:
    """A vocabulary: a random sample of descriptors."""

    def __init__(self, descriptors: Descriptors) -> None:
        rng = np.random.default_rng(0)
        self.words_WD = descriptors.rows(np.sort(rng.choice(len(descriptors), max(1, len(descriptors) // PER_WORD), replace=False)))
        self._cells: list[np.ndarray] = []
        if len(self.words_WD) > FLAT:
            num = round(np.sqrt(len(self.words_WD)))
            self._centres_CD = self.words_WD[rng.choice(len(self.words_WD), num, replace=False)]
            home = np.concatenate(
                [(self.words_WD[k : k + _CHUNK] @ self._centres_CD.T).argmax(1) for k in range(0, len(self.words_WD), _CHUNK)]
            )
            self._cells = [np.flatnonzero(home == cell) for cell in range(num)]

    def __len__(self) -> int:
        return len(self.words_WD)

    def nearest(self, descriptors: Descriptors) -> np.ndarray:
        """(M, 2), or (M, 1) of one word: the nearest words, the nearest first."""
        look = self._in_cells if self._cells else self._among_all
        return np.concatenate([look(descriptors.rows(slice(k, k + _CHUNK))) for k in range(0, len(descriptors), _CHUNK)])

    def _among_all(self, rows_ND: np.ndarray) -> np.ndarray:
        return _first_two(rows_ND @ self.words_WD.T)[0]

    def _in_cells(self, rows_ND: np.ndarray) -> np.ndarray:
        near = np.argpartition(-(rows_ND @ self._centres_CD.T), CELLS - 1, axis=1)[:, :CELLS]
        cosine = np.full((len(rows_ND), 2 * CELLS), -2, np.float32)
        word = np.zeros((len(rows_ND), 2 * CELLS), np.int64)
        order = np.argsort(near.ravel(), kind="stable")
        starts = np.searchsorted(near.ravel()[order], np.arange(len(self._cells) + 1))
        for cell, members in enumerate(self._cells):
            row, place = np.divmod(order[starts[cell] : starts[cell + 1]], CELLS)
            if not len(row) or not len(members):
                continue
            found = rows_ND[row] @ self.words_WD[members].T
            best, values = _first_two(found)
            columns = place[:, None] * 2 + np.arange(best.shape[1])
            cosine[row[:, None], columns] = values
            word[row[:, None], columns] = members[best]
        return np.take_along_axis(word, _first_two(cosine)[0], 1)


def _first_two(values_NK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The columns of the two highest values of each row, (N, 2), or (N, 1) of one column, the highest first, and these values.

    Overwrites the highest. Two searches take half the time of a partition.
    """
    rows = np.arange(len(values_NK))
    columns, values = [], []
    for _ in range(min(2, values_NK.shape[1])):
        columns.append(values_NK.argmax(1))
        values.append(values_NK[rows, columns[-1]])
        values_NK[rows, columns[-1]] = -np.inf
    return np.stack(columns, 1), np.stack(values, 1)


def find_matches(values_MD: np.ndarray, image_M: np.ndarray, mirrored_D: np.ndarray, min_cosine: float) -> np.ndarray:
    """(K, 3) int64: mirrored, a descriptor and a similar one of a later image.

    Of each descriptor the two nearest in each of its two nearest words, as it is and mirrored. ``values_MD``: uint8; ``image_M``: the image that
    each belongs to, ascending; ``mirrored_D``: the order of its numbers after mirroring.
    """
    members = Descriptors(values=values_MD)
    words = Words(members)
    nearest = words.nearest(members)
    mirrored = Descriptors(values=values_MD, order=mirrored_D)
    found = [
        _matches(members, queries, nearest[:, 0], query_words, image_M, min_cosine)
        for queries, query_words in ((members, nearest), (mirrored, words.nearest(mirrored)))
    ]
    return np.concatenate([np.insert(pairs, 0, mirrored, axis=1) for mirrored, pairs in enumerate(found)])


def _matches(
    members: Descriptors, queries: Descriptors, home_M: np.ndarray, query_words: np.ndarray, image_M: np.ndarray, min_cosine: float
) -> np.ndarray:
    """(K, 2): pairs of positions, the smaller first. ``query_words`` (M, 1 or 2): the words in which the queries are compared."""
    by_home, by_query = np.argsort(home_M, kind="stable"), np.argsort(query_words.ravel(), kind="stable")
    num_words = int(max(home_M.max(), query_words.max())) + 1
    home_starts = np.searchsorted(home_M[by_home], np.arange(num_words + 1))
    query_starts = np.searchsorted(query_words.ravel()[by_query], np.arange(num_words + 1))
    found = [np.zeros((0, 2), np.int64)]
    for word in range(num_words):
        query = by_query[query_starts[word] : query_starts[word + 1]] // query_words.shape[1]
        member = by_home[home_starts[word] : home_starts[word + 1]]
        if not len(query) or not len(member):
            continue
        cosine = queries.rows(query) @ members.rows(member).T
        cosine[image_M[query][:, None] == image_M[member][None]] = 0
        best, values = _first_two(cosine)
        row, column = np.nonzero(values >= min_cosine)
        one, other = query[row], member[best[row, column]]
        found.append(np.stack([np.minimum(one, other), np.maximum(one, other)], 1))
    return np.concatenate(found)
