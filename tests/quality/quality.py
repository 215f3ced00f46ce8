#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Quality of answers through the service: needles and questions on real text.

Drives the `loci` command line against a daemon of its own, prints one JSON line a row.

  quality.py qa --data FOLDER        1,000 questions of qa_valid.jsonl.xz, all paragraphs registered
  quality.py needles --data FOLDER   needles in public-domain books, at given sizes and modes
  quality.py handbook                the handbook's questions, answerable or not

FOLDER holds the data files (they are not part of the repository).
"""
import argparse
import collections
import json
import lzma
import os
import random
import re
import string
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def normalize(text):
    """SQuAD's normalisation: lower case, no punctuation, no articles, single spaces."""
    text = "".join(c for c in text.lower() if c not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def f1(answer, gold):
    a, g = normalize(answer).split(), normalize(gold).split()
    if not a or not g:
        return float(a == g)
    same = sum((collections.Counter(a) & collections.Counter(g)).values())
    return 0.0 if same == 0 else 2 * same / (len(a) + len(g))


class Daemon:
    """A locid on a temporary data directory, driven through the command line."""

    def __init__(self, build, data=None, extra=()):
        self.folder = tempfile.mkdtemp(prefix="loci-quality-")
        self.data = data or os.path.join(self.folder, "data")
        self.address = "unix:" + os.path.join(self.folder, "locid.sock")
        self.cli = os.path.join(build, "loci")
        log = open(os.path.join(self.folder, "locid.log"), "w")
        self.process = subprocess.Popen(
            [os.path.join(build, "locid"), "--data", self.data, "--listen", self.address, *extra],
            stdout=log, stderr=log)
        for _ in range(300):
            if self.run("status", check=False).returncode == 0:
                return
            time.sleep(0.1)
        sys.exit(f"locid did not start; see {log.name}")

    def run(self, *args, check=True, text=None):
        done = subprocess.run([self.cli, *args, "--address", self.address], input=text,
                              capture_output=True, text=True)
        if check and done.returncode != 0:
            raise RuntimeError(f"loci {' '.join(args)}: {done.stderr.strip()}")
        return done

    def last(self, *args):
        return json.loads(self.run(*args, "--json").stdout.strip().splitlines()[-1])

    def close(self):
        self.process.terminate()
        self.process.wait(60)


def emit(**row):
    print(json.dumps(row), flush=True)


def median(values):
    values = sorted(values)
    return values[len(values) // 2] if values else 0


def quantile(values, share):
    values = sorted(values)
    return values[min(len(values) - 1, int(share * len(values)))] if values else 0


def run_qa(options):
    path = os.path.join(options.data, "qa_valid.jsonl.xz")
    paragraphs = [json.loads(line) for line in lzma.open(path, "rt", encoding="utf-8")]
    clean = [re.sub(r"\s+", " ", p["c"]).strip() for p in paragraphs]
    questions = [(i, re.sub(r"\s+", " ", q).strip(), re.sub(r"\s+", " ", a).strip())
                 for i, p in enumerate(paragraphs) for q, a in p["q"]]
    random.Random(options.seed).shuffle(questions)
    questions = questions[:options.count]
    daemon = Daemon(options.build)
    daemon.run("corpus", "create", "qa")
    rows = "".join(json.dumps({"id": f"p{i}", "text": text}) + "\n" for i, text in enumerate(clean))
    jsonl = os.path.join(daemon.folder, "qa.jsonl")
    with open(jsonl, "w", encoding="utf-8") as out:
        out.write(rows)
    done = daemon.last("register", "qa", jsonl)
    emit(row="register", **{k: done[k] for k in ("documents", "tokens", "segments", "seconds")})
    ranks = []
    for gold, question, _ in questions:
        hits = daemon.last("search", "qa", question, "-k", "20")["hits"]
        documents = list(dict.fromkeys(h["document"] for h in hits))
        ranks.append(documents.index(f"p{gold}") if f"p{gold}" in documents else 1000)
    emit(row="search", questions=len(ranks), seed=options.seed,
         **{f"recall@{k}": round(100 * sum(r < k for r in ranks) / len(ranks), 1) for k in (1, 4, 8)})
    if options.search_only:
        return daemon.close()
    scores, forced, exact, found, times = [], [], [], [], []
    for _, question, gold in questions:
        events = [json.loads(line) for line in daemon.run("ask", "qa", question, "--json").stdout.splitlines()]
        answer = events[-1]
        readings = [e for e in events[:-1] if "score" in e]
        best = max(readings, key=lambda e: e["score"])["answer"] if readings else ""
        scores.append(f1(answer["answer"], gold))
        forced.append(f1(best, gold))  # the likeliest reading, whether or not it was believed
        exact.append(normalize(answer["answer"]) == normalize(gold))
        found.append(answer["found"])
        times.append(answer["usage"]["total_ms"])
    emit(row="read_twice", questions=len(scores), f1=round(100 * sum(scores) / len(scores), 2),
         f1_forced=round(100 * sum(forced) / len(forced), 2), exact=round(100 * sum(exact) / len(exact), 2),
         found=round(100 * sum(found) / len(found), 1), median_ms=round(median(times)))
    daemon.close()


NEEDLE = "One of the special magic numbers for {} is: {}."
QUESTION = "What is the special magic number for {} mentioned in the provided text?"


def book_paragraphs(folder, characters, seed):
    """Paragraphs of public-domain books, about `characters` in all."""
    books = [json.loads(line)["t"] for line in
             lzma.open(os.path.join(folder, "books.jsonl.xz"), "rt", encoding="utf-8")]
    random.Random(seed).shuffle(books)
    out, total = [], 0
    for book in books:
        for part in re.split(r"\n\s*\n", book.replace("\r", "")):
            part = re.sub(r"\s+", " ", part).strip()
            if len(part) > 60:
                out.append(part)
                total += len(part) + 2
                if total >= characters:
                    return out
    return out


def plant(paragraphs, words, rng):
    """Puts one needle for each word into a paragraph of its own; returns word -> number."""
    places = rng.sample(range(len(paragraphs)), len(words))
    values = {}
    for word, place in zip(words, places):
        values[word] = str(rng.randint(10 ** 6, 10 ** 7 - 1))
        sentences = re.split(r"(?<=[.!?]) ", paragraphs[place])
        at = rng.randrange(0, max(1, len(sentences) * 2 // 3))
        sentences.insert(at, NEEDLE.format(word, values[word]))
        paragraphs[place] = " ".join(sentences)
    return values


def make_words(count, rng):
    parts = ["ba", "co", "du", "fe", "gi", "lo", "mu", "na", "pe", "ri", "so", "tu", "va", "we", "zy"]
    words = set()
    while len(words) < count:
        words.add("".join(rng.choice(parts) for _ in range(3)) + rng.choice(["n", "l", "rk", "st"]))
    return sorted(words)


def run_needles(options):
    rng = random.Random(options.seed)
    for tokens in options.tokens:
        paragraphs = book_paragraphs(options.data, int(tokens * 4.05), options.seed)
        values = plant(paragraphs, make_words(options.count, rng), rng)
        daemon = Daemon(options.build)
        daemon.run("corpus", "create", "needles")
        folder = os.path.join(daemon.folder, "books")
        os.mkdir(folder)
        for i in range(0, len(paragraphs), 200):
            with open(os.path.join(folder, f"part{i:06d}.txt"), "w", encoding="utf-8") as out:
                out.write("\n\n".join(paragraphs[i:i + 200]) + "\n")
        done = daemon.last("register", "needles", folder)
        emit(row="register", **done)
        for mode in options.modes:
            ask_needles(daemon, values, mode, done["tokens"])
        daemon.close()


def ask_needles(daemon, values, mode, tokens):
    right, first, rate, question, decode = [], [], [], [], []
    for word, value in values.items():
        answer = daemon.last("ask", "needles", QUESTION.format(word), "--mode", mode,
                             "--no-read-twice")
        usage = answer["usage"]
        right.append(answer["answer"].strip() == value)
        first.append(usage["first_token_ms"])
        rate.append(usage["decode_tokens_per_s"])
        dense_step = usage["kv_dense_bytes"] / (1 + usage["decode_steps"])
        question.append(100 * usage["question_read_bytes"] / dense_step)
        if usage["decode_steps"]:
            decode.append(100 * usage["decode_read_bytes"] / usage["decode_steps"] / dense_step)
    emit(row="needles", mode=mode, tokens=tokens, right=sum(right), of=len(right),
         first_token_ms=round(median(first)), decode_tokens_per_s=round(median(rate), 1),
         question_percent=round(median(question), 3), question_percent_p95=round(quantile(question, .95), 3),
         decode_percent=round(median(decode), 3), decode_percent_p95=round(quantile(decode, .95), 3))


def run_handbook(options):
    daemon = Daemon(options.build)
    daemon.run("corpus", "create", "handbook")
    daemon.run("register", "handbook", os.path.join(ROOT, "tests/data/handbook"))
    answered, right, total = 0, 0, 0
    for line in open(os.path.join(ROOT, "tests/data/handbook-questions.jsonl"), encoding="utf-8"):
        row = json.loads(line)
        answer = daemon.last("ask", "handbook", row["question"])
        total += 1
        answered += answer["found"]
        good = f1(answer["answer"], row["answer"]) >= 0.5
        right += good
        if options.verbose:
            print(("ok   " if good else "MISS "), row["question"], "->", answer["answer"], "|", row["answer"],
                  [e["document"] for e in answer["evidence"][:1]], row["document"], file=sys.stderr)
    refused, absent = 0, 0
    for line in open(os.path.join(ROOT, "tests/data/handbook-unanswerable.jsonl"), encoding="utf-8"):
        answer = daemon.last("ask", "handbook", json.loads(line)["question"])
        absent += 1
        refused += not answer["found"]
        if options.verbose:
            print("absent", answer["found"], answer["answer"], json.loads(line)["question"], file=sys.stderr)
    emit(row="handbook", questions=total, right=right, answered=answered, unanswerable=absent,
         refused=refused)
    daemon.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=["qa", "needles", "handbook"])
    parser.add_argument("--data", help="folder of the data files")
    parser.add_argument("--build", default=os.path.join(ROOT, "build/release"))
    parser.add_argument("--count", type=int, default=None)
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--tokens", type=int, nargs="*", default=[4096, 131072, 1000000])
    parser.add_argument("--modes", nargs="*", default=["hierarchical", "dense"])
    parser.add_argument("--search-only", action="store_true", help="qa: no answers")
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args()
    if options.count is None:
        options.count = 1000 if options.what == "qa" else 200
    {"qa": run_qa, "needles": run_needles, "handbook": run_handbook}[options.what](options)


if __name__ == "__main__":
    main()
