"""The sampling plan depends on image sizes, sampling settings and data seed only, not on a run's own seed or earlier calls."""

from __future__ import annotations

import json
import zlib

import numpy as np
import pytest

from cellbench.config.run import SAMPLING_FIELDS, RunSpec
from cellbench.data.transforms import sampling
from cellbench.data.transforms.augmentation import ColourJitter, ReferenceStains, StainJitter
from cellbench.data.transforms.sampling import SamplingPlan, TileSample

SIZES = ((120, 160), (64, 64), (30, 200), (300, 65))


def plan(sizes: tuple[tuple[int, int], ...] = SIZES, **settings) -> SamplingPlan:
    return SamplingPlan(sizes, RunSpec(**{"backbone": "uni", "head": "fpn", "tile_px": 64, "crops_per_image": 6, **settings}))


def drawn_one_by_one(one: SamplingPlan, cycle: int) -> list[TileSample]:
    """The views of a plan, each number by a call of its own."""
    run, out = one.run, []
    for turn in range(len(one.sizes_px)):
        image = one.used_images[((cycle * len(one.sizes_px) if run.sampling == "crops" else 0) + turn) % len(one.used_images)]
        rng = np.random.default_rng([run.data_seed, cycle, turn])
        own = [np.random.default_rng([run.data_seed, cycle, turn, zlib.crc32(name.encode())]) for name in run.own_augmentations]
        sides = np.zeros(run.crops_per_image, int)
        if reach := np.log1p(run.zoom):
            own_rng = np.random.default_rng([run.data_seed, cycle, turn, 2**31 + 2])
            sides = np.rint(one.tile_px[0] * np.exp(own_rng.uniform(-reach, reach, run.crops_per_image))).astype(int)
        for y, x, side in crops_one_by_one(one, image, rng, sides.tolist()):
            quarter = int(rng.integers(4)) if run.rotations else 0
            if one.tile_px[0] != one.tile_px[1]:
                quarter -= quarter % 2
            code = quarter + 4 * (int(rng.integers(2)) if run.flips else 0)
            colours, stains, references = ColourJitter.NEUTRAL, StainJitter.NEUTRAL, ReferenceStains.NEUTRAL
            if any(reach := (run.brightness, run.contrast, run.saturation, run.hue)):
                colours = tuple(float(middle + rng.uniform(-most, most)) for middle, most in zip(ColourJitter.NEUTRAL, reach, strict=True))
            if run.hed:
                factors, added = (rng.uniform(-run.hed, run.hed, 3) for _ in range(2))
                stains = (*(1 + factors).tolist(), *(StainJitter.ADDED * added).tolist())
            if most := run.reference_stains:
                references = tuple(np.exp(rng.uniform(-most, most) + rng.uniform(-most, most, 3)).tolist())
            out.append(TileSample(image, y, x, code, (references, stains, colours, *((float(each.random()),) for each in own)), side))
    return out


def crops_one_by_one(one: SamplingPlan, image: int, rng: np.random.Generator, sides: list[int]) -> list[tuple[int, int, int]]:
    size_px, run, crops = one.sizes_px[image], one.run, []
    if run.sampling == "tiles":
        return [(y, x, 0) for y, x in one.framing.grid(size_px, one.tile_px, 0.0)]
    framed_px, boxes = one.framing.framed_px(size_px), one.boxes_px[image] if one.boxes_px else ()
    areas = np.array([(bottom - top) * (right - left) for top, left, bottom, right in boxes], float)
    for side in sides:
        box, corner = boxes[int(rng.choice(len(boxes), p=areas / areas.sum()))] if boxes else None, []
        for axis in (0, 1):
            crop = side or one.tile_px[axis]
            low, high = 0, (last := max(framed_px[axis] - crop, 0))
            if box is not None:
                scale = framed_px[axis] / size_px[axis]
                low = min(max(round(box[axis] * scale) - crop // 2, 0), last)
                high = max(min(round(box[axis + 2] * scale) - crop // 2, last), low)
            corner.append(int(rng.integers(low, high + 1)))
        crops.append((corner[0], corner[1], side))
    return crops


class OneNumber:
    def draw(self, rng: np.random.Generator) -> tuple[float, ...]:
        return (float(rng.random()),)


def test_views_are_those_that_are_drawn_one_number_at_a_time(monkeypatch) -> None:
    """For settings that begin with half a word of the generator left, or leave one after every other tile; exact numbers, also as JSON."""
    choice = np.random.default_rng(0)
    monkeypatch.setattr(sampling, "own_augmentations", lambda run, registry: {name: OneNumber() for name in run.own_augmentations})
    boxes = ((), ((0, 0, 30, 30), (40, 40, 64, 60)), (), ((100, 0, 101, 65), (150, 10, 290, 60), (0, 0, 5, 5)))
    for _ in range(120):
        reach = {name: float(choice.choice([0.0, 0.3])) for name in ("brightness", "hue", "hed", "reference_stains")}
        settings = {name: bool(choice.integers(2)) for name in ("rotations", "flips")} | {
            "crops_per_image": int(choice.integers(1, 8)),
            "data_seed": int(choice.integers(5)),
            "sampling": str(choice.choice(["crops", "crops", "tiles"])),
            "framing": str(choice.choice(["tile", "tile", "pad"])),
            "fraction": float(choice.choice([1.0, 0.5])),
        }
        if settings["sampling"] == "crops" and settings["framing"] == "tile":
            settings["zoom"] = float(choice.choice([0.0, 0.4]))
        own = {"augmentations": "0.5 one-number"} if choice.integers(2) else {}
        one = SamplingPlan(SIZES, plan(**reach, **settings, **own).run, boxes_px=boxes if choice.integers(2) else ())
        expected, found = drawn_one_by_one(one, cycle := int(choice.integers(4))), one.views(cycle)
        assert list(found) == expected
        assert json.dumps(list(found)) == json.dumps(expected)
        rows = choice.permutation(len(found))[:5]
        assert list(found.take(rows)) == [expected[k] for k in rows]


def test_the_data_seed_decides_the_views_and_the_order() -> None:
    assert list(plan().views(3)) == list(plan().views(3))
    assert list(plan().views(3)) != list(plan(data_seed=1).views(3))
    assert plan().order(3).tolist() == plan().order(3).tolist()
    assert plan().order(3).tolist() != plan(data_seed=1).order(3).tolist()


@pytest.mark.parametrize(
    "settings",
    [{"seed": 5}, {"head": "bilinear"}, {"epochs": 99}, {"lr": 0.5}, {"batch_size": 1}, {"loss": "ce"}, {"options": {"width": 3}}],
    ids=lambda settings: next(iter(settings)),
)
def test_views_do_not_depend_on_settings_of_single_runs(settings: dict) -> None:
    assert not set(settings) & set(SAMPLING_FIELDS)
    assert list(plan(**settings).views(2)) == list(plan().views(2))
    assert plan(**settings).order(2).tolist() == plan().order(2).tolist()


def test_an_image_is_seen_alike_whichever_images_come_after_it() -> None:
    assert list(plan(SIZES[:2]).views(1)) == [view for view in plan().views(1) if view.image < 2]


def test_asking_twice_or_in_another_order_changes_nothing() -> None:
    one = plan()
    late = list(one.views(5))
    one.views(0), one.order(5)
    assert list(one.views(5)) == late


def test_epochs_differ_in_views_and_order() -> None:
    views = [tuple(plan().views(plan().cycle(epoch))) for epoch in range(6)]
    orders = [tuple(plan().order(epoch)) for epoch in range(6)]
    assert len(set(views)) == len(set(orders)) == 6


@pytest.mark.parametrize("num", [1, 3])
def test_views_repeat_every_so_many_epochs_in_a_new_order(num: int) -> None:
    one = plan(repeat_views_every=num)
    assert one.repeats
    assert [one.cycle(epoch) for epoch in range(7)] == [epoch % num for epoch in range(7)]
    assert one.order(0).tolist() != one.order(num).tolist()
    assert len({tuple(one.views(cycle)) for cycle in range(num)}) == num


def test_without_a_number_views_never_repeat() -> None:
    assert not plan().repeats
    assert [plan().cycle(epoch) for epoch in (0, 7, 9999)] == [0, 7, 9999]


@pytest.mark.parametrize("sampling", ["crops", "tiles"])
def test_the_order_visits_every_view_once(sampling: str) -> None:
    one = plan(sampling=sampling)
    assert one.num_views == len(one.views(0))
    assert sorted(one.order(4).tolist()) == list(range(one.num_views))


def test_crops_lie_inside_their_image_wherever_it_is_large_enough() -> None:
    for view in plan(crops_per_image=200).views(0):
        height, width = SIZES[view.image]
        assert 0 <= view.y <= max(height - 64, 0)
        assert 0 <= view.x <= max(width - 64, 0)


def test_crops_reach_every_place_alike() -> None:
    """70 places a side, 2000 draws: every edge is met, and no quarter is preferred by more than chance."""
    views = plan(((133, 133),), crops_per_image=2000).views(0)
    for places in ([view.y for view in views], [view.x for view in views]):
        assert {min(places), max(places)} == {0, 69}
        quarters = np.bincount(np.array(places) * 4 // 70, minlength=4)
        assert np.abs(quarters - 500).max() < 5 * np.sqrt(2000 * 0.25 * 0.75)


def test_each_image_gives_its_number_of_crops() -> None:
    assert np.bincount([view.image for view in plan().views(0)]).tolist() == [6, 6, 6, 6]


def test_tiles_cover_every_pixel_of_every_image_every_epoch() -> None:
    for cycle in (0, 1):
        covered = [np.zeros(size, bool) for size in SIZES]
        for view in plan(sampling="tiles").views(cycle):
            covered[view.image][view.y : view.y + 64, view.x : view.x + 64] = True
        assert all(image.all() for image in covered)


def test_all_turns_occur_with_flips_and_rotations_and_none_without() -> None:
    def turns(**settings) -> set[int]:
        return {view.turn for view in plan(crops_per_image=100, **settings).views(0)}

    assert turns() == set(range(8))
    assert turns(flips=False) == {0, 1, 2, 3}
    assert turns(rotations=False) == {0, 4}
    assert turns(flips=False, rotations=False) == {0}


def test_colours_stay_within_their_reach_and_fill_it() -> None:
    reach = {"brightness": 0.3, "contrast": 0.2, "saturation": 0.1, "hue": 0.05}
    colours = np.array([view.draws[2] for view in plan(crops_per_image=250, **reach).views(0)])
    away = np.abs(colours - ColourJitter.NEUTRAL)
    assert (away <= list(reach.values())).all()
    assert (away.max(0) > 0.95 * np.array(list(reach.values()))).all()
    assert np.abs((colours - ColourJitter.NEUTRAL).mean(0) / list(reach.values())).max() < 0.1  # as often darker as brighter


def test_without_reach_colours_are_untouched() -> None:
    views = plan(brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0).views(0)
    assert {view.draws[2] for view in views} == {ColourJitter.NEUTRAL}


def test_a_view_holds_plain_numbers() -> None:
    """numpy's would not survive a JSON fingerprint, and compare by float32 luck."""
    view: TileSample = next(iter(plan().views(0)))
    assert {type(value) for value in (view.image, view.y, view.x, view.turn)} == {int}
    assert {type(value) for draw in view.draws for value in draw} == {float}


def test_smaller_fractions_are_subsets_of_larger_ones_and_epochs_keep_their_length() -> None:
    sizes = ((64, 64), (80, 64), (64, 90), (200, 65), (64, 64), (100, 100), (64, 64), (70, 70), (64, 64))
    seen = {share: set(plan(sizes, fraction=share).used_images) for share in (0.1, 0.25, 0.5, 1.0)}
    assert [len(one) for one in seen.values()] == [1, 2, 5, 9]
    assert seen[0.1] < seen[0.25] < seen[0.5] < seen[1.0]
    for share, mine in seen.items():
        one = plan(sizes, fraction=share)
        views = [view.image for cycle in range(5) for view in one.views(cycle)]
        assert set(views) == mine
        assert {len(one.views(cycle)) for cycle in range(5)} == {one.num_views} == {9 * 6}
        times = np.bincount(views)[sorted(mine)]
        assert times.max() - times.min() <= 6  # crops an image
    tiles = plan(sizes, fraction=0.5, sampling="tiles")
    assert {len(tiles.views(cycle)) for cycle in range(4)} == {tiles.num_views}


def test_padded_frames_are_as_large_as_the_images_that_are_learned_from_need() -> None:
    sizes = ((64, 64),) * 5
    (seen,) = plan(sizes, fraction=0.2).used_images
    larger = tuple((64, 64) if image == seen else (300, 500) for image in range(5))
    assert plan(larger, fraction=0.2, framing="pad").tile_px == (64, 64)
    assert plan(larger, fraction=1.0, framing="pad").tile_px == (320, 512)


def test_other_images_are_drawn_with_another_data_seed() -> None:
    assert len({plan(((64, 64),) * 30, fraction=0.2, data_seed=seed).used_images for seed in range(8)}) > 1


def test_crops_have_their_centres_in_the_regions_of_interest_and_other_images_keep_theirs() -> None:
    sizes = ((600, 800), (600, 800))
    run = RunSpec(backbone="a", head="b", tile_px=64, crops_per_image=200)
    free = SamplingPlan(sizes, run)
    boxes = ((), ((100, 200, 160, 300), (400, 500, 600, 800)))
    limited = SamplingPlan(sizes, run, boxes_px=boxes)
    first, second = ([view for view in limited.views(0) if view.image == image] for image in (0, 1))
    assert first == [view for view in free.views(0) if view.image == 0]
    places = [(view.y + 32, view.x + 32) for view in second]
    in_each = [[top <= y <= bottom and left <= x <= right for y, x in places] for top, left, bottom, right in boxes[1]]
    assert all(map(any, zip(*in_each, strict=True)))
    assert 0.05 < sum(in_each[0]) / len(places) < 0.16  # by area: 6,000 of 66,000 px
    assert all(0 <= view.y <= 600 - 64 and 0 <= view.x <= 800 - 64 for view in second)


def test_magnified_crops_lie_in_the_image_and_their_sides_are_even_on_a_logarithmic_scale() -> None:
    views = plan(((700, 900),), crops_per_image=2000, tile_px=224, zoom=0.4).views(0)
    factors = np.log([224 / view.crop_px for view in views]) / np.log(1.4)
    assert np.abs(factors).max() < 1.01
    assert np.histogram(factors, bins=4, range=(-1, 1))[0].min() > 400
    assert all(0 <= view.y <= 700 - view.crop_px and 0 <= view.x <= 900 - view.crop_px for view in views)
    assert max(view.y + view.crop_px for view in views) > 690


def test_crops_are_resized_with_zoom_only() -> None:
    plain, zoomed = (plan(zoom=zoom).views(1) for zoom in (0.0, 0.3))
    assert [view.image for view in plain] == [view.image for view in zoomed]
    assert {view.crop_px for view in plain} == {0}
    assert len({view.crop_px for view in zoomed}) > 3


def test_the_largest_crop_is_at_most_the_tile_times_the_largest_factor() -> None:
    one = plan(((700, 900),), crops_per_image=2000, tile_px=224, zoom=0.4)
    assert max(view.crop_px for view in one.views(0)) <= one.largest_crop_px[0] == 314
