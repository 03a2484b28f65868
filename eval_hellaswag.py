"""Score a causal language model on HellaSwag: a folder of ours, a model on the Hub, or stock GPT-2.

    python eval_hellaswag.py                                             # GPT-2 124M, 10,042 rows, both protocols
    python eval_hellaswag.py --model runs/gpt2-124m/model --output runs/gpt2-124m/hellaswag.json
    python eval_hellaswag.py --data hellaswag_val.jsonl --dtype bfloat16   # a local file: nothing is downloaded
    accelerate launch --multi_gpu eval_hellaswag.py --model openai-community/gpt2-xl
    python eval_hellaswag.py --compare runs/hellaswag/A.jsonl runs/hellaswag/B.jsonl

Two protocols share the name HellaSwag and give different numbers; modeling_gpt2repro/evaluation/hellaswag.py says how.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from accelerate import PartialState
from tqdm import tqdm

import modeling_gpt2repro  # noqa: F401 - registers our model, so that its folders need no remote code
from modeling_gpt2repro.evaluation.distributed import gather_results
from modeling_gpt2repro.evaluation.hellaswag.arguments import EvalHellaSwagArguments
from modeling_gpt2repro.evaluation.hellaswag.compare import compare_results
from modeling_gpt2repro.evaluation.hellaswag.examples import Example, load_hellaswag
from modeling_gpt2repro.evaluation.hellaswag.metrics import baseline_rank
from modeling_gpt2repro.evaluation.hellaswag.official import OFFICIAL_ROWS, are_official, hellaswag_sha256
from modeling_gpt2repro.evaluation.hellaswag.report import (
    comparison_numbers,
    comparison_table,
    progress_on,
    rank_sentence,
    results_table,
)
from modeling_gpt2repro.evaluation.hellaswag.samples import write_results
from modeling_gpt2repro.evaluation.hellaswag.score import ExampleScores, score_task
from modeling_gpt2repro.evaluation.hellaswag.tokenize import prepare_hellaswag
from modeling_gpt2repro.evaluation.load_model import load_causal_lm
from modeling_gpt2repro.runtime.collectives import call_main_process_first
from modeling_gpt2repro.runtime.command_line import exit_on_input_error, parse_command_line
from modeling_gpt2repro.storage.atomic import atomic_write


def main(argv: list[str] | None = None) -> None:
    """Score one model and save what it said, or compare two such results."""
    args = parse_command_line(EvalHellaSwagArguments, argv, description=__doc__)
    with exit_on_input_error():
        if args.compare:
            return compare(args)
        state = PartialState(cpu=args.device == "cpu")
        rows = load_rows(args, state)
        started = time.perf_counter()
        results = score(args, state, rows)
        if state.is_main_process:
            report(args, rows, results, time.perf_counter() - started)
    state.destroy_process_group()


def load_rows(args: EvalHellaSwagArguments, state: PartialState) -> list[Example]:
    """The rows to score; ValueError that names the flag where they cannot be had."""
    try:
        return call_main_process_first(state, lambda: load_hellaswag(args.data, args.limit))
    except (OSError, ValueError) as error:
        raise ValueError(f"--data: {error}") from error


def score(args: EvalHellaSwagArguments, state: PartialState, rows: Sequence[Example]) -> list[ExampleScores]:
    """What the model says to every row: each process scores its share, and all get the whole.

    Raises:
        ValueError: The model cannot be had or scored, or memory runs out.
    """
    device = state.device if state.num_processes > 1 else args.device
    model, tokenizer = call_main_process_first(
        state, lambda: load_causal_lm(args.model, args.dtype, device, args.trust_remote_code)
    )
    place = (args.batch_tokens, state.process_index, state.num_processes)
    task = prepare_hellaswag(model, tokenizer, rows, args.protocols, *place)
    mine = len(task.lengths) // len(args.protocols)
    with tqdm(total=mine, unit="row", disable=not state.is_main_process) as bar:
        try:
            results = gather_results(score_task(model, task, progress_on(bar, args.protocols)))
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"--batch_tokens {task.batch_tokens} is more than {device} has memory for: halve it."
            ) from error
    if not all(result.is_finite for result in results):
        raise ValueError(f"--model {args.model} gives NaN or infinite scores: try float32, or check its weights.")
    return results


def report(args: EvalHellaSwagArguments, rows: Sequence[Example], results: list[ExampleScores], seconds: float):
    """Print the table; save the numbers and what the model said to each row."""
    from modeling_gpt2repro.evaluation.hellaswag.evaluate_metric import accuracies_of  # late: it imports evaluate

    numbers = accuracies_of(results, args.protocols)
    print("\n" + results_table(f"{args.model} on {args.data}: {seconds:.0f} s", numbers) + "\n")
    standings = {}
    if are_official(args.data, len(rows)):
        standings = {p: baseline_rank(p, r["acc_norm"], r["acc_norm_interval"]) for p, r in numbers.items()}
        print("\n".join(rank_sentence(protocol, place) for protocol, place in standings.items()))
    else:
        print(
            f"These {len(rows):,} rows are not the official {OFFICIAL_ROWS:,}: the published numbers do not measure "
            "them."
        )
    write_results(args.rows_file, results, rows)
    write_json(
        args.report_file,
        {
            "model": args.model,
            "data": args.data,
            "data_sha256": hellaswag_sha256(args.data),
            "results": numbers,
            "standings": {protocol: place.as_json() for protocol, place in standings.items()},
            "seconds": round(seconds, 3),
            "arguments": asdict(args),
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        },
    )
    print(f"saved: {args.report_file}, and row by row, for --compare: {args.rows_file}")


def compare(args: EvalHellaSwagArguments) -> None:
    """Print how two saved results differ, row by row, and save that where `--output` says."""
    first, second = args.compare
    compared = compare_results(first, second, args.protocols)
    print(comparison_table(first, second, compared))
    if args.output:
        numbers = {p: {name: comparison_numbers(pair) for name, pair in by.items()} for p, by in compared.items()}
        write_json(Path(args.output), {"first": first, "second": second, "results": numbers})


def write_json(path: Path, numbers: Mapping) -> None:
    """Whole or not at all."""
    with atomic_write(path) as file:
        file.write(json.dumps(numbers, indent=2).encode() + b"\n")


if __name__ == "__main__":
    main()
