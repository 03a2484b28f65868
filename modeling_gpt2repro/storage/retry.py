"""Patience with the Hub: what may succeed when it is tried again, for how long, and what to say of the rest."""

import time
from collections.abc import Callable, Iterator

from huggingface_hub.errors import HfHubHTTPError, HTTPError

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 1.0, 60.0
# Too early, a commit of somebody else in between, too many; and whatever is the server's own fault.
PASSING = {408, 409, 412, 425, 429, *range(500, 600)}


def with_patience(attempt: Callable[[], str], patience_seconds: float, say: Callable[[str], None]) -> str:
    """Call `attempt` until it succeeds, what it raises will not pass, or the time is over; then that is raised."""
    deadline = time.monotonic() + patience_seconds
    for pause in pauses():
        try:
            return attempt()
        except (HTTPError, OSError, RuntimeError) as error:
            if not is_passing(error) or time.monotonic() + pause > deadline:
                raise
            say(f"the Hub cannot be reached ({reason_of(error)}); it is tried again in {pause:.0f} s.")
            time.sleep(pause)


def pauses() -> Iterator[float]:
    """1, 2, 4, ... seconds, at most a minute, for ever."""
    pause = FIRST_PAUSE_SECONDS
    while True:
        yield pause
        pause = min(2 * pause, LONGEST_PAUSE_SECONDS)


def is_passing(error: BaseException) -> bool:
    """Whether the same request may succeed later: the connection's fault, or the server's, not this machine's."""
    if refused := refusal(error):
        return refused.response.status_code in PASSING
    below = causes(error)
    of_connection = any(isinstance(cause, (HTTPError, ConnectionError, TimeoutError)) for cause in below)
    return of_connection or not any(isinstance(cause, OSError) for cause in below)


def causes(error: BaseException) -> list[BaseException]:
    """The error and what lies below it: the client wraps what happens while a file is uploaded."""
    found = [error]
    while found[-1].__cause__ is not None:
        found.append(found[-1].__cause__)
    return found


def refusal(error: BaseException) -> HfHubHTTPError | None:
    """What the Hub answered; None where it did not."""
    return next((cause for cause in causes(error) if isinstance(cause, HfHubHTTPError)), None)


def in_words(error: BaseException, repository: str) -> str:
    """What a person has to change where the Hub refuses, or this machine."""
    refused = refusal(error)
    if refused is None:
        return f"the Hub was not asked, because of this machine ({reason_of(error)})."
    status = refused.response.status_code
    if status == 401:
        return "the Hub does not know this token: `hf auth login` takes another, or set HF_TOKEN."
    if status in (403, 404):
        return (
            f"this token may not write to {repository} ({reason_of(error)}): take one that may (role 'write'), or "
            "another --hub_model_id."
        )
    return f"the Hub refuses {repository} ({reason_of(error)})."


def reason_of(error: BaseException) -> str:
    """The Hub's words, or what lay at the bottom of it, in a line."""
    refused, lowest = refusal(error), causes(error)[-1]
    said = (refused and refused.server_message) or str(lowest)
    return next(iter(said.strip().splitlines()), type(lowest).__name__)
