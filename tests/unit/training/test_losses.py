"""Each loss is smp's or torch's own, a written sum is the weighted sum, and half precision is never let in."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from segmentation_models_pytorch import losses as smp
from torch import Tensor

from cellbench.config.registry import Registry
from cellbench.metrics.pixel import IGNORE
from cellbench.training.losses import parse_loss

LOSSES = Registry().names("losses")


def batch(num_classes: int, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_classes)
    target = torch.randint(0, num_classes, (3, 9, 11), generator=generator)
    return scale * torch.randn(3, num_classes, 9, 11, generator=generator), target


def bce(logits: Tensor, target: Tensor) -> Tensor:
    """By hand, from the definition: -log of the probability given to the right answer of each class against the rest."""
    right = torch.stack([target == k for k in range(logits.shape[1])], 1)
    return -F.logsigmoid(torch.where(right, logits, -logits)).mean()


REFERENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "ce": F.cross_entropy,
    "bce": bce,
    "dice": smp.DiceLoss("multiclass"),
    "jaccard": smp.JaccardLoss("multiclass"),
    "tversky": smp.TverskyLoss("multiclass"),
    "focal": smp.FocalLoss("multiclass"),
    "lovasz": smp.LovaszLoss("multiclass"),
}


def test_every_loss_has_a_reference_here() -> None:
    assert set(REFERENCES) == set(LOSSES)


@pytest.mark.parametrize("num_classes", [2, 3])
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_and_its_gradient_are_the_references(name: str, num_classes: int) -> None:
    logits, target = batch(num_classes)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss, expected = parse_loss(name)(ours, target), REFERENCES[name](theirs, target)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert ours.grad.abs().sum() > 0


def test_a_written_sum_is_the_weighted_sum() -> None:
    logits, target = batch(3)
    expected = 0.5 * REFERENCES["ce"](logits, target) + 0.25 * REFERENCES["dice"](logits, target) + REFERENCES["focal"](logits, target)
    torch.testing.assert_close(parse_loss("0.5 ce + .25 * dice + focal")(logits, target), expected)


def test_a_term_of_weight_zero_is_not_computed() -> None:
    logits, target = batch(2)
    torch.testing.assert_close(parse_loss("ce + 0 lovasz")(logits, target), F.cross_entropy(logits, target))


def test_dice_of_two_classes_from_its_definition() -> None:
    """1 - 2 |p t| / (|p| + |t|), summed over the batch, averaged over classes."""
    logits, target = batch(2)
    p, t = logits.softmax(1), F.one_hot(target, 2).movedim(-1, 1).float()
    dice = 2 * (p * t).sum((0, 2, 3)) / (p + t).sum((0, 2, 3))
    torch.testing.assert_close(parse_loss("dice")(logits, target), (1 - dice).mean())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_scores_give_a_finite_float32_loss(name: str, dtype: torch.dtype) -> None:
    logits, target = batch(2, scale=8.0)
    loss = parse_loss(name)(logits.to(dtype), target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, REFERENCES[name](logits.to(dtype).float(), target))


@pytest.mark.parametrize("name", LOSSES)
def test_a_perfect_prediction_has_almost_no_loss_and_the_opposite_a_high_one(name: str) -> None:
    _, target = batch(2)
    right = 30.0 * (F.one_hot(target, 2).movedim(-1, 1).float() - 0.5)
    assert parse_loss(name)(right, target) < 0.01
    assert parse_loss(name)(-right, target) > 0.5


@pytest.mark.parametrize("name", LOSSES)
def test_a_tile_without_cells_gives_a_finite_loss_and_gradient(name: str) -> None:
    logits = batch(2)[0].requires_grad_()
    loss = parse_loss(name)(logits, torch.zeros(3, 9, 11, dtype=torch.long))
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("text", [*LOSSES, "0.5 ce + 0.5 dice"])
@pytest.mark.parametrize("num_classes", [2, 3])
def test_ignored_pixels_are_as_if_they_were_not_there(text: str, num_classes: int) -> None:
    logits, target = batch(num_classes)
    rows = torch.arange(9) < 6  # the reference sees only these
    ours, theirs = logits.clone().requires_grad_(), logits[:, :, rows].clone().requires_grad_()
    marked = torch.where(rows[:, None], target, IGNORE)
    expected = parse_loss(text)(theirs, target[:, rows])
    loss = parse_loss(text)(ours, marked, True)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad[:, :, rows], theirs.grad)
    assert not ours.grad[:, :, ~rows].any()


@pytest.mark.parametrize("text", ["dice", "ce", "0.5 ce + 0.5 dice"])
def test_ignoring_is_what_torch_and_smp_do_with_an_ignored_index(text: str) -> None:
    logits, target = batch(3)
    target[0, :4] = IGNORE
    both = (F.cross_entropy(logits, target, ignore_index=IGNORE), smp.DiceLoss("multiclass", ignore_index=IGNORE)(logits, target.clone()))
    expected = {"ce": both[0], "dice": both[1]}.get(text, sum(both) / 2)
    torch.testing.assert_close(parse_loss(text)(logits, target, True), expected)


def test_a_batch_of_ignored_pixels_only_teaches_nothing() -> None:
    logits = batch(2)[0].requires_grad_()
    loss = parse_loss("0.5 ce + 0.5 dice")(logits, torch.full((3, 9, 11), IGNORE), True)
    loss.backward()
    assert loss == 0
    assert not logits.grad.any()
