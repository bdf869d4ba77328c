"""Environment that must stand before the first import, and the Hub of the tests."""

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

_HOME = tempfile.mkdtemp(prefix="redundancy-trace-tests-")
atexit.register(shutil.rmtree, _HOME, ignore_errors=True)
for _name in ("HF_ENDPOINT", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_CACHE", "HF_HUB_OFFLINE"):
    os.environ.pop(_name, None)
# huggingface_hub and transformers read these once, when they are imported.
os.environ.update(
    HF_HOME=_HOME,
    HF_HUB_DISABLE_XET="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    DISABLE_SAFETENSORS_CONVERSION="1",
    MPLBACKEND="Agg",
)
if "PYTEST_XDIST_WORKER" in os.environ:
    # Threads of several processes that wait for each other by spinning make all of them many times slower.
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest  # noqa: E402 - after the environment
from hypothesis import settings  # noqa: E402
from loopback_hub import LoopbackHub  # noqa: E402

if TYPE_CHECKING:
    import polars as pl

# The same examples every time, and no limit on one: other processes keep this machine busy.
settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")

# Where single tests take minutes.
LONGEST = ("test_smollm2", "test_notebooks", "test_end_to_end")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first: at the end, one process would be left alone with them."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hub cache of the test's own, where huggingface_hub looks for the user's."""
    from huggingface_hub import constants

    cache = tmp_path / "hf-home" / "hub"
    cache.mkdir(parents=True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    return cache


@pytest.fixture
def loopback_hub(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """A running Hub without repositories, an empty Hub cache, and retries that hardly wait."""
    from huggingface_hub import close_session

    from redundancy_trace.hub import failures

    monkeypatch.setattr(failures, "RETRY_BASE_SECONDS", 0.01)
    with LoopbackHub() as hub:
        yield hub
        close_session()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Torch on one thread: matrices this small are many times slower when several wait for each other."""
    from reference_scores import one_thread

    with one_thread():
        yield


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of a small real training, as `tiny_runs.RECIPE` has it: a folder of `checkpoint-N`."""
    from tiny_runs import RECIPE

    from redundancy_trace.demo import train_demo

    return train_demo(tmp_path_factory.mktemp("trained") / "tiny-run", recipe=RECIPE)


@pytest.fixture(scope="session")
def undisturbed_run(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a sweep of the local files that nothing disturbed."""
    from tiny_runs import PYDOC, without_figures

    from redundancy_trace import cli

    with without_figures():
        out = tmp_path_factory.mktemp("undisturbed") / "run"
        assert cli.run(["--model", str(tiny_run), "--out", str(out), "--quiet", *PYDOC]) == 0
    return out


@pytest.fixture(scope="session")
def undisturbed(undisturbed_run: Path) -> "pl.DataFrame":
    """Its table."""
    from redundancy_trace.store import read_scores

    return read_scores(undisturbed_run)


@pytest.fixture
def no_figures() -> Iterator[None]:
    """The sweeps of one test draw nothing."""
    from tiny_runs import without_figures

    with without_figures():
        yield
