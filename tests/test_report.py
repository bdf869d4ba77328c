"""The report: what it says, how large it is, and how the page behaves in a real browser without a window."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
from fake_scores import PYTHIA_STEPS, fake_scores
from made_runs import value_at, write_made_run
from made_scores import ranked, scores_of
from playwright.sync_api import Browser, Page, sync_playwright

import redundancy_trace as rt
from redundancy_trace import cli
from redundancy_trace.errors import InputError
from redundancy_trace.figures.style import agreement_map
from redundancy_trace.report import words
from redundancy_trace.report.curves import costs
from redundancy_trace.report.gathering import gather
from redundancy_trace.report.pictures import _agreement
from redundancy_trace.report.reproducing import commands
from redundancy_trace.settings import TraceSettings
from redundancy_trace.store import EVALUATION_SCHEMA, read_scores, write_evaluations, write_json

STEPS = [0, 1, 2, 4, 8, 16, 32]
N_LAYERS = 5
HOSTILE = ["step0", "<script>alert(1)</script>", "step2 \"'><img src=x onerror=alert(2)>", "größe-日本-𝛼-step4"]
WIDTHS = (1280, 400)
# In CI a browser that is not there is a failure, not a skip.
NEED = "REDUNDANCY_TRACE_NEEDS_CHROMIUM"
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync")  # fmt: skip


def layered(steps=STEPS, n_layers=N_LAYERS, **options):
    """Scores with every metric of layers."""
    scores = fake_scores(steps, n_layers, **options)
    likeness = scores.filter(metric="cosine_similarity")
    others = [
        likeness.with_columns(metric=pl.lit("angular_distance"), value=(1 - pl.col("value")) / 3),
        likeness.with_columns(metric=pl.lit("update_cosine"), value=pl.col("value") - 0.8),
    ]
    return pl.concat([scores, *others])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with hostile names, a whole and a partial duplicate, one of them scored, and a failure."""
    names = [*HOSTILE, "step8", "step16", "step32"]
    return write_made_run(
        tmp_path_factory.mktemp("report") / "run",
        layered(names=names, model="org/<b>model & co"),
        repeats={"step16": "step32", "step12": "step32"},
        partly={"step6": "step8"},
        failures={"step24": (24, "a tensor <i>is</i> missing")},
    )


@pytest.fixture(scope="module")
def report(run):
    return rt.write_report(run)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A report of the size that the longest usual runs have."""
    folder = tmp_path_factory.mktemp("large") / "run"
    write_made_run(folder, layered(PYTHIA_STEPS, 32, tokens=[2_097_152 * step for step in PYTHIA_STEPS]))
    return rt.write_report(folder)


@pytest.fixture(scope="module")
def browser():
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        told = "no Chromium was found on the PATH (Debian: apt-get install chromium)"
        pytest.fail(told) if os.environ.get(NEED) else pytest.skip(told)
    with (
        sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=found, args=list(FLAGS)) as started,
    ):
        yield started


class Told:
    """What a page said that nobody wants to hear, and what it asked for."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.requests: list[str] = []


def opened(browser: Browser, file: Path, width: int = 1280, height: int = 900) -> tuple[Page, Told]:
    page, told = browser.new_page(viewport={"width": width, "height": height}), Told()
    page.on("console", lambda message: told.lines.append(message.text))
    page.on("pageerror", lambda error: told.lines.append(str(error)))
    page.on("dialog", lambda dialog: (told.lines.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda request: told.requests.append(request.url))
    page.goto(file.as_uri())
    page.wait_for_function("document.querySelectorAll('canvas[height=\"150\"]').length === 0")
    page.wait_for_selector("#profile svg g")
    return page, told


def overflow(page: Page) -> int:
    page_width, view = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    return page_width - view


# --- what is in it --------------------------------------------------------------------------------------------------


def test_the_words_hold_the_numbers_of_the_statistics(run):
    stats = gather(run).stats
    texts = dict(words.findings(stats))
    assert list(texts) == ["Attention", "MLP", "Block", "Attention against MLP"]
    for component, label in (("attn", "Attention"), ("mlp", "MLP"), ("block", "Block")):
        order = stats.curves.filter(component=component, statistic="spearman").row(0, named=True)
        trend = stats.trends.filter(component=component, layers="inner").row(0, named=True)
        last = read_scores(run).filter(revision="step32", component=component, metric="cosine_similarity")
        first_to_go = last.sort("value", descending=True)["layer"].head(2).to_list()
        text = texts[label]
        assert f"2 most redundant of 5 layers are {first_to_go[0]} and {first_to_go[1]}." in text
        assert f"{order['value']:.2f} ({order['low']:.2f} to {order['high']:.2f}; 0 by chance)" in text
        assert f"goes from {trend['first']:.3g} to {trend['last']:.3g}" in text
        assert stats.onset(component)["revision"] in text or "The checkpoint before has others" in text
    below = stats.curves.filter(component="joint", statistic="attn_below_mlp")["value"]
    assert (
        f"in {below[0]:.0%} of the layers at the first checkpoint and {below[-1]:.0%}" in texts["Attention against MLP"]
    )
    assert "5 checkpoints, from step0 to" in words.lead(gather(run)) or "6 checkpoints" in words.lead(gather(run))


def test_agreement_has_the_colours_of_the_figure(run):
    maps = {}
    shown = _agreement(gather(run), maps)
    assert list(maps) == [shown["map"]] == [agreement_map().name]
    kept = rt.leave_out_duplicates(read_scores(run), rt.read_duplicates(run))
    lowest = min(rt.rank_agreement(kept, name)["spearman"].min() for name in ("attn", "mlp", "block"))
    assert shown["low"] == min(0, lowest)


def test_published_orders_of_the_model_are_held_against_it(tmp_path):
    orders = [25, 26, 24, 22, 27, 28, 1, 2]  # six of the eight that the paper's authors drop first
    scores = scores_of({"attn": [ranked(orders, 32)] * 2}, [0, 8], model="mistralai/Mistral-7B-v0.1")
    said = dict(words.findings(gather(write_made_run(tmp_path / "run", scores)).stats))["Against published orders"]
    assert "first to drop, 6 are among the 8 most redundant of step8 (Jaccard 0.60; 0.15 by chance)." in said
    assert "2406.15786" in said


def test_what_is_left_out_is_named_with_its_reason(run):
    said = " ".join(words.left_out(gather(run).stats))
    for name, why in (
        ("step16 and step12", "repeats the weights of step32"),
        ("step6", "repeats a part of the weights of step8"),
        ("step24", "could not be scored: a tensor <i>is</i> missing"),
    ):
        assert f"{name}: {why}" in said


def test_one_checkpoint_and_one_layer_are_said_as_such(tmp_path):
    sources = gather(write_made_run(tmp_path / "run", fake_scores([7], 1)))
    assert words.lead(sources).startswith("Attention, MLP and Block of 1 layer were scored at one checkpoint, step7")
    assert dict(words.findings(sources.stats))["MLP"] == "The most redundant of 1 layers is 0."


def test_the_same_run_gives_the_same_bytes_and_names_nothing_of_this_machine(run, report, tmp_path):
    again = rt.write_report(run, tmp_path / "deeper" / "again.html")
    assert again.read_bytes() == report.read_bytes()
    assert str(run.parent) not in report.read_text()
    assert not list(again.parent.glob(".*"))


def test_a_large_run_is_small(large):
    assert large.stat().st_size < 2.5e6, "154 checkpoints x 32 layers; mailboxes take 6 MB"


def test_the_command_is_the_one_that_made_the_run(tmp_path):
    folder = write_made_run(
        tmp_path / "run", fake_scores(STEPS), revisions="step*", endpoint="https://me:secret@hub.example/api",
        out="somewhere", quiet=True, engine="whole",
    )  # fmt: skip
    made = {"calibration": "hf:a b", "samples": 8, "sequence_length": 16, "tokenizer": None, "sha256": "0"}
    write_json(folder / "token_ids.json", made)
    [command] = commands(gather(folder))
    assert command == (
        "trace --model org/model --revisions 'step*' --calibration 'hf:a b' --samples 8 --sequence-length 16 "
        "--dtype float32 --engine whole --endpoint https://hub.example/api"
    )
    known = {f"--{name.replace('_', '-')}" for name in TraceSettings.__dataclass_fields__}
    assert {word for word in shlex.split(command) if word.startswith("--")} <= known


def test_checkpoints_of_earlier_sweeps_are_named_one_by_one(tmp_path):
    folder = write_made_run(
        tmp_path / "run", fake_scores([1, 2, 4]), unchosen=["step1", "step2"],
        revisions="step4", failures={"step3": (3, "gone")},
    )  # fmt: skip
    [command] = commands(gather(folder))
    assert "--revisions step1,step2,step4,step3 " in command


def test_flags_that_were_given_several_times_are_given_so_again(tmp_path):
    folder = write_made_run(
        tmp_path / "run", fake_scores(STEPS), calibration=["pydoc", "o.txt"], samples=[8, 16], demo=True, model=None
    )
    assert commands(gather(folder)) == [
        "trace --demo --calibration pydoc --calibration o.txt --samples 8 --samples 16 --dtype float32"
    ]
    assert '<td class="long">pydoc, o.txt</td>' in rt.write_report(folder).read_text()


def test_what_drops_cost_along_training_is_drawn_where_it_was_measured(tmp_path):
    steps = [0, 10, 100]
    folder = write_made_run(tmp_path / "run", fake_scores(steps))
    assert gather(folder).costs is None
    shared = {"purpose": "along", "metric": "loss", "dataset": "pydoc 4x8", "n_dropped": 1, "component": "attn"}
    rows = []
    for k, step in enumerate(steps):
        at = {**shared, "model": "org/model", "revision": f"step{step}", "commit": f"{k:040x}", "step": step}
        rows.append({**at, "value": 5.0 - k, "n_dropped": 0, "component": None})
        plan = {**at, "plan": "attn=25%", "plan_revision": at["revision"]}
        rows.append({**plan, "order": "importance", "value": 5.0 - k + 0.125 * k})
        rows += [{**plan, "order": "random", "order_seed": s, "value": 5.0 - k + 0.25 * (s + 1)} for s in (0, 1)]
        if step != 100:
            last = {"revision": "step100", "commit": f"{2:040x}", "step": 100}
            rows.append({**plan, **last, "order": "importance", "value": 3.0 + 0.5 * (k + 1)})
    frame = pl.DataFrame([{**row, "identity": "i"} for row in rows], schema=EVALUATION_SCHEMA)
    write_evaluations(folder / "evaluations" / "made.parquet", frame)
    [chart] = costs(gather(folder))
    assert chart["title"] == "Loss added with Attention 25% dropped, on pydoc 4x8 (band: random plans)"
    assert [(line["label"], line["value"], line["low"], line["high"]) for line in chart["lines"]] == [
        ("its own plan", [0.0, 0.125, 0.25], [None] * 3, [None] * 3),
        ("that plan on the last", [0.5, 1.0, 0.25], [None] * 3, [None] * 3),
        ("random plans", [0.375] * 3, [0.25] * 3, [0.5] * 3),
    ]
    assert "Loss added with Attention 25% dropped" in rt.write_report(folder).read_text()


def test_every_calibration_has_its_command_and_the_one_asked_for_is_shown(tmp_path):
    scores = pl.concat([fake_scores(STEPS), fake_scores(STEPS, calibration="other 8x16", seed=1)])
    folder = write_made_run(tmp_path / "run", scores)
    write_json(
        folder / "token_ids.json", {"calibration": "pydoc", "samples": 8, "sequence_length": 16, "tokenizer": None}
    )
    other = {"calibration": "o.txt", "samples": 8, "sequence_length": 16, "tokenizer": "org/words"}
    write_json(folder / "token_ids-1.json", other)
    sources = gather(folder, "other 8x16")
    assert [("pydoc" in one, "o.txt --tokenizer org/words" in one) for one in commands(sources)] == [
        (True, False),
        (False, True),
    ]
    assert sources.scores["calibration"].unique().to_list() == ["other 8x16"]
    text = rt.write_report(folder, calibration="other 8x16").read_text()
    assert "Agreement between calibrations" in text
    assert "on the text other 8x16 in float32" in text


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_command_writes_where_it_is_told_and_says_so(run, report, tmp_path, capsys):
    assert cli.run(["report", str(run), "--out", str(tmp_path / "a.html")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'a.html'}\n"
    assert (tmp_path / "a.html").read_bytes() == report.read_bytes()
    assert report == run / "report.html"


def test_what_cannot_be_used_is_told(run, tmp_path, capsys):
    (tmp_path / "file").touch()
    for arguments, told in (
        ([str(tmp_path)], "is no run"),
        ([str(run), "--calibration", "c4"], "There are: pydoc"),
        ([str(run), "--out", str(tmp_path)], "it is a folder"),
        ([str(run), "--out", str(tmp_path / "file" / "a.html")], "cannot be written"),
    ):
        assert cli.run(["report", *arguments]) == 2
        assert told in capsys.readouterr().err
    broken = fake_scores(STEPS).with_columns(value=pl.when(pl.col("layer") == 1).then(float("nan")).otherwise("value"))
    with pytest.raises(InputError, match="no number at step0"):
        rt.write_report(write_made_run(tmp_path / "broken", broken))
    assert not (tmp_path / "broken" / "report.html").exists()


def test_a_listing_that_is_gone_or_damaged_is_gone_without(tmp_path):
    folder = write_made_run(tmp_path / "run", fake_scores(STEPS, loss=False))
    for content in ("{", "[]", None):
        (folder / "listing.json").unlink(missing_ok=True)
        if content is not None:
            (folder / "listing.json").write_text(content)
        assert "The run saw" not in rt.write_report(folder).read_text()


def test_no_torch_is_imported(run, tmp_path):
    program = (
        "import sys; from redundancy_trace.cli import run; assert run(sys.argv[1:]) == 0; "
        "assert not {'torch', 'transformers', 'huggingface_hub', 'httpx2'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program, "report", run, "--out", tmp_path / "r.html"], check=True)


# --- in a browser ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Reports of runs that lack much: one checkpoint, one layer, no loss, names that tell no step, two calibrations."""
    folder = tmp_path_factory.mktemp("others")
    names = ["kestrel-" + "x" * 90, "ocelot", "tern"]
    frames = {
        "one": fake_scores([7], 3, loss=False),
        "least": fake_scores([7], 1),
        "unplaced": fake_scores([None] * 3, 3, names=names),
        "two": pl.concat([fake_scores(STEPS), fake_scores(STEPS, calibration="c4 4x8", seed=1)]),
        "main": fake_scores([1, 10, 100, None], 3, names=["step1", "step10", "step100", "main"]),
    }
    return [rt.write_report(write_made_run(folder / name, frame)) for name, frame in frames.items()]


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_asked_for_nothing_goes_wrong_and_nothing_sticks_out(browser, report, large, others, width):
    for file in (report, large, *others):
        page, told = opened(browser, file, width)
        assert told.lines == [], file
        assert told.requests == [file.as_uri()]
        assert overflow(page) == 0, file
        page.keyboard.press("Tab")
        page.locator("#checkpoint").press("Home") if page.locator("#checkpoint").is_enabled() else None
        for option in page.locator("#metric option").all():
            page.locator("#metric").select_option(option.get_attribute("value"))
        page.locator("summary").first.click()
        assert told.lines == []
        assert overflow(page) == 0
        page.close()


def test_hostile_names_are_text(browser, report):
    page, told = opened(browser, report)
    assert page.locator("#checkpoints tbody th").all_inner_texts()[:4] == HOSTILE
    assert page.title() == "org/<b>model & co: redundancy over training"
    assert page.locator("img, b, i").count() == 0
    assert page.locator("script").count() == 2
    page.locator("#checkpoint").fill("1")
    assert "<script>alert(1)</script>" in page.locator("#chosen").inner_text()
    page.locator("#maps canvas").first.hover()
    assert told.lines == []
    page.close()


def test_the_slider_moves_everything(browser, report):
    page, _ = opened(browser, report)
    shown = page.locator("#chosen")
    assert shown.inner_text().startswith("step32 (step 32)")
    slider = page.locator("#checkpoint")
    slider.focus()
    marks = page.locator("#maps .mark.column")
    before = [mark.bounding_box()["x"] for mark in marks.all()]
    profile = page.locator("#profile path").first.get_attribute("d")
    stick = page.locator("#charts svg > line").first.get_attribute("x1")
    slider.press("Home")
    assert shown.inner_text().startswith("step0 (step 0) · 1 of 10 · loss 4.0000")
    assert slider.get_attribute("aria-valuetext").startswith("step0 (step 0), 1 of 10")
    assert all(mark.bounding_box()["x"] < was for mark, was in zip(marks.all(), before, strict=True))
    assert page.locator("#profile-title").inner_text().endswith("at step0 (step 0)")
    assert page.locator("#profile path").first.get_attribute("d") != profile
    assert page.locator("#charts svg > line").first.get_attribute("x1") != stick
    slider.press("ArrowRight")
    assert "alert(1)" in shown.inner_text()
    page.close()


def told_by(page):
    """Layer, component, checkpoint and lines of what is shown beside the pointer; None if nothing is."""
    texts = page.evaluate("[...document.querySelectorAll('#tip:not([hidden]) > *')].map((one) => one.textContent)")
    if not texts:
        return None
    title, *lines = texts
    layer, component, name = re.fullmatch(
        r"Layer (\d+), (Attention|MLP|Block), (.*?)(?: \(step [^)]*\))?", title
    ).groups()
    return int(layer), {"Attention": "attn", "MLP": "mlp", "Block": "block"}[component], name, lines


@pytest.mark.parametrize("width", WIDTHS)
def test_hovering_tells_the_stored_values(browser, run, report, width):
    scores = read_scores(run)
    page, _ = opened(browser, report, width)
    for k, component in enumerate(("attn", "mlp", "block") if width == 1280 else ("attn",)):
        canvas = page.locator("#maps canvas").nth(k)
        canvas.scroll_into_view_if_needed()
        box = canvas.bounding_box()
        seen, blank = set(), {}
        for x in range(18, round(box["width"]), round(box["width"] / 16)):
            for y in range(2, round(box["height"]), 20):
                page.mouse.move(box["x"] + x, box["y"] + y)
                if (told := told_by(page)) is None:
                    continue
                layer, what, name, lines = told
                assert what == component
                if not lines[0].startswith("importance"):
                    blank[name] = lines
                    continue
                stored = value_at(scores, name, component, layer)
                assert lines[0] == f"importance {1 - stored!r} ± 0.002"
                assert lines[1] == f"stored cosine similarity {stored!r}"
                at_once = scores.filter(revision=name, component=component, metric="cosine_similarity")
                place = (at_once["value"] > stored).sum() + 1
                assert lines[2] == f"place {place} of 5 in the order of dropping"
                seen.add((name, layer))
        assert seen == {(name, layer) for name in (*HOSTILE, "step8", "step32") for layer in range(N_LAYERS)}
        assert blank == {
            "step6": ["repeats a part of the weights of step8"],
            "step12": ["repeats the weights of step32"],
            "step16": ["repeats the weights of step32"],
            "step24": ["could not be scored: a tensor <i>is</i> missing"],
        }
    page.close()


def test_every_metric_can_be_chosen_and_shows_its_values(browser, run, report):
    scores = read_scores(run)
    page, _ = opened(browser, report)
    for metric in ("angular_distance", "relative_norm", "update_cosine"):
        page.locator("#metric").select_option(metric)
        page.locator("#maps canvas").nth(1).hover(position={"x": 30, "y": 40})
        layer, component, name, lines = told_by(page)
        assert (component, name) == ("mlp", "step0")
        value = value_at(scores, name, component, layer, metric)
        assert lines == [f"{metric.replace('_', ' ')} {value!r} ± 0.002"]
    page.close()


def test_the_keyboard_reaches_and_reads_everything(browser, run, report):
    scores = read_scores(run)
    page, _ = opened(browser, report)
    reached = []
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.append(page.evaluate(
            "document.activeElement.id || document.activeElement.getAttribute('aria-label')"
            " || document.activeElement.tagName"
        ))  # fmt: skip
    for wanted in ("checkpoint", "metric", "Attention: 5 layers by 10 checkpoints", "Trends", "Checkpoints", "Commands",
                   "Agreement of 6 checkpoints in the order of the layers, MLP", "SUMMARY"):  # fmt: skip
        assert wanted in reached
    canvas = page.locator("#maps canvas").first
    canvas.focus()
    for key, name, layer in (
        ("Home", "step0", 0), ("ArrowUp", "step0", 1), ("ArrowUp", "step0", 2), ("ArrowRight", HOSTILE[1], 2),
        ("ArrowDown", HOSTILE[1], 1), ("ArrowLeft", "step0", 1), ("ArrowLeft", "step0", 1), ("End", "step32", 1),
    ):  # fmt: skip
        canvas.press(key)
        stored = value_at(scores, name, "attn", layer)
        assert told_by(page)[:3] == (layer, "attn", name)
        assert told_by(page)[3][1] == f"stored cosine similarity {stored!r}"
        assert f"stored cosine similarity {stored!r}" in page.locator("#told").text_content()
        assert page.locator("#chosen").inner_text().startswith(name)
    canvas.press("Escape")
    assert told_by(page) is None
    page.close()


def test_agreement_and_curves_tell_what_the_statistics_hold(browser, run, report):
    sources = gather(run)
    page, _ = opened(browser, report)
    canvas = page.locator("#pairs canvas").nth(1)
    canvas.focus()
    canvas.press("Home")
    title, line = page.locator("#tip > *").all_inner_texts()
    assert title == "MLP, step0 (step 0) and step0 (step 0)"
    assert line == "Spearman 1.0000"
    for _ in range(5):
        canvas.press("ArrowUp")
    pairs = rt.rank_agreement(rt.leave_out_duplicates(read_scores(run), rt.read_duplicates(run)), "mlp")
    expected = pairs.filter(revision="step0", other_revision="step32")["spearman"][0]
    assert page.locator("#tip > *").all_inner_texts()[1] == f"Spearman {expected:.4f}"
    page.locator("#checkpoint").press("Home")
    keys = page.locator("#charts .keys").first.locator("span").all_inner_texts()
    curves = sources.stats.curves.filter(statistic="importance_inner", order=0)
    assert [key.split()[0] for key in keys] == ["Attention", "MLP", "Block"]
    assert [float(key.split()[1]) for key in keys] == [float(f"{value:.3g}") for value in curves["value"]]
    page.close()


def test_it_can_be_printed(browser, report):
    page, told = opened(browser, report)
    page.emulate_media(media="print")
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert page.locator("details:not([open])").count() == 0
    assert not page.locator("#checkpoint").is_visible()
    page.set_viewport_size({"width": 720, "height": 900})  # A4 within its margins
    assert overflow(page) == 0
    last = page.locator("#checkpoints tbody tr:not(.marked)").last
    assert last.bounding_box()["height"] < 25, "no number is broken into lines"
    assert page.pdf(format="A4").startswith(b"%PDF")
    assert told.lines == []
    page.close()
