"""The commands for Kubernetes on the deployment page fit the chart that they install.

Needs helm and PyYAML, as `tests/deploy/test_kubernetes.py` does; no cluster.
"""

from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

import pytest

from tests.deploy.test_kubernetes import HELM, helm
from tests.documents.pages import ROOT, commands

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not HELM, reason="needs helm")]

FROM_FILE = "--from-file="


def of_page(*beginning: str) -> list[tuple[str, ...]]:
    """Return the arguments of the page's commands that begin with these words."""
    return [
        command.words[len(beginning) :]
        for command in commands()
        if command.place.startswith("docs/deployment.md")
        and command.words[: len(beginning)] == beginning
    ]


@pytest.fixture
def rendered(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Return the objects that the page's `helm install` would create."""
    yaml = pytest.importorskip("yaml")
    monkeypatch.chdir(ROOT)
    (arguments,) = of_page("helm", "install")
    return [one for one in yaml.safe_load_all(helm("template", *arguments)) if one]


def created_secrets() -> dict[str, set[str]]:
    """Return the keys of each secret that the page creates."""
    return {
        words[0]: {
            PurePosixPath(word.removeprefix(FROM_FILE).split("=")[0]).name
            for word in words
            if word.startswith(FROM_FILE)
        }
        for words in of_page("kubectl", "create", "secret", "generic")
    }


def mounted_secrets(objects: list[dict[str, Any]]) -> Iterator[tuple[str, set[str]]]:
    """Yield each mounted secret with the names of its files that a setting mentions."""
    for one in objects:
        if one["kind"] not in ("DaemonSet", "Deployment"):
            continue
        pod = one["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        values = [PurePosixPath(item["value"]) for item in container["env"]]
        places = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        for volume in pod["volumes"]:
            if "secret" in volume:
                folder = PurePosixPath(places[volume["name"]])
                used = {value.name for value in values if value.parent == folder}
                yield volume["secret"]["secretName"], used


def test_every_mounted_secret_is_created_with_its_files(rendered: list[dict[str, Any]]) -> None:
    created, mounted = created_secrets(), dict(mounted_secrets(rendered))
    assert mounted.keys() == created.keys()
    for name, used in mounted.items():
        assert used and used <= created[name], name


def test_all_commands_use_one_namespace() -> None:
    named = {
        words[words.index("-n") + 1]
        for program in ("helm", "kubectl")
        for words in of_page(program)
        if "-n" in words
    }
    ((created, *_),) = of_page("kubectl", "create", "namespace")
    assert named == {created}


def test_what_the_page_waits_for_exists(rendered: list[dict[str, Any]]) -> None:
    ((waited, *_),) = of_page("kubectl", "rollout", "status")
    names = {f"{one['kind'].lower()}/{one['metadata']['name']}" for one in rendered}
    assert waited in names
