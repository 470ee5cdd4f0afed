from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from placement.cluster.holder import ReplicaActor, SliceHolder
from placement.cluster.members import Owner, Seat
from placement.cluster.seats import owner_lives, this_process
from placement.replicas.journal import JournalEntry

SEAT = Seat(replica="chat-0", model="chat", node="n1", slice_id="cpu-0")


def test_a_holder_tells_its_own_process_as_a_controller_reads_it() -> None:
    owner = Owner.model_validate_json(SliceHolder().owner())
    assert owner.pid == os.getpid()
    assert owner_lives(owner)


def test_a_replicas_actor_tells_its_process_and_seat_also_to_who_knows_processes_only() -> None:
    actor = ReplicaActor(SEAT.model_dump(), "")
    told = json.loads(actor.owner())
    assert Owner.model_validate(told) == this_process()
    assert Seat.model_validate(told["seat"]) == SEAT
    assert repr(actor) == "chat-0 on n1/cpu-0"
    assert actor.describe() == SEAT.model_dump() | {"pid": os.getpid(), "engine_pid": None}


def entry(**different: object) -> JournalEntry:
    """Of an engine whose shim is this process."""
    me = this_process()
    made = JournalEntry(
        replica="chat-0",
        model="chat",
        task="generate",
        slice_id="cpu-0",
        spec_hash="s",
        endpoint="http://127.0.0.1:1",
        log_offset=0,
        started_at=datetime(2026, 1, 1, tzinfo=UTC),
        shim_pid=me.pid,
        shim_start_ticks=me.start_ticks,
        boot_id=me.boot_id,
        engine_pid=77,
    )
    return made.model_copy(update=different)


@pytest.mark.parametrize(
    ("journal", "told"),
    [
        (entry().model_dump_json(), 77),
        (entry(slice_id="cpu-1").model_dump_json(), None),
        (entry(shim_start_ticks=1).model_dump_json(), None),
        (entry(engine_pid=0).model_dump_json(), None),
        ("{", None),
        ("[]", None),
        ('{"shim_pid": null}', None),
        (None, None),
    ],
    ids=["runs", "another slice", "has ended", "is starting", "half", "a list", "null", "none"],
)
def test_a_replicas_actor_tells_its_engine_as_the_controller_wrote_it_down(
    journal: str | None, told: int | None, tmp_path: Path
) -> None:
    path = tmp_path / "journal.json"
    if journal is not None:
        path.write_text(journal, encoding="utf-8")
    assert ReplicaActor(SEAT.model_dump(), str(path)).describe()["engine_pid"] == told


def test_a_holder_loads_nothing_that_a_process_for_every_replica_should_not() -> None:
    heavy = "{'pydantic', 'numpy', 'ray', 'asyncio', 'placement.slices', 'model_registry'}"
    program = f"import sys, placement.cluster.holder; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, encoding="utf-8", check=True)
    assert done.stdout.strip() == "[]"
