"""Statistics and tables of the rows of allocation_study.py."""

import math
from collections.abc import Iterable
from statistics import fmean, variance
from typing import Any

from scipy import stats
from side_by_side import table

Row = dict[str, Any]
Place = tuple[str, str, float]

# Of recovery: what a row has in each column.
WAYS: dict[str, dict[str, Any]] = {
    "no repair": {"repair": False},
    "repair": {"repair": True, "importance": "magnitude", "objective": "trades"},
    "repair, fisher": {"importance": "fisher"},
    "repair, rslad": {"objective": "rslad"},
}


def select(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """Rows that have those values; a tuple allows any of its own."""
    return [
        row
        for row in rows
        if all(row[key] in value if isinstance(value, tuple) else row[key] == value for key, value in wanted.items())
    ]


def by_seed(rows: Iterable[Row]) -> dict[int, float]:
    """PGD-20 accuracy in percent, by seed."""
    return {row["seed"]: 100 * row["pgd20"] for row in rows}


def mean_robust(rows: Iterable[Row], allocation: str) -> float:
    """Mean PGD-20 accuracy over the seeds of an allocation, in [0, 1]."""
    return fmean(row["pgd20"] for row in rows if row["allocation"] == allocation)


def withstood(row: Row) -> list[int]:
    """1 for each image that is right under PGD-20, in order."""
    bits = bin(int(row["verdicts"], 16))[2:].zfill(4 * len(row["verdicts"]))
    return [int(bit) for bit in bits[len(bits) - row["images"] :]]


def over_images(rows: list[Row], reference: list[Row]) -> float:
    """
    Standard error, in points, of the mean difference of two sets of rows that share seeds, over images.

    Each image's difference is its mean over seeds: what is common to all images, such as the seed's own luck, is not in
    it.
    """
    pairs = [(row, other) for row in rows for other in reference if row["seed"] == other["seed"]]
    each = [
        [own - theirs for own, theirs in zip(withstood(row), withstood(other), strict=True)] for row, other in pairs
    ]
    means = [fmean(values) for values in zip(*each, strict=True)]
    return 100 * math.sqrt(variance(means) / len(means))


def standard_error(rows: list[Row], reference: list[Row]) -> float:
    """
    Standard error, in points, of the mean difference of two sets of rows that share seeds, over images and over seeds.

    What varies with the image and the seed together is in both parts, so that it is a little too large. Of one seed
    only the images are known.
    """
    gained = differences(rows, reference)
    seeds = variance(gained) / len(gained) if len(gained) > 1 else 0.0
    return math.sqrt(over_images(rows, reference) ** 2 + seeds)


def kept(rows: list[Row], metric: str) -> float:
    """Percent of the dense network's MACs, parameters or time that are left, the mean over rows."""
    return fmean(100 * row[metric] for row in rows)


def differences(rows: list[Row], reference: list[Row]) -> list[float]:
    """Points gained over the reference, for each seed that both have."""
    mine, theirs = by_seed(rows), by_seed(reference)
    return [mine[seed] - theirs[seed] for seed in sorted(mine.keys() & theirs.keys())]


def interval(values: list[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """Mean, and half the width of its t-interval; with the two-sided p-value of a mean of 0."""
    mean, error = fmean(values), math.sqrt(variance(values) / len(values))
    half = float(stats.t.ppf((1 + confidence) / 2, len(values) - 1)) * error
    p = 1.0 if error == 0 and mean == 0 else 2 * float(stats.t.sf(abs(mean) / max(error, 1e-12), len(values) - 1))
    return mean, half, p


def holm(values: dict[str, float]) -> dict[str, float]:
    """p-values after Holm's correction for all of them together."""
    ranked, largest, corrected = sorted(values, key=values.__getitem__), 0.0, {}
    for rank, name in enumerate(ranked):
        largest = max(largest, min(1.0, (len(ranked) - rank) * values[name]))
        corrected[name] = largest
    return corrected


def headroom_rows(rows: list[Row], place: Place, steps: int) -> list[Row]:
    """Random allocations and `uniform` with the seeds that all of them have; nothing where there are none."""
    mine = select(of(rows, place), phase="headroom", steps=steps)
    seeds = [by_seed(select(mine, allocation=name)).keys() for name in {row["allocation"] for row in mine}]
    return select(mine, seed=tuple(set.intersection(*map(set, seeds)))) if seeds else []


def headroom_row(rows: list[Row], place: Place, steps: int) -> list[Any] | None:
    """What random allocations spread beyond seeds, and what the best of them is worth with fresh seeds."""
    mine = headroom_rows(rows, place, steps)
    names = sorted({row["allocation"] for row in mine} - {"uniform"})
    found = {name: list(by_seed(select(mine, allocation=name)).values()) for name in ("uniform", *names)}
    if not names or not found["uniform"]:
        return None
    means = {name: fmean(values) for name, values in found.items()}
    between = variance([means[name] for name in names]) if len(names) > 1 else 0.0
    repeated = [values for values in found.values() if len(values) > 1]
    seeds = fmean(variance(values) for values in repeated) if repeated else None
    beyond = None if seeds is None else between - seeds / len(found["uniform"])
    best = max(names, key=means.__getitem__)
    again = select(of(rows, place), phase="retest", steps=steps)
    gained = differences(select(again, allocation=best), select(again, allocation="uniform"))
    return [
        steps, len(names), len(found["uniform"]), means["uniform"], fmean(means[name] for name in names),
        math.sqrt(between), None if seeds is None else math.sqrt(seeds),
        None if beyond is None else math.copysign(math.sqrt(abs(beyond)), beyond), means[best] - means["uniform"],
        fmean(gained) if gained else None,
    ]  # fmt: skip


def rule_rows(rows: list[Row], place: Place) -> list[list[Any]]:
    """Each rule beside `uniform`, without training and after it."""
    mine = select(of(rows, place), phase=("rules", "headroom"))
    lines = []
    for name in sorted({row["allocation"] for row in select(mine, phase="rules")}):
        line: list[Any] = [name]
        for steps in (0, 20):
            own = select(mine, allocation=name, steps=steps)
            uniform = select(mine, allocation="uniform", steps=steps)
            gained = differences(own, uniform)
            line += [fmean(gained), standard_error(own, uniform)] if gained else [None, None]
        if any(value is not None for value in line[1:]):
            own = select(mine, allocation=name)
            seconds = fmean(row["planning_seconds"] for row in own)
            sizes = [kept(own, what) for what in ("macs", "params", *(["latency"] if place[1] == "latency" else []))]
            lines.append([*line, len(gained), *sizes, seconds])
    return sorted(lines, key=lambda line: -(line[1] or 0))


def recovery_rows(rows: list[Row], place: Place) -> list[list[Any]]:
    """PGD-20 accuracy after each number of steps, by way."""
    mine = select(of(rows, place), phase="recovery")
    lines = []
    for steps in sorted({row["steps"] for row in mine}):
        found = [by_seed(select(mine, steps=steps, **way)).values() for way in WAYS.values()]
        lines.append([steps, *(fmean(values) if values else None for values in found)])
    return lines


def label(row: Row) -> str:
    """The arm of a test: the allocation, with its size where that is another one than the others'."""
    return f"{row['allocation']} at equal MACs" if row["phase"] == "equal_macs" else row["allocation"]


def test_rows(rows: list[Row], reference: str = "uniform") -> list[list[Any]]:
    """Arms beside the reference: means over seeds with t-intervals, p-values corrected by Holm."""
    arms: dict[str, list[Row]] = {}
    for row in rows:
        arms.setdefault(label(row), []).append(row)
    if reference not in arms:
        return []
    gained = {arm: differences(own, arms[reference]) for arm, own in sorted(arms.items()) if arm != reference}
    known = {arm: interval(values) for arm, values in gained.items() if len(values) > 1}
    corrected = holm({arm: p for arm, (_, _, p) in known.items()})
    lines = []
    for arm in (reference, *known):
        own = arms[arm]
        line = [arm, len(own), kept(own, "macs"), kept(own, "params")]
        line += [fmean(100 * row[kind] for row in own) for kind in ("clean", "pgd20")]
        if arm in known:
            mean, half, _ = known[arm]
            line += [f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]", corrected[arm]]
        else:
            line += ["", None]
        lines.append(line)
    return lines


def of(rows: Iterable[Row], place: Place) -> list[Row]:
    """Rows of a network and a size."""
    return select(rows, network=place[0], metric=place[1], target=place[2])


def print_tables(rows: list[Row]) -> None:
    """Everything that is known, in Markdown; accuracies and differences in percent and points."""
    screened = select(rows, phase=("headroom", "rules", "recovery"))
    for place in sorted({(row["network"], row["metric"], row["target"]) for row in screened}):
        print(f"\n{place[0]}, {100 * place[2]:g} % of its {place[1]} kept; PGD-20 accuracy on validation images")
        lines = [line for steps in (0, 20) if (line := headroom_row(rows, place, steps))]
        if lines:
            heads = ["steps", "allocations", "seeds", "uniform", "random, mean", "SD between", "SD of seeds"]
            print(table([*heads, "SD beyond seeds", "best - uniform", "fresh seeds"], lines))
        if lines := rule_rows(rows, place):
            heads = ["rule", "0 steps", "SE", "20 steps", "SE", "seeds at 20", "MACs %", "parameters %"]
            print(table([*heads, *(["time %"] if place[1] == "latency" else []), "planning s"], lines))
        if lines := recovery_rows(rows, place):
            print(table(["steps", *WAYS], lines))
    equal = select(rows, phase="equal_macs")
    networks = tuple(row["network"] for row in equal)
    equal += select(rows, phase="confirmation", allocation="damage", network=networks)
    tests = [("equal MACs", equal, "uniform at equal MACs")]
    for phase in ("primary", "confirmation"):
        mine = select(rows, phase=phase)
        for place in sorted({(row["network"], row["metric"], row["target"]) for row in mine}):
            tests.append((f"{phase}, {place[0]}, {100 * place[2]:g} % of {place[1]}", of(mine, place), "uniform"))
    for name, mine, reference in tests:
        if lines := test_rows(mine, reference):
            heads = ["allocation", "seeds", "MACs %", "parameters %", "clean", "PGD-20"]
            print(f"\n{name}, all test images")
            print(table([*heads, f"minus {reference} [95 %]", "p (Holm)"], lines))
