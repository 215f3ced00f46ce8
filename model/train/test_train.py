#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Tests of the training code on a CPU with a tiny model; about two minutes. Run by
./loci-dev test-train, or alone: python -m unittest test_train (in this folder)."""
import copy
import json
import lzma
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import types
import unittest

import numpy as np
import torch

import generate
from corpus import ANSWER, EOS, NONE, QUESTION, Corpus, Tokenizer
from evaluate import draw_made_up, passage_scores
from export import read_checkpoint, read_folder, read_mean, write_folder
from facts import ENDINGS, FactMaker, Invention
from inference import Engine
from loader import open_packer, open_sources
from network import (EMBEDDING, FINAL_NORM, ModelConfig, Network, initial_parameters, rms_norm,
                     spread)
from optimizer import Optimizer
from packing import (ANSWER_TYPES, ANSWERING_ROWS, PackWriter, Segment, attention_scale,
                     generation_prompt, places_of)
from questions import AnswerReplacer, without_sentences
from train import to_device
from wordings import NaturalFacts

HERE = os.path.dirname(os.path.abspath(__file__))
NEEDLES = os.path.join(HERE, "../../tests/quality/needles.jsonl")
FORMS = os.path.join(HERE, "natural.jsonl")
TOKENIZER = os.path.join(HERE, "../default/tokenizer.json")
SYLLABLES = ["ba", "co", "du", "fe", "gi", "lo", "mu", "na", "pe", "ri", "so", "tu", "va", "we"]


def tiny_config(**batch):
    """The shipped TOML, with a model and batches for a CPU."""
    with open(os.path.join(HERE, "default.toml"), "rb") as file:
        config = tomllib.load(file)
    config["model"].update(width=64, layers=4, heads=2, key_heads=1, head_width=32,
                           feed_forward=128, window=64, retrieval_layers=[1, 3],
                           attention_scale_tokens=64)
    config["batch"].update(tokens=512, **batch)
    config["mix"]["sharpen"] = 1.0
    config["optimizer"].update(warmup_steps=5)
    phase = {**config["phases"][0], "name": "text", "slot_tokens": 512, "slot_questions": 4,
             "steps": 12, "dropout": 0.1}
    del phase["seconds"]
    other = {**phase, "name": "reading", "steps": 8, "learning_rate": [0.01, 0.0],
             "average": 0.9}
    config["phases"] = [phase, other]
    return config


def to_toml(value, path=()):
    """Enough TOML for the configuration."""
    lines, tables = [], []
    for key, item in value.items():
        if isinstance(item, dict) and path[:1] != ("phases",):
            tables += [f"[{'.'.join((*path, key))}]", to_toml(item, (*path, key))]
        elif isinstance(item, list) and item and isinstance(item[0], dict):
            for row in item:
                tables += [f"[[{key}]]", to_toml(row, ("phases",))]
        elif isinstance(item, dict):
            lines.append(f"{key} = {{ " + ", ".join(f"{k} = {v}" for k, v in item.items()) + " }")
        else:
            lines.append(f"{key} = {json.dumps(item)}")
    return "\n".join(lines + tables)


def made_text(rng, sentences):
    def word():
        return "".join(rng.choice(SYLLABLES) for _ in range(rng.randint(1, 3)))

    out = []
    for _ in range(sentences):
        name, place, year = word().capitalize(), word().capitalize(), rng.randint(1200, 2000)
        out.append(f"In {year} the {word()} {word()} of {name} came to {place} and {word()}.")
    return " ".join(out)


def write_data(folder):
    rng = random.Random(3)
    paragraphs = [made_text(rng, 4) for _ in range(200)]
    rows = {
        "text_gov": [{"t": "\n".join(made_text(rng, 6) for _ in range(5))} for _ in range(60)],
        "qa_train": [{"s": "made", "t": str(i // 10), "c": text, "q": [
            [f"Who came in {text.split(' ')[1]}?", text.split(" ")[6]]]}
            for i, text in enumerate(paragraphs)],
        "qa_valid": [{"s": "made", "t": "held out", "c": made_text(rng, 4),
                      "q": [["Who came?", "In"]]}],
    }
    for name, items in rows.items():
        with lzma.open(os.path.join(folder, name + ".jsonl.xz"), "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(item) + "\n" for item in items)


def copy_pack(config, rng, passages=16, queries=48):
    """A pack of facts in passages of their own: a value to be repeated, and its key."""
    writer = PackWriter(config, config["batch"]["tokens"], 16)
    keys = rng.sample(range(100, 200), passages)
    values = [rng.randrange(200, 264) for _ in keys]
    segments = [Segment("context", np.array([3, value, key, rng.randrange(300, 400)], np.uint16),
                        0.0, i)
                for i, (key, value) in enumerate(zip(keys, values))]
    for i in rng.choices(range(passages), k=queries):
        segments.append(Segment("query", np.array([QUESTION, keys[i], ANSWER], np.uint16),
                                passage=i, answer=np.array([values[i], EOS], np.uint16),
                                answer_type="fact", question_tokens=1))
    rest = config["batch"]["tokens"] - sum(map(len, segments))
    segments.append(Segment("language", np.full(rest, 5, np.uint16), 0.0))
    writer.add_slot(0, segments, rng)
    return writer.finish()


class ModelTest(unittest.TestCase):
    def setUp(self):
        torch.manual_seed(0)
        self.config = tiny_config()
        self.c = ModelConfig(self.config["model"])

    def test_learns_to_copy_a_needle(self):
        config = copy.deepcopy(self.config)
        config["batch"]["tokens"] = 384
        c = ModelConfig({**config["model"], "vocabulary": 512})
        parameters = {n: p.requires_grad_(True) for n, p in initial_parameters(c, 1).items()}
        network = Network(c, parameters, config["loss"], 384, with_dropout=False)
        optimizer, rng, right = Optimizer(parameters, config["optimizer"]), random.Random(1), []
        for _ in range(2000):
            losses = network.losses(to_device(copy_pack(config, rng), "cpu"))
            auxiliary = losses["mass"].mean() + losses["ranking"].mean() + losses["pointing"]
            (losses["answer"] + 0.1 * auxiliary + 0.03 * losses["spread"].mean()).backward()
            optimizer.step(0.005, 0.0007)
            right.append(losses["answer_right"][::2].mean().item())
            if len(right) > 50 and np.mean(right[-50:]) > 0.92:
                break
        self.assertGreater(np.mean(right[-50:]), 0.9)

    def query_pack(self, kind):
        """One slot of contexts and one query; returns it and the place of the query."""
        config = copy.deepcopy(self.config)
        rng = np.random.default_rng(2)
        writer = PackWriter(config, 512, 4)
        contexts = [rng.integers(100, 200, 60).astype(np.uint16) for _ in range(7)]
        query = np.array([QUESTION, 150, 160, 170, ANSWER], np.uint16)
        segments = [Segment("context", np.concatenate([[3], t]).astype(np.uint16), 1.0, i)
                    for i, t in enumerate(contexts)]
        segments.append(Segment(kind, query, passage=2, answer=np.array([180, EOS], np.uint16),
                                answer_type="fact", question_tokens=3))
        rest = 512 - sum(map(len, segments))
        segments.append(Segment("language", np.full(rest, 77, np.uint16), 1.0))
        writer.add_slot(0, segments, random.Random(0))
        return writer.finish(), contexts, query

    def logits(self, c, parameters, pack):
        network = Network(c, parameters, self.config["loss"], 512, with_dropout=False)
        x, _ = network.forward(to_device(pack, "cpu"))
        h = rms_norm(x, parameters[FINAL_NORM], c.norm_epsilon)
        return (h @ parameters[EMBEDDING].T).detach()

    def test_scale_is_for_queries_that_see_a_corpus(self):
        visible = 7 * 61
        for kind, expected in (("query", attention_scale(visible, 64)), ("isolated", 1.0)):
            pack, _, query = self.query_pack(kind)
            start = int(np.flatnonzero(pack["tokens"] == QUESTION)[0])
            rows = slice(start, start + len(query) + 2)
            np.testing.assert_allclose(pack["scale"][rows], expected, rtol=1e-6)
            self.assertTrue((np.delete(pack["scale"], np.r_[rows]) == 1).all())
        self.assertGreater(attention_scale(visible, 64), 1.4)
        self.assertEqual(attention_scale(0, 64), 1.0)
        self.assertEqual(attention_scale(40, 64), 1.0)
        self.assertEqual(attention_scale(10**6, 0), 1.0)

    def test_serving_gives_the_logits_of_training(self):
        parameters = initial_parameters(self.c, 4)
        parameters = {n: p * (8 if "q_proj" in n or "k_proj" in n else 2)
                      for n, p in parameters.items()}
        for kind in ("query", "isolated"):
            pack, contexts, query = self.query_pack(kind)
            start = int(np.flatnonzero(pack["tokens"] == QUESTION)[0])
            expected = self.logits(self.c, parameters, pack)[start + len(query) - 1]
            engine = Engine(self.c, parameters)
            context = engine.encode(contexts) if kind == "query" else None
            found = engine.answer([list(query)], context, tokens_max=1, banned=())
            best = int(expected.argmax())
            self.assertEqual(found.tokens[0], [best] if best != EOS else [])
            self.assertAlmostEqual(float(found.log_probability),
                                   float(expected.log_softmax(-1)[best]), places=3)
            if kind == "query":  # the same contexts as what a mask leaves of more
                seen = torch.ones(1, len(context), dtype=torch.bool)
                again = engine.answer([list(query)], None, (context, seen), 1, ())
                self.assertAlmostEqual(float(again.log_probability),
                                       float(found.log_probability), places=4)

    def test_drawn_questions_without_chance_are_greedy(self):
        parameters = {n: p * 3 for n, p in initial_parameters(self.c, 7).items()}
        engine, rng = Engine(self.c, parameters), np.random.default_rng(8)
        passages = [rng.integers(100, 200, n).tolist() for n in (20, 33, 7)]
        options = type("Options", (), {"samples": 2, "answer_temperature": 1.0,
                                       "question_temperature": 1.0, "top_p": 1e-6})()
        drawn = generate.draw_questions(engine, passages, options)
        greedy = engine.answer([generation_prompt(p) for p in passages], tokens_max=12, banned=())
        for rows, expected in zip(drawn.tolist(), greedy.tokens):
            self.assertEqual(rows[0], rows[1])
            self.assertEqual(rows[0][:len(expected)], expected)
        self.assertGreater(len(set(map(tuple, greedy.tokens))), 1)

    def test_candidates_are_ranked_as_all_passages_are(self):
        parameters = {n: p * 3 for n, p in initial_parameters(self.c, 9).items()}
        engine, rng = Engine(self.c, parameters), np.random.default_rng(10)
        context = engine.encode([rng.integers(100, 200, n).tolist() for n in (9, 30, 17, 22)],
                                layers=1)
        questions = [rng.integers(100, 200, n).tolist() for n in (5, 8)]
        seeking = engine.answer([[QUESTION, *q, ANSWER] for q in questions], tokens_max=1).seeking
        scores = passage_scores(engine, context, seeking[0], torch.tensor([5, 8]))
        ranked = generate.rank_candidates(engine, context, questions, [[0, 1, 2, 3], [3, 1]])
        self.assertEqual(ranked[0], scores[0].argsort(descending=True).tolist())
        self.assertEqual(ranked[1], sorted([3, 1], key=lambda i: -scores[1, i]))

    def test_mean_of_checkpoints(self):
        runs = [initial_parameters(self.c, seed) for seed in (1, 2)]
        with tempfile.TemporaryDirectory() as folder:
            paths = [os.path.join(folder, f"{i}.pt") for i in range(2)]
            for parameters, path in zip(runs, paths):
                torch.save({"config": self.config, "optimizer": {"average": None},
                            "parameters": parameters}, path)
            mean, _ = read_mean(paths)
        for name, tensor in mean.items():
            expected = (runs[0][name] + runs[1][name]) / 2
            self.assertTrue(torch.allclose(tensor, expected), name)

    def test_exported_folder_loads_in_transformers(self):
        from transformers import AutoModelForCausalLM
        parameters = initial_parameters(self.c, 5)
        with tempfile.TemporaryDirectory() as folder:
            write_folder(parameters, self.c, folder, dtype=torch.float32)
            stored = read_folder(folder, self.c)
            self.assertTrue(all(torch.equal(stored[n], p) for n, p in parameters.items()))
            with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
                self.assertEqual(json.load(file)["loci"], {"attention_scale_tokens": 64})
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32,
                                                         attn_implementation="eager").eval()
        writer = PackWriter(self.config, 512, 4)
        tokens = np.random.default_rng(6).integers(32, 8192, 512).astype(np.uint16)
        writer.add_slot(0, [Segment("language", tokens, 1.0)], random.Random(0))
        ours = self.logits(self.c, parameters, writer.finish())
        with torch.no_grad():
            theirs = model(torch.from_numpy(tokens.astype(np.int64))[None]).logits[0]
        self.assertLess(float((ours - theirs).abs().max()), 1e-4)


class DataTest(unittest.TestCase):
    def test_made_up_keys_differ_and_resemble(self):
        near = 0
        for seed in range(200):
            rng = random.Random(seed)
            invention = Invention(rng)
            keys = invention.keys(rng, 12)
            self.assertEqual(len(keys), len(set(keys)), f"seed {seed}")
            parts = invention.draw(rng)
            other = invention.near(rng, parts)
            self.assertEqual(sum(a != b for a, b in zip(parts, other)), 1, f"seed {seed}")
            near += len(keys) > 1
        self.assertGreater(near, 190)
        self.assertTrue(set(ENDINGS))

    def test_facts_about_made_up_keys_hold_their_answers(self):
        maker, sizes = FactMaker({"low": ["table", "green"], "names": ["Anna", "Rome"]}, 1.0), []
        for seed in range(200):
            made = maker.make(random.Random(seed))
            sizes.append(len(made))
            asked = [(text, *pair) for text, pairs in made for pair in pairs]
            self.assertTrue(asked)
            for text, _, answer in asked:
                self.assertIn(answer.lower(), text.lower(), f"seed {seed}")
        self.assertGreater(max(sizes), 30)

    def natural_facts(self):
        """NaturalFacts over one passage with one question whose key is Kelvar, answer 1204 barrels."""
        corpus = types.SimpleNamespace(
            questions=[[["How many barrels did the brewery of Kelvar sell?", "1204"]]],
            text=lambda index: "It rained. Within a year the brewery at Kelvar had sold 1204 barrels.")
        facts = FactMaker({"low": ["river", "stone", "quiet"], "names": ["Ada", "Boole", "Curie"]})
        return NaturalFacts(corpus, [0], AnswerReplacer(corpus.questions, facts.names), facts)

    def test_written_sentences_are_about_other_keys(self):
        rng, natural, keys = random.Random(1), self.natural_facts(), set()
        for _ in range(20):
            for statement, [(question, answer)] in natural.rewritten(rng):
                found = re.fullmatch(r"Within a year the brewery at (.+) had sold (\d+) barrels\.",
                                     statement)
                self.assertEqual(found.group(2), answer)
                self.assertIn(found.group(1).lower(), question.lower())
                self.assertNotIn("Kelvar", question)
                keys.add(found.group(1))
        self.assertGreater(len(keys), 20)

    def test_the_grammar_says_what_is_asked(self):
        rng, natural = random.Random(2), self.natural_facts()
        for line in natural.grammar:
            keys = natural.keys(rng, 4)
            made = natural.worded(rng, line, keys)
            self.assertEqual(len({statement for statement, _ in made}), len(keys))
            for key, (statement, [(question, answer)]) in zip(keys, made):
                self.assertIn(answer.lower(), statement.lower())
                self.assertIn(key.lower(), statement.lower())
                self.assertIn(key.lower(), question.lower())
                self.assertNotRegex(statement + question, "[{}|=]")

    def test_the_grammar_leaves_out_what_is_tested(self):
        def runs_of_four(text):
            words = re.findall(r"[a-z]+|_", re.sub(r"\{\d?\}|\d+", "_", text.lower()))
            return {" ".join(words[i:i + 4]) for i in range(len(words) - 3)}

        tested, made = set(), set()
        for path in (NEEDLES, FORMS):
            with open(path, encoding="utf-8") as file:
                for form in map(json.loads, file):
                    tested |= runs_of_four(form["statement"]) | runs_of_four(form["question"])
        rng, natural = random.Random(3), self.natural_facts()
        for line in natural.grammar * 30:
            for statement, pairs in natural.worded(rng, line, ["_"]):
                made |= runs_of_four(statement).union(*(runs_of_four(q) for q, _ in pairs))
        self.assertGreater(len(made), 10000)
        self.assertLessEqual(tested & made, {"how many times did", "many times did the"})

    def test_evaluation_keys_are_near_misses(self):
        options = type("Options", (), {"trials": 50})()
        trials = draw_made_up(options, random.Random(1))
        self.assertEqual(len({key for keys in trials for key in keys}), 250)
        self.assertTrue(all(len(keys) == 5 for keys in trials))

    def test_pointers_are_places_of_the_answer(self):
        tokens = np.array([3, 50, 60, 70, 50, 60, 80, 50, 60], np.uint16)
        self.assertEqual(places_of(np.array([50, 60]), tokens).tolist(), [1, 4, 7])
        self.assertEqual(places_of(np.array([60, 80]), tokens).tolist(), [5])
        self.assertEqual(places_of(np.array([80, 90]), tokens).tolist(), [])

    def test_answering_sentences_are_taken_away(self):
        text = "It rained. Anna came at noon. They left. At NOON it was dry."
        self.assertEqual(without_sentences(text, "noon"), "It rained. They left.")

    def test_spread_is_the_entropy_of_what_is_kept(self):
        logits = torch.zeros(1, 2, 1, 3, 10)
        kept = torch.arange(10)[None] < 4
        logits[..., 9] = 50.0  # not kept
        weights = torch.tensor([[[1.0, 1.0, 0.0]]])
        self.assertAlmostEqual(float(spread(logits, kept, weights)), float(np.log(4)), places=5)
        logits[..., 0] = 30.0
        self.assertLess(float(spread(logits, kept, weights)), 1e-3)


class ProgramTest(unittest.TestCase):
    """prepare, train and export as programs."""

    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.TemporaryDirectory()
        cls.path = cls.folder.name
        write_data(cls.path)
        cls.config = os.path.join(cls.path, "tiny.toml")
        config = tiny_config()
        with open(cls.config, "w", encoding="utf-8") as file:
            file.write(to_toml(config))
        with open(cls.config, "rb") as file:
            assert tomllib.load(file) == config
        cls.prepared = os.path.join(cls.path, "prepared")
        cls.program("prepare.py", "prepare", "--data", cls.path, "--out", cls.prepared,
                    "--config", cls.config, "--processes", "2")

    @classmethod
    def tearDownClass(cls):
        cls.folder.cleanup()

    @classmethod
    def program(cls, name, *arguments):
        done = subprocess.run([sys.executable, os.path.join(HERE, name), *arguments],
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        return done.stdout

    def train(self, name, *arguments, workers="2"):
        self.program("train.py", "--prepared", self.prepared, "--run",
                     os.path.join(self.path, name), "--config", self.config, "--workers", workers,
                     "--validate-seconds", "0", *arguments)
        return os.path.join(self.path, name, "checkpoint.pt")

    def test_prepared_passages(self):
        corpus, tokenizer = Corpus(os.path.join(self.prepared, "questions")), Tokenizer(TOKENIZER)
        self.assertGreaterEqual(len(corpus), 200)
        for i in (0, 17, len(corpus) - 1):
            self.assertEqual(corpus.passage(i).tolist(), tokenizer.encode(corpus.text(i))[:255])
            for _, answer in corpus.questions[i]:
                self.assertIn(answer, corpus.text(i))

    def test_what_is_drawn_becomes_questions(self):
        tokenizer, shared = Tokenizer(TOKENIZER), generate.Shared
        shared.sources = {"questions": Corpus(os.path.join(self.prepared, "questions"))}
        shared.tokenizer = tokenizer
        shared.forbidden = generate.shingles(" ".join(f"word{i}" for i in range(13)))
        source = shared.sources["questions"]
        question, answer = source.questions[0][0]

        def row(answer, question):
            return np.array([*tokenizer.encode(answer), QUESTION, *tokenizer.encode(question), EOS,
                             5], np.uint16)

        good = row(answer, question + " Which of them?")
        rows = [good, good, row("Nowhere", question), row(answer, "Is it " + answer + " who came?"),
                row(answer, "Who?"), good[:-3],
                row(answer, " ".join(f"word{i}" for i in range(14)))]
        self.assertEqual(generate.parse(("questions", 0, rows)),
                         [["questions", 0, question + " Which of them?", answer]])

    def test_generates_and_mines(self):
        prepared = os.path.join(self.path, "mined")
        shutil.copytree(self.prepared, prepared)
        with open(self.config, "rb") as file:
            config = tomllib.load(file)
        parameters = initial_parameters(ModelConfig(config["model"]), 3)
        model = os.path.join(self.path, "model.pt")
        torch.save({"config": config, "optimizer": {"average": None}, "parameters": parameters},
                   model)
        self.program("generate.py", "--generator", model, "--reader", model, "--prepared", prepared,
                     "--config", self.config, "--passages", "6", "--processes", "2")
        corpus, mined = Corpus(os.path.join(prepared, "questions")), 0
        for gold, pairs in enumerate(corpus.questions):
            for _, answer, wrong in pairs:
                self.assertNotIn(gold, wrong)
                self.assertTrue(all(answer.lower() not in corpus.text(i).lower() for i in wrong))
                mined += len(wrong)
        self.assertGreater(mined, 200)
        corpus.generated = [[list(p) for p in pairs] for pairs in corpus.questions]
        packer = open_packer(prepared, {**config, "mix": {**config["mix"], "mined": 1.0}},
                             TOKENIZER, {**open_sources(prepared, config), "questions": corpus})
        gold = next(i for i, pairs in enumerate(corpus.questions) if pairs and pairs[0][2])
        question, answer, wrong = corpus.questions[gold][0]
        near = packer.near_passages(corpus, gold, packer.tokenizer.encode(question), list(wrong))
        self.assertEqual(sorted(near), sorted(wrong[:4]))
        for slots, kinds in (({"reading": 1.0}, {"read_question", "read_generated", "refusal"}),
                             ({"generation": 1.0}, {"generation"})):
            phase = {**config["phases"][0], "slots": slots}
            seen = {ANSWER_TYPES[t] for i in range(8)
                    for t in packer.pack(f"test {i}", phase)["answer_types"]}
            self.assertLessEqual(kinds, seen)

    def test_packs_point_at_what_is_copied_and_refuse(self):
        with open(self.config, "rb") as file:
            config = tomllib.load(file)
        packer, pointed, refused = open_packer(self.prepared, config, TOKENIZER), 0, 0
        phase = {**config["phases"][0], "slots": {"corpus": 1.0, "reading": 1.0}}
        for number in range(20):
            pack = packer.pack(f"test {number}", phase)
            tokens = pack["tokens"]
            for slot, question, row in np.argwhere(pack["pointers"][..., 0] >= 0):
                self.assertLess(row, ANSWERING_ROWS)
                place = slot * phase["slot_tokens"] + pack["pointers"][slot, question, row, 0]
                predicts = tokens[pack["score_rows"][slot, question, row] + 1]
                self.assertEqual(tokens[place], predicts)
                self.assertEqual(pack["passage"][place], pack["gold"][slot, question])
                pointed += 1
            refusal = pack["answer_types"] == ANSWER_TYPES.index("refusal")
            predicted = tokens[pack["answer_rows"][refusal] + 1]
            self.assertTrue((predicted[::2] == NONE).all() and (predicted[1::2] == EOS).all())
            refused += len(predicted) // 2
        self.assertGreater(pointed, 20)
        self.assertGreater(refused, 5)

    def test_resumes_exactly(self):
        whole = torch.load(self.train("whole"), weights_only=True)
        self.train("parts", "--stop-after-steps", "7")
        self.train("parts", "--stop-after-steps", "7", workers="1")
        parts = torch.load(self.train("parts"), weights_only=True)
        self.assertEqual(whole["place"], parts["place"])
        self.assertEqual(whole["place"]["step"], 20)
        for kind in ("parameters",):
            for name, tensor in whole[kind].items():
                self.assertTrue(torch.equal(tensor, parts[kind][name]), name)
        average = parts["optimizer"]["average"]
        for name, tensor in whole["optimizer"]["average"].items():
            self.assertTrue(torch.equal(tensor, average[name]), name)

        folder = os.path.join(self.path, "exported")
        self.program("export.py", "--checkpoint", os.path.join(self.path, "parts/checkpoint.pt"),
                     "--out", folder, "--tokenizer", TOKENIZER)
        chosen, c = read_checkpoint(os.path.join(self.path, "parts/checkpoint.pt"))
        stored = read_folder(folder, c)
        for name, tensor in chosen.items():
            self.assertTrue(torch.equal(tensor.bfloat16().float(), stored[name]), name)
        self.assertTrue(os.path.exists(os.path.join(folder, "tokenizer.json")))


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    unittest.main(verbosity=2)
