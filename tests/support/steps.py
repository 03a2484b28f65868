"""Single optimizer steps of the training script, with random tokens."""

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin
from torch import nn
from torch.optim import Optimizer

from modeling_gpt2repro.data.batches.sequences import as_batch
from modeling_gpt2repro.runs.metrics import StepMetrics
from modeling_gpt2repro.training.outliers import OutlierDetector
from train_accelerate import train_step


def accelerator_for(micro_batches: int, device: str = "cpu", **options) -> Accelerator:
    """An accelerator that accumulates the gradients of so many micro-batches; `options` are its own."""
    plugin = GradientAccumulationPlugin(num_steps=micro_batches, sync_with_dataloader=False)
    return Accelerator(cpu=device == "cpu", gradient_accumulation_plugin=plugin, **options)


def random_sequences(count: int, length: int = 33, seed: int = 5) -> torch.Tensor:
    """Ids of the tiny vocabulary, (count, length): inputs and, one further, targets."""
    return torch.randint(0, 97, (count, length), generator=torch.Generator().manual_seed(seed))


def take_step(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Optimizer,
    sequences: torch.Tensor,
    micro_batch_size: int,
    max_grad_norm: float = 1.0,
) -> StepMetrics:
    """A step over `sequences`; the last micro-batch is padded, as it is in training."""
    parts = sequences.split(micro_batch_size)
    return train_step(
        accelerator,
        model,
        optimizer,
        [as_batch(part.numpy(), pad_to=micro_batch_size) for part in parts],
        tokens_per_step=sequences[:, 1:].numel(),
        max_grad_norm=max_grad_norm,
        detector=OutlierDetector(next(model.parameters()).device),
    )


def in_fp16(accelerator: Accelerator, **scaler) -> Accelerator:
    """What accelerate makes on a GPU: autocast to fp16, and a loss scale. On a CPU it has neither, but torch has both.

    Args:
        accelerator: Whose models are not prepared yet; those that are stay in fp32.
        scaler: Of torch.amp.GradScaler, such as `init_scale`.
    """
    accelerator.state._mixed_precision = "fp16"
    accelerator.native_amp = True
    accelerator.scaler = torch.amp.GradScaler("cpu", **scaler)
    return accelerator
