#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Questions for text that has none, and for every question the wrong passages to be read with it.

  generate.py --generator FOLDER|CHECKPOINT --reader FOLDER|CHECKPOINT --prepared FOLDER

Runs on a GPU, over what prepare.py made, in three steps (--what):

  ask     The generator (train.py --phases generator) draws answers and their questions for passages
          of the sources that say `generate` in the TOML: candidates.json.
  check   Round-trip consistency (Alberti et al. 2019): the reader, given the question and the passage
          alone, must come to the same answer. What passes goes to SOURCE/generated.json.
  mine    For every question, written or generated, the passages that score best by late interaction
          and do not hold its answer, out of its document and of those that share its rare words: the
          third item of a question in SOURCE/questions.json and SOURCE/generated.json. Generated
          questions whose own passage is not among the best are dropped: they could be about any.

Passages and questions that share OVERLAP_WORDS words in a row with the validation paragraphs or their
questions are left out.
"""
import argparse
import collections
import json
import multiprocessing
import os
import random
import re
import time
import tomllib

import numpy as np
import torch

from corpus import ANSWER, EOS, QUESTION, SPECIAL_TOKENS, Corpus, LexicalIndex, Tokenizer
from evaluate import f1, normalize, reading_prompt
from export import read_any
from inference import Engine
from loader import open_sources
from packing import MINED_PASSAGES, QUESTION_TOKENS_MAX, generation_prompt
from prepare import write_json

HERE = os.path.dirname(os.path.abspath(__file__))
OVERLAP_WORDS = 13
PASSAGE_TOKENS_MIN = 60  # of a passage that is asked about
DRAWN_TOKENS = 48  # of an answer and its question
DRAWN_OF = 256  # the most probable tokens
ANSWER_CHARACTERS_MAX = 90
QUESTION_WORDS_MIN = 4
ASK_BATCH, CHECK_BATCH, RANK_BATCH = 1536, 1024, 128  # passages; questions; questions
SORTED_BATCHES = 16  # batches whose members are put in the order of their lengths
CHECKED_TOKENS = 16  # of a reader's answer
AGREEMENT = 0.8  # F1 of the generator's answer and the reader's
LEXICAL, NEIGHBOURS = 16, 48  # passages ranked for a question: sharing rare words; of its document
MINED = 6  # wrong passages kept of a question


def shingles(text):
    words = re.findall(r"\w+", text.lower())
    return {hash(tuple(words[i:i + OVERLAP_WORDS])) for i in range(len(words) - OVERLAP_WORDS + 1)}


def batches_by_length(items, size, length):
    """Items in batches of about one length, each long run of batches a fair sample."""
    run = size * SORTED_BATCHES
    for begin in range(0, len(items), run):
        part = sorted(items[begin:begin + run], key=length)
        for at in range(0, len(part), size):
            yield part[at:at + size]


class Shared:
    """What the worker processes know: set before they are forked."""
    sources = tokenizer = forbidden = lexical = None


# --- work of one process ---------------------------------------------------------------------

def untouched(items):
    """(source, passage) pairs long enough and not overlapping with the validation data."""
    out = []
    for name, index in items:
        source = Shared.sources[name]
        if source.length(index) >= PASSAGE_TOKENS_MIN:
            if Shared.forbidden.isdisjoint(shingles(source.text(index))):
                out.append((name, index))
    return out


def parse(item):
    """Candidates [source, passage, question, answer] of drawn token rows of a passage."""
    name, index, rows = item
    text, out, seen = Shared.sources[name].text(index), [], set()
    for row in rows:
        row = row.tolist()
        if EOS not in row or QUESTION not in row[:row.index(EOS)]:
            continue
        row = row[:row.index(EOS)]
        place = row.index(QUESTION)
        if min(row[:place] + row[place + 1:] or [0]) < SPECIAL_TOKENS:
            continue
        answer, question = map(Shared.tokenizer.decode, (row[:place], row[place + 1:]))
        known = normalize(question)
        if (acceptable(text, question, answer) and known not in seen
                and Shared.forbidden.isdisjoint(shingles(question))):
            seen.add(known)
            out.append([name, index, question, answer])
    return out


def acceptable(text, question, answer):
    """Whether a drawn question and answer are worth checking."""
    return (answer in text and normalize(answer) and len(answer) <= ANSWER_CHARACTERS_MAX
            and len(question.split()) >= QUESTION_WORDS_MIN
            and normalize(answer) not in normalize(question)
            and "\n" not in question)


def agree(item):
    """Whether the reader came to the generator's answer."""
    answer, tokens, none = item
    return none < np.log(0.5) and f1(Shared.tokenizer.decode(tokens), answer) >= AGREEMENT


def candidates_of(item):
    """Passages of its source that might be read for a question, the one that holds the answer first."""
    name, gold, question = item
    source = Shared.sources[name]
    first, last = source.document(gold)
    begin = max(first, min(gold - NEIGHBOURS // 2, last - NEIGHBOURS))
    near = list(range(begin, min(last, begin + NEIGHBOURS)))
    if name in Shared.lexical:
        near += Shared.lexical[name].nearest(Shared.tokenizer.encode(question), LEXICAL)
    return list(dict.fromkeys([gold, *near]))


def without_answer(item):
    """The best of ranked passages that do not hold an answer, and whether `gold` is among the best."""
    name, gold, answer, ranked = item
    source, answer, out = Shared.sources[name], answer.lower(), []
    for index in ranked:
        if answer not in source.text(index).lower():
            out.append(index)
            if len(out) == MINED:
                break
    return out, gold in ranked[:MINED_PASSAGES]


# --- ask -------------------------------------------------------------------------------------

def draw(logits, temperatures, top_p):
    """One token a row, of the most probable ones that hold top_p together."""
    share, order = (logits / temperatures[:, None]).softmax(-1).topk(DRAWN_OF)
    share = share.masked_fill(share.cumsum(-1) - share > top_p, 0.0)
    return order.gather(1, torch.multinomial(share, 1))[:, 0]


@torch.no_grad()
def draw_questions(engine, passages, options):
    """Tokens [passages, options.samples, DRAWN_TOKENS] drawn after each passage: answers of all
    kinds, and the likeliest questions for them, as the two temperatures say."""
    tokens, length, cache = engine.begin([generation_prompt(p) for p in passages], DRAWN_TOKENS)
    scale = torch.ones(len(passages), device=engine.device)
    x, _ = engine.forward(tokens, torch.zeros_like(length), cache, None, None, scale)
    x = x[torch.arange(len(passages), device=engine.device), length - 1]

    def repeated(t):
        return t.repeat_interleave(options.samples, 0)

    x, length, scale = repeated(x), repeated(length), repeated(scale)
    for pair in cache:
        pair[:] = map(repeated, pair)
    done, drawn = torch.zeros_like(length, dtype=torch.bool), []
    temperatures = torch.full_like(scale, options.answer_temperature)
    for step in range(DRAWN_TOKENS):
        token = draw(engine.logits(x), temperatures, options.top_p)
        drawn.append(torch.where(done, EOS, token))
        done |= token == EOS
        temperatures[token == QUESTION] = options.question_temperature
        if step % 8 == 7 and bool(done.all()):
            break
        x, _ = engine.forward(drawn[-1][:, None], length + step, cache, None, None, scale)
        x = x[:, 0]
    drawn = torch.stack(drawn, 1).cpu().numpy().astype(np.uint16)
    return drawn.reshape(len(passages), options.samples, -1)


def ask(engine, pool, options, config):
    """Candidates from a random order of the passages, while the time lasts."""
    begun, sources, rng = time.time(), Shared.sources, random.Random(options.seed)
    items = [(name, i) for name, source in sources.items()
             if config["sources"][name].get("generate") for i in range(len(source))]
    rng.shuffle(items)
    items = items[:options.passages]
    parts = pool.map(untouched, [items[i:i + 2000] for i in range(0, len(items), 2000)])
    items = [item for part in parts for item in part]
    print(f"asking about {len(items)} passages: {time.time() - begun:.1f} s", flush=True)
    results, asked = [], 0
    for batch in batches_by_length(items, ASK_BATCH, lambda x: sources[x[0]].length(x[1])):
        if time.time() - begun > options.ask_seconds:
            break
        rows = draw_questions(engine, [sources[name].passage(i) for name, i in batch], options)
        results.append(pool.map_async(parse, [(*item, row) for item, row in zip(batch, rows)], 64))
        asked += len(batch)
    candidates = [row for result in results for rows in result.get() for row in rows]
    rng.shuffle(candidates)
    print(f"asked about {asked} passages, {len(candidates)} candidates of {asked * options.samples}:"
          f" {time.time() - begun:.1f} s", flush=True)
    return candidates


# --- check -----------------------------------------------------------------------------------

def check(engine, pool, options, candidates):
    """Candidates whose answer the reader comes to as well, while the time lasts."""
    begun, results, kept = time.time(), [], []
    questions = pool.map(Shared.tokenizer.encode, [row[2] for row in candidates], 2000)
    prompts = [(row, reading_prompt(question, Shared.sources[row[0]].passage(row[1]).tolist()))
               for row, question in zip(candidates, questions)
               if len(question) <= QUESTION_TOKENS_MAX]
    print(f"checking {len(prompts)}: {time.time() - begun:.1f} s", flush=True)
    for batch in batches_by_length(prompts, CHECK_BATCH, lambda x: len(x[1])):
        if time.time() - begun > options.check_seconds:
            break
        answers = engine.answer([prompt for _, prompt in batch], tokens_max=CHECKED_TOKENS)
        work = [(row[3], tokens, none) for (row, _), tokens, none
                in zip(batch, answers.tokens, answers.none.tolist())]
        results.append((batch, pool.map_async(agree, work, 128)))
    for batch, result in results:
        kept += [row for (row, _), right in zip(batch, result.get()) if right]
    checked = sum(len(batch) for batch, _ in results)
    print(f"checked {checked}, kept {len(kept)}: {time.time() - begun:.1f} s", flush=True)
    return kept


def write_generated(options, kept):
    """SOURCE/generated.json of each source that questions were kept of."""
    pairs = collections.defaultdict(lambda: collections.defaultdict(list))
    for name, index, question, answer in kept:
        pairs[name][index].append([question, answer])
    for name, of_passage in pairs.items():
        source = Shared.sources[name]
        source.generated = [of_passage.get(i, []) for i in range(len(source))]
        write_json(os.path.join(options.prepared, name, "generated.json"), source.generated)


# --- mine ------------------------------------------------------------------------------------

@torch.no_grad()
def rank_candidates(engine, context, questions, candidates):
    """Candidates (lists of passages) of each question, best late-interaction score in the first
    retrieval layer first."""
    seeking = engine.answer([[QUESTION, *q, ANSWER] for q in questions], tokens_max=1).seeking[0]
    device, keys = engine.device, context.layers[0][0]
    most = max(1, max(map(len, candidates)))
    table = np.full((len(candidates), most), -1)
    for row, near in zip(table, candidates):
        row[:len(near)] = near
    table = torch.from_numpy(table).to(device)
    starts = torch.from_numpy(context.offsets[:-1]).to(device)
    sizes = torch.from_numpy(np.diff(context.offsets)).to(device)[table.clamp(min=0)]
    sizes = sizes.masked_fill(table < 0, 0)
    column = torch.arange(int(sizes.max()), device=device)
    place = (starts[table.clamp(min=0)][..., None] + column).clamp(max=len(context) - 1)
    batch, heads, rows, width = seeking.shape
    lengths = torch.tensor([len(q) for q in questions], device=device)
    asked = torch.arange(rows, device=device)
    asked = ((asked >= 1) & (asked <= lengths[:, None])).float()
    near = keys[:, place.flatten(1)].transpose(0, 1)  # [questions, key heads, tokens, width]
    q = seeking.reshape(batch, len(keys), -1, width) * width ** -0.5
    z = (q @ near.transpose(-1, -2)).float().view(batch, heads, rows, *place.shape[1:])
    z = z.masked_fill((column >= sizes[..., None])[:, None, None], -1e30)
    score = (torch.logsumexp(z, -1) * asked[:, None, :, None]).sum((1, 2))
    order = score.masked_fill(table < 0, -float("inf")).argsort(-1, descending=True)
    ranked = table.gather(1, order).tolist()
    return [row[:len(near)] for row, near in zip(ranked, candidates)]


def mine_source(engine, pool, name, kind):
    """Puts wrong passages beside the questions of a source."""
    begun, source = time.time(), Shared.sources[name]
    of_passage = getattr(source, kind)
    pairs = [(gold, pair) for gold, pairs in enumerate(of_passage) for pair in pairs]
    questions = pool.map(Shared.tokenizer.encode, [pair[0] for _, pair in pairs], 2000)
    candidates = pool.map(candidates_of, [(name, gold, pair[0]) for gold, pair in pairs], 500)
    context = engine.encode([source.passage(i) for i in range(len(source))], layers=1)
    results = []
    items = list(zip(pairs, questions, candidates))
    for batch in batches_by_length(items, RANK_BATCH, lambda x: len(x[1])):
        ranked = rank_candidates(engine, context, [q for _, q, _ in batch],
                                 [near for _, _, near in batch])
        work = [(name, gold, pair[1], row) for ((gold, pair), _, _), row in zip(batch, ranked)]
        results.append((batch, pool.map_async(without_answer, work, 32)))
    lost = 0
    for batch, result in results:
        for ((gold, pair), _, _), (wrong, found) in zip(batch, result.get()):
            pair[2:] = [wrong]
            lost += not found
            if kind == "generated" and not found:
                of_passage[gold].remove(pair)
    print(f"{name}: mined for {len(items)} {kind}, {lost} of them found elsewhere: "
          f"{time.time() - begun:.1f} s", flush=True)


def mine(engine, pool, options):
    for name, source in Shared.sources.items():
        for kind in ("questions", "generated"):
            if any(len(pair) < 3 for pairs in getattr(source, kind) or () for pair in pairs):
                mine_source(engine, pool, name, kind)
                write_json(os.path.join(options.prepared, name, kind + ".json"),
                           getattr(source, kind))


# --- the program -----------------------------------------------------------------------------

def share(options, config):
    """Fills Shared."""
    Shared.tokenizer = Tokenizer(options.tokenizer)
    Shared.sources = open_sources(options.prepared, config)
    validation = Corpus(os.path.join(options.prepared, "validation"))
    Shared.forbidden = set()
    for i, pairs in enumerate(validation.questions):
        for text in (validation.text(i), *(question for question, *_ in pairs)):
            Shared.forbidden |= shingles(text)
    Shared.lexical = {}
    if "mine" in options.what:
        Shared.lexical["questions"] = LexicalIndex(Shared.sources["questions"])


def load(path):
    parameters, c = read_any(path)
    return Engine(c, parameters)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generator", help="Hugging Face folder or checkpoint.pt, to ask")
    parser.add_argument("--reader", required=True, help="the same, to check and to mine")
    parser.add_argument("--prepared", required=True, help="folder that prepare.py made")
    parser.add_argument("--what", type=lambda text: text.split(","), default="ask,check,mine")
    parser.add_argument("--config", default=os.path.join(HERE, "default.toml"))
    parser.add_argument("--tokenizer", default=os.path.join(HERE, "../default/tokenizer.json"))
    parser.add_argument("--passages", type=int, default=200_000, help="to ask about, at most")
    parser.add_argument("--samples", type=int, default=5, help="questions drawn for a passage")
    parser.add_argument("--answer-temperature", type=float, default=1.0)
    parser.add_argument("--question-temperature", type=float, default=0.4)
    parser.add_argument("--top-p", type=float, default=0.92)
    parser.add_argument("--ask-seconds", type=float, default=90)
    parser.add_argument("--check-seconds", type=float, default=120)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=11)
    options = parser.parse_args()
    if "ask" in options.what and not options.generator:
        parser.error("to ask needs --generator")
    with open(options.config, "rb") as file:
        config = tomllib.load(file)
    share(options, config)
    path = os.path.join(options.prepared, "candidates.json")
    with multiprocessing.get_context("fork").Pool(options.processes) as pool:
        torch.manual_seed(options.seed)
        if "ask" in options.what:
            write_json(path, ask(load(options.generator), pool, options, config))
        engine = load(options.reader)
        if "check" in options.what:
            with open(path, encoding="utf-8") as file:
                write_generated(options, check(engine, pool, options, json.load(file)))
        if "mine" in options.what:
            mine(engine, pool, options)


if __name__ == "__main__":
    main()
