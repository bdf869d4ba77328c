"""Rounds of a sweep under faults: a seed tells what the Hub does wrong and how the sweep is ended; the end is checked.

In a round, a really trained run is swept from a loopback Hub on which any request may fail. The sweep is killed,
interrupted or left to fail, and started again, some times; at last it runs undisturbed. Then its table must be that of
a sweep that nothing ever disturbed, with nothing double and nothing left over.
"""

import os
import random
import re
import signal
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl
from loopback_hub import CHAOS, Body, LoopbackHub
from polars.exceptions import PolarsError
from safetensors.torch import load_file, save
from tiny_runs import PYDOC, STEPS, Sweeps, branches, checkpoint_files, leftovers, numbers

from redundancy_trace.errors import TraceError
from redundancy_trace.store import read_failures, read_scores

PART_BYTES = 20_000
_PACE = 2_000_000  # bytes a second of each connection: at once, a killed client's unread bytes would be all there are
_RATE = 0.2
_MOST_STARTS = 3
_PATIENCE_SECONDS = 60.0
_SIGNALS = (signal.SIGKILL, signal.SIGINT, signal.SIGTERM)
_MOVED = "step2"
# 130: interrupted; -2: before the program was there to tell it.
_DROPPED = re.compile(r"Exception ignored in.*?\nTraceback.*?\nKeyboardInterrupt:? *\n", re.DOTALL)
_EXITS = {None: (0, 1, 2), signal.SIGKILL: (-9,), signal.SIGINT: (130, -2), signal.SIGTERM: (-15,)}


@dataclass
class Round:
    """What happened in one round.

    Attributes:
        seed: Its seed.
        fetch: How weights were fetched: `file` or `stream`.
        starts: Sweeps that were started, the undisturbed one at the end among them.
        ended: How those before it were ended: a signal's name, or the exit code of one that ended by itself.
        met: Faults that were met, by kind.
        needed: Bytes of weights in the commits that were asked for.
        served: Bytes of weights that the Hub sent.
        needed_plain: Bytes in those weight files that met neither a wrong byte nor a whole file for a range.
        served_plain: Bytes sent of them; the others have to be sent again, by design.
        moved: Whether a branch was moved meanwhile, and back at the end.
        wrong: Whether the table is another than the undisturbed one.
        double: Whether a checkpoint has several parts.
        left_over: Whether something is left that no finished sweep leaves.
        odd: Whether a process ended as none may: a traceback, an exit code of its own, not at all.
        told: What is wrong, in words.
        seconds: How long it took.
    """

    seed: int
    fetch: str
    starts: int = 0
    ended: Counter[str] = field(default_factory=Counter)
    met: Counter[str] = field(default_factory=Counter)
    needed: int = 0
    served: int = 0
    needed_plain: int = 0
    served_plain: int = 0
    moved: bool = False
    wrong: bool = False
    double: bool = False
    left_over: bool = False
    odd: bool = False
    told: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def kills(self) -> int:
        """Sweeps that were ended by a signal."""
        return sum(count for how, count in self.ended.items() if how.startswith("SIG"))

    @property
    def ratio(self) -> float:
        """Bytes sent by bytes needed, of the plain files."""
        return self.served_plain / max(1, self.needed_plain)


class Rounds:
    """Rounds on one trained run, with one process that all sweeps are forked from."""

    def __init__(self, run: Path, folder: Path) -> None:
        """Sweep the run once undisturbed.

        Args:
            run: Folder of the trained run, as `tiny_runs.RECIPE` has it.
            folder: Where run folders go.
        """
        self._run = run
        self._folder = folder
        self._sweeps = Sweeps(run, PART_BYTES)
        weights = load_file(run / "checkpoint-4" / "model.safetensors")
        new = save({name: tensor * 1.5 for name, tensor in weights.items()}, {"format": "pt"})
        self._moved = {**checkpoint_files(run, 4), "model.safetensors": new}
        started = time.monotonic()
        with LoopbackHub() as hub:
            hub.bytes_per_second = _PACE
            hub.add_repo("me/undisturbed", revisions=branches(run))
            code = self._sweeps.wait(self._start(hub, "me/undisturbed", "file", folder / "undisturbed"))
            assert code == 0, (folder / "told").read_text()
            self.bytes = sum(body.sent for body in hub.bodies if body.path.endswith("/model.safetensors"))
        self.seconds = time.monotonic() - started
        self.bytes_of_weights = sum((run / f"checkpoint-{step}" / "model.safetensors").stat().st_size for step in STEPS)
        self._table = numbers(read_scores(folder / "undisturbed"))

    def close(self) -> None:
        """End the process that sweeps are forked from."""
        self._sweeps.close()

    def play(self, seed: int) -> Round:
        """Play one round."""
        chance = random.Random(seed)
        this = Round(seed, "stream" if seed % 3 == 2 else "file")
        out, name = self._folder / f"round-{seed}", f"me/round-{seed}"
        started = time.monotonic()
        # Streamed, a file's hash cannot be checked: wrong bytes are not among the faults there.
        kinds = {kind: often for kind, often in CHAOS.items() if this.fetch == "file" or kind != "corrupt"}
        with LoopbackHub(cdn=chance.random() < 0.5) as hub:
            hub.bytes_per_second = _PACE
            hub.add_repo(name, revisions=branches(self._run))
            commits = {f"step{step}": hub.commit(name, f"step{step}") for step in STEPS}
            hub.chaos(chance, rate=_RATE, kinds=kinds)
            moving = chance.randrange(_MOST_STARTS) if chance.random() < 0.4 else None
            for number in range(chance.randrange(1, _MOST_STARTS + 1)):
                if self._disturbed(this, chance, hub, name, out, moves=number == moving) == 0:
                    break
            hub.calm()
            hub.set_revision(name, _MOVED, branches(self._run)[_MOVED])
            _age_stray_parts(out)
            this.starts += 1
            pid = self._start(hub, name, this.fetch, out)
            code = self._ended(this, pid, None)
            if code != 0:
                this.odd = True
                this.told.append(f"undisturbed, it ends with {code}: {self._printed()}")
            this.met = hub.met
            _count_bytes(this, hub)
        self._check(this, out, commits)
        this.seconds = time.monotonic() - started
        return this

    def _disturbed(
        self, this: Round, chance: random.Random, hub: LoopbackHub, name: str, out: Path, *, moves: bool
    ) -> int | None:
        """Start a sweep, and end it in one of the ways; returns the exit code."""
        this.starts += 1
        how = chance.choice((*_SIGNALS, signal.SIGKILL, None))
        pid = self._start(hub, name, this.fetch, out)
        if moves:
            time.sleep(chance.uniform(0, self.seconds))
            hub.set_revision(name, _MOVED, self._moved)
            this.moved = True
        if how is not None:
            time.sleep(chance.uniform(0, 1.5 * self.seconds))
            os.kill(pid, how)
            if how == signal.SIGINT and chance.random() < 0.3:  # impatient
                time.sleep(chance.uniform(0, 0.2))
                os.kill(pid, how)
        code = self._ended(this, pid, how)
        by_itself = code is not None and code in (0, 1, 2)
        this.ended[str(code) if by_itself or how is None else how.name] += 1
        if code not in (*_EXITS[how], *_EXITS[None]):
            this.odd = True
            this.told.append(f"exit code {code} after {how}: {self._printed()}")
        # Python itself drops an interrupt that meets a weak-reference callback, and says so; the sweep then goes on.
        printed = _DROPPED.sub("", self._printed())
        if re.search(r"Traceback|Exception ignored|fault of the program", printed):
            this.odd = True
            this.told.append(f"after {how}: {self._printed()}")
        return code

    def _start(self, hub: LoopbackHub, name: str, fetch: str, out: Path) -> int:
        where = ("--model", name, "--revisions", "all", "--endpoint", hub.url, "--out", str(out))
        return self._sweeps.start(*where, "--fetch", fetch, *PYDOC, told=self._folder / "told")

    def _ended(self, this: Round, pid: int, how: signal.Signals | None) -> int | None:
        if (code := self._sweeps.waited(pid, _PATIENCE_SECONDS)) is None:
            this.odd = True
            this.told.append(f"after {how}, not ended within {_PATIENCE_SECONDS} s: {self._printed()}")
            os.kill(pid, signal.SIGKILL)
            self._sweeps.wait(pid)
        return code

    def _printed(self) -> str:
        return (self._folder / "told").read_text()

    def _check(self, this: Round, out: Path, commits: Mapping[str, str]) -> None:
        try:
            scores = read_scores(out)
            same = numbers(scores).equals(self._table)
            same &= dict(scores.select("revision", "commit").unique().rows()) == commits
        except (TraceError, PolarsError) as error:
            same = False
            this.told.append(str(error))
        if not same:
            this.wrong = True
            this.told.append("the table is not the undisturbed one")
        parts = Counter(
            row for path in (out / "scores").glob("*") for row in pl.read_parquet(path)["commit"].unique().to_list()
        )
        if double := [commit for commit, count in parts.items() if count > 1]:
            this.double = True
            this.told.append(f"several parts of {double}")
        left = leftovers(out) + [str(failure) for failure in read_failures(out)]
        if left:
            this.left_over = True
            this.told.append(f"left over: {left}")


def _age_stray_parts(out: Path) -> None:
    """Let what killed processes left half-written look as it will in two hours, when it is sure to be nobody's."""
    for path in out.rglob(".*.part"):
        os.utime(path, (time.time() - 7200,) * 2)


def _count_bytes(this: Round, hub: LoopbackHub) -> None:
    files: dict[str, list[Body]] = {}
    for body in hub.bodies:
        if body.path.endswith("/model.safetensors"):
            (commit,) = re.findall(r"[0-9a-f]{40}", body.path)
            files.setdefault(commit, []).append(body)
    ((_, repo),) = hub.repos.items()
    for commit, bodies in files.items():
        size, sent = repo.commits[commit]["model.safetensors"].size, sum(body.sent for body in bodies)
        if commit not in repo.branches.values():  # moved meanwhile: not needed to its end
            size = min(size, sent)
        this.needed += size
        this.served += sent
        if not {"whole", "corrupt"} & {body.fault for body in bodies}:
            this.needed_plain += size
            this.served_plain += sent
