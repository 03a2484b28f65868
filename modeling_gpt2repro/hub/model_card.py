"""The model card: what the model is, how to use it, its results and how it was trained, read from the run's folder."""

import json
import re
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData, metadata_load
from transformers import PreTrainedModel

from modeling_gpt2repro.modeling_gpt2repro import GPT2ReproForCausalLM
from modeling_gpt2repro.runs.assessment import assess
from modeling_gpt2repro.runs.config import is_complete
from modeling_gpt2repro.runs.folder import LOSS_PICTURE, METRICS_FILE
from modeling_gpt2repro.runs.read import FINEWEB_EDU, HELLASWAG_METRICS, HUB_ID, Run, read_run
from modeling_gpt2repro.runs.summary import (
    HELLASWAG_DATASET,
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
    "base_model": rf"{HUB_ID}|[\w.-]{{1,96}}",
}
MAX_VALUES = 100  # of one of them, such as languages
MAX_CARD_BYTES = 2**20
TASK = {"task_type": "text-generation", "task_name": "Text Generation"}
CARD = """---
{metadata}
---
# GPT-2, {parameters:,} parameters

{description} {config.n_layer} layers, {config.n_head} heads, width {config.n_embd}, context {config.n_positions},
vocabulary {config.vocab_size}. {behavior}

```python
from transformers import pipeline

folder = "."  # path of this folder, or its name on the Hub
generator = pipeline("text-generation", model=folder{trust})
print(generator({prompt}, max_new_tokens=30)[0]["generated_text"]{reply})
```
"""
CONTINUES = """It continues a text the way its training data would: it was not trained to follow
instructions, and it has learned the errors and biases of that data, too."""
REPLIES = """It replies to messages, as the conversations that it was fine-tuned on do, and its
chat template writes them; it has learned the errors and biases of its training data, too."""


@dataclass(frozen=True)
class Origin:
    """Where weights come from: the first sentence of their card, and the metadata that it inherits."""

    sentence: str
    metadata: dict = field(default_factory=dict)  # see `inherited_metadata`, which every card applies


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


def model_card(
    model: PreTrainedModel,
    origin: Origin = FROM_SCRATCH,
    run_folder: Path | None = None,
    has_chat_template: bool = False,
) -> str:
    """The text of README.md; without the folder of the run that trained the model, it has no results."""
    run = None
    if run_folder and (run_folder / METRICS_FILE).is_file():
        with suppress(ValueError):  # a damaged run.json costs the card its results, but the run no checkpoint
            run = read_run(run_folder)
    evaluations = run.evaluations() if run else []
    results = hub_results(run, evaluations[-1]) if evaluations else []
    dataset = run.dataset() if run else None
    metadata = ModelCardData(
        **{"language": "en" if run and trained_on_english(run) else None, **inherited_metadata(origin.metadata)},
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["gpt2", "gpt2repro"],
        datasets=[dataset] if dataset else None,
        model_name="gpt2repro" if results else None,
        eval_results=results or None,
    )
    prompt = SAMPLE_PROMPTS.get(built_in_text(run) if run else None, DEFAULT_PROMPT)
    text = CARD.format(
        metadata=metadata.to_yaml(),
        parameters=model.num_parameters(),
        description=plain_text(origin.sentence),
        config=model.config,
        behavior=REPLIES if has_chat_template else CONTINUES,
        prompt=json.dumps([{"role": "user", "content": "Who are you?"}] if has_chat_template else prompt),
        reply='[-1]["content"]' if has_chat_template else "",
        trust=", trust_remote_code=True" if isinstance(model, GPT2ReproForCausalLM) else "",
    )
    if evaluations:
        lines = result_lines(run, evaluations[-1])
        if (assessment := assess(run)) is not None:
            lines["loss curve"] = assessment.sentence
        text += f"\n## Results\n\n{table(lines)}"
        if (run.folder / LOSS_PICTURE).is_file():
            text += f"\n![loss over training tokens]({LOSS_PICTURE})\n"
    if run and is_complete(run.config):
        text += f"\n## Training\n\n{table(training_lines(run))}"
        text += f"\n## Reproduce\n\n{reproduce_section(run)}"
    return text


def hub_results(run: Run, evaluation: dict) -> list[EvalResult]:
    """Results in the Hub's format, shown beside a model; only those on public data, which others can reproduce."""
    results = []
    dataset = run.dataset()
    if dataset and evaluation["validation_loss"] is not None:
        results.append(
            EvalResult(
                **TASK,
                dataset_type=dataset,
                dataset_name=dataset.split("/")[-1],
                metric_type="loss",
                metric_name="validation loss, nats per token",
                metric_value=evaluation["validation_loss"],
            )
        )
    for protocol, name in HELLASWAG_METRICS.items():
        if name in evaluation and used_public_hellaswag(run):
            results.append(
                EvalResult(
                    **TASK,
                    dataset_type=HELLASWAG_DATASET,
                    dataset_name="HellaSwag",
                    dataset_split="validation",
                    metric_type="acc_norm",
                    metric_name=f"acc_norm ({protocol})",
                    metric_value=evaluation[name],
                )
            )
    return results


def trained_on_english(run: Run) -> bool:
    """Whether its text is known to be English; the language of most text is not known."""
    return run.dataset() == FINEWEB_EDU or built_in_text(run) is not None
