/* SPDX-License-Identifier: Apache-2.0
 *
 * A service for the tests of the RPC runtime, loci.test.Test. Every message in and out is a
 * loci.v1.RegisterRequest, used as: corpus = text, data = bytes, total_bytes_hint = a number.
 */
#ifndef LOCI_TESTS_SERVICES_RPC_TESTSERVICE_H
#define LOCI_TESTS_SERVICES_RPC_TESTSERVICE_H

#include <stdatomic.h>

#include "services/rpc/rpc.h"

typedef struct test_service {
    atomic_int running;       /* handlers that run now */
    atomic_int finished;      /* handlers that have returned */
    atomic_int cancelled;     /* handlers that saw LOCI_E_CANCELLED */
    atomic_int timed_out;     /* handlers that saw LOCI_E_TIMEOUT */
    atomic_int false_ends;    /* streams whose end was no half-close although NULL was received */
    atomic_ullong sent_bytes; /* taken by the transport in Down */
} test_service;

/* Echo (unary), Fail (unary: status = number), Sleep (unary: number ms, polls the cancel), Block
 * (unary: number ms, deaf), NoReply and TwoReplies (unary), Down (server stream: number messages of
 * as many bytes as data has), Big (unary: a reply of number bytes), Up (client stream: bytes
 * received), Chat (bidi), Duplex (bidi, long-lived: number unasked messages while receiving), Hold
 * (bidi, long-lived: receives until the end), Leave (bidi: returns at once), Stats (unary: the
 * counters as text), Serving (unary: health of corpus = number). */
void test_service_fill(loci_rpc_service *service, test_service *state);
void test_service_set_server(loci_rpc_server *server); /* before its start */

#endif
