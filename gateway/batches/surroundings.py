"""What batches see of a running gateway."""

from __future__ import annotations

from gateway.batches.capacity import Standing
from gateway.batches.inprocess import AsgiApp
from gateway.batches.service import Surroundings
from gateway.config import Config
from gateway.keys import WallClock
from gateway.service import Gateway
from gateway.tenants import Tenant


def surroundings(gateway: Gateway, relay: AsgiApp, config: Config, wall: WallClock) -> Surroundings:
    """Of `gateway`, whose `exchanges` need not be there before the first batch runs."""

    def tenant(name: str) -> Tenant | None:
        directory = gateway.exchanges.policy.directory
        return directory.tenants.get(name) if directory.keys_required else directory.everyone

    def standing(model: str, tenant: str) -> Standing | None:
        if model not in gateway.routes().models:
            return None
        pool = gateway.exchanges.admission.pool(model, tenant)
        return Standing(len(pool.queue), tuple((load.seat_share, load.sequences) for load in pool.loads))

    return Surroundings(
        relay=relay,
        standing=standing,
        tenant=tenant,
        draining=lambda: gateway.draining,
        wall=wall,
        max_body=config.gateway.max_body,
        body_timeout_seconds=config.gateway.body_timeout_seconds,
    )
