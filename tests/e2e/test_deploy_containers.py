"""The container files, built by buildah and run, without a container engine or a registry.

The base image cannot be pulled where no registry can be reached. In its place stands what it is in essence: Debian
bookworm with its Python 3.11, made by mmdebstrap, with this machine's settings of pip.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deploy_world
import pytest
from deploy_world import DEPLOY, ROOT, alive, process, run, wait_for

pytestmark = pytest.mark.containers

BASE = "docker.io/library/python:3.11-slim-bookworm"
MIRROR = "http://deb.debian.org/debian"
CODER = "from ebbflow.common.codes.compiled import best_coder; print(type(best_coder()).__name__)"
AUTHORITIES = Path("/etc/ssl/certs/ca-certificates.crt")


class Builder:
    """buildah with a store of its own, by chroot: needs root, but neither a daemon nor control groups."""

    def __init__(self, folder: Path) -> None:
        missing = [name for name in ("buildah", "mmdebstrap") if not shutil.which(name)]
        assert not missing, f"missing: {missing}; apt-get install --no-install-recommends buildah mmdebstrap"
        assert os.geteuid() == 0, "building images by chroot needs root"
        self.folder = folder
        self.command = ["buildah", "--root", str(folder / "root"), "--runroot", str(folder / "run"), "--storage-driver"]
        overlay = run([*self.command, "overlay", "info"])  # impossible inside a container whose own files are overlaid
        self.command.append("vfs" if overlay.returncode else "overlay")
        self.pip = self._pip()

    def __call__(self, *words: object) -> str:
        given = {"BUILDAH_ISOLATION": "chroot"}
        return run([*self.command, *words], given, check=True, timeout_s=1800).stdout.strip()

    @staticmethod
    def _pip() -> dict[str, str]:
        """How pip finds packages on this machine."""
        listed = run([sys.executable, "-m", "pip", "config", "list"], check=True).stdout
        wanted = r"^(?:global|:env:)\.(find-links|index-url|extra-index-url|proxy|trusted-host)='(.*)'$"
        return dict(re.findall(wanted, listed, re.MULTILINE))

    @property
    def mounts(self) -> list[str]:
        """Local folders with packages."""
        words = [word for value in self.pip.values() for word in value.split()]
        # An index's files lie beside it.
        folders = {str(Path(word.removeprefix("file://")).parent) if "://" in word else word for word in words}
        return [word for path in sorted(folders) if Path(path).is_dir() for word in ("--volume", f"{path}:{path}:ro")]

    def make_base(self) -> None:
        """Makes the image that stands in for the base image."""
        archive = self.folder / "base.tar"
        packages = "--include=ca-certificates,python3,python3-venv"
        run(["mmdebstrap", "--quiet", "--variant=minbase", packages, "bookworm", archive, MIRROR], check=True)
        container = self("from", "scratch")
        place = Path(self("mount", container))
        run(["tar", "-x", "-C", place, "-f", archive], check=True)
        archive.unlink()
        (place / "usr/local/bin/python").symlink_to("/usr/bin/python3")
        settings = "".join(f"{name} = {value}\n" for name, value in self.pip.items())
        (place / "etc/pip.conf").write_text(f"[global]\ncert = {AUTHORITIES}\n{settings}")
        shutil.copy(AUTHORITIES, place / AUTHORITIES.relative_to("/"))
        self("umount", container)
        self("commit", "--quiet", container, BASE)
        self("rm", container)

    def build(self, name: str, *arguments: str) -> None:
        """Builds an image by its Containerfile, as the file's first lines say."""
        file = DEPLOY / "containers" / f"Containerfile.{name}"
        ignored = ["--ignorefile", file.with_name(f"{file.name}.dockerignore")]
        tag = ["-t", f"ebbflow-{name}:0.1.0"]
        self("bud", "--pull-never", *self.mounts, *ignored, *arguments, "-f", file, *tag, ROOT)

    def start(self, name: str) -> tuple[str, list[str]]:
        """Makes a container; returns it and what it runs by default."""
        container = self("from", "--pull-never", f"ebbflow-{name}:0.1.0")
        settings: dict[str, Any] = json.loads(self("inspect", container))["OCIv1"]["config"]
        return container, [*settings["Entrypoint"], *settings.get("Cmd", [])]

    def inside(self, container: str, words: list[str], **given: str) -> list[str]:
        """The command that runs words in a container, on this machine's network."""
        variables = [word for name, value in given.items() for word in ("--env", f"{name}={value}")]
        return [*self.command, "run", "--isolation", "chroot", *variables, container, "--", *words]


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Builder]:
    folder = tmp_path_factory.mktemp("images")
    made = Builder(folder)
    try:
        made.make_base()
        yield made
    finally:
        with contextlib.suppress(subprocess.SubprocessError, AssertionError):
            made("rm", "--all")
        for name in ("root", "run"):
            shutil.rmtree(folder / name, ignore_errors=True)  # gigabytes that pytest would keep


def check_that_c_codes(builder: Builder, container: str) -> None:
    """The C library is in the image, and the compiler is not."""
    said = run(builder.inside(container, ["python", "-c", CODER]), check=True).stdout
    assert said.strip() == "CompiledCoder"
    assert run(builder.inside(container, ["sh", "-c", "! ls -d /opt/zig && ! command -v cc"]), check=True).stdout == ""


def test_the_agents_image_builds_and_its_container_enrols_and_connects(builder: Builder, tmp_path: Path) -> None:
    builder.build("edge", "--build-arg", "EXTRA=edge")
    container, start = builder.start("edge")
    done = run(builder.inside(container, start))
    assert done.returncode != 0
    assert "EBBFLOW_EDGE_TOKEN; `ebbflow token create` makes it" in done.stderr
    assert run(builder.inside(container, ["id", "-u"]), check=True).stdout.strip() == "10001"
    check_that_c_codes(builder, container)
    given = {"EBBFLOW_EDGE_HTTP_LISTEN": "127.0.0.1:0", "EBBFLOW_EDGE_GRPC_LISTEN": "127.0.0.1:0"}
    log = tmp_path / "agent.log"
    with deploy_world.cloud(tmp_path) as cloud:
        first = {"EBBFLOW_EDGE_CLOUD": cloud.enrolment, "EBBFLOW_EDGE_NAME": "contained"}
        for more in ({**first, "EBBFLOW_EDGE_TOKEN": cloud.token(1)}, {}):  # the second start needs nothing more
            with process(builder.inside(container, start, **given, **more), {}, log) as running:
                wait_for("connecting", lambda: _connected(cloud, running, log))
            wait_for("leaving", lambda: not cloud.agents()["agents/contained"]["connected"])


def _connected(cloud: deploy_world.Cloud, running: subprocess.Popen[bytes], log: Path) -> bool:
    return alive(running, log) and bool(cloud.agents().get("agents/contained", {}).get("connected"))


def test_the_clouds_image_builds_and_its_container_serves(builder: Builder, tmp_path: Path) -> None:
    builder.build("cloud")
    container, serve = builder.start("cloud")
    for _ in range(2):
        run(builder.inside(container, [serve[0], "cloud", "init", "--if-missing"]), check=True)
    given = {"EBBFLOW_LISTEN": "127.0.0.1:0", "EBBFLOW_ENROL_LISTEN": "127.0.0.1:0"}
    log = tmp_path / "cloud.log"
    with process(builder.inside(container, serve, **given), {}, log) as running:
        wait_for("listening", lambda: alive(running, log) and "ready: main" in log.read_text())
        listed = run(builder.inside(container, ["ebbflow", "token", "create", "-o", "json"]), check=True)
        assert json.loads(listed.stdout)["secret"].startswith("ebb1.")
    check_that_c_codes(builder, container)
    whole = ["python", "-c", "import torch, transformers, boto3, psycopg; print(torch.__version__)"]
    assert run(builder.inside(container, whole), check=True).stdout.startswith("2.13.0")
