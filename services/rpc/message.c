/* SPDX-License-Identifier: Apache-2.0
 *
 * Messages between the core's byte buffers and protobuf-c, and a reader of the wire format.
 *
 * protobuf-c keeps text as C strings, does not check that it is UTF-8 and would silently cut it at
 * a NUL, so every message is walked once against its descriptor before it is unpacked. The walk is
 * also what bounds nesting.
 *
 * A received message is a list of slices (8 KiB reads), protobuf-c wants contiguous bytes: one copy
 * to join them and one of each bytes field by the unpacking. Bulk data at more than about 1 GB/s
 * would need a reader of its own here.
 */
#include <string.h>

#include "services/rpc/rpc_internal.h"

#define DEPTH_MAX 16 /* our messages nest 3 deep */

loci__wire loci__wire_of(loci_slice bytes) {
    return (loci__wire){bytes, 0, false};
}

static uint64_t read_varint(loci__wire *wire) {
    uint64_t value = 0;
    for (unsigned shift = 0; shift < 64; shift += 7) {
        if (wire->at >= wire->bytes.len) break;
        uint8_t byte = wire->bytes.data[wire->at++];
        value |= (uint64_t)(byte & 0x7f) << shift;
        if (!(byte & 0x80)) return value;
    }
    wire->failed = true;
    return 0;
}

static uint64_t read_fixed(loci__wire *wire, size_t len) {
    if (wire->bytes.len - wire->at < len) {
        wire->failed = true;
        return 0;
    }
    uint64_t value = 0;
    for (size_t i = 0; i < len; i++) {
        value |= (uint64_t)wire->bytes.data[wire->at + i] << (8 * i);
    }
    wire->at += len;
    return value;
}

bool loci__wire_next(loci__wire *wire, loci__wire_field *field) {
    if (wire->failed || wire->at >= wire->bytes.len) return false;
    uint64_t key = read_varint(wire);
    *field = (loci__wire_field){.number = (uint32_t)(key >> 3), .type = key & 7};
    if (key >> 3 == 0 || key >> 32 != 0) wire->failed = true;
    if (wire->failed) return false;
    switch (field->type) {
    case 0: field->value = read_varint(wire); break;
    case 1: field->value = read_fixed(wire, 8); break;
    case 5: field->value = read_fixed(wire, 4); break;
    case 2: {
        uint64_t len = read_varint(wire);
        if (wire->failed || len > wire->bytes.len - wire->at) {
            wire->failed = true;
            break;
        }
        field->bytes = loci_slice_of(wire->bytes.data + wire->at, (size_t)len);
        wire->at += (size_t)len;
        break;
    }
    default: wire->failed = true; /* groups are not of proto3 */
    }
    return !wire->failed;
}

/* The length of the UTF-8 sequence at data, or 0. */
static size_t utf8_sequence(const uint8_t *data, size_t len) {
    uint8_t first = data[0];
    if (first < 0x80) return 1;
    size_t count = first >= 0xf0 ? 4 : first >= 0xe0 ? 3 : 2;
    if (first < 0xc2 || first > 0xf4 || count > len) return 0;
    for (size_t i = 1; i < count; i++) {
        if ((data[i] & 0xc0) != 0x80) return 0;
    }
    if (first == 0xe0 && data[1] < 0xa0) return 0; /* overlong */
    if (first == 0xed && data[1] > 0x9f) return 0; /* surrogates */
    if (first == 0xf0 && data[1] < 0x90) return 0;
    if (first == 0xf4 && data[1] > 0x8f) return 0;
    return count;
}

bool loci__utf8_valid(const uint8_t *data, size_t len) {
    for (size_t at = 0; at < len;) {
        size_t step = utf8_sequence(data + at, len - at);
        if (!step) return false;
        at += step;
    }
    return true;
}

void loci__utf8_sanitise(char *text) {
    size_t len = strlen(text);
    for (size_t at = 0; at < len;) {
        size_t step = utf8_sequence((const uint8_t *)text + at, len - at);
        if (!step || text[at] == '\r' || text[at] == '\n') text[at] = '?';
        at += step ? step : 1;
    }
}

static loci_status check(const ProtobufCMessageDescriptor *descriptor, loci_slice bytes,
                         unsigned depth, loci_error *err) {
    if (depth > DEPTH_MAX) {
        return loci_fail_reason(err, LOCI_E_INVAL, "MALFORMED_MESSAGE", "%s is nested too deeply",
                                descriptor->name);
    }
    loci__wire wire = loci__wire_of(bytes);
    loci__wire_field field;
    while (loci__wire_next(&wire, &field)) {
        if (field.type != 2) continue;
        const ProtobufCFieldDescriptor *known =
            protobuf_c_message_descriptor_get_field(descriptor, field.number);
        if (!known) continue;
        if (known->type == PROTOBUF_C_TYPE_MESSAGE) {
            LOCI_TRY(check(known->descriptor, field.bytes, depth + 1, err));
        } else if (known->type == PROTOBUF_C_TYPE_STRING &&
                   (memchr(field.bytes.data, 0, field.bytes.len) ||
                    !loci__utf8_valid(field.bytes.data, field.bytes.len))) {
            return loci_fail_reason(err, LOCI_E_INVAL, "MALFORMED_TEXT",
                                    "%s.%s is not UTF-8 without NUL bytes", descriptor->name,
                                    known->name);
        }
    }
    if (wire.failed) {
        return loci_fail_reason(err, LOCI_E_INVAL, "MALFORMED_MESSAGE",
                                "the bytes received are no message %s", descriptor->name);
    }
    return LOCI_OK;
}

loci_status loci__message_unpack(const ProtobufCMessageDescriptor *descriptor,
                                 grpc_byte_buffer *buffer, ProtobufCAllocator *allocator,
                                 ProtobufCMessage **out, loci_error *err) {
    *out = NULL;
    if (buffer->data.raw.compression != GRPC_COMPRESS_NONE) {
        grpc_byte_buffer_destroy(buffer);
        return loci_fail_reason(err, LOCI_E_UNSUPPORTED, "COMPRESSED_MESSAGE",
                                "compressed messages are not accepted");
    }
    grpc_byte_buffer_reader reader;
    int ready = grpc_byte_buffer_reader_init(&reader, buffer);
    LOCI_ASSERT(ready);
    grpc_slice joined = buffer->data.raw.slice_buffer.count == 1
                            ? grpc_slice_ref(buffer->data.raw.slice_buffer.slices[0])
                            : grpc_byte_buffer_reader_readall(&reader);
    grpc_byte_buffer_reader_destroy(&reader);
    grpc_byte_buffer_destroy(buffer);

    loci_slice bytes = loci_slice_of(GRPC_SLICE_START_PTR(joined), GRPC_SLICE_LENGTH(joined));
    loci_status status = check(descriptor, bytes, 0, err);
    if (status == LOCI_OK) {
        *out = protobuf_c_message_unpack(descriptor, allocator, bytes.len, bytes.data);
        if (!*out) {
            status = loci_fail_reason(err, LOCI_E_INVAL, "MALFORMED_MESSAGE",
                                      "the bytes received are no message %s", descriptor->name);
        }
    }
    grpc_slice_unref(joined);
    return status;
}

loci_status loci__message_pack(const ProtobufCMessage *message, size_t bytes_max,
                               grpc_byte_buffer **out, loci_error *err) {
    size_t len = protobuf_c_message_get_packed_size(message);
    if (len > bytes_max) {
        return loci_fail_reason(err, LOCI_E_LIMIT, "MESSAGE_TOO_LARGE",
                                "a message %s of %zu bytes is over the limit of %zu",
                                message->descriptor->name, len, bytes_max);
    }
    grpc_slice slice = grpc_slice_malloc(len);
    size_t packed = protobuf_c_message_pack(message, GRPC_SLICE_START_PTR(slice));
    LOCI_ASSERT(packed == len);
    *out = grpc_raw_byte_buffer_create(&slice, 1);
    grpc_slice_unref(slice);
    return LOCI_OK;
}
