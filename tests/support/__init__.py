"""Helpers shared by the tests: real processes, bare environments."""
