"""Which updates to skip: a loss or gradient norm that is NaN or infinite or, if asked for, an outlier."""

import torch

# The last 128 good steps define what is normal; there is no limit until there are as many (most of a warm-up).
WINDOW_STEPS = 128
# In robust standard deviations above the median. Of normally distributed values, one in a billion lies beyond.
MAX_DEVIATIONS = 6.0
# A deviation is at least this share of the median, so that after a very even stretch not everything is an outlier.
MIN_DEVIATION = 0.01
STD_OVER_MAD = 1.4826  # standard deviation over median absolute deviation, of a normal distribution


class OutlierDetector:
    """Decides which updates to skip.

    It reads numbers on the device that are equal on all processes, so all decide alike, and none waits for its GPU.
    """

    def __init__(self, device: torch.device, skip_outliers: bool = False):
        self.skip_outliers = skip_outliers  # NaN and infinity are always skipped
        self.window = torch.zeros(2, WINDOW_STEPS, device=device)  # ring buffer: losses and gradient norms
        self.good_steps = torch.zeros((), dtype=torch.int64, device=device)

    @torch.no_grad()
    def should_skip(self, loss: torch.Tensor, grad_norm: torch.Tensor) -> torch.Tensor:
        """Whether to skip the update, a boolean scalar on the device; the numbers of a good step enter the window."""
        values = torch.stack([loss.float(), grad_norm.float()])  # (2,)
        skip = ~values.isfinite().all()
        if self.skip_outliers:
            # Written without `if`: a Python condition on these tensors would wait for the device.
            is_outlier = (values > self.limits()).any()
            skip = skip | (is_outlier & (self.good_steps >= WINDOW_STEPS))
            index = self.good_steps % WINDOW_STEPS
            is_here = torch.arange(WINDOW_STEPS, device=values.device) == index  # (WINDOW_STEPS,)
            self.window = torch.where(is_here & ~skip, values[:, None], self.window)
            self.good_steps += ~skip
        return skip

    def limits(self) -> torch.Tensor:
        """The largest normal loss and gradient norm, (2,), once the window is full."""
        # Median and median absolute deviation, because mean and standard deviation are moved by the very outliers.
        median = self.window.sort(dim=1).values[:, WINDOW_STEPS // 2]
        deviation = (self.window - median[:, None]).abs().sort(dim=1).values[:, WINDOW_STEPS // 2]
        return median + MAX_DEVIATIONS * torch.maximum(STD_OVER_MAD * deviation, MIN_DEVIATION * median.abs())

    def state_dict(self) -> dict:
        """What a checkpoint keeps."""
        return {"window": self.window.tolist(), "good_steps": int(self.good_steps)} if self.skip_outliers else {}

    def load_state_dict(self, state: dict):
        """Continue from what a checkpoint kept; a run that skipped no outliers has kept nothing."""
        if state and self.skip_outliers:
            self.window = self.window.new_tensor(state["window"])
            self.good_steps.fill_(state["good_steps"])
