"""Contracts of every head and baseline of the registry: any patch size, any tile size, any number of depths, two classes or more."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from small_heads import small
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from cellbench.config.registry import Registry, load
from cellbench.errors import CellbenchError
from cellbench.models.backbones.base import Level
from cellbench.models.baselines.otsu import otsu
from cellbench.models.heads.base import Head
from cellbench.training.randomness import ModelRandomness

REGISTRY = Registry()
HEADS = REGISTRY.names("heads")
LEARNED = [name for name in REGISTRY.names("baselines") if REGISTRY.baseline(name).trained]
STRIDES = (4, 8, 14, 16)


def head(name: str, levels: tuple[Level, ...], num_classes: int = 2) -> Head:
    card = REGISTRY.baseline(name) if name in LEARNED else small(REGISTRY.head(name))
    torch.manual_seed(0)
    return load(card)(levels if name in HEADS else (), num_classes, **card.options)


def levels_of(name: str, stride_px: int, num: int | None = None) -> tuple[Level, ...]:
    """As many levels as on the card, of one stride, as of a plain ViT."""
    if name in LEARNED:
        return ()
    num = num or REGISTRY.head(name).levels
    return tuple(Level(index=i, dim=24, stride_px=stride_px) for i in range(num))


def seen(levels: tuple[Level, ...], height: int, width: int, batch: int = 2, seed: int = 1) -> tuple[list[Tensor], Tensor]:
    """Maps and pixels of random tiles."""
    generator = torch.Generator().manual_seed(seed)
    maps = [torch.randn(batch, lv.dim, height // lv.stride_px, width // lv.stride_px, generator=generator) for lv in levels]
    return maps, torch.rand(batch, 3, height, width, generator=generator)


def settled(it: Head, levels: tuple[Level, ...], height: int, width: int) -> Head:
    """In eval mode, with batch statistics of a pass behind it."""
    with torch.no_grad():
        it.train()(*seen(levels, height, width, batch=3, seed=0))
    return it.eval()


@pytest.mark.parametrize("stride_px", STRIDES)
@pytest.mark.parametrize("name", HEADS)
def test_a_head_scores_every_pixel_for_any_patch_and_tile(name: str, stride_px: int) -> None:
    num_classes = 2 + stride_px % 3
    levels = levels_of(name, stride_px)
    it = head(name, levels, num_classes)
    for rows, columns in ((2, 2), (3, 5), (3, 1)):  # even, odd and not square, a sliver
        height, width = rows * stride_px, columns * stride_px
        scores = it(*seen(levels, height, width))
        assert scores.shape == (2, num_classes, height, width)
        assert scores.isfinite().all()


@pytest.mark.parametrize(("stride_px", "height", "width"), [(14, 224, 336), (16, 224, 336), (14, 518, 42)])
@pytest.mark.parametrize("name", HEADS)
def test_a_head_scores_published_tile_sizes(name: str, stride_px: int, height: int, width: int) -> None:
    """518 px in patches of 14 are 37 places: the odd grid on which smp's decoders fail. One odd side shows it and costs a tenth."""
    levels = levels_of(name, stride_px)
    with torch.inference_mode():
        assert head(name, levels).eval()(*seen(levels, height, width, batch=1)).shape == (1, 2, height, width)


@pytest.mark.parametrize("stride_px", STRIDES)
@pytest.mark.parametrize("name", HEADS)
def test_a_head_copes_with_a_single_token(name: str, stride_px: int) -> None:
    levels = levels_of(name, stride_px)
    assert head(name, levels).eval()(*seen(levels, stride_px, stride_px)).shape == (2, 2, stride_px, stride_px)


@pytest.mark.parametrize("num", [1, 2, 4])
@pytest.mark.parametrize("name", HEADS)
def test_a_head_works_with_as_many_depths_as_the_backbone_has(name: str, num: int) -> None:
    levels = levels_of(name, 16, num)
    assert head(name, levels)(*seen(levels, 64, 96)).shape == (2, 2, 64, 96)


@pytest.mark.parametrize("name", HEADS)
def test_a_head_reads_a_pyramid_of_unequal_strides_and_widths(name: str) -> None:
    stages = tuple(Level(index=i, dim=dim, stride_px=stride) for i, (dim, stride) in enumerate(((8, 4), (16, 8), (24, 16), (32, 32))))
    levels = stages[-REGISTRY.head(name).levels :]
    assert head(name, levels, 3)(*seen(levels, 64, 96)).shape == (2, 3, 64, 96)


@pytest.mark.parametrize("num_classes", [2, 3])
@pytest.mark.parametrize(("height", "width"), [(16, 16), (17, 40), (64, 96)])
@pytest.mark.parametrize("name", LEARNED)
def test_a_trained_baseline_scores_every_pixel_of_any_tile(name: str, height: int, width: int, num_classes: int) -> None:
    scores = head(name, (), num_classes)(*seen((), height, width))
    assert scores.shape == (2, num_classes, height, width)
    assert scores.isfinite().all()


@pytest.mark.parametrize("name", [*HEADS, *LEARNED])
def test_every_parameter_learns(name: str) -> None:
    levels = levels_of(name, 16)
    it = head(name, levels)
    scores = it(*seen(levels, 64, 96))
    (scores * torch.randn(scores.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    idle = [key for key, p in it.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert idle == []
    assert all(p.requires_grad for p in it.parameters())


@pytest.mark.parametrize("name", HEADS)
def test_a_head_reads_all_depths_and_the_pixels_as_its_card_says(name: str) -> None:
    levels = levels_of(name, 16)
    maps, pixels = seen(levels, 64, 96)
    for x in (*maps, pixels):
        x.requires_grad_()
    scores = head(name, levels)(maps, pixels)
    (scores * torch.randn(scores.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    assert all(m.grad is not None and m.grad.abs().sum() > 0 for m in maps)
    reads_pixels = pixels.grad is not None and bool(pixels.grad.abs().sum() > 0)
    assert reads_pixels == REGISTRY.head(name).pixels


@pytest.mark.parametrize("name", [*HEADS, *LEARNED])
def test_in_eval_a_tile_is_scored_alike_alone_and_in_a_batch(name: str) -> None:
    levels = levels_of(name, 16)
    it = settled(head(name, levels), levels, 64, 48)
    maps, pixels = seen(levels, 64, 48, batch=2, seed=9)
    with torch.inference_mode():
        together = it(maps, pixels)
        for k in range(2):
            torch.testing.assert_close(it([m[k : k + 1] for m in maps], pixels[k : k + 1])[0], together[k], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("stride_px", STRIDES)
@pytest.mark.parametrize("name", HEADS)
def test_the_output_for_a_token_appears_at_its_patch(name: str, stride_px: int) -> None:
    """Row 1, column 7 of 5 x 9 squares of about 16 px: a transposed or mirrored map would answer elsewhere.

    Where the change is at least half of the largest: decoders that pool context over the whole tile change a little everywhere.
    """
    levels, places = levels_of(name, stride_px), max(1, 16 // stride_px)
    side_px = places * stride_px
    height, width = 5 * side_px, 9 * side_px
    it = settled(head(name, levels), levels, height, width)
    maps, pixels = seen(levels, height, width, batch=1)
    other = [m.clone() for m in maps]
    for m in other:
        m[:, :, places : 2 * places, 7 * places : 8 * places] += 3 * torch.randn(
            m.shape[1], 1, 1, generator=torch.Generator().manual_seed(3)
        )
    with torch.inference_mode():
        change = (it(other, pixels) - it(maps, pixels)).abs().sum((0, 1))
    assert change.sum() > 0
    change = change * (change > 0.5 * change.max())
    y = float((change.sum(1) * (torch.arange(height) + 0.5)).sum() / change.sum()) / side_px
    x = float((change.sum(0) * (torch.arange(width) + 0.5)).sum() / change.sum()) / side_px
    assert (y, x) == pytest.approx((1.5, 7.5), abs=0.9)


@pytest.mark.parametrize("name", [*HEADS, *LEARNED])
def test_the_input_is_not_changed_in_place(name: str) -> None:
    """All runs of a cohort read the same maps."""
    levels = levels_of(name, 16)
    maps, pixels = seen(levels, 64, 64)
    head(name, levels)(maps, pixels)
    again, same = seen(levels, 64, 64)
    assert torch.equal(pixels, same)
    assert all(torch.equal(a, b) for a, b in zip(maps, again, strict=True))


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in ("heads", "baselines") for name in REGISTRY.names(kind)])
def test_the_card_names_each_option_of_the_code_and_no_other(kind: str, name: str) -> None:
    card = REGISTRY.card(kind, name)
    build = load(card)
    if getattr(card, "weights", ()):  # its builder takes the weights and gives the function
        build = build([])
    parameters = inspect.signature(build).parameters.values()
    assert {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} == set(card.options)
    assert not [p.name for p in parameters if p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    assert [p.name for p in parameters if p.default is not p.empty] == []  # a default belongs on the card, in one place


@pytest.mark.parametrize("name", HEADS)
def test_the_published_doublings_and_every_other_whole_number_may_be_halved(name: str) -> None:
    card = REGISTRY.head(name)
    levels = levels_of(name, 16)
    for key, value in card.options.items():
        if isinstance(value, int) and value > 1:
            it = load(card)(levels, 2, **{**card.options, key: value // 2})
            assert it(*seen(levels, 64, 64)).shape == (2, 2, 64, 64)


def test_the_transposed_head_doubles_as_published_and_never_past_the_tile() -> None:
    """seed.md's head: 16 places to 128 for 14-px patches, in three doublings; a finer backbone needs fewer."""
    for stride_px, doublings in ((16, 3), (14, 3), (8, 3), (4, 2), (2, 1)):
        it = head("transposed-conv", levels_of("transposed-conv", stride_px))
        assert len(it.up) == doublings
        assert it.up(it.project(torch.zeros(2, 24, 5, 7))).shape[-2:] == (5 * 2**doublings, 7 * 2**doublings)


class _Positional(torch.nn.Module):
    """torch.export takes tensors, not a list of them."""

    def __init__(self, it: Head) -> None:
        super().__init__()
        self.it = it

    def forward(self, pixels: Tensor, *maps: Tensor) -> Tensor:
        return self.it(list(maps), pixels)


@pytest.mark.parametrize("name", ["smp-upernet", "smp-unet", "detail-m"])  # two ways of the adapter; pixels of any size
def test_a_head_can_be_exported_for_batches_of_any_size(name: str) -> None:
    levels = levels_of(name, 14)
    maps, pixels = seen(levels, 70, 70, batch=3)
    it = _Positional(head(name, levels).eval())
    batch = {0: torch.export.Dim("batch", min=1, max=1024)}
    with torch.no_grad():
        graph = torch.export.export(it, (pixels[:2], *(m[:2] for m in maps)), dynamic_shapes=(batch, tuple(batch for _ in maps)))
        for num in (1, 3):
            cut = [pixels[:num], *(m[:num] for m in maps)]
            torch.testing.assert_close(graph.module()(*cut), it(*cut), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", HEADS)
def test_a_training_step_can_be_captured_as_a_cuda_graph(name: str) -> None:
    """Nothing in it depends on a value (fake tensors have none), and nothing is drawn at random."""
    levels = levels_of(name, 16)
    with FakeTensorMode():
        it = head(name, levels).train()
        it(*seen(levels, 64, 96)).square().mean().backward()
    assert ModelRandomness(it).never_draws


# Otsu


def smear(ground: int = 220, cell: int = 90, pale: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Three discs, perhaps with a pale centre; and the truth, centres included."""
    rows, columns = np.mgrid[:90, :130]
    image, truth = np.full((90, 130, 3), ground, np.uint8), np.zeros((90, 130), np.uint8)
    for y, x in ((30, 30), (55, 75), (35, 110)):
        distance = np.hypot(rows - y, columns - x)
        truth[distance < 15] = 1
        image[distance < 15, 1] = cell
        if pale is not None:
            image[distance < 6, 1] = pale
    return image, truth


def test_otsu_finds_dark_discs_and_fills_their_pale_centres() -> None:
    image, truth = smear(pale=218)
    found = otsu(image, 2, cells="dark")
    assert (found.shape, found.dtype) == (truth.shape, np.uint8)
    np.testing.assert_array_equal(found, truth)


def test_otsu_finds_bright_cells_when_configured() -> None:
    image, truth = smear(ground=20, cell=180)
    np.testing.assert_array_equal(otsu(image, 2, cells="bright"), truth)


def test_otsu_reads_the_green_channel_alone() -> None:
    image, truth = smear()
    image[..., 0] = np.arange(130)
    image[..., 2] = 255 - image[..., 0]
    np.testing.assert_array_equal(otsu(image, 2, cells="dark"), truth)


@pytest.mark.parametrize("num_classes", [2, 3, 4])
@pytest.mark.parametrize("value", [0, 127, 255])
def test_an_image_of_one_colour_is_all_background(value: int, num_classes: int) -> None:
    found = otsu(np.full((20, 30, 3), value, np.uint8), num_classes, cells="dark")
    assert found.dtype == np.uint8
    assert not found.any()


def test_three_classes_go_from_pale_to_dark() -> None:
    """Ground, cytoplasm, nucleus."""
    image, truth = np.full((60, 60, 3), 225, np.uint8), np.zeros((60, 60), np.uint8)
    image[10:40, 10:40], truth[10:40, 10:40] = 150, 1
    image[20:30, 20:30], truth[20:30, 20:30] = 60, 2
    image += np.random.default_rng(0).integers(0, 20, image.shape, dtype=np.uint8)
    np.testing.assert_array_equal(otsu(image, 3, cells="dark"), truth)


def test_three_classes_of_a_two_coloured_image_do_not_fail() -> None:
    found = otsu(smear()[0], 3, cells="dark")
    assert set(np.unique(found)) <= {0, 1, 2}


def test_a_side_that_is_neither_dark_nor_bright_is_refused() -> None:
    with pytest.raises(CellbenchError, match="'dark' or 'bright'"):
        otsu(smear()[0], 2, cells="drak")


def test_otsu_on_real_smears_scores_as_measured(shared) -> None:
    """Issue 2: a mean Dice of 0.958 on the three test images."""
    from cellbench.data.io.images import labels_to_classes, read_image, read_labels

    dices = []
    for path in sorted((shared / "bccd" / "test" / "original").iterdir()):
        truth = labels_to_classes(read_labels(shared / "bccd" / "test" / "mask" / path.name), (0, 255))
        found = otsu(read_image(path), 2, cells="dark")
        dices.append(2 * np.sum(truth & found) / (truth.sum(dtype=int) + found.sum(dtype=int)))
    assert len(dices) == 3
    assert np.mean(dices) == pytest.approx(0.958, abs=0.001)
