"""A key in a hardware security module, through PKCS #11: SoftHSM in place of the hardware, everything else real."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.trust.signers import open_signer

MODULES = [Path(f"/usr/{lib}/softhsm/libsofthsm2.so") for lib in ("lib", "lib64", "local/lib")]

MAKE_KEY = """
import os, pkcs11, pkcs11.util.ec
token = pkcs11.lib(os.environ["PYKCS11LIB"]).get_token(token_label="gate")
with token.open(user_pin="1234", rw=True) as session:
    curve = {pkcs11.Attribute.EC_PARAMS: pkcs11.util.ec.encode_named_curve_parameters("secp256r1")}
    parameters = session.create_domain_parameters(pkcs11.KeyType.EC, curve, local=True)
    parameters.generate_keypair(id=bytes([2]), label="gate", store=True)
"""


@pytest.fixture
def hsm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token with one key and the PIN 1234."""
    tool, module = shutil.which("softhsm2-util"), next(filter(Path.exists, MODULES), None)
    assert tool, "no SoftHSM here: apt-get install softhsm2"
    assert module, "no SoftHSM here: apt-get install softhsm2"
    (tmp_path / "tokens").mkdir()
    (tmp_path / "conf").write_text(f"directories.tokendir = {tmp_path / 'tokens'}\nlog.level = ERROR\n")
    monkeypatch.setenv("SOFTHSM2_CONF", str(tmp_path / "conf"))
    monkeypatch.setenv("PYKCS11LIB", str(module))
    label = ["--label", "gate", "--pin", "1234", "--so-pin", "5678"]
    subprocess.run([tool, "--init-token", "--free", *label], check=True, capture_output=True)
    # In a process of its own: a PKCS #11 library reads its configuration once in a process.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", MAKE_KEY], check=True, capture_output=True, env=environment)


@pytest.mark.slow
@pytest.mark.usefixtures("hsm")
def test_a_key_in_a_module_signs_with_its_pin_and_not_without() -> None:
    signer = open_signer("hsm:2?label=gate", lambda what: {"pin": "1234"}[what])
    assert signer.public_key.scheme == "ecdsa-sha2-nistp256"
    signer.public_key.verify_signature(signer.sign(b"data"), b"data")
    for uri, pin in (("hsm:2?label=gate", "0000"), ("hsm:2?label=other", "1234"), ("hsm:7?label=gate", "1234")):
        with pytest.raises(EbbflowError) as caught:
            open_signer(uri, lambda _what, pin=pin: pin).sign(b"data")  # type: ignore[misc]
        assert caught.value.reason is Reason.KEY_UNUSABLE
        assert uri in str(caught.value)
        assert pin not in str(caught.value)
