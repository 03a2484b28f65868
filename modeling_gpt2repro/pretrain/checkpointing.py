"""Save a run, with retries; restore it; export its final model."""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError
from torch import nn
from torch.distributed.checkpoint.stateful import Stateful
from torch.optim import Optimizer

from modeling_gpt2repro.data.batches.build import TrainingData
from modeling_gpt2repro.hub.background_upload import UploadQueue
from modeling_gpt2repro.hub.export import save_hub_folder
from modeling_gpt2repro.hub.model_card import FROM_SCRATCH, INHERITED, Origin
from modeling_gpt2repro.modeling_gpt2repro import GPT2ReproForCausalLM
from modeling_gpt2repro.runs.folder import METRICS_FILE, MODEL_FOLDER, checkpoint_name
from modeling_gpt2repro.runs.logger import RunLogger
from modeling_gpt2repro.runs.read import HELLASWAG_METRICS, read_metrics
from modeling_gpt2repro.runtime.collectives import run_on_main_and_broadcast
from modeling_gpt2repro.runtime.fsdp import is_sharded, load_full_state_dict
from modeling_gpt2repro.storage.atomic import replace_dir
from modeling_gpt2repro.storage.json_files import is_text
from modeling_gpt2repro.training import checkpoints
from modeling_gpt2repro.training.arguments import TrainArguments
from modeling_gpt2repro.training.optimizer_state import load_optimizer, load_random, optimizer_tensors, random_tensors
from modeling_gpt2repro.training.state import TrainState

from .attention import attention_record
from .messages import cannot_export_message, cannot_save_message

MAX_FAILED_SAVES = 3  # in a row, after which a run stops
FINAL_SAVE_TRIES = 20  # for the last checkpoint and the final model, which no later one makes up for
SECONDS_BETWEEN_TRIES = 30.0  # with 20 tries, ten minutes in which somebody can free some space


@dataclass(eq=False)
class Checkpointer:
    """Saves and restores all that a run needs to continue as if it had never stopped."""

    args: TrainArguments
    accelerator: Accelerator
    model: nn.Module  # as `accelerator.prepare` returned it, like the optimizer
    optimizer: Optimizer
    data: TrainingData
    stateful: dict[str, Stateful | None]  # name in state.json -> what has a state; `progress` is the run's TrainState
    origin: Origin  # where the initial weights come from, for the card; a resumed run keeps that of its checkpoint

    def __post_init__(self):
        self.output_dir = Path(self.args.output_dir)
        self.stateful = {name: stateful for name, stateful in self.stateful.items() if stateful is not None}
        self.policy = checkpoints.RetentionPolicy(limit=self.args.save_total_limit, every=self.args.keep_every)
        self.saved_step = 0  # the last step that has a checkpoint in this run's folder; step 0 needs none
        self.failed_saves = 0  # in a row

    @property
    def state(self) -> TrainState:
        """How far the run is."""
        return self.stateful["progress"]

    def restore(self, checkpoint: Path):
        """Load a checkpoint into optimizer, random number generators and states; the model has its weights already.

        Raises:
            ValueError: If it is damaged, or was made with other data, in another order, or by another optimizer.
        """
        state = checkpoints.read_state(checkpoint, self.data.data_fingerprint, self.args.optimizer)
        old_metadata = FROM_SCRATCH.metadata if state["origin"] == FROM_SCRATCH.sentence else {}
        card = old_metadata if state["card"] is None else state["card"]
        self.origin = Origin(
            state["origin"], {name: card[name] for name in INHERITED if is_text_or_texts(card.get(name))}
        )
        with checkpoints.raise_if_corrupt(checkpoint):
            for name, stateful in self.stateful.items():
                if state[name] is not None:  # a run that was not in fp16 has left no loss scale
                    stateful.load_state_dict(state[name])
            folder = checkpoint / checkpoints.STATE_FOLDER
            load_optimizer(folder, unwrapped_model(self.accelerator, self.model), self.optimizer)
            load_random(folder, self.accelerator)
        is_here = checkpoint.parent.resolve() == self.output_dir.resolve()
        self.saved_step = self.state.step if is_here else None

    def save(self, logger: RunLogger, uploads: UploadQueue, final: bool = False):
        """Write a checkpoint: a Hub folder that the run can resume from. A disk that is full costs only this one.

        Args:
            final: No later one makes up for it, so it is tried again for some minutes.

        Raises:
            SystemExit: If too many saves in a row have failed.
        """
        step = self.state.step
        logger.flush()  # which counts the skipped steps
        if self.saved_step == step:
            return
        if self.state.last_skipped == step and not final:
            logger.print(f"step {step:>6}: no checkpoint, because this step was skipped")
            return
        folder = self.output_dir / checkpoint_name(step)

        def write() -> str | None:
            self.state.train_seconds = logger.train_seconds
            started = time.perf_counter()
            with logger.untimed():
                problem = self.write(folder, self.policy)
                logger.record(step, {"save_seconds": time.perf_counter() - started})
            return problem

        failure = f"step {step:>6}: no checkpoint (%s); the one before stays"
        problem = self._write_in_tries(write, failure, logger, uploads, tries=FINAL_SAVE_TRIES if final else 1)
        if problem is None:
            self.saved_step = step
            self.failed_saves = 0
            uploads.enqueue(folder)
            return
        self.failed_saves += 1
        if final or self.failed_saves >= MAX_FAILED_SAVES:
            raise SystemExit(cannot_save_message(self.args, problem) if self.accelerator.is_main_process else 1)

    def _write_in_tries(
        self, write: Callable[[], str | None], failure: str, logger: RunLogger, uploads: UploadQueue, tries: int
    ) -> str | None:
        """Call `write` until it returns None instead of a problem, with pauses; returns the last problem.

        Args:
            write: Returns the same on all processes.
            failure: What to print for a problem, which takes the place of %s.
        """
        for attempt in range(tries):
            if attempt > 0:
                logger.print(
                    f"Trying again every {SECONDS_BETWEEN_TRIES:.0f} s: free some space in {self.output_dir}, or make "
                    "it writable."
                )
                time.sleep(SECONDS_BETWEEN_TRIES)
            problem = write()
            if problem is None:
                return None
            logger.print(failure % problem)
            uploads.drop_pending()  # snapshots that wait for their upload take disk space
        return problem

    def write(self, folder: Path, policy: checkpoints.RetentionPolicy) -> str | None:
        """Write everything that a run resumes from; returns why it could not be written, or None."""
        module = self.model_to_save()
        states = gather_object([{name: stateful.state_dict() for name, stateful in self.stateful.items()}])
        state = {name: checkpoints.join_states([of_process[name] for of_process in states]) for name in self.stateful}
        return checkpoints.save_checkpoint(
            self.accelerator,
            folder,
            lambda temporary: save_hub_folder(module, self.data.tokenizer, temporary, self.origin, self.output_dir),
            optimizer=optimizer_tensors(
                unwrapped_model(self.accelerator, self.model),
                self.optimizer,
                keep=self.accelerator.is_main_process,
            ),
            random=random_tensors(self.accelerator),
            state={
                **state,
                "origin": self.origin.sentence,
                "card": self.origin.metadata,
                "identity": self.data.data_fingerprint,
                "schedule": self.args.schedule,
                "optimizer": self.args.optimizer,
                "attention": attention_record(self.args, self.accelerator, module.config),
            },
            policy=policy,
        )

    def is_exported(self, with_hellaswag: bool) -> bool:
        """Whether the run has all its steps, and its final model is that of the last. All processes must call this.

        Args:
            with_hellaswag: Whether the last evaluation is to have HellaSwag, which a signal may have cut off.
        """

        def is_of_this_step() -> bool:
            records = read_metrics(self.output_dir / MODEL_FOLDER)  # which `export` writes, after the last evaluation
            evaluation = next((record for record in reversed(records) if "validation_loss" in record), {})
            is_complete = not with_hellaswag or any(name in evaluation for name in HELLASWAG_METRICS.values())
            return evaluation.get("step") == self.state.step and is_complete

        is_done = self.state.step >= self.args.total_steps
        return is_done and run_on_main_and_broadcast(self.accelerator, is_of_this_step)

    def export(self, logger: RunLogger, uploads: UploadQueue) -> Path:
        """Write the final model: a Hub folder without the training state, with the run's numbers.

        A disk that refuses is tried again for some minutes, as for the last checkpoint.

        Raises:
            SystemExit: On all processes, if it cannot be written; the run can be resumed from its last checkpoint.
        """
        folder = self.output_dir / MODEL_FOLDER
        temporary = self.output_dir / f".{MODEL_FOLDER}.partial"
        module = self.model_to_save()

        def write() -> str | None:
            problem = None
            if self.accelerator.is_main_process:
                logger.write_waiting()  # the model's folder gets a copy of metrics.jsonl
                try:
                    save_hub_folder(module, self.data.tokenizer, temporary, self.origin, self.output_dir)
                    shutil.copyfile(self.output_dir / METRICS_FILE, temporary / METRICS_FILE)  # the card draws on it
                    replace_dir(temporary, folder)
                except (OSError, SafetensorError) as error:
                    problem = getattr(error, "strerror", None) or str(error)
                    shutil.rmtree(temporary, ignore_errors=True)
            return broadcast_object_list([problem])[0]

        failure = "The final model cannot be written (%s)."
        problem = self._write_in_tries(write, failure, logger, uploads, tries=FINAL_SAVE_TRIES)
        if problem is not None:
            raise SystemExit(cannot_export_message(self.args, problem) if self.accelerator.is_main_process else 1)
        return folder

    def model_to_save(self) -> GPT2ReproForCausalLM:
        """The model with full parameters, on the process that writes it, without taking memory from the training."""
        return unsharded_model(self.accelerator, self.model, device="cpu", keep=self.accelerator.is_main_process)


def is_text_or_texts(value: object) -> bool:
    """Whether a card's metadata may have it: a licence, or several languages."""
    return all(map(is_text, value)) if type(value) is list else is_text(value)


def unwrapped_model(accelerator: Accelerator, model: nn.Module) -> GPT2ReproForCausalLM:
    """The model inside `ModelWithLoss`, DDP and torch.compile, without autocast: shapes that vary recompile nothing."""
    return accelerator.unwrap_model(model, keep_torch_compile=False).model


def unsharded_model(
    accelerator: Accelerator, model: nn.Module, device: torch.device | str | None = None, keep: bool = True
) -> GPT2ReproForCausalLM:
    """The unwrapped model; under FSDP, a copy on `device` that has all parameters. All processes must call this.

    Args:
        device: That of the accelerator by default.
        keep: Whether this process needs the copy.
    """
    module = unwrapped_model(accelerator, model)
    if not is_sharded(module):
        return module
    with torch.device("meta"):
        full = GPT2ReproForCausalLM(module.config)
    load_full_state_dict(full, module, keep=keep, device=accelerator.device if device is None else device)
    full.tie_weights()
    return full
