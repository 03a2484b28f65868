"""What DDP does, without a GPU: two processes, each with half of a batch, end with the gradient of the whole batch.

    python examples/ddp_gradients.py

Processes, DDP and `no_sync` are those of a training on GPUs; gloo replaces NCCL.
"""

import argparse
import gc
import tempfile
from pathlib import Path

import torch
import torch.multiprocessing as mp
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM

PROCESSES = 2
B, T, V = 8, 32, 100  # sequences of the whole batch, tokens of each, vocabulary


def build_model() -> GPT2ReproForCausalLM:
    """A small GPT-2 with the same weights in every process, because the seed is the same."""
    torch.manual_seed(1337)
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": T, "vocab_size": V}
    return GPT2ReproForCausalLM(GPT2ReproConfig(**shape, bos_token_id=0, eos_token_id=0))


def gradient_of(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """The gradient of the mean loss of these sequences, ids (n, T), all parameters in one vector."""
    model.zero_grad()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()  # here DDP averages over the processes
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def run_process(rank: int, meeting_file: str):
    """What each process runs; rank 0 prints."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting_file}", rank=rank, world_size=PROCESSES)
    ids = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(0))  # (B, T), the whole batch
    expected = gradient_of(build_model(), ids)  # one process, without DDP

    ddp = DistributedDataParallel(build_model())
    mine = ids[rank::PROCESSES]  # (B / P, T): every P-th sequence, as in data/batches/shuffled.py
    averaged = gradient_of(ddp, mine)
    with ddp.no_sync():  # what all micro-batches of a step but the last are in, to send no gradient twice
        alone = gradient_of(ddp, mine)
    if rank == 0:
        for name, gradient in (("averaged by DDP", averaged), ("of process 0 alone (no_sync)", alone)):
            difference = (gradient - expected).norm() / expected.norm()
            print(f"gradient {name:30} differs from that of the whole batch by {difference:.1e}")
    # DDP must be gone before the group of processes, or it may keep the group's threads from ending.
    del ddp
    gc.collect()
    dist.destroy_process_group()


def main(argv: list[str] | None = None):
    """Start the processes and wait for them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run_process, args=(Path(folder, "meeting").as_posix(),), nprocs=PROCESSES)


if __name__ == "__main__":
    main()
