"""Choose the attention implementation of a run: the flag, the checkpoint's, or the fastest one that was measured."""

import atexit
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import PreTrainedConfig, PreTrainedModel

from modeling_gpt2repro.runtime.attention import (
    DEFAULT,
    SDPA_KERNELS,
    Workload,
    device_kind,
    fastest_first,
    is_available,
    sdpa_kernels,
)
from modeling_gpt2repro.runtime.collectives import run_on_main_and_broadcast
from modeling_gpt2repro.training import checkpoints
from modeling_gpt2repro.training.arguments import TrainArguments


def set_attention(
    args: TrainArguments, accelerator: Accelerator, model: PreTrainedModel, checkpoint: Path | None
) -> str | None:
    """Set the attention implementation, and `args.attn_implementation` to what `auto` means here.

    All processes must call this, and get the same one: their numbers must not differ, whatever the machines are.

    Returns:
        What auto has taken and why, a line for the start of the run; None if a flag names the implementation.

    Raises:
        ValueError: If the implementation is not installed.
    """
    message = None
    if args.attn_implementation == "auto":
        args.attn_implementation, reason = choose_attention(args, accelerator, model.config, checkpoint)
        message = f"attention    {args.attn_implementation}, {reason}"
    name = args.attn_implementation
    if name in SDPA_KERNELS:
        stack = ExitStack()
        stack.enter_context(sdpa_kernels(name))
        atexit.register(stack.close)  # until the process ends, and kept alive until then
        name = DEFAULT
    try:
        model.set_attn_implementation(name)
    except ImportError as error:
        raise ValueError(f"attn_implementation ({name}) is not installed: {error}") from error
    return message


def choose_attention(
    args: TrainArguments, accelerator: Accelerator, config: PreTrainedConfig, checkpoint: Path | None
) -> tuple[str, str]:
    """What `auto` means, and why. All processes must call this, and get the same answer."""
    record = attention_record(args, accelerator, config)
    workload = Workload(**{name: value for name, value in record.items() if name != "implementation"})
    measured = fastest_first(workload)
    available = [name for name in measured if is_available(name, accelerator.device)]
    # Machines may differ in their GPUs, packages and tables; then only torch's own choice runs well on all of them.
    is_equal = all(of_process == (workload, available) for of_process in gather_object([(workload, available)]))

    def choose() -> tuple[str, str]:
        saved = checkpoints.read_state(checkpoint)["attention"] if checkpoint is not None else {}
        if checkpoint is not None and not saved:
            return DEFAULT, f"because {checkpoint.name} does not name another one"
        # On another device, or in another precision, the numbers differ anyway.
        name = saved.get("implementation")
        if is_equal and saved == record | {"implementation": name} and is_available(name, accelerator.device):
            return name, f"as in {checkpoint.name}"
        if args.document_mask:
            return DEFAULT, "because of --document_mask"
        if args.deterministic and accelerator.device.type != "cpu":
            return DEFAULT, "because of --deterministic"
        if not is_equal:
            return DEFAULT, "because the processes have different devices or packages"
        if not available:
            return DEFAULT, f"because nothing was measured for {workload}"
        return available[0], f"the fastest that was measured for {workload}"

    return run_on_main_and_broadcast(accelerator, choose)


def attention_record(args: TrainArguments, accelerator: Accelerator, config: PreTrainedConfig) -> dict:
    """For run.json and checkpoints: the implementation, and the workload that it was chosen for."""
    workload = Workload(
        device=device_kind(accelerator.device),
        dtype=accelerator.mixed_precision.replace("no", "fp32"),
        compiled=accelerator.state.dynamo_plugin.backend.value.lower() != "no",
        head_size=config.n_embd // config.n_head,
        length=args.block_size,
    )
    return {"implementation": args.attn_implementation, **asdict(workload)}
