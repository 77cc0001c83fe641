"""A Kubernetes service whose name begins with `memkv` must not prevent any program from
starting.
"""

import logging
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memkv_sglang.config.errors import ConfigError
from memkv_sglang.config.load import load, load_config
from memkv_sglang.config.settings import all_settings, sections
from tests.cases.commands import memkv

SERVICES = (
    "memkv",
    *(f"memkv-{section}" for section in sections()),
    # Names that produce a setting's name, or one close to it.
    "memkv-agent-http",
    "memkv-config",
    "memkv-minio-endpoint",
    "memkv-nvme-capacity",
    "memkv-agent-service",
)


def service_links(
    service: str, host: str = "10.96.0.12", ports: tuple[tuple[str, int, str], ...] = ()
) -> dict[str, str]:
    """Return the variables that kubelet sets for a service (`envvars.FromServices`)."""
    ports = ports or (("http", 9000, "TCP"), ("web-console", 9001, "TCP"), ("", 9002, "UDP"))
    prefix = service.upper().replace("-", "_")
    links = {f"{prefix}_SERVICE_HOST": host, f"{prefix}_SERVICE_PORT": str(ports[0][1])}
    shown = f"[{host}]" if ":" in host else host
    for position, (name, number, protocol) in enumerate(ports):
        if name:
            links[f"{prefix}_SERVICE_PORT_{name.upper().replace('-', '_')}"] = str(number)
        url = f"{protocol.lower()}://{shown}:{number}"
        if position == 0:
            links[f"{prefix}_PORT"] = url
        stem = f"{prefix}_PORT_{number}_{protocol}"
        parts = {"": url, "_PROTO": protocol.lower(), "_PORT": str(number), "_ADDR": host}
        links.update({f"{stem}{ending}": value for ending, value in parts.items()})
    return links


@pytest.mark.parametrize("host", ["10.96.0.12", "fd00:10:96::c"])
@pytest.mark.parametrize("service", SERVICES)
def test_variables_of_a_service_are_ignored(service: str, host: str) -> None:
    links = service_links(service, host)
    loaded = load(None, {**links, "MEMKV_NVME_CAPACITY": "7GiB"}, {})
    assert loaded.config.nvme.capacity == 7 << 30
    assert loaded.config.agent.http_port == 0
    assert set(loaded.service_links) == links.keys()


@given(st.from_regex(r"memkv-[a-z]([a-z0-9-]{0,20}[a-z0-9])?", fullmatch=True))
def test_any_service_name_is_accepted(service: str) -> None:
    assert load_config(None, service_links(service), {}) == load_config(None, {}, {})


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("MEMKV_MINIO_PORT", "9000"),
        ("MEMKV_MINIO_PORT", "http://minio:9000"),
        ("MEMKV_AGENT_PORT", "8080"),
        ("MEMKV_AGENT_HTTP_PROT", "tcp://10.0.0.1:80"),
        ("MEMKV_MINIO_SERVICE", "minio"),
        ("MEMKV_MINIO_SERVICEHOST", "minio"),
        ("MEMKV_MINIO_ENDPIONT", "http://minio:9000"),
        ("MEMKV_MINIO_PORT_NINE_TCP", "tcp://10.0.0.1:9000"),
    ],
)
def test_a_typo_is_still_refused_with_a_suggestion(variable: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"^{variable}: unknown variable; did you mean MEMKV_"):
        load_config(None, {variable: value}, {})


def test_a_setting_with_such_a_name_still_works() -> None:
    assert load_config(None, {"MEMKV_AGENT_HTTP_PORT": "9100"}, {}).agent.http_port == 9100
    with pytest.raises(ConfigError, match="MEMKV_AGENT_HTTP_PORT"):
        load_config(None, {"MEMKV_AGENT_HTTP_PORT": "tcp:9100"}, {})


def test_no_setting_has_a_name_that_only_kubernetes_gives() -> None:
    form = re.compile(r".*(_SERVICE_HOST|_SERVICE_PORT.*|_PORT_\d.*)")
    assert not [setting.variable for setting in all_settings() if form.match(setting.variable)]


def test_one_line_says_so_and_only_once(caplog: pytest.LogCaptureFixture) -> None:
    links = service_links("memkv-once")
    with caplog.at_level(logging.INFO, "memkv_sglang"):
        load_config(None, links, {})
        load_config(None, links, {})
    (record,) = caplog.records
    assert "MEMKV_ONCE_SERVICE_HOST and 16 more" in record.getMessage()


def test_every_verb_says_so_on_stderr() -> None:
    done = memkv("config", "--json", environ=service_links("memkv-agent-http"))
    assert done.returncode == 0
    (line,) = done.stderr.splitlines()
    assert line.startswith("note: ignored MEMKV_AGENT_HTTP_SERVICE_HOST and ")
    assert "enableServiceLinks" in line
