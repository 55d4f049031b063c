"""``millpond keygen`` and ``rekey``: the keys of an encrypted store."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import click

from millpond.cli.settings import Command, Settings, option, pass_settings

if TYPE_CHECKING:
    from millpond.pond import Pond


@click.command(cls=Command)
@option("--id", "key_id", environment=False, help="Name of the key; default a random one.")
@option("--output", "-o", type=click.Path(dir_okay=False), environment=False,
        help="Append it to this keyring file; a new one can be read by its owner alone.")  # fmt: skip
@pass_settings
def keygen(settings: Settings, key_id: str | None, output: str | None) -> None:
    """Make a new root key.

    Prints the line of a keyring that holds it. The last line of a keyring is the key that new records are written with,
    so appending one rotates; `rekey` then rewrites the older records.
    """
    from millpond.crypto.keyring import Keyring

    line = Keyring.generate_key(key_id)
    if output is None:
        click.echo(line)
        return
    if os.path.exists(output):
        with open(output, encoding="utf-8") as file:
            text = file.read()
        Keyring.load(f"{text}\n{line}\n", source=output)  # refuses a key id that is there, before anything is written
        line = line if not text or text.endswith("\n") else f"\n{line}"
    descriptor = os.open(output, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    with open(descriptor, "a", encoding="utf-8") as file:
        file.write(line + "\n")
    name = line.strip().partition(":")[0]
    if settings.json:
        settings.output().record({"key_id": name, "keyring": output})
    else:
        settings.output().note(f"key {name} is the newest of {output}")


@click.command(cls=Command)
@pass_settings
def rekey(settings: Settings) -> None:
    """Rewrite everything that an older key encrypts with the newest one.

    Work goes on meanwhile; running it again finishes what was interrupted. Afterwards the older keys may go from the
    keyring.
    """
    if not settings.has_keyring:
        raise click.UsageError("no keyring: give --keyring, MILLPOND_KEYRING_FILE or MILLPOND_KEYRING")

    async def rewrite(pond: Pond) -> None:
        from millpond.cli.output import is_terminal

        output = settings.output()
        drawn = is_terminal(sys.stderr) and not settings.quiet

        def progress(count: int) -> None:
            if drawn:
                print(f"\r{count} records rewritten", end="", file=sys.stderr, flush=True)

        try:
            count = await pond.rekey(progress)
        finally:
            if drawn:
                print("\r\x1b[K", end="", file=sys.stderr, flush=True)
        if output.json:
            output.record({"rewritten": count})
        else:
            output.line(f"{count} records rewritten")

    settings.run(rewrite, existing=True)
