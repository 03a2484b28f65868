"""Patience with the Hub: what is asked again, and what is not."""

from dataclasses import dataclass

import pytest
from huggingface_hub.errors import HfHubHTTPError, HTTPError

from modeling_gpt2repro.storage.hub_files import retrying


class Failing:
    """Fails with the errors it is given, one after another, then returns 7."""

    def __init__(self, *errors):
        self.errors, self.calls = list(errors), 0

    def __call__(self):
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return 7


def http_error(status):
    @dataclass
    class Answer:
        status_code: int
        headers: dict
        request: None = None

    return HfHubHTTPError("the Hub says no", response=Answer(status, {}))


def test_a_busy_or_absent_hub_is_asked_again():
    work = Failing(http_error(503), HTTPError("connection lost"), http_error(429))
    assert (retrying(work, retries=3, wait_seconds=0), work.calls) == (7, 4)


def test_patience_with_the_hub_ends_in_a_sentence(one_sentence):
    work = Failing(*[HTTPError("connection lost")] * 9)
    with pytest.raises(ConnectionError, match=r"the Hub did not answer in 3 attempts \(HTTPError\)") as error:
        retrying(work, retries=2, wait_seconds=0)
    one_sentence(error)
    assert work.calls == 3


def test_a_refusal_and_an_error_of_our_own_are_not_repeated():
    for refusal in (http_error(401), http_error(404), ValueError("damaged")):
        work = Failing(refusal)
        with pytest.raises(type(refusal)):
            retrying(work, wait_seconds=0)
        assert work.calls == 1
