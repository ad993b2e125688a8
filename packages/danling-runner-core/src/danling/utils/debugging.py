"""A block that opens the debugger where it fails."""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Iterator

from .decorators import Errors, matches


@contextlib.contextmanager
def debug(enable: bool = True, error: Errors = Exception, exclude: Errors | None = None) -> Iterator[None]:
    """Open the debugger at the place where the block fails, and continue after the block.

    Args:
        enable: with False every error propagates.
        error: type of error, or tuple of types, to stop at; others propagate.
        exclude: types among these that propagate.

    Examples:
        >>> with debug(enable=False):
        ...     print("as without")
        as without
    """
    try:
        yield
    except BaseException as caught:
        if not enable or not matches(caught, error, exclude):
            raise
        import pdb  # slow to import, rarely wanted

        traceback.print_exception(caught, file=sys.stderr)
        pdb.post_mortem(caught.__traceback__)
