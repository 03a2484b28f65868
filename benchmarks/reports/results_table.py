"""The table of `python -m benchmarks`: a line for each comparison in its results."""

from collections.abc import Callable, Iterator

from benchmarks.harness import benchmark_of, machine_name

MARKERS = ("<!-- written by python -m benchmarks -->\n", "<!-- until here -->")
Line = tuple[str, str, str, str]  # what, against what, how many times as fast, what else


def table(results: list[dict]) -> str:
    """In Markdown, with the machine, the versions and the clock under it."""
    if not results:
        return "nothing was measured\n"
    lines = [line for result in results if (of := LINES.get(benchmark_of(result))) for line in of(result)]
    head = ("what", "against", "times as fast (quartiles)", "")
    rows = "".join(f"| {' | '.join(cells)} |\n" for cells in (head, ("---",) * 4, *lines))
    machines = "; ".join(dict.fromkeys(machine_name(result["machine"]) for result in results))
    clock = " Ratios of processor time, for prepare of wall time." if all(map(by_processor_time, results)) else ""
    versions = {name: version for result in results for name, version in result["versions"].items()}
    return f"{rows}\n{machines}; {', '.join(f'{name} {version}' for name, version in versions.items())}.{clock}\n"


def times(ratio: dict[str, float]) -> str:
    low, median, high = (ratio[name] for name in ("lower_quartile", "median", "upper_quartile"))
    return f"{median:.2f} ({low:.2f} to {high:.2f})"


def by_processor_time(result: dict) -> bool:
    """Whether the ratios are of processor time, in which other programs do not count: on one thread of a CPU."""
    return result["machine"]["threads"] == 1 and "gpu" not in result["machine"]


def times_of(result: dict, ratios: dict[str, dict]) -> str:
    return times(ratios["cpu_seconds" if by_processor_time(result) else "seconds"])


def training_step(result: dict) -> Iterator[Line]:
    settings = result["settings"]
    mode = "compiled" if settings["compile"] else "eager"
    memory = result["peak_memory_bytes"]
    for peer in PEERS:
        if ratios := result.get(f"{peer}_over_ours"):
            what = f"a step of training, {settings['shape']}, {settings['dtype']}, {mode}"
            share = memory["ours"] / memory[peer]
            yield what, PEERS[peer], times_of(result, ratios), f"{share:.2f} of its memory, the same losses"


def speed_ladder(result: dict) -> Iterator[Line]:
    what = f"a step of training, {result['settings']['shape']}, all rungs of the ladder"
    yield what, "the lecture's first loop", times(result["total_gain"]), "the same losses"


def generation(result: dict) -> Iterator[Line]:
    settings = result["settings"]
    length = f"{settings['samples']} texts of {settings['prompt_tokens']} + {settings['new_tokens']} tokens"
    what = f"generation, {settings['shape']}, {length}"
    yield what, "the lecture's loop without a cache", times_of(result, result["lecture_over_ours"]), "the same texts"


def hellaswag(result: dict) -> Iterator[Line]:
    settings = result["settings"]
    what = f"HellaSwag, {settings['shape']}, {settings['dtype']}, {result['rows']['all']} examples"
    same = f"{result['answers']['same_acc_norm']} of {result['rows']['all']} predictions the same"
    yield what, "the lecture's loop", times_of(result, result["lecture_over_ours"]), same


def prepare(result: dict) -> Iterator[Line]:
    for workers, found in result["workers"].items():
        what = f"preparing {result['settings']['megabytes']:g} MB of text, workers: {workers}"
        yield what, "the lecture's fineweb.py", times(found["lecture_over_ours"]["seconds"]), "as many tokens"


def rows(result: dict) -> Iterator[Line]:
    what = f"opening {result['settings']['tokens']:,} tokens"
    yield what, "", "", f"{result['open_ms']:.0f} ms; {result['batch_ms']:.2f} ms a batch of 64 x 1,024"


def kill_resume(result: dict) -> Iterator[Line]:
    equal = "equal in every bit" if result["equal_bit_for_bit"] else f"differs in {', '.join(result['different'])}"
    yield f"a training that is killed {result['kills']} times", "one that is not", "", equal


PEERS = {
    "stock": "stock GPT-2, a plain loop with fused AdamW",
    "trainer": "stock GPT-2, transformers' Trainer",
    "lecture": "the lecture's model and loop",
}
LINES: dict[str, Callable[[dict], Iterator[Line]]] = {
    function.__name__: function
    for function in (training_step, speed_ladder, generation, hellaswag, prepare, rows, kill_resume)
}
