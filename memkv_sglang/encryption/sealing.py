"""A page as a secret: AES-256-GCM with a key of the page's own (NIST SP 800-38D).

A sealed page is nonce, ciphertext, tag. Its key is derived from a master key and the page's key by
HKDF-Expand (RFC 5869), and the page's key is the associated data as well, so that a sealed page
opens in no other page's place. Nonces are random: 2**32 messages a key are safe with those, and
a key encrypts no more than the few times that its one page is stored.
"""

import os

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import GCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from memkv_sglang.page import Page, PageKey

NONCE_SIZE = 12
TAG_SIZE = 16

OVERHEAD = NONCE_SIZE + TAG_SIZE
"""Bytes by which a sealed page is longer than the page."""

CONTEXT = b"sglang-memkv page 1"
"""Keeps keys and associated data apart from those of any other format or use."""


class ForgedError(Exception):
    """No holder of the key sealed these bytes for this page."""


def seal(master: bytes, page: Page, sealed: memoryview) -> None:
    """Encrypt a page's buffers into `sealed`, which is `OVERHEAD` bytes longer."""
    nonce = os.urandom(NONCE_SIZE)
    encryptor = Cipher(AES256(_page_key(master, page.key)), GCM(nonce)).encryptor()
    encryptor.authenticate_additional_data(_associated_data(page.key))
    sealed[:NONCE_SIZE] = nonce
    ciphertext = sealed[NONCE_SIZE:-TAG_SIZE]
    for buffer in page.buffers:
        encryptor.update_into(buffer, ciphertext[: len(buffer)])
        ciphertext = ciphertext[len(buffer) :]
    encryptor.finalize()
    sealed[-TAG_SIZE:] = encryptor.tag


def unseal(master: bytes, sealed: memoryview, page: Page) -> None:
    """Decrypt into a page's buffers. Raises `ForgedError`; they hold nothing of value then."""
    nonce, tag = bytes(sealed[:NONCE_SIZE]), bytes(sealed[-TAG_SIZE:])
    decryptor = Cipher(AES256(_page_key(master, page.key)), GCM(nonce, tag)).decryptor()
    decryptor.authenticate_additional_data(_associated_data(page.key))
    ciphertext = sealed[NONCE_SIZE:-TAG_SIZE]
    for buffer in page.buffers:
        decryptor.update_into(ciphertext[: len(buffer)], buffer)
        ciphertext = ciphertext[len(buffer) :]
    try:
        decryptor.finalize()
    except InvalidTag:
        raise ForgedError("the authentication tag does not fit") from None


def _page_key(master: bytes, key: PageKey) -> bytes:
    return HKDFExpand(SHA256(), len(master), _associated_data(key)).derive(master)


def _associated_data(key: PageKey) -> bytes:
    return CONTEXT + key.namespace + key.hash
