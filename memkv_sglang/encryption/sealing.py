"""A page as a secret: AES-256-GCM with a key of the page's own (NIST SP 800-38D).

A sealed page is a nonce, the encrypted content and its checksum, and a tag. The checksum is the one
that the content has on every other medium. The encryption key is derived from a master key and the
page's key by HKDF-Expand (RFC 5869), and the page's key is the associated data as well, so that a
sealed page opens in no other page's place. Nonces are random: 2**32 messages a key are safe with
those, and a key encrypts no more than the few times that its one page is stored.
"""

import os

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import GCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from memkv_sglang.page import CHECKSUM_SIZE, Page, PageKey, gather, spill_checksum

NONCE_SIZE = 12
TAG_SIZE = 16

OVERHEAD = NONCE_SIZE + CHECKSUM_SIZE + TAG_SIZE
"""Bytes by which a sealed page is longer than the page."""

CONTEXT = b"sglang-memkv page 1"
"""Keeps keys and associated data apart from those of any other format or use."""


class ForgedError(Exception):
    """No holder of the key sealed these bytes for this page."""


def seal(master: bytes, page: Page, sealed: memoryview) -> None:
    """Encrypt a page's buffers into `sealed`, which is `OVERHEAD` bytes longer.

    Reads the buffers once, so that the checksum is that of the content whatever a client does to
    them meanwhile. Raises `ChangedPageError`.
    """
    content = sealed[NONCE_SIZE : -TAG_SIZE - CHECKSUM_SIZE]
    gather(page.buffers, content)
    sealed[-TAG_SIZE - CHECKSUM_SIZE : -TAG_SIZE] = spill_checksum(page, [content])
    nonce = os.urandom(NONCE_SIZE)
    encryptor = Cipher(AES256(_page_key(master, page.key)), GCM(nonce)).encryptor()
    encryptor.authenticate_additional_data(_associated_data(page.key))
    sealed[:NONCE_SIZE] = nonce
    secret = sealed[NONCE_SIZE:-TAG_SIZE]
    encryptor.update_into(secret, secret)
    encryptor.finalize()
    sealed[-TAG_SIZE:] = encryptor.tag


def unseal(master: bytes, sealed: memoryview, page: Page) -> bytes:
    """Decrypt into a page's buffers and return the checksum that was sealed with the content.

    Raises `ForgedError`; the buffers hold nothing of value then.
    """
    nonce, tag = bytes(sealed[:NONCE_SIZE]), bytes(sealed[-TAG_SIZE:])
    decryptor = Cipher(AES256(_page_key(master, page.key)), GCM(nonce, tag)).decryptor()
    decryptor.authenticate_additional_data(_associated_data(page.key))
    ciphertext = sealed[NONCE_SIZE:-TAG_SIZE]
    for buffer in page.buffers:
        decryptor.update_into(ciphertext[: len(buffer)], buffer)
        ciphertext = ciphertext[len(buffer) :]
    checksum = decryptor.update(ciphertext)
    try:
        decryptor.finalize()
    except InvalidTag:
        raise ForgedError("the authentication tag does not fit") from None
    return checksum


def _page_key(master: bytes, key: PageKey) -> bytes:
    return HKDFExpand(SHA256(), len(master), _associated_data(key)).derive(master)


def _associated_data(key: PageKey) -> bytes:
    return CONTEXT + key.namespace + key.hash
