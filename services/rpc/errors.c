/* SPDX-License-Identifier: Apache-2.0
 *
 * google.rpc.Status with its details: packed on the server into the trailing metadata
 * grpc-status-details-bin, read back by the client. All of it stays well under the 8 KiB of
 * metadata that a client accepts by default: text 400 B, eight pairs of at most 64 + 256 B.
 */
#include <stdio.h>
#include <string.h>

#include "google/rpc/error_details.pb-c.h"
#include "google/rpc/status.pb-c.h"
#include "services/rpc/rpc_internal.h"

#define ERROR_INFO_URL "type.googleapis.com/google.rpc.ErrorInfo"
#define RETRY_INFO_URL "type.googleapis.com/google.rpc.RetryInfo"
#define DETAIL_BYTES_MAX 4096

/* protobuf-c's messages want char *, and do not write through it. */
static char *text_of(const char *text) {
    return (char *)(uintptr_t)text;
}

static void fill_any(Google__Protobuf__Any *any, const char *url, const ProtobufCMessage *message,
                     uint8_t bytes[static DETAIL_BYTES_MAX]) {
    *any = (Google__Protobuf__Any)GOOGLE__PROTOBUF__ANY__INIT;
    LOCI_ASSERT(protobuf_c_message_get_packed_size(message) <= DETAIL_BYTES_MAX);
    any->type_url = text_of(url);
    any->value.len = protobuf_c_message_pack(message, bytes);
    any->value.data = bytes;
}

grpc_slice loci__error_details_pack(loci_status status, const loci_error *err,
                                    const loci__error_pair *pairs, size_t pair_count,
                                    unsigned retry_ms) {
    Google__Rpc__ErrorInfo__MetadataEntry entries[LOCI__ERROR_PAIRS_MAX];
    Google__Rpc__ErrorInfo__MetadataEntry *entry_list[LOCI__ERROR_PAIRS_MAX];
    Google__Rpc__ErrorInfo info = GOOGLE__RPC__ERROR_INFO__INIT;
    info.reason = text_of(err->reason[0] ? err->reason : loci_status_code_name(status));
    info.domain = text_of("loci");
    LOCI_ASSERT(pair_count <= LOCI__ERROR_PAIRS_MAX);
    for (size_t i = 0; i < pair_count; i++) {
        google__rpc__error_info__metadata_entry__init(&entries[i]);
        entries[i].key = text_of(pairs[i].key);
        entries[i].value = text_of(pairs[i].value);
        entry_list[i] = &entries[i];
    }
    info.n_metadata = pair_count;
    info.metadata = entry_list;

    uint8_t info_bytes[DETAIL_BYTES_MAX], retry_bytes[DETAIL_BYTES_MAX];
    Google__Protobuf__Any any[2];
    Google__Protobuf__Any *details[2] = {&any[0], &any[1]};
    fill_any(&any[0], ERROR_INFO_URL, &info.base, info_bytes);
    size_t detail_count = 1;
    if (retry_ms) {
        Google__Protobuf__Duration delay = GOOGLE__PROTOBUF__DURATION__INIT;
        delay.seconds = retry_ms / 1000;
        delay.nanos = (int32_t)(retry_ms % 1000) * 1000000;
        Google__Rpc__RetryInfo retry = GOOGLE__RPC__RETRY_INFO__INIT;
        retry.retry_delay = &delay;
        fill_any(&any[detail_count++], RETRY_INFO_URL, &retry.base, retry_bytes);
    }

    Google__Rpc__Status message = GOOGLE__RPC__STATUS__INIT;
    message.code = loci_status_to_grpc(status);
    message.message = text_of(err->text);
    message.n_details = detail_count;
    message.details = details;
    grpc_slice slice = grpc_slice_malloc(google__rpc__status__get_packed_size(&message));
    google__rpc__status__pack(&message, GRPC_SLICE_START_PTR(slice));
    return slice;
}

void loci__error_details_read(loci_slice details, loci_error *err) {
    Google__Rpc__Status *message = google__rpc__status__unpack(NULL, details.len, details.data);
    if (!message) return;
    if (!err->text[0]) snprintf(err->text, sizeof err->text, "%s", message->message);
    for (size_t i = 0; i < message->n_details; i++) {
        const Google__Protobuf__Any *any = message->details[i];
        if (strcmp(any->type_url, ERROR_INFO_URL) != 0) continue;
        Google__Rpc__ErrorInfo *info =
            google__rpc__error_info__unpack(NULL, any->value.len, any->value.data);
        if (!info) continue;
        snprintf(err->reason, sizeof err->reason, "%s", info->reason);
        google__rpc__error_info__free_unpacked(info, NULL);
    }
    google__rpc__status__free_unpacked(message, NULL);
}
