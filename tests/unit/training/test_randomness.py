"""Random numbers of a model depend on its seed and the step only: not on other computations, nor on resuming."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import parts
import pytest
import torch
import torch.nn.functional as F
from cohorts import FP32, Listener, baseline_of, dataset_of, features_of, fitted, run_of, same, score_images, trainers_of
from small_data import write_set
from small_heads import one_a_builder
from timm.layers import DropPath
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from cellbench.config.registry import Registry
from cellbench.config.run import RunSpec
from cellbench.hardware import Hardware
from cellbench.training import randomness
from cellbench.training.fit import fit
from cellbench.training.randomness import ModelRandomness, SeededDraws
from cellbench.training.trainer import HeadTrainer

CPU = torch.device("cpu")
LANES = replace(FP32, lanes=3)
QUICK = {"epochs": 2, "crops_per_image": 3}
ONCE = {"epochs": 1, "crops_per_image": 1}


@pytest.fixture
def dataset(tmp_path):
    write_set(tmp_path, ["a0.png", "a1.png", "a2.png", "a3.png"], ["t0.png"])
    return dataset_of(tmp_path / "smears")


@pytest.fixture
def mine(tmp_path, monkeypatch) -> Callable[..., RunSpec]:
    """A run with a user's head, or with a changed backbone card."""

    def make(name: str, **settings) -> RunSpec:
        folder = tmp_path / name
        (parts.head(folder, name) / "heads" / "my-head.toml").rename(folder / "heads" / f"{name}.toml")
        for other in tmp_path.glob("*/heads/*.toml"):  # several in one registry
            (folder / "heads" / other.name).write_text(other.read_text())
        monkeypatch.setattr("cohorts.REGISTRY", Registry(folder))
        return run_of(name, **{**QUICK, **settings})

    return make


@pytest.mark.slow
@pytest.mark.parametrize("name", ["WithDropout", "WithNoise", "LateNoise", "AlwaysDropping"])
def test_a_head_that_draws_learns_the_same_alone_in_a_cohort_and_resumed(dataset, mine, name):
    runs = [mine(name, seed=0), run_of("detail", **QUICK), mine(name, seed=1)]
    together = fitted(dataset, runs, machine=LANES)
    torch.rand(7)
    alone = fitted(dataset, runs[:1])[0]
    assert same(together[0], alone)
    assert not same(together[0], together[2])
    assert same(together[1], fitted(dataset, runs[1:2])[0])
    features = features_of(dataset, runs[:1])
    (again,) = trainers_of(dataset, runs[:1], features)
    assert isinstance(alone.recorder, Listener)
    again.restore(alone.recorder.states[0])
    fit([again], features)
    assert same(again, alone)


@pytest.mark.slow
def test_a_trained_tail_with_drop_path_learns_the_same_alone_and_in_a_cohort(dataset):
    def learned(runs: list[RunSpec], machine: Hardware) -> list[HeadTrainer]:
        features = features_of(dataset, runs, machine)
        trainers = trainers_of(dataset, runs, features)
        for trainer in trainers:
            trainer.model.tail.blocks[0].drop_path1 = DropPath(0.5)
        fit(trainers, features)
        return trainers

    runs = [run_of(head, unfreeze=2, **QUICK) for head in ("bilinear", "fpn")]
    together = learned(runs, LANES)
    assert all(trainer.model.randomness.may_draw for trainer in together)
    assert same(together[0], learned(runs[:1], FP32)[0])


@pytest.mark.slow
def test_a_baseline_that_draws_is_repeatable(dataset):
    run = baseline_of("unet", {"encoder": "efficientnet-b0", "width": 2}, epochs=1, crops_per_image=2)
    a, b = (fitted(dataset, [run])[0] for _ in range(2))
    assert a.model.randomness.may_draw
    assert same(a, b)


@pytest.mark.slow
@pytest.mark.parametrize(
    "run",
    [*(run_of(name, options=card.options, **ONCE) for name, card in one_a_builder().items()), run_of(unfreeze=1, **ONCE)],
    ids=lambda run: run.head,
)
def test_shipped_heads_draw_no_random_numbers_and_are_not_watched(dataset, run, monkeypatch):
    if not run.unfreeze:
        monkeypatch.setattr(randomness, "SeededDraws", None)
        fitted(dataset, [run])
        monkeypatch.undo()
    monkeypatch.setattr(randomness, "_is_deterministic", lambda module: False)
    assert not fitted(dataset, [run])[0].model.randomness.may_draw


def test_a_model_that_draws_even_in_eval_mode_gives_the_same_twice(dataset, mine):
    features = features_of(dataset, [run := mine("AlwaysDropping")])
    (trainer,) = trainers_of(dataset, [run], features)
    first, second = ([matrices[0].tolist() for _, matrices, _ in score_images([trainer.model], features, "test")] for _ in range(2))
    assert first == second


# --- Seeded alone ---------------------------------------------------------------------------------------------------------------------------

X = torch.randn(4, 6, 8, 8, generator=torch.Generator().manual_seed(0))
DRAW = {
    "dropout": lambda: F.dropout(X, 0.3),
    "whole channels": lambda: F.dropout2d(X, 0.3),
    "noise": lambda: torch.randn_like(X),
    "a factory": lambda: torch.rand(3, 4),
    "an order": lambda: torch.randperm(50),
    "rrelu": lambda: F.rrelu(X, training=True),
    "gumbel": lambda: F.gumbel_softmax(X),
    "attention": lambda: F.scaled_dot_product_attention(X, X, X, dropout_p=0.5),
    "a generator of its own": lambda: torch.rand(3, generator=torch.Generator().manual_seed(torch.initial_seed() % 2**32)),
}
QUIET = {
    "dropout in eval mode": lambda: F.dropout(X, 0.3, training=False),
    "attention without dropout": lambda: F.scaled_dot_product_attention(X, X, X),
    "rrelu in eval mode": lambda: F.rrelu(X),
    "a convolution": lambda: F.conv2d(X, X[:, :, :3, :3]),
}


def drawn(work: Callable[[], Tensor], *seed: int, at_once: bool = False) -> tuple[Tensor, bool]:
    with SeededDraws(seed, CPU, at_once=at_once) as drawing:
        return work(), drawing.drew


@pytest.mark.parametrize("name", DRAW)
def test_random_operations_follow_from_the_seed_and_leave_torchs_generator_alone(name):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, drew = drawn(DRAW[name], 0, 1, 2)
    assert drew
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(drawn(DRAW[name], 0, 1, 2)[0], first)
    assert torch.equal(drawn(DRAW[name], 0, 1, 2, at_once=True)[0], first)
    assert not torch.equal(drawn(DRAW[name], 0, 1, 3)[0], first)


@pytest.mark.parametrize("name", QUIET)
def test_layers_without_randomness_are_recognised(name):
    assert not drawn(QUIET[name], 0)[1]


def test_activation_checkpointing_draws_the_same_numbers_again():
    """Activation checkpointing reads the generator's state before anything is drawn."""
    layer = nn.Sequential(nn.Conv2d(6, 6, 1), nn.Dropout(0.5), nn.Conv2d(6, 6, 1))
    gradients = []
    for work in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        layer.zero_grad()
        with ModelRandomness(layer).seeded(0, 0, 0) as drawing:
            loss = work(X).square().sum()
            drawing.backward()
            loss.backward()
        gradients.append(layer[0].weight.grad.clone())
    assert torch.equal(*gradients)


def test_the_fused_dropout_of_a_gpu_drops_what_a_processors_drops():
    fused = torch.ops.aten.native_dropout
    for x in (X, X.bfloat16(), X.to(memory_format=torch.channels_last)):
        assert torch.equal(drawn(lambda x=x: fused(x, 0.3, True)[0], 5)[0], drawn(lambda x=x: F.dropout(x, 0.3), 5)[0])


def test_a_gpus_numbers_are_drawn_on_the_processor(monkeypatch):
    """With tensors that have a device and no values: which operations see which device is all that can be known without one."""
    monkeypatch.setattr(SeededDraws, "_begin", lambda self: None)
    seen: list[set[str]] = []

    def on_cpu(func, args, kwargs, device):
        def spied(*here, **named):
            seen.append({x.device.type for x in here if isinstance(x, Tensor)} | {str(named.get("device") or "cpu")})
            return func(*here, **named)

        return real(spied, args, kwargs, device)

    real = randomness.draw_on_cpu
    monkeypatch.setattr(randomness, "draw_on_cpu", on_cpu)
    with FakeTensorMode():
        x = torch.empty(2, 8, 4, 4, device="cuda").to(memory_format=torch.channels_last)
        with SeededDraws((0,), torch.device("cuda")):
            found = [F.dropout(x, 0.3), F.dropout2d(x, 0.3), torch.rand_like(x), torch.rand(3, device="cuda"), x.bernoulli_(0.5)]
    assert seen == [{"cpu"}] * 5
    assert {one.device.type for one in found} == {"cuda"}
    assert found[-1] is x
    assert found[0].stride() == x.stride()
