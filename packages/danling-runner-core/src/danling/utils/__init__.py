"""danling.utils: small helpers that need neither torch nor numpy."""

from .debugging import debug
from .decorators import catch, ensure_dir, flexible_decorator
from .device import to_device
from .files import load, load_pandas, save
from .method_cache import method_cache
from .serialization import is_json_serializable

__all__ = [
    "catch",
    "debug",
    "ensure_dir",
    "flexible_decorator",
    "is_json_serializable",
    "load",
    "load_pandas",
    "method_cache",
    "save",
    "to_device",
]
