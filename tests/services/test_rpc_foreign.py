#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
#
# The RPC runtime seen by a foreign client: calls of every kind and what goes wrong with them. The
# life of a server is in test_rpc_foreign_server.py.
#
#   test_rpc_foreign.py RPC_TESTSERVER [NAME...]
#
# What is known to bite in the gRPC C core, and what holds it in these files or in test_rpc*.c (c:):
#   drain: batch on a closed queue aborts    drain_cancels_after_grace, _under_load, c: shutdown
#   order of a stop, slots come back         the clean exit of every Server here, c: bad_listening
#   idle clients do not answer the GOAWAY    idle_connection_does_not_hold_the_drain
#   signals before grpc_init                 rpc_testserver.c blocks them; every stop is a SIGTERM
#   slices, buffers, metadata ownership      the whole of test_rpc*.c under ASan and LSan
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
import subprocess
import sys
import threading
import time

from rpc_foreign import (MIB, Client, Code, Server, details_of, error_of, field, grpc, health,
                         main, msg, raw)


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


if __name__ == "__main__":
    main(globals())
