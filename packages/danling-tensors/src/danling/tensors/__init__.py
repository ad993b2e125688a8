"""danling.tensors: see the package README."""

__all__: list[str] = []
