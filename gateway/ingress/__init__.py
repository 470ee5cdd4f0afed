"""The HTTP side: one ASGI application, hot routes to the relay, everything else to FastAPI."""

from gateway.ingress.app import Ingress
from gateway.ingress.cold import cold_app

__all__ = ["Ingress", "cold_app"]
