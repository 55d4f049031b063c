"""Shell completion."""

from __future__ import annotations

import click

from millpond.cli.settings import Command


@click.command(cls=Command)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the completion script of a shell.

    It completes commands, options, and the names of the queues in the store.

    \b
    bash   millpond completion bash > ~/.local/share/bash-completion/completions/millpond
    zsh    millpond completion zsh > ~/.zfunc/_millpond     (with fpath+=~/.zfunc before compinit)
    fish   millpond completion fish > ~/.config/fish/completions/millpond.fish
    """
    from click.shell_completion import get_completion_class

    found = get_completion_class(shell)
    assert found is not None, shell  # click has all that the Choice allows
    script = found(ctx.find_root().command, {}, "millpond", "_MILLPOND_COMPLETE")
    click.echo(script.source())
