"""Runs a script as `python script.py ...` would, but leaves without taking the interpreter apart.

    python -m danling.backends.torch.conformance.launch script.py [argument ...]

torch aborts now and then ("terminate called without an active exception") when one of its gloo or autograd threads asks for
the interpreter lock, to let go of a tensor of a Python type, while the interpreter is being finalised. That says nothing about
the script, which is over by then: threads are joined and exit functions run here as in any exit, then the process ends at once.
"""

import atexit
import os
import runpy
import sys
import threading
import traceback
from pathlib import Path


def exit_code(error: SystemExit) -> int:
    """Return the status that the interpreter would give for `error`, printing its text as it would."""
    if error.code is None or isinstance(error.code, int):
        return error.code or 0
    print(error.code, file=sys.stderr)
    return 1


if __name__ == "__main__":
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    code = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as error:
        code = exit_code(error)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
