"""A model's card: what it is, how to use it, how good it is, and how it was trained, all read from the run's folder."""

from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData
from transformers import PreTrainedModel

from modeling_gpt2repro.modeling_gpt2repro import GPT2ReproForCausalLM
from modeling_gpt2repro.runs.folder import METRICS_FILE
from modeling_gpt2repro.runs.read import HELLASWAG_METRICS, Run, read_run

FROM_SCRATCH = "A GPT-2 trained from scratch."
LOSS_PICTURE = "loss.png"
HELLASWAG_DATASET = "Rowan/hellaswag"
CARD = """---
{metadata}
---
# GPT-2, {parameters:,} parameters

{origin} {config.n_layer} layers, {config.n_head} heads, width {config.n_embd}, context {config.n_positions}, vocabulary
{config.vocab_size}. It goes on with a text as its training data would: it was not taught to follow instructions, and
what is wrong or unfair in that data it has learned, too.

```python
from transformers import pipeline

folder = "."  # where this folder lies, or its name on the Hub
generator = pipeline("text-generation", model=folder{trust})
print(generator("Hello, I'm a language model,", max_new_tokens=30)[0]["generated_text"])
```
"""


def base_model_sentence(init_from: str | None) -> str:
    """A card's first sentence: where the weights come from; of a folder the name alone."""
    if not init_from:
        return FROM_SCRATCH
    return f"A GPT-2 trained on from {Path(init_from).name if Path(init_from).exists() else init_from}."


def model_card(model: PreTrainedModel, origin: str = FROM_SCRATCH, run_folder: Path | None = None) -> str:
    """The text of README.md.

    Args:
        model: Ours, or a stock GPT-2.
        origin: The first sentence.
        run_folder: The run it comes from; without it the card tells of no numbers.
    """
    run = read_run(run_folder) if run_folder and (run_folder / METRICS_FILE).is_file() else None
    evaluation = next((row for row in reversed(run.records if run else []) if "validation_loss" in row), None)
    results = hub_results(run, evaluation) if evaluation else []
    dataset = run.dataset() if run else None
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        license="mit" if origin == FROM_SCRATCH else None,
        tags=["gpt2", "gpt2repro"],
        datasets=[dataset] if dataset else None,
        model_name="gpt2repro" if results else None,
        eval_results=results or None,
    )
    text = CARD.format(
        metadata=metadata.to_yaml(),
        parameters=model.num_parameters(),
        origin=origin,
        config=model.config,
        trust=", trust_remote_code=True" if isinstance(model, GPT2ReproForCausalLM) else "",
    )
    if evaluation:
        text += f"\n## Results\n\n{table(result_lines(run, evaluation))}"
        if (run.folder / LOSS_PICTURE).is_file():
            text += f"\n![loss against tokens]({LOSS_PICTURE})\n"
    if run and run.config:
        text += f"\n## Training\n\n{table(training_lines(run))}"
    return text


def table(lines: dict[str, str]) -> str:
    """Two columns in Markdown."""
    return "| | |\n|---|---|\n" + "".join(f"| {name} | {value} |\n" for name, value in lines.items())


def result_lines(run: Run, evaluation: dict) -> dict[str, str]:
    """Name -> value: the run's last evaluation, and what its HellaSwag is to be measured by."""
    loss = "no number"  # of a model that has diverged
    if evaluation["validation_loss"] is not None:
        loss = f"{evaluation['validation_loss']:.4f} nats per token"
        loss += f" (perplexity {evaluation['validation_perplexity']:.2f}"
        if "validation_bits_per_byte" in evaluation:
            loss += f", {evaluation['validation_bits_per_byte']:.3f} bits per byte"
        loss += ")"
    lines = {
        "after": f"step {evaluation['step']:,}, {evaluation['tokens']:,} tokens",
        "validation loss": f"{loss} on {evaluation['validation_tokens']:,} tokens",
    }
    for protocol, name in HELLASWAG_METRICS.items():
        if name in evaluation:
            lines[f"HellaSwag acc_norm, {protocol}"] = f"{evaluation[name]:.4f}"
            if f"{name}_low" in evaluation:  # not in rows that a run has from before there were intervals
                low, high = evaluation[f"{name}_low"], evaluation[f"{name}_high"]
                lines[f"HellaSwag acc_norm, {protocol}"] += f" (95 %: {low:.4f} to {high:.4f})"
            published = run.hellaswag_baselines.get(protocol, {}).get("gpt2")
            if published and is_whole_hellaswag(run):
                lines[f"HellaSwag acc_norm, {protocol}"] += f"; OpenAI's gpt2 has {published:.4f}"
    return lines


def training_lines(run: Run) -> dict[str, str]:
    """Name -> value: data, recipe, machine and versions, as the run's record has them."""
    record, arguments = run.config, run.config["arguments"]
    hardware, versions = record["hardware"], record["versions"]
    seconds = sum(row["step_seconds"] for row in run.records if "step_seconds" in row)
    fingerprint = record["data"]["data"]
    own = "of its own"
    if arguments["dataset_name"] == "python-prose" and not (arguments.get("shards") or arguments.get("mix")):
        own = "the English prose in Python's documentation"
    lines = {
        "data": run.dataset() or own,
        "tokens": f"{arguments['train_tokens']:,}, {arguments['tokens_per_step']:,} a step",
        "learning rate": f"{arguments['learning_rate']:g} after {arguments['warmup_tokens']:,} tokens of warm-up, then "
        f"cosine to {arguments['final_learning_rate_ratio']:.0%} of it",
        "optimizer": f"AdamW, betas {arguments['adam_beta1']:g} and {arguments['adam_beta2']:g}, weight decay "
        f"{arguments['weight_decay']:g}, gradient norm at most {arguments['max_grad_norm']:g}",
        "seed": str(arguments["seed"]),
        "hardware": f"{hardware['processes']} x {hardware['device']}, {hardware['precision'].replace('no', 'fp32')}; "
        f"{seconds / 3600:.2f} hours of training",
        "software": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "code": f"gpt2repro, commit {record['commit'] or 'unknown'}",
    }
    if isinstance(fingerprint, str):  # of shards
        lines["data"] += f", shards with fingerprint {fingerprint[:12]}"
    return lines


def hub_results(run: Run, evaluation: dict) -> list[EvalResult]:
    """The numbers as the Hub shows them beside a model; only those of public data, which others can repeat."""
    task = {"task_type": "text-generation", "task_name": "Text Generation"}
    results = []
    dataset = run.dataset()
    if dataset and evaluation["validation_loss"] is not None:
        about = {"dataset_type": dataset, "dataset_name": dataset.split("/")[-1]}
        results.append(
            EvalResult(
                **task,
                **about,
                metric_type="loss",
                metric_name="validation loss, nats per token",
                metric_value=evaluation["validation_loss"],
            )
        )
    about = {"dataset_type": HELLASWAG_DATASET, "dataset_name": "HellaSwag", "dataset_split": "validation"}
    for protocol, name in HELLASWAG_METRICS.items():
        if name in evaluation and is_whole_hellaswag(run):
            results.append(
                EvalResult(
                    **task,
                    **about,
                    metric_type="acc_norm",
                    metric_name=f"acc_norm ({protocol})",
                    metric_value=evaluation[name],
                )
            )
    return results


def is_whole_hellaswag(run: Run) -> bool:
    """Whether the rows are those that others publish numbers of."""
    return run.config.get("arguments", {}).get("hellaswag") in (HELLASWAG_DATASET, "official")
