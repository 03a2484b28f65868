"""How far a run is, and when something is due."""

from modeling_gpt2repro.training.state import TrainState, is_due


def test_due_at_the_start_and_at_multiples():
    assert [step for step in range(7) if is_due(step, 3)] == [0, 3, 6]
    assert [step for step in range(7) if is_due(step, 0)] == [0]


def test_only_consecutive_skipped_steps_count_as_in_a_row():
    state = TrainState()
    assert [state.record_skip(step) for step in (3, 4, 5, 7, 8)] == [1, 2, 3, 1, 2]
