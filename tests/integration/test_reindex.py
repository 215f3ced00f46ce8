#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""A model is exchanged, through the command line: what a corpus of another model says, the old index
answering while the new one is made, kill -9 meanwhile, and the new one equal to a registration.

  test_reindex.py [BUILD_DIR]      (LOCI_TEST_SEED chooses the moments; it is printed)
"""
import glob
import json
import os
import random
import signal
import tempfile
import time
import unittest

from harness import HANDBOOK, LOCID, ROOT, Case, Daemon, clean_environment, run
from test_stock_model import make_model

QUESTION = "Whose dome?"  # each of its bytes reads the corpus once, where none is read twice
FILES = [os.path.join(HANDBOOK, name) for name in ("cryogenics.md", "library.md", "north-dome.md")]
BOOKS = sorted(glob.glob(os.path.join(HANDBOOK, "*.md")))[::2]  # several extents, for a while
WAYS = [("--mode", mode, read) for read in ("--read-twice", "--no-read-twice")  # the slow ones last
        for mode in ("dense", "hierarchical")]


class Reindex(Case):
    """Two models of different shape, with random weights: answers are only compared."""

    def setUp(self):
        self.folder = tempfile.mkdtemp(prefix="loci-reindex-")
        self.models = {name: make_model(os.path.join(self.folder, name), base)
                       for name, base in (("old", "qwen3"), ("new", "llama"))}
        self.daemon = Daemon(folder=self.folder)
        self.addCleanup(lambda: self.daemon.close())
        self.run_model("old")
        self.prints = {"old": self.daemon.status()["model_fingerprint"]}

    def run_model(self, model, also=None):
        if self.daemon.process and self.daemon.process.poll() is None:
            self.assertEqual(self.daemon.stop(), 0)
        flags = ("--model", self.models[model], "--memory", "2G")
        self.daemon.flags = flags + (("--also-model", self.models[also]) if also else ())
        self.daemon.start()

    def fill(self, corpus, *paths, encoding="independent"):
        self.ok("corpus", "create", corpus, "--encoding", encoding)
        rows = os.path.join(self.folder, "rows.jsonl")
        with open(rows, "w", encoding="utf-8") as file:
            json.dump({"id": "row", "text": "The dome has a diameter of 14 metres.",
                       "metadata": {"year": 1911}}, file)
        self.ok("register", corpus, *paths, rows)  # one stream, so that the tail is at rest

    def ask(self, corpus, *flags):
        lines = [json.loads(line) for line in self.ok(
            "ask", corpus, QUESTION, "--json", "--max-tokens", "12", "--temperature", "0.7",
            "--seed", "5", *flags).splitlines()]
        for item in lines[-1]["evidence"]:
            del item["name"]  # it has the corpus in it
        return lines[0]["model_fingerprint"], {k: lines[-1][k] for k in ("answer", "evidence")}

    def answers(self, corpus):
        return [self.ask(corpus, *way) for way in WAYS]

    def documents(self, corpus, *keys):
        return [{k: d[k] for k in ("document", "bytes", "content_hash", "state", *keys)}
                for d in self.result("document", "list", corpus)["documents"]]

    def test_another_model_says_what_to_do(self):
        self.fill("notes", *FILES)
        self.run_model("new")
        self.prints["new"] = self.daemon.status()["model_fingerprint"]
        self.assertNotEqual(self.prints["old"], self.prints["new"])
        for command in (("ask", "notes", QUESTION), ("search", "notes", QUESTION),
                        ("register", "notes", FILES[0])):
            text = self.refused(*command, says="loci corpus reindex notes")
            for fingerprint in self.prints.values():
                self.assertIn(fingerprint, text)
        self.assertIn("loci corpus reindex notes", self.ok("corpus", "show", "notes"))
        self.assertIn("to be reindexed", self.ok("corpus", "list"))
        shown = self.result("corpus", "show", "notes")
        self.assertEqual((shown["other_model"], shown["answers"]), (True, False))
        self.assertIn("1 corpora are of another model", self.ok("status"))
        self.assertEqual(self.daemon.status()["other_model_corpora"], 1)
        self.assertIn("1911", self.ok("document", "show", "notes", "row"))
        self.ok("document", "delete", "notes", "library.md")
        self.ok("corpus", "reindex", "notes")
        self.assertEqual(self.ask("notes")[0], self.prints["new"])
        self.assertEqual(len(self.documents("notes")), 3)
        self.assertEqual(json.loads(self.ok("document", "show", "notes", "row", "--json"))
                         ["metadata"], {"year": 1911})
        self.assertEqual(self.daemon.status()["other_model_corpora"], 0)
        self.assertNotIn("reindex", self.ok("corpus", "list") + self.ok("corpus", "show", "notes"))

    def test_the_same_model_needs_none(self):
        self.fill("notes", *FILES)
        before = self.at_rest("notes")
        self.assertTrue(self.result("corpus", "reindex", "notes")["unchanged"])
        self.assertIn("already", self.ok("corpus", "reindex", "notes"))
        self.assertEqual(self.result("corpus", "show", "notes"), before)
        self.assertFalse(self.result("corpus", "reindex", "notes", "--force")["unchanged"])
        after = self.at_rest("notes")
        for key in ("documents", "tokens", "bytes", "manifest_hash", "create_time"):
            self.assertEqual(after[key], before[key], key)
        self.assertGreater(after["revision"], before["revision"])
        self.refused("corpus", "reindex", "notes", "--cancel", says="not being reindexed")
        self.refused("corpus", "reindex", "notes", "--cancel", "--force", code=2, says="exclude")
        self.refused("corpus", "reindex", "none", says="no corpus")
        done = run(LOCID, "--data", self.folder + "/other", "--model", self.models["new"],
                   "--also-model", self.models["new"], env=clean_environment(), cwd=ROOT)
        self.assertNotEqual(done.returncode, 0)
        self.assertIn("the same model", done.stderr)

    def test_the_old_index_answers_until_the_new_one_is_complete(self):
        self.fill("notes", *BOOKS)
        self.fill("text", FILES[0], encoding="causal")
        revision = self.at_rest("notes")["revision"]
        old = self.answers("notes"), self.answers("text")
        documents = self.documents("notes", "create_time")
        self.run_model("new", also="old")
        self.prints["new"] = self.daemon.status()["model_fingerprint"]
        self.assertEqual((self.answers("notes"), self.answers("text")), old)
        self.refused("register", "notes", FILES[0], says="loci corpus reindex notes")

        seed = int(os.environ.get("LOCI_TEST_SEED", random.randrange(1 << 32)))
        print(f"LOCI_TEST_SEED={seed}", flush=True)
        moments = random.Random(seed)
        seen = {self.prints["old"]: [], self.prints["new"]: []}  # (place, answer) meanwhile
        killed = 0
        for place, way in enumerate(WAYS):  # one each, so that the kill comes soon
            running = self.daemon.start_loci("corpus", "reindex", "notes", "--json")
            for line in running.stdout:  # the documents are copied
                if json.loads(line).get("stage") != "copying":
                    break
            shown = self.result("corpus", "show", "notes")
            if shown["reindexing"]:
                self.assertIn("reindexing", self.ok("corpus", "list"))
                if not seen[self.prints["old"]]:
                    self.refused("document", "delete", "notes", "row", says="being reindexed")
                    self.refused("register", "notes", FILES[0], says="reindex")
                answer = self.ask("notes", *way)  # it may end meanwhile
                seen[answer[0]].append((place, answer))
            time.sleep(moments.uniform(0, 0.3))
            self.daemon.stop(signal.SIGKILL)
            running.communicate(timeout=20)
            self.daemon.start()
            killed += self.result("corpus", "show", "notes")["reindexing"]
        print(f"{killed} of {len(WAYS)} kills while it was reindexed", flush=True)
        self.assertTrue(seen[self.prints["old"]])
        for place, answer in seen[self.prints["old"]]:
            self.assertEqual(answer, old[0][place], f"LOCI_TEST_SEED={seed}")
        last = self.result("corpus", "reindex", "notes")
        self.assertEqual(last["model_fingerprint"], self.prints["new"])
        self.assertEqual(self.documents("notes", "create_time"), documents)
        self.assertGreater(last["revision"], revision)
        self.result("corpus", "reindex", "text")
        self.assertEqual(self.result("corpus", "show", "text")["encoding"], "causal")
        self.fill("fresh", *BOOKS)
        self.fill("fresh-text", FILES[0], encoding="causal")
        for corpus, fresh in (("notes", "fresh"), ("text", "fresh-text")):
            shown = [self.result("corpus", "show", name) for name in (corpus, fresh)]
            for key in ("documents", "tokens", "segments", "bytes", "tokens_max"):
                self.assertEqual(shown[0].get(key), shown[1].get(key), key)
            self.assertEqual(self.documents(corpus, "tokens"), self.documents(fresh, "tokens"))
        self.assertEqual(self.at_rest("notes")["manifest_hash"],
                         self.at_rest("fresh")["manifest_hash"])
        fresh = self.answers("fresh")
        self.assertEqual(self.answers("notes"), fresh)
        for place, answer in seen[self.prints["new"]]:
            if WAYS[place][1:] == ("dense", "--no-read-twice"):  # others change with merges
                self.assertEqual(answer[1]["answer"], fresh[place][1]["answer"],
                                 f"LOCI_TEST_SEED={seed}")
        self.assertEqual(self.ask("text")[0], self.prints["new"])
        self.assertEqual(len(os.listdir(os.path.join(self.daemon.data, "extents"))),
                         sum(self.result("corpus", "show", c)["extents"] > 0
                             for c in ("notes", "text", "fresh", "fresh-text")))

    def test_giving_up(self):
        self.fill("notes", *BOOKS)
        self.run_model("new", also="old")
        running = self.daemon.start_loci("corpus", "reindex", "notes", "--json")
        for line in running.stdout:
            if json.loads(line).get("stage") != "copying":
                break
        self.ok("corpus", "reindex", "notes", "--cancel")
        _, error = running.communicate(timeout=20)
        self.assertEqual(running.returncode, 1)
        self.assertIn("given up", error)
        self.assertFalse(self.result("corpus", "show", "notes")["reindexing"])
        self.ok("document", "delete", "notes", "row")


if __name__ == "__main__":
    unittest.main(verbosity=2)
