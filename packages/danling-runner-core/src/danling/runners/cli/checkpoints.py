"""The checkpoints of a run as the command shows them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..atomic import read_json
from .run_files import RunFiles


def list_checkpoints(files: RunFiles) -> list[dict[str, Any]]:
    """Committed checkpoints, oldest first, with size in bytes and the aliases that name them."""
    checkpoint = files.config.get("checkpoint")
    name = checkpoint.get("dir_name", "checkpoints") if isinstance(checkpoint, dict) else "checkpoints"
    root = files.dir / name
    aliases: dict[str, list[str]] = {}
    for pointer in sorted(root.glob("*.pointer")):
        aliases.setdefault(_text(pointer), []).append(pointer.stem)
    found = []
    for manifest in sorted(root.glob("*/manifest.json")):
        directory = manifest.parent
        if directory.is_symlink() or directory.name.startswith("."):
            continue
        try:
            content = read_json(manifest)
            size = sum(entry["size"] for entry in content["files"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            files.unreadable[str(manifest.relative_to(files.dir))] = " ".join(str(error).split())
            continue
        facts = {key: content.get(key) for key in ("kind", "global_step", "micro_step", "epoch", "score")}
        found.append({"name": directory.name, **facts, "size": size, "aliases": aliases.get(directory.name, [])})
    return sorted(found, key=lambda c: (c["global_step"] or 0, c["micro_step"] or 0, c["name"]))


def _text(pointer: Path) -> str:
    try:
        return Path(pointer.read_text(encoding="utf-8").strip()).name
    except (OSError, ValueError):
        return ""
