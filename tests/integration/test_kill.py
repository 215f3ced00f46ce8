#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""kill -9 at random moments of a registration.

  test_kill.py [BUILD_DIR]      (LOCI_TEST_SEED chooses the moments; it is printed)
"""
import json
import os
import random
import signal
import time
import unittest

from harness import HANDBOOK, Case, Daemon

KILLS = 6
QUESTION = "When did the North Telescope see first light?"


class Kill(Case):
    """The built-in model over the handbook: more than one extent."""

    def setUp(self):
        self.daemon = Daemon("--memory", "2G").start()
        self.addCleanup(lambda: self.daemon.close())

    def corpus(self):
        """What must not depend on how a corpus came about."""
        shown = self.at_rest("notes")
        documents = [{k: d[k] for k in ("document", "bytes", "content_hash", "state", "tokens",
                                        "segments")}
                     for d in self.result("document", "list", "notes")["documents"]]
        return documents, {k: shown[k] for k in ("documents", "pending_documents", "segments",
                                                 "tokens", "bytes", "bytes_on_disk", "extents",
                                                 "manifest_hash")}

    def test_a_killed_registration_ends_in_the_same_manifest(self):
        begun = time.monotonic()
        self.result("register", "notes", HANDBOOK, "--create")
        usual = time.monotonic() - begun
        expected = self.corpus()
        self.assertGreater(expected[1]["extents"], 1)
        self.daemon.close()

        seed = int(os.environ.get("LOCI_TEST_SEED", random.randrange(1 << 32)))
        print(f"LOCI_TEST_SEED={seed}", flush=True)
        moments = random.Random(seed)
        self.daemon = Daemon("--memory", "2G").start()
        self.ok("corpus", "create", "notes")
        for _ in range(KILLS):
            sending = self.daemon.start_loci("register", "notes", HANDBOOK, "--json")
            time.sleep(moments.uniform(0, 0.3 * usual))
            self.daemon.stop(signal.SIGKILL)
            sending.communicate(timeout=20)
            time.sleep(moments.choice((0, 0.2)))
            self.daemon.start()
            if moments.random() < 0.3:  # what was stored goes on without a client
                time.sleep(moments.uniform(0, 0.2 * usual))
                self.daemon.stop(signal.SIGKILL)
                self.daemon.start()
        self.result("register", "notes", HANDBOOK)
        self.assertEqual(self.corpus(), expected, f"LOCI_TEST_SEED={seed}")
        self.assertTrue(self.result("ask", "notes", QUESTION)["found"])


if __name__ == "__main__":
    unittest.main(verbosity=2)
