"""What a run was and what came of it, line by line, for the model card and the report."""

import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, groupby
from typing import TypeVar

from modeling_gpt2repro.runtime.hardware import readable_duration
from modeling_gpt2repro.runtime.progress import PRIVATE_PATH, last_part
from modeling_gpt2repro.storage.json_files import is_text

from .config import PACKAGES, PROJECT, project_address, without_folder
from .folder import MODEL_FOLDER
from .read import HELLASWAG_METRICS, HubDataset, Run, hub_dataset, pinned_shards

Value = TypeVar("Value")

HELLASWAG_DATASET = "Rowan/hellaswag"
BUILT_IN_DATA = {  # English, like FineWeb-Edu
    "python-prose": "the English prose in Python's documentation",
    "stories": "English stories that a program has put together at random, written for this purpose",
}
PATH = re.compile(rf"{PRIVATE_PATH}[^\s,;:()'\"`|]+")
MAX_TEXT = 300  # characters of a line that somebody else has chosen
MAX_COMMAND = 2_000
UNDONE = "undone by a resume from an earlier checkpoint"
# The words with which a command starts a training, a line each. Each flag of a launcher has a value, except for the
# switches, so that no other program can be named: `python -c ...`, `torchrun --no_python ...`.
START = re.compile(
    r"""(?: gpt2repro-train
    | (?: python[\d.]* (?:\n-u)?
        | (?: accelerate\nlaunch | accelerate-launch | torchrun
            | python[\d.]* \n-m\n (?: accelerate\.commands\.launch | torch\.distributed\.run ) )
          (?: \n(?: -q | --(?: multi_gpu | cpu | use_fsdp | use_deepspeed | same_network | standalone | quiet | debug ))
            | \n--(?!mod|no[_-]?p)\w[\w-]* [=\n] (?!\S*\.(?:py|sh)\b)\w[\w./:,=+-]* )* )
      (?:\n-m)? \n(?:\w[\w-]*/)*train_accelerate(?:\.py)? )
    (?: \n-- | \Z )""",
    re.ASCII | re.VERBOSE,
)


def table(lines: dict[str, str]) -> str:
    """A Markdown table of two columns."""
    return "| | |\n|---|---|\n" + "".join(f"| {name} | {value} |\n" for name, value in lines.items())


def result_lines(run: Run, evaluation: dict) -> dict[str, str]:
    """Name -> value of the run's last evaluation, with OpenAI's GPT-2 for comparison."""
    loss = "not a number"  # null in metrics.jsonl, after the run has diverged
    if evaluation["validation_loss"] is not None:
        details = [f"perplexity {evaluation['validation_perplexity']:.2f}"]
        if "validation_bits_per_byte" in evaluation:
            details.append(f"{evaluation['validation_bits_per_byte']:.3f} bits per byte")
        loss = f"{evaluation['validation_loss']:.4f} nats per token ({', '.join(details)})"
    lines = {
        "after": f"step {evaluation['step']:,}, {evaluation['tokens']:,} tokens",
        "validation loss": f"{loss} on {evaluation['validation_tokens']:,} tokens",
    }
    if {"story_loss", "story_mentions_right"} <= evaluation.keys() and evaluation.get("story_floor"):
        ratio = evaluation["story_loss"] / evaluation["story_floor"]
        lines["whole held-out stories"] = (
            f"{evaluation['story_loss']:.2f} nats a story, {ratio:.3f} times the least that a model can have; "
            f"{evaluation['story_mentions_right']:.1%} of names, animals and things right"
        )
    for protocol, name in HELLASWAG_METRICS.items():
        if name not in evaluation:
            continue
        line = hellaswag_value(evaluation, protocol)
        published = run.hellaswag_baselines.get(protocol, {}).get("gpt2")
        if published and used_public_hellaswag(run):
            line += f"; OpenAI's gpt2 has {published:.4f}"
        lines[f"HellaSwag acc_norm, {protocol}"] = line
    return lines


def hellaswag_value(evaluation: Mapping, protocol: str) -> str:
    """'0.3001 (95 %: 0.2911 to 0.3091)', the acc_norm of one protocol; '' if it was not scored."""
    name = HELLASWAG_METRICS[protocol]
    if name not in evaluation:
        return ""
    text = f"{evaluation[name]:.4f}"
    if {f"{name}_low", f"{name}_high"} <= evaluation.keys():  # records of early versions have no interval
        text += f" (95 %: {evaluation[f'{name}_low']:.4f} to {evaluation[f'{name}_high']:.4f})"
    return text


def count_parameters(config: Mapping[str, int]) -> int:
    """Parameters of a GPT-2 with the sizes in config.json; the output layer is the token embedding.

    A block has 12 matrices of C x C and 13 vectors of C: attention's 4 and 4, the MLP's 8 and 5, two norms' 4.
    """
    C = config["n_embd"]
    block = 12 * C * C + 13 * C
    return (config["vocab_size"] + config["n_positions"]) * C + config["n_layer"] * block + 2 * C


def training_lines(run: Run) -> dict[str, str]:
    """Name -> value of data, hyperparameters, hardware, time and versions, from run.json and metrics.jsonl.

    What changed when the run was resumed is given with the steps that had it.
    """
    lines = {
        name: with_steps(stretches_by(run, lambda arguments, name=name: stretch_lines(run, arguments)[name]))
        for name in stretch_lines(run, run.config["arguments"])
    }
    of_code = {name: lines.pop(name) for name in ("software", "code")}
    found = run.config.get("contamination")  # None in run.json of older versions, too
    contamination = {"contamination": plain_text(found)} if found else {}
    return {"data": "; ".join(data_sources(run, digits=12)), **contamination, **lines, **time_line(run), **of_code}


def stretch_lines(run: Run, arguments: Mapping) -> dict[str, str]:
    """Name -> value of what may change when a run resumes, with the arguments of a stretch."""
    versions = {name: arguments.get(name, version) for name, version in run.config["versions"].items()}
    project_version = versions.pop(PROJECT, None)  # None in run.json of older versions
    project = plain_text(f"{PROJECT} {project_version}") if project_version else PROJECT
    if address := project_address():
        project = f"[{project}]({address})"
    commit = arguments.get("commit", run.config["commit"])
    changed = " with uncommitted changes" if run.config.get("has_uncommitted_changes") else ""
    return {
        **optimization_lines(arguments),
        "seed": plain_text(run.config["arguments"]["seed"]),
        "hardware": plain_text(describe_hardware(hardware_of(run, arguments))),
        "software": plain_text(", ".join(f"{name} {version}" for name, version in versions.items())),
        "code": f"{project}, commit {plain_text(commit or 'unknown')}{changed}",
    }


def time_line(run: Run) -> dict[str, str]:
    """The time of the training steps, each counted once, and what resuming from earlier checkpoints cost besides.

    "3 h 20 min in training steps (steps 1 to 500: 3 h 0 min; steps 501 to 1,000: 20 min)", where the hardware changed.
    """
    seconds = step_seconds(run.records)
    last = max((record["step"] for record in run.records), default=0)
    if not seconds:
        return {}
    text = f"{readable_duration(sum(seconds.values()))} in "
    # Steps of a run that this one continues, or lines of metrics.jsonl that a crash has damaged.
    text += "training steps" if len(seconds) == last else f"{len(seconds):,} of {last:,} training steps"
    machines = stretches_by(run, lambda arguments: describe_hardware(hardware_of(run, arguments)))
    if len(machines) > 1:
        parts = {(a, b): sum(spent for step, spent in seconds.items() if a <= step <= b) for a, b, _ in machines}
        text += f" ({with_steps([(*steps, readable_duration(spent)) for steps, spent in parts.items()])})"
    if undone := [record for record in run.undone_records if "loss" in record]:
        spent = sum(record.get("step_seconds") or 0.0 for record in undone)
        text += f"; {readable_duration(spent)} more in {len(undone):,} step{'s' * (len(undone) > 1)} {UNDONE}"
    return {"time": text}


def step_seconds(records: Iterable[Mapping]) -> dict[int, float]:
    """Training step -> its seconds, where they were recorded."""
    steps = (record for record in records if "loss" in record)
    return {record["step"]: record["step_seconds"] for record in steps if (record.get("step_seconds") or 0.0) > 0}


def hardware_of(run: Run, arguments: Mapping) -> dict:
    """The hardware of a stretch: that of run.json, and what had changed by then."""
    return {name: arguments.get(name, value) for name, value in run.config["hardware"].items()}


def describe_hardware(hardware: Mapping) -> str:
    """'8 x NVIDIA H100, bf16'."""
    precision = "fp32" if hardware["precision"] == "no" else hardware["precision"]
    return f"{hardware['processes']} x {hardware['device']}, {precision}"


def stretches_by(run: Run, value_of: Callable[[dict], Value]) -> list[tuple[int, int, Value]]:
    """First step, last step and value of each stretch of a run; neighbours with the same value are one.

    Args:
        value_of: Called with a stretch's arguments.
    """
    stretches = run.stretches or [(1, 1, run.config["arguments"])]  # no step has been made
    found = []
    for value, group in groupby(stretches, key=lambda stretch: value_of(stretch[2])):
        same = list(group)
        found.append((same[0][0], same[-1][1], value))
    return found


def with_steps(stretches: list[tuple[int, int, str]]) -> str:
    """[(1, 500, "a"), (501, 600, "b")] -> 'steps 1 to 500: a; steps 501 to 600: b'; one from the start, its value."""
    if len(stretches) == 1 and stretches[0][0] == 1:
        return stretches[0][2]
    return "; ".join(f"{numbered_steps(first, last)}: {value}" for first, last, value in stretches)


def numbered_steps(first: int, last: int) -> str:
    """(501, 1000) -> 'steps 501 to 1,000'."""
    return f"steps {first:,} to {last:,}" if last > first else f"step {first:,}"


def reproduce_section(run: Run) -> str:
    """How to train the same weights again: data, versions, commit, command, and what to compare; in Markdown.

    Of a run without a command in its run.json, of an older version or started by a program, it has all the rest.
    """
    config = run.config
    versions = config["versions"]
    code = f"{PROJECT} {versions[PROJECT]}" if versions.get(PROJECT) else PROJECT  # older versions did not write it
    code += f", with Python {versions.get('python', 'of an unknown version')}, seed {config['arguments']['seed']}"
    devices = [hardware_of(run, arguments)["device"] for _, _, arguments in run.stretches]
    sentences = [
        f"Data: {'; '.join(data_sources(run))}.",
        f"Code: {plain_text(code)}.",
        "On the same kind of CPU, with as many processes, the weights are then the same to the bit."
        if all(re.search(r"\bCPU\b", str(device)) for device in devices or [config["hardware"]["device"]])
        else "GPUs may add numbers up in another order each time, so the weights may differ by rounding.",
    ]
    commands = list(shown_commands(run))
    if len(commands) > 1:
        sentences.append("The run moved: stop each command (Ctrl-C) when the checkpoint of its last step is there.")
    lines = [*installation(config), *(line for lines in commands for line in lines if line)]
    total_steps = config["arguments"]["train_tokens"] // max(1, config["arguments"]["tokens_per_step"])
    output_dir = config["arguments"].get("output_dir")
    if not all(command for _, command in commands):
        sentences.append("The command is not known: give the arguments that are listed above.")
    elif run.stretches and run.stretches[-1][1] >= total_steps and is_text(output_dir) and len(output_dir) <= MAX_TEXT:
        lines.append(f"sha256sum {shlex.quote(without_folder(output_dir))}/{MODEL_FOLDER}/model.safetensors")
        sentences.append("Compare the last line's hash with that of `model.safetensors` here.")
    return f"{' '.join(sentences)}\n\n{code_block(lines)}"


def data_sources(run: Run, digits: int | None = None) -> Iterator[str]:
    """Each source of the training data, by name and revision or hash.

    Args:
        digits: Of a fingerprint; None for all.
    """
    arguments = run.config["arguments"]
    data = run.config["data"]["data"]
    if type(data) is dict:  # a stream
        source = hub_dataset(data)
        yield named(source) if source else plain_text(data.get("dataset", "a stream"))
        return
    if name := built_in_text(run):
        places = [f"{BUILT_IN_DATA[name]}, prepared by the command itself"]
    elif arguments.get("mix"):
        places = [part.rpartition(":")[0] for part in arguments["mix"].split(",")]
        places = [place if pinned_shards(place) else "a prepared folder" for place in places]
    else:
        shards = arguments.get("shards")
        sources = [named(dataset) for dataset in run.hub_datasets() if dataset != pinned_shards(shards)]
        sources += [shards] if pinned_shards(shards) else []
        places = [", prepared as ".join(sources) or "a prepared folder that is not public"]
    hashes = [data] if type(data) is str else [pair[0] if type(pair) is list and pair else "unknown" for pair in data]
    for place, fingerprint in zip(places, hashes, strict=False):
        yield f"{place} (fingerprint {plain_text(str(fingerprint)[:digits])})"


def named(dataset: HubDataset) -> str:
    """'owner/name (its configuration) at revision 5f0c...'."""
    config = f" ({plain_text(dataset.config)})" if dataset.config else ""
    return plain_text(dataset.name) + config + (f" at revision {dataset.revision}" if dataset.revision else "")


def installation(config: Mapping) -> list[str]:
    """The shell commands that install the code and packages of a run."""
    lines = []
    is_checkout = is_commit(config["commit"])
    if is_checkout:
        remarks = ["there were changes to it that no commit has"] if config.get("has_uncommitted_changes") else []
        if address := project_address():
            lines.append(f"git clone {shlex.quote(address)} {PROJECT} && cd {PROJECT}")
        else:
            remarks.insert(0, f"in a clone of {PROJECT}")
        lines.append(f"git checkout {config['commit']}" + (f"  # {', and '.join(remarks)}" if remarks else ""))
    versions = {name: str(config["versions"].get(name)).partition("+")[0] for name in PACKAGES}  # 2.13.0+cpu
    pins = [f"{name}=={version}" for name, version in versions.items() if re.fullmatch(r"\d[\w.]{0,40}", version, re.A)]
    if pins:
        lines.append(shlex.join(["pip", "install", *pins, *(["-e", "."] if is_checkout else [])]))
    return lines


def shown_commands(run: Run) -> Iterator[tuple[str, str]]:
    """(comment, command) of each stretch of a run; of all in one where it always had the same command and hardware."""
    config = run.config
    environment = {**config["versions"], "commit": config["commit"]}

    def where_and_command(arguments: dict) -> tuple[str, object]:
        changed = [f"{name} {arguments[name]}" for name in environment if name in arguments]
        where = ", ".join([describe_hardware(hardware_of(run, arguments)), *changed])
        return where, arguments.get("command") or config.get("command")

    stretches = stretches_by(run, where_and_command)
    for number, (first, last, (where, command)) in enumerate(stretches):
        is_whole = len(stretches) == 1 and first == 1
        start = [] if first == 1 else ["--resume_from_checkpoint", f"step-{first - 1:06d}" if number == 0 else "latest"]
        comment = "" if is_whole else f"# {numbered_steps(first, last)}, on {where[:MAX_TEXT]}"
        yield comment, shown_command(command, [*pinned_data(config), *start])


def shown_command(command: str | None, more: list[str]) -> str:
    """A command of run.json, in which whatever is not a plain word is quoted anew; "" if it starts no training.

    run.json may be somebody else's, and people paste commands into their shells.
    """
    try:
        words = shlex.split(command or "")
    except ValueError:  # a quotation mark without its partner
        return ""
    started = "\n".join(words[1:] if words and re.fullmatch(r"OMP_NUM_THREADS=\d+", words[0]) else words)
    if not START.match(started) or len(command) > MAX_COMMAND:
        return ""
    return shlex.join([*words, *more])


def pinned_data(config: Mapping) -> list[str]:
    """Flags that name the very revision of the data on the Hub which a run has read; the last of equal flags counts."""
    arguments = config["arguments"]
    data = config["data"]["data"]
    mix = arguments.get("mix")
    if type(data) is dict and is_commit(data.get("revision")):
        return ["--dataset_revision", data["revision"]]
    if pinned_shards(arguments.get("shards")):
        return ["--shards", arguments["shards"]]
    if mix and all(pinned_shards(part.rpartition(":")[0]) for part in mix.split(",")):
        return ["--mix", mix]
    return []


def is_commit(text: object) -> bool:
    """Whether it is a commit's hash, of git or of the Hub."""
    return type(text) is str and re.fullmatch(r"[0-9a-f]{6,64}", text) is not None


def code_block(lines: list[str]) -> str:
    """Shell commands, which no name in them can leave: each is one line, and none begins with a fence."""
    lines = ["".join(c if c.isprintable() else " " for c in line) for line in lines]
    return "\n".join(["```bash", *lines, "```", ""])


def optimization_lines(arguments: dict) -> dict[str, str]:
    """Name -> value of the training's length, learning rate and optimizer."""
    has_muon = arguments.get("optimizer") == "muon"  # run.json of older versions names none: AdamW
    name = "Muon for the matrices in the blocks, AdamW for the rest" if has_muon else "AdamW"
    return {
        "tokens": f"{arguments['train_tokens']:,}, {arguments['tokens_per_step']:,} per step",
        "learning rate": describe_schedule(arguments),
        "optimizer": f"{name}, betas {arguments['adam_beta1']:g} and {arguments['adam_beta2']:g}, weight decay "
        f"{arguments['weight_decay']:g}, gradient norm at most {arguments['max_grad_norm']:g}",
    }


def used_public_hellaswag(run: Run) -> bool:
    """Whether the run was scored on the examples that published numbers refer to, not on a file of its own."""
    return run.config.get("arguments", {}).get("hellaswag") in (HELLASWAG_DATASET, "official")


def built_in_text(run: Run) -> str | None:
    """Which of BUILT_IN_TEXTS it trained on; None if it trained on other data."""
    arguments = run.config.get("arguments", {})
    name = arguments.get("dataset_name")
    is_other = arguments.get("shards") or arguments.get("mix") or name not in BUILT_IN_DATA
    return None if is_other else name


def describe_schedule(arguments: Mapping) -> str:
    """'0.0006 after 375,000,000 tokens of warm-up, then a cosine to 6e-05'."""
    schedule = arguments.get("lr_scheduler_type", "cosine")
    text = f"{arguments['learning_rate']:g} after {arguments['warmup_tokens']:,} tokens of warm-up"
    if schedule == "constant":
        return f"{text}, then constant"
    shape = {"cosine": "a cosine", "linear": "a line"}.get(schedule)
    if schedule == "wsd":
        shape = f"constant, and in the last {arguments.get('cooldown_tokens') or 0:,} tokens a line"
    return f"{text}, then {shape} to {arguments['learning_rate'] * arguments['final_learning_rate_ratio']:g}"


def plain_text(text: object, limit: int = MAX_TEXT) -> str:
    """One line of at most `limit` printable characters in which nothing is Markdown or HTML.

    Names in a card may be somebody else's, and the person who pushes it answers for what it shows.
    """
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)[: 4 * limit]).split())
    line = line if len(line) <= limit else line[:limit] + "..."
    line = re.sub(r"([^\w\s.,+/'-]|(?<![^\W_])_|_(?![^\W_])|^[-+]|(?<=^\d)\.)", r"\\\1", line)  # not the _ of my_model
    return re.sub(r"(?i)(www)\.", r"\1\.", line)  # which would become a link


def without_paths(text: str, run: Run) -> str:
    """'resume with --shards /home/me/tokens' -> 'resume with --shards tokens', for what is shown to others.

    Paths among the run's arguments may have spaces; of other paths, only those without are recognized.
    """
    arguments = [run.config.get("arguments", {}), *(then for _, _, then in run.stretches)]
    values = {value for value in chain.from_iterable(each.values() for each in arguments) if isinstance(value, str)}
    known = [value for value in {*values, str(run.folder.absolute())} if PATH.match(value)]
    for value in sorted(known, key=len, reverse=True):
        text = text.replace(value, last_part(value))
    return PATH.sub(lambda found: last_part(found[0]), text)
