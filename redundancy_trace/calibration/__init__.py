"""Text to fixed token batches: what every checkpoint of a run is scored on.

`batches` joins, cuts, hashes and checks token ids; `texts` reads corpora; `datasets` finds text in Hub datasets;
`tokenizers` finds the tokenizer; `loading` puts them together and keeps the ids in the run; `streams` reads a text on
as one stream of tokens, with their bytes. No torch.
"""

from redundancy_trace.calibration.batches import check_ids, check_length, token_hash
from redundancy_trace.calibration.loading import DEFAULT_SEQUENCE_LENGTH, Calibration, load_calibration, made_from
from redundancy_trace.calibration.streams import TokenStream, load_stream
from redundancy_trace.calibration.tokenizers import (
    TokenizerSource,
    find_tokenizer,
    load_tokenizer,
    prefix_ids,
    tokenizer_sources,
)

__all__ = [
    "DEFAULT_SEQUENCE_LENGTH",
    "Calibration",
    "TokenStream",
    "TokenizerSource",
    "check_ids",
    "check_length",
    "find_tokenizer",
    "load_calibration",
    "load_stream",
    "load_tokenizer",
    "made_from",
    "prefix_ids",
    "token_hash",
    "tokenizer_sources",
]
