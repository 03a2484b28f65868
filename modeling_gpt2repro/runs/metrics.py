"""metrics.jsonl: every number of a run, one JSON object a row, `step` in each. Plots and cards read it."""

import json
import os
import sys
from pathlib import Path

METRICS_FILE = "metrics.jsonl"
INFINITE = (float("inf"), float("-inf"))  # with NaN, what JSON cannot say: null in the file


class MetricsLog:
    """Appends rows; a restart goes on in the same file after a row that says from which step.

    A full disk does not end a run: rows wait in memory until they can be written.
    """

    def __init__(self, output_dir: Path, resumed_step: int | None, enabled: bool, changed: dict | None = None):
        self.path, self.enabled = output_dir / METRICS_FILE, enabled
        self._waiting: list[str] = []
        if enabled and self.path.exists() and not self.path.read_bytes().endswith(b"\n"):
            self._waiting.append("")  # ends a line that a crash cut off
        if resumed_step is not None:
            self.append({"step": resumed_step, "event": "resume", "changed": changed or {}})

    def append(self, row: dict):
        """Write one row and flush it, so that a killed run has lost none."""
        assert "step" in row, "every row has its step"
        if self.enabled:
            known = {name: None if value != value or value in INFINITE else value for name, value in row.items()}
            self._waiting.append(json.dumps(known))
            self.flush()

    def flush(self):
        """Write the rows that wait; where that fails they go on waiting, and the file stays whole."""
        if not self._waiting:
            return
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write("".join(line + "\n" for line in self._waiting))
            self._waiting = []
        except OSError as error:
            if len(self._waiting) == 1:
                print(f"{self.path} cannot be written ({error.strerror}); its rows wait.", file=sys.stderr)
            if self.path.exists():
                os.truncate(self.path, size)
