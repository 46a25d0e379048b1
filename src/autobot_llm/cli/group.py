"""A command that has commands. Knows how its help is made; knows nothing of what any of them does."""

from __future__ import annotations

import click


class Group(click.Group):
    """Its examples of each command stand in that command's help, too."""

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        super().add_command(cmd, name)
        called = ["autobot-llm", self.name, name or cmd.name]
        examples = [line for line in (self.epilog or "").splitlines() if line.split()[:3] == called]
        if examples:
            own = f"\n\n{cmd.epilog}" if cmd.epilog else ""
            cmd.epilog = "\n".join(("\b", "Examples:", *examples)) + own
