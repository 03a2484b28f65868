"""Command lines: one dataclass a script; every problem of a command line told at once, in words, with exit code 2."""

import argparse
import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import NoReturn, TypeVar

from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

Arguments = TypeVar("Arguments")
SECONDS_FOR_THE_FIRST_PROCESS = 20


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults behind the flags that have one, and the description as it is written."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class ArgumentParser(HfArgumentParser):
    """An `HfArgumentParser` that notes a bad value and goes on with the default, so that the next one is seen too.

    Whole numbers may be written as people write them: `10e9` for an `int` field is 10,000,000,000.
    """

    def __init__(self, arguments_class: type, description: str | None):
        self.problems: list[str] = []
        shown = {"usage": "%(prog)s [flags]", "description": description, "formatter_class": HelpFormatter}
        super().__init__(arguments_class, allow_abbrev=False, **shown)
        for action in self._actions:
            # --a-b is taken for --a_b, but not listed beside it.
            action.option_strings = [flag for flag in action.option_strings if "-" not in flag[2:]]
            if action.type is string_to_bool and action.nargs is None:
                action.nargs, action.const = "?", True  # the flag alone, where the default is None, too
            if action.option_strings and action.type is not None:
                action.type = self._forgiving(action, action.type)
                action.choices, action.allowed = None, action.choices
                if action.allowed and action.metavar is None:
                    action.metavar = "{" + ",".join(map(str, action.allowed)) + "}"

    def _forgiving(self, action: argparse.Action, convert: Callable) -> Callable:
        def converted(text: str):
            try:
                value = whole_number(text) if convert is int else convert(text)
            except (ValueError, TypeError, argparse.ArgumentTypeError):
                kind = {int: "a whole number, such as 12 or 1e9", float: "a number"}.get(convert, "true or false")
                self.problems.append(f"--{action.dest} takes {kind}, not {text!r}.")
                return action.default
            if action.allowed and value not in action.allowed:
                allowed = ", ".join(map(str, action.allowed))
                self.problems.append(f"--{action.dest} takes one of {allowed}, not {text!r}.")
                return action.default
            return value

        return converted

    def unknown_flag(self, word: str) -> str:
        """Told with the flags that may be meant: up to three that have its words, or one that is nearly it."""
        name = word.partition("=")[0].lstrip("-").replace("-", "_")
        names = [action.dest for action in self._actions]
        meant = [other for other in names if set(name.split("_")) <= set(other.split("_"))][:3]
        meant = meant or get_close_matches(name, names, n=1, cutoff=0.75)
        question = f": did you mean {' or '.join(f'--{other}' for other in meant)}?" if meant else ";"
        return f"there is no flag {word}{question} --help lists all."

    def error(self, message: str) -> NoReturn:
        exit_with_errors([*self.problems, message])


def whole_number(text: str) -> int:
    """'524288', '524_288' or '10e9' -> int; ValueError where it is not whole."""
    try:
        return int(text)
    except ValueError:
        number = float(text)
        if not number.is_integer():
            raise
        return int(number)


def parse_command_line(
    arguments_class: type[Arguments],
    argv: list[str] | None = None,
    presets: Mapping[str, Mapping] | None = None,
    description: str | None = None,
) -> Arguments:
    """Build the arguments of a script: field default < preset < command line.

    Args:
        arguments_class: A dataclass whose `__post_init__` raises a ValueError with one problem a line.
        argv: The words after the script's name; those of this process if None.
        presets: Name -> overrides of defaults, chosen by the field `preset`.
        description: Shown by `--help`.

    Raises:
        SystemExit: With code 2 and every problem in words, each with the value, the limit and what to do.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = ArgumentParser(arguments_class, description)
    if presets:
        chooser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        chooser.add_argument("--preset", nargs="?", default=parser.get_default("preset"))
        parser.set_defaults(**presets.get(chooser.parse_known_args(argv)[0].preset, {}))
    namespace, unknown = parser.parse_known_args(argv)
    problems = parser.problems
    problems += [parser.unknown_flag(word) for word in unknown if word.startswith("-")]
    if unknown and not any(word.startswith("-") for word in unknown):
        problems.append(f"{' '.join(unknown)!r} stands alone: put the flag it belongs to before it.")
    arguments = None
    try:
        arguments = arguments_class(**{f.name: getattr(namespace, f.name) for f in dataclasses.fields(arguments_class)})
    except ValueError as error:
        problems += str(error).splitlines()
    if problems:
        exit_with_errors(problems)
    return arguments


def exit_with_errors(problems: list[str]) -> NoReturn:
    """Print the problems and exit with code 2.

    Of several processes the first one speaks: the others wait, and the launcher ends them meanwhile. Only a problem
    that the first has not is told by another.
    """
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        time.sleep(SECONDS_FOR_THE_FIRST_PROCESS)
    script = os.path.basename(sys.argv[0]) + (f", process {rank}" if rank != "0" else "")
    if len(problems) == 1:
        print(f"{script}: {problems[0]}", file=sys.stderr)
    else:
        print(f"{script}: {len(problems)} problems; nothing was started:", file=sys.stderr)
        print("\n".join(f"  - {problem}" for problem in problems), file=sys.stderr)
    raise SystemExit(2)


class InputErrors:
    """Collects what is wrong with several inputs, so that all of it is told at once."""

    def __init__(self):
        self.found: list[str] = []

    def capture(self, function: Callable, *arguments):
        """Call a function; its ValueError or OSError is noted instead of raised, and None returned."""
        try:
            return function(*arguments)
        except (ValueError, OSError) as error:
            self.found += str(error).splitlines()

    def raise_if_any(self):
        """Raise one ValueError with a problem a line, if there are any."""
        if self.found:
            raise ValueError("\n".join(self.found))


@contextlib.contextmanager
def exit_on_input_error():
    """Around the opening of what a person named: each line of its ValueError or OSError is a problem; exit code 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        exit_with_errors(str(error).splitlines())
