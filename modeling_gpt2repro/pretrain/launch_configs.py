"""Copy accelerate_configs/, the launch configurations, to where you work, to launch with them or to edit them.

    python -m modeling_gpt2repro.pretrain.launch_configs                    # the folder accelerate_configs, here
    python -m modeling_gpt2repro.pretrain.launch_configs my_configs

The repository has the folder at its top; an installed package has it inside. Files that you have edited are kept.
"""

import argparse
from pathlib import Path

from modeling_gpt2repro.runtime.command_line import as_typed, console_script, exit_on_input_error
from modeling_gpt2repro.storage.atomic import atomic_write

FOLDER = "accelerate_configs"
PACKAGE = Path(__file__).resolve().parents[1]


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(
        prog=console_script() or "python -m modeling_gpt2repro.pretrain.launch_configs",
        description=as_typed(__doc__),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, nargs="?", default=Path(FOLDER), help="Where to (default: %(default)s).")
    args = parser.parse_args(argv)
    with exit_on_input_error():
        for path in copy_configs(args.folder):
            print(path)
    launch = f"accelerate launch --config_file {args.folder / 'single_gpu.yaml'}"
    print(f"Train with one of them: {launch} -m train_accelerate --preset quickstart")


def copy_configs(folder: Path) -> list[Path]:
    """Copy each configuration, and the script for Slurm, into `folder`, unless it is there; returns the paths there.

    Raises:
        ValueError: If `folder` cannot be written.
    """
    installed = PACKAGE / FOLDER
    source = installed if installed.is_dir() else PACKAGE.parent / FOLDER  # the repository's
    try:
        contents = {folder / path.name: path.read_bytes() for path in sorted(source.iterdir()) if path.is_file()}
        for path, content in contents.items():
            if not path.exists():
                with atomic_write(path) as file:
                    file.write(content)
    except OSError as error:
        raise ValueError(f"{folder} cannot be written ({error.strerror}): give another folder.") from error
    return list(contents)


if __name__ == "__main__":
    main()
