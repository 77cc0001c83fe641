"""Credentials and request signatures. `credentials` imports minio-py, so import it late."""

from memkv_sglang.tiers.minio.auth.credentials_file import read_credentials
from memkv_sglang.tiers.minio.auth.signing import NO_FIELDS, REFUSED, Signer, credential_provider

__all__ = ["NO_FIELDS", "REFUSED", "Signer", "credential_provider", "read_credentials"]
