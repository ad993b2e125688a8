"""Gives pytest the options of danling's conformance suite when a command names the suite; asleep in every other run.

It stands outside of the package `danling` because pytest rewrites the assertions of whatever a distribution with a plugin
installs: it would take the folder `danling/backends/torch` for torch itself, and rewrite that.
"""

from __future__ import annotations

from typing import Any

SUITE = "danling.backends.torch.conformance"


def pytest_load_initial_conftests(early_config: Any, args: list[str]) -> None:
    """Register the suite's own plugin, if the suite is among the arguments."""
    if any(str(arg) == SUITE or str(arg).startswith((f"{SUITE}.", f"{SUITE}::")) for arg in args):
        early_config.pluginmanager.import_plugin(f"{SUITE}.plugin")
