"""The benchmarks by name; each is a module of this folder with `add_options` and `run`."""

import argparse

from benchmarks import faults, pipeline

BENCHMARKS = {"faults": faults, "pipeline": pipeline}


def main() -> int:
    """Run the benchmark that is named; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    named = parser.add_subparsers(dest="name", required=True)
    for name, module in BENCHMARKS.items():
        module.add_options(named.add_parser(name, help=(module.__doc__ or "").splitlines()[0]))
    options = parser.parse_args()
    return BENCHMARKS[options.name].run(options)


if __name__ == "__main__":
    raise SystemExit(main())
