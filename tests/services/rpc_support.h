/* SPDX-License-Identifier: Apache-2.0
 *
 * Shared by the tests of the RPC runtime: server and client in one process on the test service.
 */
#ifndef LOCI_TESTS_SERVICES_RPC_SUPPORT_H
#define LOCI_TESTS_SERVICES_RPC_SUPPORT_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include "loci/v1/loci.pb-c.h"
#include "rpc_testservice.h"
#include "services/rpc/rpc_internal.h"

typedef Loci__V1__RegisterRequest text_message;
#define TEXT_INIT LOCI__V1__REGISTER_REQUEST__INIT
#define TEXT_TYPE (&loci__v1__register_request__descriptor)
#define MIB (1u << 20)

void check_ok(loci_status status, const loci_error *err);

/* A server for one test, and a channel to it. */
typedef struct rpc_fixture {
    loci_rpc_server *server;
    loci_rpc_channel *channel;
    test_service state;
    loci_rpc_service service;
    char address[64];
    loci_error err;
} rpc_fixture;

/* options NULL: the defaults. */
void rpc_start(rpc_fixture *f, const loci_rpc_server_options *options);
/* Checks that no handler runs, that no end was taken wrongly, and that all memory came back. */
void rpc_stop(rpc_fixture *f);

text_message text_of(const char *text, uint64_t number);
/* A call that the test service answers at once; the text of the reply is copied to `reply`. */
loci_status unary(rpc_fixture *f, const char *method, const char *text, uint64_t number,
                  unsigned timeout_ms, char reply[static 256]);
loci_rpc_client_call *open_call(rpc_fixture *f, const char *method, unsigned timeout_ms,
                                const atomic_int *interrupt);
void send_text(rpc_fixture *f, loci_rpc_client_call *call, const char *text, uint64_t number);
/* Reads one message and returns its number; UINT64_MAX at the end, with *status. */
uint64_t read_number(rpc_fixture *f, loci_rpc_client_call *call, loci_status *status);
/* Waits up to 5 s. */
void wait_for(atomic_int *counter, int value);

/* Of a test program: the runtime. */
int rpc_set_up(void **state);
int rpc_tear_down(void **state);

#endif
