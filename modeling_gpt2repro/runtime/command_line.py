"""Command line of a script: flags from one dataclass, a grouped --help, and all input errors reported at once.

A field written with `arg` carries its help, its limits and, where a group of flags begins, the group's title:

    learning_rate: float = arg(default=6e-4, above=0, help="Peak learning rate.", group="optimization")

    train.py --learning_rate -1    ->    train.py: learning_rate (-1.0) must be greater than 0.    (exit code 2)
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import operator
import os
import re
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from difflib import get_close_matches
from types import NoneType
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from .progress import escape_controls

Arguments = TypeVar("Arguments")
Result = TypeVar("Result")

BOUNDS = {
    "minimum": ("at least", operator.ge),
    "above": ("greater than", operator.gt),
    "below": ("less than", operator.lt),
}
BOOLEANS = {
    **dict.fromkeys(("yes", "true", "t", "y", "1"), True),
    **dict.fromkeys(("no", "false", "f", "n", "0"), False),
}


def string_to_bool(text: str) -> bool:
    """'yes' -> True, '0' -> False; ValueError for 'maybe'."""
    if text.lower() not in BOOLEANS:
        raise ValueError(f"{text!r} is neither true nor false")
    return BOOLEANS[text.lower()]


METAVARS = {int: "INT", float: "FLOAT", str: "TEXT", string_to_bool: "BOOL"}
EXPECTED = {int: "a whole number, such as 12 or 1e9", float: "a number", string_to_bool: "true or false"}
# Console scripts of the installed package (pyproject.toml), each with the module that `python -m` would run instead.
CONSOLE_SCRIPTS = {
    "gpt2repro-train": "train_accelerate",
    "gpt2repro-prepare": "prepare_data",
    "gpt2repro-eval": "eval_hellaswag",
    "gpt2repro-talk": "modeling_gpt2repro.evaluation.talk",
    "gpt2repro-push": "modeling_gpt2repro.hub.push",
    "gpt2repro-configs": "modeling_gpt2repro.pretrain.launch_configs",
}
RANK_0_HEAD_START_SECONDS = 20  # a launcher ends the other ranks a few seconds after rank 0 has exited


def arg(
    *,
    help: str,
    group: str | None = None,
    minimum: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: Iterable[str] | None = None,
    positional: bool = False,
    **field_options: Any,
) -> Any:
    """A dataclass field with limits for `check_limits` and a group for `--help`.

    Args:
        help: Sentences for `--help`; a default other than None is added to them.
        group: Title of the group that begins with this field and lasts until the next title.
        minimum, above, below: Bounds of the value; it may equal the minimum, but neither of the others.
        positional: The value, a text, is given without a flag. None if it is missing: `__post_init__` must report that.
        field_options: `default` or `default_factory`, as for `dataclasses.field`.
    """
    limits = {"minimum": minimum, "above": above, "below": below, "choices": choices and tuple(choices)}
    metadata = {"help": help, "group": group, "positional": positional, **limits}
    return dataclasses.field(metadata=metadata, **field_options)


def check_limits(args: Any) -> Iterator[str]:
    """Yield a sentence for each field of the dataclass `args` outside its limits; None is always allowed."""
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        if value is None:
            continue
        choices = field.metadata.get("choices")
        if choices and value not in choices:
            yield f"{field.name} ({value}) must be one of {', '.join(choices)}."
        bounds = [(*BOUNDS[name], field.metadata[name]) for name in BOUNDS if field.metadata.get(name) is not None]
        # NaN, which compares as false with everything, is outside of every bound.
        if not all(is_inside(value, bound) for _, is_inside, bound in bounds):
            allowed = " and ".join(f"{wording} {bound}" for wording, _, bound in bounds)
            yield f"{field.name} ({value}) must be {allowed}."


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of the description and the hyphenated words of the help; adds each default."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, argparse.SUPPRESS):
            return as_typed(action.help)
        is_long = type(action.default) is int and action.default >= 100_000
        return f"{as_typed(action.help)} (default: {f'{action.default:_}' if is_long else '%(default)s'})"


class ArgumentParser(argparse.ArgumentParser):
    """A flag for each field of a dataclass, like transformers' HfArgumentParser, which takes a second to import.

    It collects bad values in `errors` and uses the default instead, to find the next one too. Integers may be written
    as 10e9 or 524_288, a boolean flag needs no value, and --a-b is taken for --a_b.
    """

    def __init__(self, arguments_class: type, description: str | None):
        self.errors: list[str] = []
        self.hints: Mapping[tuple[str, ...], str] = getattr(arguments_class, "flag_hints", {})
        self.group = self
        fields = dataclasses.fields(arguments_class)
        self.positionals = [field.name for field in fields if field.metadata.get("positional")]
        super().__init__(
            usage=" ".join(["%(prog)s", *map(str.upper, self.positionals), "[flags]"]),
            description=description and as_typed(description),
            formatter_class=HelpFormatter,
            allow_abbrev=False,
        )
        types = get_type_hints(arguments_class)
        for field in fields:
            self._add_field(field, types[field.name])

    def _add_field(self, field: dataclasses.Field, annotation: Any):
        """Add a field to its group. Its type is bool, int, float, str, a Literal or a list of these, or X | None."""
        if title := field.metadata.get("group"):
            self.group = self.add_argument_group(title)
        name = field.name
        help = field.metadata["help"]
        if name in self.positionals:
            action = self.group.add_argument(name, metavar=name.upper(), help=help)
            action.required = False  # argparse would stop here, and the other errors be lost
            return
        kind = annotation
        if NoneType in get_args(kind):  # X | None
            [kind] = set(get_args(kind)) - {NoneType}
        options: dict[str, Any] = {"help": help, "default": field.default}
        if field.default_factory is not dataclasses.MISSING:
            options["default"] = field.default_factory()
        if get_origin(kind) is list:
            [kind] = get_args(kind)
            options["nargs"] = "+"
        if get_origin(kind) is Literal:
            options["choices"] = get_args(kind)
        elif kind is bool:
            kind = string_to_bool
            options |= {"nargs": "?", "const": True}
        choices = field.metadata.get("choices")
        options["metavar"] = "{" + ",".join(choices) + "}" if choices else METAVARS.get(kind)
        action = self.group.add_argument(*dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")), **options)
        action.option_strings = [f"--{name}"]  # which --help lists; parsing does not read this
        if get_origin(kind) is not Literal:
            action.type = self._collect_errors(action, kind)

    def _collect_errors(self, action: argparse.Action, convert: Callable[[str], Any]) -> Callable[[str], Any]:
        def convert_or_default(text: str) -> Any:
            try:
                return whole_number(text) if convert is int else convert(text)
            except (ValueError, argparse.ArgumentTypeError):
                self.errors.append(f"--{action.dest} takes {EXPECTED[convert]}, not {text!r}.")
                return action.default

        return convert_or_default

    def separate_switches(self, argv: list[str]) -> list[str]:
        """['--loud', 'FILE'] -> ['--loud=true', 'FILE']: argparse would take the positional for the switch's value."""
        words = list(argv)
        for place, (word, value) in enumerate(itertools.pairwise(words)):
            action = self._option_string_actions.get(word)
            if self.positionals and action and action.const is True and not is_boolean(value):
                words[place] += "=true"
        return words

    def unknown_flag_message(self, word: str) -> str:
        """Say what to use instead: the class's own hint, else up to three flags with its words, else a near one."""
        name = word.partition("=")[0].lstrip("-").replace("-", "_")
        if name in self.positionals:
            return f"there is no flag {word}: give {name.upper()} without a flag."
        for slips, hint in self.hints.items():
            if name in slips:
                return f"there is no flag {word}: {hint}"
        flags = [action.dest for action in self._actions if action.option_strings]
        similar = [flag for flag in flags if set(name.split("_")) <= set(flag.split("_"))][:3]
        similar = similar or get_close_matches(name, flags, n=1, cutoff=0.75)
        question = f": did you mean {' or '.join(f'--{flag}' for flag in similar)}?" if similar else ";"
        return f"there is no flag {word}{question} --help lists all."

    def error(self, message: str) -> NoReturn:
        """Report what argparse cannot continue after, such as a flag without its value, with the errors so far."""
        exit_with_errors([*self.errors, message])


def is_boolean(text: str) -> bool:
    return text.lower() in BOOLEANS


def whole_number(text: str) -> int:
    """'524288', '524_288' or '10e9' -> int; ValueError for '1.5'."""
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
    presets: Mapping[str, Mapping[str, Any]] | None = None,
    description: str | None = None,
) -> Arguments:
    """Build the arguments of a script: field default < preset < defaults that come with a flag < command line.

    Args:
        arguments_class: A dataclass whose `__post_init__` raises a ValueError with one error per line. Its class
            attribute `flag_hints`, if it has one, maps likely wrong flags to what to use instead. Its `defaults_from`
            maps flags to a function from all defaults and their values to the defaults that it replaces, and its
            `defaults_with` maps a flag to the defaults that other flags have if it is given.
        presets: Name -> overrides of defaults, chosen by the field `preset`.

    Raises:
        SystemExit: With code 2, after all errors were printed, one per line.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = ArgumentParser(arguments_class, description)
    argv = parser.separate_switches(argv)
    names = [field.name for field in dataclasses.fields(arguments_class)]
    chosen = {}
    if presets:
        chosen["preset"] = chosen_value(parser, "preset", argv)
        parser.set_defaults(**presets.get(chosen["preset"], {}))  # an unknown preset is reported with the other errors
    for flags, derive in getattr(arguments_class, "defaults_from", {}).items():
        chosen |= {name: chosen_value(parser, name, argv) for name in flags}
        parser.set_defaults(**derive({name: parser.get_default(name) for name in names} | chosen))
    not_given = object()  # in place of defaults, to see which flags the command line has
    namespace, unknown = parser.parse_known_args(argv, argparse.Namespace(**dict.fromkeys(names, not_given)))
    given = {name: value for name, value in vars(namespace).items() if value is not not_given}
    values = {name: parser.get_default(name) for name in names}
    for flag, defaults in getattr(arguments_class, "defaults_with", {}).items():
        values |= defaults if flag in given else {}
    values |= given
    errors = InputErrors(parser.errors)
    unknown_flags = [word for word in unknown if re.match(r"-+[a-zA-Z]", word)]  # -1 is the value of one
    errors.messages += [parser.unknown_flag_message(word) for word in unknown_flags]
    if unknown and not unknown_flags:
        errors.messages.append(f"{' '.join(unknown)!r} belongs to no flag: put the flag before it.")
    arguments = errors.capture(arguments_class, **values)
    if errors.messages:
        exit_with_errors(errors.messages)
    return arguments


def chosen_value(parser: argparse.ArgumentParser, flag: str, argv: list[str]) -> str | None:
    """The value of a flag on which the defaults of others depend, so that it is read before them."""
    of_one_flag = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    of_one_flag.add_argument(f"--{flag}", nargs="?", dest="value", default=parser.get_default(flag))
    return of_one_flag.parse_known_args(argv)[0].value


def exit_with_errors(messages: list[str]) -> NoReturn:
    """Print the messages and exit with code 2.

    With several processes rank 0 prints first. The other ranks wait, and the launcher ends them meanwhile; only an
    error that rank 0 does not have is printed by another rank.
    """
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        time.sleep(RANK_0_HEAD_START_SECONDS)
    script = script_name()
    script += f", process {rank}" if rank != "0" else ""
    text = f"{script}: {messages[0]}"
    if len(messages) > 1:
        items = "".join(f"\n  - {message}" for message in messages)
        text = f"{script}: {len(messages)} problems; nothing was started:{items}"
    text = escape_controls(as_typed(text), kept="\n")  # names in it may be a stranger's
    print(text, file=sys.stderr)
    report_to_launcher(text)
    raise SystemExit(2)


def end(message: object, code: int = 2) -> NoReturn:
    """End a program that has no more to say than this; the message becomes one line, safe for a terminal."""
    print(escape_controls(" ".join(str(message).split())), file=sys.stderr)
    raise SystemExit(code)


def script_name() -> str:
    """What messages of the program begin with."""
    return "main" if is_notebook() else os.path.basename(sys.argv[0])


def console_script() -> str | None:
    """The name of the console script that started this program, such as gpt2repro-train; None if none did."""
    name = os.path.basename(sys.argv[0])
    return name if name in CONSOLE_SCRIPTS else None


def as_typed(text: str) -> str:
    """The commands in a text as one types them where the package is installed, if a console script started this.

    "python prepare_data.py --verify data" -> "gpt2repro-prepare --verify data"
    "accelerate launch --multi_gpu train_accelerate.py" -> "accelerate launch --multi_gpu -m train_accelerate"
    """
    if not console_script():
        return text
    # One process on the CPU is what the console script starts.
    text = text.replace("accelerate launch --config_file accelerate_configs/cpu.yaml ", "python ")
    for name, module in CONSOLE_SCRIPTS.items():
        text = re.sub(rf"(accelerate launch .*){re.escape(module)}\.py", rf"\1-m {module}", text)
        text = re.sub(rf"python -m {re.escape(module)}\b|(python )?\b{re.escape(module)}\.py", name, text)
    if "--config_file accelerate_configs/" in text:
        gap = "\n\n" if "\n" in text else " "
        text = f"{text.rstrip()}{gap}(gpt2repro-configs copies accelerate_configs/ here.)"
    return text


def is_notebook() -> bool:
    """Whether a person calls from a notebook, or types at Python's prompt; sys.argv is then of another program."""
    return hasattr(sys, "ps1")  # the prompt; IPython, and so Jupyter, sets it as well


def report_to_launcher(message: str):
    """Pass the message to torchrun, or `accelerate launch` of several processes, whose own report then ends with it.

    Without this, the report's last line says how to enable tracebacks, and the message is far above it.
    """
    if error_file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with contextlib.suppress(OSError), open(error_file, "w", encoding="utf-8") as file:
            json.dump({"message": message, "timestamp": str(int(time.time()))}, file)


@contextlib.contextmanager
def exit_message_to_launcher() -> Iterator[None]:
    """Give the launcher the message with which the block ends the program, see `report_to_launcher`."""
    try:
        yield
    except SystemExit as error:
        if isinstance(error.code, str):
            report_to_launcher(error.code)
        raise


class InputErrors:
    """Collects the errors of several inputs, to report them together.

    errors = InputErrors()
    tokenizer = errors.capture(load_tokenizer, args.tokenizer)
    examples = errors.capture(load_hellaswag, args.hellaswag)
    errors.raise_if_any()
    """

    def __init__(self, messages: Iterable[str] = ()):
        self.messages = list(messages)

    def capture(self, function: Callable[..., Result], *args: Any, **kwargs: Any) -> Result | None:
        """Call `function`; None instead of its result, and a message per line, if it raises ValueError or OSError."""
        try:
            return function(*args, **kwargs)
        except (ValueError, OSError) as error:
            self.messages += str(error).splitlines()
            return None

    def raise_if_any(self):
        """Raise one ValueError with a message per line, if there are any."""
        if self.messages:
            raise ValueError("\n".join(self.messages))


@contextlib.contextmanager
def explain_missing_package(purpose: str, instead: str = "") -> Iterator[None]:
    """Around the import of a package that most commands do without: a ValueError says what needs it.

    Args:
        instead: What to do without the package, such as ", or give a local file".
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{purpose} needs the package {error.name}, which is not installed: pip install {error.name}{instead}."
        ) from error


@contextlib.contextmanager
def exit_on_input_error() -> Iterator[None]:
    """Turn a ValueError or OSError of the block, raised by what the user named, into messages and exit code 2.

    A KeyboardInterrupt with a sentence, on what Ctrl-C has interrupted, becomes that sentence and exit code 130.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        exit_with_errors(str(error).splitlines())
    except KeyboardInterrupt as interrupt:
        if not interrupt.args:
            raise
        if os.environ.get("RANK", "0") == "0":
            print(f"\n{script_name()}: {interrupt}", file=sys.stderr)
        raise SystemExit(130) from None
