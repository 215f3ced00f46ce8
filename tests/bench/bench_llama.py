#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Loci and llama.cpp side by side, on the same random Llama in bf16; one JSON line a row.

  bench_llama.py --llama SOURCE --llama-build BUILD --models FOLDER [--shapes 30m 500m]
                 [--prefill 512 4096] [--depths 0 4096 16384 65536 131072] [--rounds 3]
                 [--kv bf16 int8]

SOURCE is a llama.cpp checkout (the source distribution of llama-cpp-python has one in
vendor/llama.cpp), BUILD its build folder with static libraries: tests/README.md has the commands.
FOLDER keeps the models, which random_model.py writes on the first run (needs numpy and gguf).

prefill  Loci: the model's own forward (bench_sequence). llama.cpp: decoding a prompt, as its
         llama-bench does (peer_llama.c).
decode   depth 0 without a corpus. Deeper: answers of `loci ask` over a corpus of so many tokens of
         random text, in mode dense and in mode hierarchical with --budget 2048 and --top-p 1, no
         dense layers; the whole step, with sampling and evidence. With --kv int8 the corpus keeps
         keys and values as int8; the names of these rates end in _int8. llama.cpp: peer_llama.c
         says how its cache is filled. The corpus is encoded in independent segments, which takes
         linear time; a step reads the same keys and values as over a causal one.

Both run on --threads threads in turns: Loci, then llama.cpp with flash attention off and on, f16
and bf16 cache, and on with q8_0; after the first round only the settings that were within 15% of
the best. Each figure is the best of its rounds, and llama.cpp's that of its best settings; ..._all
has every round. llama.cpp's threads spin for one another, so another busy process costs it far more than
its share: a run waits until the machine has been idle for a moment (--wait seconds at most), and
one during which others took more than --others percent of the machine is repeated, --retries
times at most; disturbed_percent is the most that was accepted. On a machine that is never idle,
--clock cpu with --threads 1 divides by processor time instead, which others hardly change.
"""
import argparse
import itertools
import json
import os
import random
import resource
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, os.path.join(ROOT, "tests", "quality"))
import quality  # noqa: E402

BUDGET = 2048
# Flash attention, KV; llama.cpp wants the first for a quantised cache.
SETTINGS = [*itertools.product(("0", "1"), ("f16", "bf16")), ("1", "q8_0")]
NEAR_BEST = 0.85


def processor_seconds(pid):
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Machine:
    """Runs commands and knows how much of the machine others took meanwhile."""

    def __init__(self, options):
        self.options, self.daemon = options, None

    def own_seconds(self):
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        total = used.ru_utime + used.ru_stime + time.process_time()
        return total + (processor_seconds(self.daemon) if self.daemon else 0)

    @staticmethod
    def busy_seconds():
        with open("/proc/stat") as file:
            ticks = [int(x) for x in file.readline().split()[1:9]]
        return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")

    def wait_until_idle(self):
        until = time.monotonic() + self.options.wait
        while time.monotonic() < until:
            busy = self.busy_seconds()
            time.sleep(0.5)
            if self.busy_seconds() - busy <= 0.5 * os.cpu_count() * self.options.others / 100:
                return

    def measure(self, run):
        """(what run returned, percent of the machine that others took) of the quietest try."""
        best = None
        for _ in range(self.options.retries + 1):
            self.wait_until_idle()
            begun, busy, own = time.monotonic(), self.busy_seconds(), self.own_seconds()
            result = run()
            seconds = time.monotonic() - begun
            others = self.busy_seconds() - busy - (self.own_seconds() - own)
            percent = max(0.0, 100 * others / seconds / os.cpu_count())
            if best is None or percent < best[1]:
                best = (result, percent)
            if percent <= self.options.others:
                break
        return best


def output(command):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]}: {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])["tokens_per_s"]


class Peer:
    """llama.cpp with each of its settings."""

    def __init__(self, options, model):
        self.model, self.threads = model, str(options.threads)
        self.program = os.path.join(options.models, "peer_llama")
        find = [os.path.join(folder, name) for folder, _, names in os.walk(options.llama_build)
                for name in names if name == "libllama.a" or
                (name.startswith("libggml") and name.endswith(".a"))]
        subprocess.run(
            ["cc", "-O2", "-std=c11", "-D_GNU_SOURCE", "-I", f"{options.llama}/include", "-I",
             f"{options.llama}/ggml/include", os.path.join(ROOT, "tests/bench/peer_llama.c"), "-o",
             self.program, "-Wl,--start-group", *find, "-Wl,--end-group", "-lstdc++", "-lm",
             "-lpthread", "-ldl", "-fopenmp"], check=True)

    def run(self, setting, test):
        return output([self.program, self.model, self.threads, *setting, test])


class Row:
    """Rates of both sides by name; what is to be printed."""

    def __init__(self, machine):
        self.machine, self.rates, self.disturbed = machine, {}, 0.0

    def take(self, name, run):
        rate, others = self.machine.measure(run)
        self.rates.setdefault(name, []).append(round(rate, 2))
        self.disturbed = max(self.disturbed, others)

    def rounds(self, count, own, peer, test):
        """own: {name: function}"""
        for number in range(count):
            for name, run in own.items():
                self.take(name, run)
            best = max((max(self.rates[s]) for s in SETTINGS if s in self.rates), default=0)
            for setting in SETTINGS:
                if number == 0 or max(self.rates[setting]) >= NEAR_BEST * best:
                    self.take(setting, lambda s=setting: peer.run(s, test))
        return self

    def emit(self, own, **more):
        best = max(SETTINGS, key=lambda s: max(self.rates[s]))
        theirs = max(self.rates[best])
        row = {"bench": "llama", **more, "threads": self.machine.options.threads,
               "clock": self.machine.options.clock, "llama_tokens_per_s": theirs,
               "llama_settings": f"flash {best[0]}, KV {best[1]}", "llama_all": self.rates[best],
               "llama_by_settings": {" ".join(s): max(self.rates[s]) for s in SETTINGS}}
        for name in own:
            rate = max(self.rates[name])
            row.update({f"{name}_tokens_per_s": rate, f"{name}_all": self.rates[name],
                        f"{name}_ratio": round(rate / theirs, 2)})
        quality.emit(**row, disturbed_percent=round(self.disturbed, 1))


class Node(quality.Daemon):
    """A daemon on a model of one's own, whose corpus grows."""

    def __init__(self, options, model):
        self.model, self.options, self.words = model, options, random.Random(3)
        super().__init__(options.build)
        for kv in options.kv:
            self.run("corpus", "create", kv, "--kv", kv, "--encoding", "independent",
                     "--dense-layers", "0")
        self.tokens = self.documents = 0

    def start(self):
        with open(os.path.join(self.folder, "locid.log"), "a") as log:
            self.process = subprocess.Popen(
                [os.path.join(self.build, "locid"), "--data", self.data, "--listen", self.address,
                 "--model", self.model, "--precision", "bf16", "--queries", "1", "--threads",
                 str(self.options.threads), "--memory", self.options.memory],
                stdout=log, stderr=log)
        for _ in range(1200):
            if self.run("status", check=False).returncode == 0:
                return
            if self.process.poll() is not None:
                break
            time.sleep(0.1)
        with open(os.path.join(self.folder, "locid.log")) as log:
            sys.exit("locid did not start: " + log.read()[-500:])

    def grow(self, tokens):
        """Registers random text, a byte a token, until the corpus has about so many."""
        text = []
        count = self.tokens
        while count < tokens:
            word = "".join(self.words.choices("abcdefghijklmnopqrstuvwxyz", k=self.words.randint(3, 8)))
            text.append(word)
            count += len(word) + 1
        path = os.path.join(self.folder, f"text{self.documents}.txt")
        with open(path, "w") as file:
            for at in range(0, len(text), 30):
                file.write(" ".join(text[at:at + 30]) + ".\n\n")
        for kv in self.options.kv:
            self.last("register", kv, path)
        self.tokens, self.documents = count, self.documents + 1
        for kv in self.options.kv:  # merged, as a corpus at rest is
            while not self.last("corpus", "show", kv)["merged"]:
                time.sleep(1)

    def rate(self, kv, mode, seed, tokens):
        """Decoded tokens a second of one answer."""
        if self.options.clock == "wall":
            usage, steps = self.ask(kv, mode, seed, tokens)
            return usage["decode_tokens_per_s"] * steps / usage["answer_tokens"]
        marks = [processor_seconds(self.process.pid)]
        for count in (2, tokens):  # what both have but for the steps goes out
            _, steps = self.ask(kv, mode, seed, count)
            marks.append(processor_seconds(self.process.pid))
        return (steps - 1) / (marks[2] - 2 * marks[1] + marks[0])

    def ask(self, kv, mode, seed, tokens):
        """(usage, steps) of an answer of so many tokens."""
        reach = ["--budget", str(BUDGET), "--top-p", "1"] if mode == "hierarchical" else []
        answer = self.last("ask", kv, "which word is it?", "--mode", mode, "--no-read-twice",
                           *reach, "--temperature", "3", "--seed", str(seed), "--max-tokens",
                           str(tokens))
        usage = answer["usage"]
        steps = usage["answer_tokens"] - (answer["stop"] != "eos")
        if steps < tokens // 2:
            raise RuntimeError(f"an answer of {steps + 1} tokens is too short to be timed")
        return usage, steps


def measure(shape, options):
    folder = os.path.join(options.models, shape)
    if not os.path.exists(folder + ".gguf"):
        import random_model
        random_model.write(shape, folder, folder + ".gguf")
    peer, machine = Peer(options, folder + ".gguf"), Machine(options)
    sequence = [os.path.join(options.build, "tests/bench/bench_sequence"), folder,
                str(options.threads)]
    for count in options.prefill:
        test = f"pp:{count}"
        Row(machine).rounds(options.rounds, {"loci": lambda: output([*sequence, test])}, peer,
                            test).emit(["loci"], model=shape, what="prefill", tokens=count)
    depths = sorted(options.depths)
    if depths[:1] == [0]:
        Row(machine).rounds(options.rounds, {"loci": lambda: output([*sequence, "tg:0"])}, peer,
                            "tg:0").emit(["loci"], model=shape, what="decode", depth=0)
    if any(depths):
        with Node(options, folder) as node:
            machine.daemon = node.process.pid
            for depth in filter(None, depths):
                measure_depth(shape, depth, node, peer, machine, options)


def measure_depth(shape, depth, node, peer, machine, options):
    node.grow(depth)
    seeds = itertools.count(1)
    own = {}
    for kv in options.kv:
        node.ask(kv, "dense", 0, 4)  # extents are opened and checked
        for mode in ("dense", "hierarchical"):
            count = 17 if depth > 32768 and mode == "dense" else 65
            own[mode + ("_int8" if kv == "int8" else "")] = (
                lambda kv=kv, mode=mode, count=count: node.rate(kv, mode, next(seeds), count))
    row = Row(machine).rounds(options.rounds, own, peer, f"tg:{depth}")
    shown = node.last("corpus", "show", options.kv[0])
    row.emit(own, model=shape, what="decode", depth=depth, corpus_tokens=shown.get("tokens"))


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--llama", required=True)
    parser.add_argument("--llama-build", required=True)
    parser.add_argument("--models", required=True)
    parser.add_argument("--shapes", nargs="+", default=["30m", "500m"])
    parser.add_argument("--prefill", type=int, nargs="*", default=[512, 4096])
    parser.add_argument("--depths", type=int, nargs="*", default=[0, 4096, 16384, 65536, 131072])
    parser.add_argument("--kv", nargs="+", choices=["bf16", "int8"], default=["bf16"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory", default="4G", help="of locid")
    parser.add_argument("--others", type=float, default=5.0)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--wait", type=float, default=60.0)
    parser.add_argument("--retries", type=int, default=3)
    parser.add_argument("--build", default=os.path.join(ROOT, "build/release"))
    options = parser.parse_args()
    if options.clock == "cpu" and options.threads != 1:
        parser.error("--clock cpu is for --threads 1: threads that wait for others spin")
    os.environ["BENCH_CLOCK"] = options.clock
    for shape in options.shapes:
        measure(shape, options)


if __name__ == "__main__":
    main()
