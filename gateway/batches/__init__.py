"""Batches: files of requests, answered in idle capacity into files of answers."""

from gateway.batches.schema import BatchesConfig

__all__ = ["BatchesConfig"]
