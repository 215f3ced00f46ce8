#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
#
# The RPC runtime seen by a foreign client: Debian's python3-grpcio and python3-protobuf against
# rpc_testserver. Messages are built from the descriptors that the server's own reflection gives.
#
#   test_rpc_foreign.py RPC_TESTSERVER [NAME...]
#
# What is known to bite in the gRPC C core, and what holds it here or in test_rpc.c (c:):
#   drain: batch on a closed queue aborts    drain_cancels_after_grace, _under_load, c: shutdown
#   order of a stop, slots come back         the clean exit of every Server here, c: bad_listening
#   idle clients do not answer the GOAWAY    idle_connection_does_not_hold_the_drain
#   signals before grpc_init                 rpc_testserver.c blocks them; every stop is a SIGTERM
#   slices, buffers, metadata ownership      the whole of test_rpc.c under ASan and LSan
#   NULL message: half-close or cancel       cancel_is_no_half_close (the close tag comes later)
#   one send and one receive at once         four_kinds (Duplex), c: duplex_from_two_threads
#   zeroed ops, refused batches              asserted in services/rpc/call.c and client.c
#   at most six pluckers                     one pluck queue a call, two threads at most (client.c)
#   back-pressure, stalled readers           back_pressure, stalled_streams, stalled_stream_...
#   only registered methods: no answer       unknown_method (generic slots)
#   pollers must not run handlers            queue_full (health answers while workers block)
#   SO_REUSEPORT shares ports silently       port_is_not_shared
#   equal channels share a connection        use_local_subchannel_pool in client.c; not observable
#   headers above 8 KiB (CVE-2023-1428)      metadata_size; the cap is 8,000 bytes
#   protobuf-c: memory of hostile messages   malformed (MESSAGE_TOO_LARGE), c: every_limit, mutation
#   protobuf-c: text cut at NUL, no UTF-8    malformed
#   zipped messages                          compressed (refused: 4 MiB could unzip to 4 GiB)
#   zero copy, TLS, auth processors          not used here: no test
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

try:
    import grpc
    from google.protobuf import any_pb2, descriptor_pb2, descriptor_pool, duration_pb2
    from google.protobuf import message_factory
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
    def __init__(self, pool):
        self.pool = pool

    def __getitem__(self, name):
        return message_factory.MessageFactory(self.pool).GetPrototype(
            self.pool.FindMessageTypeByName(name))


M = None


def load_messages():
    global M
    with Server() as server, server.channel() as channel:
        M = Messages(build_pool(channel, "v1"))


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


# ---------------------------------------------------------------- tests

def test_four_kinds():
    with Server() as server, server.channel() as channel:
        client = Client(channel)
        assert client.Echo(msg("héllo", 7, b"\0x"), timeout=5) == msg("héllo", 7, b"\0x")
        assert client.Echo(msg(), timeout=5) == msg()
        down = list(client.Down(msg(number=1000, data=b"z" * 100), timeout=20))
        assert [m.total_bytes_hint for m in down] == list(range(1000))
        up = client.Up((msg(data=b"a" * i) for i in range(500)), timeout=20)
        assert up.total_bytes_hint == sum(range(500))
        assert client.Up(iter(()), timeout=5).total_bytes_hint == 0
        sent = [msg(number=i) for i in range(500)]
        assert list(client.Chat(iter(sent), timeout=20)) == sent
        assert list(client.Chat(iter(()), timeout=5)) == []
        assert list(client.Leave((msg() for _ in range(100)), timeout=5)) == []
        replies = list(client.Duplex((msg(number=300) for _ in range(200)), timeout=20))
        assert len(replies) == 301
        big = b"q" * (3 * MIB)
        assert client.Echo(msg(data=big), timeout=10).data == big


def test_request_id():
    with Server() as server, server.channel() as channel:
        client = Client(channel)

        def answered(*given):
            _, call = client.Echo.with_call(msg(), timeout=5, metadata=given)
            ids = [v for k, v in call.trailing_metadata() if k == "x-request-id"]
            assert len(ids) == 1
            return ids[0]
        assert answered(("x-request-id", "abc 123~")) == "abc 123~"
        made = {answered() for _ in range(20)}
        assert len(made) == 20 and all(len(i) == 32 for i in made), made
        assert len(answered(("x-request-id", "y" * 128))) == 128
        assert len(answered(("x-request-id", "y" * 129))) == 32
        error = error_of(client.Fail, msg("c", 5), timeout=5,
                         metadata=[("x-request-id", "on-errors-too")])
        assert dict(error.trailing_metadata())["x-request-id"] == "on-errors-too"


def test_errors():
    with Server() as server, server.channel() as channel:
        client = Client(channel)
        for code in (1, 3, 4, 5, 6, 8, 9, 10, 12, 13, 14, 15):
            error = error_of(client.Fail, msg("täst", code), timeout=5)
            assert error.code().value[0] == code, error
            _, details = details_of(error)
            info = details["google.rpc.ErrorInfo"]
            assert info.reason == "TEST_REASON" and info.domain == "loci", info
            assert info.metadata["corpus"] == "täst" and info.metadata["agent"]
        # Bytes that would break the trailers or the details, and a text that is cut.
        error = error_of(client.Fail, msg("line\r\nbreak " + "ü" * 600, 3), timeout=5)
        status, details = details_of(error)
        assert "line??break" in status.message and len(status.message.encode()) < 400
        for name in ("NoReply", "TwoReplies"):
            error = error_of(getattr(client, name), msg(), timeout=5)
            assert error.code() == Code.INTERNAL, error


def test_unknown_method():
    with Server() as server, server.channel() as channel:
        for path in ("/loci.test.Test/Nope", "/loci.test.Nope/Echo", "/", "/x" * 300):
            start = time.time()
            error = error_of(raw(channel, "unary_unary", path), b"", timeout=5)
            assert error.code() == Code.UNIMPLEMENTED, error
            assert time.time() - start < 1
        assert details_of(error)[1]["google.rpc.ErrorInfo"].reason == "UNKNOWN_METHOD"


def test_malformed():
    with Server() as server, server.channel() as channel:
        echo = raw(channel, "unary_unary", "/loci.test.Test/Echo")
        up = raw(channel, "stream_unary", "/loci.test.Test/Up")
        bad = {
            "truncated": b"\x0a\x05ab", "wire type 7": b"\x0f", "group": b"\x0b\x0c",
            "field 0": b"\x02\x00", "endless varint": b"\x30" + b"\xff" * 11,
            "length over 64 bits": b"\x0a" + b"\xff" * 9 + b"\x01",
            "no UTF-8": field(1, b"\xff\xfe"), "surrogate": field(1, b"\xed\xa0\x80"),
            "overlong": field(1, b"\xc0\x80"), "NUL in text": field(1, b"a\0b"),
        }
        for name, data in bad.items():
            error = error_of(echo, data, timeout=5)
            assert error.code() == Code.INVALID_ARGUMENT, (name, error)
            details_of(error)
            error = error_of(up, iter([b"", data]), timeout=5)
            assert error.code() == Code.INVALID_ARGUMENT, (name, error)
        # Unknown fields are kept apart, not refused.
        assert echo(field(1, b"ok") + field(99, b"new"), timeout=5)
        # Many small fields: memory far above the bytes on the wire is refused, not allocated.
        error = error_of(echo, b"\xa0\x06\x01" * (MIB + MIB // 4), timeout=20)
        assert error.code() in (Code.RESOURCE_EXHAUSTED, Code.INVALID_ARGUMENT), error
        assert details_of(error)[1]["google.rpc.ErrorInfo"].reason == "MESSAGE_TOO_LARGE"
        # A unary call without a message.
        stream = raw(channel, "stream_unary", "/loci.test.Test/Echo")
        error = error_of(stream, iter(()), timeout=5)
        assert error.code() == Code.INVALID_ARGUMENT, error
        # A second message of a unary call is not read.
        assert stream(iter([field(1, b"a"), field(1, b"b")]), timeout=5)


def test_compressed():
    with Server() as server, server.channel() as channel:
        error = error_of(Client(channel).Echo, msg(data=b"0" * 100000), timeout=5,
                         compression=grpc.Compression.Gzip)
        assert error.code() == Code.UNIMPLEMENTED, error
        assert Client(channel).Echo(msg("next"), timeout=5)


def test_sizes():
    with Server("message=1048576", "send=524288") as server, server.channel() as channel:
        client = Client(channel)
        assert client.Echo(msg(data=b"1" * 500000), timeout=5)
        for _ in range(20):
            error = error_of(client.Echo, msg(data=b"1" * (2 * MIB)), timeout=5)
            assert error.code() == Code.RESOURCE_EXHAUSTED, error
            error = error_of(client.Up, iter([msg(), msg(data=b"1" * (2 * MIB))]), timeout=5)
            assert error.code() == Code.RESOURCE_EXHAUSTED, error
        error = error_of(client.Big, msg(number=524286), timeout=5)
        assert error.code() == Code.RESOURCE_EXHAUSTED, error
        assert details_of(error)[1]["google.rpc.ErrorInfo"].reason == "MESSAGE_TOO_LARGE"
        error = error_of(client.Down, msg(number=1, data=b"1" * 600000), timeout=5)
        assert error.code() == Code.RESOURCE_EXHAUSTED, error
        assert client.Echo(msg("alive"), timeout=5)


def test_metadata_size():
    with Server() as server:
        for size in (7000, 9000, 20000, 100000):
            # A channel of its own: the core ends the connection on the largest.
            with server.channel() as channel:
                client = Client(channel)
                metadata = [("x-a", "v" * size)]
                if size == 7000:
                    assert client.Echo(msg(), timeout=5, metadata=metadata)
                    continue
                error = error_of(client.Echo, msg(), timeout=5, metadata=metadata)
                assert error.code() in (Code.RESOURCE_EXHAUSTED, Code.UNAVAILABLE), error
        with server.channel() as channel:
            many = [("x-key-%d" % i, "v" * 20) for i in range(500)]
            error = error_of(Client(channel).Echo, msg(), timeout=5, metadata=many)
            assert error.code() in (Code.RESOURCE_EXHAUSTED, Code.UNAVAILABLE), error
        with server.channel() as channel:
            assert Client(channel).Echo(msg("alive"), timeout=5)


def test_deadline():
    with Server() as server, server.channel() as channel:
        client = Client(channel)
        start = time.time()
        error = error_of(client.Sleep, msg(number=5000), timeout=0.1)
        assert error.code() == Code.DEADLINE_EXCEEDED and time.time() - start < 2
        stats = client.until(lambda s: s["timed_out"] == 1)
        assert stats["running"] == 0 and stats["cancelled"] == 0, stats
        error = error_of(client.Hold, (msg() if i == 0 else time.sleep(1) or msg()
                                       for i in range(2)), timeout=0.1)
        assert error.code() == Code.DEADLINE_EXCEEDED
        client.until(lambda s: s["timed_out"] == 2 and s["cancelled"] == 0)


def test_cancel_reaches_handler():
    with Server() as server, server.channel() as channel:
        client = Client(channel)
        call = client.Sleep.future(msg(number=20000))
        client.until(lambda s: s["running"] == 1)
        call.cancel()
        client.until(lambda s: s["cancelled"] == 1 and s["running"] == 0, 2)
        done = threading.Event()
        call = client.Hold(iter(lambda: done.wait(10) and None, None))
        client.until(lambda s: s["running"] == 1)
        call.cancel()
        client.until(lambda s: s["cancelled"] == 2 and s["running"] == 0, 2)
        done.set()
        # A send that waits for a reader wakes too.
        call = client.Down(msg(number=1000, data=b"x" * MIB))
        next(call)
        time.sleep(0.3)
        client.until(lambda s: s["running"] == 1)
        call.cancel()
        client.until(lambda s: s["cancelled"] == 3 and s["running"] == 0, 2)


def test_lost_connection():
    with Server() as server, server.channel() as watcher:
        script = ("import grpc,sys,time\n"
                  "c=grpc.insecure_channel(sys.argv[1])\n"
                  "r=c.stream_stream('/loci.test.Test/Hold')(iter(lambda:time.sleep(60),1))\n"
                  "f=c.unary_unary('/loci.test.Test/Sleep').future(bytes([0x30,0xa0,0x9c,1]))\n"
                  "time.sleep(60)\n")
        child = subprocess.Popen([sys.executable, "-c", script, server.target])
        client = Client(watcher)
        client.until(lambda s: s["running"] == 2)
        child.kill()
        child.wait()
        client.until(lambda s: s["cancelled"] == 2 and s["running"] == 0, 5)


def test_queue_full():
    with Server("workers=2", "queue=3") as server, server.channel() as channel:
        client = Client(channel)
        calls = [client.Block.future(msg(number=700), timeout=20) for _ in range(5)]
        client.until(lambda s: s["running"] == 2 and s["queued"] == 3)
        start = time.time()
        error = error_of(client.Echo, msg(), timeout=5)
        assert time.time() - start < 0.5
        assert error.code() == Code.RESOURCE_EXHAUSTED, error
        _, details = details_of(error)
        assert details["google.rpc.ErrorInfo"].reason == "OVERLOADED"
        assert details["google.rpc.RetryInfo"].retry_delay.seconds == 1
        # Health answers all the same.
        assert health(channel, "") == 1
        assert all(call.result().corpus == "blocked" for call in calls)
        assert client.Echo(msg("free"), timeout=5)
        # A call cancelled while it waits does not run.
        calls = [client.Block.future(msg(number=500), timeout=20) for _ in range(2)]
        client.until(lambda s: s["running"] == 2)
        before = client.stats()["finished"]
        queued = client.Block.future(msg(number=500), timeout=20)
        client.until(lambda s: s["queued"] == 1)
        queued.cancel()
        client.until(lambda s: s["running"] == 0)
        time.sleep(0.1)
        assert client.stats()["finished"] == before + 2


def test_long_calls_bounded():
    with Server("long=4") as server, server.channel() as channel:
        client, done = Client(channel), threading.Event()
        holds = [client.Hold(iter(lambda: done.wait(20) and None, None)) for _ in range(4)]
        client.until(lambda s: s["running"] == 4)
        error = error_of(client.Hold, iter([]), timeout=5)
        assert error.code() == Code.RESOURCE_EXHAUSTED, error
        assert details_of(error)[1]["google.rpc.RetryInfo"].retry_delay.seconds == 1
        assert client.Echo(msg("workers are free"), timeout=5)
        assert health(channel, "") == 1
        for hold in holds:
            hold.cancel()
        done.set()


def test_back_pressure():
    with Server() as server, server.channel() as slow, server.channel() as watcher:
        client = Client(watcher)
        stream = Client(slow).Down(msg(number=200, data=b"x" * MIB), timeout=60)
        next(stream)
        last, end = -1, time.time() + 10
        while time.time() < end:
            time.sleep(0.5)
            sent = client.stats()["sent_bytes"]
            if sent == last:
                break
            last = sent
        assert MIB <= last <= 48 * MIB, last
        print(f"  a stalled reader holds {last / MIB:.0f} MiB", end="")
        assert len(list(stream)) == 199  # and it goes on when the reader does


def test_stalled_streams():
    with Server("idle_ms=600") as server, server.channel() as channel:
        client = Client(channel)
        stream = client.Down(msg(number=200, data=b"x" * MIB), timeout=60)
        next(stream)
        client.until(lambda s: s["timed_out"] == 1, 5)
        error = error_of(lambda: list(stream))
        assert error.code() == Code.DEADLINE_EXCEEDED, error
        done = threading.Event()
        start = time.time()
        error = error_of(client.Chat, iter(lambda: done.wait(10) and None, None), timeout=30)
        assert error.code() == Code.DEADLINE_EXCEEDED and time.time() - start < 3, error
        assert details_of(error)[1]["google.rpc.ErrorInfo"].reason == "STREAM_IDLE"
        # A unary call whose message never comes holds no worker and ends too.
        start = time.time()
        stuck = raw(channel, "stream_unary", "/loci.test.Test/Echo")
        error = error_of(stuck, iter(lambda: done.wait(10) and None, None), timeout=30)
        assert error.code() == Code.DEADLINE_EXCEEDED and time.time() - start < 3, error
        # One that moves now and then lives on.
        slow = (time.sleep(0.25) or msg(number=i) for i in range(8))
        assert len(list(client.Chat(slow, timeout=30))) == 8
        done.set()


def test_stalled_stream_does_not_hold_the_drain():
    """Its status must not queue behind the messages that nobody reads."""
    with Server("idle_ms=300", "drain_ms=8000") as server, server.channel() as channel:
        stream = Client(channel).Down(msg(number=200, data=b"x" * MIB), timeout=60)
        next(stream)
        with server.channel() as watcher:
            Client(watcher).until(lambda s: s["timed_out"] == 1, 5)
        start = time.time()
        server.term()
        server.wait()
        assert time.time() - start < 4


def test_unfinished_requests_hold_no_workers():
    with Server("workers=2", "queue=0") as server, server.channel() as channel:
        done = threading.Event()
        stuck = [raw(channel, "stream_unary", "/loci.test.Test/Echo").future(
            iter(lambda: done.wait(20) and None, None), timeout=30) for _ in range(10)]
        time.sleep(0.2)
        assert Client(channel).Echo(msg("x"), timeout=5)
        for call in stuck:
            call.cancel()
        done.set()


def health(channel, service):
    call = raw(channel, "unary_unary", "/grpc.health.v1.Health/Check")
    return dict(fields_of(call(field(1, service.encode()), timeout=5))).get(1, 0)


def test_health():
    with Server() as server, server.channel() as channel:
        client = Client(channel)
        assert health(channel, "") == 1 and health(channel, "loci.test.Test") == 1
        error = error_of(health, channel, "nobody")
        assert error.code() == Code.NOT_FOUND, error
        seen = {"loci.test.Test": [], "later": []}
        ends = {}

        def watch(service):
            call = raw(channel, "unary_stream", "/grpc.health.v1.Health/Watch")
            try:
                for reply in call(field(1, service.encode()), timeout=30):
                    seen[service].append(dict(fields_of(reply)).get(1, 0))
            except grpc.RpcError as error:
                ends[service] = error.code()
        threads = [threading.Thread(target=watch, args=(s,)) for s in seen]
        for thread in threads:
            thread.start()

        def expect(service, states):
            end = time.time() + 5
            while seen[service] != states:
                assert time.time() < end, (service, seen[service], states)
                time.sleep(0.01)
        expect("loci.test.Test", [1])
        expect("later", [3])
        client.Serving(msg("loci.test.Test", 0), timeout=5)
        expect("loci.test.Test", [1, 2])
        assert health(channel, "loci.test.Test") == 2
        client.Serving(msg("loci.test.Test", 0), timeout=5)  # no change, no message
        client.Serving(msg("later", 1), timeout=5)
        expect("later", [3, 1])
        client.Serving(msg("loci.test.Test", 1), timeout=5)
        expect("loci.test.Test", [1, 2, 1])
        start = time.time()
        server.term()
        server.wait()
        assert time.time() - start < 5  # watchers do not hold up the drain
        for thread in threads:
            thread.join(10)
        assert seen == {"loci.test.Test": [1, 2, 1, 2], "later": [3, 1, 2]}, seen
        assert set(ends.values()) == {Code.UNAVAILABLE}, ends


def test_reflection():
    with Server() as server, server.channel() as channel:
        for version in ("v1", "v1alpha"):
            pool = build_pool(channel, version)
            answer = pool.FindServiceByName("loci.v1.QueryService").FindMethodByName("Answer")
            assert answer.input_type.full_name == "loci.v1.AnswerRequest"
            assert pool.FindServiceByName("grpc.reflection.v1alpha.ServerReflection")
            request = M[f"grpc.reflection.{version}.ServerReflectionRequest"]
            response = M[f"grpc.reflection.{version}.ServerReflectionResponse"]
            asked = [request(host="h", list_services="*")]
            asked += [request(file_containing_symbol=s) for s in (
                "loci.v1.AnswerEvent", "loci.v1.AnswerEvent.delta", "loci.v1.AnswerEvent.event",
                "loci.v1.QueryService.Answer", "loci.v1.Mode.DENSE", "loci.v1.DENSE",
                "grpc.health.v1.HealthCheckResponse.ServingStatus",
                "grpc.health.v1.HealthCheckResponse.SERVING",
                "google.rpc.BadRequest.FieldViolation.field", "google.protobuf.Any",
                ".loci.v1.Usage")]
            right = len(asked)
            asked += [request(file_containing_symbol=s) for s in (
                "loci.v1", "loci", "", "loci.v1.", "loci.v1.AnswerEven", "loci.v1.AnswerEvent.x",
                "loci.v1.AnswerEvent.delta.x", "loci.v1.QueryService.Answer.x", "x" * 5000,
                "a." * 2000)]
            asked += [request(file_by_filename="nope.proto"),
                      request(file_containing_extension={"containing_type": "loci.v1.Usage"}),
                      request(all_extension_numbers_of_type="loci.v1.Usage"), request()]
            asked.append(request(file_by_filename="loci/v1/loci.proto"))
            replies = [response.FromString(r) for r in reflect(
                channel, version, *(a.SerializeToString() for a in asked))]
            assert len(replies) == len(asked)
            assert all(r.original_request == a for r, a in zip(replies, asked))
            services = {s.name for s in replies[0].list_services_response.service}
            assert services == {"loci.test.Test", "grpc.health.v1.Health",
                                "grpc.reflection.v1.ServerReflection",
                                "grpc.reflection.v1alpha.ServerReflection"}, services
            assert replies[0].valid_host == "h"
            for ask, reply in zip(asked[1:right], replies[1:right]):
                files = reply.file_descriptor_response.file_descriptor_proto
                assert files, ask
                proto = descriptor_pb2.FileDescriptorProto.FromString(files[0])
                assert ask.file_containing_symbol.lstrip(".").startswith(proto.package), ask
            for reply in replies[right:-2]:
                assert reply.error_response.error_code == 5, reply
            assert replies[-2].error_response.error_code == 3
            assert len(replies[-1].file_descriptor_response.file_descriptor_proto) == 1
            status = files_in(reflect(channel, version, field(3, b"google/rpc/status.proto"))[0])
            assert [f.name for f in status] == ["google/rpc/status.proto",
                                                "google/protobuf/any.proto"]


def test_drain_finishes_running_calls():
    with Server("drain_ms=8000") as server, server.channel() as channel:
        client = Client(channel)
        calls = [client.Block.future(msg(number=800), timeout=20) for _ in range(4)]
        gate = threading.Event()
        chat = client.Chat((gate.wait(0.7) and None or msg(number=i) for i in range(2)), timeout=20)
        client.until(lambda s: s["running"] == 5)
        start = time.time()
        server.term()
        time.sleep(0.2)
        with server.channel() as other:
            error = error_of(Client(other).Echo, msg(), timeout=5)
            assert error.code() == Code.UNAVAILABLE, error
        error = error_of(client.Echo, msg(), timeout=5)
        assert error.code() == Code.UNAVAILABLE, error
        assert all(call.result().corpus == "blocked" for call in calls)
        assert len(list(chat)) == 2
        counters = server.wait()
        assert time.time() - start < 6 and counters["cancelled"] == 0, counters


def test_drain_cancels_after_grace():
    with Server("drain_ms=500", "workers=8") as server, server.channel() as channel:
        client, done = Client(channel), threading.Event()
        sleeps = [client.Sleep.future(msg(number=60000)) for _ in range(4)]
        deaf = client.Block.future(msg(number=2500))  # holds its call past the cancellation
        hold = client.Hold(iter(lambda: done.wait(20) and None, None))
        stalled = client.Down(msg(number=1000, data=b"x" * MIB))
        next(stalled)
        queued = [client.Sleep.future(msg(number=60000)) for _ in range(10)]
        client.until(lambda s: s["running"] == 9 and s["queued"] >= 8)
        start = time.time()
        server.term()
        counters = server.wait()
        assert 0.4 < time.time() - start < 6
        for call in sleeps + queued:
            assert call.code() in (Code.CANCELLED, Code.UNAVAILABLE), call.code()
        error_of(deaf.result)
        error_of(lambda: list(hold))
        error_of(lambda: list(stalled))
        assert counters["cancelled"] >= 6, counters
        done.set()


def test_drain_closes_what_was_read():
    """GOAWAY and PING follow the last reply, and the answer to PING, that is, a client that has
    read all, closes the connection: nothing is lost in it, however slow the client is."""
    def frame(kind, flags, stream, data):
        return len(data).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + data

    def literal(text):
        return bytes([len(text)]) + text.encode()

    headers = (("method", "POST"), ("scheme", "http"), ("path", "/loci.test.Test/Block"),
               ("authority", "localhost"))
    block = b"".join(b"\0" + literal(":" + name) + literal(value) for name, value in headers)
    block += b"\0" + literal("te") + literal("trailers")
    block += b"\0" + literal("content-type") + literal("application/grpc")
    message = b"\x30" + varint(500)  # total_bytes_hint: how long to block
    with Server("drain_ms=8000") as server:
        sock = socket.create_connection(("127.0.0.1", int(server.target.split(":")[1])), 5)
        file = sock.makefile("rb")
        sock.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b"")
                     + frame(1, 4, 1, block)
                     + frame(0, 1, 1, b"\0" + len(message).to_bytes(4, "big") + message))
        time.sleep(0.2)
        server.term()
        time.sleep(0.9)  # the reply is complete, but nothing was read so far
        kinds, ping = [], None
        while ping is None:
            head = file.read(9)
            data = file.read(int.from_bytes(head[:3], "big"))
            if head[3] == 6 and head[4] == 0 and 7 in kinds:
                ping = data
            elif head[3] == 6 and head[4] == 0:
                sock.sendall(frame(6, 1, 0, data))
            kinds.append("end" if head[3] == 1 and head[4] & 1 else head[3])
        assert kinds.index("end") < kinds.index(7), kinds
        assert server.process.poll() is None
        sock.sendall(frame(6, 1, 0, ping))
        start = time.time()
        while file.read(100):
            pass
        assert time.time() - start < 1
        server.wait()
        sock.close()


def test_drain_under_load():
    for round_ in range(3):
        with Server("drain_ms=%d" % (0, 100, 1000)[round_]) as server:
            stop, bad = threading.Event(), []

            def load(kind):
                with server.channel() as channel:
                    client = Client(channel)
                    while not stop.is_set():
                        try:
                            if kind == 0:
                                client.Echo(msg("x"), timeout=5)
                            elif kind == 1:
                                list(client.Down(msg(number=20, data=b"y" * 1000), timeout=5))
                            elif kind == 2:
                                list(client.Chat((msg() for _ in range(10)), timeout=5))
                            else:
                                client.Sleep(msg(number=20), timeout=5)
                        except grpc.RpcError as error:
                            if error.code() not in (Code.UNAVAILABLE, Code.CANCELLED):
                                bad.append(error)
                            return
            threads = [threading.Thread(target=load, args=(i % 4,)) for i in range(12)]
            for thread in threads:
                thread.start()
            time.sleep(0.5)
            server.term()
            server.wait()
            stop.set()
            for thread in threads:
                thread.join(20)
            assert not bad, bad


def test_rapid_cancels():
    with Server() as server, server.channel() as channel:
        client = Client(channel)
        for i in range(1000):
            if i % 4 == 0:
                client.Sleep.future(msg(number=5000)).cancel()
            elif i % 4 == 1:
                call = client.Chat(iter([msg()]))
                next(call)
                call.cancel()
            elif i % 4 == 2:
                client.Down(msg(number=1000, data=b"x" * 100)).cancel()
            else:
                client.Hold(iter([msg()])).cancel()  # may be seen half-closed
        client.until(lambda s: s["running"] == 0 and s["active"] == 0, 20)
        assert client.Echo(msg("alive"), timeout=5)
        server.term()
        out, _ = server.process.communicate(timeout=30)
        assert server.process.returncode == 0 and out.endswith("bye\n"), out


def test_idle_connection_does_not_hold_the_drain():
    with Server() as server, server.channel() as channel:
        assert Client(channel).Echo(msg(), timeout=5)
        time.sleep(1.8)  # 2 s for a client to read its last reply
        start = time.time()
        server.term()
        server.wait()
        assert time.time() - start < 1.5


def test_cancel_is_no_half_close():
    """Streams that are cancelled, never half-closed, must not look half-closed to the handler."""
    with Server() as server, server.channel() as channel:
        client, done = Client(channel), threading.Event()
        for _ in range(15):
            calls = [client.Hold(iter(lambda: done.wait(30) and None, None)) for _ in range(20)]
            client.until(lambda s: s["running"] == 20)
            for call in calls:
                call.cancel()
            client.until(lambda s: s["running"] == 0)
        stats = client.stats()
        done.set()
        assert stats["false_ends"] == 0 and stats["cancelled"] == 300, stats


def test_garbage_bytes():
    with Server("idle_ms=600") as server:
        port = int(server.target.split(":")[1])
        preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
        settings = b"\0\0\0\4\0\0\0\0\0"
        junk = [b"", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", os.urandom(5000), preface,
                preface + os.urandom(3000), preface + settings + os.urandom(3000),
                preface + settings + b"\0\0\4\1\4\0\0\0\1" + b"\x82\x84\x86\xff",
                preface + settings + b"\xff\xff\xff\1\4\0\0\0\1",
                preface + settings + b"\0\0\0\x09\0\0\0\0\1" * 50]
        for data in junk:
            with socket.create_connection(("127.0.0.1", port), timeout=5) as raw_socket:
                raw_socket.sendall(data)
                raw_socket.settimeout(0.1)
                try:
                    raw_socket.recv(1000)
                except OSError:
                    pass
        with server.channel() as channel:
            assert Client(channel).Echo(msg("alive"), timeout=5)


def test_unix_socket():
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "s")
        with Server(listen="unix:" + path) as server:
            assert os.stat(path).st_mode & 0o777 == 0o600
            with server.channel() as channel:
                assert Client(channel).Echo(msg("x"), timeout=5)
            # A second server does not steal the socket.
            second = subprocess.run([BINARY, "listen=unix:" + path], capture_output=True, text=True,
                                timeout=10)
            assert second.returncode == 1 and "another server" in second.stderr, second
        assert not os.path.exists(path)
        stale = socket.socket(socket.AF_UNIX)
        stale.bind(path)
        stale.close()
        with Server(listen="unix:" + path) as server, server.channel() as channel:
            assert Client(channel).Echo(msg("x"), timeout=5)
        with open(path, "w") as other:
            other.write("precious")
        second = subprocess.run([BINARY, "listen=unix:" + path], capture_output=True, text=True,
                                timeout=10)
        assert second.returncode == 1 and "no socket" in second.stderr, second
        assert open(path).read() == "precious"


def test_port_is_not_shared():
    with Server() as server:
        second = subprocess.run([BINARY, "listen=" + server.target], capture_output=True, text=True,
                                timeout=10)
        assert second.returncode == 1 and "in use" in second.stderr, second


def main():
    load_messages()
    names = sys.argv[2:] or [n for n in globals() if n.startswith("test_")]
    failed = []
    for name in names:
        start = time.time()
        print(name, end="", flush=True)
        try:
            globals()[name]()
            print(f"  ok {time.time() - start:.2f} s", flush=True)
        except Exception as error:  # all tests run, whatever one does
            import traceback
            traceback.print_exc()
            failed.append(name)
            print(f"  FAILED: {error!r}", flush=True)
    print("failed:", *failed) if failed else print(f"all {len(names)} passed")
    sys.stdout.flush()
    os._exit(1 if failed else 0)  # generators of cancelled streams may still sleep


if __name__ == "__main__":
    main()
