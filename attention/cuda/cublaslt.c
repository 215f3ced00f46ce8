/* SPDX-License-Identifier: Apache-2.0
 *
 * See cublaslt.h. Row-major y = x W^T is, to a library that counts columns first,
 * Y [n x rows] = W' [n x k] X [k x rows] with W stored k x n (transposed) and X as it is.
 */
#include "attention/cuda/cublaslt.h"

#include <cublasLt.h>
#include <dlfcn.h>
#include <stdlib.h>

/* What is used of the library. */
#define FUNCTIONS(X)                   \
    X(cublasLtCreate)                  \
    X(cublasLtDestroy)                 \
    X(cublasLtMatmul)                  \
    X(cublasLtMatmulAlgoGetHeuristic)  \
    X(cublasLtMatmulDescCreate)        \
    X(cublasLtMatmulDescDestroy)       \
    X(cublasLtMatmulDescSetAttribute)  \
    X(cublasLtMatrixLayoutCreate)      \
    X(cublasLtMatrixLayoutDestroy)     \
    X(cublasLtMatmulPreferenceCreate)  \
    X(cublasLtMatmulPreferenceDestroy) \
    X(cublasLtMatmulPreferenceSetAttribute)

struct loci_cublaslt {
    void *library;
    cublasLtHandle_t handle;
#define X(name) __typeof__(&(name)) name;
    FUNCTIONS(X)
#undef X
};

struct loci_cublaslt_plan {
    loci_cublaslt_shape shape;
    cublasLtMatmulAlgo_t algorithm;
};

/* The descriptions that one call needs; the library makes each in about a microsecond. */
typedef struct call {
    const loci_cublaslt *blas;
    cublasLtMatmulDesc_t product;
    cublasLtMatrixLayout_t w, x, y;
} call;

static loci_status try(cublasStatus_t result, const char *what, loci_error *err) {
    if (result == CUBLAS_STATUS_SUCCESS) return LOCI_OK;
    return loci_fail(err, LOCI_E_INTERNAL, "cuBLASLt: %s failed with status %d", what, (int)result);
}

static bool find_functions(loci_cublaslt *blas) {
#define X(name)                                                  \
    *(void **)(void *)&blas->name = dlsym(blas->library, #name); \
    if (!blas->name) return false;
    FUNCTIONS(X)
#undef X
    return true;
}

loci_status loci_cublaslt_open(loci_cublaslt **out, loci_error *err) {
    static const char *const names[] = {"libcublasLt.so.13", "libcublasLt.so"};
    *out = NULL;
    loci_cublaslt *blas = calloc(1, sizeof *blas);
    if (!blas) return loci_fail(err, LOCI_E_NOMEM, "no memory for cuBLASLt");
    for (size_t i = 0; !blas->library && i < sizeof names / sizeof *names; i++)
        blas->library = dlopen(names[i], RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE); /* it is large */
    loci_status status = LOCI_OK;
    if (!blas->library)
        status = loci_fail(err, LOCI_E_UNAVAILABLE, "backend cuda: %s was not found (%s)", names[0],
                           "install the CUDA 13 libraries or set LD_LIBRARY_PATH");
    else if (!find_functions(blas))
        status = loci_fail(err, LOCI_E_UNAVAILABLE, "backend cuda: libcublasLt lacks functions");
    else
        status = try(blas->cublasLtCreate(&blas->handle), "cublasLtCreate", err);
    if (status != LOCI_OK) {
        loci_cublaslt_close(blas);
        return status;
    }
    *out = blas;
    return LOCI_OK;
}

void loci_cublaslt_close(loci_cublaslt *blas) {
    if (!blas) return;
    if (blas->handle) (void)blas->cublasLtDestroy(blas->handle);
    if (blas->library) (void)dlclose(blas->library);
    free(blas);
}

static void call_close(call *c) {
    if (c->product) (void)c->blas->cublasLtMatmulDescDestroy(c->product);
    if (c->w) (void)c->blas->cublasLtMatrixLayoutDestroy(c->w);
    if (c->x) (void)c->blas->cublasLtMatrixLayoutDestroy(c->x);
    if (c->y) (void)c->blas->cublasLtMatrixLayoutDestroy(c->y);
}

static loci_status call_open(call *c, const loci_cublaslt *blas, const loci_cublaslt_shape *s,
                             uint32_t rows, loci_error *err) {
    cudaDataType_t type = s->precision == LOCI_BF16 ? CUDA_R_16BF : CUDA_R_32F;
    cublasOperation_t transposed = CUBLAS_OP_T;
    *c = (call){.blas = blas};
    LOCI_TRY(try(blas->cublasLtMatmulDescCreate(&c->product, CUBLAS_COMPUTE_32F, CUDA_R_32F),
                 "cublasLtMatmulDescCreate", err));
    LOCI_TRY(try(blas->cublasLtMatmulDescSetAttribute(c->product, CUBLASLT_MATMUL_DESC_TRANSA,
                                                      &transposed, sizeof transposed),
                 "cublasLtMatmulDescSetAttribute", err));
    LOCI_TRY(try(blas->cublasLtMatrixLayoutCreate(&c->w, type, s->k_padded, s->n, s->k_padded),
                 "cublasLtMatrixLayoutCreate", err));
    LOCI_TRY(try(blas->cublasLtMatrixLayoutCreate(&c->x, type, s->k_padded, rows, s->k_padded),
                 "cublasLtMatrixLayoutCreate", err));
    return try(blas->cublasLtMatrixLayoutCreate(&c->y, CUDA_R_32F, s->n, rows, s->n),
               "cublasLtMatrixLayoutCreate", err);
}

static loci_status find_algorithm(call *c, loci_cublaslt_plan *plan, uint32_t rows,
                                  loci_error *err) {
    const loci_cublaslt *blas = c->blas;
    cublasLtMatmulPreference_t wish = NULL;
    cublasLtMatmulHeuristicResult_t found;
    size_t workspace = LOCI_CUBLASLT_WORKSPACE;
    uint32_t whole = CUBLASLT_REDUCTION_SCHEME_NONE, inputs = 16;
    uint32_t output = plan->shape.y_aligned ? 16 : 4;
    int count = 0;
    loci_status status;
    LOCI_TRY(
        try(blas->cublasLtMatmulPreferenceCreate(&wish), "cublasLtMatmulPreferenceCreate", err));
#define WISH(name, value)                                                              \
    LOCI_TRY_GOTO(try(blas->cublasLtMatmulPreferenceSetAttribute(                      \
                          wish, CUBLASLT_MATMUL_PREF_##name, &(value), sizeof(value)), \
                      "cublasLtMatmulPreferenceSetAttribute", err),                    \
                  out)
    WISH(MAX_WORKSPACE_BYTES, workspace);
    WISH(REDUCTION_SCHEME_MASK, whole);
    WISH(MIN_ALIGNMENT_A_BYTES, inputs);
    WISH(MIN_ALIGNMENT_B_BYTES, inputs);
    WISH(MIN_ALIGNMENT_C_BYTES, output);
    WISH(MIN_ALIGNMENT_D_BYTES, output);
#undef WISH
    status = try(blas->cublasLtMatmulAlgoGetHeuristic(blas->handle, c->product, c->w, c->x, c->y,
                                                      c->y, wish, 1, &found, &count),
                 "cublasLtMatmulAlgoGetHeuristic", err);
    if (status == LOCI_OK && (count == 0 || found.state != CUBLAS_STATUS_SUCCESS))
        status = loci_fail(err, LOCI_E_UNSUPPORTED, "cuBLASLt has no product of %u x %u x %u", rows,
                           plan->shape.n, plan->shape.k);
    if (status == LOCI_OK) plan->algorithm = found.algo;
out:
    (void)blas->cublasLtMatmulPreferenceDestroy(wish);
    return status;
}

loci_status loci_cublaslt_plan_make(loci_cublaslt *blas, const loci_cublaslt_shape *shape,
                                    uint32_t rows, loci_cublaslt_plan **out, loci_error *err) {
    *out = NULL;
    loci_cublaslt_plan *plan = calloc(1, sizeof *plan);
    if (!plan) return loci_fail(err, LOCI_E_NOMEM, "no memory for a product's plan");
    plan->shape = *shape;
    call c;
    loci_status status = call_open(&c, blas, shape, rows, err);
    if (status == LOCI_OK) status = find_algorithm(&c, plan, rows, err);
    call_close(&c);
    if (status != LOCI_OK) {
        free(plan);
        return status;
    }
    *out = plan;
    return LOCI_OK;
}

void loci_cublaslt_plan_free(loci_cublaslt_plan *plan) {
    free(plan);
}

loci_status loci_cublaslt_run(loci_cublaslt *blas, const loci_cublaslt_plan *plan, uint32_t rows,
                              const void *x, const void *w, float *y, bool accumulate,
                              void *workspace, cudaStream_t stream, loci_error *err) {
    const float one = 1.0f, beta = accumulate ? 1.0f : 0.0f;
    call c;
    loci_status status = call_open(&c, blas, &plan->shape, rows, err);
    if (status == LOCI_OK)
        status = try(blas->cublasLtMatmul(blas->handle, c.product, &one, w, c.w, x, c.x, &beta, y,
                                          c.y, y, c.y, &plan->algorithm, workspace,
                                          LOCI_CUBLASLT_WORKSPACE, stream),
                     "cublasLtMatmul", err);
    call_close(&c);
    return status;
}
