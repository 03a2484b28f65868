"""Score a causal language model on HellaSwag: a folder of ours, a model on the Hub, or stock GPT-2.

    python eval_hellaswag.py                                         # GPT-2 124M, 10,042 examples, both protocols
    python eval_hellaswag.py --model runs/gpt2-124m/model --output runs/gpt2-124m/hellaswag.json
    python eval_hellaswag.py --data hellaswag_val.jsonl --dtype bfloat16   # a local file: nothing is downloaded
    accelerate launch --multi_gpu eval_hellaswag.py --model openai-community/gpt2-xl
    python eval_hellaswag.py --compare runs/hellaswag/A.jsonl runs/hellaswag/B.jsonl

Two protocols share the name and give different numbers: see modeling_gpt2repro/evaluation/hellaswag/score.py.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from accelerate import PartialState

import modeling_gpt2repro  # noqa: F401 - registers our model, so that its folders need no remote code
from modeling_gpt2repro.evaluation.hellaswag import report
from modeling_gpt2repro.evaluation.hellaswag.arguments import EvalHellaSwagArguments
from modeling_gpt2repro.evaluation.hellaswag.compare import compare_scores
from modeling_gpt2repro.evaluation.hellaswag.examples import Example, load_hellaswag
from modeling_gpt2repro.evaluation.hellaswag.metrics import baseline_rank, summarize_by_protocol
from modeling_gpt2repro.evaluation.hellaswag.official import hellaswag_sha256, is_official_split
from modeling_gpt2repro.evaluation.hellaswag.samples import write_scores
from modeling_gpt2repro.evaluation.hellaswag.score import ExampleScores, gather_scores, score_task
from modeling_gpt2repro.evaluation.hellaswag.tokenize import HellaSwagTask, prepare_hellaswag
from modeling_gpt2repro.evaluation.load_model import load_causal_lm
from modeling_gpt2repro.runtime.collectives import call_main_process_first
from modeling_gpt2repro.runtime.command_line import exit_on_input_error, parse_command_line
from modeling_gpt2repro.runtime.network import choose_gloo_interface
from modeling_gpt2repro.runtime.progress import SteadyBar
from modeling_gpt2repro.storage.atomic import write_json


def main(argv: list[str] | None = None) -> None:
    args = parse_command_line(EvalHellaSwagArguments, argv, description=__doc__)
    with exit_on_input_error():
        if args.compare:
            return compare(args)
        choose_gloo_interface()
        state = PartialState(cpu=args.device == "cpu")
        device = state.device if state.num_processes > 1 else args.device
        # Data before model: a typo in --data should not cost the download of a model.
        examples = load_examples(args, state)
        started = time.perf_counter()
        model, tokenizer = call_main_process_first(
            state, lambda: load_causal_lm(args.model, args.dtype, device, args.trust_remote_code)
        )
        task = prepare_hellaswag(
            model,
            tokenizer,
            examples,
            protocols=args.protocols,
            batch_tokens=args.batch_tokens,
            process_index=state.process_index,
            num_processes=state.num_processes,
        )
        scores = score(args, model, task)
        if state.is_main_process:
            save_report(args, examples, scores, seconds=time.perf_counter() - started)
    state.destroy_process_group()


def load_examples(args: EvalHellaSwagArguments, state: PartialState) -> list[Example]:
    """The examples to score; an error names the flag."""
    try:
        return call_main_process_first(state, lambda: load_hellaswag(args.data, args.limit))
    except (OSError, ValueError) as error:
        raise ValueError(f"--data: {error}") from error


def score(args: EvalHellaSwagArguments, model: torch.nn.Module, task: HellaSwagTask) -> list[ExampleScores]:
    """Score this process's share of the examples, and gather the scores of all processes."""
    num_examples = len(task.lengths) // len(args.protocols)
    with SteadyBar(total=num_examples, unit="example", disable=not PartialState().is_main_process) as bar:
        try:
            scores = gather_scores(score_task(model, task, report.progress_callback(bar, args.protocols)))
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"--batch_tokens {task.batch_tokens} needs more memory than there is: halve it."
            ) from error
    if not all(example_scores.is_finite for example_scores in scores):
        raise ValueError(f"--model {args.model} gives NaN or infinite scores: try float32, or check its weights.")
    return scores


def save_report(
    args: EvalHellaSwagArguments, examples: Sequence[Example], scores: list[ExampleScores], seconds: float
) -> None:
    """Print the accuracies; save them as JSON, and beside them the scores of each example."""
    results = summarize_by_protocol(scores, args.protocols)
    ranks = {}
    if is_official_split(args.data, len(examples)):  # the published numbers are of all examples
        ranks = {p: baseline_rank(p, r["acc_norm"], r["acc_norm_interval"]) for p, r in results.items()}
    print("\n" + report.results_table(f"{args.model} on {args.data}: {seconds:.0f} s", results))
    print("\n" + report.ranks_text(ranks, len(examples)))
    write_scores(args.rows_file, scores, examples)
    numbers = {
        "model": args.model,
        "data": args.data,
        "data_sha256": hellaswag_sha256(args.data),
        "results": results,
        "standings": {protocol: asdict(rank) for protocol, rank in ranks.items()},
        "seconds": round(seconds, 3),
        "arguments": asdict(args),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    write_json(args.report_file, numbers)
    print(f"saved: {args.report_file}, and the scores of each example, for --compare: {args.rows_file}")


def compare(args: EvalHellaSwagArguments) -> None:
    """Print the paired difference of two saved evaluations, and save it if `--output` is given."""
    first, second = args.compare
    compared = compare_scores(first, second, args.protocols)
    print(report.comparison_table(first, second, compared))
    if args.output:
        numbers = {"first": first, "second": second, "results": report.comparison_json(compared)}
        write_json(Path(args.output), numbers)


if __name__ == "__main__":
    main()
