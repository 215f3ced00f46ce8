# SPDX-License-Identifier: Apache-2.0
"""Shared by the tests of the RPC runtime as a foreign client sees it: Debian's python3-grpcio and
python3-protobuf against rpc_testserver. Messages are built from the descriptors that the server's
own reflection gives."""
import json
import os
import signal
import subprocess
import sys
import time

try:
    import grpc
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
except ImportError as missing:
    print("skipped:", missing)
    sys.exit(77)

BINARY = sys.argv[1]
MIB = 1 << 20
Code = grpc.StatusCode


class Server:
    """A test server of its own with KEY=VALUE options; checks that it ends cleanly."""

    def __init__(self, *options, listen="127.0.0.1:0"):
        self.process = subprocess.Popen(
            [BINARY, "listen=" + listen, *options], stdout=subprocess.PIPE, text=True)
        line = self.process.stdout.readline().split()
        assert line and line[0] == "port", line
        self.target = listen if listen.startswith("unix:") else "127.0.0.1:" + line[1]

    def channel(self, *options):
        return grpc.insecure_channel(self.target, options=[
            ("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1),
            ("grpc.enable_http_proxy", 0), ("grpc.enable_retries", 0), *options])

    def __enter__(self):
        return self

    def term(self):
        self.process.send_signal(signal.SIGTERM)

    def wait(self):
        out, _ = self.process.communicate(timeout=60)
        assert self.process.returncode == 0, (self.process.returncode, out)
        lines = out.splitlines()
        assert lines[-1] == "bye", lines
        words = lines[-2].split()
        counters = dict(zip(words[::2], map(int, words[1::2])))
        assert counters["running"] == 0, counters
        assert counters["false_ends"] == 0, counters
        return counters

    def __exit__(self, kind, *_):
        if kind:
            self.process.kill()
            self.process.wait()
        elif self.process.returncode is None:
            self.term()
            self.wait()


def raw(channel, kind, method):
    return getattr(channel, kind)(method, lambda b: b, lambda b: b)


# ---------------------------------------------------------------- messages by reflection

def varint(value):
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def field(number, data):
    return varint(number << 3 | 2) + varint(len(data)) + data


def reflect(channel, version, *requests):
    call = raw(channel, "stream_stream",
               f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo")
    return list(call(iter(requests), timeout=10))


def fields_of(data):
    """[(number, bytes or int)] of a serialised message."""
    out, at = [], 0

    def number():
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value
    while at < len(data):
        key = number()
        if key & 7 == 2:
            size = number()
            out.append((key >> 3, data[at:at + size]))
            at += size
        else:
            assert key & 7 == 0
            out.append((key >> 3, number()))
    return out


def files_in(response):
    """FileDescriptorProtos of a reflection response, or None for an error response."""
    for number, value in fields_of(response):
        if number == 4:
            return [descriptor_pb2.FileDescriptorProto.FromString(v) for _, v in fields_of(value)]
    return None


def build_pool(channel, version):
    pool = descriptor_pool.DescriptorPool()
    added = set()

    def add(proto, known):
        if proto.name in added:
            return
        for dependency in proto.dependency:
            add(known[dependency], known)
        pool.Add(proto)
        added.add(proto.name)
    for symbol in ("loci.v1.QueryService", "google.rpc.Status", "google.rpc.ErrorInfo",
                   "grpc.health.v1.Health", "grpc.reflection.v1.ServerReflection",
                   "grpc.reflection.v1alpha.ServerReflection"):
        files = files_in(reflect(channel, version, field(4, symbol.encode()))[0])
        assert files, symbol
        known = {f.name: f for f in files}
        for f in files:
            add(f, known)
    return pool


class Messages:
    pool = None

    def __getitem__(self, name):
        return message_factory.MessageFactory(self.pool).GetPrototype(
            self.pool.FindMessageTypeByName(name))


M = Messages()


def load_messages():
    with Server() as server, server.channel() as channel:
        M.pool = build_pool(channel, "v1")


class Client:
    """Methods of loci.test.Test on loci.v1.RegisterRequest."""

    def __init__(self, channel):
        self.channel = channel

    def __getattr__(self, name):
        kind = {"Down": "unary_stream", "Up": "stream_unary", "Chat": "stream_stream",
                "Hold": "stream_stream", "Duplex": "stream_stream",
                "Leave": "stream_stream"}.get(name, "unary_unary")
        cls = M["loci.v1.RegisterRequest"]
        return getattr(self.channel, kind)(
            "/loci.test.Test/" + name, cls.SerializeToString, cls.FromString)

    def stats(self):
        return json.loads(self.Stats(msg(), timeout=10).corpus)

    def until(self, condition, seconds=10):
        end = time.time() + seconds
        while True:
            stats = self.stats()
            if condition(stats):
                return stats
            assert time.time() < end, stats
            time.sleep(0.02)


def msg(corpus="", number=0, data=b""):
    return M["loci.v1.RegisterRequest"](corpus=corpus, total_bytes_hint=number, data=data)


def error_of(function, *arguments, **keywords):
    try:
        result = function(*arguments, **keywords)
        if hasattr(result, "__next__"):
            list(result)
    except grpc.RpcError as error:
        return error
    raise AssertionError("the call did not fail")


def details_of(error):
    """(google.rpc.Status, {type name: message}) of grpc-status-details-bin."""
    trailing = dict(error.trailing_metadata())
    status = M["google.rpc.Status"].FromString(trailing["grpc-status-details-bin"])
    found = {}
    for detail in status.details:
        name = detail.type_url.split("/")[-1]
        assert name not in found
        found[name] = M[name].FromString(detail.value)
    assert status.code == error.code().value[0] and status.message == error.details()
    return status, found


def health(channel, service):
    call = raw(channel, "unary_unary", "/grpc.health.v1.Health/Check")
    return dict(fields_of(call(field(1, service.encode()), timeout=5))).get(1, 0)


def main(tests):
    """Runs the functions test_... of a dictionary, or those named on the command line."""
    load_messages()
    names = sys.argv[2:] or [n for n in tests if n.startswith("test_")]
    failed = []
    for name in names:
        start = time.time()
        print(name, end="", flush=True)
        try:
            tests[name]()
            print(f"  ok {time.time() - start:.2f} s", flush=True)
        except Exception as error:  # all tests run, whatever one does
            import traceback
            traceback.print_exc()
            failed.append(name)
            print(f"  FAILED: {error!r}", flush=True)
    print("failed:", *failed) if failed else print(f"all {len(names)} passed")
    sys.stdout.flush()
    os._exit(1 if failed else 0)  # generators of cancelled streams may still sleep
