"""The defaults of the training script; its command line is tested in tests/runtime/test_command_line.py."""

from modeling_gpt2repro.training.arguments import TrainArguments


def test_the_defaults_are_those_of_the_lecture():
    args = TrainArguments()
    assert (args.total_steps, args.warmup_steps, args.sequences_per_step) == (19073, 715, 512)
    assert args.tokens_per_step == 524288
