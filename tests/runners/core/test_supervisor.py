"""Signals, requests and garbage collection, with real signals in real processes."""

from __future__ import annotations

import gc
import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading

import pytest

from danling.runners.supervisor import Stop, Supervisor


@pytest.fixture
def supervisor():
    supervisor = Supervisor(logger=logging.getLogger("test.supervisor"))
    yield supervisor
    supervisor.close()


def run_script(body, *signals):
    """Run a script that prints `ready`, then send it signals, each after the line that answers the one before.

    Returns its status, what it printed after `ready`, and its standard error.
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(body)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    out = ""
    with process:
        assert process.stdout.readline() == "ready\n"
        for number in signals:
            process.send_signal(number)
            out += process.stdout.readline()
        out += process.stdout.read()
        return process.wait(), out, process.stderr.read()


LOOP = """
    import sys, time
    from danling.runners.supervisor import Supervisor
    supervisor = Supervisor()
    supervisor.install_signal_handlers()
    print("ready", flush=True)
    flagged = False
    for _ in range(2000):
        time.sleep(0.01)
        if supervisor.pending and not flagged:
            flagged = True
            print("flag", supervisor.stop.name, supervisor.stop_reason, supervisor.save_requested, flush=True)
            if {once}:
                break
    supervisor.close()
    error = supervisor.exit_error()
    if error is not None:
        raise error
"""


@pytest.mark.parametrize(
    ("number", "line", "status"),
    [
        (signal.SIGTERM, "flag SIGTERM SIGTERM False", 143),
        (signal.SIGINT, "flag SIGINT SIGINT False", -signal.SIGINT),
        (signal.SIGUSR1, "flag NONE None True", 0),
    ],
)
def test_a_signal_only_sets_a_flag(number, line, status):
    code, out, _ = run_script(LOOP.format(once=True), number)
    assert out.strip() == line
    assert code == status


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_the_process_at_once(first):
    code, _, _ = run_script(LOOP.format(once=False), first, signal.SIGTERM)
    assert code == 143
    code, _, err = run_script(LOOP.format(once=False), first, signal.SIGINT)
    assert code == -signal.SIGINT and "KeyboardInterrupt" in err


def test_a_stop_after_a_save_request_is_not_a_second_signal():
    body = """
        import time
        from danling.runners.supervisor import Supervisor
        supervisor = Supervisor()
        supervisor.install_signal_handlers()
        print("ready", flush=True)
        while not supervisor.save_requested:
            time.sleep(0.01)
        print("save", flush=True)
        while not supervisor.stop_requested:
            time.sleep(0.01)
        print("stop", flush=True)
        raise supervisor.exit_error()
    """
    code, out, _ = run_script(body, signal.SIGUSR1, signal.SIGTERM)
    assert (code, out.split()) == (143, ["save", "stop"])


def test_a_forked_child_keeps_what_it_would_have_done():
    body = """
        import os, signal, sys, time
        from danling.runners.supervisor import Supervisor
        supervisor = Supervisor()
        supervisor.install_signal_handlers()
        alive, tell = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(tell, b"1")
            time.sleep(30)
            os._exit(0)
        os.read(alive, 1)
        os.kill(child, signal.SIGTERM)
        _, status = os.waitpid(child, 0)
        print("ready", flush=True)
        print(os.WTERMSIG(status), supervisor.pending, flush=True)
    """
    _, out, _ = run_script(body)
    assert out.split() == [str(int(signal.SIGTERM)), "False"]


def test_handlers_are_given_back(supervisor):
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    assert supervisor.install_signal_handlers()
    assert supervisor.install_signal_handlers()  # again is harmless
    assert [signal.getsignal(number) for number in numbers] != before
    supervisor.restore_signal_handlers()
    assert [signal.getsignal(number) for number in numbers] == before


def test_a_handler_that_somebody_else_installed_since_stays(supervisor):
    before = signal.getsignal(signal.SIGUSR1)
    try:
        supervisor.install_signal_handlers()
        theirs = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        assert theirs is not None
        supervisor.restore_signal_handlers()
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_outside_the_main_thread_signals_are_left_alone(supervisor, caplog):
    before = signal.getsignal(signal.SIGTERM)
    found = []
    thread = threading.Thread(target=lambda: found.append(supervisor.install_signal_handlers()))
    thread.start()
    thread.join()
    assert found == [False] and signal.getsignal(signal.SIGTERM) == before
    assert "outside the main thread" in caplog.text


def test_the_strongest_reason_wins(supervisor):
    supervisor.request_stop("enough")
    assert supervisor.pending and supervisor.stop is Stop.REQUEST and supervisor.stop_reason == "enough"
    assert supervisor.exit_error() is None
    supervisor.agree(Stop.SIGTERM, False)
    assert supervisor.stop is Stop.SIGTERM and supervisor.stop_reason == "SIGTERM"
    supervisor.agree(Stop.SIGINT, False)
    assert supervisor.stop is Stop.SIGTERM
    error = supervisor.exit_error()
    assert isinstance(error, SystemExit) and error.code == 143
    supervisor.clear_stop()
    assert not supervisor.pending


def test_a_request_of_another_rank_has_a_reason(supervisor):
    supervisor.agree(1, True)
    assert supervisor.stop_reason == "requested by another rank" and supervisor.save_requested
    supervisor.save_done()
    assert supervisor.pending and not supervisor.save_requested


def test_a_signal_that_arrives_while_a_save_is_noted_is_not_lost(supervisor):
    supervisor.install_signal_handlers()
    supervisor.request_save()
    os.kill(os.getpid(), signal.SIGTERM)
    supervisor.save_done()
    assert supervisor.pending and supervisor.stop is Stop.SIGTERM


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_collection_is_taken_over_and_handed_back(supervisor, enabled):
    before = gc.isenabled()
    try:
        gc.enable() if enabled else gc.disable()
        supervisor.take_over_gc(interval=3, generation=1)
        assert not gc.isenabled() and supervisor.manages_gc
        collected = []
        gc.callbacks.append(lambda phase, info: phase == "start" and collected.append(info["generation"]))
        for step in range(1, 10):
            supervisor.collect(step)
        gc.callbacks.pop()
        assert collected == [1, 1, 1]
        supervisor.hand_back_gc()
        assert gc.isenabled() is enabled
    finally:
        gc.enable() if before else gc.disable()


def test_automatic_collection_may_stay_on(supervisor):
    assert gc.isenabled()
    supervisor.take_over_gc(interval=1, disable_automatic=False)
    assert gc.isenabled()
    supervisor.close()
    assert gc.isenabled() and not supervisor.manages_gc


@pytest.mark.parametrize(("interval", "generation"), [(0, 1), (1, 3)])
def test_a_wrong_pace_is_refused(supervisor, interval, generation):
    with pytest.raises(ValueError, match=r"gc\.interval must be >= 1"):
        supervisor.take_over_gc(interval, generation)
