"""A stand-in for pynvml: as many GPUs as a test asks for, wired as it says."""

from __future__ import annotations

from types import SimpleNamespace


class NVMLError(Exception):
    """As pynvml's."""


def bus(index: int) -> str:
    return f"00000000:{index + 1:02X}:00.0"


class FakeNvml:
    """`links[i][j]`: NVLink links between two GPUs; `switch`: so many links of each GPU go to NVSwitches; `p2p`: statuses by cap."""

    NVMLError = NVMLError

    def __init__(
        self,
        count=2,
        *,
        name="NVIDIA H200",
        links=None,
        switch=0,
        capability=(9, 0),
        p2p=None,
        ancestor=50,
        fabric=3,
        version=6,
    ):
        self.count, self.name, self.capability = count, name, capability
        self.switch, self.ancestor, self.fabric, self.version = switch, ancestor, fabric, version
        self.ends = [
            [bus(j) for j in range(count) for _ in range((links or {}).get((min(i, j), max(i, j)), 0) if i != j else 0)]
            + [f"0000000A:{k:02X}:00.0" for k in range(switch)]
            for i in range(count)
        ]
        self.p2p = {0: 0, 1: 0, 2: 0 if links or switch else 5, 3: 0, **(p2p or {})}
        self.open = 0

    def nvmlInit(self):
        self.open += 1

    def nvmlShutdown(self):
        self.open -= 1

    def nvmlSystemGetDriverVersion(self):
        return b"580.159.04"

    def nvmlDeviceGetCount(self):
        return self.count

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

    def nvmlDeviceGetUUID(self, handle):
        return f"GPU-{handle}{handle}"

    def nvmlDeviceGetName(self, handle):
        return self.name.encode()

    def nvmlDeviceGetCudaComputeCapability(self, handle):
        return self.capability

    def nvmlDeviceGetPciInfo(self, handle):
        return SimpleNamespace(busId=bus(handle).encode())

    def nvmlDeviceGetMemoryInfo(self, handle):
        return SimpleNamespace(total=143771 << 20)

    def nvmlDeviceGetNumaNodeId(self, handle):
        return handle // 2

    def nvmlDeviceGetNvLinkState(self, handle, link):
        if link >= 18:
            raise NVMLError("Invalid Argument")
        return int(link < len(self.ends[handle]))

    def nvmlDeviceGetNvLinkVersion(self, handle, link):
        return self.version

    def nvmlDeviceGetNvLinkRemotePciInfo(self, handle, link):
        return SimpleNamespace(busId=self.ends[handle][link].encode())

    def nvmlDeviceGetNvLinkRemoteDeviceType(self, handle, link):
        return 2 if self.switch else 0

    def nvmlDeviceGetFieldValues(self, handle, fields):
        (field,) = fields
        if field == 90:
            return [SimpleNamespace(nvmlReturn=0, value=SimpleNamespace(uiVal=26562))]
        return [SimpleNamespace(nvmlReturn=3, value=SimpleNamespace(uiVal=0))]  # not supported: the older field is asked next

    def nvmlDeviceGetP2PStatus(self, first, second, index):
        if self.p2p[index] is None:
            raise NVMLError("Not Supported")
        return self.p2p[index]

    def nvmlDeviceGetTopologyCommonAncestor(self, first, second):
        return self.ancestor

    c_nvmlGpuFabricInfo_t = SimpleNamespace

    def nvmlDeviceGetGpuFabricInfo(self, handle, info):
        info.state = self.fabric
        return 0
