"""Calls that all processes make together, with errors that reach all of them."""

from collections.abc import Callable
from typing import TypeVar

from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list

Result = TypeVar("Result")


def run_on_main_and_broadcast(accelerator: Accelerator, work: Callable[[], Result]) -> Result:
    """Call `work` on the main process only; return its result, or raise its error, on every process.

    Raises:
        ValueError: If `work` raised a ValueError or an OSError.
    """
    result, message = None, None
    if accelerator.is_main_process:
        try:
            result = work()
        except (OSError, ValueError) as error:
            message = str(error)
    result, message = broadcast_object_list([result, message])
    if message is not None:
        raise ValueError(message)
    return result


def call_main_process_first(
    state: Accelerator | PartialState, work: Callable[[], Result], each_machine: bool = False
) -> Result:
    """Call `work` on all processes, first on the main one, so that the others find what it downloaded or wrote.

    With `each_machine`, first on one process of each: for what goes to a disk of its own.

    An error is raised only after all processes have been through: one that left early would make the others wait
    forever.
    """
    error = None
    with state.local_main_process_first() if each_machine else state.main_process_first():
        try:
            result = work()
        except (OSError, ValueError) as caught:
            error = caught
    if error is not None:
        raise error
    return result
