"""An address of the store that makes no sense is told without the password in it."""

from __future__ import annotations

import traceback

import pytest

from gateway.admission.sharing.redis_store import RedisStore
from gateway.errors import StoreUnavailable

WRONG = [
    "redis://:planted/word@store:6379",
    "redis://user:planted@store:planted",
    "redis://user:planted@[store",
    "redis://user:planted@store:6379/0?socket_timeout=planted",
    "planted://user:planted@store",
    "planted",
    "",
]


@pytest.mark.parametrize("url", WRONG)
def test_a_wrong_address_is_told_without_what_is_in_it(url: str) -> None:
    with pytest.raises(StoreUnavailable) as refused:
        RedisStore(url)
    assert refused.value.where == "gateway.shared_limits.url"
    assert refused.value.remedy
    assert "planted" not in "".join(traceback.format_exception(refused.value, limit=0))
