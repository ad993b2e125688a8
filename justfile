# Everything a developer runs here. `uv run just` lists the verbs (rust-just is in the dev group).

export OMP_NUM_THREADS := "1"

_list:
    @just --list

# Install everything, development tools included
setup:
    uv sync --group peers

# The tests of the README; pass paths or pytest options to narrow them
test *args:
    uv run pytest {{args}}

# What the plain test run leaves out because it takes long
slow *args:
    uv run pytest -m "slow and not faults" {{args}}

# Style and formatting
lint:
    uv run ruff check .
    uv run ruff format --check .

# Static types: the pieces together, the umbrella by itself
type:
    uv run mypy $(ls -d packages/danling-*/src/danling)
    uv run mypy --config-file packages/danling/mypy.ini packages/danling/src/danling

# Examples in docstrings
doctest:
    uv run pytest -n 2 --doctest-modules --doctest-continue-on-failure packages/*/src

# Build the site strictly, into site/
docs:
    uv run mkdocs build --strict

# All benchmarks with their gates: tables on screen, JSON under build/bench
bench *args:
    uv run --group peers pytest -n 0 -m bench -s tests/benchmarks {{args}}

# Kill, crash and full-disk tests in their full number, replica groups, and the longest comparisons
faults *args:
    uv run --group peers pytest -n 2 -m faults {{args}}

# Build every wheel into dist/
build:
    uv build --all-packages --wheel -o dist
