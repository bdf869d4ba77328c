"""The next layer is read, and copied to the device, while the present one is at work."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

from redundancy_trace.weights import WeightFiles

_PAGE_BYTES = 4096
Tensors = dict[str, Tensor]


@contextmanager
def reading_ahead(
    weights: WeightFiles, names: Sequence[Sequence[str]], device: torch.device
) -> Iterator[Callable[[int], Tensors]]:
    """The stored tensors of each layer, asked for in turn; the next layer's are read while one is at work.

    On CUDA they are handed over on the device: a thread copies them into pinned memory and from there on a stream of
    its own. Elsewhere they stay on the CPU, in stored dtype, and come from memory that has been read from the disk.

    Args:
        weights: The open weight files.
        names: Of each layer in turn, the stored names of its tensors.
        device: Where the layers run.

    Yields:
        Gives the tensors of layer 0, 1, … when called with that number; each may be asked for once, in order.
    """
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    pool = ThreadPoolExecutor(1, "reading-ahead")

    def read(index: int) -> tuple[Tensors, "torch.cuda.Event | None"]:
        tensors = weights.read(names[index])
        if stream is not None:
            return _copy_to_cuda(tensors, stream)
        for tensor in tensors.values():
            _touch(tensor)
        return tensors, None

    def take(index: int) -> Tensors:
        tensors, copied = ahead.pop(index).result()
        if index + 1 < len(names):
            ahead[index + 1] = pool.submit(read, index + 1)
        if copied is not None:
            here = torch.cuda.current_stream(device)
            here.wait_event(copied)
            for tensor in tensors.values():
                # Their memory is of the copying stream, which must not take it back while they are used here.
                tensor.record_stream(here)
        return tensors

    ahead = {0: pool.submit(read, 0)}
    try:
        yield take
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _copy_to_cuda(tensors: Tensors, stream: "torch.cuda.Stream") -> tuple[Tensors, "torch.cuda.Event"]:
    """Start copying; the event tells when all are there. Pinned memory is given back to torch, which uses it again."""
    with torch.cuda.device(stream.device), torch.cuda.stream(stream):
        copies = {name: one.pin_memory().to(stream.device, non_blocking=True) for name, one in tensors.items()}
        return copies, stream.record_event()


def _touch(tensor: Tensor) -> None:
    """Have the pages of a memory-mapped tensor read from the disk now; of one in memory this costs nothing."""
    if tensor.is_contiguous():
        # By numpy, in this thread alone: torch would start threads of its own beside those at work.
        tensor.view(-1).view(torch.uint8).numpy()[::_PAGE_BYTES].sum()
