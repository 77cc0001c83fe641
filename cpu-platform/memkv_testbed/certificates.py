"""Issue certificates for tests of TLS."""

import ipaddress
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import NameOID

LIFETIME = timedelta(days=2)


class Certificate(NamedTuple):
    """A certificate with its private key, as PEM files."""

    cert_file: Path
    key_file: Path


class Authority:
    """Issues certificates for servers and clients, in a directory that the caller removes."""

    def __init__(self, directory: Path, name: str = "test authority") -> None:
        """Create the authority's own certificate in `file`."""
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self._key = ec.generate_private_key(ec.SECP256R1())
        usage = x509.KeyUsage(
            key_cert_sign=True, crl_sign=True, digital_signature=False, content_commitment=False,
            key_encipherment=False, data_encipherment=False, key_agreement=False,
            encipher_only=False, decipher_only=False,
        )  # fmt: skip
        certificate = (
            self._builder(self._name, self._key.public_key(), datetime.now(UTC))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .sign(self._key, hashes.SHA256())
        )
        self.file = directory / "authority.pem"
        self.file.write_bytes(certificate.public_bytes(Encoding.PEM))

    def issue(
        self,
        directory: str,
        names: Sequence[str] = ("127.0.0.1",),
        *,
        common_name: str = "",
        expired: bool = False,
        password: bytes | None = None,
    ) -> Certificate:
        """Write `public.crt` and `private.key` into a directory below the authority's.

        `names` are the host names and addresses to certify. The default common name is `directory`.
        """
        target = self._directory / directory
        target.mkdir()
        begin = datetime.now(UTC) - (2 * LIFETIME if expired else timedelta())
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name or directory)])
        certificate = (
            self._builder(subject, key.public_key(), begin)
            .add_extension(x509.SubjectAlternativeName(map(_general_name, names)), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        issued = Certificate(target / "public.crt", target / "private.key")
        issued.cert_file.write_bytes(certificate.public_bytes(Encoding.PEM))
        encryption = BestAvailableEncryption(password) if password else NoEncryption()
        issued.key_file.touch(0o600)
        issued.key_file.write_bytes(
            key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)
        )
        return issued

    def _builder(
        self, subject: x509.Name, key: ec.EllipticCurvePublicKey, begin: datetime
    ) -> x509.CertificateBuilder:
        # Python 3.13 verifies strictly, and rejects a certificate without the key identifiers.
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(begin - timedelta(minutes=5))
            .not_valid_after(begin + LIFETIME)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(issuer, critical=False)
        )


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)
