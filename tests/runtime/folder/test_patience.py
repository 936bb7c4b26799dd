import threading
import time

import pytest
from huggingface_hub.utils import get_session

from meam_policy.folder.patience import SILENCE_S, HubTimeout, within


def test_what_a_call_returns_or_raises_is_passed_on():
    assert within(5, lambda: None) is None
    with pytest.raises(ZeroDivisionError):
        within(5, lambda: 1 / 0)


def test_a_call_that_takes_too_long_is_given_up_and_goes_on_no_longer_once_it_wakes_up():
    gone_on, ended = [], threading.Event()

    def call():
        try:
            for _ in range(100):
                time.sleep(0.01)
                gone_on.append(time.monotonic())
        finally:
            ended.set()

    start = time.monotonic()
    with pytest.raises(HubTimeout, match="no answer within 0.1 s"):
        within(0.1, call)
    assert ended.wait(5)
    assert len(gone_on) < 100
    assert time.monotonic() - start < 5


def test_requests_without_a_timeout_have_one_meanwhile_and_the_shared_client_is_left_as_it_was():
    before = get_session().timeout
    inner = within(5, lambda: (get_session().timeout, within(5, lambda: get_session().timeout)))
    assert {str(timeout) for timeout in inner} == {str(type(inner[0])(SILENCE_S))}
    assert str(get_session().timeout) == str(before)
