#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
#
# The RPC runtime seen by a foreign client: health, reflection, drain, connections.
#
#   test_rpc_foreign_server.py RPC_TESTSERVER [NAME...]
import os
import socket
import subprocess
import tempfile
import threading
import time

from rpc_foreign import (BINARY, M, MIB, Client, Code, Server, build_pool, descriptor_pb2,
                         error_of, field, fields_of, files_in, grpc, health, main, msg, raw,
                         reflect, varint)


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


def test_idle_connection_does_not_hold_the_drain():
    with Server() as server, server.channel() as channel:
        assert Client(channel).Echo(msg(), timeout=5)
        time.sleep(1.8)  # 2 s for a client to read its last reply
        start = time.time()
        server.term()
        server.wait()
        assert time.time() - start < 1.5


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


if __name__ == "__main__":
    main(globals())
