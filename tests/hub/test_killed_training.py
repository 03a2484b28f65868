"""Pushes whose training is killed."""

import signal
import subprocess
import sys

import psutil
import pytest
from patience import wait_until

from modeling_gpt2repro.hub.background_upload import upload_environment

TRAINING = """
import sys
from pathlib import Path
from modeling_gpt2repro.hub.background_upload import UploadQueue

folder, what = Path(sys.argv[1]), sys.argv[2]
queue = UploadQueue("user/killed", "every_save", folder.parent)
if what == "check_access":
    queue.check_access(is_resume=False)
elif what == "push_final":
    queue.push_final(folder, print, lambda: False)
else:
    queue.enqueue(folder)
    sys.stdin.read()
"""


@pytest.mark.parametrize(
    ("what", "killer"),
    [
        ("enqueue", signal.SIGKILL),
        ("push_final", signal.SIGKILL),
        ("check_access", signal.SIGKILL),
        ("check_access", signal.SIGTERM),
        ("check_access", signal.SIGINT),
    ],
)
def test_a_training_that_is_killed_leaves_no_push_behind(on_hub, folder, what, killer, terminal_signals):
    asked = len(on_hub.log())
    with on_hub.faults({"match": "POST /api/repos/create", "until": "never"}):
        command = [sys.executable, "-c", TRAINING, str(folder), what]
        with subprocess.Popen(command, env=upload_environment(), stdin=subprocess.PIPE) as training:
            wait_until(lambda: "late" in [line["status"] for line in on_hub.log()[asked:]])
            (push,) = psutil.Process(training.pid).children()
            training.send_signal(killer)
        wait_until(lambda: not push.is_running() or push.status() == psutil.STATUS_ZOMBIE)
