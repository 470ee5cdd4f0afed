"""What becomes of engines with earlier settings, as `sliceway plan` prints it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gateway.changes import refuse_dip
from gateway.cli import changes_view
from gateway.cli.changes_view import show_changes
from placement.changeover import Changeover, Replacement
from placement.errors import TransitionBlocked
from placement.transition import Outlook

ROW = Replacement("chat-0", "chat", "beside", "GPU-1/1g.10gb@3", False, False, "", 2, 0, 0.0, 4.0, 0.0, 3.0, "measured")


class Page:
    """What is printed."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def print(self, line: str, *, highlight: bool) -> None:
        assert not highlight
        self.lines.append(line)


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> Page:
    page = Page()
    monkeypatch.setattr(changes_view, "out", page)
    return page


def test_nothing_is_said_where_nothing_is_replaced(page: Page) -> None:
    show_changes(Changeover())
    assert page.lines == []


def test_each_replica_is_told_where_and_what_is_missing(page: Page) -> None:
    rows = (
        ROW,
        replace(ROW, replica="chat-1", makes_slice=True, for_a_while=True),
        replace(ROW, replica="chat-2", how="in_place", reason="it is pinned to its slice", missing=1, dip_seconds=9.0),
        replace(ROW, replica="chat-3", how="in_place", reason="it serves nobody at the moment"),
    )
    outlook = Outlook("chat", 2.0, 1.0, 2.0, 2.0, 9.0, 3.0, "measured")
    show_changes(Changeover(rows, (outlook,), 17.0), {"GPU-1": "GPU 1"})
    first, *told, dip = page.lines
    assert "4 engines" in first
    assert "17 s" in first
    assert "chat-0 beside itself, on GPU 1 1g.10gb@3; no dip, 3 s for its start (measured)" in told[0]
    assert "made for it and given back afterwards, for a while: then it comes back" in told[1]
    assert "chat-2 in its place (it is pinned to its slice): 1 of 2 serve for about 9 s" in told[2]
    assert told[3].endswith("chat-3 in its place (it serves nobody at the moment); 3 s for its start (measured)")
    assert "chat serves 1 of the 2 it is guaranteed for about 9 s" in dip


def test_a_plan_tells_that_apply_refuses_a_dip(page: Page) -> None:
    row = replace(ROW, how="in_place", reason="it is pinned to its slice", missing=1, dip_seconds=9.0)
    dip = Changeover((row,), (Outlook("chat", 2.0, 1.0, 2.0, 2.0, 9.0, 3.0, "measured"),), 9.0)
    show_changes(dip)
    assert "--allow-dip" not in "".join(page.lines), "apply tells what has been allowed"
    show_changes(dip, planned=True)
    assert "`apply` refuses that without --allow-dip" in page.lines[-1]
    page.lines.clear()
    show_changes(Changeover((ROW,)), planned=True)
    assert "--allow-dip" not in "".join(page.lines)
    refuse_dip(Changeover((ROW,)))
    with pytest.raises(
        TransitionBlocked, match="chat would serve 1 of the 2 it is guaranteed for about 9 s"
    ) as refused:
        refuse_dip(dip)
    assert "--allow-dip" in str(refused.value.remedy)


def test_a_long_list_is_cut(page: Page) -> None:
    show_changes(Changeover((ROW,) * 45, (), 1.0))
    assert page.lines[-1] == "  ... and 5 more; --json lists them all"
