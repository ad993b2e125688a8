"""A mapping from split names to data sets, samplers or loaders, with attribute access."""

from __future__ import annotations

from typing import Any


class Splits(dict[str, Any]):
    """A `dict` whose items are attributes too.

    >>> datasets = Splits()
    >>> datasets.train, datasets["val"] = [1, 2], [3]
    >>> datasets["train"], datasets.val, list(datasets)
    ([1, 2], [3], ['train', 'val'])
    >>> datasets.test
    Traceback (most recent call last):
    ...
    AttributeError: no split 'test'; there are: train, val
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no split {name!r}; there are: {', '.join(self) or 'none'}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __delattr__(self, name: str) -> None:
        try:
            del self[name]
        except KeyError:
            raise AttributeError(f"no split {name!r}") from None
