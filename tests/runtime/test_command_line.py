"""The command line of every script: precedence, errors all at once, hints for likely slips, and --help."""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys

import pytest
from patience import PATIENCE_SECONDS
from warm_python import ROOT

from modeling_gpt2repro.data.prepare.arguments import PrepareArguments
from modeling_gpt2repro.evaluation.hellaswag.arguments import EvalHellaSwagArguments
from modeling_gpt2repro.evaluation.talk_arguments import TalkArguments
from modeling_gpt2repro.evaluation.validation_arguments import ValidationArguments
from modeling_gpt2repro.runtime.command_line import (
    InputErrors,
    arg,
    check_limits,
    exit_message_to_launcher,
    parse_command_line,
)
from modeling_gpt2repro.training import validate
from modeling_gpt2repro.training.arguments import TrainArguments
from modeling_gpt2repro.training.presets import PRESETS
from modeling_gpt2repro.training.recipes import RECIPES

GROUPS = {  # script -> titles in --help, without the part in parentheses
    TrainArguments: "run model data optimization evaluation checkpoints hub hardware",
    PrepareArguments: "text tokenizer shards hardware hub verification",
    EvalHellaSwagArguments: "model examples results hardware",
    ValidationArguments: "model data results hardware",
    TalkArguments: "model text sampling hardware",
}
LAUNCH_FLAGS = {"mixed_precision", "cpu", "num_processes", "config_file"}  # of `accelerate launch`
SLIPS = [
    pytest.param(script, slip, id=f"{script.__name__}-{slip}")
    for script in GROUPS
    for slips in script.flag_hints
    for slip in slips
]


@dataclasses.dataclass
class ToyArguments:
    """One field of each kind."""

    size: int = arg(default=3, minimum=1, help="A size.", group="numbers")
    rate: float = arg(default=0.5, above=0, below=1, help="A rate.")
    scale: float | None = arg(default=None, minimum=0, help="A scale. If not given, there is none.")
    kind: str = arg(default="red", choices=("red", "green-blue"), help="A kind.", group="words")
    words: list[str] = arg(default_factory=lambda: ["a b"], help="Some words.")
    loud: bool = arg(default=False, help="A switch.")

    def __post_init__(self):
        InputErrors(check_limits(self)).raise_if_any()


@dataclasses.dataclass
class ToyReader:
    """A value without a flag, beside a switch and a flag with a value."""

    file: str = arg(positional=True, help="A file.", group="input")
    loud: bool = arg(default=False, help="A switch.")
    words: str | None = arg(default=None, help="Words. If not given, there are none.")

    def __post_init__(self):
        InputErrors(["FILE is missing."] if self.file is None else []).raise_if_any()


def errors_of(capsys, script, argv, presets=None) -> str:
    """What is printed for a command line that is refused with exit code 2."""
    with pytest.raises(SystemExit) as exit_:
        parse_command_line(script, [str(word) for word in argv], presets)
    assert exit_.value.code == 2
    return capsys.readouterr().err


def help_of(capsys, script, argv=(), **options) -> str:
    with pytest.raises(SystemExit) as exit_:
        parse_command_line(script, [*argv, "--help"], **options)
    assert exit_.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_reaches_its_learning_rate(preset, tmp_path):
    words = ["--preset", preset, "--output_dir", str(tmp_path), "--shards", str(tmp_path)]
    args = parse_command_line(TrainArguments, words, PRESETS)
    args.set_lengths(tokens_per_epoch=366_080)  # Tiny Shakespeare with 2,048 ids
    assert args.total_steps > args.warmup_steps > 0
    assert args.sequences_per_step >= 1


def test_the_command_line_wins_over_the_preset_and_the_preset_over_the_default(tmp_path):
    words = ["--preset", "gpt2-350m", "--n_layer", "2", "--train_tokens", "1e9", "--output_dir", str(tmp_path)]
    args = parse_command_line(TrainArguments, words, PRESETS)
    assert (args.n_layer, args.n_embd, args.block_size, args.train_tokens) == (2, 1024, 1024, 10**9)


FINE_TUNING = ["--init_from", "gpt2"]
OWN_TEXT = ["--preset", "own-text"]


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (FINE_TUNING, {"learning_rate": 5e-5, "train_tokens": None, "num_train_epochs": 3, "n_layer": None}),
        ([*FINE_TUNING, "--preset", "gpt2-350m"], {"learning_rate": 5e-5, "n_layer": None, "tokens_per_step": 8192}),
        ([*FINE_TUNING, *OWN_TEXT], {"learning_rate": 5e-5, "block_size": None, "num_train_epochs": 3}),
        (
            [*FINE_TUNING, "--learning_rate", "1e-4", "--n_layer", "12", "--num_train_epochs", "2"],
            {"learning_rate": 1e-4, "n_layer": 12, "num_train_epochs": 2},
        ),
        # What follows from the tokens: a warm-up over a twentieth, ten evaluations, a checkpoint in the middle.
        (
            [*FINE_TUNING, "--train_tokens", "819200"],
            {"num_train_epochs": None, "total_steps": 100, "warmup_steps": 5, "eval_steps": 10, "save_steps": 50},
        ),
        ([*OWN_TEXT, "--train_tokens", "204800"], {"num_train_epochs": None, "total_steps": 100, "warmup_steps": 5}),
        ([*OWN_TEXT], {"num_train_epochs": 4, "train_tokens": None}),
        (["--preset", "quickstart", "--num_train_epochs", "0.5"], {"num_train_epochs": 0.5, "train_tokens": None}),
        (["--preset", "quickstart"], {"num_train_epochs": None, "train_tokens": 1_433_600, "eval_steps": 100}),
    ],
)
def test_defaults_depend_on_what_else_is_given_and_a_given_flag_always_counts(argv, expected, tmp_path):
    words = ["--shards", str(tmp_path), "--output_dir", str(tmp_path), *argv]
    args = parse_command_line(TrainArguments, words, PRESETS)
    assert {name: getattr(args, name) for name in expected} == expected


MUON = ["--recipe", "muon"]


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], ("adamw", 6e-4, 375_000_000, "cosine", 0.1)),
        (["--recipe", "lecture", *OWN_TEXT], ("adamw", 1e-3, None, "cosine", 0.1)),
        (["--recipe", "fast-adamw"], ("adamw", 1.8e-3, 131_072_000, "linear", 0)),
        (MUON, ("muon", 1.8e-3, 131_072_000, "linear", 0)),
        ([*MUON, "--preset", "gpt2-774m"], ("muon", 7.5e-4, 131_072_000, "linear", 0)),  # 3 x the preset's rate
        (["--preset", "gpt2-774m", *MUON], ("muon", 7.5e-4, 131_072_000, "linear", 0)),
        (["--recipe", "fast-adamw", "--preset", "quickstart"], ("adamw", 2e-3, 53_687, "linear", 0)),  # its own factor
        ([*MUON, "--learning_rate", "1e-3"], ("muon", 1e-3, 131_072_000, "linear", 0)),
        ([*MUON, "--optimizer", "adamw", "--warmup_tokens", "0"], ("adamw", 1.8e-3, 0, "linear", 0)),
        ([*MUON, "--lr_scheduler_type", "cosine"], ("muon", 1.8e-3, 131_072_000, "cosine", 0.1)),
        ([*MUON, *FINE_TUNING], ("muon", 5e-5, None, "linear", 0)),  # the defaults of fine-tuning
        ([*MUON, "--num_train_epochs", "2"], ("muon", 1.8e-3, None, "linear", 0)),
    ],
)
def test_a_recipe_wins_over_the_preset_and_the_command_line_over_the_recipe(argv, expected, tmp_path):
    words = ["--shards", str(tmp_path), "--output_dir", str(tmp_path), *argv]
    args = parse_command_line(TrainArguments, words, PRESETS)
    rate = (args.learning_rate, args.warmup_tokens, args.lr_scheduler_type, args.final_learning_rate_ratio)
    assert (args.optimizer, *rate) == expected


def test_a_preset_can_choose_the_recipe_and_the_command_line_another(tmp_path):
    presets = {"gpt2-124m": {"recipe": "muon", "learning_rate": 1e-3, "output_dir": str(tmp_path)}}
    for recipe, expected in ((None, ("muon", 3e-3)), ("lecture", ("adamw", 1e-3)), ("fast-adamw", ("adamw", 3e-3))):
        words = [] if recipe is None else ["--recipe", recipe]
        args = parse_command_line(TrainArguments, words, presets)
        assert (args.optimizer, args.learning_rate) == expected


def test_an_unknown_recipe_or_optimizer_is_refused_with_the_known_ones(capsys):
    printed = errors_of(capsys, TrainArguments, ["--recipe", "soap", "--optimizer", "sgd"], PRESETS)
    assert "recipe (soap) must be one of lecture, fast-adamw, muon.\n" in printed
    assert "optimizer (sgd) must be one of adamw, muon.\n" in printed
    assert "--recipe" in errors_of(capsys, TrainArguments, ["--recipe"], PRESETS)


@pytest.mark.parametrize("recipe", RECIPES)
def test_help_shows_the_values_of_the_recipe_and_of_the_preset(capsys, recipe):
    rate = {"lecture": 0.0003, "fast-adamw": 0.0009, "muon": 0.0009}[recipe]
    printed = " ".join(
        help_of(capsys, TrainArguments, ["--recipe", recipe, "--preset", "gpt2-350m"], presets=PRESETS).split()
    )
    assert f"Peak learning rate, reached after warm-up. (default: {rate})" in printed


def test_epochs_become_tokens_once_the_size_of_the_data_is_known(tmp_path):
    words = ["--shards", str(tmp_path), "--output_dir", str(tmp_path), "--num_train_epochs", "2.5"]
    args = parse_command_line(TrainArguments, words, PRESETS)
    args.set_lengths(tokens_per_epoch=1_000 * 524_288)
    assert (args.train_tokens, args.total_steps, args.warmup_steps) == (2_500 * 524_288, 2_500, 125)
    assert (args.eval_steps, args.save_steps) == (250, 1000)  # the defaults


def test_epochs_that_cannot_be_counted_are_refused(capsys, tmp_path):
    shards = ["--output_dir", str(tmp_path), "--shards", str(tmp_path)]
    both = errors_of(capsys, TrainArguments, [*shards, "--train_tokens", "1e9", "--num_train_epochs", "2"], PRESETS)
    assert ": num_train_epochs (2) and train_tokens (1000000000) exclude each other: give one.\n" in both
    for argv, epochs in ((OWN_TEXT, 4), (FINE_TUNING, 3), (["--num_train_epochs", "1.5"], 1.5)):
        printed = errors_of(capsys, TrainArguments, ["--output_dir", tmp_path, *argv], PRESETS)
        assert f": num_train_epochs ({epochs}) needs data of a known size, which a stream is not: prepare" in printed
    args = parse_command_line(TrainArguments, [*shards, "--num_train_epochs", "1"], PRESETS)
    expected = r"^num_train_epochs \(1, which is 5000 tokens\) must be at least one step: .* than 524288\.$"
    with pytest.raises(ValueError, match=expected):
        args.set_lengths(tokens_per_epoch=5000)


@pytest.mark.parametrize(
    ("argv", "field", "value"),
    [
        (["--size", "524_288"], "size", 524288),
        (["--size=1e3"], "size", 1000),
        (["--rate", "2.5e-1"], "rate", 0.25),
        (["--words", "a", "b c"], "words", ["a", "b c"]),
        (["--loud"], "loud", True),
        (["--loud", "false"], "loud", False),
        (["--loud", "--size", "2"], "loud", True),
        ([], "words", ["a b"]),
    ],
)
def test_values_of_each_kind(argv, field, value):
    assert getattr(parse_command_line(ToyArguments, argv), field) == value


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["a"], ("a", False, None)),
        (["a", "--loud"], ("a", True, None)),
        (["--loud", "a"], ("a", True, None)),
        (["--loud", "false", "a", "--words", "b c"], ("a", False, "b c")),
        (["--loud=true", "--words", "b", "a"], ("a", True, "b")),
        (["--words=b", "--loud", "a"], ("a", True, "b")),
        (["a", "--loud", "--words", "b"], ("a", True, "b")),
        (["--loud", "true", "true"], ("true", True, None)),
    ],
)
def test_a_value_without_a_flag_may_be_anywhere(argv, expected):
    assert dataclasses.astuple(parse_command_line(ToyReader, argv)) == expected


def test_a_missing_value_without_a_flag_is_reported_with_the_other_problems(capsys):
    assert errors_of(capsys, ToyReader, []).endswith(": FILE is missing.\n")
    printed = errors_of(capsys, ToyReader, ["--file", "a", "--fill=3"])
    assert "there is no flag --file: give FILE without a flag." in printed
    assert "there is no flag --fill=3; --help lists all." in printed  # --file is not one to suggest
    assert "FILE is missing" not in printed
    assert "'b' belongs to no flag" in errors_of(capsys, ToyReader, ["a", "b"])


def test_help_shows_a_value_without_a_flag_in_its_group(capsys):
    lines = help_of(capsys, ToyReader).splitlines()
    assert lines[0].endswith(" FILE [flags]")
    assert re.fullmatch(r"  FILE +A file\.", lines[lines.index("input:") + 1])


def test_all_problems_of_a_command_line_are_reported_together(capsys, tmp_path):
    (tmp_path / "run.json").write_text("{}")
    flags = {
        "n_layer": "three",
        "n_embd": 100,
        "tokens_per_step": 500000,
        "shards": "nowhere",
        "save_total_limit": -1,
        "frobnicate": 1,
        "output_dir": tmp_path,
        "hellaswag": "no.jsonl",
        "seed": -1,
    }
    printed = errors_of(capsys, TrainArguments, [w for name, v in flags.items() for w in (f"--{name}", v)], PRESETS)
    for expected in (
        "9 problems",
        "save_total_limit (-1) must be at least 0",
        "--n_layer takes a whole number, such as 12 or 1e9, not 'three'",
        "no flag --frobnicate",
        "n_embd (100) must be a multiple of n_head (12)",
        "tokens_per_step (500000) must be a multiple of block_size (1024): try 499712",
        "there is no folder nowhere",
        "holds another run",
        "there is no file no.jsonl",
        "seed (-1) must be at least 0",
    ):
        assert expected in printed


def test_limits_of_every_kind_are_reported_together():
    with pytest.raises(ValueError, match="size") as error:
        ToyArguments(size=0, rate=1.0, scale=-2, kind="blue")
    assert str(error.value).splitlines() == [
        "size (0) must be at least 1.",
        "rate (1.0) must be greater than 0 and less than 1.",
        "scale (-2) must be at least 0.",
        "kind (blue) must be one of red, green-blue.",
    ]
    for rate in (0.0, math.nan, -math.inf):
        with pytest.raises(ValueError, match=r"rate \(.*\) must be greater than 0 and less than 1\."):
            ToyArguments(rate=rate)
    assert ToyArguments(size=1, rate=1e-9, scale=0).scale == 0


AT_LEAST_1 = (
    "n_layer n_head n_embd block_size train_tokens tokens_per_step eval_tokens per_device_train_batch_size "
    "per_device_eval_batch_size logging_steps tokenizer_vocab_size max_skipped"
)
AT_LEAST_0 = (
    "warmup_tokens weight_decay adam_epsilon eval_steps save_steps save_total_limit keep_every num_samples "
    "sample_tokens seed"
)


@pytest.mark.parametrize(
    ("names", "value", "limit"),
    [
        (AT_LEAST_1, 0, "at least 1"),
        (AT_LEAST_0, -1, "at least 0"),
        ("learning_rate max_grad_norm price_per_hour num_train_epochs", 0.0, "greater than 0"),
        ("adam_beta1 adam_beta2 final_learning_rate_ratio validation_share", 1.0, "at least 0 and less than 1"),
        ("adam_beta1 adam_beta2 final_learning_rate_ratio validation_share", -0.1, "at least 0 and less than 1"),
    ],
)
def test_limits_of_a_training_run(names, value, limit):
    for name in names.split():
        with pytest.raises(ValueError, match=re.escape(f"{name} ({value}) must be {limit}.")):
            TrainArguments(**{name: value})


def test_an_unknown_preset_is_refused_with_the_known_ones(capsys):
    printed = errors_of(capsys, TrainArguments, ["--preset", "gpt5"], PRESETS)
    assert "preset (gpt5) must be one of gpt2-124m, gpt2-350m" in printed


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("price_per_hour", "12", "price_per_hour (12) is for --preflight's cost: add --preflight."),
        (
            "resume_from_checkpoint",
            "last",
            "there is no checkpoint folder last: give latest, a step-... folder, or owner/name@revision.",
        ),
        (
            "hellaswag",
            "None",
            "there is no file None for --hellaswag: give a .jsonl file, a Hub dataset owner/name, official, or none.",
        ),
        ("report_to", "tensorbord", "report_to (tensorbord) must be none or one of all, aim, tensorboard, wandb"),
        ("report_to", "wandb", "report_to (wandb) is not installed: install it with pip, or use none."),
    ],
)
def test_an_impossible_value_is_refused_with_the_possible_ones(capsys, monkeypatch, tmp_path, flag, value, message):
    monkeypatch.setattr(validate, "get_available_trackers", list)
    argv = [f"--{flag}", value, "--output_dir", tmp_path]
    assert f": {message}" in errors_of(capsys, TrainArguments, argv, PRESETS)


@pytest.mark.parametrize("hellaswag", ["none", "official", "ns/name", __file__])
def test_possible_values_of_hellaswag(hellaswag, tmp_path):
    assert TrainArguments(output_dir=str(tmp_path), hellaswag=hellaswag).hellaswag == hellaswag


@pytest.mark.parametrize(
    ("given", "question"),
    [
        ("--lerning_rate", ": did you mean --learning_rate?"),
        ("--outptu-dir=x", ": did you mean --output_dir?"),
        ("--tokens", ": did you mean --train_tokens or --tokens_per_step or --warmup_tokens?"),  # of five, the first
        ("--frobnicate", ";"),
    ],
)
def test_an_unknown_flag_is_reported_with_similar_ones(capsys, given, question):
    printed = errors_of(capsys, TrainArguments, [given, "-1"], PRESETS)
    assert f": there is no flag {given}{question} --help lists all.\n" in printed


@pytest.mark.parametrize(("script", "slip"), SLIPS)
def test_a_likely_slip_is_answered_with_what_to_use(script, slip, capsys):
    hint = next(hint for slips, hint in script.flag_hints.items() if slip in slips)
    names = {field.name for field in dataclasses.fields(script)}
    assert slip not in names
    assert set(re.findall(r"--(\w+)", hint)) <= names | LAUNCH_FLAGS
    assert f"there is no flag --{slip}: {hint}\n" in errors_of(capsys, script, [f"--{slip}", "8"])


@pytest.mark.parametrize(
    ("slip", "answer"),
    [
        ("--lr", "use --learning_rate."),
        ("--max-lr=6e-4", "use --learning_rate."),
        ("--epochs", "use --num_train_epochs for prepared data, "),
        ("--fp16", "precision is chosen at launch: accelerate launch --mixed_precision bf16 train_accelerate.py ..."),
        ("--config", "use --preset for hyperparameters; hardware is chosen by accelerate launch --config_file"),
    ],
)
def test_slips_from_nanogpt_and_the_trainer(slip, answer, capsys):
    assert f": there is no flag {slip}: {answer}" in errors_of(capsys, TrainArguments, [slip, "3"], PRESETS)


def test_a_value_without_a_flag_and_a_flag_without_a_value(capsys):
    assert "'config.py' belongs to no flag: put the flag before it." in errors_of(capsys, ToyArguments, ["config.py"])
    printed = errors_of(capsys, ToyArguments, ["--rate", "fast", "--size"])
    assert "--rate takes a number, not 'fast'." in printed
    assert "argument --size: expected one argument" in printed


def test_help_begins_with_the_description_and_lists_each_flag_once(capsys):
    argv = ["--preset", "quickstart"]
    printed = help_of(capsys, TrainArguments, argv, presets=PRESETS, description="What it is for.")
    assert printed.splitlines()[1:3] == ["", "What it is for."]
    assert "[flags]" in printed.splitlines()[0]
    assert "--tokens_per_step" in printed
    assert "--tokens-per-step" not in printed
    assert f"(default: {PRESETS['quickstart']['n_layer']})" in printed
    assert "default: None" not in " ".join(printed.split())
    assert parse_command_line(TrainArguments, ["--tokens-per-step", "2048"]).tokens_per_step == 2048


@pytest.mark.parametrize("script", GROUPS)
def test_help_has_every_flag_in_a_group_and_in_sentences(script, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    printed = help_of(capsys, script)
    titles = re.findall(r"^(\w+).*:$", printed, re.MULTILINE)
    assert titles == ["options", *GROUPS[script].split()]
    fields = dataclasses.fields(script)
    assert fields[0].metadata["group"]
    shown = [field.name.upper() if field.metadata["positional"] else f"--{field.name}" for field in fields]
    assert re.findall(r"^  (--\w+|[A-Z]+\b)", printed, re.MULTILINE) == shown
    for field in fields:
        assert field.metadata["help"].endswith("."), field.name
        if field.default is None:
            assert "not given" in field.metadata["help"], field.name
    assert max(map(len, printed.splitlines())) <= 100


def test_help_shows_kinds_choices_and_defaults(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    printed = help_of(capsys, ToyArguments)
    for line in (
        "--size INT            A size. (default: 3)",
        "--rate FLOAT          A rate. (default: 0.5)",
        "--scale FLOAT         A scale. If not given, there is none.",
        "--kind {red,green-blue}",
        "--words TEXT [TEXT ...]",
        "--loud [BOOL]         A switch. (default: False)",
    ):
        assert f"  {line}\n" in printed
    assert "(default: 10_000_000_000)" in " ".join(help_of(capsys, TrainArguments).split())


def test_errors_of_several_inputs_are_captured():
    def load(name, *, missing=()):
        if name in missing:
            raise ValueError(f"{name} is missing.\ngive another.")
        return f"{name} loaded"

    errors = InputErrors()
    errors.raise_if_any()
    assert errors.capture(load, "a", missing=["b"]) == "a loaded"
    assert errors.capture(load, "b", missing=["b"]) is None
    assert errors.capture(open, "/no/such/file") is None
    assert errors.messages[:2] == ["b is missing.", "give another."]
    with pytest.raises(ValueError, match="No such file") as error:
        errors.raise_if_any()
    assert len(str(error.value).splitlines()) == 3
    with pytest.raises(KeyError):  # a bug, not an input error
        errors.capture({}.__getitem__, "a")


def test_the_launcher_learns_the_message_that_a_program_exits_with(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    with pytest.raises(SystemExit), exit_message_to_launcher():
        raise SystemExit("out of memory: give less.")
    assert json.loads((tmp_path / "error.json").read_text())["message"] == "out of memory: give less."
    with pytest.raises(SystemExit), exit_message_to_launcher():
        raise SystemExit(3)  # has said why itself
    assert json.loads((tmp_path / "error.json").read_text())["message"] == "out of memory: give less."


def test_the_launchers_report_of_a_failure_ends_with_the_message(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from modeling_gpt2repro.runtime.command_line import exit_with_errors\nexit_with_errors(['a is 1.', 'b is 2.'])"
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", str(script)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GPT2REPRO_LAZY": "1"}
    result = subprocess.run(launcher, env=environment, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert result.returncode == 1
    message = "script.py: 2 problems; nothing was started:\n  - a is 1.\n  - b is 2.\n"
    assert message in result.stderr[: result.stderr.index("Root Cause")]
    last_lines = result.stderr[result.stderr.index("Root Cause") :]
    assert "exitcode  : 2 " in last_lines
    assert f"traceback : {message}==" in last_lines
