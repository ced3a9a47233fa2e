"""`ebbflow release export`: a release in other engines' formats."""

import hashlib
from enum import Enum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from ebbflow.cli import values
from ebbflow.cli.options import connect, context_file, example
from ebbflow.cli.output import say, word
from ebbflow.cli.quantities import size
from ebbflow.cli.release_state import check
from ebbflow.common import names
from ebbflow.common.errors import EbbflowError, Reason

if TYPE_CHECKING:
    from ebbflow.client.admin import AdminClient
    from ebbflow.common.export.source import Source

app = typer.Typer(rich_markup_mode=None)


class Kind(Enum):
    """A format that other engines read."""

    GGUF = "gguf"
    ONNX = "onnx"
    HF = "hf"


class Width(Enum):
    """A precision of a release."""

    BF16 = "bf16"
    INT8 = "int8"
    INT4 = "int4"


_USUAL = {Kind.GGUF: Width.INT4, Kind.ONNX: Width.INT8, Kind.HF: Width.BF16}


@app.command(
    epilog=example(
        "ebbflow release export faq/3 --format gguf --out ./faq-3.gguf",
        "ebbflow release export faq/3 --format onnx --precision int4 --out ./faq-3-onnx",
        "ebbflow release export faq/3 --format onnx --calibrate ./corpus.jsonl --out ./faq-3-static",
        "ebbflow release export faq/3 --format hf --out ./faq-3-hf",
    )
)
def export(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="RELEASE", help='Such as "faq/3".')],
    kind: Annotated[
        Kind,
        typer.Option("--format", help="gguf: a file for llama.cpp; onnx, hf: a folder for ONNX Runtime, transformers."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file or folder to make; must not exist.")],
    precision: Annotated[
        Width | None, typer.Option(help="Which weights; int4 for gguf, int8 for onnx and bf16 for hf unless said.")
    ] = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(help="Only onnx: static int8 instead, with activations measured on the texts of this file."),
    ] = None,
    root: Annotated[
        Path | None,
        typer.Option(help="Trusted root, such as ceremony/1.root.json; the root of the first time unless said."),
    ] = None,
) -> None:
    """Writes a release in a format of other engines: the same weights, verified by their signatures.

    Needs the extra "export". Prints the path.
    """
    width = _precision(kind, precision, calibrate)
    release, trusted = values.release_name(name), _root(root)
    try:
        from ebbflow.common.export.source import check_free

        texts = [] if calibrate is None else _texts(calibrate)
        with connect(context) as client, TemporaryDirectory(dir=check_free(out)) as scratch:
            source = _fetch(client, release, width, _trust_folder(context, trusted), trusted, Path(scratch))
            say(f"writing {out}")
            _write(source, kind, out, texts, Path(scratch))
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("ebbflow."):
            raise
        message = f"{error.name} is not installed; the extra is 'export': pip install 'ebbflow[export]'"
        raise EbbflowError(Reason.EXTRA_MISSING, message, extra="export") from error
    print(out)


def _precision(kind: Kind, precision: Width | None, calibrate: Path | None) -> Width:
    if calibrate is None:
        return precision or _USUAL[kind]
    if kind is not Kind.ONNX or precision not in {None, Width.BF16}:
        message = "--calibrate makes static int8 out of bf16 for --format onnx; leave --precision out"
        raise EbbflowError(Reason.INVALID_REQUEST, message, field="calibrate")
    return Width.BF16


def _fetch(client: "AdminClient", name: str, width: Width, folder: Path, root: bytes | None, scratch: Path) -> "Source":
    """Brings weights and tokenizer of a published release into a scratch folder, verified."""
    from ebbflow.api.v1.release_pb2 import GetReleaseRequest
    from ebbflow.api.v1.resources_pb2 import Precision
    from ebbflow.client.signed import SignedFiles
    from ebbflow.common.export.source import Source
    from ebbflow.common.trust.targets import tokenizer_path, variant_path

    release = client.releases.GetRelease(GetReleaseRequest(name=name)).release
    check(release)
    sizes = {word(Precision, variant.precision): variant.artefact.size_bytes for variant in release.variants}
    if width.value not in sizes:
        message = f"{name} has no {width.value}, only {', '.join(sizes)}; choose with --precision"
        raise EbbflowError(Reason.INVALID_REQUEST, message, field="precision")
    student_id, number = names.parse_release(name)
    files = SignedFiles(client, folder, root)
    weights, tokenizer = scratch / "weights.safetensors", scratch / "tokenizer.json"
    say(f"fetching {name} in {width.value}, {size(sizes[width.value])}")
    files.fetch(variant_path(student_id, number, width.value), weights)
    files.fetch(tokenizer_path(student_id, number), tokenizer)
    return Source.read(weights, tokenizer, values.short_release(name))


def _write(source: "Source", kind: Kind, out: Path, texts: list[str], scratch: Path) -> None:
    if kind is Kind.GGUF:
        from ebbflow.common.export.gguf_file import write_gguf

        write_gguf(source, out)
    elif kind is Kind.HF:
        from ebbflow.common.export.hf_folder import write_hf

        write_hf(source, out)
    else:
        from ebbflow.common.export.calibration import calibrated
        from ebbflow.common.export.onnx_folder import write_onnx

        write_onnx(source, out, calibrated(source, texts, scratch) if texts else None)


def _texts(path: Path) -> list[str]:
    from ebbflow.common.export.calibration import read_texts

    return read_texts(path)


def _trust_folder(context: typer.Context, root: bytes | None) -> Path:
    """Where verified metadata is kept: beside the context's file, by the cloud's authority and the root that was given.

    Under another root nothing of it would verify.
    """
    from ebbflow.client.context import AdminContext

    path = context_file(context)
    authority = AdminContext.load(path).endpoint().authority_pem
    return path.parent / "trust" / hashlib.sha256(authority + (root or b"")).hexdigest()[:16]


def _root(path: Path | None) -> bytes | None:
    try:
        return None if path is None else path.read_bytes()
    except OSError as error:
        raise EbbflowError(Reason.CONFIG_INVALID, f"{path} cannot be read: {error.strerror}", path=path) from error
