"""A CA and what it signs, for tests of TLS."""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

Key = ec.EllipticCurvePrivateKey


def _name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def pem(certificate: x509.Certificate) -> str:
    """A certificate as text."""
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def key_pem(key: Key, password: bytes | None = None) -> str:
    """A private key as text."""
    kind: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if password is not None:
        kind = serialization.BestAvailableEncryption(password)
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, kind).decode()


class Authority:
    """A CA."""

    def __init__(self, name: str = "test CA") -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = _name(name)
        self.certificate = self._sign(self.name, self.key, [(x509.BasicConstraints(ca=True, path_length=None), True)])

    @property
    def pem(self) -> str:
        """Its certificate."""
        return pem(self.certificate)

    def _sign(
        self,
        name: x509.Name,
        key: Key,
        extensions: Sequence[tuple[x509.ExtensionType, bool]],
        serial: int | None = None,
    ) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(self.name)
            .public_key(key.public_key())
            .serial_number(serial or x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=2))
        )
        for extension, critical in extensions:
            builder = builder.add_extension(extension, critical)
        return builder.sign(self.key, hashes.SHA256())

    def server(self, name: str = "server") -> tuple[str, str]:
        """Certificate and key of a server on 127.0.0.1, as text."""
        key = ec.generate_private_key(ec.SECP256R1())
        names = x509.SubjectAlternativeName(
            [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        )
        usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
        return pem(self._sign(_name(name), key, [(names, False), (usage, False)])), key_pem(key)

    def client(self, *uris: str, name: str = "client", serial: int | None = None) -> tuple[str, str]:
        """Certificate and key of a client with these URIs, as text."""
        key = ec.generate_private_key(ec.SECP256R1())
        extensions: list[tuple[x509.ExtensionType, bool]] = [
            (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), False)
        ]
        if uris:
            extensions.append(
                (x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri) for uri in uris]), False)
            )
        return pem(self._sign(_name(name), key, extensions, serial)), key_pem(key)


def write(folder: Path, **files: str) -> dict[str, str]:
    """These texts as files ``name.pem``; name → path."""
    paths = {}
    for name, text in files.items():
        path = folder / f"{name}.pem"
        path.write_text(text)
        paths[name] = str(path)
    return paths
