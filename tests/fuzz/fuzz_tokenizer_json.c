/* SPDX-License-Identifier: Apache-2.0
 *
 * Fuzz entry: any bytes as a tokenizer.json; whatever opens must take any text there and back.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "model/tokenizer.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void round_trip(const loci_tokenizer *tokenizer, loci_slice text) {
    loci_tokens tokens = {0};
    loci_buf back = LOCI_BUF_INIT;
    loci_error err;
    for (int special = 0; special < 2; special++) {
        tokens.count = 0;
        loci_buf_clear(&back);
        if (loci_tokenizer_encode(tokenizer, text, special, &tokens, &err) != LOCI_OK) continue;
        if (loci_tokenizer_decode(tokenizer, tokens.ids, tokens.count, true, &back) != LOCI_OK)
            continue;
        if (loci_tokenizer_normalizes(tokenizer)) continue;
        if (!loci_slice_equal(text, loci_slice_of(back.data, back.len))) abort();
    }
    loci_buf_fini(&back);
    loci_tokens_fini(&tokens);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static char path[] = "/tmp/loci-fuzz-XXXXXX";
    static int fd = -1;
    if (fd < 0) fd = mkstemp(path);
    if (fd < 0 || ftruncate(fd, 0) != 0 || pwrite(fd, data, size, 0) != (ssize_t)size) abort();
    loci_tokenizer *tokenizer = NULL;
    loci_error err;
    if (loci_tokenizer_open(path, &tokenizer, &err) == LOCI_OK) {
        round_trip(tokenizer, loci_slice_text("It's 12\xc2\xbd \xff<eos>\r\n  x"));
        round_trip(tokenizer, loci_slice_of(data, size < 1024 ? size : 1024));
    }
    loci_tokenizer_close(tokenizer);
    return 0;
}
