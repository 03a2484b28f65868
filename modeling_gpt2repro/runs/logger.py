"""What a person watches during training: a progress bar or plain lines, evaluations, samples; and what is logged.

The metrics of a step stay on the device until they are read, those of several steps at once, every `logging_steps`.
In between, the host never waits for a GPU, so it can queue the next kernels ahead.
"""

import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import KW_ONLY, dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm import tqdm

from modeling_gpt2repro.runtime.hardware import peak_memory_gb, readable_duration
from modeling_gpt2repro.runtime.progress import SteadyBar, escape_controls
from modeling_gpt2repro.storage.append import LineAppender
from modeling_gpt2repro.storage.hub_files import READ_PATIENCE_SECONDS

from .assessment import curve_sentence
from .folder import METRICS_FILE, SAMPLES_FILE
from .metrics import MetricsLog, StepMetrics

SMOOTHING = 0.02  # weight of a step in the running mean of step times: the last 50 or so count
TRACKERS = "the log of the trackers"  # TensorBoard and others, in messages


def one_line(text: str) -> str:
    """What a model wrote, for a terminal: without line breaks, and with control characters escaped."""
    return escape_controls(" ".join(text.split()))


@dataclass(eq=False)
class RunLogger:
    """Shows and logs a run on the main process; silent on the others."""

    accelerator: Accelerator
    log: MetricsLog  # where records go
    _: KW_ONLY
    total_steps: int  # for the bar and the time left
    tokens_per_step: int
    logging_steps: int  # steps between reads of the metrics, each of which gives a line where there is no bar
    first_step: int = 0  # where the bar begins; 0 for a new run
    # Called with the number of each step whose update turns out to have been skipped for a fault, on all processes.
    on_skipped: Callable[[int], None] = lambda step: None
    flops_per_token: int = 0  # forward and backward; with `peak_flops` it gives the MFU
    peak_flops: float | None = None  # per second, of all devices
    train_seconds: float = 0.0  # time spent in training steps, over all starts of the run

    def __post_init__(self):
        # A pseudo-terminal may report a height of 0, where tqdm shows nothing. The bar goes to stderr: if stdout is a
        # file or a pipe, as in `... | tee log`, lines and bar would overwrite each other.
        has_terminal = sys.stdout.isatty() and sys.stderr.isatty()
        has_terminal = has_terminal and os.get_terminal_size(sys.stderr.fileno()).lines > 1
        self.shows_bar = has_terminal and self.accelerator.is_main_process
        self.bar = SteadyBar(
            total=self.total_steps,
            initial=self.first_step,
            unit="step",
            disable=not self.shows_bar,
            dynamic_ncols=True,
            delay=1e-9,  # not drawn before there is something to print above it
            leave=False,  # the last lines of a run are its own
        )
        self._samples = LineAppender(self.log.path.with_name(SAMPLES_FILE))
        self._untracked: deque[tuple[dict, int]] = deque()  # scalars and step of records that trackers have not got yet
        self._unread: list[tuple[int, StepMetrics, float, float, int]] = []
        self._clock = time.perf_counter()
        self._mean_step_seconds: float | None = None  # without the first steps, which compile and warm up
        self._is_warm = False
        self._is_waiting = False  # for data, and has said so
        if hasattr(sys.stdout, "reconfigure"):  # samples contain halves of characters, which not every encoding has
            sys.stdout.reconfigure(errors="replace")

    def print(self, text: str):
        """Print above the bar, on the main process. A terminal or a pipe that is gone does not end the run."""
        if self.accelerator.is_main_process:
            with suppress(OSError):
                tqdm.write(text, file=sys.stdout)
                sys.stdout.flush()

    def log_step(self, step: int, metrics: StepMetrics, learning_rate: float, data_seconds: float, batch_hash: int = 0):
        """Note an optimizer step; after the first, the last and every `logging_steps`, read and log all noted ones.

        Args:
            step: Its number, from 1.
            data_seconds: How long the step waited for its micro-batches.
            batch_hash: Of this process's sequences; those of all processes are added up.
        """
        self._unread.append((step, metrics, learning_rate, data_seconds, batch_hash))
        if self._is_waiting:
            self._is_waiting = False
            self.bar.set_postfix_str("", refresh=False)
        self.bar.update()
        if self._has_line(step):
            self.flush()

    def show_waiting(self, problem: str):
        """Say, on whatever process, why a step waits for its data: once, but the bar's clock moves on."""
        if not self._is_waiting:
            self._is_waiting = True
            with suppress(OSError):
                tqdm.write(f"Waiting for data, for up to {READ_PATIENCE_SECONDS / 60:.0f} minutes: {problem}.")
                sys.stdout.flush()
        self.bar.set_postfix_str("waiting for data")

    def flush(self):
        """Wait for the device, then log the steps that have not been read yet. All processes must call this."""
        if not self._unread:
            return
        steps, metrics, learning_rates, waits, batch_hashes = zip(*self._unread, strict=True)
        batch_hashes = [sum(of_step) % 2**64 for of_step in zip(*gather_object([batch_hashes]), strict=True)]
        self._unread = []
        # (steps, 3), or in fp16 (steps, 5)
        stacked = torch.stack([torch.stack([v.float() for v in of_step if v is not None]) for of_step in metrics])
        values = [StepMetrics(*row) for row in stacked.tolist()]  # the one place where the host waits for the device
        speed = self._measure_speed(len(steps))
        memory_gb = peak_memory_gb(self.accelerator.device)
        for i, step in enumerate(steps):
            loss, grad_norm, skipped, loss_scale, overflowed = values[i]
            record = {"loss": loss, "grad_norm": grad_norm, "learning_rate": learning_rates[i], **speed}
            record |= {"data_seconds": waits[i], "peak_memory_gb": memory_gb, "batch_hash": f"{batch_hashes[i]:016x}"}
            if loss_scale is not None:
                record["loss_scale"] = loss_scale
            if skipped:
                record["overflowed" if overflowed else "skipped"] = True
            if overflowed:
                self.print(
                    f"step {step:>6}: no update, because gradients overflowed in fp16 at the loss scale "
                    f"{loss_scale:,.0f}, which is halved; that is normal in the first steps and now and then"
                )
            self.record(step, record)
        self._show_step(steps[-1], values[-1], learning_rates[-1], speed)
        for step, of_step in zip(steps, values, strict=True):
            if of_step.skipped and not of_step.overflowed:
                self.on_skipped(step)

    @contextmanager
    def untimed(self) -> Iterator[None]:
        """Exclude an evaluation or a save from the time that counts as training."""
        self.flush()
        self.write_waiting()
        try:
            yield
        finally:
            self._clock = time.perf_counter()

    def write_file(self, name: str, write: Callable[[], None]):
        """Call `write`, on the main process; where the disk refuses, again before evaluations and checkpoints."""
        self.log.deferred.write(name, write)

    def write_waiting(self):
        """Write what the disk has refused, if it takes it now."""
        self.log.deferred.retry()

    def log_evaluation(self, step: int, numbers: dict):
        """Log and show an evaluation; `numbers` under the names that they have in metrics.jsonl."""
        self.record(step, numbers)
        losses = [f"validation loss {numbers['validation_loss']:.4f}"]
        if "validation_bits_per_byte" in numbers:
            losses.append(f"{numbers['validation_bits_per_byte']:.3f} bits per byte")
        self.print(f"step {step:>6}: {', '.join(losses)} ({numbers['evaluation_seconds']:.1f} s)")
        if "story_loss" in numbers:
            ratio = numbers["story_loss"] / numbers["story_floor"]
            self.print(
                f"    stories: {numbers['story_loss']:.1f} nats each, {ratio:.2f} x the floor; "
                f"{100 * numbers['story_mentions_right']:.0f} % of names, animals and things right"
            )
        accuracies = []
        for name in [name for name in numbers if name.endswith(("_acc", "_acc_norm"))]:
            interval = f"[{numbers[f'{name}_low']:.4f}, {numbers[f'{name}_high']:.4f}]"
            accuracies.append(f"{name.removeprefix('hellaswag_')} {numbers[name]:.4f} {interval}")
        if accuracies:
            self.print(f"    HellaSwag: {', '.join(accuracies)} ({numbers['hellaswag_seconds']:.1f} s of it)")
        if self.accelerator.is_main_process and (sentence := curve_sentence(self.log.path.parent, step)):
            self.print(f"    curve: {sentence}")

    def log_samples(self, step: int, prompt: str, texts: list[str]):
        """Append the samples to samples.jsonl, and show them, each on a line."""
        record = {"step": step, "prompt": prompt, "samples": texts}
        self._samples.append(json.dumps(record, ensure_ascii=False))
        self.write_file(SAMPLES_FILE, self._samples.flush)
        self.print("\n".join(f"    > {one_line(text)}" for text in texts))

    def record(self, step: int, numbers: dict):
        """Append one record, with its step and tokens, to metrics.jsonl and to the trackers."""
        record = {"step": step, "tokens": step * self.tokens_per_step, **numbers}
        self.log.append(record)
        # Trackers have a name of their own for the step, and some reserve ours.
        scalars = {name: value for name, value in record.items() if isinstance(value, int | float) and name != "step"}
        self._untracked.append((scalars, step))
        if not self.log.deferred.is_waiting(METRICS_FILE, TRACKERS):  # a failed write costs a tracker its thread
            self.write_file(TRACKERS, self._log_to_trackers)

    def close(self):
        """Write what is not yet written, as far as the disk allows, and end the bar."""
        self.write_file(TRACKERS, self._log_to_trackers)
        self.log.deferred.close()
        self.bar.close()

    def _log_to_trackers(self):
        """Send the trackers what waits for them.

        Raises:
            OSError: If the disk of one of them refuses. Then its writer is of no more use (TensorBoard's is a thread,
                which has ended, and its file ends in half a record), and the next call gets a new one.
        """
        try:
            while self._untracked:
                scalars, step = self._untracked[0]
                self.accelerator.log(scalars, step=step)
                self._untracked.popleft()
        except OSError:
            for tracker in self.accelerator.trackers:
                if tracker.name == "tensorboard":
                    tracker.writer.file_writer = tracker.writer.all_writers = None  # as after its `close`
            raise

    def _measure_speed(self, steps: int) -> dict[str, float]:
        """Step time, tokens per second and MFU since the last read, of `steps` steps; updates the running mean."""
        now = time.perf_counter()
        self.train_seconds += now - self._clock
        step_seconds = (now - self._clock) / steps
        self._clock = now
        if self._is_warm:
            mean = self._mean_step_seconds or step_seconds
            self._mean_step_seconds = mean + (step_seconds - mean) * min(1.0, SMOOTHING * steps)
        self._is_warm = True
        speed = {"step_seconds": step_seconds, "tokens_per_second": self.tokens_per_step / step_seconds}
        if self.peak_flops:
            # Model FLOPs utilization (PaLM, appendix B): the share of the hardware's peak that the model's math takes.
            speed["mfu"] = speed["tokens_per_second"] * self.flops_per_token / self.peak_flops
        return speed

    def _has_line(self, step: int) -> bool:
        return step % self.logging_steps == 0 or step in (self.first_step + 1, self.total_steps)

    def _show_step(self, step: int, metrics: StepMetrics, learning_rate: float, speed: dict[str, float]):
        loss, grad_norm, *_ = metrics
        pace = f"{speed['tokens_per_second']:,.0f} tokens/s" + (f", MFU {speed['mfu']:.0%}" if "mfu" in speed else "")
        self.bar.set_postfix_str(f"loss {loss:.3f}, {pace}", refresh=False)
        if self.shows_bar or not self._has_line(step):
            return
        left = "starting"
        if self._mean_step_seconds is not None:
            left = f"{readable_duration(self._mean_step_seconds * (self.total_steps - step))} left"
        self.print(
            f"step {step:>6}/{self.total_steps} | loss {loss:7.4f} | norm {grad_norm:6.3f} | lr {learning_rate:.2e} | "
            f"{1000 * speed['step_seconds']:5.0f} ms | {pace} | {left}"
        )
