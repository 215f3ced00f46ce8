# SPDX-License-Identifier: Apache-2.0
"""A daemon on a temporary directory and the command line that talks to it."""
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unittest

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
BUILD = os.path.abspath(sys.argv.pop(1)) if len(sys.argv) > 1 and os.path.isdir(sys.argv[1]) \
    else os.path.join(ROOT, "build", "release")
HANDBOOK = os.path.join(ROOT, "tests", "data", "handbook")
LOCI = os.path.join(BUILD, "loci")
LOCID = os.path.join(BUILD, "locid")
CALL_S = 120


def clean_environment(**more):
    """No LOCI_ variable of the caller may change what is tested."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("LOCI_")}
    env.update(more)
    return env


def run(*command, **options):
    return subprocess.run(command, capture_output=True, text=True, timeout=CALL_S, **options)


class Daemon:
    """locid --data DIR/data --listen unix:DIR/socket."""

    def __init__(self, *flags, folder=None):
        self.folder = folder or tempfile.mkdtemp(prefix="loci-test-")
        self.data = os.path.join(self.folder, "data")
        self.address = "unix:" + os.path.join(self.folder, "socket")
        self.flags = flags
        self.process = None

    def start(self):
        self.log = open(os.path.join(self.folder, "log"), "a", encoding="utf-8")
        self.process = subprocess.Popen(
            [LOCID, "--data", self.data, "--listen", self.address, *self.flags],
            stderr=self.log, env=clean_environment(), cwd=ROOT)
        for _ in range(600):
            if self.loci("status").returncode == 0:
                return self
            if self.process.poll() is not None:
                break
            time.sleep(0.1)
        raise AssertionError("locid did not start:\n" + self.log_text())

    def stop(self, number=signal.SIGTERM, timeout=60):
        """Ends the daemon; returns its exit status."""
        self.process.send_signal(number)
        status = self.process.wait(timeout)
        self.log.close()
        return status

    def close(self):
        if self.process and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        if self.process:
            self.log.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def log_text(self):
        with open(os.path.join(self.folder, "log"), encoding="utf-8") as file:
            return file.read()

    def env(self):
        return clean_environment(LOCI_ADDRESS=self.address)

    def loci(self, *args, **options):
        return run(LOCI, *args, env=self.env(), cwd=ROOT, **options)

    def start_loci(self, *args, **options):
        """A command that runs beside the test."""
        return subprocess.Popen([LOCI, *args], env=self.env(), cwd=ROOT, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)

    def searchable_after(self, corpus, name, text):
        """Registers a document; seconds from its STORED to its SEARCHABLE acknowledgement."""
        process = self.start_loci("register", corpus, "-", "--id", name, "--json",
                                  stdin=subprocess.PIPE)
        process.stdin.write(text)
        process.stdin.close()
        seen = {}
        for line in process.stdout:
            seen.setdefault(json.loads(line).get("state"), time.monotonic())
        process.stdout.close()
        error = process.stderr.read()
        process.stderr.close()
        if process.wait(CALL_S) != 0:
            raise AssertionError("loci register: " + error)
        return seen["searchable"] - seen["stored"]

    def status(self):
        return json.loads(self.loci("status", "--json").stdout)


class Case(unittest.TestCase):
    """Helpers that every test case here uses. cls.daemon is the daemon they talk to."""

    def ok(self, *args, **options):
        """Runs a command that must succeed; returns what it printed."""
        done = self.daemon.loci(*args, **options)
        self.assertEqual(done.returncode, 0, f"loci {' '.join(args)}: {done.stderr}")
        return done.stdout

    def result(self, *args, **options):
        """The last line of --json: the whole result."""
        return json.loads(self.ok(*args, "--json", **options).splitlines()[-1])

    def refused(self, *args, code=1, says="", **options):
        """Runs a command that must fail with exactly one line on standard error."""
        done = self.daemon.loci(*args, **options)
        self.assertEqual(done.returncode, code, f"loci {' '.join(args)}: {done.stderr}")
        lines = done.stderr.splitlines()
        self.assertEqual(len(lines), 1, done.stderr)
        self.assertTrue(lines[0].startswith("loci: "), done.stderr)
        self.assertIn(says, lines[0])
        return lines[0]

    def at_rest(self, corpus):
        """What corpus show says when nothing is being done for the corpus."""
        self.wait_for(lambda: (shown := self.result("corpus", "show", corpus))["merged"]
                      and shown["stage"] == "idle", f"corpus {corpus} at rest", 60)
        return self.result("corpus", "show", corpus)

    def wait_for(self, condition, what, seconds=30):
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if condition():
                return
            time.sleep(0.05)
        self.fail(f"not within {seconds} s: {what}")
