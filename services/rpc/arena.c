/* SPDX-License-Identifier: Apache-2.0
 *
 * Bump allocation for the messages of one call. A hostile message may ask for far more memory
 * than it has bytes (an empty submessage costs 2 bytes on the wire and a struct here); the limit
 * makes that an error. Not thread-safe: an arena is used by one thread at a time.
 */
#include <stdlib.h>
#include <string.h>

#include "services/rpc/rpc_internal.h"

#define ALIGNMENT 16
#define BLOCK_BYTES_MIN 2048
#define KEEP_BYTES_MAX (2u << 20) /* a reset keeps a block up to this size for the next message */

struct loci__arena_block {
    loci__arena_block *older;
    size_t size, used;
    _Alignas(ALIGNMENT) uint8_t data[];
};

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
    arena->exhausted = false;
}

void loci__arena_fini(loci__arena *arena) {
    loci__arena_reset(arena);
    free(arena->head);
    arena->head = NULL;
}

static loci__arena_block *add_block(loci__arena *arena, size_t bytes) {
    size_t room = arena->limit_bytes - arena->allocated_bytes;
    if (bytes > room) return NULL;
    size_t size =
        arena->allocated_bytes < BLOCK_BYTES_MIN ? BLOCK_BYTES_MIN : arena->allocated_bytes;
    if (size > (64u << 10)) size = 64u << 10;
    if (size > room) size = room;
    if (size < bytes) size = bytes;
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
