"""What danling's runner needs to know of DeepSpeed; the runner itself is not here yet.

Importing this module does not import deepspeed. `usable` is what `stack: auto` asks before it chooses DeepSpeed.
"""

from danling.backends.deepspeed.usable import usable

__all__ = ["usable"]
