"""metrics.jsonl: every number of a run, one JSON object a line, `step` in each. Plots and model cards read it."""

import json
import math
from pathlib import Path
from typing import NamedTuple

import torch

from modeling_gpt2repro.storage.append import LineAppender

from .deferred import DeferredWrites
from .folder import METRICS_FILE


class StepMetrics(NamedTuple):
    """The result of an optimizer step, as scalars on the device, equal on all processes: nothing waits for them."""

    loss: torch.Tensor  # nats per token, over all tokens of the step
    grad_norm: torch.Tensor  # before clipping, over all parameters
    skipped: torch.Tensor  # whether the update was left out
    # In fp16 only: the factor of the loss in the backward pass, and whether it was too large, so that no fault of the
    # loss or the gradients is the reason.
    loss_scale: torch.Tensor | None = None
    overflowed: torch.Tensor | None = None


class MetricsLog:
    """Appends records; a resumed run continues the file with a record that names the step it resumes from.

    A disk that refuses does not end a run: records wait in memory until they can be written.
    """

    def __init__(self, output_dir: Path, resumed_step: int | None, enabled: bool, changed: dict | None = None):
        self.path = output_dir / METRICS_FILE
        self.enabled = enabled
        self.deferred = DeferredWrites()  # of this and of the run's other files
        self._lines = LineAppender(self.path)
        if resumed_step is not None:
            self.append({"step": resumed_step, "event": "resume", "changed": changed or {}})

    def append(self, record: dict):
        """Write one record at once, so that a killed run loses none. NaN and infinity, not in JSON, are null."""
        assert "step" in record, "every record has its step"
        if self.enabled:
            nonfinite = [
                name for name, value in record.items() if isinstance(value, float) and not math.isfinite(value)
            ]
            self._lines.append(json.dumps({**record, **dict.fromkeys(nonfinite)}))
            self.deferred.write(METRICS_FILE, self._lines.flush)
