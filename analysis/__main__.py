"""`python -m analysis COMMAND RUN`: what a run did, from its event log, at any moment of its life."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import typer
from typer.core import TyperGroup

from analysis.commands import COMMANDS


class Commands(TyperGroup):
    """Imports a command when it is asked for: no figure waits for what another one needs."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        # A typer of one command is that command.
        single = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
        single.command(cmd_name)(import_module(COMMANDS[cmd_name]).command)
        command = typer.main.get_command(single)
        command.name = cmd_name
        return command


app = typer.Typer(
    cls=Commands,
    add_completion=False,
    no_args_is_help=True,
    help=__doc__,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def main() -> None:
    """What a run did, from its event log, at any moment of its life."""


if __name__ == "__main__":
    app(prog_name="python -m analysis")
