#!/usr/bin/env python3
"""Install and enrol agents on many hosts over SSH. Needs Python 3.11 and ssh here, sh, tar and Python 3.11 there.

Example:
  EBBFLOW_EDGE_TOKEN=$(ebbflow token create --uses 20) python3 fleet.py --hosts hosts.txt \
      --wheel dist --constraints constraints.txt --cloud cloud.example:8444

`hosts.txt` has one host a line as ssh understands it (`user@host`, `ssh://user@host:2222`, an alias of ~/.ssh/config),
optionally followed by options of install-agent.sh for it, such as `--name kiosk-7`. Options for every host come after
`--`. Lines that begin with # are left out. Running it again is safe: hosts that are done stay as they are.

Ends with a table, one line of JSON for each host in --report, and exit code 1 if any host failed.
"""

import argparse
import concurrent.futures
import dataclasses
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
INSTALLER = HERE / "install-agent.sh"
UNIT = HERE.parent / "systemd" / "ebbflow-edge.service"

# Token and files come on standard input: one connection for everything, and the token stands in no list of processes.
RECEIVE = """\
IFS= read -r EBBFLOW_EDGE_TOKEN && export EBBFLOW_EDGE_TOKEN
folder=$(mktemp -d) || exit 1
trap 'rm -rf "$folder"' EXIT
trap 'exit 129' HUP INT TERM PIPE
tar -x -C "$folder" || exit 1
sh "$folder/install-agent.sh" """


@dataclasses.dataclass
class Outcome:
    """What became of one host."""

    host: str
    ok: bool
    seconds: float = 0.0
    agent: str = ""
    installed: bool = False
    enrolled: bool = False
    service: str = ""
    error: str = ""


def parse_hosts(text: str) -> list[tuple[str, list[str]]]:
    """Returns host and extra options for every line that names one.

    Raises:
        ValueError: with the number of a line whose quotes do not match, or that begins with an option.
    """
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            words = shlex.split(line, comments=True)
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None
        if words and words[0].startswith("-"):
            raise ValueError(f"line {number}: {words[0]} is no host")
        if words:
            found.append((words[0], words[1:]))
    return found


def wheels_of(path: Path) -> list[Path]:
    """Returns the wheel, or the wheels of a folder; none if there is none."""
    return sorted(path.glob("*.whl")) if path.is_dir() else [path] * path.is_file()


def pack(files: list[Path]) -> bytes:
    """Returns the files as a tar archive."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for file in files:
            archive.add(file, arcname=file.name)
    return buffer.getvalue()


def install(host: str, words: list[str], archive: bytes, options: argparse.Namespace) -> Outcome:
    """Runs the installer on one host; never raises, so that no host hurts another."""
    started = time.monotonic()
    # Of several wheels the installer takes the one for its machine.
    wheel = "" if options.wheel.is_dir() else options.wheel.name
    names = {"--wheel": wheel, "--constraints": options.constraints and options.constraints.name}
    received = [f'{option} "$folder"/{shlex.quote(name)}' for option, name in names.items() if name is not None]
    script = " ".join([RECEIVE, *received, shlex.join(["--cloud", options.cloud, *options.pass_on, *words])])
    remote = shlex.join([*(["sudo", "-n"] if options.sudo else []), "sh", "-c", script])
    ssh = ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", *shlex.split(options.ssh_options), "--", host]
    token = options.token.encode() + b"\n"
    try:
        done = subprocess.run(
            [*ssh, remote], input=token + archive, capture_output=True, timeout=options.timeout_s, check=False
        )
        if done.returncode:
            outcome = Outcome(host, ok=False, error=problem(done.stderr))
        else:
            outcome = Outcome(host, ok=True, **json.loads(last_line(done.stdout)))
    except subprocess.TimeoutExpired:
        outcome = Outcome(host, ok=False, error=f"no answer in {options.timeout_s:g} s")
    except (TypeError, ValueError):
        outcome = Outcome(host, ok=False, error=f"unexpected answer: {last_line(done.stdout)[:200]}")
    except OSError as error:
        outcome = Outcome(host, ok=False, error=f"ssh could not be run: {error.strerror}")
    outcome.seconds = round(time.monotonic() - started, 1)
    return outcome


def lines_of(output: bytes) -> list[str]:
    """The lines that are not empty; nothing in them can move the terminal's cursor."""
    text = output.decode(errors="replace")
    lines = ("".join(character for character in line if character.isprintable()) for line in text.splitlines())
    return [line.strip() for line in lines if line.strip()]


def last_line(output: bytes) -> str:
    """The last line that is not empty."""
    return (lines_of(output) or ["no output"])[-1]


def problem(output: bytes) -> str:
    """What to tell of standard error: from our command line's "error:" on, or else the last line."""
    lines = lines_of(output)
    errors = [number for number, line in enumerate(lines) if line.lower().startswith("error:")]
    if errors and lines[-1].startswith("cure:"):
        return " ".join(lines[errors[-1] :]).removeprefix("error: ")
    return last_line(output)


def show(outcomes: list[Outcome]) -> None:
    """Prints the table."""
    width = max(len(outcome.host) for outcome in outcomes)
    for outcome in outcomes:
        did = [word for word, done in (("installed", outcome.installed), ("enrolled", outcome.enrolled)) if done]
        what = f"{outcome.agent}: {' and '.join(did) or 'nothing to do'}" if outcome.ok else f"FAILED: {outcome.error}"
        print(f"{outcome.host:<{width}}  {outcome.seconds:6.1f} s  {what}")
    failed = sum(not outcome.ok for outcome in outcomes)
    print(f"{len(outcomes) - failed} of {len(outcomes)} hosts are ready" + (f", {failed} failed" if failed else ""))


def make_parser() -> argparse.ArgumentParser:
    """Makes the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=Path, required=True, help="file with one host a line")
    parser.add_argument("--wheel", type=Path, required=True, help="the wheel, or a folder of wheels")
    parser.add_argument("--constraints", type=Path, help="constraints.txt of the repository")
    parser.add_argument("--cloud", required=True, help="HOST:PORT of the cloud's enrolment listener")
    parser.add_argument(
        "--token",
        default=os.environ.get("EBBFLOW_EDGE_TOKEN", ""),
        help="from `ebbflow token create --uses N`; better in EBBFLOW_EDGE_TOKEN, which stands in no list of processes",
    )
    parser.add_argument("--sudo", action="store_true", help="be root there, by a sudo that asks for no password")
    parser.add_argument("--parallel", type=int, default=16, help="hosts at a time (16)")
    parser.add_argument("--timeout-s", type=float, default=900, help="seconds for one host (900)")
    parser.add_argument("--ssh-options", default="", help="options of ssh in one word, such as '-i key -F config'")
    parser.add_argument("--report", type=Path, help="file for one line of JSON a host")
    parser.add_argument("pass_on", nargs="*", metavar="-- OPTION", help="options of install-agent.sh for every host")
    return parser


def check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> list[tuple[str, list[str]]]:
    """Returns the hosts; ends with exit code 2 if what was given makes no sense."""
    try:
        hosts = parse_hosts(options.hosts.read_text())
    except OSError as error:
        parser.error(f"{options.hosts} cannot be read: {error.strerror}")
    except ValueError as error:
        parser.error(f"{options.hosts}: {error}")
    if not hosts:
        parser.error(f"{options.hosts} names no host")
    if not wheels_of(options.wheel):
        parser.error(f"{options.wheel} is no wheel and has none; `python -m build --wheel` makes one in dist/")
    if options.constraints and not options.constraints.is_file():
        parser.error(f"{options.constraints} is not a file")
    if options.parallel < 1:
        parser.error("--parallel must be 1 or more")
    if not shutil.which("ssh"):
        parser.error("no ssh here: apt-get install openssh-client")
    return hosts


def main() -> int:
    """Runs the command line."""
    parser = make_parser()
    options = parser.parse_args()
    hosts = check(parser, options)
    archive = pack(
        [*wheels_of(options.wheel), INSTALLER, UNIT, *([options.constraints] if options.constraints else [])]
    )
    with concurrent.futures.ThreadPoolExecutor(options.parallel) as pool:
        jobs = [pool.submit(install, host, words, archive, options) for host, words in hosts]
        for number, job in enumerate(concurrent.futures.as_completed(jobs), 1):
            outcome = job.result()
            print(f"[{number}/{len(jobs)}] {outcome.host} {'ready' if outcome.ok else 'failed'}", file=sys.stderr)
    outcomes = [job.result() for job in jobs]
    show(outcomes)
    if options.report:
        options.report.write_text("".join(json.dumps(dataclasses.asdict(outcome)) + "\n" for outcome in outcomes))
    return int(any(not outcome.ok for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
