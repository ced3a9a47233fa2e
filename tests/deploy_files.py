"""Reads container and compose files as the tools that they are written for do."""

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

_VARIABLE = re.compile(r"\$\{(?P<name>\w+)(?:(?P<kind>:-|:\?)(?P<rest>[^}]*))?\}")


@dataclass
class Image:
    """What the last stage of a Containerfile leaves in the image's configuration."""

    environment: dict[str, str] = field(default_factory=dict)
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    volume: str = ""
    copied: dict[str, str] = field(default_factory=dict)
    """Files of the repository by their place in the image."""


def read_containerfile(path: Path) -> Image:
    """Reads the instructions that say how a container starts."""
    text = re.sub(r"^\s*#.*\n", "", path.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    image = Image()
    for line in filter(None, map(str.strip, text.splitlines())):
        word, _, rest = line.partition(" ")
        match word:
            case "FROM":
                image = Image()
            case "ENV":
                image.environment |= dict(pair.split("=", 1) for pair in shlex.split(rest))
            case "ENTRYPOINT":
                image.entrypoint = json.loads(rest)
            case "CMD":
                image.command = json.loads(rest)
            case "VOLUME":
                image.volume = rest
            case "COPY" if not rest.startswith("--from"):
                *sources, target = [part for part in rest.split() if not part.startswith("--")]
                image.copied[target] = sources[0]
    return image


def interpolate(text: str, given: Mapping[str, str]) -> str:
    """Puts variables in, as the compose specification says.

    Raises:
        KeyError: with what the file says, if one is missing that it insists on.
    """

    def value(match: re.Match[str]) -> str:
        found = given.get(match["name"], "")
        if match["kind"] == ":?" and not found:
            raise KeyError(match["rest"])
        return found or (match["rest"] or "" if match["kind"] == ":-" else "")

    return _VARIABLE.sub(value, text)


def read_compose(path: Path, given: Mapping[str, str]) -> dict[str, Any]:
    """Returns the compose file with its variables put in and its anchors merged."""
    composed: dict[str, Any] = yaml.safe_load(interpolate(path.read_text(), given))
    return composed


def read_env(path: Path) -> dict[str, str]:
    """Reads a file of NAME=value lines."""
    lines = (line for line in path.read_text().splitlines() if line and not line.startswith("#"))
    return dict(line.split("=", 1) for line in lines)
