# SPDX-License-Identifier: Apache-2.0
"""Packs from worker processes, in an order that does not depend on the number of workers.

Worker w of n makes the packs w, w + n, w + 2n, ... of the current phase into a queue of its own;
the reader takes them in turn. A pack's seed is made of the run's seed, the phase and its number.
"""
import ctypes
import fcntl
import json
import multiprocessing
import os
import signal
import time

from corpus import Corpus, Tokenizer
from packing import Packer

QUEUE_PACKS = 3  # of one worker
READY_SECONDS = 300  # to wait for prepare.py to finish
PIPE_BYTES = (1 << 22, 1 << 20)  # the second is what a user without privileges may have
DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG


def wait_until_prepared(folder):
    """prepare.py may still run beside: it writes ready.json last."""
    deadline = time.time() + READY_SECONDS
    while not os.path.exists(os.path.join(folder, "ready.json")):
        if time.time() > deadline:
            raise TimeoutError(f"{folder} has no ready.json: is prepare.py running?")
        time.sleep(0.2)


def open_sources(folder, config, names=None):
    """The prepared sources of the training mix that are there: name -> Corpus."""
    names = names or [n for n, s in config["sources"].items() if s["weight"] or s["cloze"]]
    paths = {name: os.path.join(folder, name) for name in names}
    return {name: Corpus(path) for name, path in paths.items() if os.path.isdir(path)}


def open_packer(folder, config, tokenizer_path, sources=None):
    with open(os.path.join(folder, "words.json"), encoding="utf-8") as file:
        words = json.load(file)
    sources = sources or open_sources(folder, config)
    return Packer(sources, words, Tokenizer(tokenizer_path), config)


def pack_seed(config, phase, number):
    return f"{config['seed']} {phase['name']} {number}"


def work(number, count, folder, config, tokenizer_path, current_phase, start, queue):
    """A worker: packs of the current phase, from `start` = (phase, pack) on, until it is ended."""
    ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    wait_until_prepared(folder)
    packer = open_packer(folder, config, tokenizer_path)
    phase = pack = None
    while True:
        if phase != current_phase.value:
            phase = current_phase.value
            first = start[1] if phase == start[0] else 0
            pack = first + (number - first) % count
        settings = config["phases"][phase]
        queue.put((phase, pack, packer.pack(pack_seed(config, settings, pack), settings)))
        pack += count


def widen_pipe(queue):
    """A pack then passes in one read instead of thirty."""
    for size in PIPE_BYTES:
        try:
            fcntl.fcntl(queue._reader.fileno(), fcntl.F_SETPIPE_SZ, size)
            return
        except OSError:
            continue


class Loader:
    """Reads packs in order. `start`: the (phase, pack) numbers of the first one."""

    def __init__(self, folder, config, tokenizer_path, workers, start):
        context = multiprocessing.get_context("fork")
        self.phase = context.Value("i", start[0])
        self.next_pack = start[1]
        self.queues = [context.Queue(QUEUE_PACKS) for _ in range(workers)]
        for queue in self.queues:
            widen_pipe(queue)
        self.processes = [
            context.Process(target=work, daemon=True,
                            args=(i, workers, folder, config, tokenizer_path, self.phase, start,
                                  self.queues[i]))
            for i in range(workers)]
        for process in self.processes:
            process.start()

    def set_phase(self, phase):
        """Goes on to the first pack of another phase; packs of the last one are dropped."""
        if self.phase.value != phase:
            self.phase.value = phase
            self.next_pack = 0

    def next(self):
        worker = self.next_pack % len(self.queues)
        while True:
            try:
                phase, pack, arrays = self.queues[worker].get(timeout=5)
            except Exception:
                if not self.processes[worker].is_alive():
                    raise RuntimeError(f"worker {worker} of the loader has died") from None
                continue
            if phase == self.phase.value:
                assert pack == self.next_pack, "packs are out of order"
                self.next_pack += 1
                return arrays

    def close(self):
        for process in self.processes:
            process.kill()
