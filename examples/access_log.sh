#!/bin/sh
# Queues every line of an access log in an SQLite file, works them off, and says how it went. `make run` calls this.
#
#     sh examples/access_log.sh [LOG]
#
# On the way it kills a worker, so that one sees what becomes of the messages it held. Starts afresh each time.
set -eu

cd "$(dirname "$0")/.."
log=${1:-examples/data/access.log}
folder=build/access-log
queue=access-log

rm -rf "$folder"
mkdir -p "$folder"
export RESULTS="$folder/results.tsv"
export MILLPOND_STORE="sqlite:///$folder/queue.db"
: >"$RESULTS"

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
[ -t 1 ] && [ -z "${NO_COLOR:-}" ] || say() { printf '\n%s\n' "$*"; }

# Two seconds of visibility: what a killed worker held is free again soon. Three failures, and a line is given up.
options="--concurrency 8 --visibility 2 --backoff 0.2 --until-empty"

started=$(date +%s)
lines=$(wc -l <"$log" | tr -d ' ')

say "1. Queue the $lines lines of $log"
millpond enqueue "$queue" --lines --file "$log" --max-attempts 3

say "2. Start a worker, and kill it (-9) amid its work"
# shellcheck disable=SC2086
millpond work "$queue" $options --quiet -- sh examples/classify.sh 2>"$folder/killed.log" &
worker=$!
while kill -0 "$worker" 2>/dev/null && [ "$(wc -l <"$RESULTS")" -lt $((lines / 4)) ]; do sleep 0.1; done
kill -9 "$worker" 2>/dev/null || true
wait "$worker" 2>/dev/null || true
echo "killed after $(wc -l <"$RESULTS" | tr -d ' ') lines"

say "3. Start another; it finishes what is left, and what the first one held"
echo "(On the way, broken lines fail for good, and server errors are understood at the second attempt only.)"
# shellcheck disable=SC2086
millpond work "$queue" $options -- sh examples/classify.sh

say "4. What the log says"
awk -F'\t' '
    !seen[$1]++ { count[$4, $3]++; kinds[$4]; total[$4]++ }
    END {
        printf "%-10s %6s %6s %6s %6s %6s\n", "", "2xx", "3xx", "4xx", "5xx", "all"
        for (kind in kinds)
            printf "%-10s %6d %6d %6d %6d %6d\n", kind, count[kind, "2xx"], count[kind, "3xx"],
                count[kind, "4xx"], count[kind, "5xx"], total[kind] | "sort"
    }' "$RESULTS"

say "5. What could not be done: $queue's dead letters"
millpond dlq list "$queue"

finished=$(cut -f1 "$RESULTS" | sort -u | wc -l | tr -d ' ')
again=$(awk -F'\t' '$2 > 0 { seen[$1] } END { n = 0; for (id in seen) n++; print n }' "$RESULTS")
twice=$(($(wc -l <"$RESULTS") - finished))
dead=$(millpond dlq list "$queue" --limit 1000 --json | wc -l | tr -d ' ')

say "Summary"
printf '  %-14s %6d\n' enqueued "$lines" done "$finished" "dead letters" "$dead" lost $((lines - finished - dead))
printf '  %-14s %6d   (of those done: failed once, or held by the killed worker)\n' "with a retry" "$again"
printf '  %-14s %6d   (done when the worker was killed, but not acked yet: at least once)\n' "done twice" "$twice"
printf '  %-14s %6d s\n' time $(($(date +%s) - started))

[ $((finished + dead)) -eq "$lines" ] || { echo "The counts do not add up." >&2; exit 1; }
