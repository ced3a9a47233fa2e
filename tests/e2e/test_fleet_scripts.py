"""The fleet scripts, against real sshd, pip and a real cloud."""

import contextlib
import json
import sys
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deploy_world
import psutil
import pytest
from deploy_world import DEPLOY, ROOT, Cloud, SshHosts, run

pytestmark = pytest.mark.slow

FLEET = DEPLOY / "fleet" / "fleet.py"
INSTALLER = DEPLOY / "fleet" / "install-agent.sh"


@dataclass
class Fleet:
    """Hosts that answer, and what the scripts need."""

    folder: Path
    cloud: Cloud
    hosts: SshHosts
    wheel: Path
    token: str

    def words(self, host: str, python: str = sys.executable) -> str:
        """The line of hosts.txt: every host has its own folders, as they are one machine."""
        place = self.folder / host
        return f"{host} --name {host} --prefix {place}/opt --state '{place}/the state' --python {python}"

    def go(self, *lines: str, wheel: Path | None = None, token: str | None = None) -> tuple[int, dict[str, Any], str]:
        """Runs fleet.py; returns its exit code, the report by host and all that it printed."""
        hosts, report = self.folder / "hosts.txt", self.folder / "report.jsonl"
        hosts.write_text("\n".join(["# the fleet", "", *lines]) + "\n")
        files = ["--hosts", hosts, "--report", report, "--wheel", wheel or self.wheel.parent]
        ways = ["--constraints", ROOT / "constraints.txt", "--ssh-options", f"-F {self.hosts.config}"]
        command = [sys.executable, FLEET, *files, *ways, "--cloud", self.cloud.enrolment, "--", "--extra", "edge"]
        done = run([*command, "--service", "none"], {"EBBFLOW_EDGE_TOKEN": self.token if token is None else token})
        outcomes = [json.loads(line) for line in report.read_text().splitlines()]
        return done.returncode, {outcome["host"]: outcome for outcome in outcomes}, done.stdout + done.stderr


class Watch:
    """Looks at every command line on this machine for a word."""

    def __init__(self, word: str) -> None:
        self._word, self._stop, self.seen, self.looks = word, threading.Event(), set[str](), 0
        self._thread = threading.Thread(target=self._look)

    def _look(self) -> None:
        while not self._stop.wait(0.1):
            self.looks += 1
            for found in psutil.process_iter(["cmdline"]):
                if any(self._word in argument for argument in found.info["cmdline"] or []):
                    self.seen.add(" ".join(found.info["cmdline"])[:80])

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("fleet")
    hosts = SshHosts(folder)
    with contextlib.ExitStack() as stack:
        cloud = stack.enter_context(deploy_world.cloud(folder))
        for name in ("kiosk-1", "kiosk-2", "kiosk-3"):
            stack.enter_context(hosts.host(name))
        hosts.alias("gone", deploy_world.free_port())
        yield Fleet(folder, cloud, hosts, deploy_world.build_wheel(folder / "dist"), cloud.token(10))


def test_good_hosts_become_agents_and_bad_ones_are_reported_until_they_are_mended(fleet: Fleet) -> None:
    old = fleet.folder / "old-python"
    old.write_text('#!/bin/sh\ncase "$1" in --version) echo Python 3.9.2;; *) exit 1;; esac\n')
    old.chmod(0o755)
    with Watch(fleet.token) as watch:
        code, report, printed = fleet.go(
            fleet.words("kiosk-1"), "gone", fleet.words("kiosk-3", str(old)), fleet.words("kiosk-2")
        )
    assert code == 1, printed
    for name in ("kiosk-1", "kiosk-2"):
        assert report[name]["ok"], printed
        assert report[name]["agent"] == f"agents/{name}"
        assert report[name]["installed"]
        assert report[name]["enrolled"]
    assert "Connection refused" in report["gone"]["error"]
    assert "Python 3.9.2 is too old" in report["kiosk-3"]["error"]
    assert "2 of 4 hosts are ready, 2 failed" in printed
    assert set(fleet.cloud.agents()) == {"agents/kiosk-1", "agents/kiosk-2"}
    assert watch.looks > 10
    assert not watch.seen, "the token stood in a list of processes"
    assert fleet.token not in printed
    assert fleet.token not in json.dumps(report)
    assert not (fleet.folder / "kiosk-3" / "the state").exists()

    # Again: what is done stays as it is, what was bad is made good, and no token is used up twice.
    before = {path: path.read_bytes() for path in fleet.folder.glob("kiosk-*/the state/identity/*")}
    code, report, printed = fleet.go(fleet.words("kiosk-1"), fleet.words("kiosk-2"), token="")
    assert code == 0, printed
    assert printed.count("nothing to do") == 2
    assert not any(outcome["installed"] or outcome["enrolled"] for outcome in report.values())
    code, report, printed = fleet.go(fleet.words("kiosk-1"), fleet.words("kiosk-3"))
    assert code == 0, printed
    assert report["kiosk-3"]["enrolled"]
    assert {path: path.read_bytes() for path in before} == before
    assert set(fleet.cloud.agents()) == {f"agents/kiosk-{number}" for number in (1, 2, 3)}
    (token,) = fleet.cloud.admin("token", "list")
    assert token["usesLeft"] == 7

    # Another wheel of the same version replaces the software, and nothing else.
    other = fleet.folder / "other" / fleet.wheel.name
    other.parent.mkdir()
    other.write_bytes(fleet.wheel.read_bytes())
    with zipfile.ZipFile(other, "a") as archive:
        archive.comment = b"another build"
    code, report, printed = fleet.go(fleet.words("kiosk-1"), wheel=other, token="")
    assert code == 0, printed
    assert (report["kiosk-1"]["installed"], report["kiosk-1"]["enrolled"]) == (True, False)
    assert {path: path.read_bytes() for path in before} == before

    # What was installed connects; neither torch nor SQLAlchemy came along.
    place = fleet.folder / "kiosk-2"
    assert not list(place.glob("opt/lib/python*/site-packages/torch"))
    assert not list(place.glob("opt/lib/python*/site-packages/sqlalchemy"))
    given = {"EBBFLOW_EDGE_HTTP_LISTEN": "127.0.0.1:0", "EBBFLOW_EDGE_GRPC_LISTEN": "127.0.0.1:0", "PYTHONPATH": ""}
    command = [place / "opt" / "bin" / "ebbflow-edge", "run", "--state", place / "the state"]
    log = fleet.folder / "agent.log"
    with deploy_world.process(command, given, log) as agent:
        deploy_world.wait_for(
            "connecting",
            lambda: deploy_world.alive(agent, log) and fleet.cloud.agents()["agents/kiosk-2"]["connected"],
        )


def test_a_token_that_does_not_work_is_reported_with_its_cure_and_leaves_no_identity(fleet: Fleet) -> None:
    words = fleet.words("kiosk-1").replace("the state", "another state").replace("--name kiosk-1", "--name kiosk-9")
    code, report, printed = fleet.go(words, token="")
    assert code == 1, printed
    assert "ebbflow token create" in report["kiosk-1"]["error"]
    kind, number, secret, authority = fleet.token.split(".")
    code, report, printed = fleet.go(words, token=".".join([kind, number, secret[::-1], authority]))
    assert code == 1, printed
    assert "ebbflow token create" in report["kiosk-1"]["error"]
    assert not (fleet.folder / "kiosk-1" / "another state" / "identity").exists()
    assert "agents/kiosk-9" not in fleet.cloud.agents()


def test_two_installers_do_not_work_on_one_host_at_a_time(fleet: Fleet) -> None:
    code, report, printed = fleet.go(fleet.words("kiosk-1"))
    assert code == 0, printed
    lock = fleet.folder / "kiosk-1" / "opt" / ".lock"
    with deploy_world.process(["flock", lock, "sleep", "600"], {}, fleet.folder / "flock.log"):
        deploy_world.wait_for("locking", lambda: run(["flock", "-n", lock, "true"]).returncode == 1)
        code, report, printed = fleet.go(fleet.words("kiosk-1"))
    assert code == 1, printed
    assert "another install-agent" in report["kiosk-1"]["error"]
