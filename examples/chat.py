"""Teach a model to answer: supervised fine-tuning (SFT), for which the data set is swapped and training continues.

    pip install -e ".[chat]"                          # TRL, whose SFTTrainer does the training
    python examples/chat.py runs/quickstart           # on questions about the quickstart's stories, minutes on a CPU
    python -m modeling_gpt2repro.evaluation.talk runs/chat --chat

Three things are new after pretraining. A conversation has roles: a chat template, saved with the tokenizer, writes them
as tokens of their own. The loss is on the assistant's tokens alone, because the model is to learn to answer, not to
ask. And it learns to stop: what it writes after an answer is <|end|>, and not the next question.

Other conversations come from a data set on the Hub, or a .jsonl or .parquet file, with a column `messages`; a larger
model needs a smaller learning rate:

    python examples/chat.py openai-community/gpt2 --dataset_name trl-lib/Capybara --learning_rate 5e-5
"""

import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from chat_data import check_context, load_conversations, score_answers
from datasets import Dataset, disable_progress_bars
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast, set_seed

from modeling_gpt2repro.evaluation.load_model import find_model, model_problem
from modeling_gpt2repro.hub.conversion import load_gpt2
from modeling_gpt2repro.hub.export import save_hub_folder
from modeling_gpt2repro.hub.model_card import derived_origin
from modeling_gpt2repro.runtime.command_line import (
    InputErrors,
    arg,
    check_limits,
    exit_on_input_error,
    explain_missing_package,
    parse_command_line,
)
from modeling_gpt2repro.storage.retry import describe_error

NEW_TOKENS = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
# Writes <|user|>Who is it?<|end|><|assistant|>It is Tom.<|end|>, in one line. Between `generation` and `endgeneration`
# is what the assistant writes, and the loss is on: the words of its answer, and the token that ends it.
CHAT_TEMPLATE = """
{%- for message in messages -%}
  <|{{- message.role -}}|>
  {%- if message.role == 'assistant' -%}
    {% generation %}{{- message.content -}}<|end|>{% endgeneration %}
  {%- else -%}
    {{- message.content -}}<|end|>
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}
"""


@dataclass
class ChatArguments:
    """Which model to fine-tune, on which conversations."""

    model: str = arg(positional=True, help="The folder of a run or of a model, or a GPT-2 on the Hub.")
    dataset_name: str | None = arg(
        default=None, help="A data set on the Hub, or a .jsonl or .parquet file; if not given, questions about stories."
    )
    output_dir: str = arg(default="runs/chat", help="The model is written to the folder model/ in it.")
    num_train_epochs: float = arg(default=1.0, above=0, help="How often each conversation is read.")
    per_device_train_batch_size: int = arg(default=8, minimum=1, help="Conversations that a step reads on a device.")
    learning_rate: float = arg(default=2e-3, above=0, help="Its peak.")
    seed: int = arg(default=0, minimum=0, help="Decides the new embeddings and the order of the conversations.")

    def __post_init__(self):
        if self.model is None:
            raise ValueError("MODEL is missing: give the folder of a run.")
        self.model = find_model(self.model)
        problems = [*check_limits(self), model_problem(self.model, "MODEL")]
        if self.folder.exists() and any(self.folder.iterdir()):
            problems.append(f"{self.folder} exists already: give another --output_dir.")
        InputErrors(filter(None, problems)).raise_if_any()

    @property
    def folder(self) -> Path:
        return Path(self.output_dir, "model")


def main(argv: list[str] | None = None):
    args = parse_command_line(ChatArguments, argv, description=__doc__)
    with exit_on_input_error():
        with explain_missing_package("examples/chat.py"):
            from trl import SFTConfig, SFTTrainer
        data = load_conversations(args.dataset_name)
        set_seed(args.seed)
        model, tokenizer = load_gpt2(args.model)
        origin = derived_origin("A GPT-2 fine-tuned on conversations from", args.model)
        add_chat_template(model, tokenizer)
        if args.dataset_name is None:
            check_context(model, tokenizer, data["test"])
            origin = replace(origin, prompt=data["test"][0]["messages"][0]["content"])
        try:
            args.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--output_dir {args.output_dir} cannot be written ({describe_error(error)}).") from None
    warnings.filterwarnings("ignore", "`gradient_checkpointing` is deprecated")  # its new name is that of 5.23
    config = SFTConfig(
        output_dir=args.output_dir,
        num_train_epochs=args.num_train_epochs,
        per_device_train_batch_size=args.per_device_train_batch_size,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=20,
        assistant_only_loss=True,
        max_length=model.config.n_positions,  # what is longer loses its end
        bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
        gradient_checkpointing=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        save_strategy="no",
        report_to="none",
        logging_steps=25,
        seed=args.seed,
    )
    disable_progress_bars()
    trainer = SFTTrainer(
        model, config, train_dataset=data["train"], eval_dataset=data["test"], processing_class=tokenizer
    )
    print("Before:")
    before = evaluate(trainer, data["test"])
    trainer.train()
    print("After:")
    after = evaluate(trainer, data["test"])
    if trainer.is_world_process_zero():
        save_hub_folder(model, tokenizer, args.folder, origin, generation_config=model.generation_config)
        print("\n                                 before  after")
        for name in before:
            print(f"{name:32} {before[name]:>6}  {after[name]:>5}")
        print(f"Talk to it: python -m modeling_gpt2repro.evaluation.talk {args.output_dir} --chat --temperature 0")


def evaluate(trainer, held_out: Dataset) -> dict[str, str]:
    """The loss on the held-out conversations; and the share of right answers, if there is one right answer to each."""
    results = {"held-out loss": f"{trainer.evaluate()['eval_loss']:.3f}"}
    if "questions" in held_out.column_names:
        results |= score_answers(trainer.model, trainer.processing_class, held_out)
    return results


def add_chat_template(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast):
    """Let the tokenizer write conversations, the model read the new tokens, and `generate` stop after an answer."""
    tokenizer.chat_template = CHAT_TEMPLATE.strip()
    tokenizer.add_special_tokens({"additional_special_tokens": NEW_TOKENS})
    # New rows are drawn around the mean of the old ones: rows near 0 would make the new tokens the most likely ones
    # (https://nlp.stanford.edu/~johnhew/vocab-expansion.html). The output head is the same tensor, and grows with it.
    model.resize_token_embeddings(len(tokenizer))
    end, end_of_text = tokenizer.convert_tokens_to_ids("<|end|>"), tokenizer.eos_token_id
    model.generation_config = GenerationConfig(eos_token_id=[end, end_of_text], pad_token_id=end_of_text)


if __name__ == "__main__":
    main()
