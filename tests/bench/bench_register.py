#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Registration speed: one JSON line with tokens/s (all, first and last tenth), peak anonymous
memory, and bytes on disk a token.

  bench_register.py [--text FILE.jsonl.xz] [--tokens 1000000] [--build build/release] [--memory BYTES]
                    [--cgroup]

--text: xz-compressed JSON lines with the text in "t" (public-domain books, for example); without
it the handbook of the tests is repeated.
--cgroup: locid runs in a memory cgroup (v1 or v2) of its budget + 512 MiB, where the page cache
counts too, and answers questions at the end; the line tells the group's peak. Needs root.
"""
import argparse
import atexit
import glob
import json
import lzma
import os
import subprocess
import sys
import tempfile
import threading
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
BYTES_A_TOKEN = 4.05  # of English text under the built-in tokenizer


def texts(options):
    if options.text:
        for line in lzma.open(options.text, "rt", encoding="utf-8"):
            yield json.loads(line)["t"]
    while True:
        for path in sorted(glob.glob(os.path.join(ROOT, "tests/data/handbook/*.md"))):
            yield open(path, encoding="utf-8").read()


def write_documents(folder, options):
    left, number = int(options.tokens * BYTES_A_TOKEN), 0
    for text in texts(options):
        for at in range(0, len(text), 100_000):
            part = text[at:at + min(100_000, left)]
            with open(os.path.join(folder, f"part{number:06d}.txt"), "w", encoding="utf-8") as out:
                out.write(part)
            number += 1
            left -= len(part)
            if left <= 0:
                return number
    return number


class Cgroup:
    """A memory cgroup below the one that this process lives in (v1) or beside it (v2)."""

    def __init__(self, limit):
        own = {}
        with open("/proc/self/cgroup", encoding="ascii") as file:
            for line in file:
                _, controllers, path = line.strip().split(":", 2)
                own[controllers] = path
        v1 = next((key for key in own if "memory" in key.split(",")), None)
        try:
            if v1 is not None:
                parent = self.first("/sys/fs/cgroup/memory" + own[v1], "/sys/fs/cgroup/memory")
                self.make(parent)
                self.write("memory.limit_in_bytes", limit)
                self.peak_file, self.kill_file = "memory.max_usage_in_bytes", "memory.oom_control"
            else:
                parent = self.first("/sys/fs/cgroup" + os.path.dirname(own.get("", "/")),
                                    "/sys/fs/cgroup")
                if "memory" not in self.text(os.path.join(parent, "cgroup.subtree_control")).split():
                    with open(os.path.join(parent, "cgroup.subtree_control"), "w") as file:
                        file.write("+memory")
                self.make(parent)
                self.write("memory.max", limit)
                self.peak_file, self.kill_file = "memory.peak", "memory.events"
        except OSError as error:
            self.close()
            sys.exit(f"no memory cgroup can be had here: {error} (root and a writable /sys/fs/cgroup "
                     "are needed)")

    folder = None

    @staticmethod
    def first(*folders):
        return next((f for f in folders if os.path.isdir(f)), folders[-1])

    @staticmethod
    def text(path):
        with open(path, encoding="ascii") as file:
            return file.read()

    def make(self, parent):
        folder = os.path.join(parent, f"loci-bench-{os.getpid()}")
        os.mkdir(folder)
        self.folder = folder

    def write(self, name, value):
        with open(os.path.join(self.folder, name), "w", encoding="ascii") as file:
            file.write(str(value))

    def enter(self):
        """For the child, before it becomes locid."""
        self.write("cgroup.procs", os.getpid())

    def figures(self):
        kills = [line.split()[1] for line in self.text(os.path.join(self.folder, self.kill_file))
                 .splitlines() if line.startswith("oom_kill ")]
        try:
            peak = int(self.text(os.path.join(self.folder, self.peak_file))) >> 20
        except OSError:
            peak = None  # memory.peak is from Linux 5.19 on
        return {"cgroup_peak_mib": peak, "oom_kills": int(kills[0]) if kills else None}

    def close(self):
        if self.folder:
            os.rmdir(self.folder)


def stop(daemon, cgroup):
    daemon.terminate()
    daemon.wait(60)
    if cgroup:
        cgroup.close()


def size(text):
    unit = {"K": 10, "M": 20, "G": 30}.get(text[-1].upper())
    return int(float(text[:-1]) * (1 << unit)) if unit else int(text)


def ask_questions(cli):
    """Each mode, then eight at a time; returns how many were answered and how many refused."""
    question = ["ask", "bench", "Who was the captain of the ship?"]
    waves = [[[*question]]] + [[[*question, "--no-read-twice", "--mode", mode, "--max-tokens", "8"]]
                               for mode in ("hierarchical", "squeezed", "dense")]
    waves.append([[*question, "--no-read-twice", "--max-tokens", "8"]] * 8)
    answered = refused = 0
    for wave in waves:
        running = [subprocess.Popen([*cli, *command], stdout=subprocess.DEVNULL,
                                    stderr=subprocess.PIPE, text=True) for command in wave]
        for process in running:
            error = process.communicate()[1]
            answered += process.returncode == 0
            refused += process.returncode != 0 and "of the budget's" in error
            if process.returncode != 0 and "of the budget's" not in error:
                sys.exit("a question failed: " + error)
    return {"questions_answered": answered, "questions_refused": refused}


def anonymous_bytes(pid):
    try:
        for line in open(f"/proc/{pid}/status"):
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def show(cli):
    return json.loads(subprocess.run([*cli, "corpus", "show", "bench", "--json"], capture_output=True,
                                     text=True, check=True).stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--text")
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--build", default=os.path.join(ROOT, "build/release"))
    parser.add_argument("--memory", default="2G")
    parser.add_argument("--keep", help="leave the data directory here")
    parser.add_argument("--cgroup", action="store_true", help="in a memory cgroup of budget + 512 MiB")
    options = parser.parse_args()
    cgroup = Cgroup(size(options.memory) + (512 << 20)) if options.cgroup else None
    folder = tempfile.mkdtemp(prefix="loci-bench-")
    data = options.keep or os.path.join(folder, "data")
    source = os.path.join(folder, "text")
    os.mkdir(source)
    write_documents(source, options)
    address = "unix:" + os.path.join(folder, "locid.sock")
    cli = [os.path.join(options.build, "loci")]
    os.environ["LOCI_ADDRESS"] = address
    daemon = subprocess.Popen([os.path.join(options.build, "locid"), "--data", data, "--listen", address,
                               "--memory", options.memory], stderr=open(os.path.join(folder, "log"), "w"),
                              preexec_fn=cgroup.enter if cgroup else None)
    atexit.register(stop, daemon, cgroup)
    while subprocess.run([*cli, "status"], capture_output=True).returncode != 0:
        if daemon.poll() is not None:
            sys.exit("locid did not start: " + open(os.path.join(folder, "log")).read()[-500:])
        time.sleep(0.1)
    peak = [0]

    def watch():
        while daemon.poll() is None:
            peak[0] = max(peak[0], anonymous_bytes(daemon.pid))
            time.sleep(0.2)

    threading.Thread(target=watch, daemon=True).start()
    subprocess.run([*cli, "corpus", "create", "bench"], check=True, capture_output=True)
    begun = time.time()
    points = []
    register = subprocess.Popen([*cli, "register", "bench", source, "--json"], stdout=subprocess.PIPE, text=True)
    last = None
    for line in register.stdout:
        last = json.loads(line)
        if "tokens_indexed" in last:
            points.append((time.time() - begun, last["tokens_indexed"]))
    if register.wait() != 0:
        sys.exit("register failed")
    seconds = time.time() - begun
    total = last["tokens"]

    def rate(low, high):
        inside = [p for p in points if low * total <= p[1] <= high * total]
        if len(inside) < 2 or inside[-1][0] == inside[0][0]:
            return None
        return round((inside[-1][1] - inside[0][1]) / (inside[-1][0] - inside[0][0]))

    # Extents go on growing behind a registration.
    while not (shown := show(cli))["merged"]:
        if "merge_failure" in shown:
            sys.exit("not merged: " + shown["merge_failure"])
        time.sleep(0.25)
    extra = {"merged_seconds": round(time.time() - begun - seconds, 2), "extents": shown["extents"]}
    if cgroup:
        extra |= {**ask_questions(cli), **cgroup.figures()}
    status = json.loads(subprocess.run([*cli, "status", "--json"], capture_output=True, text=True,
                                       check=True).stdout.splitlines()[-1])
    print(json.dumps({
        "bench": "register", "backend": status.get("backend"), "documents": last["documents"],
        "tokens": total, "seconds": round(seconds, 2), "tokens_per_s": round(total / seconds),
        "first_fifth_tokens_per_s": rate(0, 0.2), "last_fifth_tokens_per_s": rate(0.8, 1),
        "peak_anonymous_mib": peak[0] >> 20, "memory": options.memory,
        "bytes_on_disk_per_token": round(last["bytes_on_disk"] / max(1, total), 1), **extra}))


if __name__ == "__main__":
    main()
