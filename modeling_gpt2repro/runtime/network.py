"""How processes on several machines find each other, and how long they wait for each other."""

import contextlib
import ipaddress
import os
import socket
from datetime import timedelta

import psutil

MAX_SAVE_TIME = timedelta(hours=1)  # 1558M: 19 GB are written, hashed and flushed; torch's default is ten minutes
ELSEWHERE = "198.51.100.1"  # RFC 5737, for examples: nobody has it, so the way to it is the default route


def choose_gloo_interface():
    """Let gloo use the network interface that reaches the main process; a choice of the user's is kept.

    Gloo, which carries tensors between CPUs, listens where this machine's own name resolves to. On Debian that is
    127.0.1.1, in many containers 127.0.0.1, and no other machine gets there (pytorch#68726). NCCL needs none of this.
    Must be called before the process group is made. Where there is only one machine nothing is changed.
    """
    interface = gloo_interface()
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def gloo_interface() -> str | None:
    """The interface whose address this machine has towards the main process; None if gloo's own choice is as good."""
    processes = os.environ.get("WORLD_SIZE", "1")
    if "MASTER_ADDR" not in os.environ or processes == os.environ.get("LOCAL_WORLD_SIZE", "1"):
        return None
    address = own_address_towards(os.environ["MASTER_ADDR"])
    if address is not None and is_loopback(address) and "LOCAL_WORLD_SIZE" in os.environ:
        # There are other machines, so this is the main one, whose own name resolves to loopback here, and only here.
        address = own_address_towards(ELSEWHERE)
    return None if address is None or is_loopback(address) else interface_with(address)


def own_address_towards(host: str) -> str | None:
    """The address that this machine's packets to `host` come from, IPv4 or IPv6; None if there is no way to it."""
    with contextlib.suppress(OSError):  # its name does not resolve
        for family, kind, protocol, _, address in socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM):
            with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as udp:
                udp.connect(address)  # which sends nothing: it only looks up the route
                return udp.getsockname()[0]
    return None


def interface_with(address: str) -> str | None:
    """The name of the network interface that has the address, such as "eth0"."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in addresses):  # fe80::1%eth0, of one link only
            return name
    return None


def is_loopback(address: str) -> bool:
    """Whether only this machine can reach the address."""
    return ipaddress.ip_address(address).is_loopback
