from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from gateway.audit import AuditLog, Head
from gateway.errors import AuditError

NOW = 1_700_000_000.25


@pytest.fixture
def log(tmp_path: Path) -> AuditLog:
    return AuditLog(tmp_path / "audit", lambda: b"k" * 32)


def add(log: AuditLog, count: int = 3) -> None:
    for number in range(count):
        log.append(actor="cli:ann", action="key.create", target=f"key-{number}", detail={"n": number}, now=NOW)


def test_lines_say_who_did_what_and_follow_one_another(log: AuditLog) -> None:
    add(log)
    lines = [json.loads(line) for line in log.path.read_text(encoding="utf-8").splitlines()]
    assert [line["seq"] for line in lines] == [1, 2, 3]
    assert [line["prev"] for line in lines] == ["0" * 64, lines[0]["mac"], lines[1]["mac"]]
    assert lines[0]["at"] == "2023-11-14T22:13:20.250Z"
    assert log.path.stat().st_mode & 0o077 == 0
    verdict = log.verify()
    assert verdict.intact
    assert (verdict.entries, verdict.head) == (3, Head(3, lines[2]["mac"]))
    assert [entry.target for entry in log.tail(2)] == ["key-1", "key-2"]


def test_an_empty_log_is_intact(log: AuditLog) -> None:
    assert log.verify().intact
    assert log.tail(5) == []


Tamper = Callable[[list[bytes]], list[bytes]]


@pytest.mark.parametrize(
    "tamper",
    [
        lambda lines: [lines[0].replace(b"key-0", b"key-9"), *lines[1:]],
        lambda lines: [lines[0], *lines[2:]],
        lambda lines: lines[1:],
        lambda lines: [lines[1], lines[0], *lines[2:]],
        lambda lines: [*lines, lines[2]],
        lambda lines: lines[:-1],
        lambda lines: [lines[0], b"{}", *lines[1:]],
        lambda lines: [lines[0].replace(b'"actor":"cli:ann"', b'"actor":"cli:ann","actor":"cli:bob"'), *lines[1:]],
        lambda lines: [],
    ],
    ids=["edited", "dropped", "first dropped", "swapped", "repeated", "cut off", "inserted", "key twice", "emptied"],
)
def test_tampering_shows(log: AuditLog, tamper: Tamper) -> None:
    add(log, 4)
    lines = log.path.read_bytes().splitlines()
    log.path.write_bytes(b"".join(line + b"\n" for line in tamper(lines)))
    assert not log.verify().intact


def test_another_key_vouches_for_nothing(log: AuditLog) -> None:
    add(log)
    assert len(AuditLog(log.root, lambda: b"x" * 32).verify().problems) == 3


def test_a_rollback_of_everything_shows_to_who_wrote_the_head_down(log: AuditLog) -> None:
    add(log, 2)
    before = {path: path.read_bytes() for path in log.root.iterdir()}
    add(log, 1)
    written_down = log.verify().head
    for path, data in before.items():
        path.write_bytes(data)
    assert log.verify().intact
    assert "line 3 is not there" in log.verify(written_down).problems[0]


def test_files_rotate_and_the_chain_goes_on(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit", lambda: b"k" * 32, rotate_bytes=400)
    add(log, 7)
    assert len(log.files()) > 2
    verdict = log.verify()
    assert verdict.intact
    assert verdict.entries == 7
    assert [entry.seq for entry in log.tail(6)] == [2, 3, 4, 5, 6, 7]
    log.files()[1].unlink()
    assert not log.verify().intact


def test_an_unfinished_line_is_kept_and_vouched_for(log: AuditLog) -> None:
    add(log, 2)
    whole = log.path.read_bytes()
    log.path.write_bytes(whole + whole.splitlines()[1][:60])
    assert log.verify().problems == ("the last line is unfinished",)
    add(log, 1)
    assert log.verify().intact
    log.path.write_bytes(log.path.read_bytes().replace(whole.splitlines()[1][:60] + b"\n", b""))
    assert not log.verify().intact


def test_a_whole_line_without_its_end_counts(log: AuditLog) -> None:
    add(log, 2)
    log.path.write_bytes(log.path.read_bytes().rstrip(b"\n"))
    add(log, 1)
    assert log.verify().intact
    assert log.verify().entries == 3


def test_what_cannot_be_written_stops_the_change(tmp_path: Path) -> None:
    (tmp_path / "audit").write_text("a file where a folder should be", encoding="utf-8")
    log = AuditLog(tmp_path / "audit", lambda: b"k")
    with pytest.raises(AuditError, match="Nothing is changed without it"):
        add(log)


def test_a_log_of_nothing_but_rubbish_is_not_continued(log: AuditLog) -> None:
    log.root.mkdir()
    log.path.write_bytes(b"rubbish\n")
    with pytest.raises(AuditError, match="no line that can be read"):
        add(log)


def test_many_writers_make_one_chain(log: AuditLog) -> None:
    threads = [threading.Thread(target=add, args=(log, 4)) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    verdict = log.verify()
    assert verdict.intact
    assert verdict.entries == 20
