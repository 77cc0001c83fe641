"""Check that files with secrets and certificates are usable and private."""

from collections.abc import Callable, Iterator

from memkv_sglang.config.errors import ConfigError
from memkv_sglang.config.schema import MinioConfig
from memkv_sglang.finding import Finding, split_problem


def check_files(config: MinioConfig) -> Iterator[Finding]:
    """Read each file that the MinIO tier would read. Findings never show their content."""
    from memkv_sglang.tiers.minio.auth.credentials_file import read_credentials
    from memkv_sglang.tiers.minio.forms import page_form
    from memkv_sglang.tiers.minio.http.tls import tls_context

    checks: tuple[tuple[str, str, Callable[[], object]], ...] = (
        ("certificate", config.cert_file, lambda: tls_context(config)),
        ("credentials", config.credentials_file, lambda: read_credentials(config.credentials_file)),
        ("encryption", config.encryption_key_file, lambda: page_form(config.encryption_key_file)),
    )
    for what, path, read in checks:
        if not path:
            continue
        try:
            read()
        except ConfigError as error:
            yield split_problem(what, str(error))
        else:
            yield Finding("ok", what, f"{path} is valid and private")
