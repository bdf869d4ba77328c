"""The figures of this folder, made anew: `demo/` from the built-in demo, `smollm2/` from SmolLM2-135M; no network.

Both are scored, measured and drawn, some fifteen minutes on two cores. The frames that were drawn lie beside the
figures: with `--redraw` they are drawn again as they are, in seconds, which is what a change of a figure needs.
"""

import argparse
import contextlib
import inspect
import shutil
import tempfile
from pathlib import Path

import polars as pl

import redundancy_trace as rt

FOLDER = Path(__file__).parent
TEXT = FOLDER.parent / "tests" / "data" / "emma.txt"
FRAMES = ("scores", "distances", "evaluations")
# One checkpoint: in one order only, for a loss of it takes seconds.
CURVES = {"curve": "attn,mlp,joint", "orders": "importance"}


def main() -> None:
    """Make both folders, or draw them again."""
    parser = argparse.ArgumentParser(prog="python -m figures", description=__doc__)
    parser.add_argument("--redraw", action="store_true", help="draw the stored frames again; nothing is scored")
    if not parser.parse_args().redraw:
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):  # names that are stored are relative
            measure_demo(FOLDER / "demo")
            measure_smollm2(FOLDER / "smollm2")
    for name in ("demo", "smollm2"):
        for path in draw(FOLDER / name):
            print(path)


def measure_demo(folder: Path) -> None:
    """Its twelve checkpoints, what dropping costs at each, and at the last for every number dropped."""
    from redundancy_trace.demo import demo_checkpoints

    rt.trace(demo=True, out="demo")
    along = rt.evaluate_along("demo")
    curves = rt.evaluate(
        demo_checkpoints() / "checkpoint-192", curve="attn,mlp,block,joint", samples=16, out="curve.parquet"
    )
    write(folder, Path("demo"), pl.concat([along, curves.with_columns(model=pl.lit("demo"))]))


def measure_smollm2(folder: Path) -> None:
    """Its one checkpoint on three kinds of text and several numbers of samples, and what dropping costs."""
    from benchmarks.smollm2 import smollm2

    model = smollm2(Path.cwd()).folder.name
    shutil.copy(TEXT, "novel.txt")
    Path("code.txt").write_text(inspect.getsource(argparse), encoding="utf-8")
    for calibration, samples in (("pydoc", (4, 16, 64)), ("novel.txt", (4, 8)), ("code.txt", (4, 16))):
        rt.trace(model, out="smollm2", calibration=calibration, samples=samples)
    along = rt.evaluate_along("smollm2")
    curves = rt.evaluate(model, text="novel.txt", samples=4, out="curve.parquet", **CURVES)
    write(folder, Path("smollm2"), pl.concat([along, curves]))


def write(folder: Path, run: Path, evaluations: pl.DataFrame) -> None:
    """The frames of a run that are drawn, in place of those that were there."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    frames = (rt.read_scores(run), rt.read_distances(run), evaluations)
    for name, frame in zip(FRAMES, frames, strict=True):
        frame.write_parquet(folder / f"{name}.parquet", compression_level=19)


def draw(folder: Path) -> list[Path]:
    """Draw the frames of a folder: as wide as a page, and in `column/` as a column, there for print only."""
    scores, distances, evaluations = (pl.read_parquet(folder / f"{name}.parquet") for name in FRAMES)
    drawn = []
    for width, formats, place in (("page", ("png", "pdf"), folder), ("column", ("pdf",), folder / "column")):
        drawn += rt.draw_figures(scores, place, formats=formats, distances=distances, width=width)
        drawn += rt.draw_evaluations(evaluations, place, formats=formats, width=width)
    for path in drawn:
        if path.suffix == ".csv" and path.parent != folder:
            path.unlink()  # the numbers are the same as at the other width
    return [path for path in drawn if path.is_file()]


if __name__ == "__main__":
    main()
