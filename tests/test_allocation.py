"""Allocations as pure functions: target, clamps, monotonicity, and refusals."""

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_mrpf.allocation import (
    ALLOCATIONS,
    allowed_widths,
    get_allocation,
    meet_target,
    nearest_width,
    nudged,
    reads,
)
from hf_mrpf.rules import mrs


@st.composite
def problems(draw):
    count = draw(st.integers(1, 8))
    names = [f"u{i}" for i in range(count)]
    scores = {name: draw(st.floats(0, 1e3)) for name in names}
    widths = {name: draw(st.integers(1, 60)) for name in names}
    costs = {name: draw(st.floats(1e-3, 1e6)) for name in names}
    max_ratio = draw(st.floats(0.1, 0.95))
    target = draw(st.floats(1 - max_ratio + 1e-6, 0.999))
    return scores, widths, costs, target, max_ratio


def channel_scores(scores, widths):
    return {name: [score + math.sin(17 * i) for i in range(widths[name])] for name, score in scores.items()}


@settings(max_examples=150, deadline=None)
@given(problems(), st.sampled_from(sorted(ALLOCATIONS)))
def test_the_target_is_met_and_no_unit_goes_beyond_its_limit(problem, name):
    scores, widths, costs, target, max_ratio = problem
    given_scores = channel_scores(scores, widths) if "importances" in reads(name) else scores
    keywords = {"seed": 3, "structures": {unit: unit in ("u0", "u3", "u4") for unit in widths}}
    keywords = {keyword: value for keyword, value in keywords.items() if keyword in reads(name)}
    ratios = ALLOCATIONS[name](given_scores, widths, costs, target, max_ratio=max_ratio, **keywords)
    assert list(ratios) == list(widths)
    assert all(0 <= ratio <= max_ratio for ratio in ratios.values())
    kept = sum(costs[unit] * (1 - ratio) for unit, ratio in ratios.items())
    assert kept == pytest.approx(target * sum(costs.values()), rel=1e-6)


@settings(max_examples=100, deadline=None)
@given(problems())
def test_mrs_never_removes_more_from_a_more_sensitive_unit(problem):
    scores, widths, costs, target, max_ratio = problem
    ratios = mrs(scores, widths, costs, target, max_ratio=max_ratio)
    for a in scores:
        for b in scores:
            if scores[a] > scores[b]:
                assert ratios[a] <= ratios[b] + 1e-12


def test_mrs_shares_follow_log_scores():
    units = {"low": 1e-4, "middle": 1e-2, "high": 1.0}
    ratios = mrs(units, dict.fromkeys(units, 10), dict.fromkeys(units, 1.0), 0.7)
    assert ratios == pytest.approx({"low": 0.45, "middle": 0.3, "high": 0.15})


def test_mrs_per_cost_orders_units_by_what_a_score_costs():
    scores, widths = {"a": 1.0, "b": 0.5, "c": 0.1, "free": 1e-3}, {"a": 10, "b": 10, "c": 10, "free": 10}
    costs = {"a": 1000.0, "b": 5.0, "c": 10.0, "free": 0.0}  # per cost 0.001, 0.1, 0.01 and, at the price of b, 0.0002
    worth = {"a": 0.001, "b": 0.1, "c": 0.01, "free": 1e-3 / 5}
    ratios = ALLOCATIONS["mrs_per_cost"](scores, widths, costs, 0.6)
    assert ratios == pytest.approx(mrs(worth, widths, costs, 0.6))
    assert ratios["b"] < ratios["c"] < ratios["a"] < ratios["free"]


def test_equal_and_zero_scores_are_shared_evenly():
    widths, costs = {"a": 10, "b": 10}, {"a": 1, "b": 3}
    for score in (0.0, 0.2):
        assert mrs({"a": score, "b": score}, widths, costs, 0.6) == pytest.approx({"a": 0.4, "b": 0.4})
    # Zero counts as the lowest positive score.
    assert mrs({"a": 0.0, "b": 0.2}, widths, costs, 0.6) == pytest.approx({"a": 0.4, "b": 0.4})


def test_global_takes_the_least_important_channels_of_all():
    scores = {"a": [0.1, 5, 0.2, 6], "b": [1, 2, 3, 4]}
    ratios = ALLOCATIONS["global"](scores, {"a": 4, "b": 4}, {"a": 4, "b": 4}, 5 / 8)
    assert ratios == pytest.approx({"a": 0.5, "b": 0.25})


def test_anti_mrs_gives_the_highest_score_the_ratio_of_the_lowest():
    scores = {"low": 1e-4, "next": 1e-3, "third": 0.3, "high": 1.0}
    widths, costs = dict.fromkeys(scores, 10), dict.fromkeys(scores, 1.0)
    ratios, anti = (ALLOCATIONS[name](scores, widths, costs, 0.7) for name in ("mrs", "anti_mrs"))
    assert list(anti) == list(scores)
    for unit, other in {"low": "high", "next": "third", "third": "next", "high": "low"}.items():
        assert anti[unit] == pytest.approx(ratios[other])


def test_shuffled_mrs_deals_the_same_ratios_to_other_units_by_a_seed():
    scores = {f"u{i}": 10.0**-i for i in range(8)}
    widths, costs = dict.fromkeys(scores, 10), dict.fromkeys(scores, 1.0)
    ratios = ALLOCATIONS["mrs"](scores, widths, costs, 0.7)
    first, again, other = (ALLOCATIONS["shuffled_mrs"](scores, widths, costs, 0.7, seed=seed) for seed in (1, 1, 2))
    assert first == again != other and first != ratios != other
    for dealt in (first, other):
        assert sorted(dealt.values()) == pytest.approx(sorted(ratios.values()))
        assert list(dealt) == list(scores)


def test_isomorphic_removes_the_same_share_of_the_least_important_of_every_group():
    """Two blocks of small importances are alike, and the stem has large ones: no group pays for another."""
    scores = {"stem": [90.0, 50, 70, 60], "one": [0.1, 0.2, 0.3, 0.4], "two": [0.5, 0.6, 0.7, 0.05]}
    widths = dict.fromkeys(scores, 4)
    structures = {"stem": "a", "one": "b", "two": "b"}
    ratios = ALLOCATIONS["isomorphic"](scores, widths, dict.fromkeys(scores, 4.0), 0.5, structures=structures)
    alike = sorted(scores["one"] + scores["two"])[:4]  # half of the group: 0.05, 0.1, 0.2, 0.3
    expected = {unit: sum(score in alike for score in scores[unit]) / 4 for unit in ("one", "two")}
    assert ratios == pytest.approx({"stem": 0.5} | expected)
    # One group of all is the global ranking.
    together = ALLOCATIONS["isomorphic"](scores, widths, widths, 0.5, structures=dict.fromkeys(scores, "a"))
    assert together == pytest.approx(ALLOCATIONS["global"](scores, widths, widths, 0.5))
    with pytest.raises(ValueError, match=r"structures lacks units \['two'\]"):
        ALLOCATIONS["isomorphic"](scores, widths, widths, 0.5, structures={"stem": "a", "one": "b"})


def test_a_gap_is_closed_by_the_single_step_that_leaves_least_of_it():
    options = {"a": [2, 4, 6], "b": [1, 2, 3]}
    found = nudged(lambda widths: 10 * widths["a"] + widths["b"], options, {"a": 6, "b": 3}, 42)
    assert found == {"a": 4, "b": 2}


def test_two_units_move_at_once_where_no_single_one_comes_nearer():
    options = {"a": list(range(1, 10)), "b": list(range(1, 10)), "c": [3]}
    found = nudged(lambda widths: 10 * widths["a"] + 7 * widths["b"], options, {"a": 5, "b": 5, "c": 3}, 88)
    assert found == {"a": 6, "b": 4, "c": 3}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": 0.0}, "target is 0.0; it must be a number between 0 and 1"),
        ({"target": 1}, "target is 1; it must be"),
        ({"target": True}, "target is True"),
        ({"target": 0.1}, "target 0.1 cannot be met: with max_ratio 0.85 at least 0.15"),
        ({"max_ratio": 1.0}, "max_ratio is 1.0"),
        ({"scores": {"a": math.nan, "b": 1}}, "score of unit 'a' is nan; a finite number"),
        ({"scores": {"a": 1}}, r"scores lacks units \['b'\]"),
        ({"scores": {"a": 1, "b": 1, "c": 1}}, r"scores names unknown units \['c'\]; known units: a, b"),
        ({"widths": {"a": 0, "b": 1}}, "width of unit 'a' is 0"),
        ({"widths": {"a": True, "b": 1}}, "width of unit 'a' is True"),
        ({"widths": {}}, "no units to prune"),
        ({"costs": {"a": -1, "b": 1}}, "cost of unit 'a' is -1"),
        ({"costs": {"a": 0, "b": 0}}, "all costs are 0"),
    ],
)
def test_bad_input_is_refused(change, message):
    values = {"scores": {"a": 1, "b": 2}, "widths": {"a": 4, "b": 4}, "costs": {"a": 1, "b": 1}, "target": 0.5} | change
    max_ratio = values.pop("max_ratio", 0.85)
    with pytest.raises(ValueError, match=message):
        mrs(**values, max_ratio=max_ratio)


def test_bad_importances_and_names_are_refused():
    with pytest.raises(ValueError, match="unit 'a' has 2 channels but 1 importances"):
        ALLOCATIONS["global"]({"a": [1.0]}, {"a": 2}, {"a": 1}, 0.5)
    with pytest.raises(ValueError, match="an importance of unit 'a' is nan"):
        ALLOCATIONS["global"]({"a": [1.0, math.nan]}, {"a": 2}, {"a": 1}, 0.5)
    with pytest.raises(ValueError, match="allocation is 'best'; known allocations: mrs, uniform, global"):
        get_allocation("best")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((10, 0.85, 4, 1), [4, 5, 6, 7, 8, 9, 10]),
        ((100, 0.9, 4, 1), list(range(10, 101))),
        ((20, 0.85, 4, 8), [8, 16]),
        ((3, 0.85, 4, 1), [3]),
        ((6, 0.85, 1, 8), [6]),
    ],
)
def test_allowed_widths(arguments, expected):
    assert allowed_widths(*arguments) == expected


def test_the_nearest_width_is_the_larger_of_two():
    assert nearest_width([8, 16], 12) == 16 and nearest_width([8, 16], 11.9) == 8


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 6), st.floats(0.3, 0.95), st.integers(0, 1000))
def test_measured_sizes_are_met_although_they_are_not_linear(count, target, seed):
    widths = {f"u{i}": 8 + (seed * (i + 3)) % 57 for i in range(count)}
    options = {name: allowed_widths(width, 0.85, 1, 1) for name, width in widths.items()}

    def size(kept):
        chain = [3, *(kept[name] for name in widths), 10]
        return sum(a * b for a, b in pairwise(chain))

    def widths_at(nominal):
        return {name: nearest_width(options[name], nominal * width) for name, width in widths.items()}

    wanted = target * size(widths)
    found = meet_target(size, options, widths_at, dict.fromkeys(widths, 0.0), wanted, lowest=0.15)
    one_channel = max(size(found | {name: min(found[name] + 1, widths[name])}) - size(found) for name in widths)
    assert abs(size(found) - wanted) <= max(one_channel, 0.01 * wanted)
