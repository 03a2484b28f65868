"""How far a run is, and when something is due."""

from dataclasses import asdict, dataclass


@dataclass
class TrainState:
    """How far a run is."""

    step: int = 0  # optimizer steps done, skipped ones included
    tokens: int = 0  # training tokens seen, over all processes
    train_seconds: float = 0.0  # time spent in training steps, without evaluations and saves, over all restarts
    last_skipped: int = 0  # the last step whose update was skipped; 0 for none
    skipped_in_a_row: int = 0  # how many consecutive steps up to that one were skipped

    def advance(self, tokens: int):
        """Count one more step."""
        self.step += 1
        self.tokens += tokens

    def record_skip(self, step: int) -> int:
        """Note that a step was skipped; returns how many in a row that makes."""
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if step == self.last_skipped + 1 else 1
        self.last_skipped = step
        return self.skipped_in_a_row

    def state_dict(self) -> dict:
        """What a checkpoint keeps."""
        return asdict(self)

    def load_state_dict(self, state: dict):
        """Continue from what a checkpoint kept."""
        for name, value in state.items():
            setattr(self, name, value)


def is_due(step: int, every: int) -> bool:
    """Whether `step` is a multiple of `every`. Step 0 always is, and with `every` = 0 nothing else."""
    return step == 0 or (every > 0 and step % every == 0)
