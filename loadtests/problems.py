"""What is wrong with what an operator wrote, and what to do about it. The load tests have an error tree of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Problem:
    """One fault: `where` is `file:line: field` as far as it is known."""

    message: str
    where: str = ""
    remedy: str = ""

    def __str__(self) -> str:
        told = f"{self.where}: {self.message}" if self.where else self.message
        return f"{told}\n      {self.remedy}" if self.remedy else told

    def as_dict(self) -> dict[str, str]:
        """The JSON shape."""
        return {"message": self.message, "where": self.where, "remedy": self.remedy}


class LoadTestError(Exception):
    """A measurement could not be made, though what was asked for makes sense. Exit code 1."""

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(f"{message}\n      {remedy}" if remedy else message)
        self.message = message
        self.remedy = remedy


class ScenarioError(Exception):
    """What was asked for cannot be run as it is written; `problems` has every fault with its place. Exit code 2."""

    def __init__(self, *problems: Problem | str) -> None:
        self.problems = tuple(Problem(p) if isinstance(p, str) else p for p in problems)
        super().__init__("\n".join(map(str, self.problems)))


def one_of(names: Sequence[str]) -> str:
    """`There are 'a', 'b'.` for messages that list what is allowed."""
    return f"There are {', '.join(map(repr, names))}." if names else "There are none."
