"""Conversations to fine-tune on: generated ones, in which somebody shows the beginning of a story and asks about it, or
those of another data set; and the score of the answers.

    python examples/chat_data.py      # prints one

The stories are the quickstart's. A grammar wrote them, so it is known who and what is in each: the answers are filled
in with its words. A model cannot know them by heart, since every story has others: it must find them in the text.
"""

import random
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from modeling_gpt2repro.data.sources.stories import NUM_STORIES, StoryWriter
from modeling_gpt2repro.data.tokenize import is_validation
from modeling_gpt2repro.storage.retry import describe_error

HELD_OUT_SHARE = 0.05  # as in the quickstart, so what is asked about here was not trained on there
TRAIN_CONVERSATIONS = 2_000
ASKED = 80  # held-out conversations whose answers are scored
ANSWER_TOKENS = 16  # at most; the longest right one has 11 of the quickstart's tokens
SHOWN = 5  # answers that are printed
QUESTIONS_EACH = 6  # with the story, nearly the quickstart's context of 224 tokens
# {hero}, {animal}, ... are the words of the story, and {He} and {His} the hero's pronouns.
QUESTIONS = {
    # A story comes back to these, so a model that has learned to write it can find them again,
    "Who is the story about?": "It is about {hero}.",
    "Who is {hero}'s friend?": "{His} friend is {friend}.",
    "Who else is in the story?": "There is {elder}.",
    "What animal is in the story?": "There is a {animal}.",
    "What thing is in the story?": "There is a {object}.",
    "What food is in the story?": "There is some {food}.",
    "What does {hero} want?": "{He} wants {wish}.",
    # but these it names once and never again.
    "What does {hero} wear?": "{He} wears a {fabric} {cloth}.",
    "What does {hero} like to do?": "{He} likes {hobby}.",
    "What does {hero} like to eat?": "{He} likes {dish}.",
    "Where does {hero} live?": "{He} lives near the {place}.",
    "What is {hero} like?": "{He} is {trait}.",
}

ROLES = {"system", "user", "assistant"}
Conversation = list[dict[str, str]]  # [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}, ...]


def load_conversations(name: str | None) -> DatasetDict:
    """Splits "train" and "test" with a column `messages`, a list of {"role": ..., "content": ...}.

    Raises:
        ValueError: If they cannot be loaded, or none of them has an answer.
    """
    if name is None:
        train = Dataset.from_list(list(islice(write_conversations("train"), TRAIN_CONVERSATIONS)))
        return DatasetDict(train=train, test=Dataset.from_list(list(write_conversations("test"))))
    kind = {".jsonl": "json", ".parquet": "parquet"}.get(Path(name).suffix)
    try:
        data = load_dataset(kind, data_files=name, split="train") if kind else load_dataset(name, split="train")
        data = data.select_columns("messages").filter(can_be_learned)
    except Exception as error:  # of many kinds, over a damaged file
        raise ValueError(f"--dataset_name {name} cannot be read ({describe_error(error)}).") from error
    if len(data) < 20:
        raise ValueError(f"--dataset_name {name} has {len(data)} conversations with an answer: give 20 or more.")
    return data.train_test_split(test_size=0.05, seed=0)


def can_be_learned(row: dict) -> bool:
    """Whether somebody answers, and all roles have a token."""
    roles = {message["role"] for message in row["messages"]}
    return "assistant" in roles and roles <= ROLES and all(message["content"] for message in row["messages"])


def write_conversations(split: str) -> Iterator[dict]:
    """One about each story of "train" or "test"; none of "test" has hero, animal and thing of one of "train".

    Yields:
        `messages`, and `questions`: of each question its template.
    """
    for number in range(NUM_STORIES):
        writer = StoryWriter(f"0:{number}")
        story = writer.write()
        if is_validation(f"story:{story.combination}", HELD_OUT_SHARE) == (split == "test"):
            questions = random.Random(number).sample(list(QUESTIONS), QUESTIONS_EACH)
            yield {"messages": ask(writer, questions), "questions": questions}


def ask(writer: StoryWriter, questions: list[str]) -> Conversation:
    """The turns about the story that `writer` has written; the first question follows its title and opening."""
    messages = []
    start = " ".join(writer.story.text.split("\n\n")[:2]) + " "  # on one line, as a terminal takes a message
    for question in questions:
        messages.append({"role": "user", "content": start + fill(writer, question)})
        messages.append({"role": "assistant", "content": fill(writer, QUESTIONS[question])})
        start = ""
    return messages


def fill(writer: StoryWriter, template: str) -> str:
    return re.sub(r"{(\w+)}", lambda name: writer.fill(name[1]), template)


def check_context(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, held_out: Dataset):
    """Raise ValueError if the model cannot read a conversation to its last answer."""
    ids = tokenizer.apply_chat_template(held_out["messages"][:ASKED], return_dict=True)["input_ids"]
    needed = max(map(len, ids)) + ANSWER_TOKENS
    if needed > model.config.n_positions:
        raise ValueError(
            f"the model's context of {model.config.n_positions} tokens is too short for questions about a story, which "
            f"take {needed}: give another MODEL, or conversations of your own by --dataset_name."
        )


def score_answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, held_out: Dataset) -> dict[str, str]:
    """Ask the questions of ASKED conversations; the share of answers that are right, word for word, by question."""
    turns = [
        (question, row["messages"][: 2 * turn + 1], row["messages"][2 * turn + 1]["content"])
        for row in held_out.select(range(ASKED))
        for turn, question in enumerate(row["questions"])
    ]
    answers = generate_answers(model, tokenizer, [messages for _, messages, _ in turns])
    for (_, messages, expected), answer in zip(turns[:SHOWN], answers, strict=False):
        print(f"user:      {messages[-1]['content']}\nassistant: {answer}\n(right:    {expected})")
    right = {"all answers right": []} | {question: [] for question in QUESTIONS}
    for (question, _, expected), answer in zip(turns, answers, strict=True):
        right["all answers right"].append(answer == expected)
        right[question].append(answer == expected)
    return {name: f"{sum(each) / len(each):.0%}" for name, each in right.items()}


def generate_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: list[Conversation]
) -> list[str]:
    """The most likely answer to each conversation, which ends with a question."""
    answers = []
    for first in range(0, len(prompts), 32):
        batch = tokenizer.apply_chat_template(
            prompts[first : first + 32],
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
            padding=True,
            tokenizer_kwargs={"padding_side": "left"},  # so that all end where the answers begin
        ).to(model.device)
        ids = model.generate(**batch, max_new_tokens=ANSWER_TOKENS, do_sample=False)  # (B, T + new)
        answers += tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


if __name__ == "__main__":
    for message in next(write_conversations("test"))["messages"]:
        print(f"{message['role']}: {message['content']}")
