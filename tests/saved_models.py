"""The tiny models of `families`, saved as checkpoint folders, and their scores in arrays that compare easily."""

import atexit
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from families import build, token_ids
from reference_scores import COMPONENTS, METRICS, ReferenceScores, one_thread, reference_scores
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from redundancy_trace.engine import score_checkpoint
from redundancy_trace.errors import CheckpointError
from redundancy_trace.metrics import ModelScores

CPU = torch.device("cpu")
ENGINES = ("stream", "whole")
# 6 sequences in batches of 4: the last batch is a smaller one.
BATCH_SIZE = 4
_FOLDERS = Path(tempfile.mkdtemp(prefix="redundancy-trace-models-"))
atexit.register(shutil.rmtree, _FOLDERS, ignore_errors=True)


@cache
def built(family: str) -> PreTrainedModel:
    """Built once for the tests that leave it as it is."""
    return build(family)


@cache
def folder(family: str) -> Path:
    """Its checkpoint folder, for the tests that leave it as it is."""
    return save(built(family), _FOLDERS / family)


@cache
def reference(family: str) -> ReferenceScores:
    return reference_scores(built(family), token_ids())


@cache
def scored(family: str, engine: str, dtype: torch.dtype = torch.float32) -> ModelScores:
    return score(folder(family), engine, dtype=dtype)


def score(path: Path, engine: str = "stream", ids: np.ndarray | None = None, **changes: object) -> ModelScores:
    settings = {"device": CPU, "dtype": torch.float32, "batch_size": BATCH_SIZE, **changes}
    with one_thread():
        return score_checkpoint(path, token_ids() if ids is None else ids, engine=engine, **settings)


def refusal(path: Path, **settings: object) -> str:
    """The message of both engines, which must refuse alike."""
    messages = []
    for engine in ENGINES:
        with pytest.raises(CheckpointError) as refused:
            score(path, engine, **settings)
        messages.append(str(refused.value))
    assert messages[0] == messages[1]
    return messages[0]


def save(model: PreTrainedModel, path: Path, **settings: object) -> Path:
    """Save in the form that transformers writes, by default one safetensors file."""
    model.save_pretrained(path, **settings)
    return path


def rewrite(source: Path, path: Path, change=lambda state: state, **config: object) -> Path:
    """A checkpoint folder with the tensors of another one changed, and fields of its config.json."""
    path.mkdir(parents=True, exist_ok=True)
    state = load_file(source / "model.safetensors")
    save_file(change(dict(state)), path / "model.safetensors", metadata={"format": "pt"})
    fields = json.loads((source / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(fields | config))
    return path


@cache
def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of 260 pieces, of which every byte is one."""
    from tokenizers import decoders, models, pre_tokenizers, trainers

    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=260, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(["the cat sat on the mat"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="<s>")


def state_of(path: Path) -> dict[str, Tensor]:
    return load_file(path / "model.safetensors")


def by_metric(scores: ModelScores, what: str = "value") -> dict[tuple[str, str], np.ndarray]:
    """(component, metric) to one number a layer, (L,); None becomes NaN. Without the loss."""
    found: dict[tuple[str, str], list[float]] = {}
    for value in scores.values:
        if value.layer is not None:
            numbers = found.setdefault((value.component, value.metric), [])
            assert len(numbers) == value.layer
            number = getattr(value, what)
            numbers.append(np.nan if number is None else number)
    return {key: np.array(numbers) for key, numbers in found.items()}


def loss_of(scores: ModelScores) -> float:
    (loss,) = (value for value in scores.values if value.metric == "loss")
    assert (loss.component, loss.layer) == ("model", None)
    return loss.value


def difference(scores: ModelScores, expected: ReferenceScores) -> dict[str, float]:
    """Largest absolute difference to the reference: each metric, standard error, loss, block distances."""
    value, stderr, n_tokens = (by_metric(scores, what) for what in ("value", "stderr", "n_tokens"))
    keys = [(component, metric) for component in COMPONENTS for metric in METRICS]
    assert set(value) == set(keys)
    for key in keys:
        assert np.array_equal(n_tokens[key], expected.n_tokens[key])
    worst = {m: max(_largest(value[c, m], expected.value[c, m]) for c in COMPONENTS) for m in METRICS}
    worst["stderr"] = max(_largest(stderr[key], expected.stderr[key]) for key in keys)
    (loss,) = (v for v in scores.values if v.metric == "loss")
    worst["loss"] = abs(loss.value - expected.loss)
    assert (loss.stderr is None) == np.isnan(expected.loss_stderr)
    if loss.stderr is not None:
        worst["stderr"] = max(worst["stderr"], abs(loss.stderr - expected.loss_stderr))
    n_states = len(expected.hidden)
    pairs = [(i, j, metric) for i in range(n_states) for j in range(i + 1, n_states) for metric in sorted(METRICS[:2])]
    assert [(d.layer, d.to_layer, d.metric) for d in scores.distances] == pairs
    matrices = {metric: expected.distances(metric) for metric in METRICS[:2]}
    worst["distances"] = max(abs(d.value - matrices[d.metric][d.layer, d.to_layer]) for d in scores.distances)
    return worst


def _largest(found: np.ndarray, expected: np.ndarray) -> float:
    assert found.shape == expected.shape
    assert np.array_equal(np.isnan(found), np.isnan(expected))
    return float(np.nanmax(np.abs(found - expected), initial=0.0))


def apart(a: ModelScores, b: ModelScores) -> float:
    """Largest absolute difference between two sets of scores of one form."""
    assert [(v.layer, v.component, v.metric, v.n_sequences, v.n_tokens) for v in a.values] == [
        (v.layer, v.component, v.metric, v.n_sequences, v.n_tokens) for v in b.values
    ]
    assert [(d.layer, d.to_layer, d.metric, d.n_tokens) for d in a.distances] == [
        (d.layer, d.to_layer, d.metric, d.n_tokens) for d in b.distances
    ]
    pairs = [(x.value, y.value) for x, y in zip(a.values, b.values, strict=True)]
    pairs += [(x.stderr, y.stderr) for x, y in zip(a.values, b.values, strict=True)]
    pairs += [(x.value, y.value) for x, y in zip(a.distances, b.distances, strict=True)]
    assert all((x is None) == (y is None) for x, y in pairs)
    return max(abs(x - y) for x, y in pairs if x is not None)
