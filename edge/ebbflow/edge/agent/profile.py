"""What this device can run."""

import os
import platform

import psutil

from ebbflow.api.v1 import resources_pb2 as pb
from ebbflow.edge.agent.settings import AgentSettings
from ebbflow.edge.agent.version import agent_version

PRECISIONS = {"bf16": pb.PRECISION_BF16, "int8": pb.PRECISION_INT8, "int4": pb.PRECISION_INT4}
_MIB = 2**20


def cores_of(settings: AgentSettings) -> int:
    """Returns the cores to compute with."""
    return settings.cores or len(os.sched_getaffinity(0))


def device_profile(settings: AgentSettings) -> pb.DeviceProfile:
    """Describes the device to the cloud, which chooses the variant by it: the pinned one, where there is one."""
    precisions = sorted(settings.precisions, key=lambda precision: precision != settings.precision_pin)
    return pb.DeviceProfile(
        architecture=platform.machine(),
        memory_mib=settings.memory_mib or int(psutil.virtual_memory().total) // _MIB // 2,
        cores=cores_of(settings),
        precisions=[PRECISIONS[precision] for precision in precisions],
        agent_version=agent_version(),
    )
