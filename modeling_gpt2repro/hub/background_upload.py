"""The pushes of a run: each by a process beside it, one after the other; what is outdated while it waits is dropped."""

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from .upload import HUB_IS_AWAY, TRAINING_STATE

LAST_CHECKPOINT = "last-checkpoint"
SNAPSHOT = ".push-"  # how the folders begin that are being pushed
LOG = "push.log"
# The check holds up the start; a push beside the training is made up for by the next; the last is worth waiting for.
CHECK_SECONDS, BESIDE_SECONDS, LAST_SECONDS = 20, 600, 1800
SECONDS_BETWEEN_LOOKS = 0.05


@dataclass(frozen=True)
class UploadJob:
    """A folder, the branch that is to hold it, and what the commit says."""

    folder: Path
    branch: str
    message: str
    with_training_state: bool = False


class UploadQueue:
    """UploadQueue the checkpoints of a run while it goes on, and its model in the end.

    Args:
        repository: 'owner/name', or the name of one's own; None where nothing is to be pushed.
        strategy: What is pushed before the final model. 'end': nothing. 'every_save': the model of each checkpoint, to
            main. 'checkpoint': and the newest one with its training state, to the branch last-checkpoint, from which a
            run goes on anywhere. 'all_checkpoints': or the model of each, to a branch step-NNNNNN of its own.
        output_dir: The run's folder; what the pushes say is appended to its push.log.
        private: Of a new repository; None leaves it to the owner's settings.
    """

    def __init__(self, repository: str | None, strategy: str, output_dir: Path, private: bool | None = None):
        self.repository, self.strategy, self.output_dir, self.private = repository, strategy, output_dir, private
        self._waiting: list[UploadJob] = []
        self._running: tuple[UploadJob, subprocess.Popen, int] | None = None  # and its offset in the log
        self._news: list[str] = []
        self._hub_is_away = False  # as the last push has found

    def check(self, goes_on: bool) -> str:
        """Find out before the first step whether pushing will work, and say so in a sentence.

        Args:
            goes_on: The run has begun before; a Hub that is away does not hold it up.

        Raises:
            ValueError: If it will not.
        """
        command = self._command("--check", "--patience_seconds", str(CHECK_SECONDS))
        result = subprocess.run(command, env=environment(), capture_output=True, text=True)
        if result.returncode == HUB_IS_AWAY and goes_on:
            return f"{last_line(result.stderr)} The run goes on, and pushes when it is back."
        if result.returncode:
            raise ValueError(f"push_to_hub: {last_line(result.stderr)}")
        return last_line(result.stdout)

    def offer(self, checkpoint: Path):
        """A checkpoint stands: push it as the strategy says; what still waits for the same branch gives way."""
        if self.repository is None or self.strategy == "end":
            return
        step = int(checkpoint.name.removeprefix("step-"))
        on_main = UploadJob(checkpoint, "main", f"Training in progress, step {step}")
        wanted = [on_main]
        if self.strategy == "checkpoint":
            wanted.append(replace(on_main, branch=LAST_CHECKPOINT, with_training_state=True))
        if self.strategy == "all_checkpoints":
            wanted.append(replace(on_main, branch=checkpoint.name))
        for push in wanted:
            self._drop(push.branch)
            of_snapshot = replace(push, folder=self.output_dir / f"{SNAPSHOT}{push.branch}-{checkpoint.name}")
            try:
                take_snapshot(push, of_snapshot.folder)
                self._waiting.append(of_snapshot)
            except OSError as error:
                self._fail(of_snapshot, error)
        self._start_next()

    def news(self) -> list[str]:
        """What has ended since the last call, a sentence each; the next one is started."""
        if self._running and self._running[1].poll() is not None:
            push, process, begin = self._running
            self._running, said = None, f"{LOG} cannot be read"
            self._hub_is_away = process.returncode == HUB_IS_AWAY
            with suppress(OSError):
                said = last_line((self.output_dir / LOG).read_bytes()[begin:].decode(errors="replace"))
            said = said or f"it ended with {process.returncode}"  # killed, by whoever wants its memory
            self._news.append(f"{push.message}: {said if process.returncode == 0 else f'not pushed, because {said}'}")
            shutil.rmtree(push.folder, ignore_errors=True)
            self._start_next()
        news, self._news = self._news, []
        return news

    def make_room(self):
        """The disk may be full: give up what waits, whose files may be those of checkpoints that are long gone."""
        for push in self._waiting[:]:
            self._news.append(f"{push.message}: not pushed to {push.branch}, but given up")
            self._drop(push.branch)

    def finish(self, folder: Path, say: Callable[[str], None], stopped: Callable[[], bool]) -> int:
        """Push the final model, behind the checkpoints that have branches of their own; it makes up for those on main.

        Those are waited for as long as the Hub is there: each may take its time, but not each wait for the Hub anew.

        Args:
            folder: The model's.
            say: Shows a line.
            stopped: Whether to wait no longer.

        Returns:
            The exit code: 0 if the model is on the Hub, else HUB_IS_AWAY, and the command that pushes it was shown.
        """
        if self.repository is None:
            return 0
        self._drop("main")
        for sentence in self.news():
            say(sentence)
        if self._running and self._running[0].branch == "main":
            self._end_running()
            self._start_next()
        self._hub_is_away = False
        while self._running and not (self._hub_is_away or stopped()):
            time.sleep(SECONDS_BETWEEN_LOOKS)
            for sentence in self.news():
                say(sentence)
        if self._running:
            self._waiting.insert(0, self._end_running())
        self.make_room()
        for sentence in self.news():
            say(sentence)
        command = self._command(str(folder), "--message", "End of training")
        say(f"Pushing {folder} to {self.repository}.")
        process = subprocess.Popen([*command, "--patience_seconds", str(LAST_SECONDS)], env=environment())
        while process.poll() is None and not stopped():
            time.sleep(SECONDS_BETWEEN_LOOKS)
        process.kill()
        if process.wait() == 0:
            return 0
        again = shlex.join(["python", *command[1:]])
        say(f"\nThe model is in {folder}, but not on the Hub. Push it with\n\n    {again}\n")
        return HUB_IS_AWAY

    def close(self):
        """End what is under way; the Hub takes a commit as a whole or not at all."""
        if self._running:
            self._end_running()
        for branch in {push.branch for push in self._waiting}:
            self._drop(branch)
        self.repository = None

    def _end_running(self) -> UploadJob:
        push, process, _ = self._running
        process.kill()  # who ignores SIGTERM has let his children inherit that
        process.wait()
        shutil.rmtree(push.folder, ignore_errors=True)
        self._running = None
        return push

    def _drop(self, branch: str):
        for push in [push for push in self._waiting if push.branch == branch]:
            shutil.rmtree(push.folder, ignore_errors=True)
            self._waiting.remove(push)

    def _start_next(self):
        while self._waiting and not self._running:
            push = self._waiting.pop(0)
            words = [str(push.folder), "--branch", push.branch, "--message", push.message]
            words += ["--with_training_state"] if push.with_training_state else []
            command = self._command(*words, "--patience_seconds", str(BESIDE_SECONDS))
            quiet = {**environment(), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
            try:
                with open(self.output_dir / LOG, "ab") as log:
                    begin = log.tell()
                    process = subprocess.Popen(command, env=quiet, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
            except OSError as error:
                self._fail(push, error)
            else:
                self._running = (push, process, begin)

    def _fail(self, push: UploadJob, error: OSError):
        reason = error.args[0][0][-1] if isinstance(error, shutil.Error) else error.strerror  # of many files the first
        self._news.append(f"{push.message}: not pushed to {push.branch} ({reason or error})")
        shutil.rmtree(push.folder, ignore_errors=True)

    def _command(self, *words: str) -> list[str]:
        private = {None: [], True: ["--private"], False: ["--no-private"]}[self.private]
        module = "modeling_gpt2repro.hub.push"
        return [sys.executable, "-m", module, *words, "--hub_model_id", self.repository, *private]


def environment() -> dict[str, str]:
    """For a process that finds this package, and waits for neither the model nor torch."""
    package_root = str(Path(__file__).parents[2])
    path = os.pathsep.join([package_root, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "GPT2REPRO_LAZY": "1"}


def take_snapshot(push: UploadJob, snapshot: Path):
    """The folder as it is now, for a push that may take longer than the run keeps it: hard links, or else copies."""
    shutil.rmtree(snapshot, ignore_errors=True)
    left_out = None if push.with_training_state else shutil.ignore_patterns(Path(TRAINING_STATE).parent.name)
    shutil.copytree(push.folder, snapshot, ignore=left_out, copy_function=link_or_copy)


def link_or_copy(source: str, target: str):
    """One file, by a second name where the disk knows such."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def last_line(text: str) -> str:
    """'a\\nb\\n' -> 'b'; '' of nothing."""
    return (text.strip().splitlines() or [""])[-1]
