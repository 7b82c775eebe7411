"""Content of one mask by class: pixels, contacts between classes, and connected regions.

Letters: K classes.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from scipy import ndimage


@dataclass(frozen=True, kw_only=True, eq=False)
class ClassContent:
    """Counts of one mask, or summed over several; int64 each."""

    pixels: np.ndarray
    """(K,)."""
    contacts: np.ndarray
    """(K, K), symmetric: pairs of 4-neighbours by their two classes."""
    regions: np.ndarray
    """(K, K): connected regions of the row's class that touch the column's."""
    areas_px: np.ndarray
    """(K, K): the area of these regions."""

    def __add__(self, other: ClassContent) -> ClassContent:
        return ClassContent(**{field.name: getattr(self, field.name) + getattr(other, field.name) for field in fields(self)})

    def to_lists(self) -> dict[str, list[int]]:
        """For JSON; :meth:`of` reads it back."""
        return {field.name: getattr(self, field.name).tolist() for field in fields(self)}

    @classmethod
    def of(cls, lists: dict[str, list[int]]) -> ClassContent:
        return cls(**{name: np.array(values, np.int64) for name, values in lists.items()})


def class_content(classes: np.ndarray, num: int) -> tuple[ClassContent, np.ndarray]:
    """The content of a class map (H, W), and the areas of all its connected regions; pixels with a class of ``num`` or more do not count."""
    known = classes < num
    pixels = np.bincount(classes[known], minlength=num)[:num].astype(np.int64)
    contacts, regions, areas = (np.zeros((num, num), np.int64) for _ in range(3))
    present = [label for label in range(1, num) if pixels[label]]
    if len(present) > 1:  # a single class cannot be a part of another
        for first, second in ((np.s_[1:], np.s_[:-1]), (np.s_[:, 1:], np.s_[:, :-1])):
            a, b = classes[first], classes[second]
            at = (a != b) & known[first] & known[second]
            pairs = np.bincount(a[at].astype(np.int64) * num + b[at], minlength=num * num).reshape(num, num)
            contacts += pairs + pairs.T
    all_areas = [np.zeros(0, np.int64)]
    for label in present:
        parts, _ = ndimage.label(classes == label)
        size = np.bincount(parts.ravel())
        all_areas.append(size[1:])
        for other in present:
            if other != label and contacts[label, other]:
                touching = np.unique(parts[ndimage.binary_dilation(classes == other)])
                touching = touching[touching > 0]
                regions[label, other], areas[label, other] = len(touching), size[touching].sum()
    return ClassContent(pixels=pixels, contacts=contacts, regions=regions, areas_px=areas), np.concatenate(all_areas)
