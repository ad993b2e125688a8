"""Hugging Face Accelerate behind danling's runner.

Importing this module does not import accelerate.
"""

from danling.backends.accelerate.usable import usable

__all__ = ["usable"]
