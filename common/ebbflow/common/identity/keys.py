"""Private keys (ECDSA on P-256), signing requests and signatures."""

import datetime as dt
import hashlib

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from ebbflow.common.errors import EbbflowError, Reason

BACKDATED = dt.timedelta(minutes=10)
"""How long before it is issued a certificate begins to be valid, as devices' clocks are often slow."""


def generate_key() -> ec.EllipticCurvePrivateKey:
    """Makes a key from the operating system's random source."""
    return ec.generate_private_key(ec.SECP256R1())


def key_to_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Returns the key as unencrypted PKCS #8; write it with mode 0600."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def load_key(pem: bytes) -> ec.EllipticCurvePrivateKey:
    """Reads what `key_to_pem` wrote.

    Raises:
        EbbflowError: FILE_CORRUPT if it is no unencrypted P-256 key.
    """
    try:
        key = serialization.load_pem_private_key(pem, None)
    except (ValueError, TypeError) as error:
        raise EbbflowError(Reason.FILE_CORRUPT, "the private key cannot be read") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise EbbflowError(Reason.FILE_CORRUPT, "the private key is not an ECDSA key on P-256")
    return key


def make_csr(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Returns a signing request (PKCS #10, DER) with an empty subject: the signer chooses the name."""
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.DER)


def public_key_of_csr(csr_der: bytes) -> ec.EllipticCurvePublicKey:
    """Returns the key of a signing request after checking that its sender holds the private half.

    Raises:
        EbbflowError: INVALID_REQUEST if it is malformed, wrongly signed or not over P-256.
    """
    try:
        request = x509.load_der_x509_csr(csr_der)
        key, signed = request.public_key(), request.is_signature_valid
    except Exception as error:
        raise EbbflowError(Reason.INVALID_REQUEST, "csr_der is not a signing request", field="csr_der") from error
    if not signed or not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        message = "csr_der must be signed by its own ECDSA key on P-256"
        raise EbbflowError(Reason.INVALID_REQUEST, message, field="csr_der")
    return key


def public_key_of_certificate(certificate_pem: bytes) -> ec.EllipticCurvePublicKey:
    """Returns the key that a certificate (PEM, the first of a chain) speaks for.

    Raises:
        EbbflowError: CERTIFICATE_INVALID if it cannot be read or is not over P-256.
    """
    try:
        key = x509.load_pem_x509_certificate(certificate_pem).public_key()
    except ValueError as error:
        raise EbbflowError(Reason.CERTIFICATE_INVALID, "the certificate cannot be read") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise EbbflowError(Reason.CERTIFICATE_INVALID, "the certificate is not over an ECDSA key on P-256")
    return key


def public_key_sha256(key: ec.EllipticCurvePublicKey) -> str:
    """Returns the hexadecimal SHA-256 of the key's SubjectPublicKeyInfo."""
    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()


def sign(key: ec.EllipticCurvePrivateKey, data: bytes) -> bytes:
    """Signs with ECDSA-SHA256; returns the signature in DER."""
    return key.sign(data, ec.ECDSA(hashes.SHA256()))


def verify(public_key: ec.EllipticCurvePublicKey, signature: bytes, data: bytes) -> None:
    """Checks what `sign` made.

    Raises:
        EbbflowError: CERTIFICATE_INVALID if another key signed or the data differs.
    """
    try:
        public_key.verify(signature, data, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature as error:
        raise EbbflowError(Reason.CERTIFICATE_INVALID, "the signature is not by the certificate's key") from error
