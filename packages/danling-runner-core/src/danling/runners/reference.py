"""The configuration reference of the documentation, written from the table itself.

`python -m danling.runners.reference docs/configuration.md` brings the tables of that page up to date.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from .aliases import RENAMED
from .keys import ABSENT, KEYS, Key


def cell(text: str) -> str:
    """Return text for a cell of a Markdown table."""
    return text.replace("|", "\\|")


def row(key: Key) -> str:
    """Return one key as a line of a Markdown table.

    Examples:
        >>> row(KEYS["accum_steps"])
        '| `accum_steps` | int | `1` | ● | micro-batches behind one optimizer update | a whole number >= 1 |'
    """
    default = "" if key.default is ABSENT else f"`{key.default!r}`"
    cells = [f"`{key.name}`", key.kind, default, "●" if key.identity else "", key.meaning, key.allowed]
    return f"| {' | '.join(cell(text) for text in cells)} |"


def key_tables() -> str:
    """Return every key, one Markdown table per section."""
    sections: dict[str, list[Key]] = {}
    for key in KEYS.values():
        sections.setdefault(key.name.rpartition(".")[0].split(".")[0], []).append(key)
    parts = []
    for section, keys in sections.items():
        parts += [
            f"### {f'`{section}`' if section else 'General'}",
            "",
            "| key | type | default | id | meaning | allowed |",
            "|---|---|---|---|---|---|",
            *map(row, keys),
            "",
        ]
    return "\n".join(parts)


def name_table() -> str:
    """Return the older names of keys as a Markdown table."""
    lines = [f"| `{old}` | `{new}` |" for old, new in RENAMED.items()]
    return "\n".join(["| older name | today |", "|---|---|", *lines, ""])


def refresh(page: str) -> str:
    """Return a page with the text between its `<!-- keys -->` and `<!-- names -->` markers written anew.

    Raises:
        ValueError: when the page lacks a marker.
    """
    for name, text in {"keys": key_tables(), "names": name_table()}.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        if begin not in page or end not in page:
            raise ValueError(f"the page has no part between {begin.strip()} and {end}")
        head, rest = page.split(begin, 1)
        page = f"{head}{begin}\n{text}\n{end}{rest.split(end, 1)[1]}"
    return page


def main(arguments: Sequence[str]) -> None:
    """Rewrite the tables of each page."""
    for argument in arguments:
        path = Path(argument)
        path.write_text(refresh(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
