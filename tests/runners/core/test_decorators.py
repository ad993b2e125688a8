"""Methods that run on one process only."""

from __future__ import annotations

import inspect

import pytest

from danling.runners import on_local_main_process, on_main_process


class Example:
    is_main_process = True
    is_local_main_process = True

    @on_main_process
    def report(self, text: str, *, times: int = 1) -> str:
        """Say it."""
        return text * times

    @on_local_main_process
    def download(self):
        return "done"


@pytest.mark.parametrize(("main", "local"), [(True, True), (False, True), (False, False)])
def test_a_method_runs_where_it_should(main, local):
    example = Example()
    example.is_main_process, example.is_local_main_process = main, local
    assert example.report("a", times=2) == ("aa" if main else None)
    assert example.download() == ("done" if local else None)


def test_the_method_keeps_its_name_and_signature():
    assert Example.report.__name__ == "report" and Example.report.__doc__ == "Say it."
    assert list(inspect.signature(Example.report).parameters) == ["self", "text", "times"]


def test_what_it_raises_is_raised():
    class Broken(Example):
        @on_main_process
        def report(self):
            raise KeyError("x")

    with pytest.raises(KeyError):
        Broken().report()
