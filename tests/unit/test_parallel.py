"""Lanes change when work is done, never what comes out, and lose no failure."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest
from cohorts import FP32, dataset_of, features_of, fitted, run_of, same, trainers_of

from cellbench.parallel import WorkerPool
from cellbench.training import tiled_inference
from cellbench.training.tiled_inference import segment_images

TWO = replace(FP32, lanes=2)


@pytest.mark.parametrize("num", [1, 3])
def test_results_keep_the_order_of_their_inputs(num):
    gate = threading.Event()

    def first():
        assert num == 1 or gate.wait(10)  # with several threads, the second finishes before the first
        return 1

    with WorkerPool(num) as pool:
        assert pool.run_all([first, lambda: gate.set() or 2, lambda: 3]) == [1, 2, 3]
        assert list(pool.prefetch(range(20), lambda n: n + 1, lambda n: n * 10)) == [(n + 1) * 10 for n in range(20)]


@pytest.mark.parametrize("num", [1, 3])
def test_a_failure_in_a_thread_is_raised_in_place_of_its_result(num):
    def fail(n):
        if n == 4:
            raise ValueError("four")
        return n

    with WorkerPool(num) as pool:
        seen = []
        with pytest.raises(ValueError, match="four"):
            seen.extend(pool.prefetch(range(9), lambda n: n, fail))
        with pytest.raises(ValueError, match="four"):
            pool.run_all([lambda n=n: fail(n) for n in range(9)])
        assert list(pool.prefetch([1], lambda n: n, fail)) == [1]


def test_stopping_the_iteration_cancels_pending_work():
    begun = []
    with WorkerPool(2) as pool:
        for _ in pool.prefetch(range(1000), lambda n: n, begun.append):
            break
    assert len(begun) < 10


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"repeat_views_every": 1}, {"unfreeze": 1}], ids=["streamed", "kept", "unfrozen"])
def test_runs_train_the_same_with_two_threads_as_with_one(small_folder, settings):
    dataset = dataset_of(small_folder)
    runs = [run_of(head, batch_size=size, **settings) for head, size in (("bilinear", 4), ("fpn", 7), ("detail", 3))]
    one, two, alone = fitted(dataset, runs), fitted(dataset, runs, machine=TWO), fitted(dataset, runs[1:2], machine=TWO)
    assert all(same(a, b) for a, b in zip(one, two, strict=True))
    assert same(one[1], alone[0])


@pytest.mark.slow
def test_images_are_segmented_the_same_with_two_threads_as_with_one(small_folder, monkeypatch):
    """One thread joins the predictions of models of one shape together, here of two heads and of three settings of another one."""
    dataset = dataset_of(small_folder)
    runs = [
        run_of("bilinear"),
        *(run_of("fpn", targets="cell+distance", seed=seed) for seed in range(3)),
        run_of("detail"),
        run_of("fpn", tta="d4"),
    ]
    answers = []
    for machine, most_bytes in ((FP32, 2**21), (FP32, 1), (TWO, 2**21)):
        monkeypatch.setattr(tiled_inference, "GROUP_BYTES", most_bytes)
        features = features_of(dataset, runs, machine=machine)
        models = [trainer.model for trainer in trainers_of(dataset, runs, features)]
        answers.append(list(segment_images(models, features, "test", by_class=True)))
    for (index, found), *others in zip(*answers, strict=True):
        assert len({one.cell.tobytes() for one in found}) == len(runs)
        for other, again in others:
            assert index == other
            for a, b in zip(found, again, strict=True):
                assert a.finite
                assert b.finite
                assert all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ("classes", "cell", "fields", "foreground"))
        assert [one.fields is not None for one in found] == [False, True, True, True, False, False]
        assert all(one.foreground is not None for one in found)
