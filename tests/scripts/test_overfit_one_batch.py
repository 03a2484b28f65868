"""`--overfit_one_batch`: the whole loop learns one batch by heart, and such a run is not mixed up with a usual one."""

import pytest
from toy_runs import logged_values, train_here


def test_a_run_learns_its_only_batch_by_heart_and_does_not_continue_with_others(shards, tmp_path, capsys):
    flags = {"overfit_one_batch": True, "tokens_per_step": 64, "per_device_train_batch_size": 2}
    flags |= {"train_tokens": 80 * 64, "warmup_tokens": 0, "learning_rate": 1e-2, "eval_tokens": 32}
    flags |= {"eval_steps": 0, "save_steps": 0, "num_samples": 0, "hellaswag": "none"}
    assert train_here(tmp_path, shards, **flags) == 0
    losses = logged_values(tmp_path)
    assert losses[0] == pytest.approx(5.7, abs=0.1)  # ln(300)
    assert losses[-1] < 0.1
    assert logged_values(tmp_path, "validation_loss")[-1] > 2
    printed = capsys.readouterr().out
    assert "for validation; every step trains on the same 2 sequences of them\n" in printed
    assert "epochs       0.02 of the training data\n" in printed
    longer = flags | {"train_tokens": 82 * 64, "resume_from_checkpoint": "latest"}
    assert train_here(tmp_path, shards, **longer | {"overfit_one_batch": False}) == 2
    assert "was made with overfit_one_batch True, not False" in capsys.readouterr().err
    assert train_here(tmp_path, shards, **longer) == 0
    assert max(logged_values(tmp_path)[80:]) < 0.5
