"""Wrong command lines of the fleet scripts end at once with a sentence that says what to do."""

import runpy
import sys
import sysconfig
from pathlib import Path

import pytest
from deploy_world import DEPLOY, run

FLEET = DEPLOY / "fleet" / "fleet.py"
INSTALLER = DEPLOY / "fleet" / "install-agent.sh"
PLATFORM = sysconfig.get_platform().replace("-", "_").replace(".", "_")
"""As wheels that are compiled here say it."""


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "ebbflow-0.1.0-py3-none-any.whl"
    path.write_bytes(b"not a wheel")
    return path


def wheels_for(folder: Path, *platforms: str) -> Path:
    """A folder of files named as wheels for these platforms."""
    (folder / "dist").mkdir(parents=True)
    for platform in platforms:
        (folder / "dist" / f"ebbflow-0.1.0-py3-none-{platform}.whl").write_bytes(b"not a wheel")
    return folder / "dist"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "--wheel PATH"),
        (["--wheel", "/none.whl"], "/none.whl cannot be read"),
        (["--wheel"], "--wheel needs a value"),
        (["--wheels", "x"], "unknown option --wheels"),
        (["--wheel", "WHEEL", "--python", "python9.9"], "install Python 3.11"),
        (["--wheel", "WHEEL", "--extra", "cloud"], "edge or edge-torch"),
        (["--wheel", "WHEEL", "--service", "cron"], "systemd, none or auto"),
        (["--wheel", "WHEEL", "--prefix", "/proc/ebbflow"], "/proc/ebbflow cannot be written"),
    ],
)
def test_the_installer_says_what_is_wrong(words: list[str], told: str, wheel: Path) -> None:
    done = run(["sh", INSTALLER, *(str(wheel) if word == "WHEEL" else word for word in words)])
    assert done.returncode == 1
    assert told in done.stderr
    assert not done.stdout


@pytest.mark.slow
def test_a_wheel_that_pip_refuses_is_not_taken_for_installed(wheel: Path, tmp_path: Path) -> None:
    command = ["sh", INSTALLER, "--wheel", wheel, "--prefix", tmp_path / "opt", "--extra", "edge", "--python"]
    for _ in range(2):
        done = run([*command, sys.executable])
        assert done.returncode == 1
        assert "pip could not install the wheel" in done.stderr
    assert not (tmp_path / "opt" / ".installed").exists()


@pytest.mark.parametrize(
    ("platforms", "told"),
    [
        ([], f"has no wheel for {PLATFORM}"),
        (["linux_m68k"], "CC=none python -m build --wheel"),
        ([PLATFORM, f"0-py3-none-{PLATFORM}"], f"several wheels for {PLATFORM}"),
    ],
)
def test_a_folder_without_the_one_right_wheel_is_refused(platforms: list[str], told: str, tmp_path: Path) -> None:
    wheels = wheels_for(tmp_path, *platforms)
    done = run(["sh", INSTALLER, "--wheel", wheels, "--python", sys.executable, "--prefix", tmp_path / "opt"])
    assert done.returncode == 1
    assert told in done.stderr
    assert not (tmp_path / "opt").exists()


@pytest.mark.slow
@pytest.mark.parametrize("others", [["any", "linux_m68k"], ["linux_m68k"]])
def test_of_a_folder_the_wheel_for_this_machine_is_taken(others: list[str], tmp_path: Path) -> None:
    for best in (PLATFORM, "any"):
        wheels = wheels_for(tmp_path / best, *others, best)
        command = ["sh", INSTALLER, "--wheel", wheels, "--prefix", tmp_path / "opt", "--extra", "edge"]
        done = run([*command, "--python", sys.executable])
        assert f"-{best}.whl" in done.stderr
        assert not any(f"-{other}.whl" in done.stderr for other in set(others) - {best})


@pytest.mark.parametrize(
    ("hosts", "told"),
    [
        ("# nobody\n", "names no host"),
        ("kiosk --name 'kiosk\n", "line 1: No closing quotation"),
        ("kiosk\n-oProxyCommand=evil\n", "line 2: -oProxyCommand=evil is no host"),
    ],
)
def test_a_list_of_hosts_that_makes_no_sense_is_refused(hosts: str, told: str, wheel: Path, tmp_path: Path) -> None:
    file = tmp_path / "hosts.txt"
    file.write_text(hosts)
    done = run([sys.executable, FLEET, "--hosts", file, "--wheel", wheel, "--cloud", "localhost:1"])
    assert done.returncode == 2
    assert told in done.stderr


def test_a_folder_of_wheels_is_sent_whole_and_an_empty_one_refused(tmp_path: Path) -> None:
    wheels_of = runpy.run_path(str(FLEET))["wheels_of"]
    wheels = wheels_for(tmp_path, "linux_aarch64", "linux_x86_64")
    assert [path.name[-12:] for path in wheels_of(wheels)] == ["_aarch64.whl", "x_x86_64.whl"]
    (hosts := tmp_path / "hosts.txt").write_text("kiosk\n")
    done = run([sys.executable, FLEET, "--hosts", hosts, "--wheel", wheels_for(tmp_path / "no"), "--cloud", "c:1"])
    assert done.returncode == 2
    assert "is no wheel and has none" in done.stderr


def test_what_a_host_says_cannot_move_the_cursor_and_keeps_its_cure() -> None:
    fleet = runpy.run_path(str(FLEET))
    said = b"Collecting x\n\nerror: the token \x1b[2Jhas expired\ncure: Make a new token.\n"
    assert fleet["problem"](said) == "the token [2Jhas expired cure: Make a new token."
    assert fleet["problem"](b"ssh: connect to host x port 22: Connection refused\r\n").endswith("Connection refused")
    assert fleet["problem"](b"") == "no output"


def test_hosts_may_have_quoted_options_and_comments() -> None:
    parse = runpy.run_path(str(FLEET))["parse_hosts"]
    text = "a@b --name kiosk-1 # the first\n\n# none\nssh://c@d:2222 --state '/a b'\n"
    assert parse(text) == [("a@b", ["--name", "kiosk-1"]), ("ssh://c@d:2222", ["--state", "/a b"])]
