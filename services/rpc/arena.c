/* SPDX-License-Identifier: Apache-2.0
 *
 * Bump allocation for the messages of one call. A hostile message may ask for far more memory
 * than it has bytes (an empty submessage costs 2 bytes on the wire and a struct here); the limit
 * makes that an error. Not thread-safe: an arena is used by one thread at a time.
 *
 * And the count of what the messages of all calls of a server take together (any thread).
 */
#include <stdlib.h>
#include <string.h>

#include "services/rpc/rpc_internal.h"

#define ALIGNMENT 16
#define BLOCK_BYTES_MIN 2048
#define KEEP_BYTES_MAX (64u << 10) /* a reset keeps a block up to this size */
#define SMALL_BYTES (16u << 10)    /* always fits: the bounds on calls bound these, too */

struct loci__arena_block {
    loci__arena_block *older;
    size_t size, used;
    _Alignas(ALIGNMENT) uint8_t data[];
};

/* ------------------------------------------------------------------ the memory of all calls */

void loci__memory_init(loci__memory *memory, size_t most) {
    *memory = (loci__memory){.most = most};
    pthread_mutex_init(&memory->mu, NULL);
}

void loci__memory_fini(loci__memory *memory) {
    pthread_mutex_destroy(&memory->mu);
}

bool loci__memory_take(loci__memory *memory, size_t bytes) {
    if (!memory) return true;
    pthread_mutex_lock(&memory->mu);
    bool fits = memory->most == 0 || bytes <= SMALL_BYTES ||
                (memory->used <= memory->most && bytes <= memory->most - memory->used);
    if (fits) memory->used += bytes;
    pthread_mutex_unlock(&memory->mu);
    return fits;
}

void loci__memory_give(loci__memory *memory, size_t bytes) {
    if (!memory || bytes == 0) return;
    pthread_mutex_lock(&memory->mu);
    LOCI_ASSERT(bytes <= memory->used);
    memory->used -= bytes;
    pthread_mutex_unlock(&memory->mu);
}

bool loci__memory_take_stream(loci__memory *memory) {
    pthread_mutex_lock(&memory->mu);
    bool fits = memory->most == 0 || (memory->streams + 1) * LOCI__STREAM_BYTES <= memory->most / 2;
    if (fits) {
        memory->streams++;
        memory->used += LOCI__STREAM_BYTES;
    }
    pthread_mutex_unlock(&memory->mu);
    return fits;
}

void loci__memory_give_stream(loci__memory *memory) {
    loci__memory_give(memory, LOCI__STREAM_BYTES);
    pthread_mutex_lock(&memory->mu);
    memory->streams--;
    pthread_mutex_unlock(&memory->mu);
}

/* ------------------------------------------------------------------ arenas */

static void *proto_alloc(void *arena, size_t bytes) {
    return loci__arena_alloc(arena, bytes);
}

static void proto_free(void *arena, void *pointer) {
    (void)arena;
    (void)pointer; /* freed with the arena */
}

void loci__arena_init(loci__arena *arena, size_t limit_bytes) {
    *arena = (loci__arena){.limit_bytes = limit_bytes};
    arena->allocator = (ProtobufCAllocator){proto_alloc, proto_free, arena};
}

void loci__arena_reset(loci__arena *arena) {
    loci__arena_block *keep = arena->head;
    loci__arena_block *block = keep ? keep->older : NULL;
    while (block) {
        loci__arena_block *older = block->older;
        free(block);
        block = older;
    }
    if (keep && keep->size > KEEP_BYTES_MAX) {
        free(keep);
        keep = NULL;
    }
    if (keep) {
        keep->older = NULL;
        keep->used = 0;
    }
    arena->head = keep;
    arena->allocated_bytes = keep ? keep->size : 0;
    loci__memory_give(arena->memory, arena->paid_bytes - arena->allocated_bytes);
    arena->paid_bytes = arena->allocated_bytes;
    arena->exhausted = arena->refused = false;
}

void loci__arena_fini(loci__arena *arena) {
    loci__arena_reset(arena);
    free(arena->head);
    arena->head = NULL;
    loci__memory_give(arena->memory, arena->paid_bytes);
    arena->allocated_bytes = arena->paid_bytes = 0;
}

/* Pays for the arena as it would be with `more` bytes. */
static bool pay(loci__arena *arena, size_t more) {
    size_t need = arena->allocated_bytes + more;
    if (need <= arena->paid_bytes) return true;
    if (!loci__memory_take(arena->memory, need - arena->paid_bytes)) {
        arena->refused = true;
        return false;
    }
    arena->paid_bytes = need;
    return true;
}

static loci__arena_block *add_block(loci__arena *arena, size_t bytes) {
    size_t room = arena->limit_bytes - arena->allocated_bytes;
    if (bytes > room) return NULL;
    size_t size =
        arena->allocated_bytes < BLOCK_BYTES_MIN ? BLOCK_BYTES_MIN : arena->allocated_bytes;
    if (size > (64u << 10)) size = 64u << 10;
    if (size > room) size = room;
    if (size < bytes) size = bytes;
    if (!pay(arena, size)) return NULL;
    loci__arena_block *block = malloc(sizeof *block + size);
    if (!block) return NULL;
    block->older = arena->head;
    block->size = size;
    block->used = 0;
    arena->head = block;
    arena->allocated_bytes += size;
    return block;
}

void *loci__arena_alloc(loci__arena *arena, size_t bytes) {
    if (bytes > SIZE_MAX - ALIGNMENT) {
        arena->exhausted = true;
        return NULL;
    }
    bytes = (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    loci__arena_block *block = arena->head;
    if (!block || block->size - block->used < bytes) block = add_block(arena, bytes);
    if (!block) {
        arena->exhausted = true;
        return NULL;
    }
    void *at = block->data + block->used;
    block->used += bytes;
    return at;
}

char *loci__arena_text(loci__arena *arena, const void *data, size_t len) {
    char *text = loci__arena_alloc(arena, len + 1);
    if (!text) return NULL;
    memcpy(text, data, len);
    text[len] = 0;
    return text;
}
