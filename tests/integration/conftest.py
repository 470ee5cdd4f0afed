from __future__ import annotations

import pytest


def pytest_itemcollected(item: pytest.Item) -> None:
    """Whatever stands in this folder starts processes, so it is no fast test."""
    if not item.get_closest_marker("engine"):
        item.add_marker(pytest.mark.integration)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Engines come last and in the order they are written in: everything cheap fails first, and they start only once."""
    engine = sorted(
        (i for i in items if i.get_closest_marker("engine")), key=lambda i: (str(i.path), i.location[1] or 0)
    )
    items[:] = [i for i in items if not i.get_closest_marker("engine")] + engine
