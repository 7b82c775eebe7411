"""The contracts of losses, augmentations and metrics, which a user may add. A contract returns the empty string, or the reason why it is broken."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from cellbench.config.cards import AugmentationCard, Card, LossCard, MetricCard
from cellbench.config.registry import load
from cellbench.metrics.catalog import METRICS, ScoredImage
from cellbench.metrics.instance import CellPairs, ReferenceMask
from cellbench.metrics.instances import connected_instances
from cellbench.metrics.pixel import IGNORE, confusion_matrix, per_image_scores

Contract = Callable[[Card], str]


# --- losses -----------------------------------------------------------------------------------------------------------------------------


def _batch(num_classes: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_classes)
    target = torch.randint(0, num_classes, (2, 6, 7), generator=generator)
    return torch.randn(2, num_classes, 6, 7, generator=generator), target


def loss_is_scalar(card: Card) -> str:
    """A finite float32 scalar, for two classes and for three, also where the batch has no cell."""
    for num_classes in (2, 3):
        logits, target = _batch(num_classes)
        for truth in (target, torch.zeros_like(target)):
            value = load(card)(logits, truth)
            if not isinstance(value, Tensor) or value.shape != () or value.dtype != torch.float32 or not value.isfinite():
                return f"for {num_classes} classes it gives {value!r}; a finite float32 scalar is expected"
    return ""


def loss_has_gradient(card: Card) -> str:
    logits, target = _batch(2)
    load(card)(logits.requires_grad_(), target).backward()
    if logits.grad is None or not logits.grad.any():
        return "no gradient reaches the scores"
    return "" if logits.grad.isfinite().all() else "its gradient is not finite"


def loss_prefers_truth(card: Card) -> str:
    _, target = _batch(2)
    right = 20.0 * (torch.nn.functional.one_hot(target, 2).movedim(-1, 1).float() - 0.5)
    good, bad = float(load(card)(right, target)), float(load(card)(-right, target))
    return "" if good < bad else f"the right scores cost {good:.4g}, the opposite {bad:.4g}"


def loss_is_free_of_places(card: Card) -> str:
    """The loss does not depend on the positions of pixels, because ignored pixels are removed before it is computed."""
    logits, target = _batch(2)
    column = logits.movedim(1, -1).reshape(-1, 2).T[None, ..., None]
    a, b = load(card)(logits, target), load(card)(column, target.reshape(1, -1, 1))
    return (
        "" if torch.allclose(a, b, rtol=1e-4, atol=1e-6) else f"{float(a):.4g}, and {float(b):.4g} where the same pixels lie in one column"
    )


# --- augmentations ----------------------------------------------------------------------------------------------------------------------


def _tiles() -> Tensor:
    return torch.rand(3, 3, 16, 20, generator=torch.Generator().manual_seed(0))


def augmentation_draws_floats(card: Card) -> str:
    """Draws a tuple of floats of constant length, because it is part of a cache key."""
    made = load(card)(0.3)
    draws = [made.draw(np.random.default_rng(seed)) for seed in range(3)]
    plain = all(isinstance(draw, tuple) and all(type(value) is float for value in draw) for draw in draws)
    json.dumps(draws)
    return "" if plain and len({len(draw) for draw in draws}) == 1 else f"draws {draws[0]!r}; a tuple of floats is expected"


def augmentation_is_seeded(card: Card) -> str:
    first, second = (load(card)(0.3).draw(np.random.default_rng(7)) for _ in range(2))
    return "" if first == second else "the same generator gives another draw; draw from `rng` alone"


def augmentation_keeps_tiles(card: Card) -> str:
    """Returns float32 tiles of the same size in 0..1, deterministically and independently of the other tiles in the batch."""
    made = load(card)(0.3)
    draws = [made.draw(np.random.default_rng(seed)) for seed in range(3)]
    out = made.apply(_tiles(), draws)
    if out.shape != _tiles().shape or out.dtype != torch.float32:
        return f"gives {out.dtype} {tuple(out.shape)} for float32 {tuple(_tiles().shape)}"
    if not out.isfinite().all() or out.min() < 0 or out.max() > 1:
        return f"gives values from {out.min():.3g} to {out.max():.3g}; 0 to 1 is expected"
    if not torch.equal(out, made.apply(_tiles(), draws)):
        return "the second time it gives something else; draw in draw() alone"
    alone = torch.cat([made.apply(_tiles()[k : k + 1], draws[k : k + 1]) for k in range(3)])
    return "" if torch.allclose(out, alone, atol=1e-5) else "a tile depends on the others of its batch"


# --- metrics ----------------------------------------------------------------------------------------------------------------------------


def _scored(truth: np.ndarray, prediction: np.ndarray) -> ScoredImage:
    reference, cells = ReferenceMask(truth, 2), connected_instances(prediction)
    counts = confusion_matrix(truth, prediction, 2)
    return ScoredImage(
        truth=truth,
        prediction=prediction,
        probability=None,
        classes=("background", "cell"),
        true_cells=reference.cells,
        found_cells=cells,
        pixels={name: float(values[0]) for name, values in per_image_scores(counts[None]).items()},
        instances=reference.agreement(prediction, CellPairs.of(reference.cells, cells)),
    )


def _masks() -> tuple[np.ndarray, np.ndarray]:
    """Two cells, and a prediction that finds half of one and a false one."""
    truth, prediction = np.zeros((60, 80), np.uint8), np.zeros((60, 80), np.uint8)
    truth[10:30, 10:30] = truth[35:55, 40:60] = 1
    prediction[10:30, 10:20] = prediction[2:12, 60:75] = 1
    return truth, prediction


def metric_name_is_free(card: Card) -> str:
    """No metric of the package has its name."""
    return f"'{card.id}' is a metric of cellbench already; choose another file name" if card.id in {one.key for one in METRICS} else ""


def metric_is_a_number(card: Card) -> str:
    """A finite number or NaN for any masks, empty ones included."""
    truth, prediction = _masks()
    empty = np.zeros_like(truth)
    for a, b in ((truth, prediction), (truth, truth), (truth, empty), (empty, prediction), (empty, empty)):
        value = float(load(card)(_scored(a, b)))
        if math.isinf(value):
            return "is infinite for some masks; return NaN where there is nothing to score"
    return ""


def metric_prefers_truth(card: Card) -> str:
    assert isinstance(card, MetricCard)
    truth, prediction = _masks()
    right, wrong = float(load(card)(_scored(truth, truth))), float(load(card)(_scored(truth, prediction)))
    better = right > wrong if card.direction == "maximize" else right < wrong
    return "" if better else f"scores {right:.4g} for the truth itself and {wrong:.4g} for a wrong mask; direction = '{card.direction}'"


def metric_leaves_out_ignored(card: Card) -> str:
    truth, prediction = _masks()
    truth[:5] = IGNORE
    other = prediction.copy()
    other[:5] = 1 - other[:5]
    a, b = (float(load(card)(_scored(truth, one))) for one in (prediction, other))
    return "" if a == b or math.isclose(a, b, rel_tol=0.05) else "depends on what is predicted where the truth is 255 (ignored)"


def metric_is_repeatable(card: Card) -> str:
    masks = _masks()
    image = _scored(*masks)
    first, second = load(card)(image), load(card)(image)
    if first != second:
        return f"{first}, and {second} for the same image"
    return "" if all(np.array_equal(a, b) for a, b in zip(masks, _masks(), strict=True)) else "changes the masks that it is given"


EXTENSIONS: Mapping[type[Card], Mapping[str, Contract]] = MappingProxyType(
    {
        LossCard: {
            "finite scalar": loss_is_scalar,
            "gradient": loss_has_gradient,
            "truth is cheaper": loss_prefers_truth,
            "order of pixels": loss_is_free_of_places,
        },
        AugmentationCard: {
            "plain draws": augmentation_draws_floats,
            "seed": augmentation_is_seeded,
            "tiles in, tiles out": augmentation_keeps_tiles,
        },
        MetricCard: {
            "name": metric_name_is_free,
            "a number": metric_is_a_number,
            "truth is better": metric_prefers_truth,
            "ignored pixels": metric_leaves_out_ignored,
            "repeatable": metric_is_repeatable,
        },
    }
)
"""By kind of card, each contract by name."""
