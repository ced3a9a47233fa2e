"""`ebbflow release export` against a real control plane: what is exported is what was signed."""

import datetime as dt
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
from cli_world import add_release
from tiny_students import train_tokenizer, write_student

from ebbflow.cloud.registry.clock import now
from ebbflow.cloud.registry.tables import Release, ReleaseState
from ebbflow.cloud.release import keys, publish, repository
from ebbflow.cloud.services.cloud import Cloud
from ebbflow.common.codes.artefact import PRECISIONS, read_variant
from ebbflow.common.trust.targets import path_of

Run = Callable[..., Any]


def publish_release(
    cloud: Cloud, home: Path, folder: Path, number: int, precisions: tuple[str, ...] = PRECISIONS
) -> None:
    """Makes a release of a real student, signed by everybody."""
    folder.mkdir(exist_ok=True)
    tokenizer = train_tokenizer()
    tokenizer.save(folder / "tokenizer")
    (folder / "manifest").write_text("{}")
    for precision in precisions:
        write_student(folder / precision, tokenizer, number, precision)  # type: ignore[arg-type]
    add_release(cloud, number, ReleaseState.PACKED)
    blobs = {kind: cloud.blobs.put_file(folder / kind) for kind in ("manifest", "tokenizer", *precisions)}
    targets = {
        path_of("faq", number, kind): {"sha256": blob.sha256, "size_bytes": blob.size_bytes, "kind": kind}
        for kind, blob in blobs.items()
    }
    signers = {name: keys.load(home / "keys", name) for name in ("distiller", "gate", "online")}
    with cloud.registry.transaction() as session:
        session.get_one(Release, ("faq", number)).targets = targets
        proposal = publish.propose(session, signers["distiller"], now())
        assert proposal
        publish.approve(session, signers["gate"], proposal, now=now())
        assert publish.publish(session, signers["online"], now())


@pytest.fixture
def release(cloud: Cloud, student: str, signing_home: Path, tmp_path: Path) -> Path:
    """Folder of what the published release faq/1 was made of."""
    publish_release(cloud, signing_home, tmp_path / "release", 1)
    return tmp_path / "release"


def test_a_release_becomes_a_file_for_llama_cpp(run: Run, release: Path, tmp_path: Path) -> None:
    done = run("release", "export", "faq/1", "--format", "gguf", "--out", str(tmp_path / "out" / "faq.gguf"))
    assert done.code == 0, done.err
    assert done.out == f"{tmp_path}/out/faq.gguf\n"
    assert "in int4" in done.err
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "out" / "faq.gguf").tensors}
    wanted = read_variant(release / "int4").weight("model.embed_tokens.weight")
    found = tensors["token_embd.weight"]
    assert (gguf.quants.dequantize(found.data, found.tensor_type) == wanted).all()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["faq.gguf"]


def test_a_release_becomes_folders_for_onnx_runtime_and_transformers(run: Run, release: Path, tmp_path: Path) -> None:
    for kind, files in {
        "onnx": [
            "config.json",
            "genai_config.json",
            "model.onnx",
            "model.onnx.data",
            "tokenizer.json",
            "tokenizer_config.json",
        ],
        "hf": ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"],
    }.items():
        done = run("release", "export", "students/faq/releases/1", "--format", kind, "-o", str(tmp_path / kind))
        assert done.code == 0, done.err
        assert sorted(path.name for path in (tmp_path / kind).iterdir()) == files
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_calibrated_export_takes_bf16(run: Run, release: Path, tmp_path: Path) -> None:
    (tmp_path / "texts").write_text("How do I read a file?\n")
    calibrate = ["--calibrate", str(tmp_path / "texts")]
    done = run("release", "export", "faq/1", "--format", "onnx", *calibrate, "-o", str(tmp_path / "static"))
    assert done.code == 0, done.err
    assert "in bf16" in done.err
    for wrong in (["--format", "gguf"], ["--format", "onnx", "--precision", "int8"]):
        refused = run("release", "export", "faq/1", *wrong, *calibrate, "-o", str(tmp_path / "other"))
        assert refused.code == 3
        assert "--calibrate" in refused.err


def test_bytes_that_were_not_signed_are_not_exported(run: Run, cloud: Cloud, release: Path, tmp_path: Path) -> None:
    sha256 = cloud.blobs.put_file(release / "int4").sha256
    (stored,) = [path for path in tmp_path.rglob(f"*{sha256[2:]}*") if path.is_file()]
    original = stored.read_bytes()
    stored.chmod(0o600)
    changed = bytearray(original)
    changed[-1] ^= 1
    for altered in (bytes(changed), original[:-1], original + b"\0"):
        stored.write_bytes(altered)
        refused = run("release", "export", "faq/1", "--format", "gguf", "-o", str(tmp_path / "faq.gguf"))
        assert refused.code == 9, refused.err
        assert "is not the file that was signed" in refused.err
        assert not (tmp_path / "faq.gguf").exists()


def test_another_cloud_behind_the_same_address_is_noticed(
    run: Run, cloud: Cloud, release: Path, tmp_path: Path, signing_home: Path
) -> None:
    arguments = ("release", "export", "faq/1", "--format", "hf", "-o")
    assert run(*arguments, str(tmp_path / "first")).code == 0
    (pinned,) = tmp_path.rglob("pinned.root.json")
    with cloud.registry.reading() as session:
        root = repository.trust_root(session)
    assert pinned.read_bytes() == root
    (tmp_path / "root.json").write_bytes(root)
    assert run(*arguments, str(tmp_path / "second"), "--root", str(tmp_path / "root.json")).code == 0
    keys.create(tmp_path / "stranger")
    signers = {name: keys.load(tmp_path / "stranger", name) for name in keys.NAMES}
    strange = repository._first_root({name: signer.public_key for name, signer in signers.items()}, now())
    stranger = repository.signed(strange, signers["root-1"], signers["root-2"])
    (tmp_path / "root.json").write_bytes(stranger)
    refused = run(*arguments, str(tmp_path / "third"), "--root", str(tmp_path / "root.json"))
    assert refused.code == 9
    assert "does not verify" in refused.err
    assert run(*arguments, str(tmp_path / "fourth")).code == 0, "what was pinned still holds"


def test_an_expired_list_is_not_believed(
    run: Run, cloud: Cloud, release: Path, tmp_path: Path, signing_home: Path
) -> None:
    with cloud.registry.transaction() as session:
        repository.sign_online(session, keys.load(signing_home / "keys", "online"), now() - dt.timedelta(days=3))
    refused = run("release", "export", "faq/1", "--format", "gguf", "-o", str(tmp_path / "faq.gguf"))
    assert (refused.code, "has expired" in refused.err) == (5, True)


def test_only_published_releases_are_exported(run: Run, cloud: Cloud, release: Path, tmp_path: Path) -> None:
    add_release(cloud, 2, ReleaseState.REJECTED)
    add_release(cloud, 3, ReleaseState.PUBLISHED)
    out = ["--format", "gguf", "-o", str(tmp_path / "faq.gguf")]
    assert run("release", "export", "faq/2", *out).code == 5
    unsigned = run("release", "export", "faq/3", "--precision", "int8", *out)
    assert (unsigned.code, "does not list" in unsigned.err) == (9, True)
    assert run("release", "export", "faq/9", *out).code == 4


def test_what_cannot_be_is_said_before_anything_is_fetched(run: Run, release: Path, tmp_path: Path) -> None:
    (tmp_path / "there").write_text("mine")
    there = run("release", "export", "faq/1", "--format", "gguf", "-o", str(tmp_path / "there"))
    assert (there.code, "fetching" in there.err) == (5, False)
    no_texts = ["--calibrate", str(tmp_path / "nowhere"), "-o", str(tmp_path / "new")]
    refused = run("release", "export", "faq/1", "--format", "onnx", *no_texts)
    assert (refused.code, "fetching" in refused.err) == (3, False)
    no_root = ["--root", str(tmp_path / "nowhere"), "-o", str(tmp_path / "new")]
    assert run("release", "export", "faq/1", "--format", "hf", *no_root).code == 3
    assert run("release", "export", "faq/1", "--format", "bin", "-o", str(tmp_path / "new")).code == 2


def test_a_precision_that_the_release_lacks_is_refused_with_those_it_has(
    run: Run, cloud: Cloud, student: str, signing_home: Path, tmp_path: Path
) -> None:
    publish_release(cloud, signing_home, tmp_path / "small", 1, ("int8",))
    refused = run("release", "export", "faq/1", "--format", "gguf", "-o", str(tmp_path / "faq.gguf"))
    assert refused.code == 3
    assert "no int4, only int8" in refused.err


def test_a_missing_extra_is_named(run: Run, release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "gguf", None)
    refused = run("release", "export", "faq/1", "--format", "gguf", "-o", str(tmp_path / "faq.gguf"))
    assert refused.code == 5
    assert "ebbflow[export]" in refused.err
