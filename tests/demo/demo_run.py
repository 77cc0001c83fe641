"""Results of a demo run in which every claim holds."""

from memkv_testbed.demo.record import Reference, Request, Sources
from memkv_testbed.demo.scenario import CHANGED_STEP, TENANT, TENANT_STEP

PAGE = 256
PROMPT = [5] * 16411
WHOLE = 16384
ANSWER = [7, 8, 9]
CHANGED_AT = 15000


def make_request(step: str, node: str, reused: Sources, ttft_s: float, **other: object) -> Request:
    """Return a result with perfect reuse and the reference's answer."""
    values = {
        "step": step,
        "node": node,
        "via": "direct",
        "tenant": None,
        "prompt": PROMPT,
        "output_ids": ANSWER,
        "ttft_s": ttft_s,
        "reported": reused.total,
        "reused": reused,
        "expected": reused.total,
        "reference": Reference(14.0, ANSWER),
    }
    return Request(**{**values, **other})  # type: ignore[arg-type]  # keywords of this test


def make_run() -> list[Request]:
    """Return requests of every kind, all successful."""
    near = CHANGED_AT // PAGE * PAGE
    return [
        make_request("turn 1", "A", Sources(), 13.0, via="router"),
        make_request("turn 2", "B", Sources(minio=WHOLE), 0.4, via="router"),
        make_request("turn 3", "A", Sources(device=WHOLE - PAGE, minio=PAGE), 0.3, via="router"),
        *(
            make_request("again", "B", Sources(device=WHOLE), seconds)
            for seconds in (0.1, 0.5, 0.2)
        ),
        make_request(TENANT_STEP, "A", Sources(), 15.0, tenant=TENANT),
        make_request("evicted", "A", Sources(device=4096, host=WHOLE - 4096), 0.25),
        make_request(CHANGED_STEP, "B", Sources(minio=near), 2.0),
        make_request("restart", "A", Sources(nvme=WHOLE), 0.28),
    ]
