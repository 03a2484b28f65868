"""The model card: what the model is, how to use it, its results and how it was trained, read from the run's folder."""

import json
import re
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData, eval_result_entries_to_yaml, metadata_load
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from modeling_gpt2repro.modeling_gpt2repro import GPT2ReproForCausalLM
from modeling_gpt2repro.runs.assessment import assess
from modeling_gpt2repro.runs.config import is_complete
from modeling_gpt2repro.runs.folder import EVAL_RESULTS, LOSS_PICTURE, METRICS_FILE
from modeling_gpt2repro.runs.read import FINEWEB_EDU, HELLASWAG_METRICS, HUB_ID, Run, read_run
from modeling_gpt2repro.runs.summary import (
    HELLASWAG_DATASET,
    MAX_TEXT,
    built_in_text,
    plain_text,
    reproduce_section,
    result_lines,
    table,
    training_lines,
    used_public_hellaswag,
)
from modeling_gpt2repro.storage.model_files import find_file, loading_problem
from modeling_gpt2repro.training.arguments import DEFAULT_PROMPT, SAMPLE_PROMPTS

# Metadata that a card takes from another -> what a value must look like, so that it can be nothing but that.
INHERITED = {
    "license": r"[\w.+-]{1,96}",
    "license_name": r"[\w .+-]{1,96}",
    "license_link": r"https://[\w./%~+-]{1,300}|[\w.-]{1,96}",
    "language": r"[A-Za-z0-9-]{1,40}",
    "base_model": rf"{HUB_ID}|\w[\w.-]{{0,95}}",
}
MAX_VALUES = 100  # of one of them, such as languages
MAX_CARD_BYTES = 2**20
TASK = {"task_type": "text-generation", "task_name": "Text Generation"}
EXAMPLE_TOKENS = 30
MAX_PROMPTS = 3
CHAT_PROMPT = "Who are you?"
CARD = """---
{metadata}
---
# GPT-2, {parameters:,} parameters

{description} {config.n_layer} layers, {config.n_head} heads, width {config.n_embd}, context {config.n_positions:,},
vocabulary {config.vocab_size:,}. {behavior}

{needs}

```python
from transformers import pipeline

folder = "."  # path of this folder, or its name on the Hub
generator = pipeline("text-generation", model=folder{trust})
prompt = {prompt}
print(generator(prompt, max_new_tokens={tokens})[0]["generated_text"]{reply})
```
"""
OURS_NEEDS = """It needs `torch` and `transformers` 5.5 or newer; `trust_remote_code=True` lets them run the model's two
Python files, which lie beside its weights:"""
STOCK_NEEDS = "It needs `torch` and `transformers`, and no code of its own:"
CONTINUES = """It continues a text the way its training data would: it was not trained to follow
instructions, and it has learned the errors and biases of that data, too."""
REPLIES = """It replies to messages, as the conversations that it was fine-tuned on do, and its
chat template writes them; it has learned the errors and biases of its training data, too."""

HELLASWAG_NOTE = """HellaSwag is scored zero-shot: `completion` as build-nanogpt does it, `lm-eval` as
lm-evaluation-harness does. The two do not compare."""


@dataclass(frozen=True)
class Origin:
    """Where weights come from: the first sentence of their card, and the metadata that it inherits."""

    sentence: str
    metadata: dict = field(default_factory=dict)  # see `inherited_metadata`, which every card applies
    prompt: str | None = None  # for the card's example; None takes one that fits the run's data


FROM_SCRATCH = Origin("A GPT-2 trained from scratch.", {"license": "mit"})


def derived_origin(verb: str, source: str, revision: str | None = None) -> Origin:
    """The origin of weights derived from a folder or Hub id, with license and language from the card there.

    ("A GPT-2 fine-tuned from", "openai-community/gpt2") -> "A GPT-2 fine-tuned from openai-community/gpt2.", which is
    also the `base_model`. A folder is given by its name only, because the card is public and paths of this machine are
    not; `base_model` is then that of the folder's own card, because the Hub accepts only its own ids there.

    Raises:
        ValueError: If the card there has metadata that cannot be read.
    """
    is_local = Path(source).exists()
    try:
        # None if there is no card or it cannot be reached now: weights that are at hand can be used all the same.
        card = find_file(source, "README.md", revision)
        if card and card.stat().st_size > MAX_CARD_BYTES:
            raise ValueError(f"it has more than {MAX_CARD_BYTES:,} bytes")
        metadata = (metadata_load(card) if card else None) or {}
    except Exception as error:  # of YAML, which raises many kinds
        raise ValueError(
            f"{source}: the metadata of its README.md cannot be read ({loading_problem(error)}): correct it."
        ) from error
    metadata = inherited_metadata(metadata)
    if not is_local:
        metadata["base_model"] = source
    return Origin(f"{verb} {Path(source).name if is_local else source}.", metadata)


def inherited_metadata(metadata: dict) -> dict[str, str | list[str]]:
    """What a card may take from another one's metadata: values of INHERITED, each a word or a list of them.

    {"license": "mit", "language": ["en", 7], "base_model": "[x](http://x)"} -> {"license": "mit", "language": ["en"]}
    A license that is something else becomes "other", and not none at all.
    """
    kept = {}
    for name, pattern in INHERITED.items():
        value = metadata.get(name)
        values = value[:MAX_VALUES] if isinstance(value, list) else [value]
        fit = [word for word in values if isinstance(word, str) and re.fullmatch(pattern, word, re.ASCII)]
        if fit:
            kept[name] = fit if isinstance(value, list) else fit[0]
        elif value and name == "license":
            kept[name] = "other"
    return kept


def card_files(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    origin: Origin = FROM_SCRATCH,
    run_folder: Path | None = None,
) -> dict[str, str]:
    """File name in the model's folder -> text: README.md and, with public results, the Hub's files of them.

    Args:
        run_folder: Of the run that trained the model; without it there are no results.
    """
    run = None
    if run_folder and (run_folder / METRICS_FILE).is_file():
        with suppress(ValueError):  # a damaged run.json costs the card its results, but the run no checkpoint
            run = read_run(run_folder)
    evaluations = run.evaluations() if run else []
    card = front_page(model, tokenizer, origin, run, hub_results(run, evaluations[-1]) if evaluations else [])
    if evaluations:
        lines = result_lines(run, evaluations[-1])
        if (assessment := assess(run)) is not None:
            lines["loss curve"] = assessment.sentence
        card += f"\n## Results\n\n{table(lines)}"
        if any(name in evaluations[-1] for name in HELLASWAG_METRICS.values()):
            card += f"\n{HELLASWAG_NOTE}\n"
        if (run.folder / LOSS_PICTURE).is_file():
            card += f"\n![loss over training tokens]({LOSS_PICTURE})\n"
    if run and is_complete(run.config):
        card += f"\n## Training\n\n{table(training_lines(run))}"
        card += f"\n## Reproduce\n\n{reproduce_section(run)}"
    return {"README.md": card, **(eval_results(run, evaluations[-1]) if evaluations else {})}


def front_page(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    origin: Origin,
    run: Run | None,
    results: list[EvalResult],
) -> str:
    """The card's metadata, what the model is, and how to use it."""
    is_chat = bool(tokenizer.chat_template)
    prompts = [CHAT_PROMPT] if is_chat and not origin.prompt else example_prompts(origin, run)
    asked = [[{"role": "user", "content": prompt}] if is_chat else prompt for prompt in prompts]
    metadata = ModelCardData(
        **{"language": "en" if run and trained_on_english(run) else None, **inherited_metadata(origin.metadata)},
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["gpt2", "gpt2repro", *(["conversational"] if is_chat else [])],
        datasets=list(dict.fromkeys(dataset.name for dataset in run.hub_datasets())) or None if run else None,
        widget=[{"messages" if is_chat else "text": example} for example in asked],
        model_name="gpt2repro" if results else None,
        eval_results=results or None,
    )
    is_ours = isinstance(model, GPT2ReproForCausalLM)
    left = model.config.n_positions - len(tokenizer(prompts[0])["input_ids"])
    return CARD.format(
        metadata=metadata.to_yaml(),
        parameters=model.num_parameters(),
        description=plain_text(origin.sentence),
        config=model.config,
        behavior=REPLIES if is_chat else CONTINUES,
        needs=OURS_NEEDS if is_ours else STOCK_NEEDS,
        trust=", trust_remote_code=True" if is_ours else "",
        prompt=json.dumps(asked[0], ensure_ascii=False),
        tokens=max(1, min(EXAMPLE_TOKENS, left)),
        reply='[-1]["content"]' if is_chat else "",
    )


def example_prompts(origin: Origin, run: Run | None) -> list[str]:
    """What the card's example, and the Hub's page of the model, have it continue.

    The run's own, which may be somebody else's, where nothing is known that fits its data better.
    """
    name = built_in_text(run) if run else None
    if origin.prompt or name:
        return [origin.prompt or SAMPLE_PROMPTS[name]]
    own = run.config.get("arguments", {}).get("sample_prompts") if run else None
    fit = [text for text in own if is_prompt(text)] if isinstance(own, list) else []
    return fit[:MAX_PROMPTS] or [DEFAULT_PROMPT]


def is_prompt(text: object) -> bool:
    """Whether it is one short line, so that it is the same in JSON, YAML and Python."""
    return isinstance(text, str) and text.isprintable() and 0 < len(text) <= MAX_TEXT


def hub_results(run: Run, evaluation: dict) -> list[EvalResult]:
    """Results for the card's metadata, shown beside a model; only those on public data, which others can reproduce."""
    results = []
    dataset = run.dataset()
    if dataset and evaluation["validation_loss"] is not None:
        results.append(
            EvalResult(
                **TASK,
                dataset_type=dataset.name,
                dataset_name=dataset.name.split("/")[-1],
                dataset_config=dataset.config,
                dataset_revision=dataset.revision,
                metric_type="loss",
                metric_name="validation loss, nats per token",
                metric_value=evaluation["validation_loss"],
            )
        )
    for protocol, accuracy in public_hellaswag(run, evaluation).items():
        results.append(
            EvalResult(
                **TASK,
                dataset_type=HELLASWAG_DATASET,
                dataset_name="HellaSwag",
                dataset_split="validation",
                metric_type="acc_norm",
                metric_name=f"acc_norm ({protocol})",
                metric_value=accuracy,
            )
        )
    return results


def eval_results(run: Run, evaluation: dict) -> dict[str, str]:
    """File name -> YAML of each result on a benchmark, as the Hub reads it for its leaderboards.

    Format: https://huggingface.co/docs/hub/eval-results. A loss has no benchmark there.
    """
    files = {}
    for protocol, accuracy in public_hellaswag(run, evaluation).items():
        entry = EvalResultEntry(
            dataset_id=HELLASWAG_DATASET,
            task_id="hellaswag",
            value=accuracy,
            notes=f"acc_norm, zero-shot, {protocol} protocol, after {evaluation['tokens']:,} tokens of training",
        )
        files[EVAL_RESULTS.format(protocol)] = yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False)
    return files


def public_hellaswag(run: Run, evaluation: dict) -> dict[str, float]:
    """Protocol -> acc_norm on the examples that published numbers refer to."""
    scored = {protocol: evaluation.get(name) for protocol, name in HELLASWAG_METRICS.items()}
    is_public = used_public_hellaswag(run)
    return {protocol: value for protocol, value in scored.items() if is_public and value is not None}


def trained_on_english(run: Run) -> bool:
    """Whether its text is known to be English; the language of most text is not known."""
    dataset = run.dataset()
    return built_in_text(run) is not None or (dataset is not None and dataset.name == FINEWEB_EDU)
