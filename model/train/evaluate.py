#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Quick quality of a checkpoint, on a GPU, to choose between checkpoints. Prints JSON lines.

  evaluate.py --model FOLDER|CHECKPOINT --prepared FOLDER [--what needles,made-up,questions]

needles: facts in the wording of RULER, which training never uses, in held-out novels; one key, five
keys, and the keys of all trials. made-up: the same with the made-up keys of tests/quality, the five
near misses of each other. natural: those keys in the wordings of natural.jsonl, which training never
uses either. All say how concentrated attention is: the keys that carry 98% of what a
row gives to contexts outside <doc>, over the rows, heads and retrieval layers. questions: of the
validation paragraphs, recall of the passage that holds the
answer by the late-interaction score of the first retrieval layer, then answers read from the best
passages one at a time, and how well <none> tells answerable questions from others. The figures that
count are those of the C engine (tests/quality).
"""
import argparse
import collections
import itertools
import json
import os
import random
import re
import string
import time

import numpy as np
import torch

from corpus import ANSWER, EVIDENCE, PASSAGE_TOKENS_MAX, QUESTION, Corpus, Tokenizer
from export import read_any
from facts import FactMaker
from inference import Context, Engine
from packing import attention_scale

HERE = os.path.dirname(os.path.abspath(__file__))
RULER = [("One of the special magic numbers for {0} is: {1}.",
          "What is the special magic number for {0} mentioned in the provided text?")]
KEYS = 5  # of a needle trial
SYLLABLES = ["ba", "co", "du", "fe", "gi", "lo", "mu", "na", "pe", "ri", "so", "tu", "va", "we",
             "zy"]
ENDINGS = ["n", "l", "rk", "st"]
CARRIED = 0.98  # of a row's attention on contexts, by the keys that are counted
MEASURED_TRIALS = 16  # whose rows' concentration is measured
READ_PASSAGES = 4
READ_BATCH = 400  # prompts
SCORE_BATCH = 32  # questions
RANK_WEIGHT = 0.2  # of the rank score beside log-probabilities, as in the engine (belief.c)
REFUSED_SHARE = 0.05  # of answerable questions, at which silence is measured


def normalize(text):
    """SQuAD's normalisation: lower case, no punctuation, no articles, single spaces."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def f1(answer, gold):
    a, g = normalize(answer).split(), normalize(gold).split()
    if not a or not g:
        return float(a == g)
    same = sum((collections.Counter(a) & collections.Counter(g)).values())
    return 0.0 if same == 0 else 2 * same / (len(a) + len(g))


def emit(**row):
    print(json.dumps(row), flush=True)


def percent(values):
    return round(100 * float(np.mean(values)), 2)


# --- needles ---------------------------------------------------------------------------------

def natural_forms(options):
    """[(statement, question)] for the keys of trials, in turns; {0}: the key, {1}: the value."""
    with open(options.forms, encoding="utf-8") as file:
        return [(form["statement"], form["question"]) for form in map(json.loads, file)]


def needle_passage(tokenizer, text, statement, rng):
    sentences = re.split(r"(?<=[.!?]) ", text)
    place = rng.randrange(max(1, len(sentences) * 2 // 3))
    sentences.insert(place, statement)
    return tokenizer.encode(" ".join(sentences))[:PASSAGE_TOKENS_MAX]


def draw_words(options, rng):
    """KEYS words of the evaluation for each trial, all different while there are enough."""
    with open(os.path.join(options.prepared, "words.json"), encoding="utf-8") as file:
        words = FactMaker(json.load(file)).evaluation_words
    count = options.trials * KEYS
    if count > len(words):
        return [rng.sample(words, KEYS) for _ in range(options.trials)]
    drawn = rng.sample(words, count)
    return [drawn[i:i + KEYS] for i in range(0, count, KEYS)]


def draw_made_up(options, rng):
    """KEYS made-up words for each trial, those after the first one part away from it."""
    used = set()

    def unused(parts):
        fresh = "".join(parts) not in used
        used.add("".join(parts))
        return fresh

    out = []
    while len(out) < options.trials:
        first = [*rng.choices(SYLLABLES, k=3), rng.choice(ENDINGS)]
        if not unused(first):
            continue
        keys = [first]
        while len(keys) < KEYS:
            near, place = list(first), rng.randrange(4)
            near[place] = rng.choice(ENDINGS if place == 3 else SYLLABLES)
            if unused(near):
                keys.append(near)
        out.append(["".join(parts) for parts in keys])
    return out


def joined(a, b):
    """A context of the passages of both."""
    layers = [tuple(torch.cat(pair, 1) for pair in zip(*layer))
              for layer in zip(a.layers, b.layers)]
    return Context(layers, np.concatenate([a.offsets, b.offsets[1:] + a.offsets[-1]]))


@torch.no_grad()
def concentration(engine, context, answers, prompts):
    """Shares of a context's tokens that carry CARRIED of each row's attention outside <doc>, over
    the prompts' rows, heads and retrieval layers."""
    kept, shares = torch.ones(len(context), dtype=torch.bool, device=engine.device), []
    kept[torch.from_numpy(context.offsets[:-1]).to(engine.device)] = False
    scale = attention_scale(len(context), engine.c.attention_scale_tokens)
    for (keys, _), seeking in zip(context.layers, answers.seeking):
        keys = keys[:, kept].float()
        for q, prompt in zip(seeking, prompts):
            q = q[:, 1:len(prompt)].reshape(len(keys), -1, q.shape[-1]).float()
            z = q @ keys.transpose(-1, -2) * (scale * q.shape[-1] ** -0.5)
            share = z.softmax(-1).sort(-1, descending=True).values.cumsum(-1)
            shares.append(((share < CARRIED).sum(-1) + 1).flatten() / keys.shape[1])
    return torch.cat(shares)


def emit_concentration(shares, tokens):
    shares = np.sort(shares.float().cpu().numpy())
    emit(row="concentration", tokens=tokens, carried=CARRIED, rows=len(shares),
         **{f"keys_percent_{name}": round(100 * float(value), 4) for name, value in
            (("mean", shares.mean()), ("median", shares[len(shares) // 2]),
             ("p90", shares[int(len(shares) * 0.9)]))})


def run_needles(engine, tokenizer, options, name="words", draw=draw_words, forms=RULER):
    """Each trial sees the haystack and needles: its first key's, those of its keys, or all."""
    path = os.path.join(options.prepared, options.haystack)
    if not os.path.isdir(path):
        emit(row="needles", error=f"{path} is not there")
        return
    rng, haystack = random.Random(options.seed), Corpus(path)
    sizes = np.cumsum(np.diff(haystack.token_offsets) + 1)
    count = int(min(len(haystack), np.searchsorted(sizes, max(options.tokens)) + 1))
    context = engine.encode([haystack.passage(i) for i in range(count)])
    passages, trials = [], []
    for keys, (statement, question) in zip(draw(options, rng), itertools.cycle(forms)):
        values = [str(rng.randint(10**6, 10**7 - 1)) for _ in keys]
        passages += [needle_passage(tokenizer, haystack.text(rng.randrange(len(haystack))),
                                    statement.format(*pair), rng) for pair in zip(keys, values)]
        trials.append((question.format(keys[0]), values[0]))
    needles = engine.encode(passages)
    prompts = [[QUESTION, *tokenizer.encode(question), ANSWER] for question, _ in trials]
    for size in options.tokens:
        seen = context.head(int(min(count, np.searchsorted(context.offsets, size))))
        for keys in (1, KEYS, len(passages)):
            begun, rows = time.time(), torch.zeros(len(trials), len(needles), dtype=torch.bool)
            for i in range(len(trials)):
                first = needles.offsets[KEYS * i if keys <= KEYS else 0]
                rows[i, first:needles.offsets[KEYS * i + keys if keys <= KEYS else keys]] = True
            right = 0
            for at in range(0, len(trials), 10):
                part = slice(at, at + 10)
                answers = engine.answer(prompts[part], seen,
                                        (needles, rows[part].to(engine.device)), tokens_max=12)
                texts = list(map(tokenizer.decode, answers.tokens))
                right += sum(text == value for text, (_, value) in zip(texts, trials[part]))
                if options.verbose:
                    for text, (question, value) in zip(texts, trials[part]):
                        if text != value:
                            emit(row="missed", question=question, value=value, answer=text)
            emit(row="needles", keys_are=name, tokens=len(seen), keys=keys, right=right,
                 of=len(trials), seconds=round(time.time() - begun, 1))
        whole, part = joined(seen, needles), prompts[:MEASURED_TRIALS]
        emit_concentration(concentration(engine, whole, engine.answer(part, whole, tokens_max=1),
                                         part), len(whole))


def run_made_up(engine, tokenizer, options):
    run_needles(engine, tokenizer, options, "made_up", draw_made_up)


def run_natural(engine, tokenizer, options):
    run_needles(engine, tokenizer, options, "natural", draw_made_up, natural_forms(options))


# --- questions -------------------------------------------------------------------------------

@torch.no_grad()
def passage_scores(engine, context, seeking, sizes):
    """Late interaction: sum over a question's tokens, mean over heads, of log sum exp over a
    passage's keys. [questions, passages]"""
    keys = context.layers[0][0]
    lengths = np.diff(context.offsets)
    longest = int(lengths.max())
    column = torch.arange(longest, device=engine.device)[None]
    place = torch.from_numpy(context.offsets[:-1]).to(engine.device)[:, None] + column
    absent = column >= torch.from_numpy(lengths).to(engine.device)[:, None]
    place = place.clamp(max=len(context) - 1)
    batch, heads, rows, width = seeking.shape
    groups = heads // keys.shape[0]
    asked = torch.arange(rows, device=engine.device)[None]
    asked = ((asked >= 1) & (asked <= sizes[:, None])).float()[:, None, :, None]
    total = torch.zeros(batch, len(lengths), device=engine.device)
    for head in range(keys.shape[0]):
        padded = keys[head][place].reshape(-1, width)
        q = seeking[:, head * groups:(head + 1) * groups] * width ** -0.5
        for i in range(batch):
            z = (q[i].reshape(-1, width).float() @ padded.T.float()).view(-1, *absent.shape)
            mass = torch.logsumexp(z.masked_fill_(absent[None], -1e30), -1)
            total[i] += (mass.view(groups, rows, -1) * asked[i]).sum((0, 1)) / heads
    return total


def reading_prompt(question, passage):
    return [QUESTION, *question, EVIDENCE, *passage, QUESTION, *question, ANSWER]


def read_best(engine, tokenizer, corpus, questions, ranked):
    """Reads each question's passages one at a time: per passage (answer, log p, log p(none))."""
    prompts = [reading_prompt(question, corpus.passage(int(i)))
               for question, row in zip(questions, ranked) for i in row]
    out = []
    for at in range(0, len(prompts), READ_BATCH):
        answers = engine.answer(prompts[at:at + READ_BATCH])
        out += zip(map(tokenizer.decode, answers.tokens), answers.log_probability.tolist(),
                   answers.none.tolist())
    width = len(ranked[0])
    return [out[i:i + width] for i in range(0, len(out), width)]


def surest(readings):
    """The greatest log odds of any answer, over the passages read. The engine knows more."""
    return max(float(np.log(max(1e-4, 1 - np.exp(none)))) - max(none, -9.2)
               for _, _, none in readings)


def run_questions(engine, tokenizer, options):
    begun = time.time()
    corpus = Corpus(os.path.join(options.prepared, "validation"))
    items = [(i, q, a) for i, pairs in enumerate(corpus.questions) for q, a in pairs]
    random.Random(options.seed).shuffle(items)
    items = items[:options.questions]
    questions = tokenizer.encode_batch([question for _, question, _ in items])
    gold = torch.tensor([index for index, _, _ in items], device=engine.device)
    context = engine.encode([corpus.passage(i) for i in range(len(corpus))])
    scores = []
    for at in range(0, len(items), SCORE_BATCH):
        part = questions[at:at + SCORE_BATCH]
        seeking = engine.answer([[QUESTION, *q, ANSWER] for q in part], tokens_max=1).seeking[0]
        sizes = torch.tensor([len(q) for q in part], device=engine.device)
        scores.append(passage_scores(engine, context, seeking, sizes))
    scores = torch.cat(scores)
    own = scores.gather(1, gold[:, None])
    place = (scores > own).sum(1).cpu().numpy()
    emit(row="recall", questions=len(items), passages=len(corpus),
         **{f"recall@{k}": percent(place < k) for k in (1, 4, 8)})

    ranked = scores.topk(READ_PASSAGES).indices.cpu().numpy()
    rank = scores.topk(READ_PASSAGES).values.cpu().numpy()
    read = read_best(engine, tokenizer, corpus, questions, ranked)
    chosen = [max(zip(readings, row), key=lambda x: x[0][1] + RANK_WEIGHT * x[1])[0]
              for readings, row in zip(read, rank)]
    answers = [a for _, _, a in items]
    emit(row="read_one_at_a_time", questions=len(items), passages=READ_PASSAGES,
         exact=percent([normalize(c[0]) == normalize(a) for c, a in zip(chosen, answers)]),
         f1=percent([f1(c[0], a) for c, a in zip(chosen, answers)]))

    alone = read_best(engine, tokenizer, corpus, questions, gold.cpu().numpy()[:, None])
    emit(row="read_gold", questions=len(items), f1=percent([f1(r[0][0], a) for r, a
                                                            in zip(alone, answers)]),
         none=percent([r[0][2] > np.log(0.5) for r in alone]))

    hidden = scores.clone()
    for i, (_, _, answer) in enumerate(items):  # no passage that holds the answer is left
        near = hidden[i].topk(20).indices.tolist()
        hidden[i, [j for j in near if answer.lower() in corpus.text(j).lower()]] = -1e30
    hidden.scatter_(1, gold[:, None], -1e30)
    absent = read_best(engine, tokenizer, corpus, questions,
                       hidden.topk(READ_PASSAGES).indices.cpu().numpy())
    with_answer, without = np.array([surest(r) for r in read]), np.array(list(map(surest, absent)))
    threshold = np.quantile(with_answer, REFUSED_SHARE)
    emit(row="silence", refused_answerable=percent(with_answer < threshold),
         refused_unanswerable=percent(without < threshold),
         area=percent([(with_answer > x).mean() for x in without]),
         wrong_passage_none=percent([r[2] > np.log(0.5) for row in absent for r in row]),
         threshold=round(float(threshold), 2), seconds=round(time.time() - begun, 1))


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hugging Face folder or checkpoint.pt")
    parser.add_argument("--prepared", required=True, help="folder that prepare.py made")
    parser.add_argument("--tokenizer", default=os.path.join(HERE, "../default/tokenizer.json"))
    parser.add_argument("--what", default="questions,needles,made-up,natural")
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--tokens", type=int, nargs="*", default=[32768, 1000000])
    parser.add_argument("--forms", default=os.path.join(HERE, "natural.jsonl"))
    parser.add_argument("--haystack", default="haystack", help="prepared source to hide needles in")
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--verbose", action="store_true", help="print needles that were missed")
    parser.add_argument("--scale-tokens", type=int, help="instead of the model's own; 0: no scale")
    options = parser.parse_args()
    parameters, c = read_any(options.model)
    if options.scale_tokens is not None:
        c.attention_scale_tokens = options.scale_tokens
    engine, tokenizer = Engine(c, parameters), Tokenizer(options.tokenizer)
    for what in options.what.split(","):
        {"needles": run_needles, "made-up": run_made_up, "natural": run_natural,
         "questions": run_questions}[what](engine, tokenizer, options)


if __name__ == "__main__":
    main()
