"""Starting the accelerator: accumulation, compile and precision as the arguments and the machine ask for them."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    broadcast_object_list,
    parse_flag_from_env,
)
from torch.utils._triton import has_triton
from transformers.utils.logging import disable_progress_bar

from modeling_gpt2repro.training.arguments import TrainArguments

from .hardware import cpu_lacks_bf16, usable_cores
from .launcher import requested_num_processes

Result = TypeVar("Result")
LONGEST_SAVE = timedelta(hours=1)  # 1558M: 19 GB are written, hashed and flushed; the default is ten minutes


def build_accelerator(args: TrainArguments) -> Accelerator:
    """Start the accelerator of this process.

    Compiles on CUDA, where Triton is, unless told otherwise; takes fp32 on a CPU that would only emulate bf16.

    Raises:
        ValueError: If the launcher started several processes that do not see each other, or asks for fp16,
            DeepSpeed, or flash-attention in fp32.
    """
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        raise ValueError(
            "DeepSpeed steps by an engine of its own, whose state checkpoints here do not hold: launch with "
            "accelerate_configs/fsdp2.yaml, which shards as ZeRO-3 (with fsdp_reshard_after_forward: false, as ZeRO-2)."
        )
    torch.set_float32_matmul_precision("high")  # TF32 for what stays fp32
    torch.set_num_threads(min(torch.get_num_threads(), usable_cores()))
    disable_progress_bar()  # transformers' bars for each save, not ours
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    on_cuda = torch.cuda.is_available() and not on_cpu
    if args.deterministic if args.deterministic is not None else on_cpu:
        enable_determinism()
    compiled = args.torch_compile if args.torch_compile is not None else on_cuda and has_triton()
    emulated = on_cpu and os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16" and cpu_lacks_bf16()
    accelerator = Accelerator(
        mixed_precision="no" if emulated else None,
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=args.gradient_accumulation_steps, sync_with_dataloader=False
        ),
        dynamo_backend="inductor" if compiled else None,
        kwargs_handlers=[
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            InitProcessGroupKwargs(timeout=LONGEST_SAVE),  # for which the other processes wait
        ],
        log_with=None if args.report_to == "none" else args.report_to,
        project_dir=args.output_dir,
    )
    if emulated:
        accelerator.print("bf16 is much slower than fp32 on this processor, so fp32 is taken.")
    if args.torch_compile is None and on_cuda and not compiled:
        accelerator.print("Nothing is compiled: Triton is missing here.")
    if accelerator.mixed_precision == "fp16":
        raise ValueError("mixed precision fp16 needs a loss scale that checkpoints do not hold: use bf16, or no.")
    if "flash" in args.attn_implementation and accelerator.mixed_precision == "no":
        raise ValueError(
            f"attn_implementation ({args.attn_implementation}) takes 16 bits only: launch with --mixed_precision bf16, "
            "or take sdpa."
        )
    if accelerator.num_processes != args.num_processes:
        raise ValueError(
            f"the launcher started {args.num_processes} processes, but each sees {accelerator.num_processes}: they "
            "would train separately. On CPUs launch with ACCELERATE_USE_CPU=true accelerate launch --multi_gpu "
            f"--num_processes {args.num_processes}; on GPUs check that each process has one."
        )
    asked = requested_num_processes()
    if asked and accelerator.num_processes == 1 < asked:  # what --cpu does to it
        raise ValueError(
            f"the launcher was asked for {asked} processes and started one: on CPUs launch with "
            f"ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes {asked}."
        )
    return accelerator


def enable_determinism():
    """Let every operation give the same bits each time; compiled training on the CPU does not do so by itself."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs for it, before its first use
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # costs time, and nothing here reads such memory


@contextmanager
def nondeterministic(compiled: bool) -> Iterator[None]:
    """Inside, operations may give other bits each time: to measure what `enable_determinism` costs."""
    torch.use_deterministic_algorithms(False)
    if compiled:
        torch.compiler.reset()  # code was made for the other way
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True)
        if compiled:
            torch.compiler.reset()


def run_on_main_and_broadcast(accelerator: Accelerator, work: Callable[[], Result]) -> Result:
    """What `work` gives on the main process, where alone it is called; what it raises is raised on all.

    Raises:
        ValueError: As `work`, or for its OSError.
    """
    result, problem = None, None
    if accelerator.is_main_process:
        try:
            result = work()
        except (OSError, ValueError) as error:
            problem = str(error)
    result, problem = broadcast_object_list([result, problem])
    if problem is not None:
        raise ValueError(problem)
    return result


def call_main_process_first(accelerator: Accelerator, work: Callable[[], Result]) -> Result:
    """Call `work` on all processes, on the main one before the others, which then find what it left.

    What it raises is raised when all have been through: who left earlier would let the others wait for ever.
    """
    problem = None
    with accelerator.main_process_first():
        try:
            result = work()
        except (OSError, ValueError) as error:
            problem = error
    if problem is not None:
        raise problem
    return result
