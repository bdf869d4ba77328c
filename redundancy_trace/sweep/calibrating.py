"""The token ids of a sweep: where its tokenizer may be, and how the run names them."""

import itertools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from redundancy_trace.checkpoints import Listing
from redundancy_trace.hub import Hub
from redundancy_trace.settings import TraceSettings

if TYPE_CHECKING:
    from redundancy_trace.calibration import Calibration
    from redundancy_trace.store import Run


@dataclass(frozen=True)
class Asked:
    """One of the calibrations that the settings ask for."""

    name: str
    samples: int
    sequence_length: int | None

    @property
    def label(self) -> str:
        """What its rows are called, unless its file has changed; where the length is the file's own, the beginning."""
        from redundancy_trace.calibration import DEFAULT_SEQUENCE_LENGTH

        if self.sequence_length is None and self.name.startswith("tokens:"):
            return f"{self.name} {self.samples}x"
        return f"{self.name} {self.samples}x{self.sequence_length or DEFAULT_SEQUENCE_LENGTH}"


def asked_for(settings: TraceSettings, listing: Listing) -> list[Asked]:
    """Every text with every number of samples, in the order given."""
    default = "pydoc" if listing.source == "local" or settings.offline else "c4"
    every = itertools.product(settings.calibration or (default,), settings.samples)
    return [Asked(name, samples, settings.sequence_length) for name, samples in every]


def calibrate(settings: TraceSettings, listing: Listing, run: "Run", hub: Hub) -> "tuple[tuple[Calibration, ...], Run]":
    """All token ids that the settings ask for, made or taken up again, and the run with them on record."""
    found: dict[str, Calibration] = {}
    for asked in asked_for(settings, listing):
        calibration, run = _recorded(asked, settings, listing, run, hub)
        found.setdefault(calibration.sha256, calibration)
    return tuple(found.values()), run


def _recorded(
    asked: Asked, settings: TraceSettings, listing: Listing, run: "Run", hub: Hub
) -> "tuple[Calibration, Run]":
    from redundancy_trace.calibration import load_calibration, tokenizer_sources
    from redundancy_trace.store import CalibrationRecord

    calibration = load_calibration(
        asked.name,
        samples=asked.samples,
        sequence_length=asked.sequence_length,
        tokenizer=settings.tokenizer,
        candidates=tokenizer_sources(listing),
        hub=hub,
        run=run.folder,
        trust_remote_code=settings.trust_remote_code,
    )
    if any(record.sha256 == calibration.sha256 for record in run.calibrations):
        return calibration, run
    sequences, length = calibration.token_ids.shape
    label = f"{calibration.name} {sequences}x{length}"
    taken = {record.label for record in run.calibrations}
    if label in taken:  # a text file that was changed, say
        label = f"{label} {calibration.sha256[:8]}"
    file = "token_ids.npy" if not run.calibrations else f"token_ids-{calibration.sha256[:12]}.npy"
    record = CalibrationRecord(label, calibration.sha256, file)
    return calibration, replace(run, calibrations=(*run.calibrations, record))


def calibration_label(run: "Run", calibration: "Calibration") -> str:
    """What the rows of this calibration are called in the run."""
    return next(record.label for record in run.calibrations if record.sha256 == calibration.sha256)
