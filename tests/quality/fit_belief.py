#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Fits the rule of services/engine/belief.c: which of several readings is believed, and when none.

  fit_belief.py --data FOLDER [--model FOLDER] [--count N] [--keep FILE]

Asks questions of qa_valid that quality.py's samples leave out, half of them among all paragraphs,
half among 256, and each once more of paragraphs that do not hold its answer. Prints JSON lines: F1
by the weight of the rank score; the coefficients, fitted on all (those of the mixture's logit are
divided out) and, for the figures beside them, by ten-fold cross-validation over paragraphs. Goes
into belief.c: `choice_rank` from the table, the rest from the row "rule". With new weights run it
anew; 1,200 questions take about ten minutes. --keep writes the readings to FILE, or takes them
from there. Needs numpy.
"""
import argparse
import json
import os
import random
import sys

import numpy as np

import quality
from quality import emit, f1

SAMPLED = 1000  # the first questions are those of quality.py
BLOCK = 256
FOLDS = 10
# As in belief.c.
SHARE_RANK, LEAD_OVER, SURE, USUAL_WORDS = 0.1, 3, 1e-4, 0.3
FIGURES = ("rank", "words", "answer_logprob", "none_logprob")


# --- asking ----------------------------------------------------------------------------------

def ask_all(options):
    """A row a question asked: its paragraph, whether it can be answered, whether it was by the
    daemon's own rule, and figures and F1 of each reading."""
    paragraphs, questions = quality.load_qa(options)
    questions = questions[SAMPLED:SAMPLED + options.count]
    numbers = range(len(paragraphs))
    halves = [[i for i in numbers if i % 2 == odd] for odd in (0, 1)]
    blocks = quality.make_blocks(len(paragraphs), BLOCK, random.Random(options.seed))
    middle, rows = len(questions) // 2, []
    for among, part in ((len(paragraphs), questions[:middle]), (BLOCK, questions[middle:])):
        # Only halves are asked what they do not hold: the third set, all, is home to everything.
        sets = blocks if among == BLOCK else [*halves, list(numbers)]
        with quality.Daemon(options) as daemon:
            rows += ask_sets(daemon, paragraphs, part, sets, among)
    return rows


def ask_sets(daemon, paragraphs, questions, sets, among):
    for b, numbers in enumerate(sets):
        daemon.run("register", f"b{b}",
                   quality.write_qa(daemon, ((i, paragraphs[i]) for i in numbers)), "--create")
    places = {i: b for b, numbers in reversed(list(enumerate(sets))) for i in numbers}
    for at, (gold, question, answer) in enumerate(questions):
        whole = among != BLOCK
        home = len(sets) - 1 if whole else places[gold]
        away = quality.unanswered_block(sets[:-1] if whole else sets, paragraphs, places[gold],
                                        answer)
        for b, there in ((home, True), (away, False)):
            if b is None:
                continue
            given, readings = daemon.ask(f"b{b}", question)
            yield {"paragraph": gold, "among": among, "there": there, "found": given["found"],
                   "readings": [[r[name] for name in FIGURES] + [f1(r["answer"], answer)]
                                for r in readings]}
        if at % 50 == 49:
            print(f"{at + 1} of {len(questions)} questions among {among}", file=sys.stderr)


# --- fitting ---------------------------------------------------------------------------------

def choose(row, weight):
    """F1 of the reading whose answer is given."""
    return max(row["readings"], key=lambda r: r[2] + weight * r[0])[4]


def evidence(row):
    """What speaks for an answer: logit of the mixture, lead, words."""
    rank, words, _, none, _ = np.array(row["readings"]).T
    share = np.exp(SHARE_RANK * (rank - rank[0]))
    share /= share.sum()
    some = np.clip((share * (1 - np.exp(none))).sum(), SURE, 1 - SURE)
    lead = rank[0] - rank[1:1 + LEAD_OVER].mean() if len(rank) > 1 else 0
    return [np.log(some / (1 - some)), lead, (share * np.where(words < 0, USUAL_WORDS, words)).sum()]


def logistic(x, y, rounds=50):
    """Coefficients of x by Newton's method, the first made 1; x is scaled for it."""
    mean, scale = x.mean(0), x.std(0) + 1e-9
    z = np.c_[(x - mean) / scale, np.ones(len(x))]
    w = np.zeros(z.shape[1])
    for _ in range(rounds):
        p = 1 / (1 + np.exp(-z @ w))
        w -= np.linalg.solve((z * (p * (1 - p))[:, None]).T @ z + 1e-3 * np.eye(len(w)),
                             z.T @ (p - y) + 1e-3 * w)
    w = w[:-1] / scale
    return w / w[0]


def report(belief, rows, f, share, **row):
    """How the answerable and the others fare when this share of the answerable is refused."""
    there = np.array([r["there"] for r in rows])
    least = np.quantile(belief[there], share)
    emit(**row, refused_answerable=round(100 * share, 1), least=round(float(least), 3),
         refused_unanswerable=quality.percent((belief[~there] < least).sum(), (~there).sum(), 1),
         f1=quality.percent((f[there] * (belief[there] >= least)).sum(), there.sum()),
         area=round(float(np.mean([(belief[there] > b).mean() for b in belief[~there]])), 4))


def fit(rows, options):
    rows = [r for r in rows if r["readings"]]
    there = np.array([r["there"] for r in rows])
    for weight in (0.05, 0.1, 0.15, 0.18, 0.2, 0.22, 0.25, 0.3, 0.4):
        emit(row="choice", choice_rank=weight, questions=int(there.sum()),
             f1=round(100 * np.mean([choose(r, weight) for r in rows if r["there"]]), 2))
    f = np.array([choose(r, options.choice_rank) for r in rows])
    x = np.array([evidence(r) for r in rows])
    among = np.array([r["among"] for r in rows])
    found = np.array([r["found"] for r in rows])
    for size in sorted(set(among)):
        here, away = there & (among == size), ~there & (among == size)
        emit(row="as served", among=int(size), answerable=int(here.sum()),
             unanswerable=int(away.sum()), f1=quality.percent((f * found)[here].sum(), here.sum()),
             refused_answerable=quality.percent((~found)[here].sum(), here.sum(), 1),
             refused_unanswerable=quality.percent((~found)[away].sum(), away.sum(), 1))
    fold = np.array([r["paragraph"] * 7919 % FOLDS for r in rows])
    belief = np.zeros(len(rows))
    for k in range(FOLDS):
        belief[fold == k] = x[fold == k] @ logistic(x[fold != k], there[fold != k])
    for share in options.refused:
        for size in (None, *sorted(set(among))):
            part = among == size if size else np.ones(len(rows), bool)
            report(belief[part], [r for r, kept in zip(rows, part) if kept], f[part], share,
                   row="cross-validated", among=int(size or 0))
    w = logistic(x, there)
    for share in options.refused:
        report(x @ w, rows, f, share, row="rule", lead=round(w[1], 4), words=round(w[2], 2))


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of the data files")
    parser.add_argument("--build", default=os.path.join(quality.ROOT, "build/release"))
    parser.add_argument("--model", help="model folder; the built-in one by default")
    parser.add_argument("--count", type=int, default=1200, help="questions")
    parser.add_argument("--keep", help="file of readings: taken if it is there, else written")
    parser.add_argument("--choice-rank", type=float, default=0.2)
    parser.add_argument("--refused", type=float, nargs="*", default=[0.05, 0.065, 0.08],
                        help="shares of the answerable questions to be refused")
    parser.add_argument("--seed", type=int, default=5, help="quality.py's")
    parser.add_argument("--questions", help="a file of questions instead of qa_valid's")
    options = parser.parse_args()
    if options.keep and os.path.exists(options.keep):
        with open(options.keep, encoding="utf-8") as file:
            rows = json.load(file)
    elif options.data:
        rows = ask_all(options)
        if options.keep:
            with open(options.keep, "w", encoding="utf-8") as file:
                json.dump(rows, file)
    else:
        parser.error("--data or a file of readings is needed")
    fit(rows, options)


if __name__ == "__main__":
    main()
