"""Stop signals."""
import os
import signal

import pytest

from training.preemption import AnyRank, StopSignal


def test_the_second_signal_stops_at_once(monkeypatch):
    codes = []
    monkeypatch.setattr(os, '_exit', codes.append)
    with StopSignal() as stop:
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGTERM)  # a launcher's copy of the same request
        assert stop.received and not codes
        stop.since -= 2
        signal.raise_signal(signal.SIGTERM)
    assert codes == [128 + signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize('number', StopSignal.SIGNALS)
def test_each_signal_asks_for_a_stop(number):
    before = signal.signal(number, signal.SIG_DFL)  # nohup may have started the tests
    try:
        with StopSignal() as stop:
            assert not stop.received
            signal.raise_signal(number)
            assert stop.received
    finally:
        signal.signal(number, before)


def test_a_hangup_that_is_ignored_stays_ignored():
    """As nohup starts a program."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.received
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_alone_the_answer_is_the_own_wish():
    any_rank = AnyRank()
    assert any_rank(True, False) == [True, False] and any_rank(False, False) == [False, False]
