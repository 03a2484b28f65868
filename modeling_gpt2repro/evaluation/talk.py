"""Talk to a model in the terminal: it continues what you type, token by token.

    python -m modeling_gpt2repro.evaluation.talk runs/quickstart
    python -m modeling_gpt2repro.evaluation.talk runs/quickstart --prompt "Once upon a time" --num_return_sequences 4
    python -m modeling_gpt2repro.evaluation.talk openai-community/gpt2 --probabilities
    python -m modeling_gpt2repro.evaluation.talk runs/quickstart --compare openai-community/gpt2
    python -m modeling_gpt2repro.evaluation.talk runs/chat --chat

With --chat it answers instead: each line is a message of one conversation, written by the tokenizer's chat template.
The text goes to stdout, everything about it to stderr. Ctrl-C stops a text, a second one or Ctrl-D ends the program.
"""

import os
import random
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import chain, count, zip_longest

from rich import box
from rich.console import Console
from rich.live import Live
from rich.style import Style
from rich.table import Column, Table
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from modeling_gpt2repro.runs.folder import MODEL_FOLDER
from modeling_gpt2repro.runtime.command_line import exit_on_input_error, parse_command_line

from .conversation import Conversation
from .load_model import load_causal_lm, max_context
from .sampling import sample_tokens, token_probabilities, whole_characters
from .talk_arguments import SEEDS, TalkArguments

ModelAndTokenizer = tuple[PreTrainedModel, PreTrainedTokenizerBase]
Piece = tuple[str, str]  # a text and its style, as rich calls it

PROMPT, PLAIN, NOTE = "bold", "", "dim"  # a note is not part of the text, but about it
PROBABILITY_STYLES = {0.5: "green", 0.1: "cyan", 0.01: "yellow", 0.0: "red"}  # from this probability on
# A model may write anything: ESC and the C1 controls could clear the screen or worse, and those of the direction of
# text show another text than is there (https://trojansource.codes).
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def main(argv: list[str] | None = None) -> None:
    args = parse_command_line(TalkArguments, argv, description=__doc__)
    disable_progress_bar()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # an ASCII terminal shows \xe9 for é
    try:
        with exit_on_input_error():
            talk(args, Console(), Console(stderr=True))
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def talk(args: TalkArguments, out: Console, notes: Console):
    """Load what is needed, and continue each prompt.

    Raises:
        ValueError: If a model or a prompt cannot be used.
    """
    load_options = (args.dtype, args.device, args.trust_remote_code)
    loaded = [load_causal_lm(folder, *load_options, flag) for flag, _, folder in args.models()]
    conversation = Conversation(*loaded[0]) if args.chat else None
    is_interactive = args.prompt is None and sys.stdin.isatty()
    in_color = out.color_system is not None and not out.no_color
    first_seed = random.randrange(10_000) if args.seed is None else args.seed
    seeds = (number % SEEDS for number in count(first_seed))
    print_pieces(header(args, loaded, first_seed, is_interactive, in_color), notes, notes)
    cropped = set()
    for prompt in read_prompts(args.prompt, is_interactive):
        try:
            for _, seed in zip(range(args.num_return_sequences), seeds, strict=False):
                if conversation:
                    answer(conversation, prompt, args, seed, in_color, cropped, out, notes)
                    continue
                texts = [continue_prompt(each, encode(each, prompt), args, seed, in_color, cropped) for each in loaded]
                if args.compare is None:
                    print_pieces(texts[0], out, notes)
                else:
                    print_columns((args.model, args.compare), texts, out)
        except KeyboardInterrupt:
            print_pieces([("\n", PLAIN), (f"[stopped, seed {seed}]\n", NOTE), ("\n", PLAIN)], out, notes)
            if not is_interactive:
                raise
        except ValueError as error:
            notes.print()
            if not is_interactive:
                raise
            print_pieces([(f"{error}\n", NOTE)], out, notes)


def header(
    args: TalkArguments, loaded: Iterable[ModelAndTokenizer], seed: int, is_interactive: bool, in_color: bool
) -> Iterator[Piece]:
    """Which models talk, and how."""
    for (_, name, folder), (model, _) in zip(args.models(), loaded, strict=True):
        which = "the final model" if os.path.basename(folder) == MODEL_FOLDER else "so far the last checkpoint"
        context = f"a context of {max_context(model):,} tokens" if max_context(model) else "no limit of its context"
        run = "" if folder == name else f", {which} of {name}"
        yield f"model          {folder}{run}: {model.num_parameters():,} parameters, {context}\n", PLAIN
    how = f"temperature {args.temperature:g}, the {args.top_k} most likely tokens, seed {seed}"
    yield f"sampling       {how if args.temperature else 'always the most likely token'}\n", PLAIN
    if args.probabilities and in_color:
        yield "probabilities  ", PLAIN
        for least, style in PROBABILITY_STYLES.items():
            yield f"from {least:g}  " if least else "less\n", style
    elif args.probabilities:
        yield "probabilities  in parentheses after each token\n", PLAIN
    yield "Ctrl-C stops a text, Ctrl-D ends the program.\n\n" if is_interactive else "\n", NOTE


def read_prompts(given: str | None, is_interactive: bool) -> Iterator[str]:
    """The given prompt, or else each line of stdin that is not blank.

    Raises:
        ValueError: If there is none.
    """
    if given is not None:
        yield given
        return
    sys.stdin.reconfigure(errors="surrogateescape")  # as for the command line; `encode` reports what is not UTF-8
    if is_interactive:
        with suppress(ImportError):  # Windows has none
            import readline  # noqa: F401 - gives `input` a history
        while True:
            try:
                line = input("> ")
            except (EOFError, KeyboardInterrupt) as end:
                print()
                if isinstance(end, EOFError):  # Ctrl-D
                    return
                raise
            if line.strip():
                yield line
    else:
        is_empty = True
        for line in sys.stdin:
            if line.strip():
                is_empty = False
                yield line.rstrip("\r\n")
        if is_empty:
            raise ValueError("stdin has no prompt: give --prompt TEXT, or lines of text.")


def answer(
    conversation: Conversation, message: str, args: TalkArguments, seed: int, in_color: bool, cropped: set,
    out: Console, notes: Console,
):  # fmt: skip
    """Print the model's reply to the message, and make both a part of the conversation.

    Raises:
        ValueError: If the message cannot be used, or the model gives NaN.
    """
    had_all = not conversation.turns_left_out
    ids = conversation.ask(as_utf8(message))
    if had_all and conversation.turns_left_out:
        context = max_context(conversation.model)
        note = f"[longer than the context of {context:,} tokens: from now on the oldest turns are left out]\n"
        print_pieces([(note, NOTE)], out, notes)
    start = len(ids)
    loaded = conversation.model, conversation.tokenizer
    try:
        print_pieces(continue_prompt(loaded, ids, args, seed, in_color, cropped), out, notes)
    finally:  # Ctrl-C stops a reply, but what is there was said
        conversation.reply(ids[start:])


def continue_prompt(
    loaded: ModelAndTokenizer, ids: list[int], args: TalkArguments, seed: int, in_color: bool, cropped: set
) -> Iterator[Piece]:
    """Pieces of the prompt (not in a chat) and of its continuation, as it is sampled, and then notes on it.

    Args:
        ids: Of the prompt; the new ones are appended.
        cropped: Models that have exceeded their context. The note on that comes the first time only.

    Raises:
        ValueError: If the model gives NaN.
    """
    model, _ = loaded
    sampling = (args.max_new_tokens, args.temperature, args.top_k, seed)
    prompt_tokens = len(ids)
    for text, probability in continued_text(loaded, ids, *sampling, args.probabilities, shows_prompt=not args.chat):
        if not args.probabilities:
            yield text, PROMPT if probability is None else PLAIN
        elif probability is None:
            yield text, PLAIN
        elif in_color:
            yield text, probability_style(probability)
        else:
            yield f"{text}({probability:.2g})", PLAIN
    yield "\n", PLAIN
    end = "end of reply" if args.chat else "end of text"
    ending, *is_cropped = text_notes(model, len(ids) - prompt_tokens, len(ids), args.max_new_tokens, seed, end)
    yield f"[{ending}]\n", NOTE
    for note in is_cropped if model not in cropped else []:
        cropped.add(model)
        yield f"[{note}]\n", NOTE
    yield "\n", PLAIN


def continued_text(
    loaded: ModelAndTokenizer,
    ids: list[int],
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    seed: int,
    prompt_probabilities: bool = True,
    shows_prompt: bool = True,
) -> Iterator[tuple[str, float | None]]:
    """The text of each token of the prompt, then of each new one when it is sampled, with the model's probability.

    Control characters are escaped. The probability is None for the first token, and for the whole prompt if
    `prompt_probabilities` is false.

    Args:
        ids: Of the prompt; the new ones are appended.

    Raises:
        ValueError: If the model gives NaN.
    """
    model, tokenizer = loaded
    shown = list(ids) if shows_prompt else []
    probabilities = token_probabilities(model, ids) if prompt_probabilities and shown else [None] * len(shown)
    prompt_tokens = list(zip(shown, probabilities, strict=True))
    sampled = sample_tokens(model, ids, max_new_tokens, temperature, top_k, seed, end_ids=end_of_text_ids(loaded))
    for text, probability in whole_characters(tokenizer, chain(prompt_tokens, sampled)):
        yield CONTROLS.sub(lambda control: control[0].encode("unicode_escape").decode(), text), probability


def probability_style(probability: float) -> str:
    return next(style for least, style in PROBABILITY_STYLES.items() if probability >= least)


def text_notes(
    model: PreTrainedModel, new_tokens: int, all_tokens: int, max_new_tokens: int, seed: int, end: str = "end of text"
) -> Iterator[str]:
    """How a text ended and which seed gives it again; then, where it is so, that it exceeded the context."""
    is_full = new_tokens == max_new_tokens  # else the end was drawn
    yield f"{f'{new_tokens} tokens' if is_full else end}, seed {seed}"
    context = max_context(model)
    if context and all_tokens - is_full > context:  # the last token of a full text is not read
        yield f"longer than the context: only the last {context:,} tokens were read at a time"


def encode(loaded: ModelAndTokenizer, prompt: str) -> list[int]:
    """The prompt's ids, with what the tokenizer begins a text with.

    Raises:
        ValueError: If there are none.
    """
    prompt = as_utf8(prompt)
    model, tokenizer = loaded
    ids = tokenizer(prompt, verbose=False)["input_ids"]  # else it warns of long texts, on which there is a note
    if not ids:
        raise ValueError(f"the prompt {prompt!r:.60} has no tokens for {model.name_or_path}: give another.")
    return ids


def as_utf8(prompt: str) -> str:
    """The prompt in an ASCII locale, where é arrives as two bytes, too; raises ValueError if it is not UTF-8."""
    try:
        return prompt.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError:
        raise ValueError(f"the prompt {prompt!r:.60} is not UTF-8 text: convert it.") from None


def end_of_text_ids(loaded: ModelAndTokenizer) -> set[int | None]:
    """The tokens that end a text; some models have several."""
    model, tokenizer = loaded
    ids = model.generation_config.eos_token_id
    return {tokenizer.eos_token_id, *(ids if isinstance(ids, list) else [ids])}


def print_pieces(pieces: Iterable[Piece], out: Console, notes: Console):
    """Print each piece when it comes, as it is: rich's own print would expand tabs and cut spaces."""
    for text, style in pieces:
        console = notes if style == NOTE else out
        styled = Style.parse(style).render(text) if console.color_system else text
        try:
            print(styled, end="", file=console.file, flush=True)
        except BrokenPipeError:  # by `| head`
            console.on_broken_pipe()  # exits


def print_columns(titles: Iterable[str], texts: Iterable[Iterable[Piece]], out: Console):
    """Print the texts side by side; in a terminal, the columns grow with each piece."""
    table = Table(*(Column(Text(title), ratio=1, overflow="fold") for title in titles), expand=True, box=box.MINIMAL)
    columns = [Text() for _ in table.columns]
    table.add_row(*columns)
    with Live(table, console=out, auto_refresh=False) as live:
        for pieces in zip_longest(*texts, fillvalue=("", PLAIN)):
            for column, piece in zip(columns, pieces, strict=True):
                column.append(*piece)
            live.refresh()
        for column in columns:
            column.rstrip()
    if not out.is_terminal:
        out.line()


if __name__ == "__main__":
    main()
