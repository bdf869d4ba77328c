"""Telling how far a sweep is, on stderr: bars on a terminal, plain lines elsewhere."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID


@dataclass
class Reporter:
    """What a sweep tells as it goes; `console` None tells nothing, `bars` None tells in plain lines.

    Bytes are counted by the fetching thread, everything else by the main one; rich takes both.
    """

    console: "Console | None" = None
    bars: "Progress | None" = None
    _checkpoints: "TaskID | None" = None
    _layers: "dict[str, TaskID]" = field(default_factory=dict)
    _bytes: "TaskID | None" = None
    _total: int = 0
    _done: int = 0

    def line(self, text: str) -> None:
        """One line of its own."""
        if self.console is not None:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def start(self, total: int, done: int) -> None:
        """There are `total` checkpoints, of which `done` are stored already."""
        self._total, self._done = total, done
        if self.bars is not None:
            self._checkpoints = self.bars.add_task("checkpoints", total=total, completed=done)
            self._bytes = self.bars.add_task("fetching", total=None, visible=False)

    def fetching(self, name: str, total: int | None) -> None:
        """The bytes of a checkpoint begin to arrive."""
        if self.bars is not None and self._bytes is not None:
            self.bars.reset(self._bytes, total=total, description=f"fetching {name}", visible=bool(total))

    def moved(self, count: int) -> None:
        """So many bytes arrived (negative where a file starts again)."""
        if self.bars is not None and self._bytes is not None:
            self.bars.advance(self._bytes, count)

    def training(self, step: int, steps: int) -> None:
        """So many steps of the demo's training are done."""
        if self.bars is not None:
            if "" not in self._layers:
                self._layers[""] = self.bars.add_task("training the demo", total=steps)
            self.bars.update(self._layers[""], completed=step, visible=step < steps)

    def scoring(self, name: str) -> None:
        """A checkpoint's turn has come; several may be at work."""
        if self.bars is not None:
            self._layers[name] = self.bars.add_task(f"scoring {name}", total=None)

    def step(self, name: str, done: int, total: int) -> None:
        """So many layers (or batches) of a checkpoint are done."""
        if self.bars is not None and name in self._layers:
            self.bars.update(self._layers[name], completed=done, total=total)

    def finished(self, name: str, text: str) -> None:
        """One checkpoint is through, well or not."""
        self._done += 1
        if self.bars is not None and name in self._layers:
            self.bars.remove_task(self._layers.pop(name))
        self.line(f"[{self._done}/{self._total}] {text}")
        if self.bars is not None and self._checkpoints is not None:
            self.bars.advance(self._checkpoints)


@contextmanager
def reporting(*, quiet: bool) -> Iterator[Reporter]:
    """A reporter for one sweep; its bars are cleared at the end.

    Args:
        quiet: Tell nothing.
    """
    if quiet:
        yield Reporter()
        return
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield Reporter(console)
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bars:
        yield Reporter(console, bars)
