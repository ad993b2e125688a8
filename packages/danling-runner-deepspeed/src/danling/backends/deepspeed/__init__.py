"""danling.backends.deepspeed: see the package README."""

__all__: list[str] = []
