#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Asking against corpus length: first token warm and cold, decoding speed, bytes read.

  bench_ask.py --text FOLDER|FILE.jsonl.xz [--tokens 4096 ...] [--modes ...] [--questions 20]
               [--long 3] [--rounds 3] [--build build/release]

Drives locid and loci. For each length books with needles in them are registered in a data
directory of their own; one JSON line describes the corpus, then one each mode. hierarchical,
squeezed and dense are asked without reading twice. Times are in ms, medians unless named p95.

first_token_ms      the service's own count, daemon and page cache warm; client_...: from the start
                    of the loci process to the first piece of the answer
fresh_...           the first question to a daemon just started, data in the page cache: extents
                    are opened and checked, squeezed mode is calibrated
cold_...            the same with every file of the data directory dropped from the page cache just
                    before; cold_resident_percent is what was left of it (the worst round),
                    cold_mib what the question brought in. The model and the programs stay in
                    memory, and so may the disk's own cache and a hypervisor's.
decode_tokens_per_s tokens after the first, of answers with >= 8 of them, at temperature 0
long_...            the same of answers with >= 20 tokens, sampled at temperature 3 because the
                    model's own answers are short; their text is noise
..._percent         index and K/V bytes read, of the K/V bytes that dense mode reads, for the
                    question and for a decoding step of an answer. Dense mode reads hashes and
                    segment numbers besides: more than 100. Reading twice ranks in one layer and
                    decodes without the corpus: its answer comes whole.

--text: xz-compressed JSON lines with the text in "t", or the folder of books.jsonl.xz.
"""
import argparse
import json
import os
import random
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, os.path.join(ROOT, "tests", "quality"))
import quality  # noqa: E402

CORPUS = "bench"
MODES = ("hierarchical", "squeezed", "dense", "read-twice")
ANSWER_TOKENS_MIN = 8
LONG_TOKENS_MIN = 20
LONG_TEMPERATURE = "3"
MIB = 1 << 20


def ask(daemon, mode, question, *flags):
    """The last line of loci ask, with client_first_token_ms."""
    how = ["--read-twice"] if mode == "read-twice" else ["--mode", mode, "--no-read-twice"]
    begun, first, answer = time.perf_counter(), None, None
    process = subprocess.Popen([daemon.cli, "ask", CORPUS, question, *how, *flags, "--json",
                                "--address", daemon.address], stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        now, answer = time.perf_counter(), json.loads(line)
        if first is None and answer.get("event") == "delta":
            first = now
    if process.wait() != 0:
        raise RuntimeError(f"loci ask ended with {process.returncode}")
    answer["client_first_token_ms"] = 1e3 * ((first or now) - begun)
    return answer


# --- page cache ------------------------------------------------------------------------------

def files(folder):
    return [os.path.join(at, name) for at, _, names in os.walk(folder) for name in sorted(names)]


def evict(folder):
    """Drops every file from the page cache. Pages that a process has mapped and touched stay."""
    for path in files(folder):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)  # only clean pages go
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def resident(folder):
    """(bytes in the page cache, bytes of whole pages) of all files, as fincore of util-linux
    counts them."""
    done = subprocess.run(["fincore", "--bytes", "--raw", "--noheadings", "--output", "RES,SIZE",
                           *files(folder)], capture_output=True, text=True)
    rows = [line.split() for line in done.stdout.splitlines()]
    if not rows:
        raise RuntimeError(f"fincore: {done.stderr.strip()}")
    page = os.sysconf("SC_PAGESIZE")
    return sum(int(r[0]) for r in rows), sum(-(-int(r[1]) // page) * page for r in rows)


def read_all(folder):
    """Reads every file in sequence; MiB/s."""
    begun, total = time.perf_counter(), 0
    for path in files(folder):
        with open(path, "rb", buffering=0) as file:
            while chunk := file.read(4 * MIB):
                total += len(chunk)
    return total / MIB / (time.perf_counter() - begun)


# --- what is measured ------------------------------------------------------------------------

def median_of(values, digits=1):
    return round(quality.median(values), digits) if values else None


def speed(answers, tokens_min):
    """Median tokens/s of the answers that are long enough, and their number. The service divides
    all tokens by the time; the first one took no step, but the end of the answer took one."""
    rates = []
    for answer in answers:
        usage = answer["usage"]
        if usage["answer_tokens"] >= tokens_min:
            steps = usage["answer_tokens"] - (answer["stop"] != "eos")
            rates.append(usage["decode_tokens_per_s"] * steps / usage["answer_tokens"])
    return median_of(rates), len(rates)


def byte_row(answers, dense):
    """Median and p95 of the bytes read, for the question and for a decoding step."""
    row = {}
    for what, percents in zip(("question", "decode"), zip(*map(dense.percents, answers))):
        known = [p for p in percents if p is not None]
        row[f"{what}_percent"] = median_of(known, 3)
        row[f"{what}_percent_p95"] = round(quality.quantile(known, .95), 3) if known else None
    return row


def measure_warm(daemon, mode, values, options):
    """Daemon and page cache warm: all questions, then answers long enough to time decoding."""
    texts = [quality.QUESTION.format(word) for word in values]
    counted = "hierarchical" if mode == "read-twice" else mode
    dense = quality.DenseBytes(lambda *args: ask(daemon, counted, *args), texts[0])
    ask(daemon, mode, texts[0])
    answers = [ask(daemon, mode, text) for text in texts]
    first = [a["usage"]["first_token_ms"] for a in answers]
    row = {"questions": len(texts),
           "right": sum(a["answer"].strip() == v for a, v in zip(answers, values.values())),
           "first_token_ms": median_of(first),
           "first_token_ms_p95": round(quality.quantile(first, .95), 1),
           "client_first_token_ms": median_of([a["client_first_token_ms"] for a in answers]),
           "total_ms": median_of([a["usage"]["total_ms"] for a in answers])}
    if mode == "read-twice":
        whole = [100 * a["usage"]["question_read_bytes"] / dense.question for a in answers]
        return {**row, "question_percent": median_of(whole, 3),
                "question_percent_p95": round(quality.quantile(whole, .95), 3)}
    row["decode_tokens_per_s"], row["decode_answers"] = speed(answers, ANSWER_TOKENS_MIN)
    row["dense_step_mib"] = round(dense.step / MIB, 2)
    row.update(byte_row(answers, dense))
    drawn = sample_long(daemon, mode, texts, options.long)
    row["long_decode_tokens_per_s"], row["long_answers"] = speed(drawn, LONG_TOKENS_MIN)
    if drawn:
        row["long_decode_percent"] = byte_row(drawn, dense)["decode_percent"]
    return row


def sample_long(daemon, mode, texts, count):
    """Up to `count` answers of LONG_TOKENS_MIN tokens and more."""
    drawn = []
    for seed in range(1, 2 * count + 1):
        answer = ask(daemon, mode, texts[seed % len(texts)], "--temperature", LONG_TEMPERATURE,
                     "--seed", str(seed), "--max-tokens", "32")
        if answer["usage"]["answer_tokens"] >= LONG_TOKENS_MIN:
            drawn.append(answer)
        if len(drawn) == count:
            break
    return drawn


def measure_start(daemon, mode, values, options, cold):
    """The first question after a start, data in the page cache or dropped from it."""
    texts = [quality.QUESTION.format(word) for word in values]
    first, client, left, brought = [], [], [], []
    for number in range(options.rounds):
        daemon.stop()
        if cold:
            evict(daemon.data)
        daemon.start()
        if cold:
            evict(daemon.data)  # what starting has read
        before, size = resident(daemon.data)
        answer = ask(daemon, mode, texts[number % len(texts)])
        first.append(answer["usage"]["first_token_ms"])
        client.append(answer["client_first_token_ms"])
        left.append(100 * before / size)
        brought.append((resident(daemon.data)[0] - before) / MIB)
    prefix = "cold" if cold else "fresh"
    row = {f"{prefix}_first_token_ms": median_of(first),
           f"{prefix}_client_first_token_ms": median_of(client)}
    if cold:
        row.update(cold_resident_percent=round(max(left), 3), cold_mib=median_of(brought))
    else:
        row["fresh_resident_percent"] = round(min(left), 3)
    return row


def measure(paragraphs, options):
    """One corpus."""
    rng = random.Random(options.seed)
    values = quality.plant(paragraphs, quality.make_words(options.questions, rng), rng)
    with quality.Daemon(options.build) as daemon:
        daemon.run("corpus", "create", CORPUS)
        done = daemon.last("register", CORPUS, quality.write_books(daemon, paragraphs))
        daemon.wait_merged(CORPUS)
        backend = daemon.last("status").get("backend")
        rows = {mode: {"bench": "ask", "mode": mode, "tokens": done["tokens"]}
                for mode in options.modes}
        for mode in options.modes:
            rows[mode].update(measure_warm(daemon, mode, values, options))
        daemon.stop()
        evict(daemon.data)
        device = read_all(daemon.data)
        daemon.start()  # drops what registration has left in logs
        quality.emit(bench="ask", corpus=CORPUS, backend=backend, segments=done["segments"],
                     tokens=done["tokens"], mib_on_disk=round(resident(daemon.data)[1] / MIB, 1),
                     device_mib_per_s=round(device))
        for cold in (False, True):
            for mode in options.modes if options.rounds else ():
                rows[mode].update(measure_start(daemon, mode, values, options, cold))
        for row in rows.values():
            quality.emit(**row)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--text", required=True)
    parser.add_argument("--tokens", type=int, nargs="+",
                        default=[4096, 32768, 131072, 524288, 1048576])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--questions", type=int, default=20)
    parser.add_argument("--long", type=int, default=3, help="sampled answers a mode; 0 = none")
    parser.add_argument("--rounds", type=int, default=3,
                        help="starts a mode, warm and cold each; 0 = none")
    parser.add_argument("--build", default=os.path.join(ROOT, "build/release"))
    parser.add_argument("--seed", type=int, default=5)
    options = parser.parse_args()
    if options.questions < 1:
        parser.error("--questions must be at least 1")
    for tokens in options.tokens:
        characters = int(tokens * quality.BYTES_A_TOKEN)
        measure(quality.book_paragraphs(options.text, characters, options.seed), options)


if __name__ == "__main__":
    main()
