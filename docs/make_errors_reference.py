"""Writes docs/reference/errors.md from `millpond.errors`: ``python docs/make_errors_reference.py``.

Names, meanings, codes and the tree come from the code. Cause and cure are written here, one entry per class; a class
without one stops the script, and the test that runs it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from millpond import errors
from millpond.cli.runner import CannotStart
from millpond.worker.processes import ProcessDied

PAGE = Path(__file__).parent / "reference" / "errors.md"

INTRODUCTION = """\
# Errors

<!-- Made by docs/make_errors_reference.py from millpond.errors; change those, then run it again. -->

Everything that Millpond raises on purpose is a `MillpondError`; all of them can be imported from `millpond`. What else
comes out of it is a bug, an `OSError` of a file that you handed over, or a cancellation.

**code** is stable, for logs and programs; the command prints it in brackets at the end of its error line, and as `code`
with `--json`. **Retry** says whether the very same call may succeed later, without anybody doing anything
(`error.retryable`). **HTTP** is the status that fits, should you pass it on to a client (`error.http_status`).

```python
import millpond

with millpond.connect_sync("sqlite:///work.db") as pond:
    try:
        pond.queue("orders").enqueue("text")
    except millpond.MillpondError as error:
        print(error.code, error.retryable)
```

```text
invalid_input False
```
"""

CURES: dict[type[errors.MillpondError], tuple[str, str]] = {
    errors.MillpondError: (
        "The root of the tree; raised as one of the classes below.",
        "Catch it to catch them all.",
    ),
    errors.InvalidInput: (
        "An argument has the wrong type, is out of range, or two of them contradict each other. Nothing was written.",
        "Fix the call; the text says which argument and what it may be. It is a `ValueError`, too. On the command line "
        "also: a URL, a keyring or a line of JSON that cannot be right.",
    ),
    errors.InvalidQueue: (
        "A queue or namespace is empty, longer than 128 bytes, `.` or `..`, or has other characters than `a-z 0-9 . "
        "_ -`.",
        "Use another name. Upper case is lowered, not refused.",
    ),
    errors.InvalidMessageId: (
        "What was given as a message id is not a UUID.",
        "Pass on the id as `enqueue` or `receive` gave it. Ids of your own must be UUIDs, for instance "
        "`str(uuid.uuid4())`.",
    ),
    errors.TooLarge: (
        "Payload, attributes, state, key or error exceed their limit, or a payload exceeds what `read(limit=…)` "
        "allows.",
        "Make it smaller, put the data elsewhere and enqueue its name, stream it, or raise the limit in `Config`.",
    ),
    errors.MessageNotFound: (
        "No message with this id is in the queue: it was acked, removed, has expired, or never was; or it is in "
        "another "
        "queue, or not among the dead letters where those were asked for.",
        "Check queue and namespace. When you only look, take it as gone. It is a `LookupError`, too.",
    ),
    errors.LeaseLost: (
        "The text says which: the message was delivered again since (the lease ended unanswered); it was given back or "
        "redriven; it is a dead letter; it is gone; or this lease was never given, because lease id or token are not "
        "from a delivery of this message. Nothing was changed.",
        "Stop working on the message; do not repeat the answer. If it happens often: longer leases, `extend` while you "
        "work, or fewer messages per `receive`.",
    ),
    errors.StateConflict: (
        "Somebody changed the workflow state since it was read. Only `QueueService` with an ETag raises it.",
        "Load the state again, then decide.",
    ),
    errors.TooManyConsumers: (
        "`Config.max_consumers` (4,096) calls of `receive(wait=…)` are waiting in this process.",
        "Let fewer tasks wait, each taking more messages (`count`), or raise the cap.",
    ),
    errors.Unauthorized: (
        "The request to a server carried no token or certificate, or one that has ended or that the server never had.",
        "Give the client a token that holds, or the certificate; on the server, see its list of tokens.",
    ),
    errors.Forbidden: (
        "The token or certificate is known to the server, but does not allow this on this queue or namespace.",
        "Use one that does, or have its scopes widened on the server. Repeating the call will not help.",
    ),
    errors.Throttled: (
        "The server slows producers, and at last consumers, down because its store or process is loaded.",
        "Wait for as long as the answer says (Retry-After), then send it again; the client does so by itself. If it "
        "happens often, the server needs a faster disk, or a second one.",
    ),
    errors.PayloadNotLoaded: (
        "`message.payload` of a payload that is stored apart, or anything but an answer on a handle made from ids.",
        "`async for chunk in message.stream()`, or `await message.read()`; for a handle, `queue.get(id)`.",
    ),
    errors.StoreError: (
        "The storage failed in a way that has no class of its own: permissions, a missing folder, an I/O error.",
        "The text names the file and the reason. After one from a write do not assume that it was not written; "
        "repeat it "
        "with the same `message_id` or `dedup_key`.",
    ),
    errors.StoreBusy: (
        "Another process has held the write lock for longer than `busy_timeout` (10 s), or a record changed too often "
        "while it was being written.",
        "Try again. If it stays: look for a stopped process that has the store open (`fuser work.db`).",
    ),
    errors.TaskFailed: (
        "A task's call was given up: it is a dead letter. `kind` and `text` are what its function raised last.",
        "The error is in the dead letter, with its traceback: `millpond dlq show`. Mend the cause, redrive it, and the "
        "`result` of its handle can be asked again.",
    ),
    errors.StoreFull: (
        "The disk, or the quota, has no room left. Nothing of this call was written.",
        "Free some space; the pond need not be reopened.",
    ),
    errors.StoreClosed: (
        "The pond was closed, or never opened, or it was opened before a fork; waiting calls get it when `close` is "
        "called.",
        "Open a pond (in the child, after a fork). While you are shutting down, end the task.",
    ),
    errors.StoreMismatch: (
        "The file is not a Millpond store, is from a newer Millpond, cannot have a write-ahead log where it lies, or "
        "is "
        "not encrypted although a keyring was given.",
        "Check the URL; upgrade Millpond; use a local disk; leave out the keyring.",
    ),
    errors.StoreCorrupt: (
        "The file, or a record, a policy or a payload in it, is damaged.",
        "One record: `millpond verify`, then `discard-unreadable`. A policy: `policy reset`. A payload: take the "
        "message from a backup, or bury it. The file: stop everything, keep a copy, restore a backup, "
        "and find the cause (see the [checklist](../production/checklist.md)).",
    ),
    errors.CryptoError: (
        "The root of the two below.",
        "See there.",
    ),
    errors.UnknownKey: (
        "The record, or the store itself, was written under a root key that the keyring lacks, or no keyring was "
        "given.",
        "Give the keyring (`--keyring`, `MILLPOND_KEYRING_FILE`), with all keys that were ever used and not rekeyed.",
    ),
    errors.Tampered: (
        "What is stored does not open: it was changed, cut or moved, or the key of that id is another one.",
        "Compare the keyring with that of the writer. If it is right, somebody or something changed the storage.",
    ),
    errors.StoreUnreachable: (
        "Over HTTP only: none of the servers in the URL could be connected to, or answered, within the time-out.",
        "Start the server, or correct the URL; the text says what each address said. The client has tried again and "
        "again by then; enqueues and answers may be repeated.",
    ),
    errors.OutcomeUnknown: (
        "Stores in a bucket and servers only: a write was sent, its reply was lost, and it could neither be found out "
        "what became of it nor be sent again.",
        "As after any other `StoreError` of a write: it may have been written, or be written a little later. Repeat an "
        "enqueue with the same `message_id` or `dedup_key`; after an answer, the message may come again.",
    ),
    CannotStart: (
        "Command line only: the program that `millpond work` is to run cannot be started. The message was given back.",
        "Check the path and its permissions.",
    ),
    ProcessDied: (
        'Workers only, as a last error: the process in which the handler ran (`run_in="process"`) was killed '
        "or ended by itself. One failure is counted, and the message comes back; other messages are not affected.",
        "The text has the exit code or the signal. SIGKILL is often the kernel, out of memory; SIGSEGV a library in C.",
    ),
}


def tree(kind: type[errors.MillpondError], level: int = 0) -> Iterator[tuple[int, type[errors.MillpondError]]]:
    """The classes below one, each with its depth, in the order of the source."""
    yield level, kind
    for below in kind.__subclasses__():
        # Those that a user meets: `Crash` of the store that fails on purpose, for one, is for tests.
        if below.__module__ == errors.__name__:
            yield from tree(below, level + 1)


def page() -> str:
    """The page's text."""
    found = [*tree(errors.MillpondError), (0, CannotStart), (0, ProcessDied)]
    missing = [kind.__name__ for _, kind in found if kind not in CURES]
    if missing:
        raise SystemExit(f"no cause and cure in {Path(__file__).name} for {', '.join(missing)}")
    lines = [INTRODUCTION, "| class | code | retry | HTTP |", "|---|---|---|---|"]
    for level, kind in found:
        name = f"{' · ' * level}[`{kind.__name__}`](#{kind.__name__.lower()})".strip()
        lines.append(f"| {name} | `{kind.code}` | {'yes' if kind.retryable else 'no'} | {kind.http_status} |")
    for _, kind in found:
        cause, cure = CURES[kind]
        meaning = " ".join((kind.__doc__ or "").split())
        lines += ["", f"## {kind.__name__}", "", f"`{kind.code}`: {meaning}", "", f"**Cause.** {cause}", ""]
        lines.append(f"**Cure.** {cure}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
