"""``millpond token``: bearer tokens of a server."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

from millpond.cli.durations import Duration
from millpond.cli.settings import Command, Group, Option, Settings, option, pass_settings

if TYPE_CHECKING:
    from millpond.server.tokens import Token

DEFAULT_FILE = "tokens.toml"


_file = click.option(
    "--tokens",
    cls=Option,
    default=DEFAULT_FILE,
    metavar="FILE",
    help="File of tokens: what the server's setting auth.tokens names.",
)


@click.group(cls=Group)
def token() -> None:
    """Bearer tokens of a server: make, list, revoke.

    The file holds a hash of each; a server that runs sees changes within seconds.
    """


def _load(path: str) -> list[Token]:
    from millpond.server import tokens as file

    return file.load(path) if os.path.exists(path) else []


@token.command(cls=Command)
@click.argument("name")
@click.argument("grants", nargs=-1, required=True, metavar="GRANT...")
@option("--expires-in", type=Duration(positive=True), environment=False, help="Refuse it after so long; default never.")
@_file
@pass_settings
def create(settings: Settings, name: str, grants: tuple[str, ...], expires_in: float | None, tokens: str) -> None:
    """Make a token NAME that may do what the GRANTs say, and print it: it cannot be shown again.

    A GRANT is SCOPES:NAMESPACE/QUEUE. Scopes are read (look, count), write (enqueue), consume (receive and answer) and
    admin (purge, redrive, policies), or * for all. In the names * stands for any characters.

    \b
    millpond token create shop 'write:default/orders-*'
    millpond token create worker 'consume,read:default/orders-*' --expires-in 90d
    millpond token create prometheus 'read:*/*'
    """
    from millpond.model.clock import SystemClock
    from millpond.model.ids import IdSource
    from millpond.server import tokens as file

    clock = SystemClock()
    known = _load(tokens)
    made, text = file.create(
        name,
        [file.parse_grant(grant) for grant in grants],
        random_bytes=IdSource(clock).random,
        now=clock.now_ms(),
        expires_at=None if expires_in is None else clock.now_ms() + round(expires_in * 1000),
    )
    file.save(tokens, [*known, made])
    if settings.json:
        settings.output().record({**_fields(made), "token": text})
        return
    click.echo(text)
    settings.output().note(f"token {made.id} ({name}) is in {tokens}; keep its text, it is not in there")


@token.command(name="list", cls=Command)
@_file
@pass_settings
def list_(settings: Settings, tokens: str) -> None:
    """Show the tokens of a file: id, name, grants, when made, when over. Never the tokens themselves."""
    from millpond.model.clock import SystemClock
    from millpond.server import tokens as file

    output = settings.output()
    now = SystemClock().now_ms()
    rows = []
    for one in file.load(tokens):
        fields = _fields(one) | {"expired": one.expired(now)}
        if settings.json:
            output.record(fields)
        state = "expired" if fields["expired"] else fields["expires"] or "never"
        rows.append((one.id, one.name, " ".join(map(str, one.grants)), fields["created"], state))
    if not settings.json:
        output.rows(("id", "name", "may", "created", "expires"), rows)


@token.command(cls=Command)
@click.argument("id")
@_file
@pass_settings
def revoke(settings: Settings, id: str, tokens: str) -> None:
    """Take the token with this ID out of the file. Running requests end; the next one is refused."""
    from millpond.server import tokens as file

    known = file.load(tokens)
    left = [one for one in known if one.id != id]
    if len(left) == len(known):
        raise click.ClickException(f"there is no token with id {id} in {tokens}; `millpond token list` shows them")
    file.save(tokens, left)
    settings.output().note(f"token {id} is revoked")


def _fields(one: Token) -> dict[str, object]:
    from millpond.server.tokens import time_text

    return {
        "id": one.id,
        "name": one.name,
        "allow": [str(grant) for grant in one.grants],
        "created": time_text(one.created_at),
        "expires": None if one.expires_at is None else time_text(one.expires_at),
    }
