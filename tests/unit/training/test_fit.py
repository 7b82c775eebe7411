"""Training: neither the other runs of a cohort nor the source of features changes any number."""

from __future__ import annotations

import errno
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cohorts import FP32, Listener, baseline_of, dataset_of, features_of, fitted, run_of, same, score_images, trainers_of
from PIL import Image
from small_data import write_set

from cellbench.errors import CellbenchError
from cellbench.features.cache_admin import features_dir
from cellbench.features.extractor import Batch
from cellbench.hardware import Hardware
from cellbench.parallel import WorkerPool
from cellbench.reporting.plots import run as run_plots
from cellbench.reporting.plots import style
from cellbench.training.fit import fit
from cellbench.training.tiled_inference import score_tiles
from cellbench.training.trainer import HeadTrainer, MiniBatches, batch_sizes


@pytest.fixture
def dataset(tmp_path):
    write_set(tmp_path, ["a0.png", "a1.jpg", "b2.png", "b3.jpeg"], ["t0.png"])
    return dataset_of(tmp_path / "smears")


RUNS = {
    "heads": [run_of("bilinear"), run_of("transposed-conv", options={"width": 32}), run_of("fpn"), run_of("detail")],
    "seeds": [run_of(seed=0), run_of(seed=1)],
    "batch sizes": [run_of(batch_size=3), run_of(batch_size=7), run_of(batch_size=64)],
    "losses and schedules": [run_of(loss="ce"), run_of(loss="0.5 bce + 1 dice", schedule="constant"), run_of(lr=1e-2, weight_decay=0.1)],
    "ends": [run_of(epochs=1), run_of(epochs=4, patience=1), run_of(epochs=3)],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_run_learns_the_same_alone_and_in_a_cohort(dataset, name):
    together = fitted(dataset, RUNS[name])
    for run, trainer in zip(RUNS[name], together, strict=True):
        # With the levels of the whole cohort computed, or only its own: both must agree.
        assert same(trainer, fitted(dataset, [run])[0]), run.model


@pytest.mark.slow
def test_a_pruned_run_does_not_disturb_the_others(dataset):
    runs = [run_of(seed=0), run_of(seed=1), run_of("fpn")]
    pruned = fitted(dataset, runs, most={1: 1})
    assert pruned[1].ended == "pruned"
    assert len(pruned[1].history) == 1
    assert 0 < pruned[1].trunk_s < pruned[0].trunk_s == pruned[2].trunk_s  # the backbone's part of the epochs that it took part in
    assert all(min(one.train_cpu_s, one.trunk_cpu_s) > 0 for one in pruned)
    assert same(pruned[0], fitted(dataset, runs[:1])[0])
    assert same(pruned[2], fitted(dataset, runs[2:])[0])


DISK = {"memory_bytes": 0, "disk_bytes": 2**30, "key": "test", "backbone": "vit-tiny-random"}
BF16 = Hardware(device_name="cpu", precision_name="bf16", memory_bytes=2**30)


@pytest.mark.slow
@pytest.mark.parametrize("machine", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("views", [1, 2])
def test_cached_features_equal_streamed_ones(dataset, views, machine):
    runs = [run_of(head, repeat_views_every=views, epochs=views + 1) for head in ("fpn", "detail")]
    streamed, in_memory = fitted(dataset, runs, machine=machine, memory_bytes=0), fitted(dataset, runs, machine=machine)
    on_disk, from_disk = fitted(dataset, runs, machine=machine, **DISK), fitted(dataset, runs, machine=machine, **DISK)
    for trainers in (in_memory, on_disk, from_disk):
        assert all(same(a, b) for a, b in zip(streamed, trainers, strict=True))


@pytest.mark.slow
def test_features_on_disk_serve_the_next_call_without_the_backbone(dataset):
    runs = [run_of("fpn", repeat_views_every=2, epochs=3)]
    first = fitted(dataset, runs, **DISK)
    features = features_of(dataset, runs, **DISK)
    features.backbone.maps = None  # would raise if called
    trainers = trainers_of(dataset, runs, features)
    fit(trainers, features)
    assert same(first[0], trainers[0])


@pytest.mark.slow
@pytest.mark.parametrize("damage", [lambda data: data[:-1] + bytes([data[-1] ^ 0xFF]), lambda data: data[:-8], lambda data: b"{}"])
def test_damaged_features_are_computed_again(dataset, damage):
    runs = [run_of("fpn", repeat_views_every=1)]
    first = fitted(dataset, runs, **DISK)
    files = list(features_dir().rglob("level-*.safetensors"))
    assert files
    for file in files:
        file.write_bytes(damage(file.read_bytes()))
    assert same(first[0], fitted(dataset, runs, **DISK)[0])


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "while writing"])
def test_features_are_streamed_where_the_disk_is_too_small(dataset, monkeypatch, when):
    runs = [run_of("fpn", repeat_views_every=1)]
    streamed = fitted(dataset, runs, memory_bytes=0)
    said = []

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    if when == "before":
        monkeypatch.setattr("cellbench.features.sharded_cache.shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    else:
        monkeypatch.setattr("cellbench.features.sharded_cache.write_atomic", full)
    assert same(streamed[0], fitted(dataset, runs, **DISK, tell=said.append)[0])
    assert any("No space left" in line for line in said)
    assert not list(features_dir().rglob("*.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize("unfreeze", [1, 3])
def test_a_cut_backbone_gives_what_the_whole_backbone_gives(dataset, unfreeze):
    whole, cut = run_of("fpn"), run_of("fpn", unfreeze=unfreeze)
    models, batches = [], []
    for run in (whole, cut):
        features = features_of(dataset, [run])
        models.append(trainers_of(dataset, [run], features)[0].model.eval())
        batches.append(next(iter(features.tiles("test", WorkerPool(1))))[0])
    with torch.no_grad():
        assert torch.equal(models[0](batches[0]), models[1](batches[1]))


@pytest.mark.slow
def test_an_unfrozen_tail_learns_and_the_backbone_does_not(dataset):
    run = run_of("bilinear", unfreeze=2)
    features = features_of(dataset, [run])
    trainer = trainers_of(dataset, [run], features)[0]
    before = {name: x.clone() for name, x in trainer.model.tail.state_dict().items()}
    frozen = {name: x.clone() for name, x in features.backbone.module.state_dict().items()}
    fit([trainer], features)
    assert all(not torch.equal(x, before[name]) for name, x in trainer.model.tail.state_dict().items() if name.endswith("weight"))
    assert all(torch.equal(x, frozen[name]) for name, x in features.backbone.module.state_dict().items())


def test_unfrozen_stages_of_a_pyramid_learn_beside_a_frozen_first_one(dataset):
    run = run_of("fpn", backbone="efficientnet-lite0", unfreeze=4, tail_lr_scale=0.1)
    features = features_of(dataset, [run])
    trainer = trainers_of(dataset, [run], features)[0]
    before = {name: x.clone() for name, x in trainer.model.tail.named_parameters()}
    fit([trainer], features)
    assert all(not torch.equal(x, before[name]) for name, x in trainer.model.tail.named_parameters() if name.endswith("weight"))
    assert len(trainer.model.tail.blocks) == 4


def test_a_pixel_adapter_is_refused_for_a_pyramid(dataset):
    run = run_of("fpn", backbone="efficientnet-lite0", unfreeze=1, pixel_adapter=4)
    with pytest.raises(CellbenchError, match="efficientnet-lite0 is a pyramid, whose first levels see the pixels"):
        trainers_of(dataset, [run], features_of(dataset, [run]))


@pytest.mark.slow
def test_unfrozen_runs_of_one_cohort_do_not_touch_each_other(dataset):
    runs = [run_of("bilinear", unfreeze=2, epochs=2), run_of("fpn", unfreeze=2, epochs=2, layer_decay=0.5)]
    together = fitted(dataset, runs)
    assert all(same(a, fitted(dataset, [run])[0]) for a, run in zip(together, runs, strict=True))


def test_lora_begins_as_the_frozen_backbone_and_only_its_updates_learn(dataset):
    runs = [run_of("fpn"), run_of("fpn", unfreeze=2, lora_rank=3, lr=1e-2)]
    features = [features_of(dataset, [run]) for run in runs]
    plain, lora = (trainers_of(dataset, [run], one)[0] for run, one in zip(runs, features, strict=True))
    batches = [next(iter(one.tiles("test", WorkerPool(1))))[0] for one in features]
    with torch.no_grad():
        assert torch.equal(plain.model.eval()(batches[0]), lora.model.eval()(batches[1]))
    before = {name: x.clone() for name, x in lora.model.tail.named_parameters()}
    fit([lora], features[1])
    changed = {name for name, x in lora.model.tail.named_parameters() if not torch.equal(x, before[name])}
    assert changed == {name for name in before if name.endswith((".down", ".up"))}
    block = features[1].backbone.module.net.blocks[-1]
    linears = [layer for layer in block.modules() if isinstance(layer, torch.nn.Linear)]
    updates = 2 * sum(3 * (layer.in_features + layer.out_features) for layer in linears)
    assert lora.model.num_params == plain.model.num_params + updates
    assert not any(name.endswith(("qkv.weight", "fc1.weight")) for name in lora.model.state_dict())  # stored with the run: not the backbone


def test_a_pixel_adapter_begins_as_the_frozen_backbone_and_learns_beside_lora_on_the_same_pass(dataset):
    runs = [run_of("fpn", unfreeze=2, lora_rank=3, lr=1e-2, **more) for more in ({}, {"pixel_adapter": 4})]
    assert runs[0].cohort_key == runs[1].cohort_key
    features = features_of(dataset, runs)
    plain, fed = trainers_of(dataset, runs, features)
    batch = next(iter(features.tiles("test", WorkerPool(1))))[0]
    with torch.no_grad():
        assert torch.equal(plain.model.eval()(batch), fed.model.eval()(batch))
    assert fed.model.num_params > plain.model.num_params
    fit([fed], features)
    with torch.no_grad():
        learned = fed.model.eval()(batch)
        fed.model.adapter.to_tokens.weight.zero_(), fed.model.adapter.to_tokens.bias.zero_()
        assert not torch.equal(learned, fed.model(batch))


@pytest.mark.parametrize("settings", [{}, {"lora_rank": 3, "pixel_adapter": 4}], ids=["blocks", "lora and adapter"])
def test_an_ensemble_of_runs_with_trained_blocks_gives_the_mean_of_their_probabilities(dataset, settings):
    tuned = {"unfreeze": 2, "lr": 1e-2, "tail_lr_scale": 0.5, **settings}
    runs = [run_of("fpn", seed=0, **tuned), run_of("fpn", seed=1, **tuned), run_of("fpn", ensemble="0, 1", **tuned)]
    features = features_of(dataset, runs)
    trainers = trainers_of(dataset, runs, features)
    fit(trainers, features)
    batch = next(iter(features.tiles("test", WorkerPool(1))))[0]
    with torch.no_grad():
        first, second, mean = (trainer.model.eval()(batch).softmax(1) for trainer in trainers)
    assert (first - second).abs().max() > 0.01
    torch.testing.assert_close(mean, (first + second) / 2)


@pytest.mark.slow
def test_lora_runs_share_the_pass_with_whole_blocks_and_resume_to_the_same_numbers(dataset):
    runs = [run_of("bilinear", unfreeze=2, lora_rank=2, epochs=2), run_of("bilinear", unfreeze=2, epochs=2)]
    assert runs[0].cohort_key == runs[1].cohort_key
    together = fitted(dataset, runs)
    features = features_of(dataset, runs[:1])
    (again,) = trainers_of(dataset, runs[:1], features)
    again.restore(together[0].recorder.states[0])
    fit([again], features)
    assert same(again, together[0])


def test_deeper_blocks_learn_faster(dataset):
    run = run_of("bilinear", unfreeze=3, lr=1e-2, tail_lr_scale=0.1, layer_decay=0.5)
    shares = [group["share"] for group in trainers_of(dataset, [run], features_of(dataset, [run]))[0].model.groups(run)]
    assert shares == pytest.approx([1.0, 0.1, 0.1, 0.05, 0.025])


@pytest.mark.slow
def test_the_backbone_runs_once_a_view_however_many_runs_learn(dataset):
    runs = [run_of("bilinear"), run_of("fpn"), run_of("detail", batch_size=7)]
    features = features_of(dataset, runs)
    counts = []
    inner = features.backbone.maps
    features.backbone.maps = lambda pixels: (counts.append(len(pixels)), inner(pixels))[1]
    fit(trainers_of(dataset, runs, features), features)
    val_tiles = sum(len(features.grid("val", i)) for i in range(len(dataset.val)))
    assert sum(counts) == 2 * features.plan.num_views + val_tiles


def test_repeated_views_pass_the_backbone_once_in_a_whole_training(dataset):
    runs = [run_of(repeat_views_every=1, epochs=3)]
    features = features_of(dataset, runs)
    counts = []
    inner = features.backbone.maps
    features.backbone.maps = lambda pixels: (counts.append(len(pixels)), inner(pixels))[1]
    fit(trainers_of(dataset, runs, features), features)
    val_tiles = sum(len(features.grid("val", i)) for i in range(len(dataset.val)))
    assert sum(counts) == features.plan.num_views + val_tiles


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one(dataset):
    runs = [run_of("transposed-conv", options={"width": 32}, epochs=3), run_of("bilinear", epochs=3)]
    whole = fitted(dataset, runs)
    features = features_of(dataset, runs)
    again = trainers_of(dataset, runs, features)
    # One broke off after its second epoch, the other after its first.
    for trainer, source, epoch in ((again[0], whole[0], 1), (again[1], whole[1], 0)):
        assert isinstance(source.recorder, Listener)
        trainer.restore(source.recorder.states[epoch])
    before_s = [trainer.trunk_s for trainer in again]
    fit(again, features)
    assert all(same(a, b) for a, b in zip(whole, again, strict=True))
    # What was spent before the interruption is not forgotten; the first was not there for the epoch that only the second saw.
    assert 0 < before_s[1] < before_s[0] < again[0].trunk_s < features.backbone.seconds + before_s[0]


@pytest.mark.slow
def test_a_checkpoint_of_a_gpu_resumes_on_a_cpu(dataset):
    runs = [run_of("bilinear", epochs=2)]
    (whole,) = fitted(dataset, runs)
    assert isinstance(whole.recorder, Listener)
    features = features_of(dataset, runs)
    (again,) = trainers_of(dataset, runs, features)
    state = whole.recorder.states[0]
    for group in state["optimiser"]["param_groups"]:  # as AdamW has them where its step is captured
        group |= {"capturable": True, "lr": torch.tensor(group["lr"])}
    again.restore(state)
    fit([again], features)
    assert same(whole, again)


@pytest.mark.slow
def test_other_threads_random_numbers_do_not_matter(dataset):
    torch.manual_seed(1)
    a = fitted(dataset, [run_of("detail")])[0]
    torch.manual_seed(2)
    torch.rand(7)
    assert same(a, fitted(dataset, [run_of("detail")])[0])


@pytest.mark.slow
def test_another_seed_is_another_run(dataset):
    a, b = fitted(dataset, [run_of(seed=0), run_of(seed=1)])
    assert not same(a, b)


@pytest.mark.slow
def test_the_best_epoch_is_kept(dataset):
    trainer = fitted(dataset, [run_of("bilinear", epochs=5, lr=0.05)])[0]
    best = max(range(len(trainer.history)), key=lambda e: trainer.history[e]["val/dice"])
    assert trainer.best_epoch == best
    features = features_of(dataset, [trainer.run])
    counts = score_tiles([trainer.model], features, "val", lambda *_: None, WorkerPool(1))[0]
    dice = 2 * counts[1, 1] / (counts[1].sum() + counts[:, 1].sum())
    assert dice == pytest.approx(trainer.history[best]["val/dice"], abs=1e-12)


@pytest.mark.slow
def test_selection_by_loss_takes_the_lowest(dataset):
    trainer = fitted(dataset, [run_of("bilinear", epochs=4, select="val/loss", lr=0.05)])[0]
    assert trainer.best_epoch == int(np.argmin([row["val/loss"] for row in trainer.history]))


@pytest.mark.slow
def test_where_no_validation_image_has_a_cell_the_loss_chooses_the_epoch(dataset, tmp_path):
    height, width = dataset.val[0].size_px
    Image.fromarray(np.zeros((height, width), np.uint8)).save(tmp_path / "empty.png")
    empty = replace(dataset, val=(replace(dataset.val[0], mask=tmp_path / "empty.png"),))
    trainer = fitted(empty, [run_of("bilinear", epochs=4, lr=0.05)])[0]
    assert trainer.best_epoch == int(np.argmin([row["val/loss"] for row in trainer.history]))
    assert not any("val/dice" in row for row in trainer.history)
    assert trainer.best_weights
    style.save_figure(run_plots.plot_curves(trainer.history, trainer.best_epoch), tmp_path / "curves.png")


def test_early_stopping_waits_as_long_as_asked(dataset):
    run = run_of(epochs=30, patience=2)
    trainer = trainers_of(dataset, [run], features_of(dataset, [run]))[0]
    cell_found_px = [50, 60, 55, 70, 69, 70, 90]  # of 100; best in epochs 0, 1 and 3, and epoch 5 is no better than 3
    trainer.on(features_of(dataset, [run]))
    for found in cell_found_px:
        assert not trainer.ended
        trainer.start_epoch()
        trainer.end_epoch(np.array([[100, 0], [100 - found, found]]))
        if trainer.ended:
            break
    assert (trainer.ended, trainer.best_epoch, trainer.epoch) == ("stopped early", 3, 6)


@pytest.mark.slow
def test_without_patience_no_run_stops_early(dataset):
    trainer = fitted(dataset, [run_of(epochs=4, patience=0, lr=1e-12)])[0]
    assert (trainer.ended, trainer.epoch) == ("done", 4)


@pytest.mark.slow
def test_fit_stops_a_run_that_no_longer_gets_better(dataset):
    trainer = fitted(dataset, [run_of(epochs=30, patience=2, select="val/loss", lr=1.0, schedule="constant", warmup_epochs=0)])[0]
    assert trainer.ended == "stopped early"
    assert len(trainer.history) == trainer.epoch == trainer.best_epoch + 3 < 30


@pytest.mark.slow
def test_a_nan_loss_fails_the_run_and_not_the_cohort(dataset):
    runs = [run_of(seed=0), run_of(seed=1)]
    features = features_of(dataset, runs)
    trainers = trainers_of(dataset, runs, features)
    with torch.no_grad():
        next(trainers[0].model.parameters()).fill_(math.nan)
    fit(trainers, features)
    assert trainers[0].ended.startswith("failed: the training loss became nan")
    assert same(trainers[1], fitted(dataset, runs[1:])[0])


def test_the_schedule_warms_up_and_ends_near_zero(dataset):
    run = run_of(epochs=10, warmup_epochs=2, lr=1e-2)
    trainer = trainers_of(dataset, [run], features_of(dataset, [run]))[0]
    steps = math.ceil(trainer.num_views / run.batch_size)
    rates = [trainer.lr(step) for step in range(10 * steps)]
    assert rates[: 2 * steps] == sorted(rates[: 2 * steps])
    assert rates[2 * steps :] == sorted(rates[2 * steps :], reverse=True)
    assert max(rates) == pytest.approx(1e-2)
    assert rates[-1] < 1e-3


@pytest.mark.parametrize(
    ("num_views", "batch_size", "sizes"),
    [(9, 8, [5, 4]), (8, 8, [8]), (16, 8, [8, 8]), (17, 8, [6, 6, 5]), (3, 8, [3]), (1, 8, [1]), (5, 2, [2, 2, 1]), (4, 1, [1, 1, 1, 1])],
)
def test_mini_batches_are_as_few_as_the_batch_size_allows_and_as_equal_as_can_be(num_views, batch_size, sizes):
    assert batch_sizes(num_views, batch_size) == sizes


@pytest.mark.parametrize("chunks", [[9], [1] * 9, [4, 5], [2, 6, 1], [8, 1]])
def test_mini_batches_do_not_depend_on_the_chunks_in_which_views_come(chunks):
    views = torch.arange(9.0)
    mini_batches, at, found = MiniBatches(9, 8), 0, []
    for num in chunks:
        pixels = views[at : at + num].reshape(-1, 1, 1, 1)
        found += [batch.pixels.flatten().tolist() for batch in mini_batches.of(Batch({}, pixels, pixels))]
        at += num
    assert found == [[0, 1, 2, 3, 4], [5, 6, 7, 8]]


def test_no_step_of_an_epoch_sees_fewer_tiles_than_another_by_more_than_one(dataset, monkeypatch):
    sizes = []
    learn = HeadTrainer._train_step
    monkeypatch.setattr(HeadTrainer, "_train_step", lambda self, batch: (sizes.append(batch.num), learn(self, batch))[1])
    run = run_of(epochs=1, batch_size=16)  # the machine's chunks are of 16
    trainer = fitted(dataset, [run])[0]
    assert trainer.num_views % 16 not in (0, 15)
    assert sum(sizes) == trainer.num_views
    assert max(sizes) - min(sizes) <= 1
    assert len(sizes) == trainer.steps_per_epoch == math.ceil(trainer.num_views / 16)


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 2])
def test_batch_norm_over_a_single_value_fails_the_run_and_not_the_cohort(dataset, batch_size):
    runs = [run_of(tile_px=16, batch_size=num, crops_per_image=1, epochs=1) for num in (64, batch_size)]
    larger, single = fitted(dataset, runs)
    assert single.num_views % 2 == 1  # with batch_size 2 the last mini-batch is one tile
    assert single.ended.startswith("failed: batch norm cannot learn from a mini-batch of one tile with a map of one place (tile_px = 16")
    assert single.history == []
    assert larger.ended == "done"
    assert same(larger, fitted(dataset, runs[:1])[0])


@pytest.mark.slow
def test_the_unet_baseline_learns_in_the_same_harness(dataset):
    run = baseline_of("unet", {"width": 4}, epochs=2)
    a, b = (fitted(dataset, [run])[0] for _ in range(2))
    assert same(a, b)
    assert len(a.history) == 2


@pytest.mark.slow
def test_learning_lowers_the_loss_and_finds_the_discs(dataset):
    trainer = fitted(dataset, [run_of("detail", epochs=12, crops_per_image=8, lr=5e-3)])[0]
    assert trainer.history[-1]["train/loss"] < 0.5 * trainer.history[0]["train/loss"]
    assert trainer.history[trainer.best_epoch]["val/dice"] > 0.9


@pytest.mark.slow
def test_the_whole_image_is_judged_also_where_it_is_smaller_than_a_tile(dataset):
    run = run_of("bilinear", tile_px=224)
    features = features_of(dataset, [run], FP32)
    trainer = trainers_of(dataset, [run], features)[0]
    for _, matrices, answers in score_images([trainer.model], features, "test"):
        height, width = answers[0].classes.shape
        assert matrices[0].sum() == height * width
