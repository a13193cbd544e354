"""What this package raises. Users' mistakes are ValueError; these are the machine's and the group's."""


class ImexError(RuntimeError):
    """Base of this package's errors."""


class DeviceError(ImexError):
    """A machine that cannot do what was asked: no GPU, wrong capability, no compiler, no memory."""


class FaultError(ImexError):
    """The resident kernel or one of its ranks stopped answering."""


class RingFullError(ImexError):
    """The kernel has not taken the descriptors before this one yet, and the caller did not want to wait."""
