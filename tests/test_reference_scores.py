"""The hand-written reference is right: it says the same as transformers, computed in float64 throughout."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, LENGTH, WINDOW, build, token_ids
from reference.forward import FAMILIES as EQUATIONS
from reference_scores import COMPONENTS, METRICS, ReferenceScores, measure, one_thread, reference_scores, summary
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, PreTrainedModel

PARALLEL = {"gpt_neox", "phi", "falcon", "falcon_new", "cohere", "gptj", "stablelm_parallel"}
ATTENTION_OUT = ("o_proj", "out_proj", "attention.dense", "self_attn.dense", "attn.c_proj")
MLP_OUT = ("down_proj", "dense_4h_to_h", "mlp.c_proj", "fc2", "fc_out")
every_family = pytest.mark.parametrize("family", FAMILIES)


class _AllDouble(TorchFunctionMode):
    """Float64 wherever a model asks for float32, as norms, softmax and rotary positions do."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            return args[0].double()
        args = [torch.float64 if value is torch.float32 else value for value in args]
        kwargs = {name: torch.float64 if value is torch.float32 else value for name, value in (kwargs or {}).items()}
        return func(*args, **kwargs)


@contextmanager
def _recorded(blocks: torch.nn.ModuleList, into: list[torch.Tensor]) -> Iterator[None]:
    """What enters the first block and what every block returns."""
    first = blocks[0].register_forward_pre_hook(lambda block, args: into.append(args[0]))
    rest = [
        block.register_forward_hook(
            lambda block, args, out: into.append(out if isinstance(out, torch.Tensor) else out[0])
        )
        for block in blocks
    ]
    yield
    for hook in (first, *rest):
        hook.remove()


def _run_transformers(model: PreTrainedModel, ids: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """h_0 … h_L and the logits of transformers' own code, no step of it below float64."""
    equations = EQUATIONS[model.config.model_type]
    hidden: list[torch.Tensor] = []
    with torch.no_grad(), one_thread(), _AllDouble():
        exact = AutoModelForCausalLM.from_config(
            model.config, dtype=torch.float64, experts_implementation="eager"
        ).eval()
        exact.load_state_dict(model.state_dict())
        with _recorded(exact.get_submodule(equations.base + equations.layers), hidden):
            logits = exact(torch.from_numpy(ids), use_cache=False).logits
    assert logits.dtype == torch.float64
    return [h.numpy() for h in hidden], logits.numpy()


@cache
def _built(family: str) -> PreTrainedModel:
    """Built once for the tests that leave it as it is."""
    return build(family)


@cache
def _scored(family: str) -> ReferenceScores:
    return reference_scores(_built(family), token_ids())


def _worst(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference, relative to the largest entry."""
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@every_family
def test_equations_are_those_of_transformers(family: str) -> None:
    scores = _scored(family)
    hidden, logits = _run_transformers(_built(family), token_ids())
    assert len(scores.hidden) == len(hidden) == 1 + len(scores.updates)
    for found, expected in zip(scores.hidden, hidden, strict=True):
        assert _worst(found, expected) < 1e-11
    assert _worst(scores.logits, logits) < 1e-11


@every_family
def test_updates_add_up_to_the_block(family: str) -> None:
    scores = _scored(family)
    for x, y, update in zip(scores.hidden, scores.hidden[1:], scores.updates, strict=False):
        assert _worst(x + update.attn.numpy() + update.mlp.numpy(), y) < 1e-14
    assert scores.parallel == (family in PARALLEL,) * len(scores.updates)


@every_family
@pytest.mark.parametrize(("component", "names"), [("attn", ATTENTION_OUT), ("mlp", MLP_OUT)])
def test_update_is_zero_where_the_output_projection_is(family: str, component: str, names: tuple[str, ...]) -> None:
    model = build(family)
    for name, tensor in model.state_dict().items():
        if name.removesuffix(".weight").removesuffix(".bias").endswith(names):
            tensor.zero_()
    scores = reference_scores(model, token_ids(2))
    other = "mlp" if component == "attn" else "attn"
    assert (scores.value[component, "relative_norm"] == 0).all()
    assert (scores.n_tokens[component, "update_cosine"] == 0).all()
    np.testing.assert_allclose(scores.value[component, "cosine_similarity"], 1, atol=1e-15)
    assert (scores.value[other, "relative_norm"] > 0).all()


@every_family
def test_loss_is_that_of_transformers(family: str) -> None:
    model, ids = _built(family), torch.from_numpy(token_ids())
    with torch.no_grad(), one_thread():
        logits = model(ids).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert _scored(family).loss == pytest.approx(expected.item(), rel=1e-5)


@every_family
def test_tiny_models_are_rough_enough(family: str) -> None:
    scores = _scored(family)
    for component in COMPONENTS:
        importance = scores.importance(component)
        assert importance.min() > 0.01
        assert importance.max() < 0.95
    assert LENGTH > 2 * WINDOW
    for name, tensor in _built(family).state_dict().items():
        assert tensor.std() > 0.05, f"{name} was left as transformers starts it"


def test_building_twice_gives_the_same_model_and_another_seed_another() -> None:
    first, second, other = build("llama"), build("llama"), build("llama", seed=1)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name])
        assert not torch.equal(tensor, other.state_dict()[name])
    assert np.array_equal(token_ids(2, 5, 11), token_ids(2, 5, 11))
    assert token_ids(50, 50, 11).max() == 10


@every_family
def test_scores_have_one_value_a_layer(family: str) -> None:
    scores = _scored(family)
    n_layers = len(scores.updates)
    for key in ((component, metric) for component in COMPONENTS for metric in METRICS):
        assert scores.value[key].shape == scores.stderr[key].shape == scores.n_tokens[key].shape == (n_layers,)
        assert (scores.stderr[key] > 0).all()
        assert (scores.n_tokens[key] == token_ids().size).all()


def test_parallel_and_sequential_differ_only_in_where_the_mlp_branches_off() -> None:
    """In layer 0 both shapes have the same attention; the parallel MLP is compared with x, not with x + a."""
    model = build("gpt_neox")
    side_by_side = reference_scores(model, token_ids())
    model.config.use_parallel_residual = False
    one_by_one = reference_scores(model, token_ids())
    for metric in METRICS:
        assert side_by_side.value["attn", metric][0] == one_by_one.value["attn", metric][0]
    x, step = torch.from_numpy(side_by_side.hidden[0]), side_by_side.updates[0]
    expected = torch.cosine_similarity(x, x + step.mlp, dim=-1).mean().item()
    assert side_by_side.value["mlp", "cosine_similarity"][0] == pytest.approx(expected, abs=1e-14)
    x, step = torch.from_numpy(one_by_one.hidden[0]), one_by_one.updates[0]
    expected = torch.cosine_similarity(x + step.attn, x + step.attn + step.mlp, dim=-1).mean().item()
    assert one_by_one.value["mlp", "cosine_similarity"][0] == pytest.approx(expected, abs=1e-14)


def test_metrics_of_known_vectors() -> None:
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [2.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    update = torch.tensor([[0.0, 1.0], [0.0, 0.0], [-3.0, 0.0], [3.0, 0.0]], dtype=torch.float64)
    similarity, angle, relative, direction = (values.tolist() for values in measure(x, update))
    assert similarity == pytest.approx([0.5**0.5, 1, -1, 1])
    assert angle == pytest.approx([0.25, 0, 1, 0])
    assert relative == pytest.approx([1, 0, 1.5, 3])
    assert direction == pytest.approx([0, float("nan"), -1, 1], nan_ok=True)


def test_metrics_obey_the_identity_of_size_and_direction() -> None:
    """cos(X, X + A) = (1 + r c) / √(1 + 2 r c + r²) with r = |A|/|X| and c = cos(A, X)."""
    random = torch.Generator().manual_seed(0)
    x, update = torch.randn(2, 50, 7, generator=random, dtype=torch.float64)
    similarity, angle, r, c = measure(x, update)
    torch.testing.assert_close(similarity, (1 + r * c) / (1 + 2 * r * c + r**2).sqrt())
    torch.testing.assert_close(angle, similarity.acos() / torch.pi)


def test_zero_vectors_are_left_out_and_counted() -> None:
    x = torch.tensor([[[0.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [1.0, 1.0]]], dtype=torch.float64)
    update = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[-1.0, 0.0], [0.0, 0.0]]], dtype=torch.float64)
    similarity, angle, relative, direction = (summary(values) for values in measure(x, update))
    assert [similarity[2], angle[2], relative[2], direction[2]] == [2, 2, 2, 2]
    assert similarity[0] == pytest.approx((0.5**0.5 + 1) / 2)
    assert relative[0] == pytest.approx((1 + 0) / 2)
    assert direction[0] == pytest.approx((0 - 1) / 2)


def test_standard_error_is_over_sequences() -> None:
    values = torch.tensor([[1.0, 3.0], [5.0, 5.0], [0.0, float("nan")]], dtype=torch.float64)
    mean, stderr, n_tokens = summary(values)
    assert (mean, n_tokens) == (14 / 5, 5)
    assert stderr == pytest.approx(np.std([2, 5, 0], ddof=1) / 3**0.5)
    assert np.isnan(summary(values[:1])[1])


def test_distances_hold_for_all_pairs_of_states() -> None:
    scores = _scored("olmo2")
    similarity, angle = scores.distances("cosine_similarity"), scores.distances("angular_distance")
    assert similarity.shape == angle.shape == (4, 4)
    np.testing.assert_allclose(np.diag(similarity), 1, atol=1e-12)
    np.testing.assert_allclose(angle, angle.T, atol=1e-12)
    blocks = [scores.value["block", metric] for metric in ("cosine_similarity", "angular_distance")]
    np.testing.assert_allclose(np.diag(similarity, 1), blocks[0], atol=1e-12)
    np.testing.assert_allclose(np.diag(angle, 1), blocks[1], atol=1e-12)
    assert scores.distances("angular_distance", n_sequences=1)[0, 3] != angle[0, 3]
