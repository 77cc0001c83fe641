import dataclasses

import pytest
from memkv_testbed.demo.figures import compute_figures, failed, source_of
from memkv_testbed.demo.record import Reference, Sources, rows
from memkv_testbed.demo.scenario import CHANGED_STEP, TENANT_STEP

from tests.demo.demo_run import CHANGED_AT, PAGE, WHOLE, make_request, make_run


def test_successful_run_gives_medians_by_source() -> None:
    figures = compute_figures(make_run(), PAGE, CHANGED_AT)
    assert failed(figures) == []
    assert figures["ttft_recompute_s"] == 14.0  # median of 13, 15 and the reference's 14
    assert figures["ttft_minio_s"] == 0.4  # excludes turn 3, which loaded only one page from MinIO
    assert figures["ttft_nvme_s"] == 0.28
    assert figures["ttft_host_s"] == 0.25
    assert figures["ttft_top_tier_s"] == 0.2
    assert figures["nvme_speedup"] == pytest.approx(50)


@pytest.mark.parametrize(
    ("step", "change", "claims"),
    [
        ("turn 2", {"output_ids": [1]}, ["identical_text"]),
        ("turn 2", {"reference": None}, ["identical_text"]),
        ("turn 2", {"reported": WHOLE - PAGE}, ["reuse_page_exact"]),
        ("turn 2", {"expected": WHOLE - PAGE}, ["reuse_page_exact"]),
        ("turn 3", {"reused": Sources(device=WHOLE - PAGE)}, ["reuse_page_exact"]),
        (
            CHANGED_STEP,
            {"reused": Sources(minio=WHOLE), "reported": WHOLE, "expected": WHOLE},
            ["changed_token_isolated"],
        ),
        (
            TENANT_STEP,
            {"reused": Sources(nvme=PAGE), "reported": PAGE, "expected": PAGE},
            ["tenant_isolated"],
        ),
        (
            TENANT_STEP,
            {"reference": Reference(14.0, [1])},
            ["identical_text", "tenant_isolated"],
        ),
        ("restart", {"reused": Sources(minio=WHOLE)}, ["every_source_seen"]),
    ],
)
def test_false_claims_are_reported(step: str, change: dict[str, object], claims: list[str]) -> None:
    run = [
        dataclasses.replace(request, **change) if request.step == step else request  # type: ignore[arg-type]  # any field
        for request in make_run()
    ]
    assert failed(compute_figures(run, PAGE, CHANGED_AT)) == claims


@pytest.mark.parametrize("step", [CHANGED_STEP, TENANT_STEP])
def test_a_step_that_did_not_run_is_a_failure(step: str) -> None:
    run = [request for request in make_run() if request.step != step]
    assert failed(compute_figures(run, PAGE, CHANGED_AT))


def test_a_mostly_computed_prompt_measures_no_source() -> None:
    request = make_request("part", "A", Sources(minio=WHOLE - 2 * PAGE), 1.0)
    assert source_of(request, PAGE) is None


def test_repetitions_are_one_row_with_their_median() -> None:
    row = next(row for row in rows(make_run()) if row.first.step == "again")
    assert (row.times, row.ttft_s, row.identical) == (3, 0.2, True)
