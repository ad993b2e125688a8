"""danling.utils: small helpers that need neither torch nor numpy."""

__all__: list[str] = []
