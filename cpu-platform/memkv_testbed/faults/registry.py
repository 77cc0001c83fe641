"""Every fault there is."""

from memkv_testbed.faults import minio, nvme, process
from memkv_testbed.faults.base import Fault

FAULTS: dict[str, Fault] = {
    f"{fault.medium}: {fault.name}": fault
    for module in (minio, nvme, process)
    for fault in module.FAULTS
}
