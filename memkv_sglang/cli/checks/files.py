"""Check that files with secrets and certificates are usable and private."""

from collections.abc import Callable, Iterator

from memkv_sglang.config.errors import ConfigError
from memkv_sglang.config.schema import AgentConfig, MinioConfig
from memkv_sglang.finding import Finding, split_problem

_Check = tuple[str, str, Callable[[], object]]
"""What is checked, the file, and a function that reads it."""


def check_http_files(config: AgentConfig) -> Iterator[Finding]:
    """Read the certificate and the token of the agent's HTTP server, as the agent would."""
    from memkv_sglang.agent.http_server import make_context, read_token

    return _check(
        ("http", config.http_cert_file or config.http_key_file, lambda: make_context(config)),
        ("http token", config.http_token_file, lambda: read_token(config)),
    )


def check_files(config: MinioConfig) -> Iterator[Finding]:
    """Read each file that the MinIO tier would read. Findings never show their content."""
    from memkv_sglang.tiers.minio.auth.credentials_file import read_credentials
    from memkv_sglang.tiers.minio.forms import page_form
    from memkv_sglang.tiers.minio.http.tls import tls_context

    return _check(
        ("certificate", config.cert_file, lambda: tls_context(config)),
        ("credentials", config.credentials_file, lambda: read_credentials(config.credentials_file)),
        ("encryption", config.encryption_key_file, lambda: page_form(config.encryption_key_file)),
    )


def _check(*checks: _Check) -> Iterator[Finding]:
    for what, path, read in checks:
        if not path:
            continue
        try:
            read()
        except ConfigError as error:
            yield split_problem(what, str(error))
        else:
            yield Finding("ok", what, f"{path} is valid and private")
