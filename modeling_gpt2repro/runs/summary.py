"""What a run was and what came of it, line by line, for the model card and the report."""

import re
import shlex
from collections.abc import Iterator, Mapping
from itertools import chain, groupby

from modeling_gpt2repro.runtime.hardware import readable_duration
from modeling_gpt2repro.storage.json_files import is_text

from .config import PACKAGES, PROJECT, project_address, without_folder
from .folder import MODEL_FOLDER
from .read import HELLASWAG_METRICS, HUB_ID, Run

HELLASWAG_DATASET = "Rowan/hellaswag"
BUILT_IN_DATA = {  # English, like FineWeb-Edu
    "python-prose": "the English prose in Python's documentation",
    "stories": "English stories that a program has put together at random, written for this purpose",
}
# An absolute path or one from another folder; no relative one, and no address such as https://...
PATH = re.compile(r"(?<![\w.:/\\~])(?:[A-Za-z]:|~[\w.-]*|\.\.)?[/\\][^\s,;:()'\"`|]+")
MAX_TEXT = 300  # characters of a line that somebody else has chosen
MAX_COMMAND = 2_000
PROGRAMS = r"python[\d.]*|accelerate|accelerate-launch|torchrun|gpt2repro-train"  # that start a training


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
    """Name -> value of data, hyperparameters, hardware and versions, from run.json."""
    arguments = run.config["arguments"]
    versions = dict(run.config["versions"])
    project_version = versions.pop(PROJECT, None)  # None in run.json of older versions
    changed = " with uncommitted changes" if run.config.get("has_uncommitted_changes") else ""
    seconds = sum(record.get("step_seconds") or 0.0 for record in run.records)
    name = built_in_text(run)
    data = BUILT_IN_DATA[name] if name else run.dataset() or "private"
    fingerprint = run.config["data"]["data"]
    if isinstance(fingerprint, str):  # of shards; a streamed dataset is described by a dict
        data += f", shards with fingerprint {plain_text(fingerprint[:12])}"
    return {
        "data": data,
        **({"contamination": plain_text(found)} if (found := run.config.get("contamination")) else {}),
        **stretched_lines(run),
        "seed": plain_text(arguments["seed"]),
        "hardware": f"{plain_text(describe_hardware(run.config['hardware']))}; "
        f"{readable_duration(seconds)} in training steps",
        "software": plain_text(", ".join(f"{name} {version}" for name, version in versions.items())),
        "code": f"{plain_text(f'{PROJECT} {project_version}') if project_version else PROJECT}, commit "
        f"{plain_text(run.config['commit'] or 'unknown')}{changed}",
    }


def describe_hardware(hardware: Mapping) -> str:
    """'8 x NVIDIA H100, bf16'."""
    precision = "fp32" if hardware["precision"] == "no" else hardware["precision"]
    return f"{hardware['processes']} x {hardware['device']}, {precision}"


def reproduce_section(run: Run) -> str:
    """How to train the same weights again: data, versions, commit, command, and what to compare; in Markdown.

    Of a run without a command in its run.json, of an older version or started by a program, it has all the rest.
    """
    config = run.config
    versions = config["versions"]
    code = f"{PROJECT} {versions[PROJECT]}" if versions.get(PROJECT) else PROJECT  # older versions did not write it
    code += f", with Python {versions.get('python', 'of an unknown version')}, seed {config['arguments']['seed']}"
    sentences = [
        f"Data: {'; '.join(data_sources(run))}.",
        f"Code: {plain_text(code)}.",
        "On the same kind of CPU, with as many processes, the weights are then the same to the bit."
        if re.search(r"\bCPU\b", str(config["hardware"]["device"]))
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
    elif run.stretches and run.stretches[-1][1] >= total_steps and is_text(output_dir):
        lines.append(f"sha256sum {shlex.quote(without_folder(output_dir))}/{MODEL_FOLDER}/model.safetensors")
        sentences.append("Compare the last line's hash with that of `model.safetensors` here.")
    return f"{' '.join(sentences)}\n\n{code_block(lines)}"


def data_sources(run: Run) -> Iterator[str]:
    """Each source of the training data, by name and revision or hash."""
    arguments = run.config["arguments"]
    data = run.config["data"]["data"]
    if type(data) is dict:  # a stream
        revision = f" at revision {plain_text(data['revision'])}" if data.get("revision") else ""
        yield f"{plain_text(data.get('dataset', 'a stream'))}{revision}"
        return
    if name := built_in_text(run):
        places = [f"{BUILT_IN_DATA[name]}, prepared by the command itself"]
    elif arguments.get("mix"):
        places = [part.rpartition(":")[0] for part in arguments["mix"].split(",")]
        places = [place if is_pinned(place) else "a prepared folder" for place in places]
    else:
        shards = arguments.get("shards")
        places = [shards if is_pinned(shards) else run.dataset() or "a prepared folder that is not public"]
    hashes = [data] if type(data) is str else [pair[0] if type(pair) is list and pair else "unknown" for pair in data]
    for place, fingerprint in zip(places, hashes, strict=False):
        yield f"{place if is_pinned(place) else plain_text(place)} (fingerprint {plain_text(fingerprint)})"


def installation(config: Mapping) -> list[str]:
    """The shell commands that install the code and packages of a run."""
    lines = []
    is_checkout = is_commit(config["commit"])
    if is_checkout:
        if address := project_address():
            lines.append(f"git clone {shlex.quote(address)} {PROJECT} && cd {PROJECT}")
        remark = "  # there were changes to it that no commit has" if config.get("has_uncommitted_changes") else ""
        lines.append(f"git checkout {config['commit']}{remark}")
    versions = {name: str(config["versions"].get(name)).partition("+")[0] for name in PACKAGES}  # 2.13.0+cpu
    pins = [f"{name}=={version}" for name, version in versions.items() if re.fullmatch(r"\d[\w.]{0,40}", version, re.A)]
    if pins:
        lines.append(shlex.join(["pip", "install", *pins, *(["-e", "."] if is_checkout else [])]))
    return lines


def shown_commands(run: Run) -> Iterator[tuple[str, str]]:
    """(comment, command) of each stretch of a run; of all in one where it always had the same command and hardware."""
    config = run.config
    environment = {**config["versions"], "commit": config["commit"]}
    stretches = []
    for first, last, arguments in run.stretches or [(1, 1, config["arguments"])]:
        hardware = {name: arguments.get(name, value) for name, value in config["hardware"].items()}
        changed = [f"{name} {arguments[name]}" for name in environment if name in arguments]
        where = ", ".join([describe_hardware(hardware), *changed])
        stretches.append((first, last, where, arguments.get("command") or config.get("command")))
    for (where, command), group in groupby(stretches, key=lambda stretch: stretch[2:]):
        same = list(group)
        first, last = same[0][0], same[-1][1]
        is_whole = len(same) == len(stretches) and first == 1
        start = [] if first == 1 else ["--resume_from_checkpoint", f"step-{first - 1:06d}"]
        start = ["--resume_from_checkpoint", "latest"] if same[0] is not stretches[0] else start
        comment = "" if is_whole else f"# steps {first:,} to {last:,}, on {where}"
        yield comment, shown_command(command, [*pinned_data(config), *start])


def shown_command(command: str | None, more: list[str]) -> str:
    """A command of run.json, in which whatever is not a plain word is quoted anew; "" if it starts no training.

    run.json may be somebody else's, and people paste commands into their shells.
    """
    try:
        words = shlex.split(command or "")
    except ValueError:  # a quotation mark without its partner
        return ""
    programs = [word for word in words if not re.fullmatch(r"OMP_NUM_THREADS=\d+", word)]
    if not programs or not re.fullmatch(PROGRAMS, programs[0]) or len(command) > MAX_COMMAND:
        return ""
    return shlex.join([*words, *more])


def pinned_data(config: Mapping) -> list[str]:
    """Flags that name the very revision of the data on the Hub which a run has read; the last of equal flags counts."""
    arguments = config["arguments"]
    data = config["data"]["data"]
    mix = arguments.get("mix")
    if type(data) is dict and is_commit(data.get("revision")):
        return ["--dataset_revision", data["revision"]]
    if is_pinned(arguments.get("shards")):
        return ["--shards", arguments["shards"]]
    if mix and all(is_pinned(part.rpartition(":")[0]) for part in mix.split(",")):
        return ["--mix", mix]
    return []


def is_commit(text: object) -> bool:
    """Whether it is a commit's hash, of git or of the Hub."""
    return type(text) is str and re.fullmatch(r"[0-9a-f]{6,64}", text) is not None


def is_pinned(text: object) -> bool:
    """Whether it is the address of a dataset on the Hub with its commit."""
    return type(text) is str and re.fullmatch(rf"hf://{HUB_ID}@[0-9a-f]{{40}}", text, re.ASCII) is not None


def code_block(lines: list[str]) -> str:
    """Shell commands, which no name in them can leave: each is one line, and none begins with a fence."""
    lines = ["".join(c if c.isprintable() else " " for c in line) for line in lines]
    return "\n".join(["```bash", *lines, "```", ""])


def stretched_lines(run: Run) -> dict[str, str]:
    """Name -> value of what may change when a run resumes; if it did, the values with the steps that had them."""
    lines = optimization_lines(run.config["arguments"])
    for name in lines:
        values = []
        for value, group in groupby(run.stretches, key=lambda stretch: optimization_lines(stretch[2])[name]):
            same = list(group)
            values.append((f"steps {same[0][0]:,} to {same[-1][1]:,}: ", value))
        if len(values) == 1 and run.stretches[0][0] == 1:
            lines[name] = values[0][1]
        elif values:
            lines[name] = "; ".join(steps + value for steps, value in values)
    return lines


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
        shape = f"constant, and in the last {arguments['cooldown_tokens']:,} tokens a line"
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


def last_part(path: str) -> str:
    """'/home/me/tokens/' -> 'tokens'."""
    return re.split(r"[/\\]+", path.rstrip("/\\"))[-1]
