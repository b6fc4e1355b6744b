"""Nothing contacts the network: every socket but loopback is blocked, and nothing may even try one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Python imports a module of this name when it starts, so child processes are watched too. Python's own
# audit events come from all of its sockets, whoever opens them.
GUARD = """
import ipaddress, os, sys

LOG = os.environ["FEDCL_TEST_NETWORK_LOG"]

def local(host):
    if isinstance(host, bytes):
        host = host.decode("latin-1")
    if host in (None, "", "localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

def guard(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        address = arguments[1]
        bad = isinstance(address, tuple) and not local(address[0])
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        address = arguments[0]
        bad = not local(address)
    elif event == "socket.gethostbyaddr":
        address, bad = arguments[0], True
    else:
        return
    if bad:
        with open(LOG, "a") as log:
            log.write(f"{event} {address}\\n")
        raise OSError(f"the network is blocked in this test: {event} {address}")

sys.addaudithook(guard)
"""

COMMANDS = """
import json, sys
from fedcl.commands.cli import run_command_line
for arguments, expected in json.loads(sys.argv[1]):
    print("$ fedcl", *arguments, flush=True)
    code = run_command_line(arguments)
    assert code == expected, f"{arguments} ended with {code}, not {expected}"
"""

SMALL = [
    "data.limit=12",
    "scenario.tasks=2",
    "model.width=16",
    "federation.clients=3",
    "federation.rounds=1",
    "federation.epochs=1",
    "engine.device=cpu",
]


@pytest.fixture
def python(tmp_path: Path):
    """Runs Python code behind the guard; returns (exit code, output, addresses it tried)."""
    (tmp_path / "guard").mkdir()
    (tmp_path / "guard" / "sitecustomize.py").write_text(GUARD)
    log = tmp_path / "network.log"
    log.touch()
    kept = {name: value for name, value in os.environ.items() if name not in ("FEDCL_DATA_ROOT", "PYTHONPATH")}
    environment = {**kept, "PYTHONPATH": str(tmp_path / "guard"), "FEDCL_TEST_NETWORK_LOG": str(log)}

    def run(code: str, *arguments: str) -> tuple[int, str, list[str]]:
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            cwd=tmp_path,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
        return done.returncode, done.stdout, log.read_text().splitlines()

    return run


@pytest.mark.parametrize(
    "code",
    [
        "import socket; socket.create_connection(('192.0.2.1', 80), 1)",
        "import socket; socket.create_connection(('fedcl.invalid', 80), 1)",
        "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('192.0.2.1', 9))",
        "import urllib.request; urllib.request.urlopen('http://192.0.2.1/', timeout=1)",
        "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import socket; "
        'socket.gethostbyname("fedcl.invalid")\'], check=True)',
    ],
)
def test_the_guard_blocks_and_records(python, code):
    status, output, tried = python(code)
    assert status != 0
    assert "the network is blocked in this test" in output
    assert len(tried) == 1


def test_the_guard_lets_loopback_through(python):
    status, output, tried = python(
        "import socket\n"
        "server = socket.create_server(('127.0.0.1', 0))\n"
        "socket.create_connection(('localhost', server.getsockname()[1]), 5).sendall(b'x')\n"
        "ends = socket.socketpair()\n"
        "ends[0].sendall(b'x')"
    )
    assert (status, tried) == (0, []), output


def test_no_command_contacts_the_network(python, tmp_path):
    out = ["--out", "runs", "--quiet"]
    commands = [
        (["doctor"], 0),
        *((["list", kind], 0) for kind in ("strategies", "scenarios", "partitions", "encoders")),
        *((["list", kind], 0) for kind in ("datasets", "presets", "protocols")),
        (["show", "finetune"], 0),
        (["show", "class_incremental"], 0),
        (["split", "default", *SMALL, "--out", "runs"], 0),
        (["run", "name=stack", *SMALL, *out], 0),
        (["run", "name=flower", "strategy=[fedadam]", *SMALL, *out], 0),
        (["resume", "runs/stack/seed-0", "--quiet"], 0),
        (["plot", "accuracy", "runs/stack/seed-0"], 0),
        # A dataset that is not there is an error, not a reason to download it.
        (["run", "data.name=mnist", *SMALL, "--data-root", str(tmp_path), *out], 2),
    ]
    status, output, tried = python(COMMANDS, json.dumps(commands))
    assert tried == [], output
    assert status == 0, output
    assert json.loads((tmp_path / "runs/stack/seed-0/summary.json").read_text())["status"] == "done"
