"""What the commands of `ebbflow-edge` share."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Output(StrEnum):
    """Forms of an answer."""

    table = "table"
    json = "json"


Config = Annotated[
    Path | None, typer.Option("--config", "-c", help="Settings in TOML; EBBFLOW_EDGE_* variables win over it.")
]
State = Annotated[
    Path | None, typer.Option("--state", help="State folder; wins over the settings. [default: /var/lib/ebbflow-edge]")
]


def example(*lines: str) -> str:
    """Returns the end of a command's help."""
    return "\n".join(["\b", "Example:", *(f"  {line}" for line in lines)])
