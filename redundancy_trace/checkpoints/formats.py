"""Which files of a checkpoint are its weights, and which are needed to score it."""

import fnmatch
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from redundancy_trace.hub import RepoFile

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "chat_template.jinja",
)
_CONFIG_FILES = ("config.json", "generation_config.json")
# Best first: safetensors cannot run code, and its tensors can be read one by one.
_FORMATS = {"safetensors": ("model", "safetensors"), "bin": ("pytorch_model", "bin")}
# State of a training program, with the optimizer in it: no weights that transformers could load.
_RAW_STATES = {
    "Megatron-LM": re.compile(r"(?:.*/)?mp_rank_\d+(?:_\d+)*/(?:model_optim_rng|model_rng|distrib_optim)\.pt"),
    "DeepSpeed": re.compile(r"(?:.*/)?(?:mp_rank_\d+_model_states|(?:bf16_)?zero_pp_rank_\w+)\.pt"),
    "the project's own": re.compile(r"(?:.*/)?checkpoints/.*_\d+\.pth"),  # NeelNanda
}


@dataclass(frozen=True)
class Weights:
    """The weight files of the one format that is used.

    Attributes:
        format: `safetensors` or `bin`; None if there are no weights that can be read.
        files: In order of the shards.
        index: The JSON file that maps tensors to shards, if there is one.
        missing: Names of shards that belong to the set and are not there.
    """

    format: str | None
    files: tuple[RepoFile, ...]
    index: RepoFile | None
    missing: tuple[str, ...]

    @property
    def bytes(self) -> int | None:
        """Size of the files; None without any."""
        return sum(file.size for file in self.files) if self.files else None


def weight_files(files: Sequence[RepoFile]) -> Weights:
    """Choose one set of weights among a checkpoint's files: complete before broken, safetensors before bin.

    Optimizer states, other frameworks' copies (`*.h5`, `*.msgpack`, `*.gguf`), `consolidated.*` and anything in
    subfolders are no weights of it.
    """
    sets = [found for name in _FORMATS for found in _weight_sets(files, name)]
    complete = [found for found in sets if not found.missing]
    return (complete or sets or [Weights(None, (), None, ())])[0]


def needed_files(files: Sequence[RepoFile]) -> tuple[RepoFile, ...]:
    """What has to be fetched to score a checkpoint: configs, the chosen weights and their index."""
    weights = weight_files(files)
    configs = tuple(file for file in files if file.path in _CONFIG_FILES)
    return configs + ((weights.index,) if weights.index else ()) + weights.files


def tokenizer_files(files: Iterable[RepoFile]) -> tuple[RepoFile, ...]:
    """The files of a tokenizer among a checkpoint's files."""
    return tuple(file for file in files if any(fnmatch.fnmatchcase(file.path, pattern) for pattern in TOKENIZER_FILES))


def raw_state(paths: Iterable[str]) -> str | None:
    """What to tell a user whose checkpoints are state of a training program; None if they are not."""
    for path in sorted(paths):
        for program, pattern in _RAW_STATES.items():
            if pattern.fullmatch(path):
                return (
                    f"{path} is training state in {program} format, which transformers cannot load. Convert it with "
                    "the project's own script and name the folder that this writes, or look for a repository that "
                    "holds it converted."
                )
    return None


def _weight_sets(files: Sequence[RepoFile], name: str) -> list[Weights]:
    """Every set of one format, in the order in which transformers looks: one file before shards."""
    stem, suffix = _FORMATS[name]
    by_path = {file.path: file for file in files}
    found = []
    if single := by_path.get(f"{stem}.{suffix}"):
        found.append(Weights(name, (single,), None, ()))
    shards: dict[int, list[RepoFile]] = defaultdict(list)
    for file in files:
        if match := re.fullmatch(rf"{stem}-\d{{5}}-of-(\d{{5}})\.{suffix}", file.path):
            shards[int(match[1])].append(file)
    for count, present in sorted(shards.items()):
        names = [f"{stem}-{number:05}-of-{count:05}.{suffix}" for number in range(1, count + 1)]
        index = by_path.get(f"{stem}.{suffix}.index.json")
        missing = tuple(shard for shard in names if shard not in by_path)
        found.append(Weights(name, tuple(sorted(present, key=lambda f: f.path)), index, missing))
    return found
