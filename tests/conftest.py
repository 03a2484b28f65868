"""Fixtures that several test files share."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest
from patience import PATIENCE_SECONDS
from warm_python import ROOT, WarmPython

# The clients read these when they are imported. No test needs the network; one about offline mode sets them itself.
for switch in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
    os.environ.pop(switch, None)
# Read when torch is imported. More threads slow a tiny model down, by far where other programs use the cores, too.
os.environ["OMP_NUM_THREADS"] = "1"


@dataclass(frozen=True)
class LoopbackHub:
    """A Hub on 127.0.0.1 (`loopback_hub.py`) that serves the folders below `root / "models"` and `root / "datasets"`.

    The clients read HF_ENDPOINT when they are imported, so code that uses it runs by `warm_python`, or in a subprocess
    with `environment`; to push to "user/<any name>" it also needs HF_TOKEN set to `token`. Pushed files are below
    `root` as well.
    """

    endpoint: str
    cdn: str
    token: str
    read_only_token: str
    root: Path
    xet: bool = False  # whether it speaks Xet as well (`loopback_xet.py`)

    def new_repository(self, path: str) -> Path:
        """An empty folder for `datasets/ns/name` or `models/ns/name`; files of earlier tests are deleted."""
        folder = self.root / path
        for old in (folder, self.root / "branches" / path, self.root / "lfs" / path):
            shutil.rmtree(old, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def log(self) -> list[dict]:
        """Every request since the start: origin (hub, cdn, cas), method, path, status (null: dropped), range, auth (is
        there an Authorization header?), token_elsewhere (is a token in the path, the body or another header?), and the
        bytes of its body.
        """
        log = self.root / "log.jsonl"
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    @contextlib.contextmanager
    def faults(self, *rules: dict) -> Iterator[None]:
        """Requests fail by these rules (see `loopback_hub.py`) inside the `with` block."""
        file = self.root / "faults.json"
        temporary = file.with_suffix(".new")
        temporary.write_text(json.dumps(rules))
        temporary.replace(file)
        try:
            yield
        finally:
            file.unlink()

    def environment(self, home: Path) -> dict[str, str]:
        """Variables for a subprocess that uses this Hub, no proxy, no token, and only the cache in `home`."""
        foreign = ("HF_", "HUGGING", "TRANSFORMERS_")
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(foreign) and not name.lower().endswith("_proxy")
        }
        protocol = {"HF_XET_CLIENT_RETRY_BASE_DELAY": "10ms"} if self.xet else {"HF_HUB_DISABLE_XET": "1"}
        return (
            kept
            | protocol
            | {
                "HF_ENDPOINT": self.endpoint,
                "HF_HOME": str(home),
                "HF_HUB_DISABLE_TELEMETRY": "1",
                "HF_HUB_DOWNLOAD_TIMEOUT": str(PATIENCE_SECONDS),  # else 10, and this Hub is one busy process
                "HF_HUB_ETAG_TIMEOUT": str(PATIENCE_SECONDS),
                "HF_UPDATE_DOWNLOAD_COUNTS": "0",  # else datasets asks S3, up to 3 seconds where there is no network
            }
        )


@contextlib.contextmanager
def start_hub(root: Path, program: str, **options) -> Iterator[LoopbackHub]:
    command = [sys.executable, str(Path(__file__).with_name("support") / program), "--root", str(root)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        yield LoopbackHub(**json.loads(server.stdout.readline()), root=root, **options)
        server.stdin.close()  # the server exits


@pytest.fixture(scope="session")
def hub(tmp_path_factory) -> Iterator[LoopbackHub]:
    """One loopback Hub for all tests."""
    with start_hub(tmp_path_factory.mktemp("hub"), "loopback_hub_writes.py") as started:
        yield started


@pytest.fixture(scope="session")
def xet_hub(tmp_path_factory) -> Iterator[LoopbackHub]:
    """Another one, which speaks Xet as well."""
    pytest.importorskip("hf_xet")
    with start_hub(tmp_path_factory.mktemp("xet_hub"), "loopback_xet.py", xet=True) as started:
        yield started


@pytest.fixture(scope="session")
def warm_python(hub, tmp_path_factory) -> WarmPython:
    """Processes on one thread that use the loopback Hub and a temporary cache."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")])
    environment = hub.environment(tmp_path_factory.mktemp("home"))
    return WarmPython(environment | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path})


@pytest.fixture
def terminal_signals() -> Iterator[None]:
    """Signal handlers as in a terminal: a job in the background ignores SIGINT, one under nohup SIGHUP."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGHUP)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """Tests run in an empty folder: in the checkout, runs/ may hold runs of the user, which the defaults refuse."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def tiny_config():
    """A GPT-2 that a test can afford: 3 layers, 4 heads, 64 wide, 64 tokens of context, 97 ids."""
    from modeling_gpt2repro import GPT2ReproConfig

    return GPT2ReproConfig(
        n_layer=3, n_head=4, n_embd=64, n_positions=64, vocab_size=97, bos_token_id=0, eos_token_id=0
    )


@pytest.fixture
def tiny_model(tiny_config):
    """The tiny GPT-2 with fresh weights, the same each time."""
    import torch

    from modeling_gpt2repro import GPT2ReproForCausalLM

    torch.manual_seed(0)
    return GPT2ReproForCausalLM(tiny_config).eval()


@pytest.fixture
def stock(tiny_config):
    """A random stock GPT-2 of the tiny shape, with weights large enough to make mistakes visible."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    shape = {name: getattr(tiny_config, name) for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")}
    model = GPT2LMHeadModel(GPT2Config(**shape, initializer_range=0.2, bos_token_id=0, eos_token_id=0)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture
def carried(stock, tiny_config):
    """Ours with the stock model's weights: its Conv1D matrices are transposed Linears."""
    from modeling_gpt2repro import GPT2ReproForCausalLM

    model = GPT2ReproForCausalLM(tiny_config).eval()
    conv1d = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    model.load_state_dict({name: w.t() if name.endswith(conv1d) else w for name, w in stock.state_dict().items()})
    return model


@pytest.fixture
def random_ids():
    """random_ids(*shape) -> ids of the tiny vocabulary except end-of-text, the same each time."""
    import torch

    return lambda *shape: torch.randint(1, 97, shape, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="session")
def tiny_texts() -> list[str]:
    """200 documents of some 300 characters: a text is one to five lines of words."""
    random = Random(0)
    vocabulary = "the a sea ship captain water land wind of to in and over was cold"
    words = vocabulary.split()
    lines = [" ".join(random.choices(words, k=random.randint(5, 40))).capitalize() + "." for _ in range(600)]
    return ["\n".join(random.choices(lines, k=random.randint(1, 5))) for _ in range(200)]


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_texts):
    """A byte-level BPE of 300 ids, trained on `tiny_texts`."""
    from modeling_gpt2repro.data.tokenizer import train_tokenizer

    return train_tokenizer(tiny_texts, vocab_size=300)


@pytest.fixture(scope="session")
def gpt2_tokenizer(tmp_path_factory):
    """GPT-2's own tokenizer, from the files that tiktoken would download."""
    from modeling_gpt2repro.data.tokenizer import load_tokenizer

    shared = ROOT / "../shared/data"
    if not shared.is_dir():
        pytest.skip("GPT-2's vocabulary is not in ../shared/data")
    folder = tmp_path_factory.mktemp("gpt2") / "tiktoken"
    shutil.copytree(shared / "tiktoken_cache", folder)  # tiktoken deletes what it finds damaged
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(folder))
        return load_tokenizer("gpt2")


@pytest.fixture(scope="session")
def token_shards(tiny_texts, tiny_tokenizer, tmp_path_factory):
    """`tiny_texts` prepared: some 20,000 training tokens in shards of 5,000, a tenth as many for validation."""
    from modeling_gpt2repro.data.prepare.local import prepare_shards
    from modeling_gpt2repro.data.sources.resolve import local_source

    folder = tmp_path_factory.mktemp("token_shards")
    file = folder / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in tiny_texts))
    source = local_source([str(file)])
    return prepare_shards(source, tiny_tokenizer, "tiny", folder / "shards", 0.1, shard_tokens=5_000)


@pytest.fixture
def all_ids():
    """all_ids(shards, split) -> the ids of a split of prepared shards, in one array."""
    import numpy as np

    def joined(shards, split="train"):
        return np.concatenate([np.empty(0, np.uint16), *shards.shards(split)])

    return joined


@pytest.fixture
def one_sentence():
    """one_sentence(error) -> its message, which must be a single line that ends in a full stop."""

    def checked(error) -> str:
        message = str(error.value)
        assert "\n" not in message
        assert message.endswith(".")
        return message

    return checked


@pytest.fixture(scope="session")
def hellaswag_rows():
    """Seven examples: a plain one, and those with difficulties for a scorer."""
    from modeling_gpt2repro.evaluation.hellaswag.examples import Example

    def row_of(ctx_a, ctx_b, *endings, activity="Roof work", label=1):
        ctx = f"{ctx_a} {ctx_b}".strip()
        return Example(24, activity, ctx_a, ctx_b, ctx, endings, label)

    return [
        row_of("A man is sitting on a roof.", "he", "wraps skis.", "rips tiles off.", "holds a cube.", "pulls it up."),
        row_of("The roof is old.", "the men",
               "sit.", ", he pulls tiles off the roof.", "is a cube", "on — café.", label=3),
        # WikiHow: an ending that begins with a tag, and one that is nothing else.
        row_of("[header] How to roof [title] Sit. [step] Pull a  tile.", "",
               "[title] Sit down.", "Up. [substeps] Off.", "[step]", "Sit."),
        # What is left of this context ends in a space.
        row_of("Pull the tile off [title]", "", "A man sits.", "is it", "the roof", "old men", label=0),
        row_of("Tiles <|endoftext|> are", "not", "ends.", "<|endoftext|> it", "a", "b", label=2),
        # Longer than the model's context, by its context; and by one of its endings alone.
        row_of("A man is sitting on a roof with a cube. " * 9, "he",
               "holds it.", "sits.", "is old.", "pulls.", label=2),
        row_of("A man", "sits", "on the old roof, " * 20, "x", "pulls.", "wraps."),
    ]  # fmt: skip


@pytest.fixture(scope="session")
def hellaswag_tokenizer(hellaswag_rows):
    """GPT-2's kind of BPE, with few merges; its end-of-text is a special token."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    end_of_text = "<|endoftext|>"
    trained = ByteLevelBPETokenizer()
    texts = [text for row in hellaswag_rows for text in (row.ctx, *row.endings)]
    trained.train_from_iterator(
        texts, vocab_size=320, min_frequency=2, special_tokens=[end_of_text], show_progress=False
    )
    return PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, eos_token=end_of_text)


@pytest.fixture(scope="session")
def make_model():
    """A small GPT-2 of `kind` "ours" or "stock", with fresh weights, the same each time."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM

    def made(kind, vocab_size, n_positions=64):
        torch.manual_seed(0)
        shape = {"vocab_size": vocab_size, "n_positions": n_positions, "n_embd": 32, "n_layer": 2, "n_head": 4}
        options = {"bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.3}  # wide, so that tokens differ much
        if kind == "ours":
            return GPT2ReproForCausalLM(GPT2ReproConfig(**shape, **options)).eval()
        return GPT2LMHeadModel(GPT2Config(**shape, **options)).eval()

    return made


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    """A few thousand tokens of made-up prose, with HellaSwag examples beside them: the data of the toy runs."""
    from toy_runs import make_shards

    return make_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="session")
def finished(shards, warm_python, tmp_path_factory) -> tuple[Path, str]:
    """The folder of one whole toy run on one process, and its output; tests must not change it."""
    from toy_runs import CPU_FP32, SCRIPT, toy_flags

    output_dir = tmp_path_factory.mktemp("runs") / "one"
    return output_dir, warm_python.run(SCRIPT, *toy_flags(output_dir, shards), **CPU_FP32).stdout


@pytest.fixture(scope="session")
def finished_muon(shards, warm_python, tmp_path_factory) -> Path:
    """The same with `--recipe muon`."""
    from toy_runs import CPU_FP32, SCRIPT, toy_flags

    output_dir = tmp_path_factory.mktemp("runs") / "muon"
    warm_python.run(SCRIPT, *toy_flags(output_dir, shards, recipe="muon"), **CPU_FP32)
    return output_dir
