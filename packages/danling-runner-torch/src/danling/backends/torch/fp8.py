"""Linear layers in 8-bit floating point, through torchao or TransformerEngine."""

from __future__ import annotations

import importlib.util
import logging

from torch import nn

_LIBRARIES = {
    "torchao": ("torchao", "pip install torchao"),
    "te": ("transformer_engine", "pip install transformer-engine[pytorch]"),
}
_MULTIPLE = 16  # fp8 matrix products need both sizes to be multiples of this


def choose_backend(wanted: str) -> str:
    """Return `torchao` or `te` for `any`, `torchao` or `te`; torchao is preferred.

    Raises:
        ImportError: the library is not installed; the message names the install.
    """
    names = list(_LIBRARIES) if wanted == "any" else [wanted]
    for name in names:
        if importlib.util.find_spec(_LIBRARIES[name][0]) is not None:
            return name
    ways = " or ".join(_LIBRARIES[name][1] for name in names)
    raise ImportError(f"fp8 needs {' or '.join(_LIBRARIES[name][0] for name in names)}: {ways}")


def fits(module: nn.Linear) -> bool:
    """Return whether both sizes of a linear layer suit fp8, and it is a plain one: not split over ranks, no subclass's forward.

    Example:
        >>> fits(nn.Linear(32, 64)), fits(nn.Linear(32, 10))
        (True, False)
    """
    if hasattr(module.weight, "placements") or type(module).forward is not nn.Linear.forward:
        return False
    return module.in_features % _MULTIPLE == 0 and module.out_features % _MULTIPLE == 0


def convert_to_fp8(model: nn.Module, wanted: str, logger: logging.Logger) -> nn.Module:
    """Convert the linear layers that fit, in place; the others stay and are listed once in the log.

    Args:
        model: the user's module, on its device.
        wanted: `any`, `torchao` or `te`.
        logger: where the layers left alone are listed.
    """
    backend = choose_backend(wanted)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    left = [name for name, module in linears.items() if not fits(module)]
    if left:
        names = ", ".join(left)
        logger.info("fp8: %s stay as they are: sizes are no multiples of %d, or layers are split", names, _MULTIPLE)
    if backend == "torchao":
        from torchao.float8 import convert_to_float8_training

        return convert_to_float8_training(model, module_filter_fn=lambda module, name: name not in left)
    import transformer_engine.pytorch as te

    for name, module in linears.items():
        if name in left:
            continue
        parent, _, child = name.rpartition(".")
        layer = te.Linear(
            module.in_features,
            module.out_features,
            bias=module.bias is not None,
            params_dtype=module.weight.dtype,
            device=module.weight.device,
        )
        layer.load_state_dict(module.state_dict(), strict=False)
        setattr(model.get_submodule(parent), child, layer)
    return model
