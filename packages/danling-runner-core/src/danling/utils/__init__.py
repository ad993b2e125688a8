"""danling.utils: small helpers that need neither torch nor numpy."""

from .device import to_device
from .files import load, load_pandas, save

__all__ = ["load", "load_pandas", "save", "to_device"]
