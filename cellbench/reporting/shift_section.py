"""The blocks of a report about shift: a figure, a table of all models and conditions, and the differences on each further test set."""

from __future__ import annotations

from cellbench.errors import quantity
from cellbench.metrics.calibration import expected_calibration_error
from cellbench.reporting.difference_sentences import describe_outcome
from cellbench.reporting.leaderboard import format_interval, format_number, format_p_cell
from cellbench.reporting.model_groups import TestSet
from cellbench.reporting.report_data import Block, Figure, Heading, Table, Text
from cellbench.reporting.shift import APPEARANCE, FURTHER, OWN, FallRow, Shift
from cellbench.reporting.verdict import describe_shift

MEANING = "Safest is the model with the best worst case: its lowest mean Dice, over all conditions, is the highest. Worst cases are compared without a test."


def shift_blocks(shift: Shift, prefix: str) -> list[Block]:
    """``prefix``: of the names of files."""
    labels = {kind: {FURTHER: "further test set", "jpeg": "JPEG"}.get(kind, kind) for kind in shift.kinds}
    rows = [
        FallRow(
            model=model,
            own=shift.own(model),
            conditions=[(one.kind, one.name, one.mean(model)) for one in shift.conditions[1:]],
            lowest=(shift.lowest(model).name, shift.lowest(model).mean(model)),
            safest=model == shift.safest and len(shift.models) > 1,
        )
        for model in shift.models
    ]
    blocks: list[Block] = [
        Text([" ".join(describe_shift(shift)), MEANING]),
        Figure(name=f"{prefix}falls", plot="shift:plot_falls", arguments=(rows, labels)),
        _table(shift),
    ]
    if any(one.before is not None for one in shift.conditions):
        blocks.append(
            Text(
                [
                    "Three numbers: the mean Dice at the three strengths. Perturbed images are tested with the tiles of validation, which overlap "
                    "less; so are the same images unperturbed, from which the falls in shift.csv are measured."
                ]
            )
        )
    for other in shift.sets:
        blocks += _further(other)
    return [*blocks, *_calibration(shift, prefix)] if shift.sets else blocks


def _calibration(shift: Shift, prefix: str) -> list[Block]:
    """How far probabilities are from observed shares on each test set; none where no model gives probabilities."""
    sets = {OWN: shift.here, **{other.dataset: other for other in shift.sets}}
    found: dict[str, dict[str, tuple[dict[str, list[float]], dict[str, list[float]]]]] = {}
    for model in shift.models:
        for name, here in sets.items():
            group = next((one for one in here.models if one.name == model), None)
            raw, corrected = (group.calibration(corrected=which) if group else None for which in (False, True))
            if raw is not None and corrected is not None:
                found.setdefault(model, {})[name] = raw, corrected
    if not any(name != OWN for mine in found.values() for name in mine):
        return []

    def cell(pair: tuple[dict[str, list[float]], dict[str, list[float]]] | None) -> str:
        return "" if pair is None else " / ".join(f"{expected_calibration_error(one):.3f}" for one in reversed(pair))

    best = next(iter(found))
    curves = {name: corrected for name, (_, corrected) in found[best].items()}
    return [
        Heading("Calibration on each test set"),
        Figure(name=f"{prefix}reliability", plot="shift:plot_reliability", arguments=(best, curves)),
        Table(headings=("model", *sets), rows=[[model, *(cell(mine.get(name)) for name in sets)] for model, mine in found.items()]),
        Text(
            [
                "Two numbers: the mean difference of probability and observed share (expected calibration error) as predict gives the "
                "probabilities, and without the temperature. The temperature is fitted on the own validation images."
            ]
        ),
    ]


def _table(shift: Shift) -> Table:
    """A row a model; the strengths of a perturbation share a cell."""
    headings, cells = ["model", "own"], [[model, format_number(shift.own(model), 3)] for model in shift.models]
    for kind in shift.kinds:
        some = shift.of_kind(kind)
        groups = [[one] for one in some] if kind in (APPEARANCE, FURTHER) else [some]
        for group in groups:
            headings.append(group[0].name if kind in (APPEARANCE, FURTHER) else kind)
            for row, model in zip(cells, shift.models, strict=True):
                row.append(" / ".join(format_number(one.mean(model), 3) for one in group))
    headings += ["lowest", "at"]
    for row, model in zip(cells, shift.models, strict=True):
        row += [format_number(shift.lowest(model).mean(model), 3), shift.lowest(model).name]
    return Table(headings=headings, rows=cells)


def _further(here: TestSet) -> list[Block]:
    """The models on a further test set, with their differences to the best there."""
    d = {one.a: one for one in here.differences_to_best()}
    rows = []
    for model, interval in zip(here.models, here.intervals(), strict=True):
        row = [model.name, format_number(interval.mean, 4), format_interval(interval.low, interval.high, interval.rough)]
        one = d.get(model.name)
        row += [f"{one.interval.mean:+.4f}", format_p_cell(one.p_adjusted), describe_outcome(one)] if one else ["", "", "best"]
        rows.append(row)
    heading = f"{here.dataset}: {quantity(len(here.images), 'image')}"
    return [Heading(heading), Table(headings=("model", "Dice/image", "95 %", "minus the best", "p (adjusted)", "verdict"), rows=rows)]


def shift_rows(shift: Shift) -> list[dict[str, str]]:
    """A row a model and condition, for a file."""
    return [
        {
            "model": model,
            "condition": one.name,
            "kind": one.kind,
            "images": str(len(one.dice[model])),
            "Dice/image": format_number(one.mean(model), 4),
            "fall": format_number(one.fall(model), 4),
        }
        for model in shift.models
        for one in shift.conditions
    ]
