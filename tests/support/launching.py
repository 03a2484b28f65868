"""What `accelerate launch` makes of a configuration in accelerate_configs."""

from argparse import Namespace
from pathlib import Path

from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

CONFIGS = Path(__file__).parents[2] / "accelerate_configs"


def launcher_arguments(config: str, *more: str) -> Namespace:
    """The arguments of `accelerate launch` after it has read a configuration and its command line."""
    command = ["--config_file", str(CONFIGS / config), *more, "train_accelerate.py"]
    return _validate_launch_command(launch_command_parser().parse_args(command))[0]


def launcher_environment(config: str, *more: str) -> dict[str, str]:
    """The variables that it sets for each process, for accelerate to read there."""
    environment = prepare_multi_gpu_env(launcher_arguments(config, *more, "--main_process_port", "0"))
    return {name: value for name, value in environment.items() if name.startswith(("FSDP_", "ACCELERATE_"))}
