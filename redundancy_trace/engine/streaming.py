"""The streaming engine: layer by layer in one pass, in memory that does not grow with depth."""

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from redundancy_trace.blocks import (
    PROBE_TOKENS,
    Decomposition,
    LayerStates,
    find_layers,
    layer_input,
    layer_kind,
    prove,
    tap,
)
from redundancy_trace.engine.checks import check_calibration, check_identity
from redundancy_trace.engine.hidden import HiddenStates, hidden_states
from redundancy_trace.engine.kept import Kept
from redundancy_trace.engine.reading import reading_ahead
from redundancy_trace.engine.sums import (
    DistanceSums,
    LayerSums,
    LossSums,
    distance_sequences,
    most_logits,
)
from redundancy_trace.errors import CheckpointError
from redundancy_trace.metrics import ModelScores, Value
from redundancy_trace.weights import EmptyModel, WeightFiles, release_


@dataclass(frozen=True)
class LayerArguments:
    """What the model hands to one of its layers beside the hidden state, such as masks and position embeddings."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def score_folder(
    folder: Path,
    token_ids: np.ndarray,
    *,
    device: torch.device,
    dtype: torch.dtype,
    batch_size: int,
    trust_remote_code: bool = False,
    on_layer: Callable[[int, int], None] | None = None,
    weights: WeightFiles | None = None,
    kept: Kept | None = None,
) -> ModelScores:
    """Score a checkpoint folder layer by layer.

    Args:
        folder: config.json and weights.
        token_ids: Calibration, shape (N, T), integers.
        device: Where the arithmetic is done.
        dtype: Compute dtype, float32 or bfloat16.
        batch_size: Sequences a forward.
        trust_remote_code: Whether model code in the folder may be run.
        on_layer: Called with (layers done, layers in all).
        weights: The weights, where they are not in the folder.
        kept: Has the empty model and the memory of states from the checkpoint before.

    Raises:
        CheckpointError: If weights are incomplete, the proof fails, or a state is not finite.
        InputError: If the token ids do not fit the model.
    """
    kept = kept or Kept()
    empty = kept.models.build(folder, device=device, dtype=dtype, trust_remote_code=trust_remote_code, weights=weights)
    check_calibration(token_ids, empty.model)
    with torch.no_grad(), empty.released():
        return _score(empty, torch.as_tensor(token_ids, dtype=torch.long), batch_size, on_layer, kept)


def _score(
    empty: EmptyModel,
    token_ids: Tensor,
    batch_size: int,
    on_layer: Callable[[int, int], None] | None,
    kept: Kept,
) -> ModelScores:
    model = empty.model
    layers_name, layers = find_layers(model)
    names = [empty.stored_names(f"{layers_name}.{index}") for index in range(len(layers))]
    inputs = _load_outside_layers_(empty, layers_name, token_ids).to(empty.device)
    batches = inputs.split(batch_size)
    surroundings, probe = _surroundings(model, layers, inputs[:1, :PROBE_TOKENS])
    width, sizes = probe.hidden.shape[-1], [len(batch) for batch in batches]
    values: list[Value] = []
    proven: dict[Hashable, Decomposition] = {}
    wanted = distance_sequences(*token_ids.shape, width=width, n_layers=len(layers))
    room = None
    if empty.device.type == "cpu":
        room = kept.room("distances", (len(layers) + 1) * wanted * inputs.shape[1] * width, probe.hidden.dtype)
    distances = DistanceSums(wanted, room)
    with (
        reading_ahead(empty.weights, names, empty.device) as layer_tensors,
        hidden_states(sizes, inputs.shape[1], width, probe.hidden.dtype, empty.device, kept) as states,
    ):
        arguments = _embed_(surroundings, batches, states)
        _add_state(distances, states)
        for index in range(len(layers)):
            with _loaded(empty, layers[index], layer_tensors(index)) as layer:
                kind = layer_kind(layers, index, model.config)
                if kind not in proven:
                    # A copy: of what was made in `inference_mode`, torch does not tell whether it was overwritten.
                    x, given = states[0][:1, :PROBE_TOKENS].clone(), probe.arguments[index]
                    proven[kind] = prove(layer, index, x, given.args, given.kwargs, model.config)
                sums = LayerSums(index, len(inputs))
                _run_layer_(layer, proven[kind], states, arguments, index, sums)
            values += sums.values()
            _add_state(distances, states)
            if on_layer is not None:
                on_layer(index + 1, len(layers))
        empty.load_head_()
        loss = LossSums(len(token_ids), empty.device)
        for batch, original, state in zip(batches, token_ids.split(batch_size), states, strict=True):
            _add_loss(surroundings, batch, original.to(empty.device), state, loss)
    return ModelScores((*values, loss.value()), distances.distances())


def _load_outside_layers_(empty: EmptyModel, layers_name: str, ids: Tensor) -> Tensor:
    """Load all that stands outside the layers but the head; returns the ids to feed.

    Of the embedding only the rows that the calibration uses are loaded; the ids then count those rows.
    """
    model = empty.model
    names = {id(module): name for name, module in model.named_modules()}
    apart = [layers_name, names[id(model.get_input_embeddings())]]
    if (head := model.get_output_embeddings()) is not None:
        apart.append(names[id(head)])
    elsewhere = {stored for name in apart for stored in empty.stored_names(name)}
    empty.load_(stored for stored in empty.targets if stored not in elsewhere)
    rows = ids.unique()
    if empty.load_embedding_rows_(rows):
        return torch.searchsorted(rows, ids)
    empty.load_(empty.stored_names(apart[1]))
    return ids


class _Recorder(nn.Module):
    """Stands in for a layer: keeps what it is given and returns its hidden state, or `answer`, unchanged."""

    def __init__(self, original: nn.Module, *, as_tuple: bool) -> None:
        super().__init__()
        self._original = (original,)  # in a tuple, so that it does not become a submodule
        self._as_tuple = as_tuple
        self.answer: Tensor | None = None
        self.hidden: Tensor | None = None
        self.seen: LayerArguments | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Models read attributes of their layers, `attention_type` for one, to choose a mask.
            return getattr(self.__dict__["_original"][0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Keep the arguments; return the hidden state or the answer."""
        self.hidden, others, keywords = layer_input(args, kwargs)
        self.seen = LayerArguments(others, keywords)
        result = self.hidden if self.answer is None else self.answer
        return (result,) if self._as_tuple else result


@dataclass(frozen=True)
class _DryRun:
    """Result of a forward in which every layer returned its input: h_0, each layer's arguments, the output."""

    hidden: Tensor
    arguments: tuple[LayerArguments, ...]
    output: Tensor


@contextmanager
def _replaced(layers: nn.ModuleList, recorders: list[_Recorder]) -> Iterator[None]:
    originals = list(layers)
    # Set as plain entries: the recorders must not become submodules with parameters of their own.
    layers._modules = {str(i): recorder for i, recorder in enumerate(recorders)}
    try:
        yield
    finally:
        layers._modules = {str(i): layer for i, layer in enumerate(originals)}


@dataclass(frozen=True)
class _Surroundings:
    """All of a model but its layers: embeddings and what the layers are handed in front, final norm and head behind.

    Attributes:
        model: The model.
        layers: Its decoder layers; they do not run here.
        as_tuple: Whether the model expects a tuple of each layer, with the state in front.
    """

    model: Any
    layers: nn.ModuleList
    as_tuple: bool

    def run(self, ids: Tensor, answer: Tensor | None = None, *, head: bool = False) -> _DryRun:
        """Run the model with every layer replaced by a recorder; the last one returns `answer` if that is given.

        Args:
            ids: Token ids, shape (B, T).
            answer: None, or the last layer's output, shape (B, T, D).
            head: Whether the output wanted is the logits rather than the state behind the final norm.
        """
        recorders = [_Recorder(layer, as_tuple=self.as_tuple) for layer in self.layers]
        recorders[-1].answer = answer
        with _replaced(self.layers, recorders):
            output = (self.model if head else self.model.base_model)(input_ids=ids, use_cache=False)
        states = [recorder.hidden for recorder in recorders if recorder.hidden is not None]
        final = output.logits if head else output[0]
        if len(states) != len(recorders):
            raise CheckpointError(
                f"{type(self.model).__name__} ran {len(states)} of its {len(recorders)} layers; try --engine whole."
            )
        # A model that expects tuples takes element 0 of a bare state: the batch axis is gone.
        if {state.shape for state in states} != {states[0].shape} or final.ndim != 3:
            raise CheckpointError(
                f"{type(self.model).__name__} does not hand one state from layer to layer; try --engine whole."
            )
        return _DryRun(states[0], tuple(recorder.seen for recorder in recorders if recorder.seen is not None), final)


def _surroundings(model: Any, layers: nn.ModuleList, ids: Tensor) -> tuple[_Surroundings, _DryRun]:
    """Find out by trying whether the model expects tuples of its layers; also returns the run that went well."""
    failures = []
    for as_tuple in (False, True):
        surroundings = _Surroundings(model, layers, as_tuple)
        try:
            dry = surroundings.run(ids)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a model raises that is handed the wrong form
            failures.append(error)
        else:
            return surroundings, dry
    raise CheckpointError(
        f"{type(model).__name__} cannot be run without its layers ({failures[0]}); try --engine whole."
    ) from failures[0]


def _embed_(
    surroundings: _Surroundings, batches: Sequence[Tensor], states: HiddenStates
) -> dict[int, tuple[LayerArguments, ...]]:
    """Fill in h_0 of every batch; returns the layers' arguments by batch size.

    Batches of one size get equal arguments, since no sequence is padded. Where other tokens give other arguments,
    the layers are handed more than the state before them, and what a dry run records would be wrong.
    """
    arguments: dict[int, tuple[LayerArguments, ...]] = {}
    for number, batch in enumerate(batches):
        dry = surroundings.run(batch)
        states[number] = dry.hidden.clone()
        arguments.setdefault(len(batch), dry.arguments)
    others = surroundings.run(batches[0].roll(1, dims=1)).arguments
    for given, other in zip(arguments[len(batches[0])], others, strict=True):
        if not _same((given.args, given.kwargs), (other.args, other.kwargs)):
            raise CheckpointError(
                f"The layers of {type(surroundings.model).__name__} are handed more than the state of the layer "
                "before them; try --engine whole."
            )
    return arguments


@contextmanager
def _loaded(empty: EmptyModel, layer: nn.Module, tensors: dict[str, Tensor]) -> Iterator[nn.Module]:
    """One layer with its weights, which are let go at the end."""
    empty.load_(tensors, tensors)
    tensors.clear()
    try:
        yield layer
    finally:
        release_(layer)


def _run_layer_(
    layer: nn.Module,
    decomposition: Decomposition,
    states: HiddenStates,
    arguments: dict[int, tuple[LayerArguments, ...]],
    index: int,
    sums: LayerSums,
) -> None:
    """Run one layer over all batches, in place: each batch's state becomes the layer's output."""
    current = 0

    def on_states(seen: LayerStates) -> None:
        sums.add(seen)  # tells by name what is not finite
        if current == 0:
            sums.settle()
            check_identity(seen, index)
        states[current] = seen.resid_post

    with torch.inference_mode(), tap(layer, decomposition, on_states):
        for current, state in enumerate(states):  # noqa: B007 - read by on_states
            given = arguments[len(state)][index]
            layer(state, *given.args, **given.kwargs)


def _add_state(distances: DistanceSums, states: HiddenStates) -> None:
    for state in states:
        if not distances.add(state):
            break
    distances.close()


def _add_loss(surroundings: _Surroundings, batch: Tensor, original: Tensor, state: Tensor, loss: LossSums) -> None:
    """Final norm and head on the last state, in pieces of the sequences: logits are the largest tensor of all."""
    vocabulary = surroundings.model.get_output_embeddings().weight.shape[0]
    length = batch.shape[1]
    tokens = max(1, most_logits(state.device) // vocabulary)
    step, together = min(tokens, length), max(1, tokens // length)

    def logits_of(some: slice, start: int) -> tuple[Tensor, Tensor]:
        here = slice(start, min(start + step, length))
        # The layers do not run: all that is left treats each token by itself.
        dry = surroundings.run(batch[some, here], answer=state[some, here], head=True)
        following = original[some, here.start + 1 : here.stop + 1]
        # No token follows the last one. It is run all the same: products of 511 rows take longer than of 512.
        return dry.output[:, : following.shape[1]], following

    for first in range(0, len(batch), together):
        some = slice(first, first + together)
        loss.add_sequences(logits_of(some, start) for start in range(0, length - 1, step))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return bool(a is b or a == b)
