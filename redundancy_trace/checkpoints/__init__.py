"""The checkpoints of a training run: names to fields, order, selection, files.

`names` reads stage, step, tokens … from a name; `records` holds what a checkpoint is; `ordering` puts them in
training order; `selection` is the grammar of `--revisions`; `formats` tells weight files from others; `local` reads
folders; `listing` puts it all together.
"""

from redundancy_trace.checkpoints.formats import (
    TOKENIZER_FILES,
    needed_files,
    raw_state,
    tokenizer_files,
    weight_files,
)
from redundancy_trace.checkpoints.listing import (
    list_checkpoints,
    listing_from_json,
    listing_to_json,
    remembered_from_json,
)
from redundancy_trace.checkpoints.local import FileKey, is_local, local_commit
from redundancy_trace.checkpoints.names import ParsedName, parse_name
from redundancy_trace.checkpoints.ordering import endpoints_first
from redundancy_trace.checkpoints.records import Checkpoint, CheckpointKind, Listing

__all__ = [
    "TOKENIZER_FILES",
    "Checkpoint",
    "CheckpointKind",
    "FileKey",
    "Listing",
    "ParsedName",
    "endpoints_first",
    "is_local",
    "list_checkpoints",
    "listing_from_json",
    "listing_to_json",
    "local_commit",
    "needed_files",
    "parse_name",
    "raw_state",
    "remembered_from_json",
    "tokenizer_files",
    "weight_files",
]
