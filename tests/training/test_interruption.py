import os
import signal
import threading

import pytest

from momconv.training.interruption import Interrupted, catching_signals

SIGNALS = [signal.SIGINT, signal.SIGTERM]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_held_back_until_it_is_asked_for(number: signal.Signals) -> None:
    told: list[str] = []
    with catching_signals(told.append) as check:
        check()
        os.kill(os.getpid(), number)
        assert told == ["note: stopping after this micro-batch; once more to quit at once"]
        with pytest.raises(Interrupted, match=number.name) as interrupted:
            check()
    assert interrupted.value.signal == number


def test_it_is_a_keyboard_interrupt_for_whoever_does_not_know_it() -> None:
    assert issubclass(Interrupted, KeyboardInterrupt)


@pytest.mark.parametrize("second", SIGNALS)
def test_a_second_signal_quits_at_once(second: signal.Signals) -> None:
    with catching_signals(lambda _: None):
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(SystemExit) as left:
            os.kill(os.getpid(), second)
    assert left.value.code == 128 + second


def test_afterwards_signals_do_what_they_did_before() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with catching_signals(lambda _: None):
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_another_thread_than_the_main_one_catches_nothing() -> None:
    ended = []

    def work() -> None:
        with catching_signals(lambda _: None) as check:
            check()
        ended.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert ended
