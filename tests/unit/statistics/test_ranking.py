"""Ranks, critical differences, and averages over backbones and heads, against scipy and Demsar 2006."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats as st
from made_up_scores import scores

from cellbench.errors import CellbenchError
from cellbench.statistics.comparison import compare, compare_all
from cellbench.statistics.ranking import critical_difference, marginal_scores
from cellbench.statistics.scores import seed_sd

pytestmark = pytest.mark.filterwarnings("error")


# Ranks of Demsar 2006, table 6: C4.5, C4.5+m, C4.5+cf, C4.5+m+cf on 14 data sets.
DEMSAR = np.array(
    [
        [4, 1, 4, 4, 4, 1, 3, 2.5, 4, 2.5, 4, 3, 4, 3],
        [3, 2, 1, 1, 2, 2.5, 2, 2.5, 3, 2.5, 2.5, 2, 1, 1],
        [2, 3, 2, 3, 3, 4, 4, 4, 2, 2.5, 1, 4, 2, 4],
        [1, 4, 3, 2, 1, 2.5, 1, 1, 1, 2.5, 2.5, 1, 3, 2],
    ]
)


def test_average_ranks_and_friedman_of_demsar():
    """chi2 = 9.28 there, without the tie correction that scipy makes: undone here."""
    r = critical_difference([scores(name, -ranks) for name, ranks in zip(("C4.5", "+m", "+cf", "+m+cf"), DEMSAR, strict=True)])
    assert dict(zip(r.models, r.ranks, strict=True)) == pytest.approx({"C4.5": 3.143, "+m": 2.0, "+cf": 2.893, "+m+cf": 1.964}, abs=5e-4)
    num_tied = sum(t**3 - t for column in DEMSAR.T for t in np.unique(column, return_counts=True)[1])
    assert r.statistic * (1 - num_tied / (14 * (4**3 - 4))) == pytest.approx(9.28, abs=0.01)


@pytest.mark.parametrize(("alpha", "apart"), [(0.05, 1.25), (0.10, 1.12)])
def test_critical_difference_of_demsar(alpha, apart):
    r = critical_difference([scores(f"m{n}", -ranks) for n, ranks in enumerate(DEMSAR)], alpha=alpha)
    assert r.critical_difference == pytest.approx(apart, abs=0.005)


def test_cliques_of_demsar():
    """At 0.10 C4.5 is worse than +m and +m+cf; of C4.5+cf the data say nothing."""
    r = critical_difference([scores(name, -ranks) for name, ranks in zip(("0", "m", "cf", "mcf"), DEMSAR, strict=True)], alpha=0.1)
    assert r.cliques == (("mcf", "m", "cf"), ("cf", "0"))


@pytest.mark.parametrize(("num", "q"), [(3, 2.343), (4, 2.569), (5, 2.728), (7, 2.949), (10, 3.164)])
def test_nemenyi_critical_values_of_demsar_table_5(rng, num, q):
    r = critical_difference([scores(f"m{n}", x) for n, x in enumerate(rng.normal(size=(num, 30)))])
    # 0.002: the table is cut to three places from a studentized range that was rounded before
    assert r.critical_difference / math.sqrt(num * (num + 1) / 180) == pytest.approx(q, abs=0.002)


def test_friedman_is_scipys(dice):
    r = critical_difference([scores(f"m{n}", x) for n, x in enumerate(dice[:6])])
    assert (r.statistic, r.p) == pytest.approx(tuple(st.friedmanchisquare(*dice[:6])))


def test_cliques_are_maximal_and_hold_what_is_close():
    from cellbench.statistics.ranking import _runs

    assert _runs([1.0, 1.4, 1.9, 2.2, 5.0], 1.0) == [(0, 1, 2), (1, 2, 3)]


def test_no_clique_where_all_are_apart(rng):
    x = rng.normal(size=100)
    r = critical_difference([scores(f"m{n}", x - n) for n in range(3)])
    assert (r.models, r.cliques) == (("m0", "m1", "m2"), ())


def test_models_without_a_difference_are_one_clique(rng):
    r = critical_difference([scores(f"m{n}", x) for n, x in enumerate(rng.normal(size=(4, 30)))])
    assert r.p > 0.05
    assert [set(clique) for clique in r.cliques] == [{"m0", "m1", "m2", "m3"}]


def test_two_models_rank_by_the_paired_test(dice):
    a, b = scores("a", dice[0]), scores("b", dice[20])
    r = critical_difference([a, b])
    assert (r.test, r.p, r.cliques, r.models) == ("Wilcoxon", compare(a, b).p, (), ("a", "b"))


def test_same_scores_everywhere_rank_the_same():
    r = critical_difference([scores(name, [0.9] * 12) for name in "abc"])
    assert (r.p, r.ranks, r.cliques) == (1.0, (2, 2, 2), (("a", "b", "c"),))


def test_one_image_gives_no_ranking_and_a_note():
    r = critical_difference([scores(name, [x]) for name, x in zip("abc", (0.1, 0.2, 0.3), strict=True)])
    assert (r.p, r.notes) == (None, ("1 image: nothing to test",))


def test_few_images_are_noted_as_rough(rng):
    r = critical_difference([scores(name, rng.random(8)) for name in "abc"])
    assert "8 images: Friedman's p is rough" in r.notes


@pytest.mark.parametrize("num", [2, 3, 6])
@pytest.mark.parametrize("num_models", [2, 3, 9])
def test_a_ranking_separates_models_only_where_pairs_can_be_significant(num, num_models):
    """On three images Friedman's and Nemenyi's tests would tell nine models apart, of which no pair can reach p below 0.05."""
    models = [scores(f"m{k}", np.linspace(0.9, 0.95, num) - 0.1 * k) for k in range(num_models)]
    r = critical_difference(models)
    pairs = compare_all(models)
    if not any(d.significant for d in pairs):
        assert r.cliques == (tuple(m.model for m in models),)
        assert (r.p, r.critical_difference) == (None, None)
        assert any("no difference can be significant" in note for note in (*r.notes, *pairs[0].notes))
    else:
        assert (num, num_models) == (6, 2)
        assert r.cliques == ()


def test_a_ranking_of_some_models_counts_all_compared_pairs():
    models = [scores(f"m{k}", np.linspace(0.9, 0.95, 8) - 0.1 * k) for k in range(3)]
    assert critical_difference(models).critical_difference is not None
    assert critical_difference(models, num_tests=36).critical_difference is None


def grid(rng, missing=()):
    runs = [(b, h) for b in ("dino", "uni", "floor") for h in ("fpn", "linear", "detail") if (b, h) not in missing]
    return [scores(f"{b}/{h}", rng.random((2, 12))) for b, h in runs]


def backbone(m):
    return m.model.split("/")[0]


def head(m):
    return m.model.split("/")[1]


def test_marginal_scores_are_means_over_the_other_factor(rng):
    models = grid(rng)
    found = marginal_scores(models, [backbone(m) for m in models], over=[head(m) for m in models])
    assert [m.model for m in found] == ["dino", "uni", "floor"]
    assert found[1].per_image == pytest.approx(np.mean([m.per_image for m in models[3:6]], axis=0))


def test_marginal_scores_keep_the_spread_between_seeds(rng):
    models = grid(rng)
    found = marginal_scores(models, [head(m) for m in models], over=[backbone(m) for m in models])
    assert seed_sd(found[0].values) == pytest.approx(np.std([np.mean([models[n].values[s] for n in (0, 3, 6)]) for s in (0, 1)], ddof=1))


def test_marginal_scores_use_complete_combinations_and_name_the_others(rng):
    models = grid(rng, missing={("uni", "fpn")})
    found = marginal_scores(models, [backbone(m) for m in models], over=[head(m) for m in models])
    assert found[0].notes == ("averaged over linear, detail", "left out as incomplete: fpn")


def test_marginal_scores_without_a_complete_column_leave_out_a_row(rng):
    missing = {("floor", "fpn"), ("floor", "linear"), ("uni", "detail")}
    models = grid(rng, missing)
    found = marginal_scores(models, [backbone(m) for m in models], over=[head(m) for m in models])
    assert [m.model for m in found] == ["dino", "uni"]
    assert "left out as incomplete: floor, detail" in found[0].notes


def test_a_combination_twice_is_refused(rng):
    models = grid(rng)
    models.append(models[0])
    with pytest.raises(CellbenchError, match="dino x fpn occurs twice"):
        marginal_scores(models, [backbone(m) for m in models], over=[head(m) for m in models])
