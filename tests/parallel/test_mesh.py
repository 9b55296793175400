"""Who does what: ranks in the mesh, and the cut of layers against all cuts there are."""

from __future__ import annotations

import random
from itertools import combinations, pairwise

import pytest

from gllm_engine.parallel import Mesh, partition_layers


@pytest.mark.parametrize(("pp", "tp"), [(1, 1), (1, 4), (4, 1), (3, 2)])
def test_ranks_and_places_are_one_to_one(pp: int, tp: int) -> None:
    mesh = Mesh(pp, tp)
    places = [(mesh.stage(rank), mesh.tp_rank(rank)) for rank in range(mesh.world)]
    assert places == [(stage, i) for stage in range(pp) for i in range(tp)]
    assert [mesh.rank_at(*place) for place in places] == list(range(mesh.world))


def stage_costs(costs: list[float], tail: float, cut: tuple[int, ...]) -> list[float]:
    ends = [0]
    for count in cut:
        ends.append(ends[-1] + count)
    each = [sum(costs[first:end]) for first, end in pairwise(ends)]
    return [*each[:-1], each[-1] + tail]


def all_cuts(num_layers: int, stages: int) -> list[tuple[int, ...]]:
    """Every way to give each stage at least one of the layers."""
    inner = combinations(range(1, num_layers), stages - 1)
    return [tuple(b - a for a, b in pairwise((0, *ends, num_layers))) for ends in inner]


@pytest.mark.parametrize("stages", [1, 2, 3, 5])
@pytest.mark.parametrize("kind", ["alike", "two kinds", "all different"])
def test_no_cut_is_better(stages: int, kind: str) -> None:
    """Neither in the dearest stage nor, among those equal in it, in evenness (least squares)."""
    draw = random.Random(f"{stages} {kind}")
    choices = {"alike": [3.0], "two kinds": [2.0, 5.0]}.get(kind)
    for num_layers in range(stages, 10):
        costs = [draw.choice(choices) if choices else draw.random() for _ in range(num_layers)]
        tail = draw.choice([-0.9 * costs[-1], 0.0, 3.0, 40.0])
        cut = partition_layers(costs, tail, stages)
        assert len(cut) == stages and sum(cut) == num_layers and min(cut) >= 1

        def rank(cut: tuple[int, ...]) -> tuple[float, float]:
            each = stage_costs(costs, tail, cut)  # noqa: B023
            return round(max(each), 6), round(sum(cost**2 for cost in each), 6)

        assert rank(cut) == min(map(rank, all_cuts(num_layers, stages)))


def test_the_end_of_the_model_weighs() -> None:
    assert partition_layers([1.0] * 8, 0.0, 2) == (4, 4)
    assert partition_layers([1.0] * 8, 2.0, 2) == (5, 3)
    assert partition_layers([1.0] * 8, 100.0, 2) == (7, 1)
    assert partition_layers([1.0] * 9, -0.5, 2) == (4, 5)  # it may take less than its layers do
    assert partition_layers([1.0] * 9, 0.5, 2) == (5, 4)


def test_among_equals_the_most_even() -> None:
    """The dearest stage is the last in any case; the others are cut evenly all the same."""
    assert partition_layers([1.0] * 9, 50.0, 3) == (4, 4, 1)


def test_runs_of_layers_stay_whole() -> None:
    assert partition_layers([1.0, 1.0, 4.0, 4.0, 2.0], 0.0, 2, [1, 1, 4, 4, 2]) == (6, 6)
    assert partition_layers([1.0, 4.0, 4.0], 0.0, 2, [1, 4, 4]) == (5, 4)
    assert partition_layers([1.0, 4.0, 4.0], 9.0, 3, [1, 4, 4]) == (1, 4, 4)


def test_fewer_layers_than_stages_are_refused() -> None:
    with pytest.raises(ValueError, match="2 runs of layers cannot be cut into 3 stages"):
        partition_layers([1.0, 1.0], 0.0, 3)
