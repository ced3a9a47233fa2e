"""`ebbflow trust`: who may sign what, and the offline ceremonies that change it."""

import os
import sys
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ebbflow.cli import values
from ebbflow.cli.options import Output, connect, example, group
from ebbflow.cli.output import Column, Format, print_json, print_list, printable, say, when
from ebbflow.common.errors import EbbflowError, Reason

if TYPE_CHECKING:
    from ebbflow.common.trust.ceremony import Changes, Draft

app = group(
    "Keys and signatures: what is signed by whom, and ceremonies on files.",
    "ebbflow trust status",
    "ebbflow trust stage root --folder ./ceremony --lifetime 365d",
    "ebbflow trust sign ./ceremony/2.root.json --key /media/ada/root-1.pem",
    "ebbflow trust publish ./ceremony/2.root.json",
)
key = group("Keys: key files, and the public part of any key.", "ebbflow trust key create ./root-4.pem --encrypt")
app.add_typer(key, name="key")

FOLDER = Path("ceremony")
File = Annotated[Path, typer.Argument(metavar="FILE", help='What `stage` wrote, such as "ceremony/2.root.json".')]


class Role(Enum):
    """A role that people sign."""

    ROOT = "root"
    TARGETS = "targets"


def _signed_by(role: Any) -> str:
    """How many signatures there are; a role without a file of its own, such as "feedback", signs plans of rounds."""
    if not role.version:
        return "signs plans"
    return f"{sum(key.signed for key in role.keys)} of {len(role.keys)}, needs {role.threshold}"


COLUMNS: list[Column] = [
    ("ROLE", lambda role: role.role),
    ("VERSION", lambda role: role.version or "-"),
    ("EXPIRES (UTC)", lambda role: when(role.expire_time)),
    ("SIGNED BY", _signed_by),
    ("KEYS", lambda role: " ".join(f"{k.key_id[:12]}{'' if k.signed or not role.version else '?'}" for k in role.keys)),
    ("TO DO", lambda role: role.action),
]


@app.command(epilog=example("ebbflow trust status", "ebbflow trust status -o json"))
def status(context: typer.Context, output: Output = Format.TABLE) -> None:
    """Shows every role: its version, expiry and keys, and what somebody must do by when.

    A key with a question mark has not signed the newest version.
    """
    from google.protobuf.json_format import MessageToDict

    from ebbflow.api.v1.trust_pb2 import GetTrustRequest

    with connect(context) as client:
        answer = client.trust.GetTrust(GetTrustRequest())
    if output is Format.JSON:
        print_json(MessageToDict(answer, always_print_fields_with_no_presence=True))
        return
    print_list(output, answer.roles, COLUMNS)
    for student in sorted(answer.min_releases):
        print(f"{printable(student)}: the lowest release that may be installed is {answer.min_releases[student]}")


@key.command(epilog=example("ebbflow trust key create ./gate-2.pem", "ebbflow trust key create ./root-4.pem --encrypt"))
def create(
    path: Annotated[Path, typer.Argument(help="The new file, in PEM.")],
    encrypt: Annotated[
        bool, typer.Option("--encrypt", help="With a passphrase, asked for or taken from EBBFLOW_KEY_SECRET.")
    ] = False,
) -> None:
    """Makes an ed25519 key in a file that only you can read, and prints its public part. Needs no network.

    The public part goes to standard output: redirect it into a file such as gate-2.pub.json.
    """
    signers = _trust("signers")
    passphrase = _new_passphrase() if encrypt else ""
    made = signers.create_file(path, passphrase)
    say(f"{path} holds the private key {made.public_key.keyid}; its public part:")
    print(signers.public_text(made.public_key), end="")


@key.command(epilog=example("ebbflow trust key show ./gate.pem", "ebbflow trust key show awskms:alias/ebbflow-gate"))
def show(
    name: Annotated[
        str, typer.Argument(metavar="KEY", help="File, or URI: awskms:, gcpkms:, azurekms:, hsm:, file2:.")
    ],
) -> None:
    """Prints the public part of a key, for --add-key and --replace-key on another machine."""
    signers = _trust("signers")
    print(signers.public_text(signers.public_key(name, _secret)), end="")


@app.command(
    epilog=example(
        "ebbflow trust stage root --folder ./ceremony",
        "ebbflow trust stage root --replace-key 1f0c9ab23d11=root-4.pub.json",
        "ebbflow trust stage root --add-key online=online-2.pub.json",
        "ebbflow trust stage targets --replace-key 9ab3c51e77aa=gate-2.pub.json",
        "ebbflow trust stage root --revoke-key online=5d2e8f0012bc --threshold 3",
    )
)
def stage(
    context: typer.Context,
    role: Annotated[
        Role, typer.Argument(help="root: who signs root, targets, online; targets: who signs students, plans.")
    ],
    folder: Annotated[Path, typer.Option(help="Folder of the ceremony.")] = FOLDER,
    add_key: Annotated[list[str] | None, typer.Option(help="ROLE=KEY: lets a key sign; repeatable.")] = None,
    replace_key: Annotated[
        list[str] | None, typer.Option(help="KEYID=KEY: puts a key in the place of another, everywhere; repeatable.")
    ] = None,
    revoke_key: Annotated[list[str] | None, typer.Option(help="ROLE=KEYID: takes a key away; repeatable.")] = None,
    threshold: Annotated[int | None, typer.Option(min=2, help="Signatures that root needs from now on.")] = None,
    lifetime: Annotated[str | None, typer.Option(help="How long it holds; 365d for root, 330d for targets.")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Begin with the newest files in the folder.")] = False,
) -> None:
    """Writes the next version of root or targets, unsigned, into a folder, with what is published beside it.

    KEY is a file with a public part, a key file or a URI; KEYID is a key's id or its beginning. The roles are root,
    targets, snapshot, timestamp and online (the last two together) in root; student and feedback in targets.
    """
    ceremony, kept = _trust("ceremony"), _trust("folder")
    changes = _changes(add_key, replace_key, revoke_key, threshold, lifetime)
    base = kept.newest(folder, role.value) if offline else _download(context, folder)[role.value]
    if base is None:
        raise EbbflowError(Reason.CONFIG_INVALID, f"{folder} holds no {role.value}; stage once without --offline")
    staged = ceremony.stage(kept.load(base), changes, _now())
    path = kept.save(folder, role.value, staged, replace=False)
    _tell(kept.draft(path))
    print(path)


@app.command(
    epilog=example(
        "ebbflow trust sign ./ceremony/2.root.json --key /media/ada/root-1.pem",
        "ebbflow trust sign ./ceremony/2.targets.json --key 'hsm:2?label=targets'",
    )
)
def sign(
    file: File,
    keys: Annotated[list[str], typer.Option("--key", help="Key file or URI; repeatable.")],
) -> None:
    """Adds signatures to a staged file. Needs no network, only the folder. Look at it first with `inspect`.

    A passphrase or PIN is asked for, or taken from EBBFLOW_KEY_SECRET.
    """
    kept, signers = _trust("folder"), _trust("signers")
    draft = kept.draft(file)
    if faults := draft.faults(_now()):
        raise EbbflowError(Reason.METADATA_REFUSED, f"{file} is not worth signing: {'; '.join(faults)}")
    for name in keys:
        draft.sign(signers.open_signer(name, _secret))
    kept.save(file.absolute().parent, draft.role, draft.proposed.to_bytes())
    _tell(draft)


@app.command(epilog=example("ebbflow trust inspect ./ceremony/2.root.json"))
def inspect(file: File) -> None:
    """Shows what a staged file changes, who may sign after it, whose signatures it has and which are missing.

    Needs no network. Ends with exit code 5 if it could not be published.
    """
    draft = _trust("folder").draft(file)
    _tell(draft, print)
    draft.check(_now())


@app.command(
    epilog=example(
        "ebbflow trust publish ./ceremony/2.root.json",
        "ebbflow trust publish ./ceremony/3.root.json ./ceremony/2.targets.json",
    )
)
def publish(
    context: typer.Context,
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Signed files, root first.")],
) -> None:
    """Hands signed files to the cloud, which checks them as a device would. Owners only; repeating does no harm."""
    from ebbflow.api.v1.trust_pb2 import PublishMetadataRequest

    for path in files:
        _trust("folder").load(path)
    with connect(context) as client:
        for path in files:
            content = path.read_bytes()
            role = client.trust.PublishMetadata(PublishMetadataRequest(metadata=content)).role
            say(f"published {path}: {role.role} {role.version}, until {when(role.expire_time)}")
            if role.action:
                say(f"  {printable(role.action)}")


def _changes(
    add: list[str] | None, replace: list[str] | None, revoke: list[str] | None, threshold: int | None, life: str | None
) -> "Changes":
    import datetime as dt

    ceremony, signers = _trust("ceremony"), _trust("signers")

    def public(pairs: list[str] | None, option: str) -> list[tuple[str, Any]]:
        found = [_pair(text, option) for text in pairs or ()]
        return [(name, signers.public_key(value, _secret)) for name, value in found]

    changes: Changes = ceremony.Changes(
        add=public(add, "--add-key ROLE=KEY"),
        replace=public(replace, "--replace-key KEYID=KEY"),
        revoke=[_pair(text, "--revoke-key ROLE=KEYID") for text in revoke or ()],
        threshold=threshold,
        lifetime=dt.timedelta(seconds=values.seconds(life)) if life else None,
    )
    return changes


def _pair(text: str, option: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise EbbflowError(Reason.INVALID_REQUEST, f"{text!r} is not what {option} takes", field="key")
    return name, value


def _download(context: typer.Context, folder: Path) -> dict[str, Path]:
    """Brings the published root and targets into the folder; returns where, by role."""
    from ebbflow.api.v1.artefact_pb2 import ReadMetadataRequest
    from ebbflow.api.v1.trust_pb2 import GetTrustRequest

    kept, paths = _trust("folder"), {}
    with connect(context) as client:
        for role in client.trust.GetTrust(GetTrustRequest()).roles:
            if role.role in {"root", "targets"}:
                request = ReadMetadataRequest(file_name=f"{role.version}.{role.role}.json")
                content = b"".join(answer.chunk for answer in client.artefacts.ReadMetadata(request))
                paths[role.role] = kept.save(folder, role.role, content)
    return paths


def _tell(draft: "Draft", tell: Callable[[str], None] = say) -> None:
    """Tells people what a staged file is about."""
    tell(f"{draft.role} {draft.proposed.signed.version}")
    for line in draft.changes() or ["it changes nothing"]:
        tell(f"  changes: {line}")
    for line in draft.afterwards():
        tell(f"  after it: {line}")
    for quorum in draft.quorums:
        signed = ", ".join(key_id[:12] for key_id in quorum.signed) or "nobody"
        tell(f"  signatures for {quorum.holder}: {signed} ({len(quorum.signed)} of {quorum.threshold})")
    for line in [*draft.faults(_now()), *draft.unsigned()]:
        tell(f"  missing: {line}")


def _new_passphrase() -> str:
    given = os.environ.get("EBBFLOW_KEY_SECRET", "")
    if given or sys.stdin.isatty():
        return given or str(typer.prompt("Passphrase", hide_input=True, confirmation_prompt=True, err=True))
    raise EbbflowError(Reason.KEY_UNUSABLE, "there is no passphrase: set EBBFLOW_KEY_SECRET, or use a terminal")


def _secret(what: str) -> str:
    given = os.environ.get("EBBFLOW_KEY_SECRET", "")
    if given or not sys.stdin.isatty():
        return given
    return str(typer.prompt(what.capitalize(), hide_input=True, err=True))


def _now() -> Any:
    import datetime as dt

    return dt.datetime.now(dt.UTC)


def _trust(name: str) -> Any:
    """A module of `ebbflow.common.trust`, which needs The Update Framework."""
    import importlib

    try:
        return importlib.import_module(f"ebbflow.common.trust.{name}")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("ebbflow."):
            raise
        message = f"{error.name} is not installed; the extra is 'trust': pip install 'ebbflow[trust]'"
        raise EbbflowError(Reason.EXTRA_MISSING, message, extra="trust") from error
