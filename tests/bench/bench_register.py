#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Registration speed: one JSON line with tokens/s (all, first and last tenth), peak anonymous
memory, and bytes on disk a token.

  bench_register.py [--text FILE.jsonl.xz] [--tokens 1000000] [--build build/release] [--memory BYTES]

--text: xz-compressed JSON lines with the text in "t" (public-domain books, for example); without
it the handbook of the tests is repeated.
"""
import argparse
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


def anonymous_bytes(pid):
    try:
        for line in open(f"/proc/{pid}/status"):
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--text")
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--build", default=os.path.join(ROOT, "build/release"))
    parser.add_argument("--memory", default="2G")
    parser.add_argument("--keep", help="leave the data directory here")
    options = parser.parse_args()
    folder = tempfile.mkdtemp(prefix="loci-bench-")
    data = options.keep or os.path.join(folder, "data")
    source = os.path.join(folder, "text")
    os.mkdir(source)
    write_documents(source, options)
    address = "unix:" + os.path.join(folder, "locid.sock")
    cli = [os.path.join(options.build, "loci")]
    os.environ["LOCI_ADDRESS"] = address
    daemon = subprocess.Popen([os.path.join(options.build, "locid"), "--data", data, "--listen", address,
                               "--memory", options.memory], stderr=open(os.path.join(folder, "log"), "w"))
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

    status = json.loads(subprocess.run([*cli, "status", "--json"], capture_output=True, text=True,
                                       check=True).stdout.splitlines()[-1])
    print(json.dumps({
        "bench": "register", "backend": status.get("backend"), "documents": last["documents"],
        "tokens": total, "seconds": round(seconds, 2), "tokens_per_s": round(total / seconds),
        "first_fifth_tokens_per_s": rate(0, 0.2), "last_fifth_tokens_per_s": rate(0.8, 1),
        "peak_anonymous_mib": peak[0] >> 20, "memory": options.memory,
        "bytes_on_disk_per_token": round(last["bytes_on_disk"] / max(1, total), 1)}))
    daemon.terminate()
    daemon.wait(60)


if __name__ == "__main__":
    main()
