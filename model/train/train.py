#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Trains the built-in model on prepared data, in pieces that resume exactly.

  train.py --prepared FOLDER --run FOLDER [--init FOLDER] [--phases NAME,...] [--seconds N [--fit]]

--run holds checkpoint.pt and log.jsonl; a checkpoint there is resumed, otherwise --init (a Hugging
Face folder) or random weights start the run. The work stops after the phases named, or N seconds
after the start of the program, and leaves a checkpoint behind. --fit stretches or shrinks the
phases that are left to fill the time.
"""
import argparse
import json
import math
import os
import queue
import signal
import sys
import threading
import time
import tomllib
import traceback

import numpy as np
import torch

from corpus import Corpus
from export import read_folder
from loader import Loader, open_packer, open_sources, wait_until_prepared
from network import CUDA, ModelConfig, Network, initial_parameters
from optimizer import Optimizer
from packing import ANSWER_TYPES, rehearsal_pack

HERE = os.path.dirname(os.path.abspath(__file__))
SAVE_SECONDS = 5  # kept free at the end for the checkpoint and the last validation
BATCHES_AHEAD = 4  # on the device
VALIDATION_PHASE = {"name": "validation", "slot_tokens": 16384, "slot_questions": 20,
                    "slots": {"corpus": 1.0}, "language_inside": 0.15, "reading_inside": 0.5}
INDEX_ARRAYS = ("tokens", "answer_rows", "answer_types")


def to_device(pack, device):
    """A pack's arrays as tensors."""
    batch = {}
    for name, array in pack.items():
        if name in INDEX_ARRAYS:
            array = array.astype(np.int64)
        tensor = torch.from_numpy(array)
        batch[name] = tensor.pin_memory().to(device, non_blocking=True) if CUDA else tensor
    return batch


class Feeder:
    """Batches of the loader's current phase, moved to the device by a thread ahead of their use."""

    def __init__(self, loader, device):
        self.loader, self.device = loader, device
        self.batches, self.stopped = queue.Queue(BATCHES_AHEAD), False
        self.thread = threading.Thread(target=self.work, daemon=True)
        self.thread.start()

    def work(self):
        try:
            while not self.stopped:
                self.put(to_device(self.loader.next(), self.device))
        except Exception as error:
            self.put(error)

    def put(self, item):
        while not self.stopped:
            try:
                self.batches.put(item, timeout=0.2)
                return
            except queue.Full:
                continue

    def next(self):
        item = self.batches.get()
        if isinstance(item, Exception):
            raise item
        return item

    def stop(self):
        self.stopped = True
        self.thread.join()


class Log:
    """JSON lines, in a file and on standard output."""

    def __init__(self, path, begun):
        self.file, self.begun = open(path, "a", encoding="utf-8"), begun

    def write(self, **row):
        text = json.dumps({"seconds": round(time.time() - self.begun, 1), **row})
        for file in (self.file, sys.stdout):
            file.write(text + "\n")
            file.flush()


METERED = ("language", "answer", "mass", "ranking", "spread", "pointing")


class Meter:
    """Means of the losses since the last report, without waiting for the device."""

    def __init__(self, device, layers):
        self.types = torch.zeros(3, len(ANSWER_TYPES), device=device)
        self.sums = torch.zeros(len(METERED) + layers, device=device)
        self.steps, self.begun = 0, time.time()

    @torch.no_grad()
    def add(self, losses, types):
        count = torch.ones_like(losses["answer_losses"])
        for row, values in enumerate((losses["answer_losses"], losses["answer_right"], count)):
            self.types[row].index_add_(0, types, values)
        means = torch.stack([losses[name].detach().mean() for name in METERED])
        self.sums += torch.cat([means, losses["found"]])
        self.steps += 1

    def report(self, batch_tokens):
        sums = (self.sums / max(1, self.steps)).tolist()
        row = dict(zip(METERED, (round(x, 4) for x in sums)))
        row["found"] = [round(x, 3) for x in sums[len(METERED):]]
        for name, (loss, right, count) in zip(ANSWER_TYPES, self.types.T.tolist()):
            if count:
                row[name] = [round(loss / count, 3), round(right / count, 3)]
        row["tokens_per_s"] = round(self.steps * batch_tokens / (time.time() - self.begun))
        return row


class Run:
    """A training run: weights, optimizers and its place in the phases."""

    def __init__(self, config, options):
        self.config, self.options, self.begun = config, options, time.time()
        self.phase_names = [phase["name"] for phase in config["phases"]]
        self.checkpoint = os.path.join(options.run, "checkpoint.pt")
        os.makedirs(options.run, exist_ok=True)
        self.log = Log(os.path.join(options.run, "log.jsonl"), self.begun)
        self.stopped, self.validation, self.steps = False, None, 0
        state = None
        if os.path.exists(self.checkpoint):
            state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        self.place = state["place"] if state else {"step": 0, "phase": None, "phase_step": 0,
                                                   "progress": 0.0}
        self.todo = self.phases_to_do()
        if not self.todo:
            return
        # The loader's processes are forked before the device is touched.
        start = (self.todo[0], self.place["phase_step"])
        self.loader = Loader(options.prepared, config, options.tokenizer, options.workers, start)
        self.build(state)

    def phases_to_do(self):
        """Numbers of the phases to run now; sets the place to the start of the first one unless
        the checkpoint lies inside it."""
        named = [self.phase_names.index(n) for n in self.options.phases or self.phase_names]
        place = self.place
        if place["phase"] in self.phase_names:
            at = self.phase_names.index(place["phase"])
            later = [n for n in named if n > at or (n == at and place["progress"] < 1)]
            if at in later:
                return later[later.index(at):]
            named = later
        if named:
            place.update(phase=self.phase_names[named[0]], phase_step=0, progress=0.0)
        return named

    def build(self, state):
        config, options = self.config, self.options
        device = "cuda" if CUDA else "cpu"
        c = ModelConfig(config["model"])
        if CUDA:
            torch.backends.cuda.matmul.allow_tf32 = True
        if state:
            stored = state["parameters"]
        elif options.init:
            stored = read_folder(options.init, c)
        else:
            stored = initial_parameters(c, config["seed"])
        self.parameters = {name: p.to(device).requires_grad_(True) for name, p in stored.items()}
        self.optimizer = Optimizer(self.parameters, config["optimizer"])
        with_dropout = any(phase["dropout"] > 0 for phase in config["phases"])
        self.network = Network(c, self.parameters, config["loss"], config["batch"]["tokens"],
                               with_dropout)
        torch.manual_seed(config["seed"])
        if state:
            self.optimizer.load(state["optimizer"])
            torch.set_rng_state(state["random"])
            if CUDA:
                torch.cuda.set_rng_state(state["random_device"])
        self.log.write(event="start", resumed=bool(state), init=options.init, place=self.place,
                       parameters=sum(p.numel() for p in self.parameters.values()),
                       torch=torch.__version__,
                       device=torch.cuda.get_device_name(0) if CUDA else "cpu")

    def save(self):
        """Everything that training goes on from, written beside and then renamed."""
        state = {"config": self.config, "place": dict(self.place),
                 "parameters": {name: p.detach() for name, p in self.parameters.items()},
                 "optimizer": self.optimizer.state(), "random": torch.get_rng_state()}
        if CUDA:
            state["random_device"] = torch.cuda.get_rng_state()
        torch.save(state, self.checkpoint + ".new")
        os.replace(self.checkpoint + ".new", self.checkpoint)

    def rehearse(self):
        """Compiles the steps of all phases while the loader's processes start. Leaves no trace: not
        in the gradients and not in the random numbers."""
        random, random_device = torch.get_rng_state(), CUDA and torch.cuda.get_rng_state()
        for phase in (self.config["phases"][number] for number in self.todo):
            losses = self.network.losses(to_device(rehearsal_pack(self.config, phase),
                                                   self.network.device))
            self.total_loss(losses, phase).backward()
            for parameter in self.parameters.values():
                parameter.grad = None
        torch.set_rng_state(random)
        if CUDA:
            torch.cuda.set_rng_state(random_device)
            torch.cuda.synchronize()
        self.log.write(event="compiled")

    def total_loss(self, losses, phase):
        weights = self.config["loss"]
        return (weights["language"] * losses["language"] + weights["answer"] * losses["answer"]
                + weights["attention_mass"] * losses["mass"].mean()
                + weights["pointing"] * losses["pointing"]
                + phase["spread"] * losses["spread"].mean()
                + phase["ranking"] * losses["ranking"].mean())

    def validate(self):
        """Losses on packs of held-out text and questions, the same every time."""
        if self.validation is None:
            self.validation = self.validation_batches()
        dropout = self.network.dropout.item()
        self.network.dropout.fill_(0.0)
        random, random_device = torch.get_rng_state(), CUDA and torch.cuda.get_rng_state()
        meter = Meter(self.network.device, len(self.network.c.retrieval_layers))
        for batch in self.validation:
            meter.add(self.network.losses(batch), batch["answer_types"])
        report = meter.report(self.config["batch"]["tokens"])
        self.network.dropout.fill_(dropout)
        torch.set_rng_state(random)
        if CUDA:
            torch.cuda.set_rng_state(random_device)
        report.pop("tokens_per_s")
        self.log.write(event="validation", step=self.place["step"], **report)

    def validation_batches(self):
        folder, config = self.options.prepared, self.config
        filler = os.path.join(folder, "haystack")
        if not os.path.isdir(os.path.join(folder, "validation")):
            return []
        filler = Corpus(filler) if os.path.isdir(filler) else next(
            iter(open_sources(folder, config).values()))
        sources = {"questions": Corpus(os.path.join(folder, "validation")), "novels": filler}
        mix = {**config["mix"], "augment": 0.0, "keep_question": 1.0, "sharpen": 1.0}
        packer = open_packer(folder, {**config, "mix": mix}, self.options.tokenizer, sources)
        return [to_device(packer.pack(f"validation {i}", VALIDATION_PHASE), self.network.device)
                for i in range(4)]

    # --- the loop ------------------------------------------------------------------------------

    def seconds_left(self):
        if not self.options.seconds:
            return math.inf
        return self.options.seconds - SAVE_SECONDS - (time.time() - self.begun)

    def time_factor(self):
        """By which planned seconds are multiplied to fill the time (--fit)."""
        if not self.options.fit:
            return 1.0
        phases = [self.config["phases"][n] for n in self.todo]
        planned = sum(p.get("seconds", 0) for p in phases)
        planned -= phases[0].get("seconds", 0) * self.place["progress"]
        return max(0.0, self.seconds_left()) / max(1.0, planned)

    def step(self, phase):
        batch = self.feeder.next()
        losses = self.network.losses(batch)
        self.total_loss(losses, phase).backward()
        place, settings = self.place, self.config["optimizer"]
        warm = min(1.0, (place["step"] + 1) / settings["warmup_steps"])
        rates = [warm * (first + (last - first) * min(1.0, place["progress"]))
                 for first, last in (phase["learning_rate"], phase["adam_learning_rate"])]
        self.optimizer.step(*rates)
        if "average" in phase:
            self.optimizer.update_average(phase["average"], place["phase_step"])
        place["step"] += 1
        place["phase_step"] += 1
        return losses, batch, rates[0]

    def run_phase(self, number, factor):
        """Returns whether the phase is done."""
        phase, place, options = self.config["phases"][number], self.place, self.options
        layers, device = len(self.network.c.retrieval_layers), self.network.device
        self.loader.set_phase(number)
        self.feeder = Feeder(self.loader, device)
        self.network.dropout.fill_(phase["dropout"])
        meter, last = Meter(device, layers), time.time()
        saved = validated = last
        self.log.write(event="phase", name=phase["name"], progress=place["progress"],
                       factor=round(factor, 3))
        while place["progress"] < 1 and not self.stopped and self.seconds_left() > 0:
            if options.stop_after_steps and self.steps >= options.stop_after_steps:
                self.stopped = True
                break
            self.steps += 1
            losses, batch, rate = self.step(phase)
            meter.add(losses, batch["answer_types"])
            now = time.time()
            if "steps" in phase:
                place["progress"] = place["phase_step"] / phase["steps"]
            else:
                place["progress"] += (now - last) / max(1e-3, phase["seconds"] * factor)
            last = now
            if place["step"] % options.report_steps == 0:
                row = meter.report(self.config["batch"]["tokens"])
                self.log.write(step=place["step"], phase=phase["name"], rate=round(rate, 5),
                               progress=round(place["progress"], 4), **row)
                if not math.isfinite(row["language"] + row["answer"]):
                    raise FloatingPointError("a loss is not finite: the last checkpoint stands")
                meter = Meter(device, layers)
            if now - validated > options.validate_seconds:
                self.validate()
                validated = time.time()
            if now - saved > options.save_seconds:
                self.save()
                saved = time.time()
        self.feeder.stop()
        return place["progress"] >= 1

    def train(self):
        if not self.todo:
            self.log.write(event="nothing to do", place=self.place)
            return
        self.rehearse()
        wait_until_prepared(self.options.prepared)
        if self.options.validate_seconds < math.inf:
            self.validate()
        factor = self.time_factor()
        for number in self.todo:
            if self.place["phase"] != self.phase_names[number]:
                self.place.update(phase=self.phase_names[number], phase_step=0, progress=0.0)
            if not self.run_phase(number, factor):
                break
            self.save()
        if self.options.validate_seconds < math.inf:
            self.validate()

    def finish(self):
        """The checkpoint of the end, unless the weights are spoilt."""
        if self.todo and all(torch.isfinite(p).all() for p in self.parameters.values()):
            self.save()
        if self.todo:
            self.loader.close()
        self.log.write(event="end", place=self.place,
                       memory_gib=round(torch.cuda.max_memory_allocated() / 2**30, 1) if CUDA else 0)


def check_config(config):
    """Catches what would otherwise fail late."""
    for phase in config["phases"]:
        if ("seconds" in phase) == ("steps" in phase):
            raise ValueError(f"phase {phase['name']}: either seconds or steps")
        if config["batch"]["tokens"] % phase["slot_tokens"]:
            raise ValueError(f"phase {phase['name']}: slots do not fill the batch")
    if config["batch"]["tokens"] % 128:
        raise ValueError("batch.tokens: not a multiple of 128")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepared", required=True, help="folder that prepare.py made")
    parser.add_argument("--run", required=True, help="folder of the checkpoint and the log")
    parser.add_argument("--config", default=os.path.join(HERE, "default.toml"))
    parser.add_argument("--tokenizer", default=os.path.join(HERE, "../default/tokenizer.json"))
    parser.add_argument("--init", help="Hugging Face folder to start from")
    parser.add_argument("--phases", type=lambda text: text.split(","))
    parser.add_argument("--seconds", type=float, help="stop so long after the start")
    parser.add_argument("--fit", action="store_true")
    parser.add_argument("--stop-after-steps", type=int, help="stop after so many steps of this piece")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--report-steps", type=int, default=100)
    parser.add_argument("--save-seconds", type=float, default=120)
    parser.add_argument("--validate-seconds", type=float, default=120, help="0: never")
    options = parser.parse_args()
    options.validate_seconds = options.validate_seconds or math.inf
    with open(options.config, "rb") as file:
        config = tomllib.load(file)
    check_config(config)
    run = Run(config, options)

    def stop(*_):
        run.stopped = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    try:
        run.train()
    except Exception:
        run.log.write(event="error", text=traceback.format_exc())
        run.finish()
        sys.exit(1)
    run.finish()


if __name__ == "__main__":
    main()
