from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from placement.cluster.here import LocalNode, local_nodes, node_at_work
from placement.cluster.members import Owner
from placement.cluster.seats import this_process
from placement.locks import exclusive


def lock(state: Path, name: str) -> Path:
    path = state / "nodes" / name / "member.lock"
    path.parent.mkdir(parents=True)
    path.touch()
    return path


def write(node: LocalNode, name: str, owner: Owner) -> None:
    node.record(name).write_text(owner.model_dump_json(), encoding="utf-8")


@pytest.fixture
def ended() -> Owner:
    """A process that has ended, and is no other one by now."""
    process = subprocess.Popen(["true"])
    process.wait()
    return Owner(pid=process.pid, start_ticks=1, boot_id=this_process().boot_id)


def test_where_no_node_is_none_is_at_work(tmp_path: Path) -> None:
    assert list(local_nodes(tmp_path)) == []
    assert node_at_work(tmp_path / "nowhere") is None


def test_a_node_in_its_cluster_is_found_with_who_keeps_it_there(tmp_path: Path) -> None:
    path = lock(tmp_path, "a")
    lock(tmp_path, "b")
    with exclusive(path, what="node", remedy=""):
        found = node_at_work(tmp_path)
        assert found is not None
        assert (found.name, found.pid, found.at_work) == ("a", os.getpid(), True)
        assert [(node.name, node.at_work) for node in local_nodes(tmp_path)] == [("a", True), ("b", False)]
    assert node_at_work(tmp_path) is None


def test_what_a_killed_process_has_left_is_a_node_at_work_too(tmp_path: Path, ended: Owner) -> None:
    lock(tmp_path, "a")
    (node,) = local_nodes(tmp_path)
    write(node, "controller", ended)
    assert node_at_work(tmp_path) is None
    write(node, "controller", this_process())
    assert node_at_work(tmp_path) == node
    assert (node.process("controller"), node.process("gateway")) == (this_process(), None)


def test_a_record_that_makes_no_sense_is_no_process(tmp_path: Path) -> None:
    lock(tmp_path, "a")
    (node,) = local_nodes(tmp_path)
    node.record("raylet").write_text("{", encoding="utf-8")
    assert node.process("raylet") is None


def test_of_several_nodes_the_one_in_a_cluster_counts(tmp_path: Path) -> None:
    lock(tmp_path, "a")
    in_cluster = lock(tmp_path, "b")
    write(next(local_nodes(tmp_path)), "gateway", this_process())
    with exclusive(in_cluster, what="node", remedy=""):
        found = node_at_work(tmp_path)
        assert found is not None
        assert found.name == "b"
