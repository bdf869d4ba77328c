"""The token ids of a sweep: where its tokenizer may be, and how the run names them."""

from dataclasses import replace
from typing import TYPE_CHECKING

from redundancy_trace.checkpoints import Listing
from redundancy_trace.hub import Hub
from redundancy_trace.settings import TraceSettings

if TYPE_CHECKING:
    from redundancy_trace.calibration import Calibration
    from redundancy_trace.store import Run


def calibrate(settings: TraceSettings, listing: Listing, run: "Run", hub: Hub) -> "tuple[Calibration, Run]":
    """The run's token ids, made or taken up again, and the run with them on record."""
    from redundancy_trace.calibration import load_calibration, tokenizer_sources
    from redundancy_trace.store import CalibrationRecord

    name = _name(settings, listing)
    calibration = load_calibration(
        name,
        samples=settings.samples,
        sequence_length=settings.sequence_length,
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


def label_asked_for(settings: TraceSettings, listing: Listing) -> str:
    """What the rows of the calibration that the settings ask for are called, unless its file has changed.

    Where the length is the file's own, only the beginning.
    """
    from redundancy_trace.calibration import DEFAULT_SEQUENCE_LENGTH

    name = _name(settings, listing)
    if settings.sequence_length is None and name.startswith("tokens:"):
        return f"{name} {settings.samples}x"
    return f"{name} {settings.samples}x{settings.sequence_length or DEFAULT_SEQUENCE_LENGTH}"


def _name(settings: TraceSettings, listing: Listing) -> str:
    return settings.calibration or ("pydoc" if listing.source == "local" or settings.offline else "c4")


def calibration_label(run: "Run", calibration: "Calibration") -> str:
    """What the rows of this calibration are called in the run."""
    return next(record.label for record in run.calibrations if record.sha256 == calibration.sha256)
