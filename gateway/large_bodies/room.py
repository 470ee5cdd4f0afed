"""How many bytes of large bodies may wait in a gateway, together and of one tenant. Counted, so that what is given out comes back."""

from __future__ import annotations

from gateway.config import GatewayConfig
from gateway.errors import BodiesFull, RateLimited

RETRY_SECONDS = 1.0


class Room:
    """`held` bytes in all, and of each tenant that has any."""

    def __init__(self) -> None:
        self.held = 0
        self._by_tenant: dict[str, int] = {}

    def of(self, tenant: str) -> int:
        """Bytes that `tenant` has."""
        return self._by_tenant.get(tenant, 0)

    def take(self, tenant: str, count: int, limits: GatewayConfig) -> None:
        """Let `tenant` have `count` bytes more. Raises RateLimited for its own limit, BodiesFull for that of all."""
        own = self.of(tenant) + count
        if own > limits.most_body_bytes_of_a_tenant:
            raise _too_many_of_its_own(limits.most_body_bytes_of_a_tenant)
        if self.held + count > limits.most_body_bytes:
            raise BodiesFull(
                f"Long request bodies wait in the gateway, and with this one they would hold more than "
                f"{limits.most_body_bytes} bytes (gateway.max_body_memory).",
                retry_after_seconds=RETRY_SECONDS,
            )
        self.held += count
        self._by_tenant[tenant] = own

    def give_back(self, tenant: str, count: int) -> None:
        """They are free again."""
        self.held -= count
        left = self.of(tenant) - count
        if left:
            self._by_tenant[tenant] = left
        else:
            self._by_tenant.pop(tenant, None)


def _too_many_of_its_own(most: int) -> RateLimited:
    return RateLimited(
        f"Your long request bodies that wait in the gateway would hold more than {most} bytes "
        "(gateway.max_body_memory_per_tenant).",
        limit="max_body_memory_per_tenant",
        kind="requests",
        retry_after_seconds=RETRY_SECONDS,
        should_retry=True,
    )
