"""A page to click: one model, or two side by side, continue a text, each token colored by its probability.

    python -m modeling_gpt2repro.hub.demo runs/quickstart
    python -m modeling_gpt2repro.hub.demo runs/quickstart/step-000400 runs/quickstart --port 7861

It needs gradio (pip install -c constraints.txt -e ".[demo]") and no internet: only this computer can open the page.
Ctrl-C ends it.
"""

import os
import random
import re
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from html import escape
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from modeling_gpt2repro.evaluation import talk
from modeling_gpt2repro.evaluation.load_model import (
    best_device,
    device_problem,
    find_model,
    load_causal_lm,
    max_context,
    model_problem,
)
from modeling_gpt2repro.evaluation.talk_arguments import SEEDS
from modeling_gpt2repro.runs.config import read_run_config
from modeling_gpt2repro.runtime.command_line import (
    InputErrors,
    arg,
    check_limits,
    exit_on_input_error,
    explain_missing_package,
    parse_command_line,
)
from modeling_gpt2repro.storage.retry import describe_error

if TYPE_CHECKING:
    import gradio

HOST = "127.0.0.1"
DEFAULT_PROMPT = "Once upon a time"
REFRESH_SECONDS = 0.05  # small models are faster than the eye, and every update costs a message to the browser
FONTS = ("system-ui", "sans-serif")  # of the visitor's system: others would be fetched from a server
CSS = (Path(__file__).parent / "demo.css").read_text(encoding="utf-8")


@dataclass
class DemoArguments:
    """Which models the page shows, and where it is served."""

    model: str = arg(
        positional=True,
        help="Model that continues the text: the folder of a run (its final model, or else its last checkpoint), the "
        "folder of any causal language model, or a model on the Hub.",
        group="models",
    )
    model2: str | None = arg(positional=True, help="A second one, shown beside it. If not given, there is none.")
    trust_remote_code: bool = arg(default=False, help="Let a model's repository run its own Python code.")
    dtype: str = arg(
        default="float32",
        choices=("float32", "bfloat16", "float16"),
        help="Precision of the weights and the forward.",
        group="hardware",
    )
    device: str | None = arg(
        default=None,
        help="'cuda', 'cuda:1', 'mps' or 'cpu'. If not given, the first of cuda, mps and cpu that exists.",
    )
    port: int = arg(default=7860, minimum=1, below=65536, help="The page is at http://127.0.0.1:PORT.", group="page")

    def __post_init__(self):
        self.device = self.device or best_device()
        InputErrors([*check_limits(self), *self._check_inputs()]).raise_if_any()

    def _check_inputs(self) -> Iterator[str]:
        if self.model is None:
            yield "MODEL is missing: give the folder of a run or of a model, or the name of a model on the Hub."
        yield from filter(None, (model_problem(find_model(name), flag) for flag, name in self.models()))
        yield from filter(None, (device_problem(self.device),))

    def models(self) -> list[tuple[str, str]]:
        """Of each model where it was given, and its name."""
        given = {"MODEL": self.model, "MODEL2": self.model2}
        return [(flag, name) for flag, name in given.items() if name is not None]


def main(argv: list[str] | None = None) -> None:
    args = parse_command_line(DemoArguments, argv, description=__doc__)
    disable_progress_bar()
    try:
        with exit_on_input_error():
            check_port(args.port)
            with explain_missing_package("this page"):
                import gradio  # noqa: F401 - it takes seconds; without it, no model need be loaded
            options = (args.dtype, args.device, args.trust_remote_code)
            models = [(name, load_causal_lm(find_model(name), *options, flag)) for flag, name in args.models()]
            prompt = next(filter(None, (prompt_of_run(name) for name, _ in models)), DEFAULT_PROMPT)
            page = build_page(models, prompt)
            launch(page, args.port)
        Console().print(f"http://{HOST}:{args.port} is the page. Ctrl-C ends it.")
        with suppress(KeyboardInterrupt):
            while True:  # Windows has no signal.pause
                time.sleep(1)
        page.close(verbose=False)
    except KeyboardInterrupt:  # while the models were loaded
        raise SystemExit(130) from None


def check_port(port: int):
    """Raise ValueError if no page can be served at this port."""
    with socket.socket() as probe:
        if os.name == "posix":  # else a port counts as taken for a minute after its program has ended
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise ValueError(
                f"--port {port} cannot be used ({describe_error(error)}): end the program that has it, or give another "
                f"port, such as {port + 1 if 1024 < port < 65535 else 7861}."
            ) from None


def prompt_of_run(name: str) -> str | None:
    """The first of the prompts that the run of a model samples from; None if it is not known."""
    for folder in (Path(name), Path(name).parent):
        with suppress(ValueError, OSError):  # a run.json that is damaged, or no run's, is no reason to end
            prompts = read_run_config(folder).get("arguments", {}).get("sample_prompts")
            if isinstance(prompts, list) and prompts:
                return str(prompts[0])
    return None


def build_page(models: list[tuple[str, talk.ModelAndTokenizer]], prompt: str = DEFAULT_PROMPT) -> "gradio.Blocks":
    """A page on which these models, each with its name, continue a text beside each other."""
    import gradio as gr

    def generate(prompt: str, temperature: float, top_k: int, length: int, seed_text: str):
        try:
            seed = read_seed(seed_text)
        except ValueError as error:
            raise gr.Error(str(error), title="", print_exception=False) from None
        sampling = (length, temperature, top_k, seed)
        for texts in side_by_side([continuation_html(loaded, prompt, *sampling) for _, loaded in models]):
            yield legend_html(seed), *texts

    title = " and ".join(name for name, _ in models)
    with gr.Blocks(title=f"{title} · gpt2repro", analytics_enabled=False) as page:
        text = gr.Textbox(prompt, label="Prompt", lines=3, max_lines=3)
        with gr.Row():
            temperature = gr.Slider(0, 2, 1, step=0.05, label="Temperature", buttons=[])
            top_k = gr.Slider(1, 200, 50, step=1, label="Top-k", buttons=[])
            length = gr.Slider(1, 1000, 200, step=1, label="Length", buttons=[])
            seed = gr.Textbox(label="Seed", placeholder="random", max_lines=1, min_width=120)
        with gr.Row():
            start = gr.Button("Generate", variant="primary", scale=4, min_width=120)
            stop = gr.Button("Stop", scale=1, min_width=120)
        outputs = [gr.HTML(legend_html())]
        with gr.Row():
            for name, (model, _) in models:
                with gr.Column(min_width=300, elem_classes="card"):
                    context = f", context {max_context(model):,} tokens" if max_context(model) else ""
                    gr.HTML(f"<b>{escape(name)}</b><br><i>{model.num_parameters():,} parameters{context}</i>")
                    outputs.append(gr.HTML('<div class="text"></div>'))
        hidden = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": None}
        inputs = [text, temperature, top_k, length, seed]
        started = gr.on([start.click, text.submit, seed.submit], generate, inputs, outputs, **hidden)
        stop.click(None, cancels=[started])
    return page


def launch(page: "gradio.Blocks", port: int):
    """Serve the page, in a thread, to this computer alone."""
    import gradio as gr

    without_proxy = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    os.environ["no_proxy"] = f"{without_proxy},{HOST}"  # gradio asks itself whether it runs, which no proxy can
    theme = gr.themes.Base(primary_hue="slate", neutral_hue="slate", font=FONTS, font_mono=FONTS)
    alone = {"server_name": HOST, "server_port": port, "share": False, "enable_monitoring": False, "mcp_server": False}
    quiet = {"quiet": True, "inline": False, "ssr_mode": False, "run_history": False, "footer_links": []}
    page.launch(**alone, **quiet, prevent_thread_lock=True, theme=theme, css=CSS)


def read_seed(text: str) -> int:
    """'7' -> 7, and '' -> a random one; ValueError for anything else."""
    if not text.strip():
        return random.randrange(10_000)
    if not re.fullmatch(r"\s*[0-9]{1,10}\s*", text) or int(text) >= SEEDS:
        raise ValueError(f"The seed ({text:.20}) must be a whole number below {SEEDS:,}, or empty for a random one.")
    return int(text)


def side_by_side(streams: list[Iterator[str]]) -> Iterator[list[str]]:
    """What the streams have given so far, joined, a few times a second and at the end."""
    texts = [""] * len(streams)
    shown = time.monotonic()
    for pieces in zip_longest(*streams, fillvalue=""):
        texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
        if time.monotonic() - shown > REFRESH_SECONDS:
            yield texts
            shown = time.monotonic()
    yield texts


def continuation_html(
    loaded: talk.ModelAndTokenizer, prompt: str, length: int, temperature: float, top_k: int, seed: int
) -> Iterator[str]:
    """HTML of each token of the prompt, then of each new one when it is sampled, and notes at the end.

    The text is that of the talk command with the same seed. A prompt or model that cannot be used is a note, too.
    """
    yield '<div class="text">'  # the browser closes it, so each text begins with the one before it
    try:
        ids = talk.encode(loaded, prompt)
        prompt_tokens = len(ids)
        for text, probability in talk.continued_text(loaded, ids, length, temperature, top_k, seed):
            yield token_html(text, probability, "prompt" if len(ids) == prompt_tokens else "")
        for note in talk.text_notes(loaded[0], len(ids) - prompt_tokens, len(ids), length, seed):
            yield f"\n<i>{note}</i>"
    except ValueError as error:
        yield f"\n<i>{escape(str(error))}</i>"


def token_html(text: str, probability: float | None, classes: str = "") -> str:
    """' <' with 0.25 -> ' <span class="cyan" title="probability 0.25">&lt;</span>': the space has no color."""
    visible = text.lstrip() or text
    space = text[: len(text) - len(visible)]
    if probability is None:
        return f'{space}<span class="{classes}">{escape(visible)}</span>'
    classes = f"{talk.probability_style(probability)} {classes}".strip()
    return f'{space}<span class="{classes}" title="probability {probability:.2g}">{escape(visible)}</span>'


def legend_html(seed: int | None = None) -> str:
    """What the colors mean, and the seed of the texts."""
    colors = " ".join(
        f'<span class="{style}">{f"from {least:g}" if least else "less"}</span>'
        for least, style in talk.PROBABILITY_STYLES.items()
    )
    return f'<div class="legend">Probability {colors}{"" if seed is None else f" &emsp; Seed {seed}"}</div>'


if __name__ == "__main__":
    main()
