"""The short requests of CLINC150 (Larson et al. 2019), by intent and domain, in the data set's own three parts."""

import json
from dataclasses import dataclass
from pathlib import Path

HOW_TO_GET = """\
There is no data at {folder}. Fetch the data set once (CC BY 3.0, 4 MB):

    git clone --depth 1 https://github.com/clinc/oos-eval
    mkdir clinc150
    cp oos-eval/data/data_full.json oos-eval/data/domains.json clinc150/

and say where it is: make bench NAME=private-feedback ARGS="--data clinc150", or set CLINC150.
"""


@dataclass(frozen=True)
class Request:
    """One utterance."""

    text: str
    intent: str
    domain: str


@dataclass(frozen=True)
class Requests:
    """Three parts that share no utterance."""

    public: list[Request]
    """The student's corpus, and the bins' texts."""
    asked: list[Request]
    """What users type."""
    held_out: list[Request]
    """What they will type: the next student is measured on it."""

    @property
    def domains(self) -> dict[str, list[str]]:
        """Intents by domain."""
        found: dict[str, set[str]] = {}
        for request in self.public:
            found.setdefault(request.domain, set()).add(request.intent)
        return {domain: sorted(found[domain]) for domain in sorted(found)}

    @property
    def intents(self) -> list[str]:
        """All intents in order."""
        return sorted({request.intent for request in self.public})


def load(folder: Path) -> Requests:
    """Reads the data set.

    Raises:
        SystemExit: it is not there; says how to get it.
    """
    files = [folder / "data_full.json", folder / "domains.json"]
    if not all(file.is_file() for file in files):
        raise SystemExit(HOW_TO_GET.format(folder=folder))
    parts, domains = (json.loads(file.read_text()) for file in files)
    domain_of = {intent.replace(" ", "_"): domain for domain, intents in domains.items() for intent in intents}

    def part(name: str) -> list[Request]:
        return [Request(text, intent, domain_of[intent]) for text, intent in parts[name]]

    return Requests(part("train"), part("val"), part("test"))
