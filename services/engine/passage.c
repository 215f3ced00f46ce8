/* SPDX-License-Identifier: Apache-2.0
 *
 * Passages: segments with their document, byte range and exact bytes.
 */
#include "services/common/text.h"
#include "services/engine/query.h"
#include "services/engine/quote.h"

loci_status loci_passage_load(loci_query *query, const loci_ranked *ranked, loci_buf *bytes,
                              loci_passage *out, loci_error *err) {
    loci_segment_info info;
    LOCI_TRY(loci_snapshot_segment(query->snapshot, ranked->segment, &info, err));
    size_t before = bytes->len;
    LOCI_TRY(
        loci_snapshot_read(query->snapshot, ranked->segment, info.start, info.end, bytes, err));
    if (bytes->len - before != info.end - info.start)
        return loci_fail(err, LOCI_E_CORRUPT, "document %s is shorter than its passage at %llu",
                         info.document, (unsigned long long)info.start);
    query->usage.fetched_bytes += bytes->len - before;
    *out = (loci_passage){.document = info.document,
                          .start = info.start,
                          .end = info.end,
                          .quote = {NULL, bytes->len - before},
                          .passage_start = info.start,
                          .passage_end = info.end,
                          .passage = {NULL, bytes->len - before},
                          .share = ranked->score};
    return LOCI_OK;
}

void loci_passages_bind(loci_passage *passages, size_t count, const loci_buf *bytes) {
    size_t at = 0;
    for (size_t i = 0; i < count; i++) {
        passages[i].passage.data = bytes->data + at;
        passages[i].quote = passages[i].passage;
        at += passages[i].passage.len;
    }
}

void loci_passages_cite(loci_passage *passages, size_t count, const char *question,
                        const char *answer) {
    for (loci_passage *p = passages; p < passages + count; p++) {
        uint64_t from, to;
        loci_quote_choose(p->passage, loci_slice_text(question), loci_slice_text(answer), &from,
                          &to);
        p->start = p->passage_start + from;
        p->end = p->passage_start + to;
        p->quote = loci_slice_of(p->passage.data + from, to - from);
    }
}

loci_status loci_segment_tokens(const loci_query *query, uint32_t segment, loci_tokens *out,
                                loci_error *err) {
    loci_segment_info info;
    loci_buf bytes = LOCI_BUF_INIT, text = LOCI_BUF_INIT;
    loci_status status;
    LOCI_TRY_GOTO(loci_snapshot_segment(query->snapshot, segment, &info, err), out);
    LOCI_TRY_GOTO(loci_snapshot_read(query->snapshot, segment, info.start, info.end, &bytes, err),
                  out);
    loci_passage_text(loci_slice_of(bytes.data, bytes.len), &text);
    LOCI_TRY_GOTO(loci_buf_status(&text), out);
    status = loci_tokenizer_encode(loci_model_tokenizer(query->engine->model),
                                   loci_slice_of(text.data, text.len), false, out, err);
out:
    loci_buf_fini(&bytes);
    loci_buf_fini(&text);
    return status;
}

bool loci_passage_mark(loci_passage *passage, const char *answer) {
    size_t from, to;
    passage->answer = answer;
    passage->answer_start = passage->answer_end = 0;
    if (!loci_text_find(passage->quote, 0, loci_slice_text(answer), &from, &to)) return false;
    passage->answer_start = passage->start + from;
    passage->answer_end = passage->start + to;
    return true;
}

bool loci_passages_mark(loci_passage *passages, size_t count, const char *answer) {
    bool found = false;
    for (size_t i = 0; i < count; i++) {
        bool here = loci_passage_mark(&passages[i], answer);
        if (!here) passages[i].answer = "";
        found = found || here;
    }
    return found;
}
