"""From tokens to numbers: float64 sums over a calibration, means and standard errors over its sequences."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from redundancy_trace.blocks import LayerStates, not_finite
from redundancy_trace.errors import CheckpointError
from redundancy_trace.metrics import COMPONENTS, Distance, Value
from redundancy_trace.similarity import COMPARED, compare, compare_lengths, pairwise_similarity, to_float64

# States of all layers that the block-distance matrix may hold, in bytes of float32.
DISTANCE_BYTES = 256 * 2**20
# Numbers of a tile: on the CPU what a thread keeps in its cache (below, starting the threads takes longer than their
# work), elsewhere what keeps temporary memory small.
_TILE_OF_A_THREAD = 2**19
_LARGE_TILE = 2**24
# Most logits that are computed at a time: 128 MiB of float32, and 512 MiB where a batch keeps more units busy.
LOGITS, _MORE_LOGITS = 2**25, 2**27


def tile_tokens(device: torch.device, width: int) -> int:
    """How many tokens of a width are compared at a time."""
    numbers = _TILE_OF_A_THREAD * torch.get_num_threads() if device.type == "cpu" else _LARGE_TILE
    return max(1, numbers // width)


def most_logits(device: torch.device) -> int:
    """How many logits are computed at a time."""
    return _MORE_LOGITS if device.type == "cuda" else LOGITS


def mean_and_error(sums_N: np.ndarray, counts_N: np.ndarray) -> tuple[float | None, float | None, int, int]:
    """Mean over all tokens, its standard error over sequences, and how many of either counted.

    Args:
        sums_N: Sum over the counted tokens of each sequence, shape (N,), float64.
        counts_N: Number of counted tokens of each sequence, shape (N,).

    Returns:
        mean (None if nothing counted), standard deviation of the sequences' means over √n (None below two sequences),
        sequences with a counted token, counted tokens.
    """
    used = counts_N > 0
    n_sequences, n_tokens = int(used.sum()), int(counts_N.sum())
    if n_tokens == 0:
        return None, None, 0, 0
    value = math.fsum(sums_N[used]) / n_tokens
    means = sums_N[used] / counts_N[used]
    stderr = float(means.std(ddof=1)) / math.sqrt(n_sequences) if n_sequences > 1 else None
    return value, stderr, n_sequences, n_tokens


@dataclass(frozen=True)
class _Measured:
    """A batch, and its lengths on their way to the CPU; they are there when `arrived` has happened."""

    states: LayerStates
    lengths: Tensor
    arrived: "torch.cuda.Event | None"


@dataclass
class LayerSums:
    """Running sums of one layer; batches arrive in order.

    On CUDA a batch is looked at when the next one is under way: the device does not wait for the CPU, which does the
    float64 arithmetic of a few numbers a token.
    """

    layer: int
    n_sequences: int
    _measured: _Measured | None = None
    _done: int = 0

    def __post_init__(self) -> None:
        """Take the room at once: small arrays that stay would lie in the heap between what batches take and let go."""
        shape = len(COMPARED), len(COMPONENTS), self.n_sequences
        self._sums, self._counts = np.zeros(shape), np.zeros(shape, dtype=np.int64)

    def add(self, states: LayerStates) -> None:
        """Add one batch, whose states must stay as they are until the next is added, or `settle` is called.

        Raises:
            CheckpointError: If a state is not finite: it names the layer and the dtype, and is never made a rank.
        """
        measured = _measure(states)
        self.settle()
        self._measured = measured
        if measured.arrived is None:
            self.settle()

    def settle(self) -> None:
        """Take in what was added last.

        Raises:
            CheckpointError: As `add`.
        """
        if self._measured is None:
            return
        measured, self._measured = self._measured, None
        if measured.arrived is not None:
            measured.arrived.synchronize()
        states = measured.states
        compared, enough = compare_lengths(measured.lengths)
        if not bool(enough.all()):
            _compare_again_(compared, states, ~enough)
        compared = compared.unflatten(-1, states.resid_pre.shape[:2])
        counted = ~compared.isnan()
        sums_MCB = torch.where(counted, compared, 0).sum(dim=-1).cpu().numpy()
        for component, sums in zip(COMPONENTS, sums_MCB.swapaxes(0, 1), strict=True):
            if np.isinf(sums).any():
                what = f"the {component} of layer {self.layer}"
                raise CheckpointError(not_finite(what, states.resid_post.dtype))
        here = slice(self._done, self._done + sums_MCB.shape[-1])
        self._sums[..., here] = sums_MCB
        self._counts[..., here] = counted.sum(dim=-1).cpu().numpy()
        self._done = here.stop

    def values(self) -> list[Value]:
        """Every metric of attn, mlp and block of this layer."""
        self.settle()
        return [
            Value(self.layer, component, metric, *mean_and_error(self._sums[i, c], self._counts[i, c]))
            for c, component in enumerate(COMPONENTS)
            for i, metric in enumerate(COMPARED)
        ]


def _measure(states: LayerStates) -> _Measured:
    lengths = _lengths(states)
    if not lengths.is_cuda:
        return _Measured(states, lengths, None)
    on_cpu = torch.empty(lengths.shape, dtype=lengths.dtype, pin_memory=True)
    on_cpu.copy_(lengths, non_blocking=True)
    return _Measured(states, on_cpu, torch.cuda.current_stream(lengths.device).record_event())


def _lengths(states: LayerStates) -> Tensor:
    """|X|, |update| and X·update of each component and token, shape (3, 3, B·T), float32; each state is read once."""
    batch, length, width = states.resid_pre.shape
    lengths = states.resid_pre.new_empty(3, len(COMPONENTS), batch * length, dtype=torch.float32)
    step = tile_tokens(states.resid_pre.device, width)
    for tile, part in zip(states.tiles(step), lengths.split(step, dim=-1), strict=True):
        last_x = None
        for component, x, update in tile.components():
            of_x, of_update, dot = part[:, COMPONENTS.index(component)]
            if x is not last_x:
                last_x, x_lengths = x, torch.linalg.vector_norm(x, dim=-1)
            of_x.copy_(x_lengths)
            torch.linalg.vector_norm(update, dim=-1, out=of_update)
            # A sum of products, not a matrix product, which may be set to round to fewer digits.
            torch.sum(x * update, dim=-1, out=dot)
    return lengths


def _compare_again_(compared: Tensor, states: LayerStates, wanted: Tensor) -> None:
    """Replace, in place, what lengths do not tell: shapes (4, 3, B·T) and (3, B·T) of bool."""
    for component, x, update in states.tokens(wanted.any(dim=0)).components():
        c = COMPONENTS.index(component)
        compared[:, c, wanted[c]] = compare(x, update)[:, wanted[c][wanted.any(dim=0)]].to(compared.device)


@dataclass
class LossSums:
    """Running sums of the next-token loss of so many sequences, on the device that has the logits."""

    n_sequences: int
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    _dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        """Take the room at once, as `LayerSums` does."""
        place = torch.device("cpu") if self.device.type == "mps" else self.device
        self._sums = torch.zeros(self.n_sequences, dtype=torch.float64, device=place)
        self._counts: list[int] = []

    def add(self, logits_BTV: Tensor, ids_BT: Tensor) -> None:
        """Add one batch: logits of shape (B, T, V) and the token ids they were computed from."""
        for logits_TV, ids_T in zip(logits_BTV, ids_BT, strict=True):
            self.add_sequences([(logits_TV[None, :-1], ids_T[None, 1:])])

    def add_sequences(self, tiles: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Add sequences in pieces: logits, shape (B, T, V), and the ids of the tokens that follow, shape (B, T)."""
        total_B, count = None, 0
        for logits_BTV, next_BT in tiles:
            self._dtype = logits_BTV.dtype
            losses = torch.nn.functional.cross_entropy(
                logits_BTV.flatten(0, 1).float(), next_BT.flatten(), reduction="none"
            )
            sums_B = to_float64(losses).view(next_BT.shape).sum(dim=1)
            total_B = sums_B if total_B is None else total_B + sums_B
            count += next_BT.shape[1]
        assert total_B is not None
        done = len(self._counts)
        self._sums[done : done + len(total_B)] = total_B
        self._counts += [count] * len(total_B)

    def value(self) -> Value:
        """Mean loss in nats per token.

        Raises:
            CheckpointError: If it is not finite.
        """
        sums_N = self._sums[: len(self._counts)].cpu().numpy()
        if not np.isfinite(sums_N).all():
            raise CheckpointError(not_finite("the loss", self._dtype))
        return Value(None, "model", "loss", *mean_and_error(sums_N, np.array(self._counts)))


def distance_sequences(n_sequences: int, length: int, *, width: int, n_layers: int) -> int:
    """How many whole sequences the block-distance matrix is computed on: what fits 256 MiB, at least one."""
    return max(1, min(n_sequences, DISTANCE_BYTES // ((n_layers + 1) * length * width * 4)))


@dataclass
class DistanceSums:
    """Residual states h_0 … h_L of the first sequences, compared each with each.

    Attributes:
        n_sequences: How many of them.
        room: A flat tensor that the states are copied to, as they come; None = each gets memory of its own.
    """

    n_sequences: int
    room: Tensor | None = None
    _states: list[list[Tensor]] = field(default_factory=lambda: [[]])

    def add(self, states_BTD: Tensor) -> bool:
        """Add one batch of the present state, no sequence beyond the first `n_sequences`; whether more is wanted."""
        wanted = self.n_sequences - sum(map(len, self._states[-1]))
        if wanted > 0:
            self._states[-1].append(self._copy(states_BTD[:wanted]))
        return wanted > len(states_BTD)

    def _copy(self, states_BTD: Tensor) -> Tensor:
        if self.room is None:
            return states_BTD.clone()
        here, self.room = self.room.tensor_split([states_BTD.numel()])
        return here.view(states_BTD.shape).copy_(states_BTD)

    def close(self) -> None:
        """The present state is complete."""
        self._states.append([])

    def distances(self) -> tuple[Distance, ...]:
        """All cells with layer < to_layer."""
        batches = list(zip(*self._states[:-1], strict=True))
        n_states, width = len(batches[0]), batches[0][0].shape[-1]
        sums = torch.zeros(len(COMPARED[:2]), n_states, n_states, dtype=torch.float64)
        counts = torch.zeros(n_states, n_states, dtype=torch.int64)
        step = max(1, tile_tokens(batches[0][0].device, width) // n_states)
        for states in batches:
            for tile in zip(*(state.flatten(0, -2).split(step) for state in states), strict=True):
                both = pairwise_similarity(torch.stack(tile, dim=1))
                counted = ~both[0].isnan()
                sums += torch.where(counted, both, 0).sum(dim=1).cpu()
                counts += counted.sum(dim=0).cpu()
        cells = [(i, j) for i in range(n_states) for j in range(i + 1, n_states)]
        return tuple(
            Distance(i, j, metric, float(sums[k, i, j]) / n if (n := int(counts[i, j])) else None, n)
            for i, j in cells
            for k, metric in sorted(enumerate(COMPARED[:2]), key=lambda one: one[1])
        )
