/* SPDX-License-Identifier: Apache-2.0
 *
 * What the handlers of the daemon share: the engine, the server, and the method tables.
 * Handlers translate between messages and the engine; they hold no state of their own but
 * the table of request ids (corpora.c).
 */
#ifndef LOCI_SERVICES_LOCID_NODE_H
#define LOCI_SERVICES_LOCID_NODE_H

#include <stdatomic.h>

#include "loci/v1/loci.pb-c.h"
#include "services/common/names.h"
#include "services/engine/engine.h"
#include "services/rpc/rpc.h"

typedef struct loci_daemon {
    loci_engine *engine;
    loci_rpc_server *server;
    const char *model;      /* folder */
    const char *also_model; /* "" = none */
    const char *data;
    uint64_t started_ns;
    atomic_bool draining; /* set before shutdown; long waits end */
} loci_daemon;

/* ctx of each is a loci_daemon. */
extern const loci_rpc_method loci_corpus_methods[], loci_document_methods[], loci_query_methods[],
    loci_node_methods[];
extern const size_t loci_corpus_method_count, loci_document_method_count, loci_query_method_count,
    loci_node_method_count;

/* Register (register.c), listed in the table of documents.c. */
loci_status loci_register_handler(loci_rpc_call *call, void *ctx, loci_error *err);

/* ReindexCorpus and CancelReindexCorpus (reindex.c), listed in the table of corpora.c. */
loci_status loci_reindex_handler(loci_rpc_call *call, void *ctx, loci_error *err);
loci_status loci_reindex_cancel_handler(loci_rpc_call *call, void *ctx, loci_error *err);

/* Sends the corpus as the one reply. */
LOCI_MUST_CHECK loci_status loci_daemon_send_corpus(loci_rpc_call *call, const loci_daemon *node,
                                                    const loci_corpus_info *info, loci_error *err);
/* Looks the corpus up; LOCI_E_NOTFOUND gets the reason CORPUS_NOT_FOUND and metadata. */
LOCI_MUST_CHECK loci_status loci_daemon_corpus(loci_daemon *node, loci_rpc_call *call,
                                               const char *corpus, loci_corpus_info *out,
                                               loci_error *err);
/* A call that waits for the ingest thread. */
typedef struct loci_daemon_wait {
    const loci_daemon *node;
    loci_rpc_call *call;
    const char *corpus;
    const char *doing;         /* "indexing" */
    const char *meanwhile;     /* "its documents stay stored" */
    uint64_t failing_since_ns; /* 0: it does not fail */
} loci_daemon_wait;
/* Reasons to end the call although what it waits for is not done: the caller has gone, the node is
 * shutting down (LOCI_E_UNAVAILABLE, reason NODE_DRAINING), or the thread has failed for ten
 * seconds (its error). */
LOCI_MUST_CHECK loci_status loci_daemon_check_going(loci_daemon_wait *wait,
                                                    const loci_ingest_progress *progress,
                                                    loci_error *err);
/* Gives an error without a reason the one named, when it has the status `when`. */
loci_status loci_daemon_reason(loci_error *err, loci_status status, loci_status when,
                               const char *reason);

#endif
