#!/bin/sh
# Compresses the files of a folder, several at a time, and says what could not be done. No Python needed: a queue, and a
# command for each message.
#
#     sh examples/compress.sh FOLDER
#
# May be interrupted and started again at any time: what is done is done, and what was under way is begun anew.
set -eu

folder=$1
export MILLPOND_STORE="${MILLPOND_STORE:-sqlite:///$folder/.compress.db}"

# Each file once, however often this is started: --dedup-lines makes the name the key that tells a second one.
find "$folder" -type f ! -name '*.gz' ! -path '*/.*' | sort |
    millpond enqueue compress --lines --dedup-lines --max-attempts 2 --quiet

# The command gets the file's name on stdin. Fails it twice, the file is a dead letter, with the command's last words.
millpond work compress --concurrency 4 --backoff 0.1 --until-empty --quiet -- sh -c '
    IFS= read -r file || [ -n "$file" ]
    [ -e "$file" ] || exit 0                 # done the last time, and its message was not acked any more
    [ -s "$file" ] || { echo "$file is empty" >&2; exit 65; }
    gzip -c "$file" >"$file.part" && mv "$file.part" "$file.gz" && rm "$file"
' 2>/dev/null

millpond dlq list compress
