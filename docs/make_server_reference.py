"""Writes docs/reference/server-settings.md and docs/reference/metrics.md from the server's own tables:
``python docs/make_server_reference.py``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from millpond.server.config import ServerConfig, format_bytes
from millpond.server.families import BUCKETS, FAMILIES
from millpond.server.options import SECTIONS, SETTINGS, Setting

FOLDER = Path(__file__).parent / "reference"

SETTINGS_INTRODUCTION = """\
# Settings of the server

<!-- Made by docs/make_server_reference.py from millpond.server.options; change that, then run it again. -->

Each can be given as an option of `millpond serve`, as an environment variable, or in the TOML file that `--config`
names; the first of these that says something counts. `millpond serve --show-config` prints what is in force, and where
each value came from. A name that is not in this table is an error.

Durations are seconds or carry a unit (`500ms`, `30s`, `5m`), sizes are bytes or carry one (`64KiB`, `100MiB`). A
setting `tls.cert` is written in the file as

```toml
[tls]
cert = "server.pem"
```
"""

METRICS_INTRODUCTION = """\
# Metrics of the server

<!-- Made by docs/make_server_reference.py from millpond.server.families; change that, then run it again. -->

`GET /metrics` tells Prometheus these, and OpenMetrics to those who accept it. Where the server wants tokens, it takes
one with `read:*/*`, or `metrics.public = true`. Besides, there are `process_*` of the Prometheus library (memory,
CPU, open files).

Counters are of this process since it started. `millpond_queue_*` are of the store, and so the same from each server
on it; take the largest, not the sum. On a store that charges for requests they are left out, because every scrape
would cost money. Queues beyond `metrics.queues` are counted together as the queue `(other)` of no namespace.
"""


def default(setting: Setting) -> str:
    """The default as one would write it."""
    value = getattr(ServerConfig(), setting.field)
    if value is None or value == ():
        return ""
    if setting.kind == "bytes":
        return f"`{format_bytes(value)}`"
    if setting.kind == "duration":
        return f"`{value:g}`"
    if setting.kind == "flag":
        return "`true`" if value else "`false`"
    return f"`{value}`"


def settings_page() -> str:
    """The page of settings."""
    lines = [SETTINGS_INTRODUCTION]
    for section in (None, *SECTIONS):
        title = "Where" if section is None else f"{section}: {SECTIONS[section]}"
        lines += [f"## {title}", "", "| setting | | default | option, environment |", "|---|---|---|---|"]
        for setting in SETTINGS:
            if setting.section == section:
                names = f"`{setting.flag}`, `{setting.variable}`"
                lines.append(f"| `{setting.place}` | {setting.help} | {default(setting)} | {names} |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def metrics_page() -> str:
    """The page of metrics."""
    lines = [METRICS_INTRODUCTION, "| metric | kind | labels | |", "|---|---|---|---|"]
    lines += list(_rows())
    bounds = ", ".join(f"{bound:g}" for bound in BUCKETS)
    lines += ["", f"The bounds of the histogram, in seconds: {bounds}."]
    return "\n".join(lines) + "\n"


def _rows() -> Iterator[str]:
    for family in FAMILIES:
        labels = ", ".join(f"`{label}`" for label in family.labels)
        yield f"| `{family.name}` | {family.kind} | {labels} | {family.help} |"


PAGES = {"server-settings": settings_page, "metrics": metrics_page}

if __name__ == "__main__":
    for name, made in PAGES.items():
        (FOLDER / f"{name}.md").write_text(made(), encoding="utf-8")
