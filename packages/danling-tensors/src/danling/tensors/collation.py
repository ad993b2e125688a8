"""Batching samples: PNTensors become NestedTensors, everything else collates as torch does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from typing import Any

from torch.utils.data._utils.collate import collate as torch_collate
from torch.utils.data._utils.collate import default_collate_fn_map

from danling.tensors.nested_tensor import NestedTensor
from danling.tensors.pn_tensor import PNTensor

_SETTINGS = ("batch_first", "padding_value", "mask_value", "ragged_dims")


class _Nest:
    """Packs the PNTensors of a batch; what stands in torch's collate map."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def __call__(self, batch: Sequence[PNTensor], *, collate_fn_map: Any = None) -> NestedTensor:
        return NestedTensor([x.tensor if isinstance(x, PNTensor) else x for x in batch], **self.settings)


class Collator:
    """A `collate_fn` that packs PNTensors with chosen settings; it can be pickled, so it works in spawned workers.

    Mappings, sequences and named tuples are recursed into; what is not a PNTensor collates as with torch's
    `default_collate`.

    Args:
        batch_first: As for `NestedTensor`.
        padding_value: As for `NestedTensor`.
        mask_value: As for `NestedTensor`.
        ragged_dims: As for `NestedTensor`; declare it when samples vary in another dim than the first.
        fields: Settings for single fields, by key or position.

    Raises:
        TypeError: A field has a setting that does not exist.
        KeyError: When called, a field that the samples do not have.

    Example:
        >>> from danling.tensors import Collator, PNTensor
        >>> collate = Collator(fields={"labels": {"padding_value": -100}})
        >>> batch = collate([{"labels": PNTensor([1, 2])}, {"labels": PNTensor([3])}])
        >>> batch["labels"].tensor
        tensor([[   1,    2],
                [   3, -100]])
    """

    def __init__(
        self,
        *,
        batch_first: bool = True,
        padding_value: float = 0.0,
        mask_value: bool = False,
        ragged_dims: int | Iterable[int] | None = None,
        fields: Mapping[Any, Mapping[str, Any]] | None = None,
    ) -> None:
        self.settings = {
            "batch_first": batch_first,
            "padding_value": padding_value,
            "mask_value": mask_value,
            "ragged_dims": ragged_dims if ragged_dims is None or isinstance(ragged_dims, int) else tuple(ragged_dims),
        }
        # Settings of the wrong kind are refused here, not in a worker; ragged_dims need the rank of the samples.
        NestedTensor(batch_first=batch_first, padding_value=padding_value, mask_value=mask_value)
        if not isinstance(fields, (Mapping, type(None))):
            raise TypeError(f"fields must be a mapping of names or positions to settings, got {type(fields).__name__}")
        self.fields = {key: dict(value) for key, value in (fields or {}).items()}
        for key, value in self.fields.items():
            unknown = set(value) - set(_SETTINGS)
            if unknown:
                raise TypeError(
                    f"field {key!r} has the unknown settings {sorted(unknown)}; there are {', '.join(_SETTINGS)}"
                )

    def __call__(self, batch: Sequence[Any]) -> Any:
        """Collate a list of samples."""
        if not self.fields:
            return _collate(batch, self.settings)
        first = batch[0]
        if isinstance(first, Mapping):
            keys: list[Any] = list(first)
            names = {key: key for key in keys}
            rebuild: Callable[[list[Any]], Any] = lambda parts: dict(zip(keys, parts, strict=True))  # noqa: E731
        elif isinstance(first, (list, tuple)) and not isinstance(first, PNTensor):
            keys = list(range(len(first)))
            names = {key: key for key in keys}
            if hasattr(first, "_fields"):
                names.update({name: i for i, name in enumerate(first._fields)})
                rebuild = lambda parts: type(first)(*parts)  # noqa: E731
            else:
                rebuild = lambda parts: list(parts) if isinstance(first, list) else tuple(parts)  # noqa: E731
        else:
            raise KeyError(f"fields {list(self.fields)} need samples with fields, got {type(first).__name__}")
        missing = [field for field in self.fields if field not in names]
        if missing:
            raise KeyError(f"the samples have no field {missing[0]!r}; they have {list(names)}")
        special = {names[field]: settings for field, settings in self.fields.items()}
        parts = [_collate([sample[key] for sample in batch], {**self.settings, **special.get(key, {})}) for key in keys]
        return rebuild(parts)

    def __repr__(self) -> str:
        shown = ", ".join(f"{key}={value!r}" for key, value in self.settings.items())
        return f"Collator({shown}, fields={self.fields!r})"


def _collate(batch: Sequence[Any], settings: Mapping[str, Any]) -> Any:
    return torch_collate(batch, collate_fn_map={**default_collate_fn_map, PNTensor: _Nest(**settings)})


collate = Collator()
"""The `Collator` with default settings."""


def register_collate(mapping: MutableMapping[Any, Any] | None = None, **settings: Any) -> None:
    """Let a collate map (torch's own by default) pack PNTensors with these settings, in this process.

    Workers started by spawn do not see it; give them a `Collator`.

    Args:
        mapping: A map as `torch.utils.data.default_collate` uses; default: that of torch.
        **settings: As for `Collator`, without `fields`.
    """
    mapping = default_collate_fn_map if mapping is None else mapping
    mapping[PNTensor] = _Nest(**Collator(**settings).settings)


def unregister_collate(mapping: MutableMapping[Any, Any] | None = None) -> None:
    """Take PNTensor out of a collate map (torch's own by default); nothing happens when it is not there."""
    mapping = default_collate_fn_map if mapping is None else mapping
    mapping.pop(PNTensor, None)


def enter_default() -> None:
    """Enter PNTensor in torch's collate map unless somebody did before."""
    default_collate_fn_map.setdefault(PNTensor, _Nest())
