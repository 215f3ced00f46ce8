#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The service end to end on a GPU machine, beside the CPU: a corpus of several extents is registered on
either backend, asked on either, in all modes, before and after a restart.

usage: service.py BIN MODEL      BIN: a folder with locid and loci

Passes if the cuda daemon's answers equal the CPU's on at least 49 of 50 questions (40 of the
handbook, 10 that nothing answers), in every mode, over its own corpus and over the CPU's data
directory, and again after a restart. Differences are shown. Exit code 77: no GPU.
"""
import json
import os
import random
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
DATA = os.path.join(HERE, "..", "data")
MODES = ("hierarchical", "dense", "squeezed")
FILL_DOCUMENTS = 400  # of about 240 tokens: three extents


class Daemon:
    def __init__(self, folder, data, backend, model, work):
        self.loci = os.path.join(folder, "loci")
        self.address = f"unix:{work}/{backend}.socket"
        self.log = os.path.join(work, f"{backend}.log")
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [os.path.join(folder, "locid"), "--data", data, "--backend", backend, "--model",
                 model, "--listen", self.address, "--precision", "f32"], stderr=log)
        for _ in range(1200):
            if self.process.poll() is not None:
                break
            if self.run("status", check=False).returncode == 0:
                return
            time.sleep(0.1)
        self.stop()
        raise RuntimeError(open(self.log, encoding="utf-8").read().strip().splitlines()[-1])

    def run(self, *arguments, check=True):
        result = subprocess.run([self.loci, *arguments, "--address", self.address],
                                capture_output=True, text=True, check=False)
        if check and result.returncode != 0:
            raise RuntimeError(f"loci {' '.join(arguments)}: {result.stderr.strip()}")
        return result

    def ask(self, corpus, question, mode):
        text = self.run("ask", corpus, question, "--mode", mode, "--json").stdout
        last = json.loads(text.strip().splitlines()[-1])
        return last["answer"] if last["found"] else None

    def stop(self):
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(timeout=60)


def rows(name):
    with open(os.path.join(DATA, name), encoding="utf-8") as file:
        return [json.loads(line)["question"] for line in file]


def fill(path):
    """Documents about nothing that is asked for."""
    pick = random.Random(7)
    words = [pick.choice("bcdfglmnprstv") + pick.choice("aeiou") + pick.choice("lmnrst") +
             pick.choice(["", "o", "a", "er", "ing"]) for _ in range(3000)]
    with open(path, "w", encoding="utf-8") as file:
        for number in range(FILL_DOCUMENTS):
            lines = [" ".join(pick.choice(words) for _ in range(11)).capitalize() + "."
                     for _ in range(9)]
            file.write(json.dumps({"id": f"fill-{number}", "text": " ".join(lines)}) + "\n")


def register(daemon, documents):
    begun = time.time()
    daemon.run("corpus", "create", "handbook")
    daemon.run("register", "handbook", os.path.join(DATA, "handbook"), documents)
    return time.time() - begun


def compare(name, expected, daemon, questions, modes=MODES):
    """Lines of the report; False if too many answers differ."""
    good = True
    for mode in modes:
        begun = time.time()
        answers = [daemon.ask("handbook", question, mode) for question in questions]
        seconds = (time.time() - begun) / len(questions)
        equal = sum(a == b for a, b in zip(answers, expected[mode]))
        print(f"{name}, {mode}: {equal} of {len(questions)} answers are the CPU's, "
              f"{seconds:.2f} s a question", flush=True)
        for question, ours, theirs in zip(questions, answers, expected[mode]):
            if ours != theirs:
                print(f"  {question}\n    cuda: {ours}\n    cpu:  {theirs}")
        good = good and len(questions) - equal <= len(questions) // 50
    return good


def told(daemon):
    """What `loci status` says of the extents on the device."""
    device = json.loads(daemon.run("status", "--json").stdout)["device_extents"]
    print(f"extents on the device: {device}")
    return (0 < device["device_bytes"] <= device["device_budget_bytes"]
            and device["host_bytes"] <= device["host_budget_bytes"])


def check(folder, model, work):
    questions = rows("handbook-questions.jsonl") + rows("handbook-unanswerable.jsonl")
    documents = os.path.join(work, "fill.jsonl")
    own, other = os.path.join(work, "cuda"), os.path.join(work, "cpu")
    fill(documents)
    daemon = Daemon(folder, own, "cuda", model, work)
    try:
        cpu = Daemon(folder, other, "cpu", model, work)
        try:
            print(f"registration: cuda {register(daemon, documents):.1f} s, "
                  f"cpu {register(cpu, documents):.1f} s", flush=True)
            expected = {mode: [cpu.ask("handbook", q, mode) for q in questions] for mode in MODES}
        finally:
            cpu.stop()
        good = compare("registered on cuda", expected, daemon, questions)
        good = told(daemon) and good
        daemon.stop()
        daemon = Daemon(folder, own, "cuda", model, work)
        good = compare("after a restart", expected, daemon, questions, MODES[:1]) and good
        daemon.stop()
        daemon = Daemon(folder, other, "cuda", model, work)
        return compare("registered on the CPU", expected, daemon, questions) and good
    finally:
        daemon.stop()


def main():
    folder, model = sys.argv[1:3]
    with tempfile.TemporaryDirectory(prefix="loci-gpu-") as work:
        try:
            good = check(folder, model, work)
        except RuntimeError as error:
            text = str(error)
            print(("skipped: " if "backend cuda: " in text else "service.py: ") + text)
            sys.exit(77 if "backend cuda: " in text else 1)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
