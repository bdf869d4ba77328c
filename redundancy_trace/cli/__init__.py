"""The console script `trace`: one module a command. Results go to stdout, everything else to stderr."""

from redundancy_trace.cli.running import INTERRUPTED, main, run

__all__ = ["INTERRUPTED", "main", "run"]
