"""Which class each category of an annotation file becomes: by the card, else by the categories themselves."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from cellbench.config.cards import DatasetCard
from cellbench.errors import CellbenchError, quote_name
from cellbench.metrics.pixel import IGNORE

NOT_CELLS = ("background", "bg", "_background_", "__background__")
NOT_SCORED = ("ignore", "_ignore_", "__ignore__", "ignore*")
"""Lower-case names of categories that never denote a kind of cell in exports."""


def classes_of_categories(
    card: DatasetCard, file: Path, counts: Mapping[str, int], what: str = "COCO categories"
) -> tuple[tuple[str, ...], dict[str, int | None], str]:
    """The classes, the class number of each category (``IGNORE``; None: left out), and a note on them.

    The card decides, by ``categories`` or by the names of its ``classes``. Otherwise a single category is the cell, and each of several is a
    class. Raises CellbenchError for a category that the card does not cover.
    """
    explicit = "classes" in card.model_fields_set
    targets = [name for name in dict.fromkeys(card.categories.values()) if name not in ("", "ignore")]
    labels: dict[str, int | None] = {}
    if unknown_names := [name for name in card.categories if name not in counts]:
        raise CellbenchError(
            f"{file}: holds no category {quote_name(unknown_names[0])}, which the card names. It holds {', '.join(counts) or 'none'}."
        )
    lower = {name.casefold(): name for name in card.classes} if explicit else {}
    for name in counts:
        if name.casefold() in lower or name in card.categories:
            continue
        if name.casefold() in (*NOT_CELLS, *NOT_SCORED) or not counts[name]:
            labels[name] = IGNORE if name.casefold() in NOT_SCORED else None
    others = [name for name in counts if name not in labels and name not in card.categories]
    classes = card.classes
    if not explicit and targets:
        classes = ("background", *targets)
    elif not explicit and len(others) > 1:
        classes = ("background", *sorted(others))
    single = len(classes) == 2 and len(others) == 1 and not targets
    for name in others:
        same = next((index for index, known in enumerate(classes) if known.casefold() == name.casefold()), 1 if single else None)
        if same is None:
            raise CellbenchError(
                f"{file}: category {quote_name(name)} is no class of the card ({', '.join(classes)}). Name it there, or say what it is: "
                f'categories = {{ {json.dumps(name)} = "{classes[-1]}" }}, or "" to leave it out.'
            )
        labels[name] = same or None
    for name, target in card.categories.items():
        if target not in ("", "ignore", *classes):
            raise CellbenchError(
                f"{card.path}: categories: {quote_name(name)} is to be {quote_name(target)}, which is no class ({', '.join(classes)})."
            )
        labels[name] = classes.index(target) or None if target in classes else IGNORE if target else None
    if len(classes) > IGNORE:
        raise CellbenchError(f"{file}: {len(classes)} classes; {IGNORE} are the most. Merge some by categories = {{...}} on the card.")
    words = {None: "left out", IGNORE: "ignored"} | {k: f"class '{name}'" for k, name in enumerate(classes) if k}
    shown = "; ".join(
        f"{quote_name(name)} {num:,} ({words[labels[name]] if num else 'not used'})" for name, num in list(counts.items())[:20]
    )
    return classes, labels, f"{what}: {shown}{'; …' if len(counts) > 20 else ''}. `categories` on the card overrides this."
