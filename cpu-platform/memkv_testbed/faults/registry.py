"""All faults, by medium and name."""

from memkv_testbed.faults import bucket, client, minio, nvme, process
from memkv_testbed.faults.base import Fault

FAULTS: dict[str, Fault] = {
    f"{fault.medium}: {fault.name}": fault
    for module in (minio, bucket, client, nvme, process)
    for fault in module.FAULTS
}
