#!/bin/sh
# Reads one line of an access log on stdin and appends what it is to $RESULTS, one line:
#
#     message id <tab> failures so far <tab> status class <tab> kind of request
#
# Exit codes, as in sysexits.h: 0 done, 65 this is no access-log line, 75 not now, try again.
#
# Shell builtins only: a process for each message is dear enough.
set -euf

IFS= read -r line || [ -n "$line" ]

request=${line#*\"}
after=${request#*\"}
request=${request%%\"*}
case $request in
    [A-Z]*' /'*' HTTP/'[12].[01]) ;;
    *)
        printf 'not a request: %.60s\n' "$line" >&2
        exit 65
        ;;
esac

set -- $after
case ${1:-} in
    [1-5][0-9][0-9]) status=${1%??}xx ;;
    *)
        printf 'no status: %.60s\n' "$line" >&2
        exit 65
        ;;
esac

# Stands in for a service that is not always there: a server error is only understood at the second attempt.
if [ "$status" = 5xx ] && [ "$MILLPOND_FAILURES" -eq 0 ]; then
    printf 'server error not understood yet: %.60s\n' "$request" >&2
    exit 75
fi

path=${request#* }
path=${path%% *}
path=${path%%\?*}
case $path in
    /static/* | /downloads/* | /favicon.ico) kind=file ;;
    /api/*) kind=api ;;
    /search) kind=search ;;
    /healthz | /feed.xml) kind=robot ;;
    *) kind=page ;;
esac

# The id goes along because delivery is at least once: should this line be written twice, whoever counts can tell.
printf '%s\t%s\t%s\t%s\n' "$MILLPOND_MESSAGE_ID" "$MILLPOND_FAILURES" "$status" "$kind" >>"$RESULTS"
