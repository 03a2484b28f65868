"""Which steps are not to be taken: a loss or gradient norm that is no number or, if asked for, far out of the usual."""

import torch

# The last 128 good steps say what is usual; the rule rests until there are as many (and through most of a warm-up).
WINDOW_STEPS = 128
# In robust standard deviations above the median. Of normally distributed values one in a billion lies beyond.
MOST_DEVIATIONS = 6.0
# A deviation is at least this share of the median, so that a very even stretch does not make everything an outlier.
LEAST_DEVIATION = 0.01
MAD_OF_NORMAL = 1.4826  # standard deviation over median absolute deviation, of a normal distribution


class OutlierDetector:
    """Decides on the device, from numbers that are the same on all processes; so they decide together, without waiting.

    Args:
        skip_outliers: Whether outliers are skipped; what is not finite always is.
    """

    def __init__(self, device: torch.device, skip_outliers: bool = False):
        self.skip_outliers = skip_outliers
        self.window = torch.zeros(2, WINDOW_STEPS, device=device)  # losses and gradient norms of good steps, in a ring
        self.good_steps = torch.zeros((), dtype=torch.int64, device=device)

    @torch.no_grad()
    def should_skip(self, loss: torch.Tensor, grad_norm: torch.Tensor) -> torch.Tensor:
        """Whether the step is to be skipped, a boolean scalar; takes the numbers of a good step into its window."""
        values = torch.stack([loss.float(), grad_norm.float()])  # (2,)
        bad = ~values.isfinite().all()
        if self.skip_outliers:
            bad = bad | ((values > self.limits()).any() & (self.good_steps >= WINDOW_STEPS))
            place = self.good_steps % WINDOW_STEPS
            here = torch.arange(WINDOW_STEPS, device=values.device) == place
            self.window = torch.where(here & ~bad, values[:, None], self.window)
            self.good_steps += ~bad
        return bad

    def limits(self) -> torch.Tensor:
        """The largest usual loss and gradient norm (2,), where the window is full."""
        median = self.window.sort(dim=1).values[:, WINDOW_STEPS // 2]
        deviations = (self.window - median[:, None]).abs().sort(dim=1).values[:, WINDOW_STEPS // 2]
        return median + MOST_DEVIATIONS * torch.maximum(MAD_OF_NORMAL * deviations, LEAST_DEVIATION * median.abs())

    def state_dict(self) -> dict:
        """What a checkpoint keeps."""
        return {"window": self.window.tolist(), "good_steps": int(self.good_steps)} if self.skip_outliers else {}

    def load_state_dict(self, state: dict):
        """Go on from what a checkpoint kept; a run without this rule has kept nothing."""
        if state and self.skip_outliers:
            self.window = torch.tensor(state["window"], device=self.window.device)
            self.good_steps.fill_(state["good_steps"])
