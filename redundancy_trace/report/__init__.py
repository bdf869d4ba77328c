"""One self-contained HTML page of a run: what it says in words, with pictures that answer to a slider and a keyboard.

`gathering` reads all that a page is made from; `words` says it in sentences; `pictures` and `curves` give the numbers
that the page's script draws; `reproducing` the command that makes the run again; `page` puts them into the template.
The page loads nothing: no network, no fonts, no libraries.
"""

from redundancy_trace.report.page import render, write_report

__all__ = ["render", "write_report"]
