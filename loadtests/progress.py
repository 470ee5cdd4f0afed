"""What people see while a measurement runs: a bar on a terminal, a line per step elsewhere. Standard error only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

OnProgress = Callable[[float, int], None]
"""Called with the share of the step's planned time that has passed, and the requests sent so far."""


class Steps:
    """Progress over several steps. Call it with the name of each as it begins; what it returns takes that step's progress."""

    def __init__(self, bar: Progress, console: Console, title: str, steps: int) -> None:
        self._bar, self._console = bar, console
        self._task = bar.add_task(title, total=steps)
        self._done = -1

    def __call__(self, label: str) -> OnProgress:
        """Begin the next step."""
        self._done += 1
        done = self._done
        if not self._console.is_terminal:
            self._console.print(label, markup=False, highlight=False)

        def report(share: float, sent: int) -> None:
            self._bar.update(self._task, completed=done + share, description=f"{label} · {sent} requests")

        return report

    def note(self, text: str) -> None:
        """Something that happened, on a line of its own."""
        self._console.print(text, markup=False, highlight=False, style="dim")


@contextmanager
def steps(title: str, count: int) -> Iterator[Steps]:
    """A display that goes away at the end."""
    console = Console(stderr=True, soft_wrap=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        yield Steps(bar, console, title, count)
