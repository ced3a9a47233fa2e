"""Control plane, worker and gate as processes with homes of their own, each with its key and no other."""

import json
import shutil
import tomllib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from deploy_world import Cloud, alive, command_lines, process, run, wait_for

pytestmark = pytest.mark.slow

SECRET = "correct horse"


class Site:
    """A cloud whose keys were taken apart as the how-to page says."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder, self._stack = folder, stack
        self.bin = command_lines(folder / "bin")
        self.cloud_home, self.offline = folder / "cloud", folder / "offline"
        self.eb("cloud", "init", "--home", self.cloud_home)
        self.offline.mkdir()
        for name in ("root-1", "root-2", "root-3", "targets"):
            (self.cloud_home / "keys" / f"{name}.pem").rename(self.offline / f"{name}.pem")
        for home, key in (("worker", "distiller"), ("gate", "gate")):
            (folder / home / "keys").mkdir(parents=True)
            (folder / home / "trust").mkdir()
            shutil.copy(self.cloud_home / "trust" / "root.json", folder / home / "trust")
            (self.cloud_home / "keys" / f"{key}.pem").rename(folder / home / "keys" / f"{key}.pem")
            config = [f'registry_url = "sqlite:///{self.cloud_home}/registry.db"', f'blobs = "{self.cloud_home}/blobs"']
            (folder / home / "config.toml").write_text("\n".join([*config, "tick_interval_s = 0.2", ""]))
        self.cloud = self._serve()

    def eb(self, *words: object, given: dict[str, str] | None = None, check: bool = True) -> Any:
        return run([self.bin / "ebbflow", *words], given, check=check)

    def _serve(self) -> Cloud:
        given = {"EBBFLOW_LISTEN": "127.0.0.1:0", "EBBFLOW_ENROL_LISTEN": "127.0.0.1:0"}
        self.run_process("serve", "cloud", given, "--alone")

        def bound() -> str | None:
            endpoints = self.cloud_home / "endpoints.toml"
            return str(tomllib.loads(endpoints.read_text())["enrolment"]) if endpoints.exists() else None

        return Cloud(wait_for("binding", bound), self.cloud_home / "admin" / "context.toml", self.bin)

    def run_process(self, name: str, home: str, given: dict[str, str], *options: str) -> None:
        log = self.folder / f"{name}.log"
        command = [self.bin / "ebbflow", "cloud", name, "--home", self.folder / home, *options]
        running = self._stack.enter_context(process(command, given, log))
        assert alive(running, log)

    def trust(self, *words: object) -> None:
        self.eb("trust", *words, given={"EBBFLOW_CONTEXT": str(self.cloud.context)})

    def roles(self) -> dict[str, Any]:
        return {role["role"]: role for role in self.cloud.admin("trust", "status")["roles"]}


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with ExitStack() as stack:
        yield Site(tmp_path, stack)


def test_a_gate_with_a_new_key_and_a_worker_with_its_old_one_sign_the_list_anew(site: Site) -> None:
    site.run_process("work", "worker", {})
    new = site.folder / "gate" / "gate-2.pem"
    made = site.eb("trust", "key", "create", new, "--encrypt", given={"EBBFLOW_KEY_SECRET": SECRET})
    public = site.folder / "gate-2.pub.json"
    public.write_text(made.stdout)
    old = json.loads(site.eb("trust", "key", "show", site.folder / "gate" / "keys" / "gate.pem").stdout)["keyid"]
    folder = site.folder / "ceremony"
    site.trust("stage", "targets", "--folder", folder, "--replace-key", f"{old[:12]}={public}")
    site.trust("sign", folder / "2.targets.json", "--key", site.offline / "targets.pem")
    site.trust("publish", folder / "2.targets.json")
    assert "cloud gate" in site.roles()["student"]["action"]
    (site.folder / "secret").write_text(SECRET + "\n")
    settings = {"EBBFLOW_GATE_KEY": f"file2:{new}", "EBBFLOW_KEY_SECRET_FILE": str(site.folder / "secret")}
    site.run_process("gate", "gate", settings)

    def signed() -> bool:
        student = site.roles()["student"]
        return int(student["version"]) == 2 and student["action"] == ""

    wait_for("the renewal", signed)
    keys = {key["keyId"] for key in site.roles()["student"]["keys"]}
    assert json.loads(public.read_text())["keyid"] in keys
    assert old not in keys
    assert (site.folder / "gate" / "trust" / "gate" / "student.json").exists()
    assert [path.name for path in (site.folder / "worker" / "keys").iterdir()] == ["distiller.pem"]


def test_a_process_says_what_it_lacks_and_needs_no_other_key(site: Site) -> None:
    for name, home, wrong in (("gate", "worker", "gate"), ("work", "gate", "distiller")):
        done = site.eb("cloud", name, "--home", site.folder / home, check=False)
        assert done.returncode == 5
        assert f"{wrong}.pem is not there, and no setting {wrong}_key names another" in done.stderr
    shutil.rmtree(site.folder / "gate" / "trust")
    done = site.eb("cloud", "gate", "--home", site.folder / "gate", check=False)
    assert "copy trust/root.json" in done.stderr
