#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Quality of answers through the service: needles and questions on real text.

Drives the `loci` command line against a daemon of its own, prints one JSON line a row.

  quality.py qa --data FOLDER        1,000 questions of qa_valid.jsonl.xz, all paragraphs registered,
                                     in each of --modes
  quality.py among --data FOLDER     questions of qa_valid with their paragraph among 16, among 256 and
                                     among all: answers, passages found (beside BM25, where the
                                     package bm25s is there), and questions that nothing answers
  quality.py needles --data FOLDER   needles in public-domain books, at given sizes and modes; --kind
                                     says what stands beside them: the others in one wording
                                     (crowd), nothing like them (single), four keys of the same
                                     wording that differ in one part (five);
                                     --compare-dense: how many hierarchical and dense mode find
  quality.py same --data FOLDER      share of hierarchical mode's answers that equal dense mode's to
                                     the letter: half needles, half questions of qa_valid
  quality.py handbook                the handbook's questions, answerable or not

FOLDER holds the data files (they are not part of the repository). qa and among take other
questions with --questions FILE: JSON lines as those of qa_valid, compressed or not, or one JSON of
SQuAD's form, whose contexts may be long. needles and same ask without reading twice and at
temperature 0.
"""
import argparse
import collections
import itertools
import json
import lzma
import os
import random
import re
import shutil
import string
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
COMPARED = ("hierarchical", "dense")
ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def normalize(text):
    """SQuAD's normalisation: lower case, no punctuation, no articles, single spaces."""
    text = text.lower().translate(NO_PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def f1(answer, gold):
    a, g = normalize(answer).split(), normalize(gold).split()
    if not a or not g:
        return float(a == g)
    same = sum((collections.Counter(a) & collections.Counter(g)).values())
    return 0.0 if same == 0 else 2 * same / (len(a) + len(g))


class Daemon:
    """A locid on a temporary data directory, driven through the command line. `with` ends it."""

    def __init__(self, options):
        self.build, self.model = options.build, options.model
        self.folder = tempfile.mkdtemp(prefix="loci-quality-")
        self.data = os.path.join(self.folder, "data")
        self.address = "unix:" + os.path.join(self.folder, "locid.sock")
        self.cli = os.path.join(self.build, "loci")
        self.process = None
        self.start()

    def start(self):
        log = os.path.join(self.folder, "locid.log")
        command = [os.path.join(self.build, "locid"), "--data", self.data, "--listen", self.address]
        if self.model:
            command += ["--model", self.model]
        with open(log, "a") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=out)
        for _ in range(300):
            if self.run("status", check=False).returncode == 0:
                return
            if self.process.poll() is not None:
                break
            time.sleep(0.1)
        self.stop()
        sys.exit("locid did not start: " + open(log).read()[-500:])

    def stop(self):
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait(60)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def run(self, *args, check=True):
        done = subprocess.run([self.cli, *args, "--address", self.address], capture_output=True,
                              text=True)
        if check and done.returncode != 0:
            raise RuntimeError(f"loci {' '.join(args)}: {done.stderr.strip()}")
        return done

    def last(self, *args):
        return json.loads(self.run(*args, "--json").stdout.strip().splitlines()[-1])

    def ask(self, corpus, question, *flags):
        """The answer, read twice, and the readings that it was chosen from, best passage first."""
        events = [json.loads(line)
                  for line in self.run("ask", corpus, question, *flags,
                                       "--json").stdout.splitlines()]
        return events[-1], [e for e in events[:-1] if e["event"] == "candidate"]

    def wait_merged(self, corpus, seconds=3600):
        """Until its extents are as large as they will be: that goes on behind a registration."""
        for _ in range(seconds * 4):
            shown = self.last("corpus", "show", corpus)
            if shown["merged"]:
                return
            if "merge_failure" in shown:
                raise RuntimeError(f"not merged: {shown['merge_failure']}")
            time.sleep(0.25)
        raise RuntimeError(f"corpus {corpus} is not merged after {seconds} s")


def emit(**row):
    print(json.dumps(row), flush=True)


def median(values):
    values = sorted(values)
    return values[len(values) // 2] if values else 0


def quantile(values, share):
    values = sorted(values)
    return values[min(len(values) - 1, int(share * len(values)))] if values else 0


def percent(part, whole, digits=2):
    return round(100 * part / max(1, whole), digits)


def squash(text):
    """Runs of white space as one space."""
    return re.sub(r"\s+", " ", text).strip()


# --- questions on paragraphs -----------------------------------------------------------------

def squad_rows(squad):
    """The rows of qa_valid's form in a JSON of SQuAD's; questions without an answer are left out."""
    return [{"c": paragraph["context"],
             "q": [(qa["question"], qa["answers"][0]["text"]) for qa in paragraph["qas"]
                   if qa["answers"]]}
            for article in squad["data"] for paragraph in article["paragraphs"]]


def load_qa(options):
    """Paragraphs and shuffled (paragraph, question, answer) of qa_valid or options.questions."""
    path = options.questions or os.path.join(options.data, "qa_valid.jsonl.xz")
    opened = lzma.open if path.endswith(".xz") else open
    with opened(path, "rt", encoding="utf-8") as file:
        rows = squad_rows(json.load(file)) if path.endswith(".json") else [json.loads(line)
                                                                          for line in file]
    questions = [(i, squash(q), squash(a)) for i, row in enumerate(rows) for q, a in row["q"]]
    random.Random(options.seed).shuffle(questions)
    return [squash(row["c"]) for row in rows], questions


def write_qa(daemon, paragraphs):
    """A JSON lines file to register: paragraph i is document p<i>."""
    path = os.path.join(daemon.folder, "qa.jsonl")
    with open(path, "w", encoding="utf-8") as out:
        for i, text in paragraphs:
            out.write(json.dumps({"id": f"p{i}", "text": text}) + "\n")
    return path


def side_by_side(options, work, items):
    """work(item) of all items, in order, so many at a time."""
    with ThreadPoolExecutor(options.clients) as pool:
        return list(pool.map(work, items))


def run_qa(options):
    paragraphs, questions = load_qa(options)
    questions = questions[:options.count]
    with Daemon(options) as daemon:
        daemon.run("corpus", "create", "qa")
        done = daemon.last("register", "qa", write_qa(daemon, enumerate(paragraphs)))
        emit(row="register", **{k: done[k] for k in ("documents", "tokens", "segments", "seconds")})
        search_qa(daemon, questions, options)
        for mode in [] if options.search_only else options.modes:
            answer_qa(daemon, questions, mode, options)


def rank_of(daemon, corpus, gold, question):
    """The place of paragraph `gold` among the documents found, from 0; 1000 where it is not."""
    hits = daemon.last("search", corpus, question, "-k", "20")["hits"]
    return place(f"p{gold}", list(dict.fromkeys(h["document"] for h in hits)))


def search_qa(daemon, questions, options):
    ranks = side_by_side(options, lambda asked: rank_of(daemon, "qa", *asked[:2]), questions)
    emit(row="search", questions=len(ranks), seed=options.seed,
         **{f"recall@{k}": percent(sum(r < k for r in ranks), len(ranks), 1) for k in (1, 4, 8)})


def answer_qa(daemon, questions, mode, options):
    def ask(asked):
        _, question, gold = asked
        answer, readings = daemon.ask("qa", question, "--mode", mode)
        best = max(readings, key=lambda e: e["score"])["answer"] if readings else ""
        # The likeliest reading, whether or not it was believed, comes second.
        return (f1(answer["answer"], gold), f1(best, gold),
                normalize(answer["answer"]) == normalize(gold), answer["found"],
                answer["usage"]["total_ms"])
    scores, forced, exact, found, times = zip(*side_by_side(options, ask, questions))
    count = len(scores)
    emit(row="read_twice", mode=mode, questions=count, f1=percent(sum(scores), count),
         f1_forced=percent(sum(forced), count), exact=percent(sum(exact), count),
         found=percent(sum(found), count, 1), clients=options.clients,
         median_ms=round(median(times)))


# --- gold among so many ------------------------------------------------------------------------

def make_blocks(count, size, rng):
    """Paragraphs 0..count-1 in blocks of `size`; the last one is filled up from the others."""
    order = list(range(count))
    rng.shuffle(order)
    blocks = [order[at:at + size] for at in range(0, count, size)]
    if len(blocks) > 1:
        blocks[-1] += rng.sample(order[:-len(blocks[-1])], size - len(blocks[-1]))
    return blocks


def bm25_ranker(texts):
    """A function from a question to the indices of the best texts, or None without bm25s."""
    try:
        import bm25s
    except ImportError:
        return None
    index = bm25s.BM25()
    index.index(bm25s.tokenize(texts, stopwords="en", show_progress=False), show_progress=False)

    def rank(question):
        words = bm25s.tokenize([question], stopwords="en", show_progress=False)
        found, _ = index.retrieve(words, k=min(8, len(texts)), show_progress=False)
        return list(found[0])
    return rank


def recalls(name, ranks):
    return {f"{name}@{k}": percent(sum(r < k for r in ranks), len(ranks), 1) for k in (1, 4, 8)}


def place(wanted, ranked):
    return ranked.index(wanted) if wanted in ranked else 1000


def unanswered_block(blocks, normalized, home, answer):
    """A block other than `home` in which the answer does not stand; None without one."""
    for step in range(1, len(blocks)):
        other = (home + step) % len(blocks)
        if all(normalize(answer) not in normalized[i] for i in blocks[other]):
            return other
    return None


def run_among(options):
    paragraphs, questions = load_qa(options)
    questions = questions[:options.count]
    for size in options.among or (16, 256, len(paragraphs)):
        with Daemon(options) as daemon:
            blocks = make_blocks(len(paragraphs), min(size, len(paragraphs)),
                                 random.Random(options.seed))
            ask_among(daemon, paragraphs, questions, blocks, options)


def ask_among(daemon, paragraphs, questions, blocks, options):
    home = {i: b for b, block in reversed(list(enumerate(blocks))) for i in block}
    normalized = [normalize(text) for text in paragraphs]
    silent_in = [unanswered_block(blocks, normalized, home[gold], answer)
                 for gold, _, answer in questions]
    rankers = {}
    for b in sorted({home[gold] for gold, _, _ in questions} | set(silent_in) - {None}):
        daemon.run("register", f"b{b}", write_qa(daemon, ((i, paragraphs[i]) for i in blocks[b])),
                   "--create")
        rankers[b] = bm25_ranker([paragraphs[i] for i in blocks[b]])

    def ask(at):
        gold, question, answer = questions[at]
        b = home[gold]
        given = daemon.last("ask", f"b{b}", question)
        return {"f1": f1(given["answer"], answer),
                "exact": normalize(given["answer"]) == normalize(answer),
                "found": given["found"],
                "rank": rank_of(daemon, f"b{b}", gold, question),
                "base": rankers[b] and place(gold, [blocks[b][i] for i in rankers[b](question)]),
                "silent": None if silent_in[at] is None else
                          not daemon.last("ask", f"b{silent_in[at]}", question)["found"]}

    rows = side_by_side(options, ask, range(len(questions)))
    count, base = len(rows), [row["base"] for row in rows if row["base"] is not None]
    emit(row="among", among=len(blocks[0]), questions=count, seed=options.seed,
         f1=percent(sum(row["f1"] for row in rows), count),
         exact=percent(sum(row["exact"] for row in rows), count, 1),
         **recalls("recall", [row["rank"] for row in rows]),
         **(recalls("bm25", base) if base else {}))
    silent = [row["silent"] for row in rows if row["silent"] is not None]
    if silent:
        emit(row="silence", among=len(blocks[0]), questions=len(silent), seed=options.seed,
             refused_percent=percent(sum(silent), len(silent), 1),
             answerable_refused_percent=percent(sum(not row["found"] for row in rows), count, 1))


# --- needles ---------------------------------------------------------------------------------

KINDS = ("crowd", "single", "five")
# Statements and questions; the first form is the crowd's. Training has none of these wordings.
with open(os.path.join(ROOT, "tests/quality/needles.jsonl"), encoding="utf-8") as forms:
    FORMS = [(form["statement"], form["question"]) for form in map(json.loads, forms)]
BYTES_A_TOKEN = 4.05  # of English text under the built-in tokenizer


def book_paragraphs(source, characters, seed):
    """Paragraphs of books, about `characters` in all; fewer characters give a prefix. Source:
    xz-compressed JSON lines with the text in "t", or the folder of books.jsonl.xz."""
    path = os.path.join(source, "books.jsonl.xz") if os.path.isdir(source) else source
    with lzma.open(path, "rt", encoding="utf-8") as file:
        books = [json.loads(line)["t"] for line in file]
    random.Random(seed).shuffle(books)
    out, total = [], 0
    for book in books:
        for part in re.split(r"\n\s*\n", book.replace("\r", "")):
            part = squash(part)
            if len(part) > 60:
                out.append(part)
                total += len(part) + 2
                if total >= characters:
                    return out
    return out


PARTS = ["ba", "co", "du", "fe", "gi", "lo", "mu", "na", "pe", "ri", "so", "tu", "va", "we", "zy"]
ENDS = ["n", "l", "rk", "st"]


def make_keys(count, rng):
    """Made-up words of three syllables and an end, as tuples."""
    keys = set()
    while len(keys) < count:
        keys.add((*(rng.choice(PARTS) for _ in range(3)), rng.choice(ENDS)))
    return sorted(keys, key="".join)


def near_misses(key, count, rng):
    """Keys that differ from one another, and from `key` in one part."""
    misses = set()
    while len(misses) < count:
        at = rng.randrange(len(key))
        part = rng.choice([p for p in (ENDS if at == 3 else PARTS) if p != key[at]])
        misses.add((*key[:at], part, *key[at + 1:]))
    return sorted(misses)


def make_needles(kind, count, rng):
    """[(form, key, whether it is asked for)] of `count` questions."""
    keys = make_keys(count, rng)
    if kind == "crowd":
        return [(FORMS[0], "".join(key), True) for key in keys]
    rng.shuffle(keys)
    needles = []
    for form, key in zip(itertools.cycle(FORMS), keys):
        others = near_misses(key, 4, rng) if kind == "five" else []
        needles += [(form, "".join(k), k is key) for k in [key, *others]]
    return needles


def plant(paragraphs, needles, rng):
    """Puts each needle into a paragraph of its own; returns question -> number. Needles that find
    no paragraph are left out."""
    needles = needles[:len(paragraphs)]
    places = rng.sample(range(len(paragraphs)), len(needles))
    values = {}
    for ((statement, question), key, asked), place in zip(needles, places):
        value = str(rng.randint(10 ** 6, 10 ** 7 - 1))
        if asked:
            values[question.format(key)] = value
        sentences = re.split(r"(?<=[.!?]) ", paragraphs[place])
        at = rng.randrange(0, max(1, len(sentences) * 2 // 3))
        sentences.insert(at, statement.format(key, value))
        paragraphs[place] = " ".join(sentences)
    return values


def write_books(daemon, paragraphs):
    """A folder of text files to register."""
    folder = os.path.join(daemon.folder, "books")
    os.mkdir(folder)
    for i in range(0, len(paragraphs), 200):
        with open(os.path.join(folder, f"part{i:06d}.txt"), "w", encoding="utf-8") as out:
            out.write("\n\n".join(paragraphs[i:i + 200]) + "\n")
    return folder


class DenseBytes:
    """What dense mode reads over one corpus, for a question and for a decoding step, counted by
    the service: an answer of one token takes no decoding step, one of two takes one. All
    questions must be about as long as `question` (long ones are read in several passes)."""

    def __init__(self, ask, question):
        one, two = (ask(question, "--max-tokens", n)["usage"]["kv_dense_bytes"] for n in "12")
        self.question, self.step = one, two - one

    def percents(self, answer):
        """Of dense: bytes of the question, and of a decoding step (None if there was none)."""
        usage = answer["usage"]
        steps, rest = divmod(usage["kv_dense_bytes"] - self.question, self.step)
        if rest or not 0 <= usage["decode_steps"] - steps <= 1:  # cut short: one less
            raise RuntimeError(f"{usage['kv_dense_bytes']} bytes are not those of a question and "
                               f"{usage['decode_steps']} decoding steps in dense mode")
        question = 100 * usage["question_read_bytes"] / self.question
        return question, 100 * usage["decode_read_bytes"] / (steps * self.step) if steps else None


def run_needles(options):
    rng = random.Random(options.seed)
    for tokens in options.tokens:
        paragraphs = book_paragraphs(options.data, int(tokens * BYTES_A_TOKEN), options.seed)
        values = plant(paragraphs, make_needles(options.kind, options.count, rng), rng)
        with Daemon(options) as daemon:
            daemon.run("corpus", "create", "needles")
            done = daemon.last("register", "needles", write_books(daemon, paragraphs))
            daemon.wait_merged("needles")
            emit(row="register", **done)
            answers = {mode: ask_needles(daemon, values, mode, kind=options.kind,
                                         tokens=done["tokens"]) for mode in options.modes}
        if options.compare_dense:
            compare_needles(values, answers, done["tokens"])


def ask_directly(daemon, corpus, mode, question, *flags):
    return daemon.last("ask", corpus, question, "--mode", mode, "--no-read-twice", "--temperature",
                       "0", *flags)


def ask_needles(daemon, values, mode, **row):
    """Asks each question and prints a row; returns question -> answer."""
    def ask(text, *flags):
        return ask_directly(daemon, "needles", mode, text, *flags)

    dense = DenseBytes(ask, next(iter(values)))
    answers, first, rate, question, decode = {}, [], [], [], []
    for text in values:
        answer = ask(text)
        answers[text] = answer["answer"].strip()
        first.append(answer["usage"]["first_token_ms"])
        rate.append(answer["usage"]["decode_tokens_per_s"])
        for percents, value in zip((question, decode), dense.percents(answer)):
            if value is not None:
                percents.append(value)
    emit(row="needles", mode=mode, **row,
         right=sum(answers[text] == value for text, value in values.items()), of=len(values),
         first_token_ms=round(median(first)), decode_tokens_per_s=round(median(rate), 1),
         question_percent=round(median(question), 3),
         question_percent_p95=round(quantile(question, .95), 3),
         decode_percent=round(median(decode), 3),
         decode_percent_p95=round(quantile(decode, .95), 3))
    return answers


def compare_needles(values, answers, tokens):
    """Who found what: a row."""
    finds = collections.Counter(tuple(answers[mode][text] == value for mode in COMPARED)
                                for text, value in values.items())
    emit(row="compare", tokens=tokens, needles=len(values),
         hierarchical=finds[True, True] + finds[True, False],
         dense=finds[True, True] + finds[False, True], both=finds[True, True],
         only_hierarchical=finds[True, False], only_dense=finds[False, True],
         neither=finds[False, False],
         same_text=sum(len({answers[mode][text] for mode in COMPARED}) == 1 for text in values))


# --- same answers as dense -------------------------------------------------------------------

def same_questions(options, tokens):
    """A corpus and its questions: (paragraphs of books, (number, paragraph) of qa_valid,
    [(kind, question, answer)]). Paragraphs of qa_valid take at most half of the corpus."""
    rng = random.Random(options.seed)
    paragraphs, questions = load_qa(options)
    order = list(range(len(paragraphs)))
    rng.shuffle(order)
    budget, chosen = int(tokens * BYTES_A_TOKEN / 2), {}
    for i in order:
        budget -= len(paragraphs[i])
        if budget < 0:
            break
        chosen[i] = paragraphs[i]
    qa = [("qa", question, answer) for i, question, answer in questions if i in chosen]
    left = int(tokens * BYTES_A_TOKEN) - sum(map(len, chosen.values()))
    books = book_paragraphs(options.data, left, options.seed)
    values = plant(books, make_needles("crowd", options.count - options.count // 2, rng), rng)
    needles = [("needle", text, value) for text, value in values.items()]
    return books, chosen.items(), needles + qa[:options.count // 2]


def run_same(options):
    for tokens in options.tokens:
        books, qa, questions = same_questions(options, tokens)
        counts = collections.Counter()
        with Daemon(options) as daemon:
            daemon.run("corpus", "create", "same")
            done = daemon.last("register", "same", write_books(daemon, books), write_qa(daemon, qa))
            daemon.wait_merged("same")
            for kind, question, gold in questions:
                texts = [ask_directly(daemon, "same", mode, question)["answer"]
                         for mode in COMPARED]
                counts[f"{kind}_questions"] += 1
                counts[f"{kind}_same"] += texts[0] == texts[1]
                for mode, text in zip(COMPARED, texts):
                    counts[f"{kind}_right_{mode}"] += normalize(text) == normalize(gold)
                if options.verbose and texts[0] != texts[1]:
                    print(kind, question, gold, texts, sep=" | ", file=sys.stderr)
        same = counts["needle_same"] + counts["qa_same"]
        emit(row="same", tokens=done["tokens"], seed=options.seed, questions=len(questions),
             same=same, same_percent=percent(same, len(questions), 1), **counts)


# --- the handbook ----------------------------------------------------------------------------

def run_handbook(options):
    with Daemon(options) as daemon:
        daemon.run("corpus", "create", "handbook")
        daemon.run("register", "handbook", os.path.join(ROOT, "tests/data/handbook"))
        ask_handbook(daemon, options)


def ask_handbook(daemon, options):
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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=["qa", "among", "needles", "same", "handbook"])
    parser.add_argument("--data", help="folder of the data files")
    parser.add_argument("--build", default=os.path.join(ROOT, "build/release"))
    parser.add_argument("--model", help="model folder; the built-in one by default")
    parser.add_argument("--count", type=int, default=None)
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--tokens", type=int, nargs="*", default=[4096, 131072, 1000000])
    parser.add_argument("--modes", nargs="*", default=None,
                        help="qa: hierarchical; needles: hierarchical and dense")
    parser.add_argument("--kind", choices=KINDS, default="crowd", help="needles")
    parser.add_argument("--questions", help="qa, among: a file of questions instead of qa_valid's")
    parser.add_argument("--compare-dense", action="store_true",
                        help="needles: hierarchical and dense side by side")
    parser.add_argument("--among", type=int, nargs="*", help="among: so many paragraphs")
    parser.add_argument("--clients", type=int, default=1,
                        help="qa, among: questions asked at the same time")
    parser.add_argument("--search-only", action="store_true", help="qa: no answers")
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args()
    if options.count is None:
        options.count = {"qa": 1000, "among": 1000, "same": 100}.get(
            options.what, 200 if options.kind == "crowd" else 50)
    if options.modes is None:
        options.modes = COMPARED[:1] if options.what == "qa" else list(COMPARED)
    if options.compare_dense:
        options.modes = list(dict.fromkeys([*options.modes, *COMPARED]))
    if options.what != "handbook" and not (options.data or options.questions):
        parser.error(f"{options.what} needs --data")
    {"qa": run_qa, "among": run_among, "needles": run_needles, "same": run_same,
     "handbook": run_handbook}[options.what](options)


if __name__ == "__main__":
    main()
