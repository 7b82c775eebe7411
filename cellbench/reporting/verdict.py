"""The English sentences of a report: which model is the best, which differences are significant, and what limits the conclusion."""

from __future__ import annotations

import re
import textwrap
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cellbench.config.experiment import UNCHANGED
from cellbench.config.registry import Registry
from cellbench.errors import first_names, quantity
from cellbench.reporting.collect import ExperimentResults
from cellbench.reporting.decisions import (
    corrected_score,
    describe_correction,
    describe_equivalence,
    describe_power,
    describe_validation_choice,
)
from cellbench.reporting.difference_sentences import describe_difference, describe_gap, format_span
from cellbench.reporting.leaderboard import LeaderboardRow
from cellbench.reporting.learning_curves import LearningCurve
from cellbench.reporting.model_groups import TestSet
from cellbench.reporting.shift import APPEARANCE, FURTHER, Shift
from cellbench.statistics.hypothesis_tests import describe_undecidable, is_decidable
from cellbench.statistics.scores import Difference
from cellbench.system_load import describe_load

MAX_NOTES = 3
"""Maximum number of notes in the verdict; the rest is folded."""
MAX_PAIRS_LISTED = 4
"""Maximum number of models that get their own sentence; the rest is counted."""
MAX_SETS_LISTED = 4
MAX_REASON_CHARS = 140
MAX_MODELS_LISTED = 6
BUSY_PCT = 10.0
"""Load by other processes, in percent, from which costs get a warning."""
SEED_OR_FOLD = re.compile(r" · (seed|fold) \d+")


@dataclass(frozen=True, kw_only=True)
class Verdict:
    lines: tuple[str, ...]
    """At most five: the best model and its score; whether the differences to the others are significant; then what limits this."""
    more: tuple[str, ...] = ()
    """The other notes, the most important first, and the differences to the best model one by one."""


def conclude(results: ExperimentResults, rows: Sequence[LeaderboardRow], shift: Shift | None) -> Verdict:
    """The verdict about the first test set; ``rows``: its leaderboard; ``shift``: its further conditions."""
    here = results.sets[0]
    safest, *further = describe_shift(shift) if shift is not None else [""]
    notes, most = list_notes(results, rows), MAX_NOTES - bool(safest)
    first, *evidence = describe_best(here)
    evidence = [" ".join(part for part in (line, describe_power(here)) if part) for line in evidence]
    more = [*further, *notes[most:], *describe_pairs(here.differences_to_best())]
    return Verdict(lines=(first, *evidence, *([safest] if safest else []), *notes[:most]), more=tuple(more))


def list_notes(results: ExperimentResults, rows: Sequence[LeaderboardRow]) -> list[str]:
    """What limits the verdict, a sentence each, the most important first: ``MAX_NOTES`` of them stand beside it, the rest is folded."""
    here = results.sets[0]
    rule, external, equal = describe_ranking_rule(here), describe_external(here), describe_equivalence(here)
    return [
        *describe_missing(results),
        *([equal] if equal else []),
        *external[:1],
        *describe_validation_choice(here),
        *describe_test_sets(results.sets),
        *describe_limits(here),
        *describe_absent_classes(here),
        *describe_empty_images(here),
        *external[1:],
        *describe_busy_machine(rows),
        *([f"The best was {rule}."] if rule else []),
        *describe_class_mean(here),
        *describe_other_winners(here),
    ]


def describe_best(here: TestSet) -> list[str]:
    """The answer in two lines: the best model and its score; whether it differs significantly from the others."""
    if all(model.scores().empty.all() for model in here.models):
        return ["No test image has a cell, and no model found one: there is nothing to compare."]
    interval, best = here.intervals()[0], here.best
    num = interval.num if interval.unit == "image" else int((~best.scores().empty).sum())
    groups = f" in {interval.num} groups" if interval.unit == "group" else ""
    kind = {"baseline": " (a baseline)", "external": " (masks of another tool)"}.get(best.kind, "") if len(here.models) > 1 else ""
    name = f"{best.name}{kind}"
    span = f" ({format_span(interval, 3)})" if interval.low is not None else ""
    corrected = f"; {text}" if (text := describe_correction(here)) else ""
    first = f"Best on average is {name}: Dice {interval.mean:.3f}{span} over {quantity(num, 'image')}{groups}{corrected}."
    return [first, describe_evidence(here)]


def describe_shift(shift: Shift) -> list[str]:
    """Which model is the safest, and whether it is the best too; then the best on each further test set, and models that lack a test."""
    parts = {
        "perturbation": sum(one.kind not in (APPEARANCE, FURTHER) for one in shift.conditions[1:]),
        APPEARANCE: len(shift.of_kind(APPEARANCE)),
        "further test set": len(shift.of_kind(FURTHER)),
    }
    counted = _and([quantity(num, what) for what, num in parts.items() if num])
    best, safest = shift.models[0], shift.safest
    low, high = shift.lowest(best), shift.lowest(safest)
    where = f"{high.mean(safest):.3f} ({high.name})"
    if len(shift.models) == 1:
        first = f"Its worst case among {counted} is {where}."
    elif best == safest:
        it = "It" if best == shift.here.best.name else best
        first = f"{it} is also the safest: its worst case among {counted} is {where}, the best of all models'."
    else:
        first = (
            f"The safest is another one, {safest}: its worst case among {counted} is {where}, the best of all models'; "
            f"that of {best} is {low.mean(best):.3f} ({low.name})."
        )
    out = [first]
    for here in shift.sets:
        size = f"{len(here.images)} images"
        out.append(f"On {here.dataset} ({size}) the best is {here.best.name} with {here.best.scores().mean:.3f}. {describe_evidence(here)}")
    if shift.missing:
        names = list(dict.fromkeys(name for lacks in shift.missing.values() for name in lacks if name != UNCHANGED))
        out.append(
            f"Not tested on {first_names(names, 3)}: {first_names(list(shift.missing), 3)}. A grid that asks for these tests adds them without training."
        )
    return out


def _and(parts: Sequence[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def describe_evidence(here: TestSet) -> str:
    """Whether the best model differs significantly from the others, the next one and the baselines, in one line."""
    differences = {d.a: d for d in here.differences_to_best()}
    if not differences:
        return "There is only one model: there is nothing to compare."
    order = [differences[model.name] for model in here.models[1:]]
    better, tied = [d for d in order if d.better == d.b], [d for d in order if d.better != d.b]
    num, (first, *_) = len(order), order
    if not here.decidable:
        why = describe_undecidable(here.num_units, here.num_pairs, here.unit)
        return f"{why[:1].upper()}{why[1:]}: the next, {first.a}, {describe_gap(first, alone=True)}."
    if ahead := [d for d in order if d.better == d.a]:  # see describe_empty_images
        more = f"; so are {first_names([d.a for d in ahead[1:]], 2)}" if len(ahead) > 1 else ""
        return f"But {ahead[0].a}, which {describe_gap(ahead[0])}, is significantly better{more}."
    if not tied:
        if num == 1:
            return f"It is significantly better than {first.a}, which {describe_gap(first)}."
        return f"It is significantly better than each of the {num} other models: the next, {first.a}, {describe_gap(first)}."
    if not better:
        if num == 1:
            return f"The difference to the other model is not significant: {first.a} {describe_gap(first)}."
        return f"No difference to another model is significant: the next, {first.a}, {describe_gap(first)}."
    beaten = [model.name for model in here.models[1:] if model.kind == "baseline" and differences[model.name] in better]
    kind = f"the baseline{'s' * (len(beaten) > 1)} {' and '.join(beaten)} among them, " if 0 < len(beaten) < 4 else ""
    more = f"; nor from {first_names([d.a for d in tied[1:]], 2)}" if len(tied) > 1 else ""
    return (
        f"It is significantly better than {len(better)} of {num} other models, {kind}but not significantly different from {tied[0].a}, "
        f"which {describe_gap(tied[0])}{more}."
    )


def describe_external(here: TestSet, name: str = "") -> list[str]:
    """How masks of other tools compare with the best model, a sentence each. ``name``: of this tool; empty: of all but the best of the set."""
    best, out = here.best_own, []
    for model in here.models:
        if not model.external or (model.name != name if name else model is here.best):
            continue
        score = f"Masks of {model.name}: Dice {model.scores().mean:.3f} over {len(here.images)} images"
        found = next((d for d in here.differences() if {d.a, d.b} == {model.name, best.name}), None)
        if best.external or found is None:
            out.append(f"{score}.")
        elif here.decidable:
            out.append(f"{score}. {describe_difference(found)}.")
        else:
            out.append(f"{score}, {best.name} {best.scores().mean:.3f}: with so few images no difference can be significant.")
    return out


def describe_ranking_rule(here: TestSet) -> str:
    """How the best model was chosen; empty for a single model."""
    num = len(here.models)
    if num < 2:
        return ""
    correction = corrected_score(here)
    price = (
        "the score of the chosen is optimistic" if correction is None else f"its score is optimistic, {correction:.3f} is to be expected"
    )
    return f"chosen by its test score, the highest mean Dice over images among {num} models; {price}"


def describe_pairs(differences: Sequence[Difference]) -> list[str]:
    """The differences of the best model to the others, a sentence each, the smallest first; then what limits some of them only.

    ``differences``: each model minus the best, so ``b`` is always the best.
    """
    significant = sorted((d for d in differences if d.better == d.b), key=lambda d: abs(d.interval.mean))
    tied = sorted((d for d in differences if d.better is None), key=lambda d: abs(d.interval.mean))
    ahead = [d for d in differences if d.better == d.a]
    out = []
    for some, rest in ((ahead, "significantly better"), (significant, "significantly worse"), (tied, "not significantly different")):
        out += [f"{describe_difference(d)}." for d in some[:MAX_PAIRS_LISTED]]
        if len(some) > MAX_PAIRS_LISTED:
            names = first_names([d.a for d in some[MAX_PAIRS_LISTED:]], 3 * MAX_PAIRS_LISTED)
            out.append(f"{len(some) - MAX_PAIRS_LISTED} more, {rest}: {names}.")
    by_note = _by_note(differences)
    return out + [
        f"Note on {first_names(names, MAX_PAIRS_LISTED)}: {note}." for note, names in by_note.items() if len(names) < len(differences)
    ]


def describe_limits(here: TestSet) -> list[str]:
    """What limits every difference to the best, such as few images or one seed each, in one sentence."""
    differences = here.differences_to_best()
    undecidable = describe_undecidable(here.num_units, here.num_pairs, here.unit)  # that is a line of its own
    notes = [note for note, names in _by_note(differences).items() if len(names) == len(differences) and note != undecidable]
    return [f"Note: {'; '.join(notes)}."] if notes else []


def _by_note(differences: Sequence[Difference]) -> dict[str, list[str]]:
    """The models that each note on a difference to the best is about."""
    by_note: dict[str, list[str]] = {}
    for d in differences:
        for note in dict.fromkeys((d.interval.note, *d.notes)):
            if note:
                by_note.setdefault(note, []).append(d.a)
    return by_note


def describe_missing(results: ExperimentResults) -> list[str]:
    """The models without a result, and why, in one sentence, which begins with the kinds of backbones that are not compared at all."""
    reasons: dict[str, list[str]] = {}
    for name, reason in {**results.skipped, **results.failed}.items():
        backbone = name.split(" · ")[0]
        of_backbone = reason.startswith(f"{backbone}: ")  # such as missing weights, whatever the head
        model = backbone if of_backbone else SEED_OR_FOLD.sub("", name)
        reasons.setdefault(_first_sentence(reason.removeprefix(f"{backbone}: ")), []).append(model)
    if not reasons:
        return []
    parts = [f"{first_names(list(dict.fromkeys(names)), 3)} ({reason})" for reason, names in reasons.items()]
    kinds = missing_domains(results)
    start = f"No {' or '.join(kinds)} model was compared; without a result" if kinds else "Not compared"
    return [f"{start}: {first_names(parts, 2)}."]


def missing_domains(results: ExperimentResults) -> list[str]:
    """The domains of shipped backbones that were asked for and of which none has a result: ``blood``, ``pathology``, ``natural-image``."""
    registry = Registry()
    known = registry.names("backbones")

    def domains(names: Iterable[str]) -> list[str]:
        backbones = dict.fromkeys(name.split(" · ")[0] for name in names)
        return [domain for one in backbones if one in known and (domain := registry.backbone(one).domain)]

    compared = domains(model.name for model in results.sets[0].models)
    return [one for one in dict.fromkeys(domains([*results.skipped, *results.failed])) if one not in compared]


def _first_sentence(text: str) -> str:
    plain = re.sub(r" \(\[Errno [^)]*\)", "", text)  # of the system, which the list of skipped runs has
    return textwrap.shorten(plain.split(". ")[0].rstrip("."), MAX_REASON_CHARS, placeholder=" …")


def describe_other_winners(here: TestSet) -> list[str]:
    """By which other metrics of the figures the best model is also the best, and by which another one is."""
    same, out = [], []
    for metric in here.compared_metrics():
        differences = here.differences_to_best(metric.key) if metric.in_figures and metric.key != "dice" else []
        if not differences or all(model.scores(metric.key).empty.all() for model in here.models):
            continue
        best = differences[0].b
        if best == here.best.name:
            same.append(metric.label)
            continue
        num = sum(d.better == best for d in differences)
        better = f"significantly better than {num} of {len(differences)} others" if num else "not significantly better than any other"
        out.append(f"By {metric.label} the best is {best} ({differences[0].mean_b:.3f}, {better}).")
    return [*out, *([f"The best by Dice is also the best by {', '.join(same)}."] if same else [])]


def describe_test_sets(sets: Sequence[TestSet]) -> list[str]:
    """Which test set the verdict refers to, and which others exist; empty for a single one."""
    if len(sets) < 2:
        return []
    first, *others = sets
    kind = "newest whole test set" if not first.limit else "newest test set"
    listed = "; ".join(f"{here.description}, best {here.best.name} with {here.best.scores().mean:.3f}" for here in others[:MAX_SETS_LISTED])
    more = f"; {len(others) - MAX_SETS_LISTED} more" if len(others) > MAX_SETS_LISTED else ""
    verb = "is" if len(others) == 1 else "are"
    return [f"This is about the {kind}, {first.description}. {len(others)} more {verb} not compared with it: {listed}{more}."]


def list_test_sets(sets: Sequence[TestSet]) -> list[str]:
    """Several test sets, a sentence each, after what they mean for the comparison."""
    out = [
        "The runs were tested on different images. Scores are paired within one set only; across sets no difference is computed or tested. "
        "The newest set of whole data comes first: the verdict and `best` are about it. Sets under --limit come last."
    ]
    for here in sets:
        num, when = sum(len(model.runs) for model in here.models), time.strftime("%Y-%m-%d %H:%M", time.localtime(here.last_s))
        out.append(f"{here.description}; data {here.digest}, last run {when}: {quantity(num, 'run')}, best {here.best.name}.")
    return out


def describe_class_mean(here: TestSet) -> list[str]:
    """Over which classes scores are means; empty where there is one class of cells."""
    model = here.models[0]
    classes = [name for name in model.classes[1:] if name not in model.absent_classes]
    if len(classes) < 2:
        return []
    return [f"Dice and the other metrics are means over {', '.join(classes)}; MLflow has each class as well, as test_{classes[0]}/dice."]


def describe_empty_images(here: TestSet) -> list[str]:
    """Test images without a cell, and the models that predict a cell there."""
    num = here.models[0].empty_images[0]
    if not num:
        return []
    names = [f"{model.name} ({model.empty_images[1]:g})" for model in here.models if model.empty_images[1]]
    found = (
        f"Cells were predicted there by {first_names(names, MAX_MODELS_LISTED)}: these images score 0"
        if names
        else "No model predicts any there"
    )
    means = "Means leave out those where nothing is predicted"
    pairs = "; two models are compared on all where either predicts something, and the other scores 1 there" if names else ""
    return [f"Note: {num} of {len(here.images)} test images have no cell. {found}. {means}{pairs}."]


def describe_absent_classes(here: TestSet) -> list[str]:
    """Classes that no test mask holds, and the models that predict them."""
    out = []
    first = here.models[0]
    for name in first.absent_classes:
        unused = name in first.runs[0].per_image.get("unused", [])
        names = [f"{model.name} ({num:g})" for model in here.models if (num := model.num_predicted_images(name))]
        by = (
            f"of {len(here.images)} test images some have it predicted: {first_names(names, MAX_MODELS_LISTED)}"
            if names
            else "no model predicts it"
        )
        means = "Means leave it out." if unused else "Pooled means leave it out; an image in which it is predicted scores 0 for it."
        out.append(f"Note: no {'mask of the data' if unused else 'test mask'} holds '{name}'; {by}. {means}")
    return out


def describe_busy_machine(rows: Sequence[LeaderboardRow]) -> list[str]:
    """A warning where other processes used much of the processor while costs were measured."""
    busiest = max((row.other_load_pct or 0.0 for row in rows), default=0.0)
    return [f"Note: costs were measured {describe_load(busiest)}: compare processor seconds."] if busiest >= BUSY_PCT else []


def describe_costs_load(rows: Sequence[LeaderboardRow]) -> str:
    """The load by other processes while the costs were measured."""
    loads = [row.other_load_pct for row in rows if row.other_load_pct is not None]
    if not loads:
        return "The load by other processes is not recorded."
    few = f" (not recorded for {len(rows) - len(loads)} of {len(rows)} models)" if len(loads) < len(rows) else ""
    measured = f"Costs were measured {describe_load(max(loads))}"
    if max(loads) < BUSY_PCT:
        return f"{measured} at most{few}."
    least = f", for some models only {min(loads):.0f} %" if min(loads) < max(loads) / 2 else ""
    return f"{measured}{least}{few}: an idle machine needs fewer seconds. Processor seconds depend least on the load: compare those."


def describe_learning_curves(curves: Sequence[LearningCurve]) -> list[str]:
    """For each curve, the smallest share whose difference to the largest is not significant. This does not prove that they are equal."""
    out = []
    for curve in curves:
        last = curve.points[-1]
        if not is_decidable(last.dice.num, len(curve.points) - 1):
            out.append(f"{curve.model}: {describe_undecidable(last.dice.num, len(curve.points) - 1, last.dice.unit)}.")
            continue
        worse = [point for point in curve.points if point.to_largest is not None and point.to_largest.better == point.to_largest.b]
        above = [point for point in curve.points[:-1] if not worse or point.fraction > worse[-1].fraction]
        images = f"{last.num_train} images" if last.num_train else f"{last.fraction:.0%}"
        if not above:
            out.append(f"{curve.model}: each smaller share is significantly worse than {images}; more training images may still help.")
            continue
        first, difference = above[0], above[0].to_largest
        share = f"{first.num_train} of {images}" if first.num_train and last.num_train else f"a share of {first.fraction:g}"
        size = f" ({difference.interval.mean:+.4f})" if difference is not None else ""
        fewer = "significantly worse" if worse else "not tried"
        out.append(f"{curve.model}: with {share} the difference to the largest share{size} is not significant; fewer are {fewer}.")
    return out
