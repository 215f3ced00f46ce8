#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""How soon a document of 1 KB is searchable: one JSON line with the seconds from its STORED to its
SEARCHABLE acknowledgement, over documents registered one after another into a corpus that has the
handbook of the tests.

  bench_searchable.py [BUILD_DIR] [DOCUMENTS]      (default build/release, 20)
"""
import json
import os
import statistics
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "integration"))
from harness import HANDBOOK, Daemon  # noqa: E402


def main():
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    daemon = Daemon("--memory", "2G").start()
    try:
        if daemon.loci("register", "bench", HANDBOOK, "--create").returncode != 0:
            sys.exit("the handbook could not be registered")
        took = []
        for i in range(count):
            text = "".join(f"The lamp of buoy {100 * i + j} shows every {j + 3} seconds. "
                           for j in range(24))[:1024]
            took.append(daemon.searchable_after("bench", f"buoys-{i}", text))
        print(json.dumps({"bench": "searchable", "backend": daemon.status()["backend"],
                          "documents": count, "bytes": 1024,
                          "median_s": round(statistics.median(took), 3),
                          "most_s": round(max(took), 3)}))
    finally:
        daemon.close()


if __name__ == "__main__":
    main()
