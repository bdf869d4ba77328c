"""The checkpoints of a training run: names to fields, order, selection, files.

`names` reads stage, step, tokens … from a name; `records` holds what a checkpoint is; `ordering` puts them in
training order; `selection` is the grammar of `--revisions`; `duplicates` finds equal weights under two names; `formats`
tells weight files from others; `local` reads folders, `published` the ways of publishing on the Hub, with what `known`
records of some runs; `tokens` fits tokens to steps; `listing` puts it all together.
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
    reselected,
)
from redundancy_trace.checkpoints.local import FileKey, hashed, is_local, local_commit
from redundancy_trace.checkpoints.names import ParsedName, parse_name
from redundancy_trace.checkpoints.ordering import endpoints_first
from redundancy_trace.checkpoints.records import Checkpoint, CheckpointKind, Listing
from redundancy_trace.checkpoints.selection import selector_items

__all__ = [
    "TOKENIZER_FILES",
    "Checkpoint",
    "CheckpointKind",
    "FileKey",
    "Listing",
    "ParsedName",
    "endpoints_first",
    "hashed",
    "is_local",
    "list_checkpoints",
    "listing_from_json",
    "listing_to_json",
    "local_commit",
    "needed_files",
    "parse_name",
    "raw_state",
    "remembered_from_json",
    "reselected",
    "selector_items",
    "tokenizer_files",
    "weight_files",
]
