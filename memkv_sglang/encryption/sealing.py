"""Encrypt pages with AES-256-GCM, under a separate key for each page (NIST SP 800-38D).

A sealed page consists of a nonce, the encrypted content and checksum, and a tag. The checksum is
the same one that other tiers store with the content. The encryption key is derived from a master
key and the page's key by HKDF-Expand (RFC 5869). The page's key is also the associated data, so
that a sealed page cannot be passed off as another page. Nonces are random, which is safe for 2**32
messages per key. Each key encrypts only one page, and that page is stored only a few times.
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
"""Bytes that sealing adds to a page."""

CONTEXT = b"sglang-memkv page 1"
"""Separates these keys and associated data from those of any other format or use."""


class ForgedError(Exception):
    """The bytes were not sealed with this key for this page."""


def seal(master: bytes, page: Page, sealed: memoryview) -> None:
    """Encrypt a page into `sealed`, which is `OVERHEAD` bytes longer than the page.

    Reads the buffers only once, so that content and checksum agree even if a client writes to the
    buffers at the same time. Raises `ChangedPageError`.
    """
    content = sealed[NONCE_SIZE : -TAG_SIZE - CHECKSUM_SIZE]
    gather(page.buffers, content)
    sealed[-TAG_SIZE - CHECKSUM_SIZE : -TAG_SIZE] = spill_checksum(page, [content])
    nonce = os.urandom(NONCE_SIZE)
    encryptor = Cipher(AES256(_page_key(master, page.key)), GCM(nonce)).encryptor()
    encryptor.authenticate_additional_data(_associated_data(page.key))
    sealed[:NONCE_SIZE] = nonce
    plaintext = sealed[NONCE_SIZE:-TAG_SIZE]
    encryptor.update_into(plaintext, plaintext)
    encryptor.finalize()
    sealed[-TAG_SIZE:] = encryptor.tag


def unseal(master: bytes, sealed: memoryview, page: Page) -> bytes:
    """Decrypt into the page's buffers and return the checksum that was sealed with the content.

    Raises `ForgedError`; the buffers' content is then undefined.
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
        raise ForgedError("the authentication tag does not match") from None
    return checksum


def _page_key(master: bytes, key: PageKey) -> bytes:
    return HKDFExpand(SHA256(), len(master), _associated_data(key)).derive(master)


def _associated_data(key: PageKey) -> bytes:
    return CONTEXT + key.namespace + key.hash
