"""Certificates for servers of tests, and contexts for clients that trust them. Made anew for each run."""

from __future__ import annotations

import functools
import ssl
from pathlib import Path

import trustme

NAMES = ("127.0.0.1", "::1", "localhost", "models.example")


@functools.cache
def _authority() -> trustme.CA:
    return trustme.CA()


def served(*protocols: str) -> ssl.SSLContext:
    """The context of a server that speaks `protocols`, the preferred first (none: no ALPN)."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    _authority().issue_cert(*NAMES).configure_cert(context)
    if protocols:
        context.set_alpn_protocols(list(protocols))
    return context


def trusting() -> ssl.SSLContext:
    context = ssl.create_default_context()
    _authority().configure_trust(context)
    return context


def write_authority(path: Path) -> None:
    _authority().cert_pem.write_to_path(path)


def write_server(certificate: Path, key: Path) -> None:
    made = _authority().issue_cert(*NAMES)
    certificate.write_bytes(b"".join(blob.bytes() for blob in made.cert_chain_pems))
    made.private_key_pem.write_to_path(key)
