"""``python -m danling.runners`` is the command ``danling``."""

import sys

from .cli import main

sys.exit(main())
