#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Loci at work: a daemon on a temporary directory, the handbook of a fictional observatory, five
# questions. With --check it also registers facts drawn at random and must get them back exactly,
# and must be told that a question has no answer; any miss ends with a status other than 0.
#
#   demo.sh BUILD_DIR [--check]
set -euo pipefail
build=$1
check=${2:-}
here=$(dirname "${BASH_SOURCE[0]}")
data=$here/data
work=$(mktemp -d "${TMPDIR:-/tmp}/loci-demo-XXXXXX")
export LOCI_ADDRESS="unix:$work/socket"
loci=$build/loci
daemon=

cleanup() {
    if [ -n "$daemon" ]; then
        kill "$daemon" 2>/dev/null || true
        wait "$daemon" 2>/dev/null || true
    fi
    rm -rf "$work"
}
trap cleanup EXIT
trap 'exit 130' INT TERM

"$build/locid" --data "$work/data" --listen "$LOCI_ADDRESS" 2>"$work/log" &
daemon=$!
for _ in $(seq 600); do
    [ -S "$work/socket" ] && "$loci" status >/dev/null 2>&1 && break
    kill -0 "$daemon" 2>/dev/null || { cat "$work/log" >&2; exit 1; }
    sleep 0.1
done
"$loci" status

show() { printf '\n$ loci %s\n' "$*"; }
ask() { # NAME QUESTION: as a person would
    show "ask $1 \"$2\""
    "$loci" ask "$1" "$2"
}
field() { # one field of the last line of JSON on standard input
    python3 -c 'import json, sys; print(json.loads(sys.stdin.readlines()[-1])[sys.argv[1]])' "$1"
}

show "corpus create handbook"
"$loci" corpus create handbook
show "register handbook tests/data/handbook"
"$loci" register handbook "$data/handbook"

questions=$(python3 - "$data/handbook-questions.jsonl" <<'PY'
import json, sys
rows = [json.loads(line) for line in open(sys.argv[1], encoding="utf-8")]
for row in rows[:5]:
    print(row["question"])
PY
)
while IFS= read -r question; do ask handbook "$question"; done <<<"$questions"

if [ "$check" = --check ]; then
    printf '\n== check: three facts drawn at random\n'
    random() { od -An -N4 -tu4 /dev/urandom | tr -d ' '; }
    pick() { # one of the arguments
        shift $(($(random) % $#))
        echo "$1"
    }
    person=$(pick Marlow Ostrander Pell Quimby Radcliffe Stroud Thorne Upwood)
    questions=("What is the code of the $person locker?"
        "What is the password of the $person channel?"
        "Who is the keeper of the $person hut?")
    answers=($((1000 + $(random) % 9000))
        "$(pick lantern marzipan thistle walnut pepper cobalt saffron juniper velvet)"
        "$(pick Ada Bruno Clara Dmitri Elsa Felix) $(pick Greenaway Hollis Ingram Jessop Kimber)")
    printf '# Notices\n\n%s\n\n%s\n\n%s\n' "The code of the $person locker is ${answers[0]}." \
        "The password of the $person channel is ${answers[1]}." \
        "The keeper of the $person hut is ${answers[2]}." >"$work/notices.md"
    "$loci" register handbook "$work/notices.md"
    failed=0
    for i in 0 1 2; do
        answer=$("$loci" ask handbook "${questions[i]}" --json | field answer)
        if [ "$answer" = "${answers[i]}" ]; then
            echo "ok    ${questions[i]} $answer"
        else
            echo "WRONG ${questions[i]} $answer (registered: ${answers[i]})"
            failed=1
        fi
    done
    question=$(head -n 1 "$data/handbook-unanswerable.jsonl" | field question)
    found=$("$loci" ask handbook "$question" --json | field found)
    if [ "$found" = False ]; then
        echo "ok    $question no answer in this corpus"
    else
        echo "WRONG $question was answered, although nothing in the corpus tells"
        failed=1
    fi
    [ "$failed" -eq 0 ] || exit 1
fi

cat <<TEXT

That was Loci on a temporary directory, which is gone now. With your own documents:

  $build/locid --data ~/loci-data &
  $build/loci register notes ~/my-notes --create
  $build/loci ask notes "your question"
  $build/loci search notes "your question" -k 3
  $build/loci --help
TEXT
