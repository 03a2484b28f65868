"""metrics.jsonl: every number of a run, one JSON object a line, `step` in each. Plots and model cards read it."""

import json
import math
import os
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from .folder import METRICS_FILE


class StepMetrics(NamedTuple):
    """The result of an optimizer step, as scalars on the device, equal on all processes: nothing waits for them."""

    loss: torch.Tensor  # nats per token, over all tokens of the step
    grad_norm: torch.Tensor  # before clipping, over all parameters
    skipped: torch.Tensor  # whether the update was left out


class MetricsLog:
    """Appends records; a resumed run continues the file with a record that names the step it resumes from.

    A full disk does not end a run: records wait in memory until they can be written.
    """

    def __init__(self, output_dir: Path, resumed_step: int | None, enabled: bool, changed: dict | None = None):
        self.path = output_dir / METRICS_FILE
        self.enabled = enabled
        self._pending: list[str] = []
        if enabled and self.path.exists() and not self.path.read_bytes().endswith(b"\n"):
            self._pending.append("")  # ends a line that a crash cut off
        if resumed_step is not None:
            self.append({"step": resumed_step, "event": "resume", "changed": changed or {}})

    def append(self, record: dict):
        """Write one record and flush it, so that a killed run loses none. NaN and infinity, not in JSON, are null."""
        assert "step" in record, "every record has its step"
        if self.enabled:
            nonfinite = [
                name for name, value in record.items() if isinstance(value, float) and not math.isfinite(value)
            ]
            self._pending.append(json.dumps({**record, **dict.fromkeys(nonfinite)}))
            self.flush()

    def flush(self):
        """Write the pending records; if that fails they stay pending, and the file keeps whole lines only."""
        if not self._pending:
            return
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write("".join(line + "\n" for line in self._pending))
            self._pending = []
        except OSError as error:
            if len(self._pending) == 1:
                print(f"{self.path} cannot be written ({error.strerror}); its records wait.", file=sys.stderr)
            if self.path.exists():
                os.truncate(self.path, size)
