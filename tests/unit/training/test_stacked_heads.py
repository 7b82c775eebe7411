"""Heads of one kind that learn as one learn what each would alone, by torch's own AdamW; who cannot be stacked goes alone."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from cohorts import FP32, REGISTRY, Listener, baseline_of, dataset_of, features_of, fitted, learners_of, run_of
from torch import nn
from torch.utils._pytree import tree_map

from cellbench.config.run import RunSpec
from cellbench.features.extractor import Features
from cellbench.hardware import Hardware
from cellbench.models.heads.base import Head
from cellbench.parallel import WorkerPool
from cellbench.training.fit import fit
from cellbench.training.stacked_heads import StackedHeads, group_stackable, stackable
from cellbench.training.trainer import HeadTrainer, batch_sizes


class Teaming(Hardware):
    """A processor that wants teams, as a GPU does."""

    most_as_one = 16


TEAMS = Teaming(device=torch.device("cpu"), precision=torch.float32, memory_bytes=2**30)
SMALL = {"transposed-conv": {"width": 32}, "fpn": {"width": 16}, "detail": {"width": 16, "pixel_width": 8}}


@pytest.fixture
def dataset(small_folder):
    return dataset_of(small_folder)


def three(head: str, **same: Any) -> list[RunSpec]:
    """Runs that differ in what members may differ in."""
    same = {"options": SMALL.get(head, {}), **same}
    return [
        run_of(head, seed=0, **same),
        run_of(head, seed=1, lr=1e-2, weight_decay=1.0, **same),
        run_of(head, seed=2, warmup_epochs=1, schedule="constant", **same),
    ]


def as_team(dataset, runs: list[RunSpec], **settings: Any) -> tuple[list[HeadTrainer], Features]:
    """Fresh learners that will learn as one."""
    features = features_of(dataset, runs, TEAMS, **settings)
    learners = [learner.on(features) for learner in learners_of(dataset, runs, features)]
    assert [len(party.members) for party in group_stackable(learners, features)] == [len(runs)]
    return learners, features


def an_epoch(party: StackedHeads | HeadTrainer, features: Features) -> None:
    party.begin()
    with WorkerPool(1) as lanes:
        for chunk in features.train(0, lanes):
            party.take(chunk)
    party.end()


def assert_alike(a: HeadTrainer, b: HeadTrainer) -> None:
    """The same weights, running statistics and moments of AdamW, each to 0.005 of the largest of its tensor: it divides by roots of
    squares, so that what is rounding in a gradient near zero is more in a weight."""
    for mine, other in zip(tensors(a.state()), tensors(b.state()), strict=True):
        assert (mine - other).abs().max() <= 5e-3 * other.abs().max() + 1e-7


def tensors(state: dict[str, Any]) -> list[torch.Tensor]:
    kept = [state["model"], *state["optimiser"]["state"].values()]
    return [x for tensors in kept for x in tensors.values()]


@pytest.mark.parametrize(
    ("head", "settings"),
    [
        *((name, {}) for name in REGISTRY.names("heads")),
        ("bilinear", {"loss": "0.5 bce + 1 dice"}),
        ("fpn", {"targets": "cell+border+distance"}),
    ],
)
def test_members_learn_what_each_learns_alone(dataset, head, settings):
    runs = three(head, batch_size=2, **settings)
    auxiliary_targets = "targets" in settings
    members, features = as_team(dataset, runs, auxiliary_targets=auxiliary_targets)
    assert batch_sizes(features.plan.num_views, 2)[-1] == 1  # the last mini-batch is one tile, whose strides once misled torch
    (team,) = group_stackable(members, features)
    an_epoch(team, features)
    for member, lone in zip(members, learners_of(dataset, runs, features), strict=True):
        an_epoch(lone.on(features), features)
        assert float(member.loss_sum) == pytest.approx(float(lone.loss_sum), rel=1e-4)
        assert member.optimiser.param_groups[0]["lr"] == lone.optimiser.param_groups[0]["lr"]
        assert_alike(member, lone)


def test_members_learn_in_mixed_precision_as_each_does_alone(dataset):
    runs = three("fpn")
    features = features_of(dataset, runs, replace(TEAMS, precision=torch.bfloat16))
    members = learners_of(dataset, runs, features)
    (team,) = group_stackable([member.on(features) for member in members], features)
    an_epoch(team, features)
    for member, lone in zip(members, learners_of(dataset, runs, features), strict=True):
        an_epoch(lone.on(features), features)
        assert float(member.loss_sum) == pytest.approx(float(lone.loss_sum), rel=0.01)  # bf16 has three digits


def assert_told_alike(a: HeadTrainer, b: HeadTrainer) -> None:
    assert a.ended == b.ended
    assert len(a.history) == len(b.history)
    for mine, other in zip(a.history, b.history, strict=True):
        assert mine == pytest.approx(other, rel=1e-3, abs=1e-4)


def test_members_that_end_do_not_disturb_the_others(dataset):
    runs = [run_of(seed=0, epochs=3), run_of(seed=1, epochs=3), run_of(seed=2, epochs=1), run_of(seed=3, epochs=3)]
    members, features = as_team(dataset, runs)
    members[1].recorder = Listener(most=2)
    with torch.no_grad():
        members[3].model.head.score.weight.fill_(math.nan)
    fit(members, features)
    assert [member.ended.partition(":")[0] for member in members] == ["done", "pruned", "done", "failed"]
    for member, lone in zip(members[:3], fitted(dataset, runs[:3], most={1: 2}), strict=True):
        assert_told_alike(member, lone)
        assert_alike(member, lone)


def test_members_fail_where_batch_norm_is_given_a_single_value(dataset):
    members, features = as_team(dataset, three("bilinear", tile_px=16, batch_size=1, epochs=1))
    fit(members, features)
    assert {member.ended.partition(" from")[0] for member in members} == {"failed: batch norm cannot learn"}


def test_a_run_goes_on_alone_from_a_teams_state_and_the_other_way_round(dataset):
    runs = three("bilinear")
    members, features = as_team(dataset, runs)
    fit(members, features)
    lone = fitted(dataset, runs)
    for before, after, machine in ((members, lone, FP32), (lone, members, TEAMS)):
        features = features_of(dataset, runs, machine)
        again = learners_of(dataset, runs, features)
        for learner, source in zip(again, before, strict=True):
            learner.restore(source.recorder.states[1])
        fit(again, features)
        for learner, whole in zip(again, after, strict=True):
            assert_told_alike(learner, whole)


def test_a_state_has_the_same_form_from_a_team_as_from_a_run_alone(dataset):
    runs = three("transposed-conv")
    members, features = as_team(dataset, runs)
    (team,) = group_stackable(members, features)
    an_epoch(team, features)
    lone = learners_of(dataset, runs[:1], features)[0].on(features)
    an_epoch(lone, features)

    def form(x: Any) -> Any:
        # The storage too: a file that is written of a view holds all of what it is a view of.
        return (x.shape, x.dtype, x.stride(), x.device, x.untyped_storage().nbytes()) if isinstance(x, torch.Tensor) else type(x)

    assert tree_map(form, members[0].state()) == tree_map(form, lone.state())


def test_teams_are_of_runs_that_differ_only_in_what_members_may(dataset):
    alike = three("bilinear")
    others = [
        run_of(batch_size=7),
        run_of(loss="ce"),
        run_of("detail"),
        run_of("fpn", options={"width": 8}),
        run_of("fpn", options={"width": 16}),
    ]
    runs = [alike[0], *others, *alike[1:], run_of("detail", seed=1)]
    features = features_of(dataset, runs, TEAMS)
    found = [
        [run.run for run in getattr(party, "members", [party])] for party in group_stackable(learners_of(dataset, runs, features), features)
    ]
    assert found == [alike, [others[0]], [others[1]], [others[2], runs[-1]], [others[3]], [others[4]]]


class Dropped(Head):
    """Says nothing of itself, so it goes alone: vmap has no random numbers for it."""

    def __init__(self, levels, num_classes):
        super().__init__(levels, num_classes)
        self.score = nn.Sequential(nn.Dropout(0.5), nn.Conv2d(levels[-1].dim, num_classes, 1))


class Normed(Dropped):
    """Says that it can be stacked, but has weights in a layer that the team has no wider one for."""

    stackable = True

    def __init__(self, levels, num_classes):
        super().__init__(levels, num_classes)
        self.score = nn.Sequential(nn.GroupNorm(2, levels[-1].dim), nn.Conv2d(levels[-1].dim, num_classes, 1))


class PartlyFixed(Dropped):
    """Has a weight that does not learn, which the team's AdamW would let decay."""

    stackable = True

    def __init__(self, levels, num_classes):
        super().__init__(levels, num_classes)
        self.score[1].bias.requires_grad_(False)


@pytest.mark.parametrize("kind", [Dropped, Normed, PartlyFixed])
def test_a_head_that_cannot_be_stacked_goes_alone(dataset, kind):
    runs = three("bilinear")[:2]
    features = features_of(dataset, runs, TEAMS)
    learners = learners_of(dataset, runs, features)
    for learner in learners:
        learner.model.head = kind(learner.model.head.levels, 2)
    assert group_stackable(learners, features) == learners


@pytest.mark.parametrize("run", [baseline_of("unet", {"width": 4}), run_of(unfreeze=1)], ids=["baseline", "tail"])
def test_a_baseline_and_a_run_that_trains_blocks_go_alone(dataset, run):
    (learner,) = learners_of(dataset, [run], features_of(dataset, [run], TEAMS))
    assert not stackable(learner.model)


def test_there_are_teams_on_a_gpu_and_nowhere_else_and_smaller_ones_where_memory_ran_out(dataset):
    runs = [run_of(seed=seed) for seed in range(5)]
    features = features_of(dataset, runs)
    learners = learners_of(dataset, runs, features)
    assert group_stackable(learners, features) == learners
    gpu = replace(FP32, device=torch.device("cuda"))
    for machine, sizes in ((gpu, [5]), (gpu.smaller(3), [2, 2, 1])):
        features.trunk.machine = machine
        assert [len(getattr(party, "members", [party])) for party in group_stackable(learners, features)] == sizes


def test_whole_images_are_learned_from_by_one_run_after_the_other(dataset):
    runs = [run_of(seed=seed, framing="pad") for seed in range(2)]
    features = features_of(dataset, runs, TEAMS)
    learners = learners_of(dataset, runs, features)
    assert group_stackable(learners, features) == learners
