#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What runs at once in the daemon, on a corpus so small that ThreadSanitizer's slowness does not
matter. A race that it sees makes the daemon, or the command, end with status 66.

  test_threads.py [BUILD_DIR]
"""
import json
import signal
import subprocess
import threading
import time
import unittest

from harness import Case, Daemon

FACTS = [f"The meter of house {i} reads {i * 37 + 11}. It stands beside the door.\n"
         for i in range(12)]
QUESTION = "What does the meter of house 7 read?"
# At this temperature the text never ends.
LONG = ("ask", "notes", QUESTION, "--no-read-twice", "--temperature", "10", "--seed", "1",
        "--max-tokens", "512")


class Threads(Case):
    def setUp(self):
        self.daemon = Daemon("--memory", "2G", "--drain-seconds", "60").start()
        self.addCleanup(self.daemon.close)
        rows = "".join(json.dumps({"id": f"d{i}", "text": t}) + "\n" for i, t in enumerate(FACTS))
        self.ok("register", "notes", "-", "--jsonl", "--create", input=rows)

    def together(self, *commands):
        """Runs commands at once, each as (expected status, arguments...)."""
        def run(expected, *args):
            done = self.daemon.loci(*args)
            if done.returncode != expected:
                wrong.append(f"{' '.join(args)}: {done.returncode}\n{done.stderr}")
        wrong = []
        threads = [threading.Thread(target=run, args=command) for command in commands]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(wrong, [])

    def begin(self, *args):
        asking = self.daemon.start_loci(*args, stdin=subprocess.DEVNULL)
        self.wait_for(lambda: self.daemon.status()["active_calls"] > 0, "it is being worked on")
        return asking

    def end(self):
        self.assertEqual(self.daemon.stop(), 0, self.daemon.log_text())

    def test_questions_at_once_while_documents_come_and_go(self):
        asks = [(0, "ask", "notes", QUESTION, *flags)
                for flags in ((), ("--mode", "dense"), ("--mode", "squeezed"),
                              ("--no-read-twice", "--max-tokens", "8"))]
        self.together(*asks, (0, "search", "notes", "house 3"), (0, "status"),
                      (0, "register", "notes", __file__), (0, "document", "delete", "notes", "d1"),
                      (0, "document", "show", "notes", "d2", "--content"),
                      (0, "corpus", "create", "other"))
        self.together((0, "corpus", "delete", "other"), (0, "document", "list", "notes"),
                      (0, "ask", "notes", QUESTION), (0, "corpus", "show", "notes"))
        self.end()

    def test_cancelled_questions(self):
        asking = [self.begin(*LONG) for _ in range(3)]
        asking[0].send_signal(signal.SIGINT)
        asking[1].kill()
        self.assertEqual(asking[0].wait(60), 130)
        asking[2].send_signal(signal.SIGTERM)
        self.assertEqual(asking[2].wait(60), 128 + signal.SIGTERM)
        self.wait_for(lambda: self.daemon.status()["active_calls"] == 0, "nothing runs", 60)
        for process in asking:
            process.communicate()
        self.end()

    def test_an_interrupted_registration(self):
        sending = self.daemon.start_loci("register", "notes", "-", "--jsonl", "--json",
                                         stdin=subprocess.PIPE)
        sending.stdin.write(json.dumps({"id": "late", "text": FACTS[0]}) + "\n")
        sending.stdin.flush()
        for line in sending.stdout:
            if json.loads(line).get("state") == "stored":
                break
        sending.send_signal(signal.SIGINT)
        self.assertEqual(sending.wait(60), 130, sending.stderr.read())
        sending.communicate()
        self.end()

    def test_drain_with_calls_that_run_and_come(self):
        asking = self.begin("ask", "notes", QUESTION)
        self.daemon.process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
        late = self.daemon.loci("ask", "notes", QUESTION)
        self.assertEqual(late.returncode, 1, late.stderr)
        _, err = asking.communicate(timeout=100)
        self.assertEqual(asking.returncode, 0, err)
        self.assertEqual(self.daemon.process.wait(60), 0, self.daemon.log_text())


if __name__ == "__main__":
    unittest.main(verbosity=2)
