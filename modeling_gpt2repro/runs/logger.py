"""What a person watches: one block at the start, a progress bar or plain lines, and one row of numbers a step.

The numbers of a step stay on the device until they are read, all steps at once, every `logging_steps`: a GPU is not
waited for in between.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
from accelerate import Accelerator
from tqdm import tqdm

from modeling_gpt2repro.runtime.hardware import peak_memory_gb, readable_duration
from modeling_gpt2repro.training.state import TrainState
from modeling_gpt2repro.training.step import StepMetrics

from .metrics import MetricsLog

# Without a terminal (a log file, Slurm) a line at most this often, so that fast steps do not fill a disk.
SECONDS_BETWEEN_LINES = 10.0


class Monitor:
    """Shows and logs a run on the main process; silent on the others.

    Args:
        total_steps: For the bar and the time left.
        logging_steps: Steps between looks at the numbers.
        log: Where rows go.
        flops_per_token: Forward and backward; with `peak_flops` (a second, of all devices) they give the MFU.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        total_steps: int,
        logging_steps: int,
        progress: TrainState,
        log: MetricsLog,
        flops_per_token: int = 0,
        peak_flops: float | None = None,
    ):
        self.accelerator, self.total_steps, self.logging_steps = accelerator, total_steps, logging_steps
        self.progress, self.log = progress, log
        self.flops_per_token, self.peak_flops = flops_per_token, peak_flops
        # Some pseudo-terminals have no lines; tqdm shows nothing there.
        self.as_bar = sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).lines > 1
        self.as_bar = self.as_bar and accelerator.is_main_process
        self.bar = tqdm(
            total=total_steps, initial=progress.step, unit="step", disable=not self.as_bar, dynamic_ncols=True
        )
        self._unread: list[tuple[int, StepMetrics, float, float]] = []
        self._clock = time.perf_counter()
        self._last_line = 0.0
        self._mean_seconds: float | None = None  # of a step; None until steps were read that are not the first ones
        self._warm = False
        if hasattr(sys.stdout, "reconfigure"):  # samples hold halves of characters, which not every encoding can write
            sys.stdout.reconfigure(errors="replace")

    def say(self, text: str):
        """Print above the bar, on the main process; a terminal or a pipe that is gone ends no run."""
        if self.accelerator.is_main_process:
            with suppress(OSError):
                tqdm.write(text, file=sys.stdout)
                sys.stdout.flush()

    def trained(self, numbers: StepMetrics, learning_rate: float, data_seconds: float) -> list[int]:
        """Note the training step that was just done; every `logging_steps` read and log those that were noted.

        Args:
            data_seconds: How long the step waited for its micro-batches.

        Returns:
            The steps among those read now whose update was skipped; the same on all processes.
        """
        self._unread.append((self.progress.step, numbers, learning_rate, data_seconds))
        self.bar.update()
        due = self.progress.step % self.logging_steps == 0 or self.progress.step == self.total_steps
        return self.read() if due else []

    def read(self) -> list[int]:
        """Wait for the device and log the steps that are not yet read; returns those that were skipped."""
        if not self._unread:
            return []
        steps, numbers, rates, waits = zip(*self._unread, strict=True)
        self._unread = []
        values = torch.stack([torch.stack([part.float() for part in step]) for step in numbers]).tolist()
        now = time.perf_counter()
        seconds, self._clock = (now - self._clock) / len(steps), now
        self.progress.train_seconds += seconds * len(steps)
        tokens_per_step = self.progress.tokens // self.progress.step
        speed = {"step_seconds": seconds, "tokens_per_second": tokens_per_step / seconds}
        if self.peak_flops:
            speed["mfu"] = speed["tokens_per_second"] * self.flops_per_token / self.peak_flops
        if self._warm:  # a process's first steps compile and warm up: they say nothing about the others
            before = self._mean_seconds or seconds
            self._mean_seconds = before + (seconds - before) * min(1.0, 0.02 * len(steps))
        self._warm = True
        memory = peak_memory_gb(self.accelerator.device)
        for step, (loss, norm, skipped), rate, waited in zip(steps, values, rates, waits, strict=True):
            row = {"loss": loss, "grad_norm": norm, "learning_rate": rate, **speed}
            row |= {"data_seconds": waited, "peak_memory_gb": memory}
            self.record(row | ({"skipped": True} if skipped else {}), step, tokens_per_step * step)
        self._show(steps[-1], values[-1], rates[-1], speed)
        return [step for step, (_, _, skipped) in zip(steps, values, strict=True) if skipped]

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Around an evaluation or a save: its time is not counted as training."""
        self.read()
        try:
            yield
        finally:
            self._clock = time.perf_counter()

    @contextmanager
    def warn_on_io_error(self, what: str) -> Iterator[None]:
        """Around writing what a run can do without: a full disk is told, and the run goes on."""
        try:
            yield
        except OSError as error:
            self.say(f"step {self.progress.step:>6}: {what} could not be written ({error.strerror})")

    def _show(self, step: int, values: list[float], learning_rate: float, speed: dict[str, float]):
        loss, norm, _ = values
        pace = f"{speed['tokens_per_second']:,.0f} tokens/s" + (f", MFU {speed['mfu']:.0%}" if "mfu" in speed else "")
        self.bar.set_postfix_str(f"loss {loss:.3f}, {pace}", refresh=False)
        if not self.as_bar and (time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES or step == self.total_steps):
            self._last_line = time.monotonic()
            left = "starting"
            if self._mean_seconds is not None:
                left = f"{readable_duration(self._mean_seconds * (self.total_steps - step))} left"
            self.say(
                f"step {step:>6}/{self.total_steps} | loss {loss:7.4f} | norm {norm:6.3f} | lr {learning_rate:.2e} | "
                f"{1000 * speed['step_seconds']:5.0f} ms | {pace} | {left}"
            )

    def evaluated(self, numbers: dict):
        """Log and show an evaluation; `numbers` as they stand in metrics.jsonl."""
        self.record(numbers)
        shown = [f"validation loss {numbers['validation_loss']:.4f}"]
        if "validation_bits_per_byte" in numbers:
            shown.append(f"{numbers['validation_bits_per_byte']:.3f} bits per byte")
        self.say(f"step {self.progress.step:>6}: {', '.join(shown)} ({numbers['evaluation_seconds']:.1f} s)")
        accuracies = []
        for name in [name for name in numbers if name.endswith(("_acc", "_acc_norm"))]:
            low, high = numbers[f"{name}_low"], numbers[f"{name}_high"]
            accuracies.append(f"{name.removeprefix('hellaswag_')} {numbers[name]:.4f} [{low:.4f}, {high:.4f}]")
        if accuracies:
            self.say(f"    HellaSwag: {', '.join(accuracies)} ({numbers['hellaswag_seconds']:.1f} s of it)")

    def sampled(self, prompt: str, texts: list[str]):
        """Log the samples to samples.jsonl, and show them, each on a line."""
        row = {"step": self.progress.step, "prompt": prompt, "samples": texts}
        with self.warn_on_io_error("samples.jsonl"), open(self.log.path.with_name("samples.jsonl"), "ab") as file:
            file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
        self.say("\n".join(f"    > {' '.join(text.split())}" for text in texts))

    def record(self, numbers: dict, step: int | None = None, tokens: int | None = None):
        """Append one row, stamped with step and tokens (now, if not given), to metrics.jsonl and to the trackers."""
        step = self.progress.step if step is None else step
        row = {"step": step, "tokens": self.progress.tokens if tokens is None else tokens, **numbers}
        self.log.append(row)
        shown = {name: value for name, value in row.items() if isinstance(value, int | float) and name != "step"}
        self.accelerator.log(shown, step=step)  # trackers have a name of their own for it, some reserve ours

    def close(self):
        """Write what is not yet written, as far as the disk takes it, and end the bar."""
        self.log.flush()
        self.bar.close()
