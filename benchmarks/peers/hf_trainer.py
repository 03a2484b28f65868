"""transformers' own Trainer, one optimizer step at a time."""

from collections.abc import Callable, Iterator
from queue import SimpleQueue
from tempfile import TemporaryDirectory
from threading import Thread

import torch
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

Rows = Callable[[int], Iterator[dict[str, Tensor]]]  # optimizer step -> its sequences


class Sequences(IterableDataset):
    """The sequences of all steps, in order."""

    def __init__(self, rows: Rows):
        self.rows = rows

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        step = 0
        while True:
            yield from self.rows(step)
            step += 1


class SteppingTrainer(Trainer):
    """Trains in a thread of its own, which waits after each optimizer step until `step` is called again."""

    def __init__(self, model: PreTrainedModel, arguments: TrainingArguments, rows: Rows):
        super().__init__(model=model, args=arguments, train_dataset=Sequences(rows))
        arguments._n_gpu = 1  # with several GPUs it would take DataParallel
        self.losses: list[Tensor] = []
        self.go = SimpleQueue()
        self.done = SimpleQueue()
        self.add_callback(WaitAfterStep(self))
        self.thread = Thread(target=self._train, daemon=True)

    def training_step(self, *args, **kwargs) -> Tensor:
        loss = super().training_step(*args, **kwargs)  # a micro-batch's share of the step's mean
        self.losses.append(loss)
        return loss

    def step(self) -> float:
        """One optimizer step; returns its loss."""
        if self.thread.ident is None:
            self.thread.start()
        else:
            self.go.put(None)
        if self.done.get() == "ended":
            raise RuntimeError("Trainer ended by itself: its thread's error is above.")
        loss = torch.stack(self.losses).sum().item()
        self.losses.clear()
        return loss

    def _train(self):
        try:
            self.train()
        finally:
            self.done.put("ended")


class WaitAfterStep(TrainerCallback):
    def __init__(self, trainer: SteppingTrainer):
        self.trainer = trainer

    def on_step_end(self, *_, **__):
        self.trainer.done.put("step")
        self.trainer.go.get()


def build_trainer(
    model: PreTrainedModel,
    rows: Rows,
    *,
    batch_rows: int,
    micro_batches: int,
    device: str,
    bf16: bool,
    compiled: bool,
    optimizer: dict[str, float],
) -> SteppingTrainer:
    """Trainer as its documentation recommends it for speed: fused AdamW, bf16 by autocast, torch.compile.

    Args:
        optimizer: Names of `TrainingArguments`: learning_rate, weight_decay, adam_beta2 and so on.
    """
    with TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=10**9,  # it is never finished
            per_device_train_batch_size=batch_rows,
            gradient_accumulation_steps=micro_batches,
            optim="adamw_torch_fused",
            lr_scheduler_type="constant",
            bf16=bf16,
            torch_compile=compiled,
            use_cpu=device == "cpu",
            dataloader_pin_memory=device != "cpu",
            remove_unused_columns=False,
            logging_steps=10**9,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **optimizer,
        )
        return SteppingTrainer(model, arguments, rows)  # which makes the folder again
