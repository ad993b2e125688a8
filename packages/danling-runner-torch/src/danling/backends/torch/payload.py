"""What the torch engine puts into a checkpoint: captured in host memory, written, read back without running code."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from danling.runners.errors import CheckpointError, ResumeError

MODEL = "model.pt"
EMA = "ema.pt"
OPTIMIZER = "optimizer.pt"
PREFIXES = ("module.", "_orig_mod.")
NESTED_UNDER = ("model", "module", "state_dict")
_ARRAY = "__ndarray__"
_SCALARS: tuple[Any, ...] = (bool, int, float, complex, str, bytes)


def rank_file(rank: int) -> str:
    """The file of what one rank alone knows.

    Examples:
        >>> rank_file(3)
        'ranks/rank-00003.pt'
    """
    return f"ranks/rank-{rank:05d}.pt"


# ------------------------------------------------------------------- capture


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


# --------------------------------------------------------------------- state


def unwrap(model: nn.Module) -> nn.Module:
    """Return the user's module inside DDP, `torch.compile` and `AveragedModel`."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, torch.optim.swa_utils.AveragedModel)):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def clean_name(name: str) -> str:
    """Take the names of wrappers out of a parameter's name.

    Examples:
        >>> clean_name("module._orig_mod.encoder._orig_mod.weight")
        'encoder.weight'
    """
    name = name.replace("_orig_mod.", "")
    return name.removeprefix("module.")


def model_state(model: nn.Module) -> dict[str, Any]:
    """The parameters and buffers of the unwrapped module, under the names the user gave them; not copied."""
    return {name.replace("_orig_mod.", ""): value for name, value in unwrap(model).state_dict().items()}


def load_model_state(
    model: nn.Module,
    state: Mapping[str, Any],
    *,
    strict: bool = True,
    skip: Iterable[str] = (),
    error: type[Exception] = ResumeError,
    source: Any = "the checkpoint",
) -> None:
    """Load weights into the unwrapped module; changes nothing when they do not fit.

    Args:
        model: wrapped or not.
        state: name → tensor; prefixes of wrappers are stripped when the module does not have them.
        strict: refuse missing and unexpected names; wrong shapes are always refused.
        skip: names to leave as they are.
        error: raised when something does not fit.
        source: named in the message.

    Raises:
        ResumeError: or `error`: lists missing and unexpected names and wrong shapes.
    """
    module = unwrap(model)
    own = module.state_dict()
    known = {name.replace("_orig_mod.", ""): name for name in own}
    skip = set(skip)
    found = {}
    for name, value in strip_prefixes(state, known).items():
        if name not in skip:
            found[known.get(name, name)] = value
    missing = [name for name, full in known.items() if full not in found and name not in skip]
    unexpected = [name for name in found if name not in own]
    shapes = [
        f"{name} {tuple(value.shape)} instead of {tuple(own[name].shape)}"
        for name, value in found.items()
        if name in own
        and isinstance(value, Tensor)
        and isinstance(own[name], Tensor)
        and value.shape != own[name].shape
    ]
    lines = []
    if strict and missing:
        lines.append(f"missing: {_some(missing)}")
    if strict and unexpected:
        lines.append(f"unexpected: {_some(unexpected)}")
    if shapes:
        lines.append(f"wrong shapes: {_some(shapes)}")
    if lines:
        raise error(f"the weights of {source} do not fit the model; " + "; ".join(lines))
    module.load_state_dict({name: value for name, value in found.items() if name in own}, strict=False)


def strip_prefixes(state: Mapping[str, Any], known: Iterable[str] = ()) -> dict[str, Any]:
    """Take `module.` and `_orig_mod.` out of the names, unless the names are `known` as they are.

    Examples:
        >>> strip_prefixes({"module.weight": 1})
        {'weight': 1}
    """
    known = set(known)
    if known and all(name in known for name in state):
        return dict(state)
    return {name if name in known else clean_name(name): value for name, value in state.items()}


def optimizer_state(optimizer: Any, names: Iterable[tuple[str, Tensor]]) -> dict[str, Any]:
    """The state of an optimizer, by parameter name instead of by position; not copied.

    Args:
        optimizer: a `torch.optim.Optimizer`.
        names: names and parameters, unwrapped.

    Raises:
        ValueError: the optimizer holds a parameter that has no name.
    """
    order = _positions(optimizer, names)
    state = optimizer.state_dict()
    return {
        "state": {order[index]: value for index, value in state["state"].items()},
        "param_groups": [
            {**group, "params": [order[index] for index in group["params"]]} for group in state["param_groups"]
        ],
    }


def load_optimizer_state(
    optimizer: Any, state: Mapping[str, Any], names: Iterable[tuple[str, Tensor]], *, skip: Iterable[str] = ()
) -> None:
    """Load what `optimizer_state` gave, whatever the order of the parameters is now.

    Args:
        optimizer: of the same class and with the same groups.
        state: saved state.
        names: names and parameters of this run.
        skip: parameters whose state starts afresh.

    Raises:
        ResumeError: the groups hold other parameters; names them.
    """
    order = _positions(optimizer, names)
    place = {name: index for index, name in order.items()}
    current = optimizer.state_dict()["param_groups"]
    saved = state["param_groups"]
    mine = [sorted(order[index] for index in group["params"]) for group in current]
    theirs = [sorted(group["params"]) for group in saved]
    if mine != theirs:
        ours, others = {n for group in mine for n in group}, {n for group in theirs for n in group}
        if ours != others:
            what = f"missing: {_some(sorted(ours - others))}; unexpected: {_some(sorted(others - ours))}"
        else:
            what = f"the parameters are split into {len(theirs)} groups there and into {len(mine)} here, or otherwise"
        raise ResumeError(
            f"the optimizer state of the checkpoint does not fit; {what}. Add 'optimizer' to "
            "checkpoint.exclude_from_loading to start it afresh"
        )
    skip = set(skip)
    groups = [{**theirs, "params": list(ours["params"])} for theirs, ours in zip(saved, current, strict=True)]
    values = {place[name]: value for name, value in state["state"].items() if name not in skip}
    optimizer.load_state_dict({"state": values, "param_groups": groups})


def _positions(optimizer: Any, names: Iterable[tuple[str, Tensor]]) -> dict[int, str]:
    by_id = {id(parameter): clean_name(name) for name, parameter in names}
    order: dict[int, str] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = by_id.get(id(parameter))
            if name is None:
                raise ValueError(
                    f"the optimizer holds a parameter of shape {tuple(parameter.shape)} that is not part of the model; "
                    "its state could not be found again on a resume"
                )
            order[len(order)] = name
    return order


def _some(names: list[str], limit: int = 8) -> str:
    shown = ", ".join(names[:limit]) or "nothing"
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


# ------------------------------------------------------------------- reading


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


def read_payload(directory: str | os.PathLike[str], rank: int = 0) -> dict[str, Any]:
    """Read the components in a checkpoint directory.

    Args:
        directory: of a verified checkpoint.
        rank: whose own file is read.

    Returns:
        `model`, `ema`, `optimizer`, `scheduler`, `grad_scaler`, `rng`, `dataloaders`, ...: those that are there.
    """
    directory = Path(directory)
    payload: dict[str, Any] = {}
    for name, key in ((MODEL, "model"), (EMA, "ema")):
        if (directory / name).exists():
            payload[key] = read_file(directory / name)
    for name in (OPTIMIZER, rank_file(rank)):
        if (directory / name).exists():
            payload |= read_file(directory / name)
    return payload


def read_weights(source: str | os.PathLike[str], *, ema: bool = True) -> dict[str, Tensor]:
    """Read weights from a checkpoint directory, a `.safetensors` file, or a `.pt`, `.pth` or `.bin` state dict.

    Args:
        source: the directory or file.
        ema: prefer the moving average where a checkpoint has one.

    Returns:
        Name → tensor, without the prefixes of wrappers.

    Raises:
        CheckpointError: there are no weights in it, or it cannot be read safely.
    """
    path = Path(source)
    if path.is_dir():
        for name in (EMA, MODEL) if ema else (MODEL,):
            if (path / name).exists():
                return strip_prefixes(read_file(path / name))
        raise CheckpointError(f"{path} holds no {MODEL}")
    if path.suffix == ".safetensors":
        from .export import read_safetensors

        return strip_prefixes(read_safetensors(path))
    if path.suffix not in (".pt", ".pth", ".bin"):
        raise CheckpointError(f"{path}: weights are read from .safetensors, .pt, .pth and .bin files")
    state = read_file(path)
    for key in NESTED_UNDER:
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, not a state dict of names and tensors")
    return strip_prefixes(state)


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
