"""Push checkpoints to the Hub during training: a queue, one upload at a time, each in a process of its own.

A thread would share the GIL with the training loop, and could not be killed when the run has to stop. Also, whatever
happens in the Hub client (out of memory, a crash, a hang) then ends an upload and never the training.
"""

import functools
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from modeling_gpt2repro.runs.folder import UPLOAD_LOG, step_of
from modeling_gpt2repro.storage.retry import MAX_BACKOFF_SECONDS

from .push import DEFAULT_HUB_WAIT_SECONDS, END_WITH_STDIN, EXIT_CODE_HUB_UNREACHABLE, TRAINING_STATE

LAST_CHECKPOINT_BRANCH = "last-checkpoint"
SNAPSHOT_PREFIX = ".push-"  # folders that begin so are deleted when a run starts (training/checkpoints.py)
PUSH_COMMAND = (sys.executable, "-m", "modeling_gpt2repro.hub.push")
CHECK_WAIT_SECONDS = 20  # at most, because the training waits for the check
MAX_CHECK_SECONDS = 120  # for a storage that falls silent after its first answer: Xet's client would wait half an hour
AWAY_PAUSE_SECONDS = 4  # the pause after the third failure in a row: by then the Hub is away, not busy for a moment
POLL_INTERVAL_SECONDS = 0.05
SECONDS_BETWEEN_REMINDERS = 30


@dataclass(frozen=True)
class UploadJob:
    """A folder to push; the queue deletes it afterwards."""

    folder: Path
    branch: str
    message: str
    with_training_state: bool = False


class RunningUpload(NamedTuple):
    """An upload in progress, and where its output begins in the log."""

    job: UploadJob
    process: subprocess.Popen
    log_offset: int
    started: float  # by time.monotonic()


@dataclass(eq=False)
class UploadQueue:
    """Pushes a run's checkpoints while it trains, and its final model."""

    repository: str | None  # 'owner/name', or the name of one of your own; None pushes nothing
    # What is pushed before the final model. 'end': nothing. 'every_save': each checkpoint's model, to main.
    # 'checkpoint': in addition the newest checkpoint with its training state, to the branch last-checkpoint.
    # 'all_checkpoints': in addition each checkpoint's model, to a branch step-NNNNNN of its own.
    strategy: str
    output_dir: Path  # the run's folder; the output of uploads is appended to its push.log
    private: bool | None = None  # visibility of a new repository; None takes the default of its owner's settings
    hub_wait_seconds: float = DEFAULT_HUB_WAIT_SECONDS  # how long a push retries while the Hub is away
    command: Sequence[str] = PUSH_COMMAND  # the program that pushes a folder
    stock_twin: bool = False  # whether the final model is pushed as plain GPT-2, too

    def __post_init__(self):
        self._pending: list[UploadJob] = []
        self._running: RunningUpload | None = None
        self._messages: list[str] = []
        self._hub_is_unreachable = False  # according to the last upload

    def check_access(self, is_resume: bool) -> str:
        """Find out before the first step whether pushing will work; returns a sentence that says so.

        Args:
            is_resume: Whether the run has been started before; then an unreachable Hub does not stop it.

        Raises:
            ValueError: If pushing will not work.
        """
        command = self._push_command(
            "--check", *self._twin_flags(), wait_seconds=min(CHECK_WAIT_SECONDS, self.hub_wait_seconds)
        )
        options = {**child_options(), "capture_output": True, "text": True, "timeout": MAX_CHECK_SECONDS}
        try:
            result = subprocess.run(command, **options)
        except subprocess.TimeoutExpired:
            code, problem = EXIT_CODE_HUB_UNREACHABLE, f"the Hub did not answer within {MAX_CHECK_SECONDS} s."
        else:
            code, problem = result.returncode, last_line(result.stderr) or f"it ended with {result.returncode}"
        if code == 0:
            return last_line(result.stdout)
        if code == EXIT_CODE_HUB_UNREACHABLE and is_resume:
            return f"{problem} The run continues, and pushes once the Hub can be reached again."
        raise ValueError(f"push_to_hub: {problem}")

    def enqueue(self, checkpoint: Path):
        """Queue a new checkpoint as the strategy says; it replaces what is pending for the same branch."""
        if self.repository is None or self.strategy == "end":
            return
        branches = ["main"]
        if self.strategy == "checkpoint":
            branches.append(LAST_CHECKPOINT_BRANCH)
        if self.strategy == "all_checkpoints":
            branches.append(checkpoint.name)
        for branch in branches:
            self._drop(branch)
            job = UploadJob(
                folder=self.output_dir / f"{SNAPSHOT_PREFIX}{branch}-{checkpoint.name}",
                branch=branch,
                message=f"Training in progress, step {step_of(checkpoint)}",
                with_training_state=branch == LAST_CHECKPOINT_BRANCH,
            )
            try:
                snapshot(checkpoint, job.folder, job.with_training_state)
                self._pending.append(job)
            except OSError as error:
                self._fail(job, error)
        self._start_next()

    def poll(self) -> list[str]:
        """Start the next upload if one has ended; returns a sentence about each that ended since the last call."""
        if self._running and self._running.process.poll() is not None:
            job, process, *_ = self._running
            self._hub_is_unreachable = process.returncode == EXIT_CODE_HUB_UNREACHABLE
            try:
                # Without output it was killed, for example by the kernel when memory ran out.
                outcome = last_line(self._output()) or f"it ended with {process.returncode}"
            except OSError:
                outcome = f"{UPLOAD_LOG} cannot be read"
            if process.returncode != 0:
                outcome = f"not pushed, because {outcome}"
            self._messages.append(f"{job.message}: {outcome}")
            shutil.rmtree(job.folder, ignore_errors=True)
            self._running = None
            self._start_next()
        messages = self._messages
        self._messages = []
        return messages

    def drop_pending(self):
        """Free disk space: snapshots may hold the only links to files of checkpoints that are deleted already."""
        for job in self._pending[:]:
            self._messages.append(f"{job.message}: not pushed to {job.branch}, dropped from the queue")
            self._drop(job.branch)

    def push_final(self, folder: Path, show: Callable[[str], None], should_stop: Callable[[], bool]) -> int:
        """Push the final model, after the checkpoints that have a branch of their own.

        Checkpoints for main are dropped, because the final model replaces them there. The others may take their time,
        but only until one finds the Hub away: then the final push alone waits for it, `hub_wait_seconds` at most. A
        line counts them down, unless the Hub answers: a slow push is not given up.

        Returns:
            The exit code: 0 if the model is on the Hub; otherwise the command that pushes it has been shown.
        """
        if self.repository is None:
            return 0
        self._drop("main")
        self._show_messages(show)
        if self._running and self._running.job.branch == "main":
            self._kill_running()
            self._start_next()
        away_since = self._wait_for_uploads(show, should_stop)
        wait_seconds = max(0.0, self.hub_wait_seconds - (time.monotonic() - away_since))
        if self._running:
            self._pending.insert(0, self._kill_running())
        self.drop_pending()
        self._show_messages(show)
        show(f"Pushing {folder} to {self.repository}; if the Hub is away, this waits {wait_seconds:.0f} s at most.")
        # The absolute path, because the command may be repeated from elsewhere, and a folder's name may begin with "-".
        command = self._push_command(str(folder.absolute()), "--message", "End of training", *self._twin_flags())
        try:
            # Its output is the terminal's.
            process = subprocess.Popen([*command, "--hub_wait_seconds", str(wait_seconds)], **child_options())
        except OSError as error:
            show(f"The push cannot be started ({error.strerror or error}).")
        else:
            while process.poll() is None and not should_stop():
                time.sleep(POLL_INTERVAL_SECONDS)
            process.kill()
            if process.wait() == 0:
                return 0
        command_to_show = shlex.join(["python", *command[1:]])
        show(f"\nThe model is in {folder}, but not on the Hub. Push it with\n\n    {command_to_show}\n")
        return EXIT_CODE_HUB_UNREACHABLE

    def close(self):
        """Kill the running upload and drop the others: the Hub applies a commit completely or not at all."""
        if self._running:
            self._kill_running()
        for job in self._pending[:]:
            self._drop(job.branch)
        self.repository = None  # what is called from here on does nothing

    def _wait_for_uploads(self, show: Callable[[str], None], should_stop: Callable[[], bool]) -> float:
        """Wait for the queue until the Hub is away; returns since when it has been (time.monotonic()), or now."""
        self._hub_is_unreachable = False
        shown, next_reminder = None, 0.0
        waiting_since = time.monotonic()
        while self._running and not should_stop():
            upload, now = self._running, time.monotonic()
            if upload is not shown or now > next_reminder:
                show(
                    f"{upload.job.message}: still being pushed to {upload.job.branch}, for {now - upload.started:.0f} "
                    "s now. The run waits while the Hub answers; if it is away, "
                    f"{self.hub_wait_seconds:.0f} s at most (--hub_wait_seconds), the final push included."
                )
                shown, next_reminder = upload, now + SECONDS_BETWEEN_REMINDERS
            time.sleep(POLL_INTERVAL_SECONDS)
            self._show_messages(show)
            if self._hub_is_unreachable or (self._running and self._is_retrying()):
                show("The Hub is away: only the final model is still pushed; checkpoints are given up.")
                # An upload that has given up has waited all the time; one that says so had an answer before.
                return max(waiting_since, upload.started) if self._hub_is_unreachable else time.monotonic()
        return time.monotonic()

    def _is_retrying(self) -> bool:
        """Whether the running upload has failed three times in a row, and pauses."""
        try:
            pause = re.search(r"trying again in (\d+) s", last_line(self._output()))
            seconds_ago = time.time() - (self.output_dir / UPLOAD_LOG).stat().st_mtime
        except OSError:
            return False
        # After a pause it may be uploading again, without a word.
        return bool(pause) and int(pause[1]) >= AWAY_PAUSE_SECONDS and seconds_ago < MAX_BACKOFF_SECONDS

    def _output(self) -> str:
        """What the running upload has printed."""
        return (self.output_dir / UPLOAD_LOG).read_bytes()[self._running.log_offset :].decode(errors="replace")

    def _kill_running(self) -> UploadJob:
        job, process, *_ = self._running
        process.kill()  # not terminate: if the run was started with SIGTERM ignored, its children ignore it, too
        process.wait()
        shutil.rmtree(job.folder, ignore_errors=True)
        self._running = None
        return job

    def _drop(self, branch: str):
        for job in [job for job in self._pending if job.branch == branch]:
            shutil.rmtree(job.folder, ignore_errors=True)
            self._pending.remove(job)

    def _start_next(self):
        while self._pending and not self._running:
            job = self._pending.pop(0)
            flags = ["--branch", job.branch, "--message", job.message]
            if job.with_training_state:
                flags.append("--with_training_state")
            command = self._push_command(str(job.folder.absolute()), *flags, wait_seconds=self.hub_wait_seconds)
            try:
                with open(self.output_dir / UPLOAD_LOG, "ab") as log:
                    log_offset = log.tell()
                    options = child_options(HF_HUB_DISABLE_PROGRESS_BARS="1")
                    process = subprocess.Popen(command, **options, stdout=log, stderr=log)
                self._running = RunningUpload(job, process, log_offset, time.monotonic())
            except OSError as error:
                self._fail(job, error)

    def _fail(self, job: UploadJob, error: OSError):
        reason = error.strerror or error
        if isinstance(error, shutil.Error):  # of copytree: [(source, target, reason), ...]
            reason = error.args[0][0][-1]
        self._messages.append(f"{job.message}: not pushed to {job.branch} ({reason})")
        shutil.rmtree(job.folder, ignore_errors=True)  # what there is of the snapshot

    def _show_messages(self, show: Callable[[str], None]):
        for message in self.poll():
            show(message)

    def _twin_flags(self) -> list[str]:
        return ["--stock_twin"] if self.stock_twin else []

    def _push_command(self, *words: str, wait_seconds: float | None = None) -> list[str]:
        command = [*self.command, *words, "--hub_model_id", self.repository]
        if self.private is not None:
            command.append("--private" if self.private else "--no-private")
        if wait_seconds is not None:
            command += ["--hub_wait_seconds", str(wait_seconds)]
        return command


def child_options(**environment: str) -> dict:
    """Options of `subprocess` for a push that ends with this process, even if that is killed (see push.py)."""
    return {"env": {**upload_environment(), END_WITH_STDIN: "1", **environment}, "stdin": silent_pipe()}


@functools.cache
def silent_pipe() -> int:
    """The read end of a pipe into which nothing is written, and which ends with this process."""
    return os.pipe()[0]


def upload_environment() -> dict[str, str]:
    """Environment of a process that can import this package, and imports neither the model nor torch with it."""
    package_root = str(Path(__file__).parents[2])
    paths = [package_root, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "GPT2REPRO_LAZY": "1"}


def snapshot(checkpoint: Path, target: Path, with_training_state: bool):
    """Keep a checkpoint's files for an upload that may take longer than the run keeps the checkpoint.

    Hard links need no time and no space: when the run deletes the checkpoint, the data stay until the last link goes.
    Symbolic links stay what they are, for the push to refuse those that lead elsewhere.
    """
    shutil.rmtree(target, ignore_errors=True)
    ignore = None if with_training_state else shutil.ignore_patterns(Path(TRAINING_STATE).parent.name)
    shutil.copytree(checkpoint, target, symlinks=True, ignore=ignore, copy_function=link_or_copy)


def link_or_copy(source: str, target: str):
    """Create a hard link, or a copy on file systems without hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def last_line(text: str) -> str:
    """'a\\nb\\n' -> 'b'; '' -> ''."""
    return (text.strip().splitlines() or [""])[-1]
