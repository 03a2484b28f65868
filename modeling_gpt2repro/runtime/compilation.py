"""Whether torch.compile works on this machine, found out before the run depends on it; and its cache."""

import re

import torch
import torch._functorch.config
from accelerate import Accelerator
from accelerate.utils import DynamoBackend, TorchDynamoPlugin, gather_object


def give_up_failing_compilation(accelerator: Accelerator):
    """Compile nothing, on all processes, if torch.compile fails on one; the reason is printed.

    Without a C++ compiler, or headers that it needs, the run would otherwise end in the middle of its first step.
    """
    backend = accelerator.state.dynamo_plugin.backend
    if backend == DynamoBackend.NO:
        return
    cache_graphs_with_own_gradients()
    problems = gather_object([compilation_problem(accelerator.device, backend.value.lower())])
    if reasons := [problem for problem in problems if problem]:
        accelerator.state.dynamo_plugin = TorchDynamoPlugin(backend=DynamoBackend.NO.value)
        accelerator.print(
            f"Nothing is compiled, because torch.compile fails here ({reasons[0]}): install a C++ compiler, such as "
            "g++, and Python's headers, or leave --torch_compile out."
        )


def cache_graphs_with_own_gradients():
    """Let the next start find the compiled step in torch's cache, though its loss computes its gradient itself.

    The cache's key has the operations of both passes of an `autograd.Function`, so a changed one is compiled again.
    """
    name = "autograd_cache_allow_custom_autograd_functions"
    if hasattr(torch._functorch.config, name):  # not public, and False by default
        setattr(torch._functorch.config, name, True)


def compilation_problem(device: torch.device, backend: str = "inductor") -> str | None:
    """Compile the addition of two numbers; the error's line that says most, or None if it works.

    It takes a second beyond the start of the compiler, which the model needs in any case.
    """
    try:
        torch.compile(lambda x: x + 1, backend=backend)(torch.zeros(2, device=device))
    except torch._dynamo.exc.BackendCompilerFailed as error:
        message = str(error.inner_exception)
        return (re.search(r".*\berror: .*", message) or re.match(r".*", message))[0].rstrip(".")
    return None
