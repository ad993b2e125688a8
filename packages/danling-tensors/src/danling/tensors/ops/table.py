"""The op table: which rule serves which torch function."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple

import torch

PATHS = ("packed", "grouped", "per element", "padded", "refused")


class NestedTensorFallbackWarning(UserWarning):
    """Issued once per op and process when an op runs element by element, or through a padded copy."""


class NestedTensorFallbackError(RuntimeError):
    """Raised inside `strict()` where `NestedTensorFallbackWarning` would be issued."""


class Rule(NamedTuple):
    """How one op treats NestedTensors."""

    name: str
    family: str
    path: str
    call: Callable[..., Any]


RULES: dict[str, Rule] = {}
"""Rules by canonical op name."""

TABLE: dict[Any, Callable[..., Any]] = {}
"""Functions seen so far, bound to their rule; filled by `resolve` on first use."""

FOREIGN: dict[Any, frozenset[str]] = {}
"""Argument names of functions in `TABLE` that their rules know under another name; filled by `resolve`."""

PREFIXES: dict[str, Callable[..., Any]] = {}
"""Rules for whole families of torch's private functions, by the start of their name."""

ALIASES = {
    "absolute": "abs",
    "arccos": "acos",
    "arccosh": "acosh",
    "arcsin": "asin",
    "arcsinh": "asinh",
    "arctan": "atan",
    "arctan2": "atan2",
    "arctanh": "atanh",
    "clip": "clamp",
    "concat": "cat",
    "concatenate": "cat",
    "divide": "div",
    "true_divide": "div",
    "fix": "trunc",
    "greater": "gt",
    "greater_equal": "ge",
    "less": "lt",
    "less_equal": "le",
    "not_equal": "ne",
    "moveaxis": "movedim",
    "multiply": "mul",
    "negative": "neg",
    "row_stack": "vstack",
    "subtract": "sub",
    "swapdims": "transpose",
    "swapaxes": "transpose",
    "ger": "outer",
    "rdiv": "div",
    "rpow": "pow",
    "rfloordiv": "floor_divide",
    "floordiv": "floor_divide",
    "rmod": "remainder",
    "mod": "remainder",
    "truediv": "div",
    "rtruediv": "div",
    "radd": "add",
    "rmul": "mul",
    "rmatmul": "matmul",
    "and": "bitwise_and",
    "rand": "bitwise_and",
    "or": "bitwise_or",
    "ror": "bitwise_or",
    "xor": "bitwise_xor",
    "rxor": "bitwise_xor",
    "invert": "bitwise_not",
    "lshift": "bitwise_left_shift",
    "rlshift": "bitwise_left_shift",
    "rshift": "bitwise_right_shift",
    "rrshift": "bitwise_right_shift",
    "special_expit": "sigmoid",
    "special_psi": "digamma",
    "special_gammaln": "lgamma",
    "special_gammainc": "igamma",
    "special_gammaincc": "igammac",
    "special_multigammaln": "mvlgamma",
    "linalg_matmul": "matmul",
    "_softmax": "softmax",
    "_log_softmax": "log_softmax",
    "adjoint": "mH",
    "log_sigmoid": "logsigmoid",
    "_threshold": "threshold",
    "_unsafe_view": "view",
    "_reshape_alias": "view",
    "matrix_norm": "linalg_matrix_norm",
    "vector_norm": "linalg_vector_norm",
}
"""Names that mean the same op under another name. Dunder names are looked up without their underscores."""

_strict: ContextVar[bool] = ContextVar("danling_strict", default=False)
_warned: set[str] = set()


@contextmanager
def strict() -> Iterator[None]:
    """Turn every op that would run element by element, or padded, into a `NestedTensorFallbackError`.

    A context manager and a decorator; context-local and nestable.

    Example:
        >>> import torch
        >>> from danling.tensors import NestedTensor, strict
        >>> with strict():
        ...     y = NestedTensor([1.0, 2.0], [3.0]).exp()  # packed: runs
    """
    token = _strict.set(True)
    try:
        yield
    finally:
        _strict.reset(token)


def fallback(name: str, path: str) -> None:
    """Note that op `name` leaves the packed path: warn once, or raise under `strict()`."""
    if _strict.get():
        raise NestedTensorFallbackError(
            f"{name} runs {path} on a NestedTensor, which strict() forbids; use .concat, .tensor or another op"
        )
    if name not in _warned:
        _warned.add(name)
        warnings.warn(
            f"{name} runs {path} on a NestedTensor (said once; danling.tensors.strict() turns it into an error)",
            NestedTensorFallbackWarning,
            stacklevel=4,
        )


def register(family: str, *names: str, path: str = "packed") -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Enter a rule under canonical op names; names the installed torch lacks are left out.

    The rule is called as `rule(func, *args, **kwargs)` with the torch function that was called and its arguments.
    """
    if path not in PATHS:
        raise ValueError(f"path must be one of {PATHS}, got {path!r}")

    def enter(call: Callable[..., Any]) -> Callable[..., Any]:
        for name in names:
            if name in RULES:
                raise ValueError(f"{name} already has a rule in family {RULES[name].family!r}")
            if find(name) is not None:
                RULES[name] = Rule(name, family, path, call)
        return call

    return enter


_NAMESPACES: tuple[tuple[str, Any], ...] = (
    ("special_", torch.special),
    ("linalg_", torch.linalg),
    ("fft_", torch.fft),
)


def find(name: str) -> Callable[..., Any] | None:
    """The public torch function with a canonical name (`F.name` is in `torch.nn.functional`), or `None`."""
    if name.startswith("F."):
        return getattr(torch.nn.functional, name[2:], None)
    for prefix, module in _NAMESPACES:
        if name.startswith(prefix):
            found = getattr(module, name[len(prefix) :], None)
            if found is not None:
                return found
    for module in (torch, torch.nn.functional, torch.special, torch.Tensor, torch._C._nn):
        found = getattr(module, name, None)
        if found is not None:
            return found
    return None


def supported_ops() -> list[tuple[str, str, str]]:
    """Rows `(name, family, path)` of the op table, sorted; an op that is not listed runs per element.

    Example:
        >>> from danling.tensors import supported_ops
        >>> ("relu", "activation", "packed") in supported_ops()
        True
    """
    return sorted((rule.name, rule.family, rule.path) for rule in RULES.values())


def candidates(func: Any) -> list[str]:
    """Canonical names under which the rule of a torch function may be found, best first."""
    if isinstance(func, torch._ops.OpOverload):
        raw = func._schema.name.split("::")[1]
    elif isinstance(func, torch._ops.OpOverloadPacket):
        raw = func.__name__
    else:
        raw = getattr(func, "__name__", "")
        if raw in ("__get__", "__set__", "__delete__"):
            name = func.__self__.__name__
            return [f"{raw.strip('_')}:{name}"] + ([name] if raw == "__get__" else [])
    if raw.startswith("__") and raw.endswith("__"):
        name = raw[2:-2]
        if name not in ALIASES and name[:1] == "i" and (name[1:] in ALIASES or name[1:] in RULES):
            name = name[1:]
        bare = [raw, name]
    else:
        bare = [raw]
        if raw.endswith("_"):
            bare.append(raw[:-1])
        for suffix in ("_copy", "_scatter_copy"):
            if raw.endswith(suffix):
                bare.append(raw[: -len(suffix)])
        for prefix in ("unsafe_", "_unsafe_", "special_"):
            if raw.startswith(prefix):
                bare.append(raw[len(prefix) :])
    names = []
    if getattr(func, "__module__", None) == "torch.nn.functional":
        names += [f"F.{name}" for name in bare]
    for name in bare:
        names.append(name)
        if name in ALIASES:
            names.append(ALIASES[name])
    return names


def resolve(func: Any) -> Callable[..., Any]:
    """Bind a torch function to its rule and remember it."""
    from danling.tensors.ops.fallback import member, per_element
    from danling.tensors.ops.signatures import foreign

    bound: Callable[..., Any] | None = None
    for name in candidates(func):
        rule = RULES.get(name)
        if rule is not None:
            bound = _guarded(rule, func) if rule.path in ("per element", "padded") else partial(rule.call, func)
            unknown = foreign(func, rule.call)
            if unknown:
                FOREIGN[func] = unknown
            break
    if bound is None:
        name = getattr(func, "__name__", "")
        bound = next((partial(rule, func) for prefix, rule in PREFIXES.items() if name.startswith(prefix)), None)
    if bound is None:
        bound = member(func) or partial(per_element, func)
    TABLE[func] = bound
    return bound


def _guarded(rule: Rule, func: Any) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        fallback(rule.name, rule.path)
        return rule.call(func, *args, **kwargs)

    return call


def call_with_out(func: Any, rule: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Serve `out=`, which pointwise ops take."""
    if not any(RULES[name].family in POINTWISE for name in candidates(func) if name in RULES):
        raise NotImplementedError(
            f"{getattr(func, '__name__', func)} does not take out= on a NestedTensor; assign the result"
        )
    return rule(*args, **kwargs)


POINTWISE = ("unary", "activation", "binary", "comparison", "ternary")
"""Families whose ops work value by value and take `out=`."""
