from __future__ import annotations

import os
import subprocess
import sys

from placement.cluster.holder import SliceHolder
from placement.cluster.members import Owner
from placement.cluster.seats import owner_lives


def test_a_holder_tells_its_own_process_as_a_controller_reads_it() -> None:
    owner = Owner.model_validate_json(SliceHolder().owner())
    assert owner.pid == os.getpid()
    assert owner_lives(owner)


def test_a_holder_loads_nothing_that_a_process_for_every_replica_should_not() -> None:
    heavy = "{'pydantic', 'numpy', 'ray', 'asyncio', 'placement.slices', 'model_registry'}"
    program = f"import sys, placement.cluster.holder; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, encoding="utf-8", check=True)
    assert done.stdout.strip() == "[]"
