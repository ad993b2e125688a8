"""How names of components are compared, and what is offered for a name that nobody knows."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import SequenceMatcher


def normalize(name: str) -> str:
    """Return the form in which names are compared: without case, `_`, `-` and spaces.

    Examples:
        >>> normalize("Adam_W") == normalize("ADAMW") == normalize("adam-w")
        True
    """
    return name.lower().replace("_", "").replace("-", "").replace(" ", "")


def nearest(name: str, known: Iterable[str]) -> list[str]:
    """Return every known name, the ones most like `name` first; initials are as good as the words.

    Examples:
        >>> nearest("cosin", ["linear", "cosine", "constant"])[:2]
        ['cosine', 'constant']
        >>> nearest("learning_rate", ["eps", "amsgrad", "lr"])[0]
        'lr'
    """
    target = normalize(name)

    def likeness(other: str) -> float:
        if _initials(name) == normalize(other) or _initials(other) == target:
            return 1.0
        return SequenceMatcher(None, target, normalize(other)).ratio()

    return sorted(known, key=lambda other: (-likeness(other), other))


def _initials(name: str) -> str:
    words = name.lower().replace("-", "_").replace(" ", "_").split("_")
    return "".join(word[:1] for word in words) if len(words) > 1 else ""
