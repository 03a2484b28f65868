"""What a push sends besides a model's folder: report, curve and samples of its run, and the model as plain GPT-2.

What takes seconds to import is imported where it is needed: a training pushes each checkpoint in a process of its own.
"""

import os
import re
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import NamedTuple
from urllib.parse import quote

import psutil
from huggingface_hub import CommitOperationAdd, HfApi, constants, get_session
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, validate_repo_id

from modeling_gpt2repro.runs.folder import (
    CERTIFICATE_FILE,
    LOSS_PICTURE,
    MODEL_FOLDER,
    REPORT_FILE,
    RUN_CONFIG_FILE,
    SAMPLES_FILE,
    checkpoints_of_run,
    model_of_run,
    step_of,
)
from modeling_gpt2repro.storage.json_files import read_bounded
from modeling_gpt2repro.storage.retry import without_signatures

MAX_TEXT_BYTES = 2**22  # of a card or a .gitignore
TEMPORARY = "gpt2repro-push-"  # and the process's number, begins the name of a folder that is deleted at the end
REPORT_HEADING, TWIN_HEADING = "## Report", "## Plain GPT-2"
EXAMPLE = re.compile(r'^folder = "[^"]*".*$', re.MULTILINE)  # the line of `model_card.CARD` that names the model
TWIN_SUFFIX = "-gpt2"  # of the repository with the plain GPT-2
TWIN_SEQUENCES, TWIN_TOKENS = 2, 64  # whose logits are compared
TWIN_TOLERANCE = 1e-3  # of the largest logit. In fp32 rounding is a few millionths of it (tests/hub/test_conversion.py)
REPORT_SECTION = """[The run's report]({folder}/{page}) has its curves, what it wrote after how many steps, where the
time went, and what went wrong."""
TWIN_LINK = """[{twin}]({address}) has the same weights as a plain GPT-2 without code of its own, for servers,
converters and other programs that know GPT-2 only."""
TWIN_SENTENCE = "The weights of {repository} as a plain GPT-2, for servers, converters and other programs that know "
TWIN_SENTENCE += "GPT-2 only."
TWIN_SECTION = """Measured when this folder was made, in fp32 on the CPU: the logits of {sequences} sequences of
{tokens} random tokens {compare} those of the original, the largest of which is {largest:.1f}. The
parameters are the same numbers; the matrices in the blocks are stored transposed.
"""


class Push(NamedTuple):
    """What goes to a repository in one commit."""

    repository: str
    folder: Path  # of a model
    extra: Path | None = None  # a folder whose files are pushed, too, and replace those with the same names


def prepare_pushes(
    folder: Path, with_twin: bool, temporary: ExitStack, show: Callable[[str], None], repository: str
) -> list[Push]:
    """Write what is to be pushed besides the model's own files.

    Args:
        folder: Of a model, or of a run.
        with_twin: Whether the model is pushed as a plain GPT-2 as well, to a repository beside the first.
        temporary: Deletes what was written when it is closed.
        show: Receives sentences on what is not as one may expect.

    Raises:
        ValueError: If there is no model yet, or the twin cannot be made.
    """
    is_model = (folder / "config.json").is_file()
    if is_model and not with_twin:
        return [Push(repository, folder)]
    delete_stale_folders()
    prefix = f"{TEMPORARY}{os.getpid()}-"
    extra, twin = (Path(temporary.enter_context(TemporaryDirectory(prefix=prefix))) for _ in range(2))
    pushes = [Push(repository, folder if is_model else add_run(folder, extra, show), extra)]
    if with_twin:
        pushes.append(Push(f"{repository}{TWIN_SUFFIX}", twin))
        validate_repo_id(pushes[-1].repository)
        write_twin(pushes[0], twin)
        address = without_signatures(f"{constants.ENDPOINT}/{pushes[-1].repository}")
        link = TWIN_LINK.format(twin=pushes[-1].repository, address=address)
        add_section(pushes[0].folder, extra, TWIN_HEADING, link)
    return pushes


def delete_stale_folders():
    """Delete what pushes that were killed have left: with a twin, as much as a model takes."""
    for folder in Path(gettempdir()).glob(f"{TEMPORARY}*-*"):
        process = folder.name.removeprefix(TEMPORARY).partition("-")[0]
        if process.isdecimal() and not psutil.pid_exists(int(process)):
            shutil.rmtree(folder, ignore_errors=True)  # somebody else's stays


def add_run(run: Path, extra: Path, show: Callable[[str], None]) -> Path:
    """Write what a run has besides its model into `extra`; returns the folder of the model.

    Raises:
        ValueError: If there is no model yet, or a file is a link, which may lead to what is not meant for the Hub.
    """
    from modeling_gpt2repro.runs.report.__main__ import files_of
    from modeling_gpt2repro.runs.report.sections import write_report

    model = model_to_push(run)
    if model.name != MODEL_FOLDER:
        show(f"{run} is not finished: its model is that of the last checkpoint, {model.name}.")
    for name in (LOSS_PICTURE, SAMPLES_FILE, CERTIFICATE_FILE):
        path = run / name
        if path.is_symlink():
            raise ValueError(f"{path} is a link: to push that file, put a copy in the link's place.")
        if path.is_file() and not (model / name).exists():
            shutil.copyfile(path, extra / name)
    try:
        report = write_report(run)
    except ValueError as error:
        show(f"There is no report to push: {error}")
        return model
    for remark in report.remarks:
        show(remark)
    page = extra / REPORT_FILE / f"{REPORT_FILE}.md"
    page.parent.mkdir()
    for path, content in files_of(report, page).items():
        path.write_bytes(content)
    text = REPORT_SECTION.format(folder=REPORT_FILE, page=page.name)
    if (extra / SAMPLES_FILE).exists():
        text += f" All samples are in [{SAMPLES_FILE}]({SAMPLES_FILE})."
    add_section(model, extra, REPORT_HEADING, text)
    return model


def model_to_push(run: Path) -> Path:
    """The final model of a run or, if it is not finished or continues since then, its last checkpoint.

    Raises:
        ValueError: If there is neither.
    """
    from modeling_gpt2repro.runs.read import read_metrics

    model = model_of_run(run)
    if model is None:
        if (run / RUN_CONFIG_FILE).is_file():
            raise ValueError(
                f"{run} is the folder of a run that has saved no model yet: wait for its first checkpoint."
            )
        raise ValueError(
            f"{run} has no model to push (neither config.json nor {MODEL_FOLDER}/ nor step-...): give the folder of a "
            "run or of a model."
        )
    if model.name == MODEL_FOLDER and (records := read_metrics(model)):
        step = max(record["step"] for record in records)
        later = [path for path in checkpoints_of_run(run) if step_of(path) > step and (path / "config.json").is_file()]
        return (later or [model])[-1]
    return model


def add_section(folder: Path, extra: Path, heading: str, text: str):
    """Push the model's card with one more section; the one in its own folder stays as it is."""
    from .certificate import replace_section

    cards = [path for path in (extra / "README.md", folder / "README.md") if path.is_file()]
    if cards:
        card = replace_section(read_text(cards[0]), text, heading)
        (extra / "README.md").write_text(card, encoding="utf-8")


def read_text(path: Path) -> str:
    """A text file of a folder that is pushed; raises ValueError if it is none."""
    try:
        return read_bounded(path, MAX_TEXT_BYTES).decode()
    except ValueError as error:
        reason = "it is not UTF-8" if isinstance(error, UnicodeError) else error
        raise ValueError(f"{path} cannot be read: {reason}.") from error


def card_to_push(
    api: HfApi, repository: str, branch: str, there: dict[str, RepoFile], sent: list[CommitOperationAdd]
) -> str | None:
    """The card as it is pushed: its example names the repository, and it keeps sections of the one that is there.

    None if there is no card, or it is pushed as it is.

    Args:
        there: Path -> file in the repository.
        sent: The files to push.

    Raises:
        HTTPError: If the card in the repository cannot be read.
    """
    cards = [file.path_or_fileobj for file in sent if file.path_in_repo == "README.md"]
    if not cards:
        return None
    local = read_text(Path(cards[0]))
    card = with_address(local, repository, branch)
    if "README.md" in there:
        card = keep_sections(api, repository, branch, card, there, sent)
    return card if card != local else None


def with_address(card: str, repository: str, branch: str) -> str:
    """The card, whose example loads the model from the repository; it would not load another branch than `main`."""
    return EXAMPLE.sub(lambda _: f'folder = "{repository}"', card, count=1) if branch == "main" else card


def keep_sections(
    api: HfApi, repository: str, branch: str, card: str, there: dict[str, RepoFile], sent: list[CommitOperationAdd]
) -> str:
    """The card, with what the one in the repository says of what stays there.

    That is the report, and the twin if the weights stay: it would not be the twin of others.
    """
    from .certificate import find_section, replace_section

    address = f"{api.endpoint}/{repository}/resolve/{quote(branch, safe='')}/README.md"
    response = get_session().get(address, headers=build_hf_headers())
    hf_raise_for_status(response)
    before = response.content.decode(errors="replace")
    hashes = {name: file.lfs.sha256 for name, file in there.items() if file.lfs is not None}
    weights = [file for file in sent if file.path_in_repo.endswith(".safetensors")]
    headings = [REPORT_HEADING] if f"{REPORT_FILE}/{REPORT_FILE}.md" in there else []
    if all(hashes.get(file.path_in_repo) == file.upload_info.sha256.hex() for file in weights):
        headings.append(TWIN_HEADING)
    kept = {heading: find_section(before, heading) for heading in headings if find_section(card, heading) is None}
    for heading, text in kept.items():
        card = card if text is None else replace_section(card, text, heading)
    return card


def write_twin(original: Push, target: Path):
    """Write the model as transformers' GPT2LMHeadModel, with a card that says how equal the two are.

    Raises:
        ValueError: If the model cannot be read, is a plain GPT-2 already, or the two differ.
    """
    import torch

    from .conversion import GPT2LMHeadModel, load_gpt2_or_hf, to_hf_gpt2
    from .export import save_hub_folder
    from .model_card import derived_origin

    model, tokenizer = load_gpt2_or_hf(str(original.folder))
    if isinstance(model, GPT2LMHeadModel):
        raise ValueError(f"{original.folder} is a plain GPT-2 already: leave out --stock_twin.")
    twin = to_hf_gpt2(model)
    origin = derived_origin("Converted from", str(original.folder))
    origin = replace(
        origin,
        sentence=TWIN_SENTENCE.format(repository=original.repository),
        metadata={**origin.metadata, "base_model": original.repository},
    )
    save_hub_folder(twin, tokenizer, target, origin, generation_config=model.generation_config)
    generator = torch.Generator().manual_seed(0)
    tokens = min(TWIN_TOKENS, model.config.n_positions)
    ids = torch.randint(model.config.vocab_size, (TWIN_SEQUENCES, tokens), generator=generator)  # (B, T)
    with torch.no_grad():
        logits, twin_logits = (each.float().eval()(ids).logits for each in (model, twin))  # (B, T, V)
    difference, largest = float((logits - twin_logits).abs().max()), float(logits.abs().max())
    if not difference <= TWIN_TOLERANCE * largest:  # or NaN
        raise ValueError(
            f"{original.folder} as a plain GPT-2 has other logits (they differ by {difference:.1e}, and the largest is "
            f"{largest:.1e}): its weights may not be finite; push without --stock_twin."
        )
    compare = f"differ by at most {difference:.0e} from" if difference else "are equal, to the last bit, to"
    section = TWIN_SECTION.format(sequences=len(ids), tokens=tokens, compare=compare, largest=largest)
    with open(target / "README.md", "a", encoding="utf-8") as card:
        card.write(f"\n## Equal to {original.repository}\n\n{section}")
