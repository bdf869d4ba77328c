"""One checkpoint, from its name to a folder, a model in memory and a tokenizer: fetched, strictly complete, let go."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from redundancy_trace.calibration import TokenizerSource, find_tokenizer, tokenizer_sources
from redundancy_trace.checkpoints import Checkpoint, hashed, is_local, list_checkpoints
from redundancy_trace.errors import InputError
from redundancy_trace.fetching import cache_folder, close_transit, discard, fetch, leave, place_of
from redundancy_trace.hub import Hub, hub_cache

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The demo's model in rows, titles and the name of its run, whatever the folder in the cache is called.
DEMO_MODEL = "demo"
_NAMED_IN_MESSAGE = 5


@dataclass(frozen=True)
class OpenCheckpoint:
    """One checkpoint whose files are on this machine.

    Attributes:
        model: The model as rows of scores name it: the repository, or the folder's own name.
        revision: Its name in the model.
        commit: 40 hex digits; of a local folder a hash over its config and weights.
        listed: What the listing says of it.
        folder: Config and weights.
        tokenizers: Where its tokenizer may be.
        trust_remote_code: Whether code in the folder may be run.
        hub: Where it came from.
        is_local: Whether the model is a local folder.
        subfolder: Its folder in the repository, where one commit holds several checkpoints.
    """

    model: str
    revision: str
    commit: str
    listed: Checkpoint
    folder: Path
    tokenizers: tuple[TokenizerSource, ...]
    trust_remote_code: bool
    hub: Hub
    is_local: bool
    subfolder: str | None

    def tokenizer(self, named: str | None = None) -> "PreTrainedTokenizerBase":
        """Its tokenizer, or the one that the user named.

        Raises:
            InputError: There is none; says where was looked.
        """
        return find_tokenizer(self.tokenizers, named=named, hub=self.hub, trust_remote_code=self.trust_remote_code)


@contextmanager
def open_checkpoint(
    model: str | Path,
    revision: str | None = None,
    *,
    trust_remote_code: bool = False,
    endpoint: str | None = None,
    offline: bool = False,
    on_bytes: Callable[[int], None] | None = None,
) -> Iterator[OpenCheckpoint]:
    """Bring one checkpoint to this machine for as long as it is open; what was fetched for it is deleted afterwards.

    An interrupted download is gone on with next time.

    Args:
        model: Hub repository, or local folder: of a checkpoint, or of several.
        revision: Which checkpoint: a name, commit, or local folder's name; may be left out where there is only one.
        trust_remote_code: Whether the checkpoint's own code is fetched, and may be run.
        endpoint: Address of the Hub; None = `HF_ENDPOINT`, else huggingface.co.
        offline: No network: local folders and the user's Hub cache.
        on_bytes: Told the bytes of each chunk that arrives.

    Raises:
        InputError: No such model or revision, or several checkpoints and none is named.
        CheckpointError: Its files cannot be had, or are not complete.
    """
    hub = Hub(endpoint=endpoint, offline=offline)
    local = is_local(str(model))
    listing = list_checkpoints(model, revision or ("all" if local else "main"), endpoint=endpoint, offline=offline)
    several = [c.name for c in listing if c.is_parsed] if revision is None else [c.name for c in listing.chosen]
    if len(several) > 1 or len(listing.chosen) != 1:
        shown = ", ".join(several[:_NAMED_IN_MESSAGE])
        more = f" and {len(several) - _NAMED_IN_MESSAGE} more" if len(several) > _NAMED_IN_MESSAGE else ""
        asked = f"--revision {revision} means {len(several)} of" if revision else f"{len(several)} checkpoints are in"
        raise InputError(f"{asked} {model}: {shown}{more}. Name one with --revision.")
    (checkpoint,) = listing.chosen
    into = place_of(cache_folder(), checkpoint)
    fetched = fetch(listing.model, checkpoint, hub, into, on_bytes, code=trust_remote_code)
    let_go = discard
    try:
        yield OpenCheckpoint(
            model=model_label(model),
            revision=checkpoint.name,
            commit=_commit(checkpoint),
            listed=checkpoint,
            folder=fetched.folder,
            tokenizers=(TokenizerSource(fetched.folder), *tokenizer_sources(listing)),
            trust_remote_code=trust_remote_code,
            hub=hub,
            is_local=local,
            subfolder=checkpoint.subfolder,
        )
    except KeyboardInterrupt:
        let_go = leave
        raise
    finally:
        let_go(fetched)
        close_transit(cache_folder())


def load_model(
    model: str | Path,
    revision: str | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    endpoint: str | None = None,
    offline: bool = False,
) -> Any:
    """Load one checkpoint into memory, every tensor of it or not at all.

    Args:
        model: Hub repository, or local folder: of a checkpoint, or of several.
        revision: Which checkpoint; may be left out where there is only one.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, `mps`.
        dtype: `auto` (float32 on CPU and MPS, bfloat16 on CUDA that has it), `float32`, `bfloat16`.
        trust_remote_code: Whether the checkpoint's own code may be run.
        endpoint: Address of the Hub; None = `HF_ENDPOINT`, else huggingface.co.
        offline: No network: local folders and the user's Hub cache.

    Returns:
        A causal language model of transformers, in eval mode, without gradients; its tokenizer is what `load_tokenizer`
        gives for the same arguments.

    Raises:
        InputError: No such model, revision or device.
        CheckpointError: A file cannot be had, or a tensor is missing, unexpected or misshapen.

    Example:
        >>> model = load_model("EleutherAI/pythia-160m", "step1000")  # doctest: +SKIP
    """
    from redundancy_trace.engine import choose_device, choose_dtype
    from redundancy_trace.weights import load_whole_model

    if dtype not in ("auto", "float32", "bfloat16"):
        raise InputError(f"dtype is {dtype!r}; known: auto, float32, bfloat16.")
    at = choose_device(device)
    settings: dict[str, Any] = {
        "trust_remote_code": trust_remote_code,
        "endpoint": endpoint,
        "offline": offline,
    }
    with open_checkpoint(model, revision, **settings) as checkpoint:
        return load_whole_model(
            checkpoint.folder, device=at, dtype=choose_dtype(dtype, at), trust_remote_code=trust_remote_code
        )


def load_tokenizer(
    model: str | Path,
    revision: str | None = None,
    *,
    trust_remote_code: bool = False,
    endpoint: str | None = None,
    offline: bool = False,
) -> Any:
    """The tokenizer of a model: of the checkpoint, else of `main`, else of the finished model that it is named after.

    Args:
        model: As for `load_model`.
        revision: As for `load_model`, but it may be left out: the checkpoints of a model share their tokenizer.
        trust_remote_code: Whether the tokenizer's own code may be run.
        endpoint: Address of the Hub.
        offline: No network.

    Raises:
        InputError: No such model or revision, or it has no tokenizer; says where was looked.
    """
    selected = revision or ("all" if is_local(str(model)) else "main")
    listing = list_checkpoints(model, selected, endpoint=endpoint, offline=offline)
    hub = Hub(endpoint=endpoint, offline=offline)
    return find_tokenizer(tokenizer_sources(listing), hub=hub, trust_remote_code=trust_remote_code)


def model_label(model: str | Path) -> str:
    """The model as rows name it: the repository, or the folder's own name (no reader needs an absolute path)."""
    if not is_local(str(model)):
        return str(model).strip()
    folder = Path(model).expanduser().resolve()
    is_demo = folder.parent == cache_folder().resolve() and folder.name.startswith(f"{DEMO_MODEL}-")
    return DEMO_MODEL if is_demo else folder.name


def is_cached(folder: Path) -> bool:
    """Whether a folder is part of a cache, of this program or of the Hub: nothing else may be written there."""
    return any(folder.resolve().is_relative_to(cache.resolve()) for cache in (cache_folder(), hub_cache()))


def _commit(checkpoint: Checkpoint) -> str:
    known = checkpoint if checkpoint.commit else hashed(replace(checkpoint, chosen=True), {})
    assert known.commit is not None  # a listed repository has one, a folder gets one
    return known.commit
