"""examples/chat.py and talk --chat: the chat template, on which tokens the loss is, long conversations, bad input."""

import copy
import importlib
import io
import json
import os
import re
import subprocess
import sys
from itertools import islice
from pathlib import Path

import datasets
import pytest
import torch
from patience import PATIENCE_SECONDS
from toy_runs import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM
from modeling_gpt2repro.data.sources.stories import write_story
from modeling_gpt2repro.data.tokenizer import train_tokenizer
from modeling_gpt2repro.evaluation import talk
from modeling_gpt2repro.evaluation.conversation import Conversation
from modeling_gpt2repro.evaluation.sampling import sample_tokens
from modeling_gpt2repro.evaluation.stories import held_out_stories
from modeling_gpt2repro.hub.conversion import convert_folder
from modeling_gpt2repro.hub.export import save_hub_folder
from modeling_gpt2repro.hub.pushed_files import files_to_push

MESSAGES = [
    {"role": "system", "content": "Be cold. "},
    {"role": "user", "content": " Who was the captain?\n\nSay it."},
    {"role": "assistant", "content": "The captain was <b>Ann</b>.\n"},
    {"role": "user", "content": "And the sea?"},
    {"role": "assistant", "content": "  Wind."},
]
TEXT = (
    "<|system|>Be cold. <|end|><|user|> Who was the captain?\n\nSay it.<|end|>"
    "<|assistant|>The captain was <b>Ann</b>.\n<|end|><|user|>And the sea?<|end|><|assistant|>  Wind.<|end|>"
)


@pytest.fixture(scope="module")
def example():
    """The module examples/chat.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "examples"))
        yield importlib.import_module("chat")


@pytest.fixture(scope="module")
def chatty(example, make_model, tiny_tokenizer):
    """A random model and a tokenizer that have got a chat template."""
    model, tokenizer = make_model("ours", len(tiny_tokenizer)), copy.deepcopy(tiny_tokenizer)
    example.add_chat_template(model, tokenizer)
    return model, tokenizer


@pytest.fixture(scope="module")
def folder(chatty, tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat") / "model"
    save_hub_folder(*chatty, folder, generation_config=chatty[0].generation_config)
    return folder


def written(tokenizer, messages):
    """Ids of a conversation up to where the assistant answers."""
    return tokenizer(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))["input_ids"]


@pytest.fixture
def refused(capsys):
    """refused(main, *words) -> the one sentence with which the program ends, with exit code 2."""

    def ended(main, *words):
        with pytest.raises(SystemExit) as end:
            main(list(map(str, words)))
        assert end.value.code == 2
        [line] = [line for line in capsys.readouterr().err.splitlines() if line.endswith(".")]
        return line

    return ended


def test_the_loss_is_on_the_answers_and_the_tokens_that_end_them(chatty):
    _, tokenizer = chatty
    found = tokenizer.apply_chat_template(MESSAGES, return_dict=True, return_assistant_tokens_mask=True)
    # By hand: each piece of text is encoded by itself, because special tokens cut the text.
    ids, mask = [], []
    for message in MESSAGES:
        content = tokenizer(message["content"])["input_ids"]
        ids += [tokenizer.get_vocab()[f"<|{message['role']}|>"], *content, tokenizer.get_vocab()["<|end|>"]]
        mask += [0] + [int(message["role"] == "assistant")] * (len(content) + 1)
    assert found["input_ids"] == ids
    assert found["assistant_masks"] == mask
    assert 10 < sum(mask) < len(mask) - 20


def test_a_conversation_is_written_with_its_spaces_and_ends_where_the_assistant_answers(chatty, folder, tmp_path):
    convert_folder(str(folder), tmp_path / "stock")
    assert "chat_template.jinja" in files_to_push(folder, [])
    for tokenizer in (chatty[1], AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained("stock")):
        assert tokenizer.apply_chat_template(MESSAGES, tokenize=False) == TEXT
        ids = tokenizer.apply_chat_template(MESSAGES[:2], add_generation_prompt=True, return_dict=True)["input_ids"]
        assert tokenizer.decode(ids) == TEXT[: TEXT.index("The captain was")]
        assert ids.count(tokenizer.get_vocab()["<|end|>"]) == 2


def test_new_tokens_grow_the_tied_embeddings_and_leave_the_others(chatty, make_model, tiny_tokenizer, tmp_path, folder):
    model, tokenizer = chatty
    old = make_model("ours", len(tiny_tokenizer))
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.lm_head.weight.shape[0] == model.config.vocab_size == len(tokenizer) == len(tiny_tokenizer) + 4
    assert torch.equal(model.transformer.wte.weight[:-4], old.transformer.wte.weight)
    ends = [tokenizer.get_vocab()["<|end|>"], 0]
    convert_folder(str(folder), tmp_path / "stock")
    for saved in (folder, "stock"):
        assert AutoModelForCausalLM.from_pretrained(saved).generation_config.eos_token_id == ends


def test_the_pipeline_takes_messages_and_the_card_shows_how(folder, capsys):
    generate = pipeline("text-generation", model=str(folder), tokenizer=str(folder))
    reply = generate(MESSAGES[:2], max_new_tokens=3)[0]["generated_text"]
    assert reply[:-1] == MESSAGES[:2]
    assert reply[-1]["role"] == "assistant"
    card = (folder / "README.md").read_text()
    program = card.split("```python\n")[1].split("```")[0]
    exec(program.replace('"."', repr(str(folder))), {})
    assert capsys.readouterr().out
    assert "not trained to follow" not in card


def test_the_answer_is_in_the_story_and_no_held_out_story_is_trained_on(example):
    data = importlib.import_module("chat_data")
    combinations = {}
    for split in ("train", "test"):
        combinations[split] = set()
        for row in islice(data.write_conversations(split), 12):
            first, *others = [message["content"] for message in row["messages"][::2]]
            title = re.match(r"A story of (\w+) and \w+, M\w+. \w+, a (\w+), a (\w+) and ", first)
            combinations[split].add(title.groups())
            assert len(set(row["questions"])) == 6 == len({first, *others})
            for answer in row["messages"][1::2]:
                word = answer["content"].removesuffix(".").split()[-1]  # an animal, a name, ...
                assert re.search(rf"\b{word}\b", first)
    assert len(combinations["train"]) == len(combinations["test"]) == 12
    held_out = {tuple(story.combination.split()) for story in held_out_stories(0.05, 12)}
    assert combinations["test"] == held_out
    assert not combinations["train"] & held_out


def test_the_oldest_turns_are_left_out_and_what_remains_is_as_much_as_fits(chatty):
    model, tokenizer = chatty
    conversation = Conversation(model, tokenizer)
    history = []
    for number in range(9):
        history.append({"role": "user", "content": f"the sea {'and ship ' * number}"})
        ids = conversation.ask(history[-1]["content"])
        fits = [
            rest for start in range(0, len(history), 2) if len(rest := written(tokenizer, history[start:])) <= 60
        ]  # 64 less a sixteenth
        assert ids == fits[0]
        conversation.reply(tokenizer("cold wind")["input_ids"])
        history.append({"role": "assistant", "content": "cold wind"})
    assert 0 < conversation.turns_left_out < 9
    with pytest.raises(ValueError, match=r"^the message has \d+ tokens, and of the context of 64 it may take 60: "):
        conversation.ask("sea " * 80)
    assert conversation.messages[-1]["content"] == "cold wind"  # the refused message is not part of it


def test_talk_replies_to_all_that_was_said_and_says_once_that_it_is_too_long(folder, chatty, capsys, monkeypatch):
    lines = ["the cold sea", "and the ship?", "the captain", "wind over water", "to the land"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(lines).encode())))
    talk.main([str(folder), "--chat", "--temperature", "0", "--max_new_tokens", "12", "--device", "cpu"])
    printed = capsys.readouterr()
    model, tokenizer = chatty
    messages, expected, ends = [], "", {0, tokenizer.get_vocab()["<|end|>"]}
    for line in lines:
        messages.append({"role": "user", "content": line})
        while len(ids := written(tokenizer, messages)) > 60:
            messages = messages[2:]
        new = [token for token, _ in sample_tokens(model, list(ids), 12, temperature=0, end_ids=ends)]
        messages.append({"role": "assistant", "content": tokenizer.decode(new, skip_special_tokens=True)})
        expected += talk.CONTROLS.sub(lambda c: c[0].encode("unicode_escape").decode(), tokenizer.decode(new)) + "\n\n"
    assert len(messages) < 2 * len(lines)
    assert printed.out == expected
    assert printed.err.count("[longer than the context of 64 tokens: from now on the oldest turns are left out]") == 1


def test_talk_chat_refuses_in_one_sentence(folder, make_model, tiny_tokenizer, tmp_path, refused):
    save_hub_folder(make_model("ours", len(tiny_tokenizer)), tiny_tokenizer, tmp_path / "plain")
    assert "--chat plain: its tokenizer has no chat template" in refused(talk.main, "plain", "--chat", "--prompt", "a")
    assert "leave out --compare" in refused(talk.main, folder, "--chat", "--compare", folder)
    assert "num_return_sequences (2) must be 1" in refused(talk.main, folder, "--chat", "--num_return_sequences", 2)
    message = refused(talk.main, folder, "--chat", "--prompt", "sea " * 80)
    assert "the message has " in message
    template = Path(tmp_path, "broken")
    os.mkdir(template)
    for file in folder.iterdir():
        (template / file.name).write_bytes(file.read_bytes())
    (template / "chat_template.jinja").write_text("{{ raise_exception('no users here') }}")
    message = refused(talk.main, template, "--chat", "--prompt", "a")
    assert "its chat template cannot write the conversation (" in message
    assert "no users here" in message


def test_the_example_refuses_bad_input_in_one_sentence(example, folder, tmp_path, refused, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setitem(sys.modules, "trl", None)
    assert "needs the package trl" in refused(example.main, folder)
    monkeypatch.setitem(sys.modules, "trl", type(sys)("trl"))
    sys.modules["trl"].SFTConfig = sys.modules["trl"].SFTTrainer = None
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "config.json").write_text("[]")
    assert "MODEL is missing" in refused(example.main)
    assert "there is no such folder" in refused(example.main, "./nowhere")
    assert "has no config.json" in refused(example.main, "empty")
    assert "cannot be read as a model" in refused(example.main, "notes", "--dataset_name", few(tmp_path, 40))
    assert "has 3 conversations with an answer" in refused(example.main, folder, "--dataset_name", few(tmp_path, 3))
    assert "cannot be read" in refused(example.main, folder, "--dataset_name", "none.jsonl")
    (tmp_path / "file").write_text("")
    assert "--output_dir file cannot be written (" in refused(
        example.main, folder, "--dataset_name", few(tmp_path, 40), "--output_dir", "file"
    )
    monkeypatch.setattr(importlib.import_module("chat_data"), "NUM_STORIES", 100)
    assert "context of 64 tokens is too short for questions about a story" in refused(example.main, folder)
    assert "exists already" in refused(example.main, folder, "--output_dir", folder.parent)
    assert not (tmp_path / "runs").exists()


def few(tmp_path, count):
    file = tmp_path / f"{count}.jsonl"
    rows = [{"messages": MESSAGES}] * count + [{"messages": MESSAGES[:2]}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.slow
def test_the_trainer_reads_answers_only_and_writes_a_model_that_loads(example, folder, tmp_path, monkeypatch, capsys):
    trl = pytest.importorskip("trl")
    trainers = []

    class KeptTrainer(trl.SFTTrainer):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            trainers.append(self)

    monkeypatch.setattr(trl, "SFTTrainer", KeptTrainer)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    example.main([str(folder), "--dataset_name", str(few(tmp_path, 40)), "--per_device_train_batch_size", "4"])
    [trainer] = trainers
    assert len(trainer.train_dataset) == 38  # of 41 one has no answer, and two are held out
    tokenizer = AutoTokenizer.from_pretrained("runs/chat/model")
    for row in trainer.train_dataset:
        read = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
        answers = [message["content"] + "<|end|>" for message in MESSAGES if message["role"] == "assistant"]
        assert "".join(answers).startswith(tokenizer.decode(read))  # the context of 64 tokens may cut the last one
        assert len(read) > 10
    before, after = re.search(r"\nheld-out loss +([\d.]+) +([\d.]+)\n", capsys.readouterr().out).groups()
    # All conversations are the same. By hand: the mean over what the assistant writes, in what the model can read.
    found = tokenizer.apply_chat_template(MESSAGES, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = torch.tensor(found["input_ids"][:64]), torch.tensor(found["assistant_masks"][:64]).bool()
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder)(ids[None]).logits[0]
    assert float(before) == pytest.approx(
        torch.nn.functional.cross_entropy(logits[:-1][mask[1:]], ids[mask]).item(), abs=1e-3
    )
    assert float(after) < float(before) - 1
    model = AutoModelForCausalLM.from_pretrained("runs/chat/model")
    assert torch.equal(model.transformer.wte.weight, trainer.model.transformer.wte.weight)
    assert "A GPT-2 fine-tuned on conversations from model." in Path("runs/chat/model/README.md").read_text()


@pytest.mark.slow
def test_a_model_learns_to_answer_and_talks_through_a_pipe(example, tmp_path, capsys, monkeypatch):
    """From random weights, two questions whose answers are always at the same place of the title."""
    pytest.importorskip("trl")
    data = importlib.import_module("chat_data")
    monkeypatch.setattr(data, "QUESTIONS", dict(list(data.QUESTIONS.items())[:2]))
    monkeypatch.setattr(data, "QUESTIONS_EACH", 2)
    monkeypatch.setattr(data, "TRAIN_CONVERSATIONS", 3200)
    tokenizer = train_tokenizer((write_story(number).text for number in range(600)), 800)
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 64, "n_positions": 224, "bos_token_id": 0, "eos_token_id": 0}
    torch.manual_seed(0)
    model = GPT2ReproForCausalLM(GPT2ReproConfig(vocab_size=len(tokenizer), initializer_range=0.08, **shape))
    save_hub_folder(model, tokenizer, tmp_path / "random")
    example.main(["random", "--output_dir", "chat", "--learning_rate", "4e-3"])
    printed = capsys.readouterr().out
    before, after = re.search(r"\nall answers right +(\d+)% +(\d+)%\n", printed).groups()
    assert int(before) == 0
    assert int(after) > 60  # 6 by chance

    messages = next(data.write_conversations("test"))["messages"]
    program = [sys.executable, "-m", "modeling_gpt2repro.evaluation.talk", "chat", "--chat", "--temperature", "0"]
    lines = "".join(message["content"] + "\n" for message in messages[::2])
    talked = subprocess.run(
        program, input=lines, capture_output=True, text=True, check=True, timeout=PATIENCE_SECONDS
    ).stdout
    generate = pipeline("text-generation", model="chat/model")
    heard = []
    for message in messages[::2]:
        heard = generate([*heard, message], max_new_tokens=200, do_sample=False)[0]["generated_text"]
    assert talked == "".join(message["content"] + "\n\n" for message in heard[1::2])
