"""Files of a commit → this disk: in parts and in parallel, taken up again where they stopped, checked at the end."""

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path

from redundancy_trace.hub.failures import persisted
from redundancy_trace.hub.partial import PartialFile
from redundancy_trace.hub.progress import Meter
from redundancy_trace.hub.ranges import RangesIgnored, RemoteFile, WrongContent
from redundancy_trace.hub.records import RepoFile

PARALLEL_PARTS = 8
_PATIENCE_SECONDS = 1.0


@dataclass(frozen=True)
class _Transfer:
    """One file on its way."""

    remote: RemoteFile
    partial: PartialFile
    meter: Meter = field(repr=False)

    def fetch_part(self, part: int) -> None:
        """Fetch what is missing of a part; as long as something arrives, it is gone on with."""
        partial, stopped = self.partial, self.meter.stopped
        try:
            persisted(lambda: self._ranged(part), lambda: partial.position(part), partial.stop(part), stopped)
        except RangesIgnored:
            with partial.whole:  # one thread reads the file in one go; the others then have nothing left to do
                persisted(self._in_one_go, self._missing_from, partial.file.size, stopped)

    def _ranged(self, part: int) -> None:
        position, stop = self.partial.position(part), self.partial.stop(part)
        with closing(self.remote.chunks(position, stop, stopped=self.meter.stopped)) as chunks:
            for chunk in chunks:
                self.meter.add(0)
                # Told is what was taken: where ranges are ignored, another thread may bring the first part too.
                self.meter.add(self.partial.write(position, chunk, part))
                position += len(chunk)

    def _in_one_go(self) -> None:
        position, size = 0, self.partial.file.size
        with closing(self.remote.chunks(0, size, ranged=False, stopped=self.meter.stopped)) as chunks:
            for chunk in chunks:
                self.meter.add(0)
                self.meter.add(self.partial.write(position, chunk))
                position += len(chunk)

    def _missing_from(self) -> int:
        """The first byte of the file that is not there."""
        partial = self.partial
        return next(
            (partial.position(part) for part in partial.parts if partial.position(part) < partial.stop(part)),
            partial.file.size,
        )


def download_files(
    files: Sequence[tuple[RepoFile, RemoteFile, Path]],
    meter: Meter,
    on_arrival: Callable[[], None] | None = None,
) -> None:
    """Fetch files, up to eight parts at a time; a file that is there under its name stays.

    Args:
        files: What each is, where it comes from, where it goes.
        meter: Told the bytes; once it is stopped, the download ends at its next chunk.
        on_arrival: Called when the last byte is there, before the hashes are checked: the network is free.

    Raises:
        WrongContent: A file has another hash than the repository tells, after a second try.
        Exception: What a part failed with; what has arrived stays for the next time.
    """
    missing = [(file, remote, target) for file, remote, target in files if not target.is_file()]
    for again in (False, True):
        with ExitStack() as opened:
            transfers = []
            for file, remote, target in missing:
                partial = PartialFile(target, file)
                opened.callback(partial.leave)
                transfers.append(_Transfer(remote, partial, meter))
            _fetch_parts(transfers, meter)
            if on_arrival and not again:
                on_arrival()
            missing = []
            with ThreadPoolExecutor(PARALLEL_PARTS, "verify") as pool:
                rights = list(pool.map(lambda transfer: transfer.partial.is_right(), transfers))
            for transfer, right in zip(transfers, rights, strict=True):
                if right:
                    transfer.partial.finish()
                else:
                    meter.add(-transfer.partial.present())
                    transfer.partial.restart()
                    missing.append((transfer.partial.file, transfer.remote, transfer.partial.target))
        if not missing:
            return
        if again:
            raise WrongContent(", ".join(file.path for file, _, _ in missing))


def _fetch_parts(transfers: Sequence[_Transfer], meter: Meter) -> None:
    """All parts of all files, in order; the first failure ends the others at their next chunk."""
    pool = ThreadPoolExecutor(PARALLEL_PARTS, "download")
    futures = [
        pool.submit(transfer.fetch_part, part)
        for transfer in transfers
        for part in transfer.partial.parts
        if transfer.partial.position(part) < transfer.partial.stop(part)
    ]
    try:
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()
    except BaseException:
        meter.stop()
        pool.shutdown(wait=False, cancel_futures=True)
        # Those that are at work end at their next chunk; one whose server is silent is not waited for.
        wait(futures, timeout=_PATIENCE_SECONDS)
        raise
    pool.shutdown()
