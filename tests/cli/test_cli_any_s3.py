"""`memkv doctor` and `memkv bucket setup` on S3 servers that are not MinIO."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from tests.cli.cli_node import Outcome, Run
from tests.tiers.minio.odd_s3 import Faults, odd_s3

RunOn = Callable[..., Outcome]


@pytest.fixture
def run_on(run: Run) -> Iterator[RunOn]:
    """Return a function that runs a command with the settings of a server with faults."""
    with ExitStack() as stack:

        def call(faults: Faults, *arguments: str) -> Outcome:
            config = stack.enter_context(odd_s3(faults))
            names = ("endpoint", "bucket", "access_key", "secret_key")
            variables = {f"MEMKV_MINIO_{name.upper()}": getattr(config, name) for name in names}
            return run(*arguments, MEMKV_NVME_DIRECTORY="", **variables)

        yield call


def findings(outcome: Outcome) -> dict[str, dict[str, str]]:
    return {finding["what"]: finding for finding in json.loads(outcome.out)}


def test_doctor_does_not_need_minios_health_page(run_on: RunOn) -> None:
    found = findings(run_on(Faults(rules_set=True), "doctor", "--json"))
    assert found["MinIO"]["level"] == "ok"
    tried = ("credentials", "list", "put", "get", "delete", "conditions", "copy", "listing")
    assert [found[what]["level"] for what in tried] == ["ok"] * len(tried)
    assert "7 days" in found["lifecycle"]["detail"]


@pytest.mark.parametrize("conditions", ["ignored", "racy"])
@pytest.mark.parametrize(("limit", "level"), [("0", "warn"), ("1TiB", "FAIL")])
def test_a_server_without_conditional_writes_fails_where_limits_are_set(
    conditions: str, limit: str, level: str, run_on: RunOn
) -> None:
    faults = Faults(conditions=conditions)  # type: ignore[arg-type]
    outcome = run_on(faults, "doctor", "--json", "--collector-capacity", limit)
    found = findings(outcome)["conditions"]
    assert found["level"] == level
    assert "memkv gc" in found["advice"]
    assert outcome.status == (level == "FAIL")


def test_limits_are_fine_where_one_node_collects_by_a_setting(run_on: RunOn) -> None:
    limits = ("--collector-capacity", "1TiB", "--collector-run", "always")
    outcome = run_on(Faults(conditions="ignored"), "doctor", "--json", *limits)
    assert findings(outcome)["conditions"]["level"] == "warn"
    assert "collector.run = always" in findings(outcome)["conditions"]["advice"]
    assert outcome.status == 0


@pytest.mark.parametrize(
    ("faults", "warning"),
    [
        (Faults(conditions="ignored", version_ids=True), ""),  # Garage
        (Faults(conditions="bare"), ""),  # Ceph RGW
        (Faults(versioning="Enabled", version_ids=True), "the bucket is versioned"),
    ],
)
def test_gc_collects_and_warns_only_of_real_versions(
    faults: Faults, warning: str, run_on: RunOn
) -> None:
    limits = ("--collector-capacity", "1GiB", "--collector-interval", "1")
    for _ in range(2):  # the second run replaces records that the first one wrote
        outcome = run_on(faults, "gc", *limits)
        assert outcome.status == 0, outcome.err
        assert "removed: 0 pages" in outcome.out
        assert ("warning" in outcome.err) is bool(warning)
        assert warning in outcome.err


@pytest.mark.parametrize(
    ("rules", "level"), [("NotImplemented", "warn"), ("AccessDenied", "skip"), ("", "warn")]
)
def test_a_check_that_could_not_run_is_not_ok(rules: str, level: str, run_on: RunOn) -> None:
    outcome = run_on(Faults(rules=rules), "doctor", "--json")
    assert findings(outcome)["lifecycle"]["level"] == level
    assert outcome.status == 0


def test_doctor_fails_on_a_server_whose_listings_are_empty(run_on: RunOn) -> None:
    outcome = run_on(Faults(lists=False), "doctor", "--json")
    assert findings(outcome)["listing"]["level"] == "FAIL"
    assert outcome.status == 1


def test_setup_does_without_lifecycle_rules_versions_and_locks(run_on: RunOn) -> None:
    faults = Faults(rules="NotImplemented", versioning="NotImplemented")
    outcome = run_on(faults, "bucket", "setup")
    assert outcome.status == 0
    assert "warning: lifecycle: the server has no lifecycle rules" in outcome.err
    assert "conditional writes work" in outcome.out


def test_setup_says_what_does_not_work(run_on: RunOn) -> None:
    outcome = run_on(Faults(conditions="ignored", copies_move=False), "bucket", "setup")
    assert outcome.status == 0
    warnings = outcome.err.splitlines()
    assert [line.split(":")[1].strip() for line in warnings] == ["conditions", "copy"]
    outcome = run_on(Faults(deletes=False), "bucket", "setup")
    assert outcome.status == 1
    assert "error: removal: " in outcome.err


@pytest.mark.parametrize("command", [("bucket", "setup"), ("doctor",), ("gc", "--dry-run")])
def test_the_right_region_is_named(command: tuple[str, ...], run_on: RunOn) -> None:
    outcome = run_on(Faults(region="garage"), *command)
    assert outcome.status == 1
    assert "set minio.region to garage" in " ".join((outcome.out + outcome.err).split())


def test_policies_are_added_only_to_minio(run_on: RunOn) -> None:
    """SeaweedFS takes a policy for an object, and answers that all is well."""
    outcome = run_on(Faults(), "bucket", "setup", "--add-policies")
    assert outcome.status == 1
    assert "added" not in outcome.out
    assert "`memkv bucket policy` prints them" in outcome.err.splitlines()[-1]
