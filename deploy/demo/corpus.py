"""Texts of the demo: CPython's own documentation, found in every installation, by public topic.

The entries are what `help()` shows: a qualified name with its signature and its docstring, read from the sources of the
standard library without importing them, and the language reference of `pydoc_data`. The same Python gives the same
corpus, to the byte.
"""

import ast
import hashlib
import json
import re
import sysconfig
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Split = Literal["train", "bin", "gate", "asked"]

TOPICS: dict[str, str] = {
    "concurrency": "asyncio concurrent multiprocessing queue sched subprocess threading",
    "email": "email imaplib mailbox nntplib poplib smtplib",
    "files": "_pyio bz2 filecmp fileinput fnmatch glob gzip io lzma os pathlib posixpath shelve shutil tarfile tempfile"
    " zipfile",
    "formats": "base64 binascii csv dbm json pickle pickletools plistlib wave xml",
    "imports": "compileall ensurepip importlib modulefinder pkgutil platform py_compile runpy site sysconfig venv"
    " zipapp zipimport",
    "language": "",
    "numbers": "_pydecimal fractions heapq numbers random statistics",
    "settings": "argparse cmd configparser getopt getpass logging optparse",
    "testing": "bdb cProfile doctest pdb profile pstats timeit trace traceback unittest",
    "text": "codecs difflib gettext locale pydoc re string stringprep textwrap tokenize",
    "types": "_collections_abc _weakrefset abc ast collections contextlib copy dataclasses enum functools inspect types"
    " typing weakref",
    "web": "cgi html http ipaddress socket socketserver ssl urllib wsgiref xmlrpc",
}
"""Topics and the modules, with their submodules, whose documentation they hold; "language" is the reference."""

MIN_CHARS = 120
"""Shorter entries say too little."""
MAX_CHARS = 800
"""Longer entries are cut between their paragraphs."""
ENTRY_TEXTS = 6
"""Texts of one entry at most."""
TOPIC_CHARS = 84_000
"""Text of one topic at most, so that no topic is much larger than the others."""
BIN_TEXTS = 24
"""Public texts that stand for a topic in the plan of a round."""
SIMILAR = 0.4
"""An entry that shares this part of its five-word runs with an earlier one is left out."""


@dataclass(frozen=True)
class Document:
    """One entry.

    Attributes:
        topic: One of `TOPICS`.
        text: Its title in the first line, then what it says.
        split: "train" is for teacher and students, "bin" stands for the topic in rounds, "gate" is for the evaluation
            gate, and "asked" is what users ask for, which neither teacher nor student ever sees.
    """

    topic: str
    text: str
    split: Split


def build(folder: Path | None = None) -> list[Document]:
    """Reads the corpus of this Python, by topic and in a fixed order within each.

    Args:
        folder: The standard library; that of the running Python by default.
    """
    folder = folder or Path(sysconfig.get_path("stdlib"))
    seen: dict[int, int] = {}
    documents: list[Document] = []
    for topic, modules in TOPICS.items():
        found = language_entries() if not modules else module_entries(folder, modules.split())
        entries = [list(unlike(pieces(title, body), seen))[:ENTRY_TEXTS] for title, body in sorted(found)]
        documents += divided(topic, capped([entry for entry in entries if entry]))
    return documents


def corpus_lines(documents: Iterable[Document]) -> bytes:
    """The corpus as `ebbflow student create` takes it: JSON lines, without what users ask for."""
    kept = (d for d in documents if d.split != "asked")
    return b"".join(json.dumps(vars(d), ensure_ascii=False).encode() + b"\n" for d in kept)


def module_entries(folder: Path, modules: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Title and docstring of everything public in the modules; those that this Python lacks are passed over."""
    for module in modules:
        paths = [folder / f"{module}.py", *sorted((folder / module).rglob("*.py"))]
        for path in paths:
            parts = path.relative_to(folder).with_suffix("").parts
            if path.is_file() and not {"test", "tests", "idle_test"} & set(parts):
                name = ".".join(part for part in parts if part != "__init__")
                yield from _documented(ast.parse(path.read_bytes()), name.replace("_pydecimal", "decimal"))


def _documented(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        if body := ast.get_docstring(node):
            arguments = (
                f"({ast.unparse(node.args)})" if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else ""
            )
            yield name + arguments, body
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield from _documented(child, f"{name}.{child.name}")


def language_entries() -> Iterator[tuple[str, str]]:
    """Title and text of the sections of the language reference."""
    from pydoc_data.topics import topics  # type: ignore[import-not-found, unused-ignore]  # half a megabyte

    for title, body in topics.items():
        yield title, re.sub(r"\n[*=\-~]{4,}\n", "\n", body).replace("**", "")


def pieces(title: str, body: str) -> Iterator[str]:
    """Cuts one entry between paragraphs into texts of at most about `MAX_CHARS`, each under the title."""
    held: list[str] = []
    for paragraph in [*re.split(r"\n\s*\n", body.strip()), None]:
        if paragraph is None or sum(map(len, held)) + len(paragraph) > MAX_CHARS:
            text = f"{title}\n" + "\n\n".join(held)
            if len(text) >= MIN_CHARS and held:
                yield text[: 2 * MAX_CHARS] + "\n"
            held = []
        if paragraph is not None:
            held.append(paragraph)


def unlike(texts: Iterable[str], seen: dict[int, int]) -> Iterator[str]:
    """Leaves out what repeats an earlier text, so that nothing asked for is in the training texts under another name.

    Args:
        texts: Candidates in order.
        seen: Runs of five words that earlier texts hold; grows.
    """
    for text in texts:
        words = re.findall(r"\w+", text.partition("\n")[2].lower())
        runs = {_number(" ".join(words[i : i + 5])) for i in range(max(1, len(words) - 4))}
        earlier: dict[int, int] = defaultdict(int)
        for run in runs:
            if run in seen:
                earlier[seen[run]] += 1
        if max(earlier.values(), default=0) < SIMILAR * len(runs):
            owner = len(seen) + 1
            seen.update({run: seen.get(run, owner) for run in runs})
            yield text


def capped(entries: list[list[str]]) -> list[list[str]]:
    """The entries in an order that depends on nothing but themselves, up to `TOPIC_CHARS` in all."""
    kept, chars = [], 0
    for entry in sorted(entries, key=lambda texts: _number(texts[0])):
        chars += sum(map(len, entry))
        if chars > TOPIC_CHARS:
            break
        kept.append(entry)
    return kept


def divided(topic: str, entries: list[list[str]]) -> list[Document]:
    """Sets whole entries aside for the bins, then for what users ask, then for the gate; the rest is for training."""
    total = sum(map(len, entries))
    quotas: list[tuple[Split, int]] = [("bin", BIN_TEXTS), ("asked", total // 5), ("gate", total // 16)]
    documents: list[Document] = []
    for entry in entries:
        while quotas and quotas[0][1] <= sum(d.split == quotas[0][0] for d in documents):
            quotas.pop(0)
        kind: Split = quotas[0][0] if quotas else "train"
        documents += [Document(topic, text, kind) for text in entry]
    return documents


def _number(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())
