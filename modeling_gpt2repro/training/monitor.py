"""What a person watches: one block at the start, a progress bar or plain lines, and one row of numbers a step."""

import json
import os
import sys
import time
from pathlib import Path

from accelerate import Accelerator
from tqdm import tqdm

from .hardware import readable_duration
from .metrics import MetricsLog
from .progress import TrainProgress

# Without a terminal (a log file, Slurm) a line at most this often.
SECONDS_BETWEEN_LINES = 10.0


class Monitor:
    """Shows and logs a run on the main process; silent on the others.

    Args:
        total_steps: For the bar and the time left.
        logging_steps: Steps between rows of metrics.jsonl.
        resumed_step: The step a run goes on from; None for a new one.
        changed: Arguments that are not those the run began with, for the log.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        output_dir: Path,
        total_steps: int,
        logging_steps: int,
        progress: TrainProgress,
        resumed_step: int | None,
        changed: dict | None = None,
    ):
        self.accelerator, self.total_steps, self.logging_steps = accelerator, total_steps, logging_steps
        self.log = MetricsLog(output_dir, resumed_step, accelerator.is_main_process, changed)
        self.progress = progress
        # Some pseudo-terminals have no lines; tqdm shows nothing there.
        self.as_bar = sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).lines > 1
        self.as_bar = self.as_bar and accelerator.is_main_process
        self.bar = tqdm(
            total=total_steps, initial=progress.step, unit="step", disable=not self.as_bar, dynamic_ncols=True
        )
        self._last_line = 0.0
        self._mean_seconds: float | None = None
        if hasattr(sys.stdout, "reconfigure"):  # samples hold halves of characters, which not every encoding can write
            sys.stdout.reconfigure(errors="replace")

    def say(self, text: str):
        """Print above the bar, on the main process."""
        if self.accelerator.is_main_process:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def trained(self, loss: float, grad_norm: float, learning_rate: float, data_seconds: float):
        """Log and show the training step that was just done.

        Args:
            loss: In nats per token.
            data_seconds: How long the step waited for its micro-batches.
        """
        step, seconds = self.progress.step, self.progress.step_seconds
        tokens_per_second = self.progress.step_tokens / seconds
        # A process's first step compiles and warms up: it says nothing about the others.
        known = self._mean_seconds is not None
        if known:
            self._mean_seconds = 0.98 * self._mean_seconds + 0.02 * seconds if self._mean_seconds else seconds
        else:
            self._mean_seconds = 0.0
        if step % self.logging_steps == 0 or step == self.total_steps:
            self.record(
                {
                    "loss": loss,
                    "grad_norm": grad_norm,
                    "learning_rate": learning_rate,
                    "step_seconds": seconds,
                    "data_seconds": data_seconds,
                    "tokens_per_second": tokens_per_second,
                }
            )
        self.bar.set_postfix_str(f"loss {loss:.3f}, {tokens_per_second:,.0f} tokens/s", refresh=False)
        self.bar.update()
        if not self.as_bar and (time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES or step == self.total_steps):
            self._last_line = time.monotonic()
            left = f"{readable_duration(self._mean_seconds * (self.total_steps - step))} left" if known else "starting"
            self.say(
                f"step {step:>6}/{self.total_steps} | loss {loss:7.4f} | norm {grad_norm:6.3f} | "
                f"lr {learning_rate:.2e} | {1000 * seconds:5.0f} ms | {tokens_per_second:9,.0f} tokens/s | {left}"
            )

    def evaluated(self, numbers: dict):
        """Log and show an evaluation; `numbers` as they stand in metrics.jsonl."""
        self.record(numbers)
        shown = [f"validation loss {numbers['validation_loss']:.4f}"]
        if "validation_bits_per_byte" in numbers:
            shown.append(f"{numbers['validation_bits_per_byte']:.3f} bits per byte")
        shown += [f"{name} {value:.4f}" for name, value in numbers.items() if name.startswith("hellaswag")]
        self.say(f"step {self.progress.step:>6}: {', '.join(shown)} ({numbers['evaluation_seconds']:.1f} s)")

    def sampled(self, prompt: str, texts: list[str]):
        """Log the samples to samples.jsonl, and show them, each on a line."""
        row = {"step": self.progress.step, "prompt": prompt, "samples": texts}
        with open(self.log.path.with_name("samples.jsonl"), "a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self.say("\n".join(f"    > {' '.join(text.split())}" for text in texts))

    def record(self, numbers: dict):
        """Append one row, stamped with step and tokens, to metrics.jsonl and to the trackers."""
        row = {"step": self.progress.step, "tokens": self.progress.tokens, **numbers}
        self.log.append(row)
        self.accelerator.log({k: v for k, v in row.items() if isinstance(v, int | float)}, step=self.progress.step)

    def close(self):
        """End the bar."""
        self.bar.close()
