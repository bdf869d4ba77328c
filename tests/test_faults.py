"""Sweeps that are killed, interrupted and started again while their Hub fails.

More rounds: `python -m benchmarks faults`.
"""

import http.client
import random
import time
import urllib.request

import pytest
from fault_rounds import Round, Rounds
from loopback_hub import CHAOS, LoopbackHub

ROUNDS = 20
# Bytes sent by bytes needed, over all rounds: what a kill costs is what was on its way.
MOST_BYTES = 1.2


@pytest.fixture(scope="module")
def rounds(tiny_run, tmp_path_factory):
    played = Rounds(tiny_run, tmp_path_factory.mktemp("rounds"))
    yield played
    played.close()


@pytest.fixture(scope="module")
def files() -> list[Round]:
    """The rounds that fetched files, as they are played."""
    return []


def test_a_seed_tells_what_each_request_meets():
    """What the server does, that is; how much of a cut body arrives is the network's affair."""

    def met(seed: int) -> dict[str, int]:
        with LoopbackHub() as hub:
            hub.add_repo("me/model", revisions={"main": {"x.bin": bytes(1000)}})
            hub.chaos(random.Random(seed), rate=0.5, kinds=dict.fromkeys(CHAOS, 1.0))
            for _ in range(300):
                try:
                    with urllib.request.urlopen(f"{hub.url}/me/model/resolve/main/x.bin") as answer:
                        answer.read()
                except (OSError, http.client.HTTPException):
                    pass
            time.sleep(0.3)  # the last answers are counted once they are sent
            return dict(hub.met)

    first = met(1)
    assert met(1) == first != met(2)
    assert set(first) == set(CHAOS) - {"whole"}, "nobody asks for a range here"


def test_undisturbed_no_byte_is_fetched_twice(rounds):
    assert rounds.bytes_of_weights < rounds.bytes < 1.02 * rounds.bytes_of_weights, "and a hundredth for the rate"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(ROUNDS))
def test_the_table_is_the_undisturbed_one(rounds, files, seed):
    this = rounds.play(seed)
    print(this)
    assert not this.told
    if this.fetch == "file":
        files.append(this)


@pytest.mark.slow
def test_hardly_a_byte_is_fetched_twice(files):
    if not files:
        pytest.skip("no round was played")
    worst = max(files, key=lambda this: this.ratio)
    print(f"worst round: {worst.ratio:.3f} (seed {worst.seed}: {dict(worst.ended)}, {dict(worst.met)})")
    assert sum(this.kills for this in files) > 0
    assert sum(this.served_plain for this in files) <= MOST_BYTES * sum(this.needed_plain for this in files)
