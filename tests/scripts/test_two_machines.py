"""The script on two machines: network namespaces of Linux, each with its own address, host name and /etc/hosts."""

import os
import shutil
import subprocess
import sys

import pytest
from patience import PATIENCE_SECONDS, wait_until
from toy_runs import CPU_FP32, SCRIPT, WEIGHTS, logged_values, toy_flags

# Above 127.0.1.1: gloo has the higher address connect to the lower, so the second machine must reach the first.
MACHINES = {"first": "192.168.77.1", "second": "192.168.77.2"}
SHORT = {"train_tokens": 6 * 256, "warmup_tokens": 256, "save_steps": 3, "eval_steps": 0, "num_samples": 0}
# What a machine has for itself. Its processes end with it.
UNSHARE = ("unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
# A machine: waits until its network is plugged in, then starts what is in its arguments.
MACHINE = """
set -e
read plugged_in
ip link set lo up
ip address add "$ADDRESS/24" dev net0
ip link set net0 up
ip route add default dev net0
mount --bind "$HOSTS" /etc/hosts
echo "$NAME" > /proc/sys/kernel/hostname
exec "$@"
"""


def why_not() -> str | None:
    """Why this computer cannot play two machines; None if it can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "network namespaces need Linux and root"
    if missing := [name for name in ("ip", "unshare", "nsenter", "mount") if shutil.which(name) is None]:
        return f"{', '.join(missing)} is not installed"
    tried = "ip link add net0 type veth peer name net1 && mount -t tmpfs none /mnt"
    result = subprocess.run([*UNSHARE, "sh", "-c", tried], capture_output=True, text=True)
    return None if result.returncode == 0 else f"no namespaces, or no veth, may be made here: {result.stderr.strip()}"


def start_machine(name, main_process, folder, *flags):
    """One of MACHINES, whose own name resolves to loopback, as on Debian; it starts as soon as it reads a line."""
    others = "".join(f"{address} {other}\n" for other, address in MACHINES.items() if other != name)
    hosts = folder / f"hosts.{name}"
    hosts.write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n{others}")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=1", "--nnodes=2"]
    launcher += [f"--node_rank={list(MACHINES).index(name)}", f"--master_addr={main_process}", "--master_port=29517"]
    return subprocess.Popen(
        [*UNSHARE, "sh", "-c", MACHINE, "sh", *launcher, str(SCRIPT), *flags],
        env={**os.environ, **CPU_FP32, "NAME": name, "ADDRESS": MACHINES[name], "HOSTS": str(hosts)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("main_process", [MACHINES["first"], "first"])
def test_two_machines_whose_names_resolve_to_loopback_train_to_the_end(shards, finished, tmp_path, main_process):
    """By name, the first machine finds its main process at 127.0.1.1, and the second at its real address."""
    if reason := why_not():
        pytest.skip(reason)
    flags = toy_flags(tmp_path / "run", shards, **SHORT)
    machines = [start_machine(name, main_process, tmp_path, *flags) for name in MACHINES]
    outputs = []
    try:
        first, second = (f"/proc/{machine.pid}/ns/net" for machine in machines)
        own = os.readlink("/proc/self/ns/net")
        wait_until(lambda: own not in (os.readlink(first), os.readlink(second)))
        cable = f"ip link add net0 type veth peer name net0 netns {machines[1].pid}"
        subprocess.run(["nsenter", f"--net={first}", *cable.split()], check=True)
        for machine in machines:
            machine.stdin.write("\n")
            machine.stdin.flush()
        for machine in machines:
            outputs.append(machine.communicate(timeout=PATIENCE_SECONDS)[0])
    finally:
        for machine in machines:
            machine.kill()
    assert [machine.returncode for machine in machines] == [0, 0], "\n".join(outputs)
    assert (tmp_path / "run" / WEIGHTS).exists()
    # The first step knows nothing of the shorter schedule: it is that of one process.
    assert logged_values(tmp_path / "run")[0] == pytest.approx(logged_values(finished[0])[0], abs=1e-5)
    assert len(logged_values(tmp_path / "run")) == 6
