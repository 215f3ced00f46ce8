#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Interrupts, shutdown and sudden death, seen from the command line.

  test_signals.py [BUILD_DIR]
"""
import json
import signal
import subprocess
import threading
import time
import unittest

from harness import HANDBOOK, Case, Daemon

QUESTION = "When did the North Telescope see first light?"
# Seconds of work: every token is read, and at this temperature the text never ends.
LONG = ("ask", "notes", QUESTION, "--mode", "dense", "--no-read-twice", "--temperature", "10",
        "--max-tokens", "512", "--seed", "1")


def end(process):
    if process.poll() is None:
        process.kill()
        process.communicate()
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream:
            stream.close()


class Signals(Case):
    def setUp(self):
        self.daemon = Daemon("--memory", "2G", "--drain-seconds", "3").start()
        self.addCleanup(self.daemon.close)
        self.result("register", "notes", HANDBOOK, "--create")

    def busy(self):
        return self.daemon.status()["active_calls"]

    def start_long(self):
        asking = self.daemon.start_loci(*LONG)
        self.addCleanup(end, asking)
        self.wait_for(lambda: self.busy() == 1, "the question is being worked on")
        time.sleep(0.5)
        return asking

    def test_interrupt_stops_the_work_in_the_daemon(self):
        asking = self.start_long()
        asking.send_signal(signal.SIGINT)
        asking.communicate(timeout=10)
        self.assertEqual(asking.returncode, 130)
        self.wait_for(lambda: self.busy() == 0, "the daemon has stopped working on it", 3)
        self.assertTrue(self.result("ask", "notes", QUESTION)["found"])

    def test_a_killed_client_stops_the_work_too(self):
        asking = self.start_long()
        asking.kill()
        asking.communicate(timeout=10)
        self.wait_for(lambda: self.busy() == 0, "the daemon has stopped working on it", 3)

    def test_status_answers_while_all_workers_could_wait(self):
        askers = [self.daemon.start_loci(*LONG) for _ in range(10)]
        for asking in askers:
            self.addCleanup(end, asking)
        self.wait_for(lambda: self.busy() == 10, "ten questions run or wait")
        begun = time.monotonic()
        self.ok("status")
        self.ok("corpus", "list")
        self.assertLess(time.monotonic() - begun, 4)
        for asking in askers:
            asking.kill()
        self.wait_for(lambda: self.busy() == 0, "the daemon has stopped working on them", 5)

    def test_status_answers_when_no_more_long_calls_are_taken(self):
        try:
            import grpc
        except ImportError:
            self.skipTest("python3-grpcio is not installed")
        self.daemon.stop()
        self.daemon.flags = (*self.daemon.flags, "--workers", "26")  # room for 5 streams each
        self.daemon.start()
        over = threading.Event()
        with grpc.insecure_channel(self.daemon.address) as channel:
            register = channel.stream_stream("/loci.v1.DocumentService/Register")
            streams = [register(iter(lambda: over.wait(60) and None, None)) for _ in range(128)]
            self.wait_for(lambda: self.busy() == 128, "128 clients register")
            for _ in range(3):
                self.ok("status")
            health = channel.unary_unary("/grpc.health.v1.Health/Check")
            self.assertEqual(health(b"", timeout=5), b"\x08\x01")  # SERVING
            self.refused("ask", "notes", QUESTION, says="too many calls")
            over.set()
            for stream in streams:
                stream.cancel()
        self.wait_for(lambda: self.busy() == 0, "they are gone")
        self.assertTrue(self.result("ask", "notes", QUESTION)["found"])

    def register_and_wait(self, corpus):
        """A client that has registered one document and then sends nothing more."""
        idle = self.daemon.start_loci("register", corpus, "-", "--jsonl", "--json", "--create",
                                      stdin=subprocess.PIPE)
        self.addCleanup(end, idle)
        idle.stdin.write(json.dumps({"id": "a", "text": "The gate opens at nine."}) + "\n")
        idle.stdin.flush()
        for line in idle.stdout:
            if json.loads(line).get("state") == "searchable":
                return idle
        self.fail("no acknowledgement: " + idle.stderr.read())

    def test_an_idle_client_hears_that_its_corpus_is_gone(self):
        idle = self.register_and_wait("short")
        self.ok("corpus", "delete", "short")
        self.assertEqual(idle.wait(5), 1)
        self.assertIn("no corpus short", idle.stderr.read())

    def test_an_idle_client_does_not_hold_up_a_drain(self):
        idle = self.register_and_wait("short")
        begun = time.monotonic()
        self.assertEqual(self.daemon.stop(), 0)
        self.assertLess(time.monotonic() - begun, 2.5)  # of 3 s to drain
        self.assertEqual(idle.wait(5), 1)
        self.assertIn("shutting down", idle.stderr.read())

    def test_a_busy_neighbour_does_not_withhold_the_summary(self):
        neighbour = self.daemon.start_loci("register", "notes", "-", "--jsonl",
                                           stdin=subprocess.PIPE)
        self.addCleanup(end, neighbour)
        going = threading.Event()
        going.set()

        def keep_sending():
            i = 0
            while going.is_set():
                i += 1
                neighbour.stdin.write(json.dumps({"id": f"n{i}", "text": f"Entry {i}. " * 400})
                                      + "\n")
                neighbour.stdin.flush()
                time.sleep(0.02)

        sender = threading.Thread(target=keep_sending)
        sender.start()
        try:
            text = "".join(f"The meter of house {i} reads {i * 37}.\n" for i in range(600))
            begun = time.monotonic()
            done = self.result("register", "notes", "-", "--id", "ours", input=text)
            self.assertLess(time.monotonic() - begun, 60)
        finally:
            going.clear()
            sender.join()
        self.assertGreater(done["tokens"], 4096)
        self.assertEqual(done["documents"], 1)

    def test_drain_lets_running_calls_end(self):
        asking = self.daemon.start_loci("ask", "notes", QUESTION, "--json")
        self.addCleanup(end, asking)
        first = asking.stdout.readline()  # it has begun
        self.daemon.process.send_signal(signal.SIGTERM)
        out, err = asking.communicate(timeout=20)
        self.assertEqual(asking.returncode, 0, err)
        self.assertIn("started", first)
        self.assertTrue(json.loads(out.splitlines()[-1])["found"])
        self.assertEqual(self.daemon.process.wait(20), 0)

    def test_drain_is_bounded(self):
        asking = [self.start_long()]
        for _ in range(5):  # together they take several times as long as the drain
            asking.append(self.daemon.start_loci(*LONG))
            self.addCleanup(end, asking[-1])
        self.wait_for(lambda: self.busy() == len(asking), "all questions are there")
        begun = time.monotonic()
        self.assertEqual(self.daemon.stop(), 0)
        self.assertLess(time.monotonic() - begun, 10)
        for one in asking:
            _, err = one.communicate(timeout=10)
            self.assertEqual(one.returncode, 1)
            self.assertEqual(len(err.splitlines()), 1, err)

    def test_a_second_signal_does_not_wait(self):
        self.start_long()
        begun = time.monotonic()
        self.daemon.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        self.assertEqual(self.daemon.stop(), 1)
        self.assertLess(time.monotonic() - begun, 2.5)

    def test_nothing_acknowledged_is_lost(self):
        """Killed without warning while a client is registering: STORED means stored."""
        sending = self.daemon.start_loci("register", "notes", "-", "--jsonl", "--json",
                                         stdin=subprocess.PIPE)
        self.addCleanup(end, sending)
        for i in range(40):
            sending.stdin.write(json.dumps({"id": f"row-{i}", "text": f"Row {i} says {i * 37}. "
                                            "It stands here for itself. " * 20}) + "\n")
        sending.stdin.flush()
        stored = set()
        for line in sending.stdout:
            event = json.loads(line)
            if event.get("event") == "ack" and event["state"] == "stored":
                stored.add(event["document"])
            if len(stored) >= 20:
                break
        self.daemon.stop(signal.SIGKILL)
        sending.kill()
        sending.communicate(timeout=10)
        self.daemon.start()
        listed = {d["document"] for d in self.result("document", "list", "notes")["documents"]}
        self.assertLessEqual(stored, listed)
        self.wait_for(lambda: self.daemon.status()["pending_documents"] == 0,
                      "indexing goes on by itself")
        self.assertEqual(self.result("ask", "notes", QUESTION)["answer"], "3 October 1978")


if __name__ == "__main__":
    unittest.main(verbosity=2)
