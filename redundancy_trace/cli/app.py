"""The commands of `trace`, by name."""

import typer

from redundancy_trace.cli.evaluating import eval_command
from redundancy_trace.cli.listing import list_command
from redundancy_trace.cli.plotting import plot_command
from redundancy_trace.cli.pruning import prune_command
from redundancy_trace.cli.reporting import report_command
from redundancy_trace.cli.stats import stats_command
from redundancy_trace.cli.sweeping import sweep_command

app = typer.Typer(
    add_completion=False,
    no_args_is_help=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.callback(
    invoke_without_command=True,
    help="See how redundancy arises in a language model while it trains: score attention, MLP and block of every "
    "layer at every checkpoint, store the scores, draw the heatmaps.",
)(sweep_command)
app.command("list")(list_command)
app.command("plot")(plot_command)
app.command("eval")(eval_command)
app.command("stats")(stats_command)
app.command("report")(report_command)
app.command("prune")(prune_command)
