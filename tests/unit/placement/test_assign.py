from __future__ import annotations

import pytest

from model_registry.model import SliceFit
from model_registry.schema import ModelConfig
from placement.assign import Wanted, assign, natural, wanted_replicas
from placement.errors import NoFreeSlice, PlacementError, SliceTaken
from placement.slices import Inventory, Slice, SliceKind

GIB = 2**30


def cpu(i: int, gib: float = 8) -> Slice:
    return Slice(f"cpu-{i}", SliceKind.CPU, None, int(gib * GIB), cores=(i,))


def mig(i: int, profile: str, gib: float) -> Slice:
    return Slice(f"GPU-a/{profile}@{i}", SliceKind.MIG, profile, int(gib * GIB), uuid=f"MIG-{i}")


def fits(needs: dict[str, float], slices: list[Slice]) -> dict[tuple[str, str], SliceFit]:
    table = {}
    for model, need in needs.items():
        for target in slices:
            room = target.memory_bytes - int(need * GIB)
            reason = "fits" if room >= 0 else f"weights take {need} GiB"
            table[model, target.id] = SliceFit(
                room >= 0, reason, target.memory_bytes, 0, 0, 0, 512 if room < 0 else 8192, room
            )
    return table


def models(**replicas: int) -> list[ModelConfig]:
    return [ModelConfig(name=name, source="org/x", replicas=n) for name, n in replicas.items()]


def reason(
    replica: str,
    wanted: list[Wanted] | tuple[Wanted, ...],
    needs: dict[str, float],
    slices: list[Slice],
    notes: tuple[str, ...] = (),
) -> PlacementError:
    result = assign(wanted, fits(needs, slices), Inventory(tuple(slices), notes=notes))
    with pytest.raises(PlacementError):
        result.complete()
    return result.unplaced[replica]


def test_the_smallest_slice_that_fits_is_taken() -> None:
    slices = [mig(0, "4g.40gb", 40), mig(4, "1g.10gb", 10), mig(5, "2g.20gb", 20)]
    result = assign(
        wanted_replicas(models(small=1, middle=1)), fits({"small": 8, "middle": 15}, slices), Inventory(tuple(slices))
    )
    assert result.complete() == {"middle-0": "GPU-a/2g.20gb@5", "small-0": "GPU-a/1g.10gb@4"}


def test_a_small_model_makes_room_for_one_that_fits_only_there() -> None:
    slices = [cpu(0, 4), cpu(1, 8)]
    wanted = [Wanted("a-0", "a", 0), Wanted("b-0", "b", 0, pin="cpu-0")]
    assert assign(wanted, fits({"a": 2, "b": 2}, slices), Inventory(tuple(slices))).complete() == {
        "a-0": "cpu-1",
        "b-0": "cpu-0",
    }


def test_what_runs_is_moved_only_if_another_could_not_run_otherwise() -> None:
    slices = [cpu(0, 4), cpu(1, 8)]
    needs = {"small": 2, "big": 6}
    wanted = wanted_replicas(models(small=1, big=1))
    inventory = Inventory(tuple(slices))
    stays = assign(wanted_replicas(models(small=1)), fits(needs, slices), inventory, current={"small-0": "cpu-1"})
    assert stays.complete() == {"small-0": "cpu-1"}, "a smaller slice is free, but nobody needs this one"
    moves = assign(wanted, fits(needs, slices), inventory, current={"small-0": "cpu-1"})
    assert moves.complete() == {"small-0": "cpu-0", "big-0": "cpu-1"}


def test_models_with_endpoints_need_no_slice() -> None:
    other = ModelConfig(name="else", endpoints=("http://127.0.0.1:9100",))
    assert [w.replica for w in wanted_replicas([other, *models(b=2, a=1)])] == ["a-0", "b-0", "b-1"]


def test_too_few_slices_says_how_many_are_missing_and_how_many_replicas_would_do() -> None:
    error = reason("chat-3", wanted_replicas(models(chat=4)), {"chat": 2}, [cpu(0), cpu(1)])
    assert isinstance(error, NoFreeSlice)
    assert error.message == "no slice is left for 'chat-3': there are 2 slices"
    assert error.where == "models.chat"
    assert (
        error.remedy
        == "Provide 2 more slices, or set replicas: 2 for 'chat'; on CPU, raise fleet.cpu.slices if there are more cores."
    )


def test_a_rival_is_named() -> None:
    error = reason("b-0", wanted_replicas(models(a=1, b=1)), {"a": 2, "b": 2}, [cpu(0)])
    assert "'a' needs some too" in error.message
    assert "Provide 1 more slice, or take 'b' out" in str(error.remedy)


def test_a_model_that_is_too_large_for_every_slice_says_by_how_much() -> None:
    error = reason("big-0", wanted_replicas(models(big=1)), {"big": 12}, [cpu(0, 4), cpu(1, 8)])
    assert "'big' does not fit the largest slice there is, 'cpu-1' (8.00 GiB): weights take 12 GiB" in error.message
    assert "It lacks 4.00 GiB." in str(error.remedy)
    assert "max_model_len: 512 would fit" in str(error.remedy)


@pytest.mark.parametrize(
    ("wanted", "message", "remedy"),
    [
        (Wanted("m-0", "m", 0, pin="cpu-7"), "there is no slice 'cpu-7'", "There are cpu-0, cpu-1."),
        (
            Wanted("m-0", "m", 0, profiles=("1g.10gb",)),
            "no slice has the profile '1g.10gb'",
            "The slices here have no profiles",
        ),
    ],
)
def test_a_wish_that_nothing_meets_lists_what_there_is(wanted: Wanted, message: str, remedy: str) -> None:
    error = reason("m-0", [wanted], {"m": 1}, [cpu(0), cpu(1)])
    assert error.message == message
    assert remedy in str(error.remedy)


def test_no_slice_at_all_says_why() -> None:
    error = reason("m-0", wanted_replicas(models(m=1)), {"m": 1}, [], notes=("MIG is on, but there is no instance.",))
    assert error.message == "there is no slice at all"
    assert error.remedy == "MIG is on, but there is no instance."


def test_two_replicas_pinned_to_one_slice() -> None:
    wanted = [Wanted("a-0", "a", 0, pin="cpu-0"), Wanted("b-0", "b", 0, pin="cpu-0")]
    error = reason("b-0", wanted, {"a": 1, "b": 1}, [cpu(0), cpu(1)])
    assert isinstance(error, SliceTaken)
    assert "named for 'a-0' and for 'b-0'" in error.message


def test_those_that_can_run_are_seated_even_if_others_cannot() -> None:
    slices = [cpu(0), cpu(1)]
    result = assign(
        wanted_replicas(models(huge=1, small=1)), fits({"huge": 100, "small": 1}, slices), Inventory(tuple(slices))
    )
    assert result.slices == {"small-0": "cpu-0"}
    assert set(result.unplaced) == {"huge-0"}


def test_numbers_sort_as_numbers() -> None:
    assert sorted(["cpu-10", "cpu-9", "GPU-1/1g.10gb@0"], key=natural) == ["GPU-1/1g.10gb@0", "cpu-9", "cpu-10"]
