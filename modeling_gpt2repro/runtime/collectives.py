"""Calls that all processes make together, with errors that reach all of them."""

from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list

# A week: longer than any download, which the other processes wait for. Backends give up after ten minutes by default.
MAX_FIRST_TIME = timedelta(days=7)

Result = TypeVar("Result")


def run_on_main_and_broadcast(state: Accelerator | PartialState, work: Callable[[], Result]) -> Result:
    """Call `work` on the main process only; return its result, or raise its error, on every process.

    Raises:
        ValueError: If `work` raised a ValueError or an OSError.
    """
    result, message = None, None
    if state.is_main_process:
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

    With `each_machine`, first on one process of each: for what goes to a disk of its own. However long that takes, the
    others wait, on the CPU. If it fails there, they do not try it.

    Raises:
        OSError, ValueError: On all processes, if `work` raised one on any of them; ConnectionError stays what it is.
    """
    if not dist.is_initialized() or state.num_processes == 1:
        return work()
    is_first = state.is_local_main_process if each_machine else state.is_main_process
    result = None
    group = dist.new_group(backend="gloo", timeout=MAX_FIRST_TIME)
    for is_its_turn in (is_first, not is_first):
        error = None
        if is_its_turn:
            try:
                result = work()
            except (OSError, ValueError) as caught:
                error = caught
        kind = ConnectionError if isinstance(error, ConnectionError) else ValueError
        errors = [None] * state.num_processes
        dist.all_gather_object(errors, None if error is None else (kind, str(error)), group=group)
        if error is not None:
            raise error
        for kind, message in filter(None, errors):
            raise kind(message)
    dist.destroy_process_group(group)
    return result
