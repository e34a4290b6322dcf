"""
Does it pay to choose how much each unit loses? A study that is done cell by cell, and goes on where it stopped.

    python benchmarks/allocation_study.py --dataset FOLDER_OR_ID --minutes 30    # such as CIFAR-10
    python benchmarks/allocation_study.py --tables                               # of what is done

A cell prunes one network to one size in one way, repairs and recalibrates it, fine-tunes it for some steps with one
seed, and measures PGD-20 on images that nothing was chosen by. Each is a line of benchmarks/results/
allocation_study.jsonl, written as it ends; a call does what is missing, in this order, as far as its minutes reach:

- headroom: `uniform` and 16 random allocations of equal cost: what varies between them beyond what varies with the
  seed; the best of them is taken again with fresh seeds.
- rules: every allocation, and `mrs` by cost and by whole units.
- recovery: fine-tuning steps, with and without repair, by importance and by objective.
- primary: named before it was run: `narrow_vgg`, 30 % of its MACs, 20 steps, `mrs` and `damage` beside `uniform`, on
  all test images, eight seeds that share the order of the data; calibration images are drawn by the seed as well.
- confirmation: `damage`, the best rule without training on the validation images of the second place, beside `uniform`
  on all test images, with five fresh seeds; named when the screening was known, and before any of it was run. So was
  another one: `damage` and `mrs` by MACs, the best two on the MobileNet at 30 % of its MACs; and, when that was known,
  the same on the MobileNet that has been trained for longer. Then `damage` on the VGG at an eighth of its MACs, where
  the screening had it ahead; `damage` and `mrs` by MACs on the MobileNet at an eighth, for the same reason; last, `mrs`
  by MACs and as it is on the MobileViT at 30 % of its MACs, named when one seed of each without training was known, and
  `damage` there, named when the screening and those two were.
- equal_macs: `uniform` at the multiply-accumulates that `damage` keeps there, 18 % where `uniform` keeps 13 %; named
  when the confirmation was known.

The first three are on 2,000 validation images. Networks are those of study_networks.py. Of two budgets of time, half of
the dense network's for 64 images in eager PyTorch, plans are measured once, on a machine with nothing else to do, and
stand in their first rows.
"""

import argparse
import copy
import functools
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from datasets import Dataset
from side_by_side import RESULTS
from study_networks import EPS, base, splits, trained
from study_plots import draw
from study_tables import mean_robust, of, print_tables, select
from torch import Tensor, nn

from hf_mrpf import (
    AttackConfig,
    PruningPlan,
    evaluate_robustness,
    module_robustness_sensitivity,
    plan_pruning,
    prune,
    pruning_units,
    recalibrate_batchnorm,
    repair,
    unit_sensitivity,
)
from hf_mrpf.data import calibration_batches
from hf_mrpf.efficiency import latency_rounds
from hf_mrpf.fingerprint import weights_sha256
from hf_mrpf.measured_allocation import MEASURED
from hf_mrpf.units import cut, trace_units

ROWS = RESULTS / "allocation_study.jsonl"
SETS, SET_SIZE, RECALIBRATION = 4, 128, 1024
ATTACK = AttackConfig(eps=EPS, num_steps=10)
LATENCY_BATCH_SIZE = 64
RANDOM_ALLOCATIONS, SEEDS, FRESH_SEEDS, PRIMARY_SEEDS = 16, (0, 1, 2), (10, 11, 12), tuple(range(8))
RULES = (
    *("mrs", "mrs joint", "mrs per MAC", "mrs per parameter", "mrs per millisecond", "anti_mrs", "shuffled_mrs"),
    *("global", "isomorphic", "netadapt", "damage"),
)
PRIMARY_PLACE, PRIMARY_STEPS = ("narrow_vgg", "macs", 0.3), 20
CONFIRMED_PLACE, CONFIRMING_SEEDS = ("narrow_vgg", "params", 0.12), tuple(range(20, 25))
CONFIRMED = {
    CONFIRMED_PLACE: ("damage",),
    ("mobilenet", "macs", 0.3): ("mrs per MAC", "damage"),
    ("mobilenet_longer", "macs", 0.3): ("mrs per MAC", "damage"),
    ("narrow_vgg", "macs", 0.125): ("damage",),
    ("mobilenet", "macs", 0.125): ("mrs per MAC", "damage"),
    ("mobilevit", "macs", 0.3): ("mrs per MAC", "mrs", "damage"),
}
EQUAL_MACS_PLACE = ("narrow_vgg", "macs", 0.18)
# (network, metric, fraction kept): where headroom is looked for.
PLACES = (
    PRIMARY_PLACE,
    CONFIRMED_PLACE,
    ("mobilenet", "macs", 0.3),
    ("mobilenet", "params", 0.12),
    ("narrow_vgg", "macs", 0.125),
    ("mobilenet", "macs", 0.125),
    ("mobilenet_longer", "macs", 0.3),
    ("mobilevit", "macs", 0.3),
    ("narrow_vgg", "latency", 0.5),
    ("mobilenet", "latency", 0.5),
)
Cell = dict[str, Any]


def cell(
    phase: str, network: str, metric: str, target: float, allocation: str, steps: int, seed: int, **more: Any
) -> Cell:
    """Everything that a row hangs on."""
    usual = {"importance": "magnitude", "repair": True, "objective": "trades", "split": "validation", "calibration": 0}
    place = {"phase": phase, "network": network, "metric": metric, "target": target}
    return place | {"allocation": allocation, "steps": steps, "seed": seed} | usual | more


def headroom_cells(place: tuple[str, str, float], rows: list[Cell]) -> Iterator[Cell]:
    """Uniform and random allocations; then the best of these and `uniform` again, with fresh seeds."""
    allocations = ["uniform", *(f"random {number}" for number in range(RANDOM_ALLOCATIONS))]
    for steps in (0, 20):
        # Without a step of training a seed changes nothing.
        for seed in SEEDS if steps else (0,):
            for allocation in allocations:
                yield cell("headroom", *place, allocation, steps, seed)
        mine = select(of(rows, place), phase="headroom", steps=steps)
        if steps and len(mine) >= len(allocations) * len(SEEDS):
            best = max(allocations[1:], key=lambda name: mean_robust(mine, name))
            for seed in FRESH_SEEDS:
                for allocation in ("uniform", best):
                    yield cell("retest", *place, allocation, steps, seed)


def rule_cells(place: tuple[str, str, float]) -> Iterator[Cell]:
    """Every rule; `uniform` is among the cells of the headroom."""
    for steps in (0, 20):
        for seed in SEEDS if steps else (0,):
            for allocation in RULES:
                if place[1] != "latency" or allocation not in MEASURED:
                    yield cell("rules", *place, allocation, steps, seed)


def recovery_cells(place: tuple[str, str, float]) -> Iterator[Cell]:
    """Steps of fine-tuning, and what could take their place."""
    ways = ({"repair": False}, {}, {"importance": "fisher"}, {"objective": "rslad"})
    for steps in (0, 5, 20, 80, 300):
        for way in ways:
            if steps or "objective" not in way:
                for seed in SEEDS[:2] if steps else (0,):
                    yield cell("recovery", *place, "uniform", steps, seed, **way)


def primary_cells() -> Iterator[Cell]:
    """All test images; what is compared stands in the docstring above, and was written before any of it was run."""
    for seed in PRIMARY_SEEDS:
        for allocation in ("uniform", "mrs", "damage"):
            yield cell("primary", *PRIMARY_PLACE, allocation, PRIMARY_STEPS, seed, split="test", calibration=seed)


def confirmation_cells(place: tuple[str, str, float]) -> Iterator[Cell]:
    """All test images and seeds that nothing was chosen by."""
    for seed in CONFIRMING_SEEDS:
        for allocation in ("uniform", *CONFIRMED[place]):
            yield cell("confirmation", *place, allocation, PRIMARY_STEPS, seed, split="test", calibration=seed)


def equal_macs_cells() -> Iterator[Cell]:
    """`uniform` of another size, with the seeds of the confirmation."""
    for seed in CONFIRMING_SEEDS:
        yield cell("equal_macs", *EQUAL_MACS_PLACE, "uniform", PRIMARY_STEPS, seed, split="test", calibration=seed)


def all_cells(rows: list[Cell], networks: list[str], phases: list[str]) -> Iterator[Cell]:
    """In the order in which they are done: what needs no training first, then the first place, then the others."""
    places = [place for place in PLACES if place[0] in networks]
    for place in places:
        cells = {
            "headroom": list(headroom_cells(place, rows)),
            "rules": list(rule_cells(place)),
            "primary": list(primary_cells()) if place == PRIMARY_PLACE else [],
            "confirmation": list(confirmation_cells(place)) if place in CONFIRMED else [],
            "equal_macs": list(equal_macs_cells()) if place == CONFIRMED_PLACE else [],
            "recovery": list(recovery_cells(place)) if place == places[0] else [],
        }
        chosen = [one for phase in phases for one in cells[phase]]
        yield from (one for one in chosen if not one["steps"])
        yield from (one for one in chosen if one["steps"])


def known_scores(network: str, allocation: str, calibration: int) -> dict[str, float] | None:
    """What a row was planned by: time is measured once, or seeds and steps would be of different networks."""
    wanted = {"network": network, "allocation": allocation, "calibration": calibration}
    return next((row["scores"] for row in select(known_rows(), **wanted)), None)


def known_plan(wanted: Cell) -> tuple[PruningPlan, float] | None:
    """The plan that was measured for a budget of time, and the seconds that it took."""
    found = next((row for row in select(known_rows(), **wanted) if "plan" in row), None)
    return found and (PruningPlan.from_dict(found["plan"]), found["planning_seconds"])


def planning_options(
    network: str, metric: str, allocation: str, calibration: int, model: nn.Module, batches: list[tuple[Tensor, Tensor]]
) -> dict[str, Any]:
    """What an allocation of the study asks of `plan_pruning`."""
    example = batches[0][0][:1]
    if allocation.startswith("random "):
        # Shares between a third of and three times each other, as `mrs` makes of scores; here of dice.
        dice = random.Random(allocation)
        return {"scores": {unit.name: 10 ** dice.uniform(0, 4) for unit in pruning_units(model, example)}}
    if allocation == "mrs joint":
        return {"allocation": "mrs", "combine": "joint"}
    if allocation.startswith("mrs per "):
        price = allocation.removeprefix("mrs per ")
        # A budget of time has prices and sizes of one machine.
        known = known_scores(network, allocation, calibration) if metric != "latency" else None
        if price == "millisecond" and known:
            return {"scores": known}
        prices = prices_of(model, batches[0][0], price)
        scores = unit_sensitivity(module_robustness_sensitivity(model, batches, ATTACK), pruning_units(model, example))
        return {"scores": {name: scores[name] / price for name, price in prices.items()}}
    return {"allocation": allocation}


def prices_of(model: nn.Module, images: Tensor, what: str) -> dict[str, float]:
    """What each unit costs: MACs or parameters that it has a part in, or the milliseconds that half of it takes."""
    graph = trace_units(model, images[:1])
    if what != "millisecond":
        return {unit.name: graph.touching(unit, {"MAC": "macs", "parameter": "params"}[what]) for unit in graph.units}
    models = {"": model}
    for unit in graph.units:
        models[unit.name] = copy.deepcopy(model)
        cut(models[unit.name], graph, {unit.name: list(range(unit.width // 2))})
    times = {name: median(rounds) for name, rounds in latency_rounds(models, images, rounds=21).items()}
    # Where a unit of no size saves nothing, noise must not make its price one of nothing or less.
    least = 0.01 * times[""]
    return {unit.name: max(times[""] - times[unit.name], least) for unit in graph.units}


@functools.cache
def planned(
    network: str, metric: str, target: float, allocation: str, importance: str, calibration: int, train: Dataset
) -> tuple[PruningPlan, float]:
    """The plan of a cell, which all its seeds and steps share, and the seconds that it took."""
    wanted = {"network": network, "metric": metric, "target": target, "allocation": allocation}
    if found := known_plan(wanted | {"importance": importance, "calibration": calibration}):
        return found
    start, dense = time.perf_counter(), base(network)
    batches = calibration_batches(train, SETS, SET_SIZE, seed=calibration)
    options = planning_options(network, metric, allocation, calibration, dense, batches)
    plan = plan_pruning(
        dense, batches[0][0][:1], target=target, target_metric=metric, importance=importance, batches=batches,
        attack=ATTACK, seed=calibration, max_ratio=0.95, latency_batch_size=LATENCY_BATCH_SIZE, **options,
    )  # fmt: skip
    return plan, time.perf_counter() - start


def run(one: Cell, train: Dataset, images: Dataset) -> Cell:
    """Measures a cell; its figures come with it."""
    plan_keys = ("network", "metric", "target", "allocation", "importance", "calibration")
    plan, planning_seconds = planned(*(one[key] for key in plan_keys), train)
    start, dense = time.perf_counter(), base(one["network"])
    batches = calibration_batches(train, SETS, SET_SIZE, seed=one["calibration"])
    model = copy.deepcopy(dense)
    prune(model, plan)
    if one["repair"]:
        repair(model, dense, plan, batches, ATTACK)
    recalibrate_batchnorm(model, calibration_batches(train, 1, RECALIBRATION, seed=one["calibration"] + 1))
    if one["steps"]:
        teacher = dense if one["objective"] == "rslad" else None
        settings = {"max_steps": one["steps"], "objective": one["objective"], "seed": one["seed"]}
        model = trained(model, train, teacher, learning_rate=0.02, **settings)
    found = evaluate_robustness(model, images, ["clean", "pgd20"], AttackConfig(eps=EPS, num_steps=20), batch_size=250)
    bits = "".join("01"[bit] for bit in found.verdicts["pgd20"])
    timed = {"latency": plan.achieved["latency"]} if one["metric"] == "latency" else {}
    if timed and not known_plan({key: one[key] for key in plan_keys}):
        timed["plan"] = plan.to_dict()
    return one | timed | {
        "macs": plan.achieved["macs"], "params": plan.achieved["params"],
        "scores": plan.scores if one["allocation"] == "mrs per millisecond" else None,
        "ratios": {name: round(ratio, 3) for name, ratio in plan.ratios.items()},
        "clean": found.clean_accuracy, "pgd20": found.attacks["pgd20"], "images": found.num_samples,
        "verdicts": f"{int(bits, 2):0{len(bits) // 4}x}", "base": weights_sha256(dense)[:12],
        "planning_seconds": round(planning_seconds, 1), "seconds": round(time.perf_counter() - start, 1),
        "torch": torch.__version__,
    }  # fmt: skip


def known_rows() -> list[Cell]:
    """What has been measured."""
    return [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.is_file() else []


def missing(rows: list[Cell], networks: list[str], phases: list[str], allocations: list[str]) -> Cell | None:
    """The next cell that is not among the rows, of those allocations where some are named."""
    done = {tuple(sorted((key, str(row[key])) for key in cell("", "", "", 0, "", 0, 0))) for row in rows}
    for one in all_cells(rows, networks, phases):
        wanted = not allocations or one["allocation"] in allocations
        if wanted and tuple(sorted((key, str(value)) for key, value in one.items())) not in done:
            return one
    return None


def main() -> None:
    """The command line."""
    phases = ["headroom", "primary", "confirmation", "equal_macs", "rules", "recovery"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="uoft-cs/cifar10")
    parser.add_argument("--minutes", type=float, default=30, help="No cell begins after this time.")
    parser.add_argument("--networks", nargs="+", default=["narrow_vgg"], help="Made by study_networks.py.")
    parser.add_argument("--phases", nargs="+", choices=phases, default=phases)
    parser.add_argument("--allocations", nargs="+", default=[], help="Only these first; all if not given.")
    parser.add_argument("--tables", action="store_true", help="Only print and draw what is known.")
    args = parser.parse_args()
    torch.set_num_threads(1)
    end = time.monotonic() + 60 * args.minutes
    if not args.tables:
        train, validation, test = splits(args.dataset)
        images = {"validation": validation, "test": test}
        while time.monotonic() < end and (one := missing(known_rows(), args.networks, args.phases, args.allocations)):
            row = run(one, train, images[one["split"]]) | {"dataset": Path(args.dataset).name}
            with ROWS.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{row['phase']} {row['network']} {row['metric']}={row['target']} {row['allocation']} "
                  f"steps={row['steps']} seed={row['seed']}: clean={row['clean']:.4f} pgd20={row['pgd20']:.4f} "
                  f"seconds={row['seconds']}", flush=True)  # fmt: skip
    print_tables(known_rows())
    print(*(f"Drawn: {path.name}" for path in draw(known_rows(), RESULTS)), sep="\n")


if __name__ == "__main__":
    main()
