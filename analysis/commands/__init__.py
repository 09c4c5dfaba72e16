"""The commands of `python -m analysis`, one module each: `COMMANDS` says which, in the order of the help.

A module has a function `command` whose parameters are the command's own, in typer's manner (shared ones
are in `analysis.options`), and is imported only when its command is asked for.
"""

from __future__ import annotations

COMMANDS = {
    "summary": "analysis.commands.summary",
    "timing": "analysis.commands.timing",
    "usage": "analysis.commands.usage",
    "duration": "analysis.commands.duration",
    "critical-path": "analysis.commands.critical_path",
    "tau2": "analysis.commands.tau2",
    "show": "analysis.commands.show",
    "watch": "analysis.commands.watch",
    "status": "analysis.commands.status",
    "compare": "analysis.commands.compare",
    "sql": "analysis.commands.sql",
    "report": "analysis.commands.report",
    "plots": "analysis.commands.plots",
    "export": "analysis.commands.export",
    "import-seed": "analysis.commands.import_seed",
}
