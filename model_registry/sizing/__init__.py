"""From a model's configuration to bytes, KV blocks and the slices that hold it."""

from model_registry.sizing.defaults import default_limits
from model_registry.sizing.fit import engine_arguments, fit
from model_registry.sizing.footprint import weigh
from model_registry.sizing.reader import read_architecture
from model_registry.sizing.report import SizeReport, size

__all__ = ["SizeReport", "default_limits", "engine_arguments", "fit", "read_architecture", "size", "weigh"]
