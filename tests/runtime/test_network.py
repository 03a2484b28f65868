"""Which network interface gloo takes: by made-up tables of a machine's addresses, and by this machine's own."""

import os
import socket
from types import SimpleNamespace

import pytest

from modeling_gpt2repro.runtime import network

INTERFACES = {
    "lo": ["127.0.0.1", "::1"],
    "docker0": ["172.17.0.1"],
    "eth0": ["192.0.2.7", "fd00::7", "fe80::7%eth0", "02:fc:00:00:00:01"],
    "ib0": ["10.4.0.7", "fe80::9%ib0"],
}
ROUTES = {  # where packets to a host come from, as this machine's routing table says
    "198.51.100.1": "192.0.2.7",  # the default route
    "first": "10.4.0.7",
    "10.4.0.7": "10.4.0.7",  # the main process is on this machine
    "fd00::1": "fd00::7",
    "fe80::1%ib0": "fe80::9",
    "localhost": "127.0.0.1",
    "myself": "127.0.1.1",  # what Debian's /etc/hosts says of a machine's own name
    "::1": "::1",
}


@pytest.fixture
def machine(monkeypatch):
    """machine(MASTER_ADDR=..., ...): a machine with INTERFACES and ROUTES, on which a launcher has set variables."""

    def launched(**variables: str) -> str | None:
        for name in ("MASTER_ADDR", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GLOO_SOCKET_IFNAME"):
            monkeypatch.setenv(name, variables.get(name, ""))  # which puts it back afterwards
            if name not in variables:
                monkeypatch.delenv(name)
        network.choose_gloo_interface()
        return os.environ.get("GLOO_SOCKET_IFNAME")

    tables = {name: [SimpleNamespace(address=address) for address in of_it] for name, of_it in INTERFACES.items()}
    monkeypatch.setattr(network.psutil, "net_if_addrs", lambda: tables)
    monkeypatch.setattr(network, "own_address_towards", ROUTES.get)
    return launched


@pytest.mark.parametrize(
    ("main_process", "interface"),
    [
        ("first", "ib0"),
        ("10.4.0.7", "ib0"),
        ("fd00::1", "eth0"),
        ("fe80::1%ib0", "ib0"),
        ("myself", "eth0"),  # as the main process's machine knows itself: the default route is the best guess
        ("nowhere.invalid", None),
    ],
)
def test_of_two_machines_each_takes_the_interface_that_reaches_the_main_process(machine, main_process, interface):
    assert machine(MASTER_ADDR=main_process, WORLD_SIZE="16", LOCAL_WORLD_SIZE="8") == interface


def test_a_main_process_without_a_default_route_leaves_gloo_its_own_choice(machine, monkeypatch):
    monkeypatch.delitem(ROUTES, "198.51.100.1")
    assert machine(MASTER_ADDR="myself", WORLD_SIZE="16", LOCAL_WORLD_SIZE="8") is None


@pytest.mark.parametrize(
    "variables",
    [
        {},  # no launcher
        {"WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "first"},
        {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8", "MASTER_ADDR": "first"},
        {"WORLD_SIZE": "8", "MASTER_ADDR": "localhost"},  # a launcher that does not say how many are here
        {"WORLD_SIZE": "8", "MASTER_ADDR": "::1"},
    ],
)
def test_one_machine_is_left_alone(machine, variables):
    assert machine(**variables) is None


def test_the_choice_of_the_user_is_kept(machine):
    chosen = {"GLOO_SOCKET_IFNAME": "docker0"}
    assert machine(MASTER_ADDR="first", WORLD_SIZE="16", LOCAL_WORLD_SIZE="8", **chosen) == "docker0"


def test_the_address_towards_a_host_is_that_of_the_route_to_it():
    assert network.own_address_towards("127.0.0.1") == "127.0.0.1"
    assert network.own_address_towards("nowhere.invalid") is None
    if socket.has_ipv6 and any(entry.address == "::1" for entry in network.psutil.net_if_addrs().get("lo", [])):
        assert network.own_address_towards("::1") == "::1"
    for name, addresses in network.psutil.net_if_addrs().items():
        for entry in addresses:
            if entry.family == socket.AF_INET and network.psutil.net_if_stats()[name].isup:
                assert network.own_address_towards(entry.address) == entry.address
                assert network.interface_with(entry.address) == name
