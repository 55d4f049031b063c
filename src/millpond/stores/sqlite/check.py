"""What ``verify`` looks at: the file's structure, and each thing that is written down twice."""

from __future__ import annotations

from itertools import islice

import apsw

from millpond.stores.base import Problem
from millpond.stores.sqlite.schema import (
    BLOCKED,
    BLOCKED_LEASED,
    BUCKET,
    BYTES,
    CHUNK_BITS,
    DEAD,
    FREE,
    INSERTED,
    LEASED,
)

_ENOUGH = 100
"""Problems of one kind after which the rest of that kind is not listed."""

_QUERIES: tuple[tuple[str, str], ...] = (
    (
        "its body is missing",
        "SELECT 'message '||id FROM message m WHERE NOT EXISTS(SELECT 1 FROM body WHERE seq=m.seq)",
    ),
    (
        "has no message",
        "SELECT 'body '||seq FROM body b WHERE NOT EXISTS(SELECT 1 FROM message WHERE seq=b.seq)",
    ),
    (
        "has no message",
        "SELECT 'state '||seq FROM state s WHERE NOT EXISTS(SELECT 1 FROM message WHERE seq=s.seq)",
    ),
    (
        "says that it has a state when it has none, or the reverse",
        "SELECT 'message '||id FROM message m WHERE stateful<>EXISTS(SELECT 1 FROM state WHERE seq=m.seq)",
    ),
    (
        "its queue is missing",
        "SELECT 'message '||id FROM message m WHERE NOT EXISTS(SELECT 1 FROM queue WHERE id=m.queue)",
    ),
    (
        "is dead but among those that hand-out looks at",
        "SELECT 'message '||id FROM message WHERE box<>0 AND lane IS NOT NULL",
    ),
    (
        "stands under another priority than its own",
        "SELECT 'message '||id FROM message WHERE lane IS NOT NULL AND lane<>priority",
    ),
    (
        "has a group and no place in it, or the reverse",
        "SELECT 'message '||id FROM message WHERE (grp IS NULL)<>(place IS NULL)",
    ),
    (
        "is blocked though it is the first of its group, or has none",
        "SELECT 'message '||id FROM message m WHERE box=0 AND lane IS NULL AND (grp IS NULL OR NOT EXISTS("
        "SELECT 1 FROM message e WHERE e.queue=m.queue AND e.grp=m.grp AND e.grp IS NOT NULL AND e.box=0 "
        "AND e.place<m.place))",
    ),
    (
        "is not blocked though an earlier one of its group is there",
        "SELECT 'message '||id FROM message m WHERE box=0 AND lane IS NOT NULL AND grp IS NOT NULL AND EXISTS("
        "SELECT 1 FROM message e WHERE e.queue=m.queue AND e.grp=m.grp AND e.grp IS NOT NULL AND e.box=0 "
        "AND e.place<m.place)",
    ),
    (
        "its payload is missing",
        "SELECT 'message '||id FROM message m WHERE external AND NOT EXISTS("
        "SELECT 1 FROM blob WHERE queue=m.queue AND id=m.id AND attached AND size IS NOT NULL)",
    ),
    (
        "its payload is incomplete",
        "SELECT 'message '||id FROM blob b WHERE size IS NOT NULL AND id<>'' AND size<>("
        f"SELECT ifnull(sum(length(data)),0) FROM chunk "
        f"WHERE id>=b.blob<<{CHUNK_BITS} AND id<(b.blob+1)<<{CHUNK_BITS})",
    ),
    (
        "belongs to no blob",
        f"SELECT 'chunk '||id FROM chunk c WHERE NOT EXISTS(SELECT 1 FROM blob WHERE blob=c.id>>{CHUNK_BITS})",
    ),
    (
        "has a number that the sequence has yet to give out",
        "SELECT 'message '||id FROM message WHERE max(seq,ifnull(place,0))>=(SELECT next FROM sequence)",
    ),
)

_KIND = (
    f"CASE WHEN box<>0 THEN {DEAD} WHEN lane IS NULL THEN iif(leased,{BLOCKED_LEASED},{BLOCKED}) "
    f"ELSE iif(leased,{LEASED},{FREE}) END"
)
_RECOUNT = (
    f"SELECT queue,kind,iif(kind IN ({BLOCKED},{DEAD}),0,bucket) AS bucket,count(*) AS n FROM "
    # Buckets are counted downwards also before 1970, as Python's // does.
    f"(SELECT queue,{_KIND} AS kind,(due-((due%{BUCKET})+{BUCKET})%{BUCKET})/{BUCKET} AS bucket FROM message) "
    "GROUP BY 1,2,3 "
    f"UNION ALL SELECT queue,{BYTES},0,sum(size) FROM message WHERE box=0 GROUP BY queue HAVING sum(size)<>0"
)
_COUNTERS = (
    f"SELECT q.namespace||'/'||q.name,c.n,r.n FROM counter c FULL JOIN ({_RECOUNT}) r "
    "ON r.queue=c.queue AND r.kind=c.kind AND r.bucket=c.bucket JOIN queue q ON q.id=ifnull(c.queue,r.queue) "
    # What was ever inserted cannot be counted again.
    f"WHERE c.n IS NOT r.n AND c.kind IS NOT {INSERTED}"
)


def check(connection: apsw.Connection) -> list[Problem]:
    """Everything that is wrong, in one read transaction (during which the write-ahead log cannot start anew)."""
    connection.execute("BEGIN")
    try:
        broken = [row[0] for row in connection.execute(f"PRAGMA integrity_check({_ENOUGH})") if row[0] != "ok"]
        if broken:
            return [Problem("database", what) for what in broken]
        problems = [
            Problem(row[0], what) for what, query in _QUERIES for row in connection.execute(f"{query} LIMIT {_ENOUGH}")
        ]
        counters = connection.execute(_COUNTERS)
        for queue, stored, counted in islice(counters, _ENOUGH):
            problems.append(Problem(f"queue {queue}", f"a counter says {stored or 0}, the records say {counted or 0}"))
        return problems
    finally:
        if connection.in_transaction:  # an I/O error ends it, and is what the caller has to hear
            connection.execute("COMMIT")
