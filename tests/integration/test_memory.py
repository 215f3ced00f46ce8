#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The memory budget: a daemon with the smallest --memory that it accepts, or little more, registers
and answers, refuses what does not fit by name, and its anonymous memory stays within the budget.

  test_memory.py [BUILD_DIR]
"""
import glob
import os
import random
import re
import subprocess
import threading
import time
import unittest

from harness import HANDBOOK, LOCID, ROOT, Case, Daemon, clean_environment, run

MIB = 1 << 20
QUERIES = 8
WORKERS = 8
STREAMS = 5 * WORKERS  # open at once, by README.md
SLACK = 16 * MIB  # pages that the kernel counts and the budget does not see
SHORT = "When did the North Telescope see first light?"
SEED = 7


def words():
    text = ""
    for path in sorted(glob.glob(os.path.join(HANDBOOK, "*.md"))):
        with open(path, encoding="utf-8") as file:
            text += file.read()
    return re.findall(r"[A-Za-z]+", text)


def smallest(*flags):
    """The least --memory in MiB with these flags, as the daemon names it when given too little."""
    done = run(LOCID, "--data", "/nowhere/at/all", "--memory", "8M", *flags, cwd=ROOT,
               env=clean_environment())
    assert done.returncode == 1, done
    return int(re.search(r"smallest that works here is (\d+)M", done.stderr).group(1))


def anonymous(pid):
    with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as file:
        return int(re.search(r"Anonymous:\s+(\d+) kB", file.read()).group(1)) * 1024


class Watch:
    """The most anonymous memory that a process has while this runs."""

    def __init__(self, pid):
        self.pid = pid
        self.most = 0
        self.going = True
        self.thread = threading.Thread(target=self.look)

    def look(self):
        while self.going:
            try:
                self.most = max(self.most, anonymous(self.pid))
            except (OSError, AttributeError):
                return
            time.sleep(0.02)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.going = False
        self.thread.join()


class Memory(Case):
    def start(self, mib, *flags):
        self.budget = mib * MIB
        self.daemon = Daemon("--memory", f"{mib}M", *flags).start()
        self.addCleanup(self.daemon.close)

    def within(self, watch, what, *at_rest):
        """Within the budget, less the shares of those who are at rest and so hold nothing."""
        parts = self.daemon.status()["memory_parts"]
        most = self.budget - sum(parts[part] for part in at_rest)
        self.assertGreater(watch.most, 16 * MIB, "nothing was measured")
        self.assertLessEqual(watch.most, most + SLACK,
                             f"{what}: {watch.most / MIB:.0f} MiB of anonymous memory, of a budget "
                             f"of {self.budget / MIB:.0f} MiB {most / MIB:.0f} may be used")

    def register(self, tokens):
        draw, pool = random.Random(SEED), words()
        text = ""
        while len(text) < 4 * tokens:
            text += " ".join(draw.choices(pool, k=draw.randint(6, 14))).capitalize() + ". "
        path = os.path.join(self.daemon.folder, "text.txt")
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
        return self.result("register", "notes", path, HANDBOOK, "--create")

    def ask_together(self, *commands):
        """Runs commands at the same time; returns the errors of those that failed."""
        running = [self.daemon.start_loci(*command) for command in commands]
        ended = [process.communicate(timeout=300) for process in running]
        return [err for process, (_, err) in zip(running, ended) if process.returncode != 0]

    def test_too_little_is_refused_and_the_least_works(self):
        least = smallest()
        below = run(LOCID, "--data", "/nowhere/at/all", "--memory", f"{least - 1}M", cwd=ROOT,
                    env=clean_environment())
        self.assertEqual(below.returncode, 1)
        self.assertIn(f"smallest that works here is {least}M", below.stderr)
        self.assertGreater(smallest("--queries", "4"), smallest("--queries", "2"))
        self.start(least)
        with Watch(self.daemon.process.pid) as watch:
            self.result("register", "notes", HANDBOOK, "--create")
            self.assertTrue(self.result("ask", "notes", SHORT)["found"])
            for mode in ("hierarchical", "squeezed", "dense"):
                self.ok("ask", "notes", SHORT, "--no-read-twice", "--mode", mode)
        self.within(watch, "the least budget")

    def test_many_questions_stay_within_the_budget(self):
        # 40 MiB for packed weights, which the smallest budget leaves in their files.
        self.start(smallest("--queries", str(QUERIES)) + 64 + 40, "--queries", str(QUERIES))
        draw, pool = random.Random(SEED + 1), words()
        long = [" ".join(draw.choices(pool, k=150)) for _ in range(QUERIES)]
        with Watch(self.daemon.process.pid) as watch:
            done = self.register(60_000)
            self.assertGreater(done["tokens"], 50_000)
        self.within(watch, "registration", "questions")
        with Watch(self.daemon.process.pid) as watch:
            refused = self.ask_together(*(("search", "notes", text, "-k", "20") for text in long))
            refused += self.ask_together(*(("ask", "notes", text, "--no-read-twice", "--mode", mode,
                                            "--max-tokens", "4")
                                           for text in long[:4]
                                           for mode in ("hierarchical", "squeezed")))
        self.within(watch, "questions", "registration")
        self.assertTrue(refused, "everything fitted: the test is too small")
        for line in refused:
            self.assertRegex(line, r"needs \d+ MiB of memory, but \d+ of the budget's \d+ MiB")
            self.assertIn("shorter question", line)
        # One after another they fit, what idle slots kept is given back, and nothing was lost.
        self.ok("search", "notes", long[0])
        self.assertTrue(self.result("ask", "notes", SHORT)["found"])
        # The longest question that is taken; one token more is refused, and the daemon lives.
        self.ok("search", "notes", "the " * 254)
        self.refused("search", "notes", "the " * 255, says="at most 254")
        self.ok("status")

    def idle_stream(self, number):
        """A registration that has sent 3 MiB of a document and then nothing."""
        process = self.daemon.start_loci("register", "notes", "-", "--id", f"d{number}",
                                         stdin=subprocess.PIPE)
        try:
            process.stdin.write("some words " * (3 * MIB // 11))
            process.stdin.flush()
        except BrokenPipeError:
            pass  # refused: its status tells why
        return process

    def test_idle_streams_hold_little(self):
        self.start(512, "--workers", str(WORKERS))
        self.ok("corpus", "create", "notes")
        before = anonymous(self.daemon.process.pid)
        with Watch(self.daemon.process.pid) as watch:
            open_ones = [self.idle_stream(number) for number in range(STREAMS + 5)]
            time.sleep(2)
            ended = [process for process in open_ones if process.poll() is not None]
            self.ok("status")
            self.assertEqual(self.daemon.status()["active_calls"], STREAMS)
        after = anonymous(self.daemon.process.pid)
        errors = [process.communicate()[1] for process in ended]
        for process in open_ones:
            process.kill()
            process.communicate()
        self.assertEqual(len(errors), 5, errors)
        for line in errors:
            self.assertIn("of memory that is for calls", line)
        self.within(watch, "idle streams", "registration", "questions")
        self.assertLess(after - before, 64 * MIB, "memory that idle streams hold")
        self.wait_for(lambda: self.daemon.status()["active_calls"] == 0, "the streams' end")
        self.result("register", "notes", HANDBOOK)

    def test_status_tells_who_holds_what(self):
        self.start(512)
        before = self.daemon.status()
        self.result("register", "notes", HANDBOOK, "--create")
        self.ok("ask", "notes", SHORT, "--no-read-twice")
        status = self.daemon.status()
        parts = status["memory_parts"]
        self.assertEqual(status["memory_budget_bytes"], 512 * MIB)
        self.assertEqual(sum(parts.values()), status["memory_reserved_bytes"])
        self.assertLessEqual(status["memory_reserved_bytes"], status["memory_budget_bytes"])
        for part in ("process", "model", "database", "registration", "questions", "lookups"):
            self.assertGreater(parts[part], MIB, part)
        self.assertEqual(before["mapped_bytes"], 0)
        self.assertGreater(status["mapped_bytes"], MIB)
        self.assertLessEqual(status["resident_bytes"], status["mapped_bytes"])
        self.assertGreater(status["resident_bytes"], status["mapped_bytes"] / 2)
        self.assertNotIn("cache_hits", status)
        self.assertIn("registration", self.ok("status"))


if __name__ == "__main__":
    unittest.main(verbosity=2)
