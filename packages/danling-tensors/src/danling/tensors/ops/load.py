"""Import every rule file beside this one, which enters its rules in the table."""

from importlib import import_module
from pkgutil import iter_modules

from danling.tensors import ops

for _module in iter_modules(ops.__path__):
    import_module(f"danling.tensors.ops.{_module.name}")
