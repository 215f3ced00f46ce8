#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""A stock model from a folder, through the command line: register in corpora of both encodings, ask
in every mode, restart.

Its weights are random, so what it says is only compared with itself.
"""
import json
import os
import shutil
import tempfile
import unittest

from harness import HANDBOOK, LOCID, ROOT, Case, Daemon, clean_environment, run

QUESTION = "Who designed the dome of the North Telescope?"
MODES = ("dense", "squeezed", "hierarchical")
FILES = ("north-dome.md", "cryogenics.md", "library.md")


def make_model(folder, base, **config):
    """tests/data/model/tiny-BASE under a tokenizer and chat template such as Qwen's."""
    source = os.path.join(ROOT, "tests", "data", "model", "tiny-" + base)
    os.makedirs(folder)
    shutil.copy(os.path.join(source, "model.safetensors"), folder)
    with open(os.path.join(source, "tokenizer.json"), encoding="utf-8") as file:
        tokenizer = file.read()
    for mark, name in (("<bos>", "<|endoftext|>"), ("<doc>", "<|im_start|>"), ("<q>", "<|im_end|>"),
                       ("<ev>", "<s3>"), ("<a>", "<s4>"), ("<none>", "<s5>")):
        tokenizer = tokenizer.replace(mark, name)
    with open(os.path.join(source, "config.json"), encoding="utf-8") as file:
        config = {**json.load(file), "max_position_embeddings": 16384, **config}
    for name, text in (("tokenizer.json", tokenizer), ("config.json", json.dumps(config)),
                       ("chat_template.jinja", "<|im_start|>")):
        with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
            file.write(text)
    return folder


class StockModel(Case):
    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.mkdtemp(prefix="loci-stock-")
        model = make_model(os.path.join(cls.folder, "model"), "qwen3")
        cls.daemon = Daemon("--model", model, folder=cls.folder).start()

    @classmethod
    def tearDownClass(cls):
        cls.daemon.close()

    def ask(self, corpus, *flags):
        result = self.result("ask", corpus, QUESTION, "--max-tokens", "16", "--temperature", "0.8",
                             "--seed", "3", *flags)
        self.assertTrue(result["found"])
        self.assertTrue(result["evidence"])
        for item in result["evidence"]:
            name = item["document"].rsplit("/", 1)[-1]
            with open(os.path.join(HANDBOOK, name), "rb") as file:
                text = file.read()
            self.assertEqual(text[item["start"]:item["end"]].decode(), item["quote"])
        return {key: result[key] for key in ("answer", "stop", "evidence")}

    def answers(self):
        return [self.ask(corpus, "--mode", mode, read) for corpus in ("text", "apart")
                for mode in MODES for read in ("--read-twice", "--no-read-twice")]

    def test_answers_stay_over_a_restart(self):
        self.ok("corpus", "create", "text")
        self.ok("corpus", "create", "apart", "--encoding", "independent")
        for corpus, encoding in (("text", "causal"), ("apart", "independent")):
            self.assertEqual(self.result("corpus", "show", corpus)["encoding"], encoding)
            self.ok("register", corpus, *(os.path.join(HANDBOOK, name) for name in FILES))
        before = self.answers()
        for corpus in ("text", "apart"):
            dense = self.ask(corpus, "--mode", "dense", "--no-read-twice")
            full = self.ask(corpus, "--mode", "hierarchical", "--no-read-twice", "--top-p", "1")
            self.assertEqual(dense["answer"], full["answer"])
        hits = self.result("search", "text", QUESTION, "-k", "3")["hits"]
        self.assertEqual(len(hits), 3)
        self.assertEqual(self.daemon.stop(), 0)
        self.daemon.start()
        self.assertEqual(self.answers(), before)
        self.assertEqual(self.daemon.status()["architecture"], "Qwen3ForCausalLM")

    def test_causal_corpora_have_bounds(self):
        self.ok("corpus", "create", "bounded")
        self.assertIn("causal (at most ", self.ok("corpus", "show", "bounded"))
        self.ok("corpus", "create", "unbounded", "--encoding", "causal", "--beyond-trained-length")
        self.assertNotIn("tokens_max", self.result("corpus", "show", "unbounded"))
        self.refused("corpus", "create", "other", "--encoding", "both", says="neither")
        self.refused("corpus", "create", "other", "--encoding", "independent",
                     "--beyond-trained-length", says="any length")
        path = os.path.join(HANDBOOK, FILES[0])
        self.ok("register", "bounded", path)
        self.refused("document", "delete", "bounded", FILES[0], says="causal")
        self.ok("register", "bounded", path)  # unchanged
        self.refused("register", "bounded", "-", "--id", FILES[0], says="cannot be replaced",
                     input="Another text.")
        done = self.daemon.loci("register", "bounded", "-", "--id", "long", input="word " * 4000)
        self.assertEqual(done.returncode, 1)
        self.assertIn("was not trained on longer sequences", done.stderr)
        self.ok("document", "delete", "bounded", "long")
        self.ok("register", "bounded", "-", "--id", "short", input="It fits.")
        self.assertEqual(self.result("corpus", "show", "bounded")["pending_documents"], 0)

    def test_settings_stay_over_a_restart(self):
        self.ok("corpus", "create", "tuned", "--encoding", "independent", "--dense-layers", "1")
        shown = self.result("corpus", "show", "tuned")
        self.assertEqual([shown["dense_layers"], shown["attn_temperature"], shown["attn_scale"]],
                         [1, 1.0, 1.0])
        self.ok("register", "tuned", *(os.path.join(HANDBOOK, name) for name in FILES))
        before = self.ask("tuned", "--mode", "dense", "--no-read-twice")
        self.ok("corpus", "set", "tuned", "--attn-temperature", "0.7")
        changed = self.ask("tuned", "--mode", "dense", "--no-read-twice")
        self.assertNotEqual(before, changed)
        text = self.ok("corpus", "set", "tuned", "--attn-scale", "0.9", "--dense-layers", "0")
        self.assertIn("first 0 layers dense, temperature 0.7, scale 0.9", text)
        self.assertEqual(self.daemon.stop(), 0)
        self.daemon.start()
        shown = self.result("corpus", "show", "tuned")
        self.assertEqual([shown["dense_layers"], shown["attn_temperature"], shown["attn_scale"]],
                         [0, 0.7, 0.9])
        self.ok("corpus", "set", "tuned", "--attn-temperature", "1", "--attn-scale", "1",
                "--dense-layers", "1")
        self.assertEqual(self.ask("tuned", "--mode", "dense", "--no-read-twice"), before)
        self.refused("corpus", "set", "tuned", "--dense-layers", "3",
                     says="dense_layers is 3, and the model has 2 retrieval layers")
        self.refused("corpus", "set", "nowhere", "--attn-scale", "0.9", says="no corpus")
        for flags in (("--attn-temperature", "0"), ("--attn-scale", "nan"), ()):
            self.assertEqual(self.daemon.loci("corpus", "set", "tuned", *flags).returncode, 2)

    def test_calibration(self):
        self.ok("corpus", "create", "uncalibrated", "--encoding", "independent")
        self.refused("corpus", "calibrate", "uncalibrated", says="no two searchable passages")
        self.refused("corpus", "calibrate", "nowhere", says="no corpus")
        self.ok("register", "uncalibrated", *(os.path.join(HANDBOOK, name) for name in FILES))
        text = self.ok("corpus", "calibrate", "uncalibrated")
        self.assertIn("apart, temperature 1, scale 1 *", text)
        self.assertIn("thresholds of mode squeezed are there", text)
        done = self.result("corpus", "calibrate", "uncalibrated", "--apply")
        self.assertTrue(done["applied"] and done["comparable"])
        best = done["rows"][done["best"]]
        self.assertEqual(best["loss"], min(row["loss"] for row in done["rows"]))
        shown = self.result("corpus", "show", "uncalibrated")
        for key in ("attn_temperature", "attn_scale"):
            self.assertEqual(shown[key], best[key])
        self.ok("corpus", "create", "whole")
        self.ok("register", "whole", os.path.join(HANDBOOK, FILES[0]))
        self.assertEqual(self.result("corpus", "calibrate", "whole")["encoding"], "causal")
        self.refused("corpus", "calibrate", "whole", "--apply", says="is causal")

    def test_unusable_models_are_refused_by_name(self):
        for base, says in (("qwen2", "head_dim"), ("mistral", "head_dim")):
            model = make_model(os.path.join(self.folder, base), base)
            done = run(LOCID, "--data", self.folder + "/other", "--model", model, "--check-config",
                       env=clean_environment(), cwd=ROOT)
            self.assertEqual(done.returncode, 2, done.stderr)
            self.assertIn(says, done.stderr)
            self.assertFalse(os.path.exists(self.folder + "/other"))


if __name__ == "__main__":
    unittest.main()
