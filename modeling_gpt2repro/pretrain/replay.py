"""Take steps of a run again, from one of its checkpoints or from the seed."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors.torch import load_file
from torch import nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from modeling_gpt2repro.data.batches.build import TrainingData
from modeling_gpt2repro.data.batches.read_ahead import ReadAhead
from modeling_gpt2repro.evaluation.validation import validation_loss
from modeling_gpt2repro.hub.conversion import load_checkpoint, load_gpt2
from modeling_gpt2repro.hub.model_card import FROM_SCRATCH
from modeling_gpt2repro.modeling_gpt2repro import GPT2ReproForCausalLM
from modeling_gpt2repro.runs.folder import checkpoint_name
from modeling_gpt2repro.runs.metrics import StepMetrics
from modeling_gpt2repro.runtime.collectives import run_on_main_and_broadcast
from modeling_gpt2repro.runtime.fsdp import shard_like
from modeling_gpt2repro.runtime.loss import ModelWithLoss
from modeling_gpt2repro.runtime.signals import StopSignal
from modeling_gpt2repro.training.arguments import TrainArguments
from modeling_gpt2repro.training.checkpoint_checks import STATE_FOLDER, WEIGHTS_FILE
from modeling_gpt2repro.training.checkpoints import find_checkpoints
from modeling_gpt2repro.training.optimization import scheduled_learning_rate, set_learning_rate
from modeling_gpt2repro.training.optimizer_state import OPTIMIZER_FILE, optimizer_tensors
from modeling_gpt2repro.training.outliers import OutlierDetector

from .checkpointing import Checkpointer, unsharded_model, unwrapped_model
from .initial_weights import InitialWeights
from .open_data import load_data
from .preflight import raise_if_stopped


@dataclass(eq=False)
class Replay:
    """A run that was opened as if to resume it, and is put back to earlier steps. All processes call each method."""

    args: TrainArguments
    accelerator: Accelerator
    model: nn.Module  # prepared, like the optimizer
    optimizer: Optimizer
    data: TrainingData
    checkpointer: Checkpointer
    stop: StopSignal
    train_step: Callable[..., StepMetrics]  # the training loop's

    def restore(self, step: int):
        """Put weights, optimizer and all states back to where they were after `step`.

        Args:
            step: One that has a checkpoint, or 0.

        Raises:
            ValueError: If it is damaged, or the model of `--init_from` cannot be loaded.
        """
        module = unwrapped_model(self.accelerator, self.model)
        if step > 0:
            folder = self.folder(step)
            self.checkpointer.restore(folder)
            source = load_checkpoint(folder)
        else:
            torch.manual_seed(self.args.seed)
            source = load_gpt2(self.args.init_from)[0] if self.args.init_from else GPT2ReproForCausalLM(module.config)
            self.optimizer.state.clear()
            detector = OutlierDetector(self.accelerator.device, self.args.skip_outliers)
            self.checkpointer.stateful["guard"].load_state_dict(detector.state_dict())
            if self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(GradScaler(self.accelerator.device.type).state_dict())
        weights = source.float().state_dict()
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.copy_(shard_like(weights[name], parameter))

    def take_steps(self, arguments: Mapping[int, Mapping]) -> Iterator[tuple[int, dict]]:
        """Take the steps after the one that was restored; yield each with what metrics.jsonl says of it.

        Args:
            arguments: Step -> the arguments that the run had then, in the order of the steps.

        Raises:
            StoppedBySignal: If a process has received a signal.
            SystemExit: With code 2, if the data cannot be read.
        """
        data = self.data
        if 1 in arguments:  # a stream cannot be wound back to its beginning, but opened again
            latest = (find_checkpoints(self.checkpointer.output_dir) or [None])[-1]  # which says what order to read in
            data = load_data(self.args, self.accelerator, InitialWeights(latest, None, None, FROM_SCRATCH))
        reader = ReadAhead(data.batches, max(arguments, default=0), is_stopping=self.stop.is_requested)
        for step, of_step in arguments.items():
            learning_rate = scheduled_learning_rate(of_step, step - 1)
            set_learning_rate(self.optimizer, learning_rate)
            raise_if_stopped(self.stop, reader.wait_for(step - 1))
            metrics = self.train_step(
                self.accelerator,
                self.model,
                self.optimizer,
                reader.micro_batches(step - 1),
                tokens_per_step=self.args.tokens_per_step,
                max_grad_norm=of_step["max_grad_norm"],
                detector=self.checkpointer.stateful["guard"],
            )
            batch_hash = sum(gather_object([reader.batch_hash])) % 2**64
            yield (
                step,
                {
                    "batch_hash": f"{batch_hash:016x}",
                    "learning_rate": learning_rate,
                    "loss": metrics.loss.item(),
                    "grad_norm": metrics.grad_norm.item(),
                },
            )
        if data is not self.data:
            reader.close()

    def validation_loss(self) -> float:
        """That of the weights as they are now."""
        batch_size = self.args.per_device_eval_batch_size or self.args.per_device_train_batch_size
        batches = self.data.validation_batches(self.args.eval_tokens, batch_size)
        with self.accelerator.autocast():
            module = ModelWithLoss(unsharded_model(self.accelerator, self.model))
            return validation_loss(module, batches, self.accelerator.device)[0]

    def differences_from_checkpoint(self, step: int) -> dict[str, float]:
        """Tensor of the checkpoint of `step` -> how far it is from what the run is now, relative to its norm."""
        weights = self.checkpointer.model_to_save().state_dict()
        module = unwrapped_model(self.accelerator, self.model)
        moments = optimizer_tensors(module, self.optimizer, keep=self.accelerator.is_main_process)

        def compare() -> dict[str, float]:
            differences = {}
            for file, now in ((WEIGHTS_FILE, weights), (f"{STATE_FOLDER}/{OPTIMIZER_FILE}", moments)):
                for name, saved in load_file(self.folder(step) / file).items():
                    distance = torch.linalg.vector_norm(now[name].cpu() - saved)
                    differences[name] = float(distance / torch.linalg.vector_norm(saved).clamp(min=1e-30))
            return differences

        return run_on_main_and_broadcast(self.accelerator, compare)

    def folder(self, step: int) -> Path:
        """That of the checkpoint of `step`."""
        return self.checkpointer.output_dir / checkpoint_name(step)


def has_initial_weights(args: TrainArguments) -> bool:
    """Whether the weights that the run began with can be had: those of `--init_from` may be away by now."""
    try:
        return args.init_from is None or load_gpt2(args.init_from) is not None
    except (OSError, ValueError):
        return False
