"""The files in deploy/ are sound by the linters of their kinds, and name only what the software has."""

import re
import shutil
import sys
import tomllib
from pathlib import Path

import pytest
from deploy_files import read_compose, read_env
from deploy_world import DEPLOY, ROOT, command_lines, run

from ebbflow.cloud.processes.settings import CloudSettings
from ebbflow.edge.agent.settings import AgentSettings

COMPOSE = DEPLOY / "compose" / "compose.yaml"
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
CONTAINERFILES = [DEPLOY / "containers" / f"Containerfile.{name}" for name in ("cloud", "edge")]
SCRIPTS = sorted([*DEPLOY.rglob("*.sh"), *(ROOT / "tools").glob("*.sh")])
PAGES = [DEPLOY / "README.md"] + [
    ROOT / "docs" / "how-to" / f"{name}.md"
    for name in ("install-agents", "run-on-postgresql-and-s3", "run-the-cloud-with-systemd")
]
CALL = re.compile(r"(?<![\w./-])(?:/opt/ebbflow/bin/)?(ebbflow(?:-edge)?)((?: [a-z]+)+)((?: [^\n|;&()`]*)?)")


def linter(name: str) -> str:
    """A linter that a wheel of the extra `dev` brings."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    assert found, f"no {name} here: pip install 'ebbflow[dev]'"
    return found


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shell_scripts_are_sound(path: Path) -> None:
    done = run([linter("shellcheck"), path])
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", CONTAINERFILES, ids=lambda path: path.name)
def test_container_files_are_sound(path: Path) -> None:
    done = run([linter("hadolint"), "--no-color", path])
    assert done.returncode == 0, done.stdout


def test_the_compose_file_follows_the_compose_specification() -> None:
    done = run([linter("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", COMPOSE])
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_image_is_pinned_and_ours_carry_the_version_of_this_tree() -> None:
    services = read_compose(COMPOSE, read_env(COMPOSE.with_name("example.env")))["services"].values()
    images = {service["image"] for service in services}
    for path in CONTAINERFILES:
        images |= set(re.findall(r"^FROM (\S+)", path.read_text(), re.MULTILINE))
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert {f"ebbflow-cloud:{version}", f"ebbflow-edge:{version}"} <= images
    for image in images:
        assert re.fullmatch(r"(docker\.io/[a-z]+/[a-z]+|ebbflow-[a-z]+):\d+\.\d[\w.-]*", image), image


def test_the_example_sets_every_variable_that_compose_insists_on() -> None:
    insisted = set(re.findall(r"\$\{(\w+):\?", COMPOSE.read_text()))
    assert insisted <= set(read_env(COMPOSE.with_name("example.env")))
    with pytest.raises(KeyError, match=r"copy example\.env"):
        read_compose(COMPOSE, {})


def test_only_settings_that_exist_are_set() -> None:
    known = {f"EBBFLOW_{name.upper()}" for name in CloudSettings.model_fields} | {"EBBFLOW_CONTEXT"}
    enrolling = ["token", "cloud", "name", "new_device"]
    known |= {f"EBBFLOW_EDGE_{name.upper()}" for name in [*AgentSettings.model_fields, *enrolling]}
    for path in [COMPOSE, COMPOSE.with_name("example.env"), *UNITS, *CONTAINERFILES, *SCRIPTS]:
        assert set(re.findall(r"\bEBBFLOW_[A-Z_]+[A-Z]", path.read_text())) <= known, path


def calls(path: Path) -> list[tuple[str, str, list[str]]]:
    """Program, command and long options of what a unit starts, or of the examples of a page."""
    text = path.read_text().replace("\\\n", " ")
    if path.suffix == ".md":
        text = "\n".join(re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    else:
        text = "\n".join(re.findall(r"^Exec\w+=(.*)", text, re.MULTILINE))
    return [(program, words, re.findall(r"(?<=\s)--[a-z-]+", rest)) for program, words, rest in CALL.findall(text)]


@pytest.mark.parametrize("path", [*UNITS, *PAGES], ids=lambda path: path.name)
def test_only_commands_and_options_that_exist_are_called(path: Path, tmp_path: Path) -> None:
    folder = command_lines(tmp_path)
    found = calls(path)
    assert found
    for program, words, options in found:
        # The last word may be an argument.
        told = [run([folder / program, *some, "--help"]) for some in (words.split(), words.split()[:-1])]
        page = next((done.stdout for done in told if done.returncode == 0), "")
        assert page, (program, words)
        for option in options:
            assert f" {option} " in page, (program, words, option)


@pytest.mark.slow
def test_systemd_takes_the_units(tmp_path: Path) -> None:
    analyse = shutil.which("systemd-analyze")
    assert analyse, "no systemd-analyze here: apt-get install systemd"
    folder = command_lines(tmp_path / "bin")
    for path in UNITS:
        (tmp_path / path.name).write_text(path.read_text().replace("/opt/ebbflow/bin", str(folder)))
    done = run([analyse, "verify", *(tmp_path / path.name for path in UNITS)])
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    # The score of `systemd-analyze security`, from 0 (safe) to 10.
    for path in UNITS:
        scored = run([analyse, "security", "--offline=true", "--threshold=50", path])
        assert scored.returncode == 0, scored.stdout[-300:]
