"""The pages say what is so: links lead somewhere, commands can be parsed, files exist."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import typer.main

from ebbflow.cli.main import app as admin_app
from ebbflow.edge.main import app as edge_app

ROOT = Path(__file__).parents[2]
OUTPUTS = {"demo-run", "dist", "build", "node_modules"}
FILES = frozenset(
    path.relative_to(ROOT).as_posix()
    for part in ROOT.iterdir()
    if part.name not in OUTPUTS and (not part.name.startswith(".") or part.name == ".ci")
    for path in (part, *part.rglob("*"))
    if "__pycache__" not in path.parts
)
PAGES = sorted(name for name in FILES if name.endswith(".md"))
ROOMS = {name.partition("/")[0] for name in FILES if "/" in name}
COMMANDS = {"ebbflow": typer.main.get_command(admin_app), "ebbflow-edge": typer.main.get_command(edge_app)}

FENCE = re.compile(r"^ *(```+)(\w*)[^\n]*\n(.*?)^ *\1`*$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)(?:\s+\"[^\"]*\")?\)")
HEADING = re.compile(r"^#{1,6} (.+?)\s*$", re.MULTILINE)
CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
OURS = (".py", ".proto", ".md", ".sh")
"""Endings by which a name in a page is taken for a file of this repository."""


def prose_of(page: str) -> str:
    return FENCE.sub("", (ROOT / page).read_text())


def anchors_of(page: str) -> set[str]:
    """The names that a heading can be linked by, as GitHub makes them."""
    found: set[str] = set()
    for heading in HEADING.findall(prose_of(page)):
        words = re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()).replace(" ", "-")
        name, count = words, 0
        while name in found:
            name = f"{words}-{(count := count + 1)}"
        found.add(name)
    return found


@pytest.mark.parametrize("page", PAGES)
def test_every_relative_link_leads_to_a_file_and_a_heading_that_exist(page: str) -> None:
    for target in LINK.findall(CODE.sub("", prose_of(page))):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        path = ((ROOT / page).parent / file).resolve() if file else ROOT / page
        assert path.exists(), f"{page} links to {target}"
        assert path.is_relative_to(ROOT), f"{page} links outside of the repository: {target}"
        if anchor:
            assert anchor in anchors_of(path.relative_to(ROOT).as_posix()), f"{page} links to {target}"


def commands_in(script: str) -> Iterator[list[str]]:
    """Every call of one of our commands in a shell script, also within $(...), as its words."""
    for line in script.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words = list(lexer)
        at = 0
        while at < len(words):
            if "$(" in words[at]:  # within double quotes
                yield from commands_in(words[at].partition("$(")[2].rpartition(")")[0])
            if words[at] not in COMMANDS or not _begins_a_command(words[:at]):
                at += 1
                continue
            end = next((i for i in range(at, len(words)) if set(words[i]) <= set("();<>|&")), len(words))
            redirected = end < len(words) and words[end][0] in "<>" and words[end - 1].isdecimal()
            yield words[at : end - redirected]
            at = end


def _begins_a_command(before: list[str]) -> bool:
    """Whether a word after these stands where a shell looks for a command."""
    while before and re.match(r"\w+=", before[-1]):
        before = before[:-1]
    wrappers = {"do", "then", "else", "exec", "nohup", "setsid", "sudo", "time", "if", "while", "until", "!"}
    return not before or before[-1] in wrappers or set(before[-1]) <= set("();|&") or before[-2:-1] == ["-u"]


def test_commands_are_found_wherever_a_shell_would_run_them() -> None:
    script = """\
ebbflow cloud init --home ./cloud  # a comment
TOKEN=$(ebbflow token create --uses 2) && echo "$(ebbflow agent list -o json)" | tee list
for n in 1 2; do A=b ebbflow-edge run --state ./agent-$n > log 2>&1 & done
sudo -u ebbflow ebbflow-edge status 2> err; ls ebbflow
"""
    assert list(commands_in(script)) == [
        ["ebbflow", "cloud", "init", "--home", "./cloud"],
        ["ebbflow", "token", "create", "--uses", "2"],
        ["ebbflow", "agent", "list", "-o", "json"],
        ["ebbflow-edge", "run", "--state", "./agent-$n"],
        ["ebbflow-edge", "status"],
    ]


def parse(words: list[str]) -> None:
    """Parses a command line as the program does, without running anything; raises what the program would say."""
    name, *rest = words
    command: Any = COMMANDS[name]
    parent = None
    while True:
        context = command.make_context(name, list(rest), parent=parent)
        if not hasattr(command, "list_commands"):
            return
        rest = [*context._protected_args, *context.args]
        if not rest:
            return
        name, command, rest = command.resolve_command(context, rest)
        parent = context


@pytest.mark.parametrize("page", PAGES)
def test_every_command_line_can_be_parsed(page: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for language, script in ((found[1], found[2]) for found in FENCE.findall((ROOT / page).read_text())):
        for words in commands_in(script) if language in {"sh", "bash", "shell"} else ():
            try:
                parse(words)
            except typer.Exit:
                continue  # --help and --version
            except Exception as error:
                raise AssertionError(f"{page}: {' '.join(words)}: {error!r}") from error


def test_a_command_line_with_an_option_that_does_not_exist_is_noticed() -> None:
    for words in ("ebbflow agent list --nonsense", "ebbflow agent nonsense", "ebbflow-edge enrol --nonsense 1"):
        with pytest.raises(Exception, match=r"(?i)no such"):
            parse(words.split())


def exists(name: str) -> bool:
    """Whether the repository holds a file or folder of this name, whole or as the end of its path."""
    name = name.rstrip("/")
    if "*" in name:
        pattern = re.compile(r"(.*/)?" + re.escape(name).replace(r"\*\*", ".*").replace(r"\*", "[^/]*"))
        return any(pattern.fullmatch(file) for file in FILES)
    return name in FILES or any(file.endswith(f"/{name}") for file in FILES)


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_a_page_names_exists(page: str) -> None:
    text = (ROOT / page).read_text()
    scripts = "\n".join(found[2] for found in FENCE.findall(text))
    of_the_reader = set(re.findall(r"(?:python3?|cat >) (\S+)", scripts))
    for name in CODE.findall(prose_of(page)):
        if not re.fullmatch(r"[\w.*/-]+", name) or name in of_the_reader or name.startswith(("/", ".")):
            continue
        room = name.partition("/")[0] if "/" in name else ""
        if room in ROOMS or name.endswith(OURS):
            assert exists(name), f"{page} names {name}"


def test_no_page_waits_for_something_to_be_filled_in() -> None:
    waiting = [page for page in PAGES if re.search(r"DEMO-OUTPUT-HERE|TODO|FIXME|TBD", (ROOT / page).read_text())]
    assert not waiting


def test_the_index_leads_to_every_page() -> None:
    linked = {(ROOT / "docs" / link.partition("#")[0]).resolve() for link in LINK.findall(prose_of("docs/README.md"))}
    for page in PAGES:
        if page.startswith("docs/") and page != "docs/README.md":
            assert ROOT / page in linked, f"docs/README.md does not lead to {page}"
