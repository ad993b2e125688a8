"""Nested state as `torch.save` files: copied into reused host memory, written, and read back without running code."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from torch import Tensor

from danling.runners.errors import CheckpointError

_ARRAY = "__ndarray__"
_SCALARS: tuple[Any, ...] = (bool, int, float, complex, str, bytes)


class HostBuffers:
    """Copies state into host memory that is allocated once and used again by the next save.

    Args:
        pinned: page-locked memory, into which devices copy faster and beside the host.

    Examples:
        >>> weight = torch.zeros(2)
        >>> buffers = HostBuffers()
        >>> copy = buffers.copy({"model": {"weight": weight, "steps": 3}})
        >>> _ = weight.fill_(1.0)
        >>> copy
        {'model': {'weight': tensor([0., 0.]), 'steps': 3}}
    """

    def __init__(self, *, pinned: bool = False) -> None:
        self.pinned = pinned and torch.accelerator.is_available()
        self._buffers: dict[str, Tensor] = {}

    @torch.no_grad()
    def copy(self, tree: Any) -> Any:
        """Return the tree with every tensor copied; the copies are good until the next call.

        Tensors that share memory and shape share their copy. Containers become dict, list, tuple and set.

        Args:
            tree: nested containers of tensors, arrays, numbers, text and None.

        Raises:
            TypeError: something in it could not be read back without running code; names where it is.
        """
        pairs: list[tuple[Tensor, Tensor]] = []
        used: dict[str, Tensor] = {}
        seen: dict[Any, Tensor] = {}

        def tensor(source: Tensor, path: str) -> Tensor:
            source = source.detach()
            if type(source) is not Tensor or source.layout is not torch.strided or source.is_quantized:
                return source.to("cpu", copy=True)
            key = (source.data_ptr(), source.device, source.shape, source.stride(), source.dtype)
            if source.numel() and key in seen:
                return seen[key]
            target = self._buffers.get(path)
            if (
                target is None
                or target.shape != source.shape
                or target.dtype != source.dtype
                or target.numel() > 1
                and target.stride() != _dense(source)
            ):
                target = torch.empty_like(source, device="cpu", pin_memory=self.pinned)
            pairs.append((target, source))
            used[path] = seen[key] = target
            return target

        result = map_state(tree, tensor)
        devices: dict[torch.device, list[tuple[Tensor, Tensor]]] = {}
        for pair in pairs:
            devices.setdefault(pair[1].device, []).append(pair)
        for device, group in devices.items():
            asynchronous = device.type != "cpu" and self.pinned
            torch._foreach_copy_([t for t, _ in group], [s for _, s in group], non_blocking=asynchronous)
            if asynchronous:
                torch.accelerator.synchronize(device)
        self._buffers = used
        return result


def _dense(tensor: Tensor) -> tuple[int, ...]:
    return torch.empty_like(tensor, device="meta").stride()


def map_state(tree: Any, tensor: Any, path: str = "") -> Any:
    """Return a copy of nested state with `tensor(value, path)` in place of each tensor.

    Raises:
        TypeError: there is something that a file read without running code cannot hold; names its path.
    """
    if isinstance(tree, Tensor):
        return tensor(tree, path)
    if tree is None or isinstance(tree, (torch.dtype, torch.device)):
        return tree
    if type(tree) in _SCALARS:
        return tree
    for kind in _SCALARS:
        if isinstance(tree, kind):
            return kind(tree)
    if isinstance(tree, Mapping):
        copy = {map_state(key, tensor, path): map_state(value, tensor, f"{path}/{key}") for key, value in tree.items()}
        return Counter(copy) if isinstance(tree, Counter) else copy
    if isinstance(tree, (list, tuple)):
        items = [map_state(value, tensor, f"{path}/{index}") for index, value in enumerate(tree)]
        return items if isinstance(tree, list) else torch.Size(items) if isinstance(tree, torch.Size) else tuple(items)
    if isinstance(tree, (set, frozenset)):
        return {map_state(value, tensor, path) for value in tree}
    if isinstance(tree, np.generic):
        return map_state(tree.item(), tensor, path)
    if isinstance(tree, np.ndarray) and tree.dtype.kind in "biufc":
        return {_ARRAY: tensor(torch.from_numpy(np.array(tree, order="C")), path)}
    raise TypeError(
        f"{path or '/'} is a {type(tree).__module__}.{type(tree).__qualname__}: a checkpoint holds tensors, arrays, "
        "numbers, text and containers of them, because reading one must run no code. Make state_dict() return those."
    )


def restore_arrays(tree: Any) -> Any:
    """Turn what `map_state` made of NumPy arrays back into arrays.

    Examples:
        >>> restore_arrays(map_state({"state": [np.arange(3)]}, lambda tensor, path: tensor))
        {'state': [array([0, 1, 2])]}
    """
    if isinstance(tree, dict):
        if tree.keys() == {_ARRAY}:
            return tree[_ARRAY].numpy()
        if any(isinstance(value, (dict, list, tuple)) for value in tree.values()):
            return {key: restore_arrays(value) for key, value in tree.items()}
        return tree
    if isinstance(tree, (list, tuple)) and any(isinstance(value, (dict, list, tuple)) for value in tree):
        return type(tree)(restore_arrays(value) for value in tree)
    return tree


class TorchSnapshot:
    """Files of this rank with the state of one instant; what a `CheckpointStore` writes.

    Args:
        files: relative path → state.
        buffers: where `capture` copies to; None writes live state, which is right only for a synchronous save.
    """

    def __init__(self, files: Mapping[str, Any], buffers: HostBuffers | None = None) -> None:
        self.files = dict(files)
        self.buffers = buffers

    def capture(self) -> None:
        """Copy the state; from here on live tensors may change."""
        if self.buffers is None:
            self.files = map_state(self.files, lambda tensor, path: tensor.detach())
        else:
            self.files = self.buffers.copy(self.files)
            self.buffers = None

    def write(self, directory: Path) -> list[str]:
        """Write the files below a directory; return their paths relative to it."""
        for name, state in self.files.items():
            path = directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, state)
        return list(self.files)


def write_file(path: str | os.PathLike[str], state: Any) -> None:
    """Write state as a `torch.save` file.

    Raises:
        OSError: it cannot be written (a full disk, a quota, no permission).
    """
    with open(path, "wb", buffering=0) as file:  # a Python file: errors keep their errno, other threads run meanwhile
        writer = _Writer(file)
        try:
            torch.save(state, writer)  # type: ignore[arg-type]
        except Exception:
            if writer.error is not None:
                raise writer.error from None
            raise


class _Writer:
    """Remembers the error of a write, which torch reports as a failed enforcement without its cause."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data)
        try:
            done = 0
            while done < len(view):
                done += self.file.write(view[done:])
        except OSError as error:
            self.error = error
            raise
        return done

    def flush(self) -> None:
        self.file.flush()


def read_file(path: str | os.PathLike[str]) -> Any:
    """Read a `torch.save` file into host memory, without running any code that it may hold.

    Raises:
        CheckpointError: it is damaged, or holds objects that only running code would bring back.
        FileNotFoundError: there is none.
    """
    try:
        return restore_arrays(torch.load(path, map_location="cpu", weights_only=True))
    except FileNotFoundError:
        raise
    except UnpicklingError as error:
        found = _refused(str(error))
        raise CheckpointError(
            f"{path} holds {found}. danling runs no code from a file, so it reads tensors, numbers, text and "
            "containers of them alone; save a state_dict() instead"
        ) from None
    except Exception as error:
        raise CheckpointError(f"{path} is damaged or not a file of torch.save: {_first_line(error)}") from None


def _refused(message: str) -> str:
    for line in message.splitlines():
        if "GLOBAL" in line or "nsupported" in line:
            for word in line.replace("`", " ").replace("'", " ").split():
                if "." in word and not word.endswith(".") and "torch.serialization" not in word:
                    return f"an object of {word}"
    return "something other than plain data"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
