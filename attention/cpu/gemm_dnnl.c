/* SPDX-License-Identifier: Apache-2.0
 *
 * oneDNN matrix products; see gemm_dnnl.h.
 *
 * Primitives are made once for each shape and kept until close. Only the "brgemm" kernels
 * are taken: the others either need another weight layout or are slower than our own.
 */
#include "attention/cpu/gemm_dnnl.h"

#include <dnnl.h>
#include <omp.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

/* x, w, y, scratch */
#define ARGS 4

struct loci_dnnl_matmul {
    uint32_t tile_rows, rows, cols;
    loci_dtype precision;
    dnnl_primitive_t primitive; /* NULL: no fast kernel */
    dnnl_memory_desc_t x, w, y, scratch;
    char name[64];
    dnnl_memory_t *memory; /* [threads][ARGS]: made once, pointed at the data of each run */
    loci_dnnl_matmul *next;
};

struct loci_dnnl {
    dnnl_engine_t engine;
    dnnl_stream_t *streams; /* one for each thread */
    unsigned threads;
    pthread_mutex_t lock; /* of the list */
    loci_dnnl_matmul *list;
};

loci_status loci_dnnl_open(unsigned threads, loci_dnnl **out, loci_error *err) {
    *out = NULL;
    loci_dnnl *dnnl = calloc(1, sizeof *dnnl);
    dnnl_stream_t *streams = calloc(threads, sizeof(dnnl_stream_t));
    if (!dnnl || !streams) {
        free(dnnl);
        free((void *)streams);
        return loci_fail(err, LOCI_E_NOMEM, "no memory for oneDNN's streams");
    }
    dnnl->streams = streams;
    pthread_mutex_init(&dnnl->lock, NULL);
    bool made = dnnl_engine_create(&dnnl->engine, dnnl_cpu, 0) == dnnl_success;
    while (made && dnnl->threads < threads) {
        made = dnnl_stream_create(&streams[dnnl->threads], dnnl->engine,
                                  dnnl_stream_default_flags) == dnnl_success;
        if (made) dnnl->threads++;
    }
    if (!made) {
        loci_dnnl_close(dnnl);
        return LOCI_OK;
    }
    *out = dnnl;
    return LOCI_OK;
}

static void free_matmul(loci_dnnl_matmul *matmul, unsigned threads) {
    for (size_t i = 0; matmul->memory && i < (size_t)threads * ARGS; i++)
        if (matmul->memory[i]) dnnl_memory_destroy(matmul->memory[i]);
    free((void *)matmul->memory);
    if (matmul->primitive) dnnl_primitive_destroy(matmul->primitive);
    free(matmul);
}

void loci_dnnl_close(loci_dnnl *dnnl) {
    if (!dnnl) return;
    while (dnnl->list) {
        loci_dnnl_matmul *matmul = dnnl->list;
        dnnl->list = matmul->next;
        free_matmul(matmul, dnnl->threads);
    }
    for (unsigned i = 0; i < dnnl->threads; i++) dnnl_stream_destroy(dnnl->streams[i]);
    if (dnnl->engine) dnnl_engine_destroy(dnnl->engine);
    pthread_mutex_destroy(&dnnl->lock);
    free((void *)dnnl->streams);
    free(dnnl);
}

static bool describe_shapes(loci_dnnl_matmul *m) {
    bool bf16 = m->precision == LOCI_BF16;
    dnnl_data_type_t type = bf16 ? dnnl_bf16 : dnnl_f32;
    dnnl_dims_t x = {m->tile_rows, m->cols}, w = {m->cols, m->rows}, y = {m->tile_rows, m->rows};
    return dnnl_memory_desc_init_by_tag(&m->x, 2, x, type, dnnl_ab) == dnnl_success &&
           dnnl_memory_desc_init_by_tag(&m->w, 2, w, type,
                                        bf16 ? dnnl_BA16a64b2a : dnnl_BA16a64b) == dnnl_success &&
           dnnl_memory_desc_init_by_tag(&m->y, 2, y, dnnl_f32, dnnl_ab) == dnnl_success;
}

/* Leaves m->primitive NULL when there is no fast kernel. */
static void make_primitive(loci_dnnl_matmul *m, dnnl_engine_t engine) {
    dnnl_matmul_desc_t desc;
    dnnl_primitive_attr_t attr;
    dnnl_primitive_desc_t pd = NULL;
    if (!describe_shapes(m) ||
        dnnl_matmul_desc_init(&desc, &m->x, &m->w, NULL, &m->y) != dnnl_success ||
        dnnl_primitive_attr_create(&attr) != dnnl_success)
        return;
    const char *name = NULL;
    if (dnnl_primitive_attr_set_scratchpad_mode(attr, dnnl_scratchpad_mode_user) == dnnl_success &&
        dnnl_primitive_desc_create(&pd, &desc, attr, engine, NULL) == dnnl_success &&
        dnnl_primitive_desc_query(pd, dnnl_query_impl_info_str, 0, (void *)&name) == dnnl_success &&
        strncmp(name, "brg", 3) == 0) {
        strncpy(m->name, name, sizeof m->name - 1);
        m->scratch = *dnnl_primitive_desc_query_md(pd, dnnl_query_scratchpad_md, 0);
        if (dnnl_primitive_create(&m->primitive, pd) != dnnl_success) m->primitive = NULL;
    }
    if (pd) dnnl_primitive_desc_destroy(pd);
    dnnl_primitive_attr_destroy(attr);
}

static bool make_memory(loci_dnnl_matmul *m, const loci_dnnl *dnnl) {
    const dnnl_memory_desc_t *descs[ARGS] = {&m->x, &m->w, &m->y, &m->scratch};
    m->memory = calloc((size_t)dnnl->threads * ARGS, sizeof(dnnl_memory_t));
    if (!m->memory) return false;
    for (size_t i = 0; i < (size_t)dnnl->threads * ARGS; i++)
        if (dnnl_memory_create(&m->memory[i], descs[i % ARGS], dnnl->engine, DNNL_MEMORY_NONE) !=
            dnnl_success)
            return false;
    return true;
}

static loci_dnnl_matmul *find(loci_dnnl *dnnl, const loci_dnnl_matmul *key) {
    loci_dnnl_matmul *m = dnnl->list;
    while (m && (m->tile_rows != key->tile_rows || m->rows != key->rows || m->cols != key->cols ||
                 m->precision != key->precision))
        m = m->next;
    return m;
}

const loci_dnnl_matmul *loci_dnnl_matmul_get(loci_dnnl *dnnl, uint32_t tile_rows, uint32_t rows,
                                             uint32_t cols, loci_dtype precision) {
    loci_dnnl_matmul key = {
        .tile_rows = tile_rows, .rows = rows, .cols = cols, .precision = precision};
    pthread_mutex_lock(&dnnl->lock);
    loci_dnnl_matmul *m = find(dnnl, &key);
    if (!m && (m = malloc(sizeof *m)) != NULL) {
        *m = key;
        omp_set_num_threads(1); /* primitives plan for the caller's number of threads */
        make_primitive(m, dnnl->engine);
        if (m->primitive && !make_memory(m, dnnl)) {
            dnnl_primitive_destroy(m->primitive);
            m->primitive = NULL;
        }
        m->next = dnnl->list;
        dnnl->list = m;
    }
    pthread_mutex_unlock(&dnnl->lock);
    return m && m->primitive ? m : NULL;
}

size_t loci_dnnl_scratch_bytes(const loci_dnnl_matmul *matmul) {
    return dnnl_memory_desc_get_size(&matmul->scratch);
}

const char *loci_dnnl_name(const loci_dnnl_matmul *matmul) {
    return matmul->name;
}

bool loci_dnnl_run(loci_dnnl *dnnl, const loci_dnnl_matmul *matmul, unsigned thread, const void *x,
                   const void *w, float *y, void *scratch) {
    /* oneDNN's interface takes all memory as non-const; it does not write x and w. */
    void *data[ARGS] = {(void *)(uintptr_t)x, (void *)(uintptr_t)w, y, scratch};
    static const int names[ARGS] = {DNNL_ARG_SRC, DNNL_ARG_WEIGHTS, DNNL_ARG_DST,
                                    DNNL_ARG_SCRATCHPAD};
    dnnl_exec_arg_t args[ARGS];
    for (int i = 0; i < ARGS; i++) {
        dnnl_memory_t memory = matmul->memory[thread * ARGS + (unsigned)i];
        if (dnnl_memory_set_data_handle(memory, data[i]) != dnnl_success) return false;
        args[i] = (dnnl_exec_arg_t){names[i], memory};
    }
    omp_set_num_threads(1); /* of this thread; a write to thread-local storage */
    return dnnl_primitive_execute(matmul->primitive, dnnl->streams[thread], ARGS, args) ==
               dnnl_success &&
           dnnl_stream_wait(dnnl->streams[thread]) == dnnl_success;
}
