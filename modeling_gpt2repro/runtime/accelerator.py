"""Build the accelerator: gradient accumulation, compilation, precision and determinism."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import current_process
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    FullyShardedDataParallelPlugin,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    parse_flag_from_env,
)
from torch.utils._triton import has_triton
from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

from .compilation import give_up_failing_compilation
from .hardware import usable_cores
from .network import MAX_SAVE_TIME, choose_gloo_interface
from .precision import check_same_precision, choose_precision
from .signals import requested_num_processes

CUBLAS_CONFIG = "CUBLAS_WORKSPACE_CONFIG"


def build_accelerator(
    *,
    num_processes: int,
    torch_compile: bool | None = None,
    deterministic: bool | None = None,
    attn_implementation: str = "sdpa",
    report_to: str = "none",
    output_dir: str | Path = ".",
) -> Accelerator:
    """Build the accelerator of this process; devices and precision are those of the launcher, see `choose_precision`.

    Args:
        num_processes: Processes that the launcher says there are.
        torch_compile: Whether to compile, where that works; None: on CUDA and XPU, if Triton is installed.
        deterministic: Whether equal runs give equal bits; None: on the CPU.
        attn_implementation: Checked against the precision, since flash-attention computes in 16 bits only.
        report_to: Tracker of accelerate, "all" or "none", which logs to `output_dir`.

    Raises:
        ValueError: If the launcher started several processes that do not see each other, or asks for DeepSpeed, for
            FSDP's first version, for fp16 where it cannot be, or for flash-attention in fp32.
    """
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        raise ValueError(
            "DeepSpeed has an optimizer state of its own, which the checkpoints here do not hold: launch with "
            "accelerate_configs/fsdp2.yaml, which shards as ZeRO-3 (with fsdp_reshard_after_forward: false, as ZeRO-2)."
        )
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    on_cuda = torch.cuda.is_available() and not on_cpu
    is_compilable = on_cuda or (torch.xpu.is_available() and not on_cpu)  # inductor makes Triton code for these
    torch.set_float32_matmul_precision("high")  # TF32 for the matrix products that stay in fp32
    torch.set_num_threads(min(torch.get_num_threads(), usable_cores()))
    if type(current_process()).__name__ == "ForkProcess":  # accelerate's notebook_launcher
        use_one_thread()
    disable_progress_bar()  # of transformers, one for each save
    if deterministic is None:
        deterministic = on_cpu
    if deterministic:
        enable_determinism()
    compiled = is_compilable and has_triton() if torch_compile is None else torch_compile
    choose_gloo_interface()
    precision, message = choose_precision(on_cpu)
    accelerator = Accelerator(
        cpu=on_cpu,  # else accelerate sees no other processes on CPUs, unless ACCELERATE_USE_CPU is set
        mixed_precision=precision,
        # 1, because `train_step` accumulates gradients itself: the data decide how many micro-batches a step has.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1, sync_with_dataloader=False),
        dynamo_backend="inductor" if compiled else None,
        fsdp_plugin=build_fsdp_plugin(precision),
        kwargs_handlers=[
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),  # saves a copy of the gradients
            InitProcessGroupKwargs(timeout=MAX_SAVE_TIME),  # while one process saves, the others wait for it
        ],
        log_with=None if report_to == "none" else report_to,
        project_dir=output_dir,
    )
    if message:
        accelerator.print(message)
    if torch_compile is None and is_compilable and not compiled:
        accelerator.print("Nothing is compiled, because Triton is not installed.")
    if "flash" in attn_implementation and accelerator.mixed_precision == "no":
        raise ValueError(
            f"attn_implementation ({attn_implementation}) computes in 16 bits only: launch with --mixed_precision "
            "bf16, or use sdpa."
        )
    check_num_processes(accelerator.num_processes, launched=num_processes, requested=requested_num_processes())
    check_same_precision(accelerator)
    give_up_failing_compilation(accelerator)
    return accelerator


def build_fsdp_plugin(mixed_precision: str) -> FullyShardedDataParallelPlugin | None:
    """FSDP2 with the launcher's options and a precision of our own; None if the launcher does not ask for FSDP.

    Blocks compute in bf16, as autocast lets them under DDP. Gradients are added up over micro-batches and processes
    in fp32, and what the model returns stays as it is: accelerate would have all of it in bf16, and a loss near 3.3
    could then be 3.297, 3.312 and nothing between.

    Raises:
        ValueError: If it asks for the first version of FSDP.
    """
    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return None
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise ValueError(
            "FSDP version 1 flattens parameters, which the checkpoints here do not hold: launch with "
            "accelerate_configs/fsdp2.yaml, or give fsdp_version: 2."
        )
    from torch.distributed.fsdp import MixedPrecisionPolicy  # half a second, for nothing where nothing is sharded

    in_bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    # What is not given here, accelerate reads from the environment.
    return FullyShardedDataParallelPlugin(mixed_precision_policy=in_bf16 if mixed_precision == "bf16" else None)


def check_num_processes(found: int, launched: int, requested: int | None):
    """Compare the processes that see each other with those that were launched, and those that were asked for.

    Raises:
        ValueError: If they differ: the processes would train separately, or there are too few.
    """
    if found != launched:
        raise ValueError(
            f"the launcher started {launched} processes, but each sees {found}: they would train separately. On CPUs "
            f"launch with ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes {launched}; on GPUs "
            "check that each process has one."
        )
    if requested and found == 1 < requested:  # what `accelerate launch --cpu` makes of --num_processes
        raise ValueError(
            f"the launcher was asked for {requested} processes and started one: on CPUs launch with "
            f"ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes {requested}."
        )


def use_one_thread():
    """Compute in this thread alone: a fork has none of OpenMP's other threads, if its parent had started them, and
    would wait for them forever."""
    os.environ["OMP_NUM_THREADS"] = "1"  # which accelerate reads where it is set
    torch.set_num_threads(1)


def enable_determinism():
    """Make every operation give the same bits each time; compiled training on a CPU does not do so by itself."""
    os.environ.setdefault(CUBLAS_CONFIG, ":4096:8")  # cuBLAS needs it before its first use
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # costs time, and nothing here reads such memory


@contextmanager
def restored_settings() -> Iterator[None]:
    """Undo at the end what `build_accelerator` sets in the block for the whole process.

    The next cell of a notebook then computes as it did before, and may train again, in another precision or with
    accelerate's `notebook_launcher`, which refuses to start while there is an accelerator.
    """
    cublas = os.environ.get(CUBLAS_CONFIG)
    deterministic = torch.are_deterministic_algorithms_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory
    matmul_precision = torch.get_float32_matmul_precision()
    threads = torch.get_num_threads()
    shows_progress = is_progress_bar_enabled()
    try:
        yield
    finally:
        if cublas is None:
            os.environ.pop(CUBLAS_CONFIG, None)
        torch.use_deterministic_algorithms(deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = fills
        torch.set_float32_matmul_precision(matmul_precision)
        torch.set_num_threads(threads)
        if shows_progress:
            enable_progress_bar()
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


@contextmanager
def nondeterministic(compiled: bool) -> Iterator[None]:
    """Allow other bits each time inside the block, to measure what `enable_determinism` costs."""
    torch.use_deterministic_algorithms(False)
    if compiled:
        torch.compiler.reset()  # the code was generated for the deterministic mode
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True)
        if compiled:
            torch.compiler.reset()
