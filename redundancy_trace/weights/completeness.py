"""Every tensor that a model needs must be there, and no other: what is wrong, told by name."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from redundancy_trace.errors import CheckpointError

# Buffers that architectures recompute and that old files still carry.
_RECOMPUTED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|(attention|attn|self_attn)\.(masked_)?bias|position_ids)$")


def refuse_incomplete(
    folder: Path,
    *,
    missing: Iterable[str],
    unexpected: Iterable[str],
    misshapen: Iterable[tuple[str, Sequence[int], Sequence[int]]],
    not_convertible: Iterable[str] = (),
) -> None:
    """Raise unless all four are empty; buffers that are recomputed do not count as unexpected.

    Args:
        folder: The checkpoint.
        missing: Tensors that the model needs and the files lack.
        unexpected: Tensors in the files that the model has no place for.
        misshapen: Name, shape in the file, shape in the model.
        not_convertible: Tensors whose conversion failed.

    Raises:
        CheckpointError: If anything is wrong; it names the first three of each kind.
    """
    problems = []
    for what, names in (
        ("missing", sorted(missing)),
        ("unexpected", sorted(name for name in unexpected if not _RECOMPUTED.search(name))),
        ("misshapen", [f"{name} {tuple(found)} for {tuple(wanted)}" for name, found, wanted in sorted(misshapen)]),
        ("not convertible", sorted(not_convertible)),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            count = "1 tensor is" if len(names) == 1 else f"{len(names)} tensors are"
            problems.append(f"{count} {what}: {', '.join(names[:3])}{more}")
    if problems:
        raise CheckpointError(
            f"The weights in {folder} are not those of its config.json; transformers would go on with random numbers. "
            + "; ".join(problems)
            + "."
        )
