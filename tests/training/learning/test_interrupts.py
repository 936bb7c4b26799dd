import os
import signal
import threading

import pytest

from meam_training.learning.interrupts import collected_interrupts


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_interrupt_is_collected_and_a_second_one_stops(number):
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with collected_interrupts() as interrupts:
        assert interrupts == []
        os.kill(os.getpid(), number)
        assert interrupts == [number]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert interrupts == [number, signal.SIGINT]
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


def test_outside_the_main_thread_no_signal_is_touched():
    before, found = signal.getsignal(signal.SIGTERM), []

    def collect():
        with collected_interrupts() as interrupts:
            found.append((interrupts, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=collect)
    thread.start()
    thread.join()
    assert found == [([], before)]
