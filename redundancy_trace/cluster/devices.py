"""The devices of one machine that `--devices` names."""

from redundancy_trace.errors import InputError
from redundancy_trace.settings import device_names


def named_devices(devices: str) -> tuple[str, ...]:
    """The devices that are meant, each of them there.

    Args:
        devices: Names with commas, all of one kind; `auto` = every CUDA device.

    Raises:
        InputError: One is not there, or they are of several kinds: a run has one dtype.
    """
    import torch

    from redundancy_trace.engine import choose_device

    if devices.strip() == "auto":
        count = torch.cuda.device_count()
        if not count:
            raise InputError(
                "--devices auto is every CUDA device, and this machine has none; leave it out, or name devices, such "
                "as --devices cpu,cpu."
            )
        return tuple(f"cuda:{index}" for index in range(count))
    names = device_names(devices)
    kinds = dict.fromkeys(choose_device(name, "--devices").type for name in names)
    if len(kinds) > 1:
        raise InputError(f"--devices {devices} names {' and '.join(kinds)}; the devices of one run are of one kind.")
    return names
