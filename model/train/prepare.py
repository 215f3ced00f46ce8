#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Training data: xz-compressed JSON lines -> prepared sources (see corpus.py).

  prepare.py prepare --data FOLDER --out FOLDER [--config TOML] [--processes N]
      Cleans, cuts into passages and tokenises the files that the TOML names, those that are there.
      Sources already made from the same files are kept, so that files may arrive in turns. Writes
      words.json (words and names for synthetic facts) and, last, ready.json.
  prepare.py split --data FOLDER --out FOLDER
      Puts the files into folders part1, part2, part3 of sizes that travel to a GPU machine in three
      calls, with a third of the novels (their held-out end is kept).
"""
import argparse
import collections
import json
import lzma
import multiprocessing
import os
import random
import re
import shutil
import tempfile
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from corpus import PASSAGE_TOKENS_MAX, Tokenizer, write_corpus

HERE = os.path.dirname(os.path.abspath(__file__))
PASSAGE_TARGETS = (110, 250)  # tokens: a passage ends at a sentence beyond a random one of these
PASSAGE_CHARACTERS_MIN = 60
TASK_CHARACTERS = 400_000  # of text, for one process at a time
DIALOGUE_CHARACTERS = 8_000_000  # of the dialogues, which repeat themselves, in misc
SENTENCE_END = re.compile(r'(?<=[.!?])["\')\]”’]*\s+(?=[A-Z"\'(\[“‘0-9])|\n+')
CLOSING = "\"')]”’"


def squash(text):
    return re.sub(r"\s+", " ", text).strip()


def clean(text):
    """Paragraphs on lines of their own; hard-wrapped lines (of books) joined."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    paragraphs = re.split(r"\n\s*\n", text)
    if len(paragraphs) > 1 and max(map(len, text[:20000].split("\n"))) < 120:
        lines = (squash(p) for p in paragraphs)
    else:
        lines = (squash(line) for line in text.split("\n"))
    return "\n".join(line for line in lines if line)


def sentences(text):
    """(sentence, separator after it) pairs."""
    out, start = [], 0
    for match in SENTENCE_END.finditer(text):
        gap = match.group(0)
        closing = len(gap) - len(gap.lstrip(CLOSING))
        out.append((text[start:match.start() + closing], "\n" if "\n" in gap else " "))
        start = match.end()
    out.append((text[start:], "\n"))
    return [(sentence, gap) for sentence, gap in out if sentence.strip()]


def split_words(tokenizer, sentence, limit):
    """A sentence longer than a passage, cut between words; words longer than one are dropped."""
    words = sentence.split(" ")
    out, current, size = [], [], 0
    for word, ids in zip(words, tokenizer.encode_batch(words)):
        if len(ids) > limit:
            continue
        if size + len(ids) > limit:
            out.append(" ".join(current))
            current, size = [], 0
        current.append(word)
        size += len(ids)
    return out + ([" ".join(current)] if current else [])


def cut_passages(tokenizer, text, rng):
    """Passages of a document, cut at sentence ends."""
    low, high = PASSAGE_TARGETS
    parts = sentences(text)
    sizes = [len(ids) for ids in tokenizer.encode_batch([s for s, _ in parts])] if parts else []
    out, current, size, separator, target = [], "", 0, "", rng.randint(low, high)
    for (sentence, gap), tokens in zip(parts, sizes):
        if current and size + tokens + 1 > target:
            out.append(current)
            current, size, target = "", 0, rng.randint(low, high)
        if tokens > high:
            if current:
                out.append(current)
            out += split_words(tokenizer, sentence, high)
            current, size = "", 0
            continue
        current = current + separator + sentence if current else sentence
        size += tokens + (gap == "\n")
        separator = gap
    if current:
        out.append(current)
    return [passage for passage in out if len(passage) > PASSAGE_CHARACTERS_MIN]


def cut_paragraph(tokenizer, paragraph, questions):
    """A paragraph cut into equal passages; each question goes to the one that holds its answer."""
    limit = PASSAGE_TARGETS[1]
    size = len(tokenizer.encode(paragraph))
    if size <= limit:
        return [(paragraph, questions)]
    target = min(limit, size / -(-size // limit) + 25)
    pieces, current, used, separator = [], "", 0, " "
    for sentence, gap in sentences(paragraph):
        tokens = len(tokenizer.encode(sentence))
        if current and used + tokens > target:
            pieces.append(current)
            current, used = "", 0
        current = current + separator + sentence if current else sentence
        used += tokens
        separator = gap
    pieces.append(current)
    passages = []
    for piece in pieces:
        fits = len(tokenizer.encode(piece)) <= limit
        passages += [(p, []) for p in ([piece] if fits else split_words(tokenizer, piece, limit))]
    for question, answer in questions:
        words = set(re.findall(r"\w+", question.lower()))
        holding = [p for p in passages if answer in p[0]]
        if holding:
            best = max(holding, key=lambda p: len(words & set(re.findall(r"\w+", p[0].lower()))))
            best[1].append([question, answer])
    return passages


# --- work of one process ---------------------------------------------------------------------

_tokenizer = None


def start_process(path):
    global _tokenizer
    _tokenizer = Tokenizer(path)


def make_part(task):
    """One part of a source: (source, order, rows) -> its texts, tokens, documents, questions."""
    source, order, rows = task
    rng = random.Random(f"{source} {order}")
    texts, documents, questions, title = [], [], [], None
    for row in rows:
        if "c" in row:
            pairs = [[squash(q), squash(a)] for q, a in row["q"]]
            passages = cut_paragraph(_tokenizer, squash(row["c"]), [p for p in pairs if all(p)])
            if row["t"] != title or documents[-1] > 60:
                title = row["t"]
                documents.append(0)
            documents[-1] += len(passages)
            texts += [text for text, _ in passages]
            questions += [[p for p in pairs if p[1] in text] for text, pairs in passages]
        else:
            passages = cut_passages(_tokenizer, clean(row["t"]), rng)
            if passages:
                texts += passages
                documents.append(len(passages))
    tokens = []
    for i in range(0, len(texts), 512):
        tokens += _tokenizer.encode_batch(texts[i:i + 512])
    tokens = [np.array(ids[:PASSAGE_TOKENS_MAX], np.uint16) for ids in tokens]
    part = {"texts": texts, "tokens": tokens, "documents": documents, "questions": questions}
    return source, order, part


def cut_tasks(source, rows):
    """Rows in groups of about TASK_CHARACTERS; long books in several pieces."""
    group, size, order = [], 0, 0
    for row in rows:
        text = row.get("t", "")
        pieces = [row]
        if "c" not in row and len(text) > TASK_CHARACTERS:
            pieces = [{"t": text[i:i + TASK_CHARACTERS]}
                      for i in range(0, len(text), TASK_CHARACTERS)]
        for piece in pieces:
            group.append(piece)
            size += len(piece.get("c", piece["t"]))
            if size >= TASK_CHARACTERS:
                yield source, order, group
                group, size, order = [], 0, order + 1
    if group:
        yield source, order, group


# --- sources ---------------------------------------------------------------------------------

def decompress(path):
    with lzma.open(path) as file:
        return file.read()


def read_rows(files):
    """Rows of decompressed files."""
    for content in files:
        for line in content.split(b"\n"):
            if line.strip():
                yield json.loads(line)


def held_out_start(rows, characters):
    """Index of the first of the last rows that hold so many characters together."""
    start = len(rows)
    while characters > 0 and start > 0:
        start -= 1
        characters -= len(rows[start]["t"])
    return start


def thin_dialogues(rows):
    """Leaves DIALOGUE_CHARACTERS of the dialogues and shuffles all rows."""
    dialogues = [row for row in rows if row["t"].startswith(("User:", "System:"))]
    others = [row for row in rows if not row["t"].startswith(("User:", "System:"))]
    random.Random(1).shuffle(dialogues)
    size = 0
    for row in dialogues:
        if size > DIALOGUE_CHARACTERS:
            break
        others.append(row)
        size += len(row["t"])
    random.Random(2).shuffle(others)
    return others


def count_words(rows):
    """Counts lower-case words and capitalised words inside sentences."""
    low, high = collections.Counter(), collections.Counter()
    for row in rows:
        text = row.get("c") or row["t"][:200_000]
        low.update(re.findall(r"(?<![\w'’-])[a-z]{4,9}(?![\w'’-])", text))
        high.update(re.findall(r"(?<=[a-z,] )[A-Z][a-z]{2,9}(?![\w'’-])", text))
    return low, high


def make_words(low, high):
    """Common lower-case words, and names: capitalised words that are hardly ever lower case."""
    words = [w for w, _ in low.most_common(9000)[300:]]
    names = [w for w, n in high.most_common(6000) if low[w.lower()] * 20 < n]
    return {"low": sorted(words), "names": sorted(names[:3000])}


def stamp(paths):
    return [[os.path.basename(p), os.path.getsize(p)] for p in paths]


def write_json(path, value):
    with open(path + ".new", "w", encoding="utf-8") as file:
        json.dump(value, file)
    os.replace(path + ".new", path)


def list_work(config, options):
    """Sources to make: name -> (settings, paths of its files that are there)."""
    work = {}
    for name, settings in config["sources"].items():
        paths = [os.path.join(options.data, f) for f in settings["files"]]
        paths = [p for p in paths if os.path.exists(p)]
        done = os.path.join(options.out, name, "stamp.json")
        if not paths:
            continue
        if os.path.exists(done):
            with open(done, encoding="utf-8") as file:
                if json.load(file) == stamp(paths):
                    continue
        work[name] = (settings, paths)
    return work


def rows_of(name, settings, files):
    """Rows of a source and, under the name "haystack", those held out for evaluation."""
    rows = list(read_rows(files))
    if name == "misc":
        rows = thin_dialogues(rows)
    held = settings.get("held_out_characters", 0)
    start = held_out_start(rows, held)
    out = {name: rows[:start]}
    if held:
        out["haystack"] = rows[start:]
    return out


def prepare(options):
    begun = time.time()
    with open(options.config, "rb") as file:
        config = tomllib.load(file)
    os.makedirs(options.out, exist_ok=True)
    work, parts, tasks, stamps = list_work(config, options), {}, [], {}
    low, high = collections.Counter(), collections.Counter()
    words = os.path.join(options.out, "words.json")
    with ThreadPoolExecutor(options.processes) as threads:  # xz releases the interpreter
        reading = {name: [threads.submit(decompress, p) for p in paths]
                   for name, (_, paths) in work.items()}
    for name, (settings, paths) in work.items():
        stamps[name] = stamp(paths)
        files = [future.result() for future in reading.pop(name)]
        for source, rows in rows_of(name, settings, files).items():
            tasks += cut_tasks(source, rows)
            if settings.get("words") and not os.path.exists(words):
                counts = count_words(rows)
                low.update(counts[0])
                high.update(counts[1])
    print(f"read {len(work)} sources in {time.time() - begun:.1f} s", flush=True)
    with multiprocessing.Pool(options.processes, start_process, (options.tokenizer,)) as pool:
        for source, order, part in pool.imap_unordered(make_part, tasks):
            parts.setdefault(source, {})[order] = part
    for source, pieces in parts.items():
        ordered = [pieces[order] for order in sorted(pieces)]
        write_corpus(os.path.join(options.out, source), ordered, bool(ordered[0]["questions"]))
        count = sum(len(ids) for part in ordered for ids in part["tokens"])
        passages = sum(len(part["texts"]) for part in ordered)
        print(f"{source}: {passages} passages, {count / 1e6:.2f} M tokens", flush=True)
        if source in stamps:
            write_json(os.path.join(options.out, source, "stamp.json"), stamps[source])
    if low:
        write_json(words, make_words(low, high))
    write_json(os.path.join(options.out, "ready.json"), {"seconds": time.time() - begun})
    print(f"prepared in {time.time() - begun:.1f} s", flush=True)


# --- parts that travel -----------------------------------------------------------------------

PARTS = {
    "part1": ["qa_train", "qa_qamr", "qa_valid", "text_openstax", "text_gov"],
    "part2": ["text_wikipedia_1", "text_wikipedia_2", "text_openstax_earlier", "text_books2",
              "text_books3_standardebooks", "text_docs", "books"],
    "part3": ["misc"],
}
NOVELS_SHARE = 6  # one in so many of the books travels, besides those held out


def split(options):
    with open(options.config, "rb") as file:
        held = tomllib.load(file)["sources"]["novels"]["held_out_characters"]
    for part, names in PARTS.items():
        folder = os.path.join(options.out, part)
        os.makedirs(folder, exist_ok=True)
        for name in names:
            source = os.path.join(options.data, name + ".jsonl.xz")
            target = os.path.join(folder, name + ".jsonl.xz")
            if name != "books":
                shutil.copyfile(source, target)
                continue
            rows = list(read_rows([decompress(source)]))
            start = held_out_start(rows, held)
            kept = rows[:start][::NOVELS_SHARE] + rows[start:]
            with tempfile.NamedTemporaryFile("wb", dir=folder, delete=False) as raw:
                with lzma.open(raw, "wt", encoding="utf-8", preset=6) as file:
                    file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
            os.replace(raw.name, target)
        size = sum(os.path.getsize(os.path.join(folder, f)) for f in os.listdir(folder))
        print(f"{part}: {size / 2**20:.1f} MiB")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["prepare", "split"])
    parser.add_argument("--data", required=True, help="folder of the .jsonl.xz files")
    parser.add_argument("--out", required=True)
    parser.add_argument("--config", default=os.path.join(HERE, "default.toml"))
    parser.add_argument("--tokenizer", default=os.path.join(HERE, "../default/tokenizer.json"))
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    options = parser.parse_args()
    {"prepare": prepare, "split": split}[options.what](options)


if __name__ == "__main__":
    main()
