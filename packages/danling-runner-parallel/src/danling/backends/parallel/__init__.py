"""danling.backends.parallel: see the package README."""

__all__: list[str] = []
