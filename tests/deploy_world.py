"""Real processes for the tests of deploy/: a cloud from the working tree, its wheel, and SSH hosts on loopback."""

import contextlib
import getpass
import json
import os
import random
import shlex
import shutil
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
START_S = 90.0
STOP_S = 40.0
T = TypeVar("T")


def environment(given: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment without Ebbflow's own variables, ready to import the working tree."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("EBBFLOW_")}
    path = os.pathsep.join(str(ROOT / portion) for portion in ("cloud", "edge", "common"))
    return kept | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", **(given or {})}


def command_lines(folder: Path) -> Path:
    """Makes a folder with `ebbflow`, `ebbflow-edge` and `python` of the working tree, to be put on PATH."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, module in (("ebbflow", "ebbflow.cli.main"), ("ebbflow-edge", "ebbflow.edge.main")):
        script = folder / name
        script.write_text(f"#!{sys.executable}\nfrom {module} import main\n\nmain()\n")
        script.chmod(0o755)
    for name in ("python", "python3"):
        link = folder / name
        link.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
        link.chmod(0o755)
    return folder


def run(
    command: Sequence[object],
    given: Mapping[str, str] | None = None,
    *,
    check: bool = False,
    timeout_s: float = 600,
) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end, with its output captured."""
    done = subprocess.run(
        [str(word) for word in command],
        env=environment(given),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert not check or done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done


def build_wheel(folder: Path) -> Path:
    """Builds the wheel of the working tree."""
    run([sys.executable, "-m", "build", "--quiet", "--wheel", "--outdir", folder, ROOT], check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def wait_for(what: str, look: Callable[[], T | None], timeout_s: float = START_S) -> T:
    """Returns the first answer that is not None or False."""
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        if found := look():
            return found
        time.sleep(0.1)
    raise AssertionError(f"{what} did not happen within {timeout_s:.0f} s")


def free_port() -> int:
    """A port of the loopback interface that nobody listens on.

    It lies below those that the kernel gives to whoever asks for any: so nobody gets it before the caller binds it.
    """
    least = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    candidates = range(10_000, least) if least > 11_000 else range(10_000, 60_000)
    for port in random.SystemRandom().sample(candidates, 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("none of a hundred ports is free")


@contextlib.contextmanager
def process(command: Sequence[object], given: Mapping[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Runs a process for as long as the block; ends it with SIGTERM, and insists on an orderly end."""
    with log.open("ab") as output:
        running = subprocess.Popen(
            [str(word) for word in command],
            env=environment(given),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        yield running
    finally:
        running.terminate()
        try:
            running.wait(STOP_S)
        finally:
            running.kill()
            running.wait()


def alive(running: subprocess.Popen[bytes], log: Path) -> bool:
    """Fails with the log if the process has ended."""
    assert running.poll() is None, f"it ended with code {running.returncode}:\n{log.read_text()}"
    return True


@dataclass(frozen=True)
class Cloud:
    """A running control plane."""

    enrolment: str
    context: Path
    bin: Path

    def admin(self, *arguments: str) -> Any:
        """Runs an admin command and returns its JSON."""
        given = {"EBBFLOW_CONTEXT": str(self.context)}
        return json.loads(run([self.bin / "ebbflow", *arguments, "-o", "json"], given, check=True).stdout)

    def token(self, uses: int) -> str:
        """Makes an enrolment token."""
        secret: str = self.admin("token", "create", "--uses", str(uses))["secret"]
        return secret

    def agents(self) -> dict[str, Any]:
        """The agents by name."""
        return {agent["name"]: agent for agent in self.admin("agent", "list")}


@contextlib.contextmanager
def cloud(folder: Path, *, alone: bool = True, settings: Mapping[str, str] | None = None) -> Iterator[Cloud]:
    """Runs `ebbflow cloud init` and `serve` on free ports; unless `alone`, with worker and gate."""
    home, bin_ = folder / "cloud", command_lines(folder / "bin")
    run([bin_ / "ebbflow", "cloud", "init", "--home", home], check=True)
    given = {"EBBFLOW_LISTEN": "127.0.0.1:0", "EBBFLOW_ENROL_LISTEN": "127.0.0.1:0"} | dict(settings or {})
    log = folder / "cloud.log"
    options = ["--alone"] if alone else []
    with process([bin_ / "ebbflow", "cloud", "serve", "--home", home, *options], given, log) as running:

        def bound() -> str | None:
            alive(running, log)
            endpoints = home / "endpoints.toml"
            return tomllib.loads(endpoints.read_text())["enrolment"] if endpoints.exists() else None

        yield Cloud(wait_for("binding", bound), home / "admin" / "context.toml", bin_)


class SshHosts:
    """Several sshd on loopback, each with its own keys and configuration, as if they were machines."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = folder / "ssh_config"
        self._sshd = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")
        assert self._sshd, "no sshd here: apt-get install openssh-server"
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # sshd insists on it as root
        self._keygen("user")
        self.config.write_text("")

    def _keygen(self, name: str) -> Path:
        key = self.folder / name
        run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
        return key

    def alias(self, name: str, port: int) -> None:
        """Lets ssh know a host by name."""
        lines = [
            f"Host {name}",
            "  HostName 127.0.0.1",
            f"  Port {port}",
            f"  User {getpass.getuser()}",
            f"  IdentityFile {self.folder / 'user'}",
            "  IdentitiesOnly yes",
            f"  UserKnownHostsFile {self.folder / 'known_hosts'}",
            "  StrictHostKeyChecking yes",
        ]
        with self.config.open("a") as file:
            file.write("\n".join(lines) + "\n")

    @contextlib.contextmanager
    def host(self, name: str) -> Iterator[None]:
        """Runs one sshd."""
        port, key, keys = free_port(), self._keygen(f"{name}.key"), self.folder / f"{name}.authorized_keys"
        keys.write_text((self.folder / "user.pub").read_text())
        with (self.folder / "known_hosts").open("a") as file:
            file.write(f"[127.0.0.1]:{port} {key.with_suffix('.key.pub').read_text()}")
        # A login shell begins with a bare environment; only pip's way to its index has to stay.
        ways = [f'"{k}={v}"' for k, v in os.environ.items() if k.startswith("PIP_") or k.lower().endswith("_proxy")]
        lines = [
            f"ListenAddress 127.0.0.1:{port}",
            f"HostKey {key}",
            f"AuthorizedKeysFile {keys}",
            f"PidFile {self.folder / name}.pid",
            "PasswordAuthentication no",
            "KbdInteractiveAuthentication no",
            "PermitRootLogin prohibit-password",
            "StrictModes no",
            "UsePAM no",
            *(["SetEnv " + " ".join(ways)] if ways else []),
        ]
        config, log = self.folder / f"{name}.conf", self.folder / f"{name}.log"
        config.write_text("\n".join(lines) + "\n")
        self.alias(name, port)
        with process([str(self._sshd), "-D", "-e", "-f", config], {}, log) as running:
            wait_for(f"sshd of {name}", lambda: alive(running, log) and _answers(port))
            yield


def _answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False
