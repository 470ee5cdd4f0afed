"""Request bodies that are too long for the event loop: held outside the process's own memory, read and rewritten by a process of their own."""

from gateway.large_bodies.held import LARGE_BYTES, LargeBodies, LargeBody, Pieces

__all__ = ["LARGE_BYTES", "LargeBodies", "LargeBody", "Pieces"]
