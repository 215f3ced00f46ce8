/* SPDX-License-Identifier: Apache-2.0
 *
 * Server reflection v1 and v1alpha (the same messages under two names) from a serialised
 * FileDescriptorSet. A small walker over the wire format finds names; no descriptor is unpacked.
 *
 * Field numbers are those of google/protobuf/descriptor.proto, where the name of every descriptor
 * is field 1.
 */
#include <string.h>

#include "grpc/reflection/v1/reflection.pb-c.h"
#include "services/rpc/rpc_internal.h"

#define FILE_PACKAGE 2
#define FILE_DEPENDENCY 3
#define NAME 1

typedef Grpc__Reflection__V1__ServerReflectionRequest request_message;
typedef Grpc__Reflection__V1__ServerReflectionResponse response_message;

loci_status loci__reflection_init(loci__reflection *reflection, loci_slice descriptor_set,
                                  loci_error *err) {
    loci__wire wire = loci__wire_of(descriptor_set);
    loci__wire_field field;
    while (loci__wire_next(&wire, &field)) {
        if (field.number != 1 || field.type != 2) continue;
        if (reflection->file_count == LOCI__FILES_MAX) {
            return loci_fail(err, LOCI_E_LIMIT, "the descriptor set has more than %d files",
                             LOCI__FILES_MAX);
        }
        reflection->files[reflection->file_count++] = field.bytes;
    }
    if (wire.failed) return loci_fail(err, LOCI_E_INVAL, "the descriptor set is malformed");
    return LOCI_OK;
}

/* ------------------------------------------------------------------ looking up */

static loci_slice text_field(loci_slice message, uint32_t number) {
    loci__wire wire = loci__wire_of(message);
    loci__wire_field field;
    while (loci__wire_next(&wire, &field)) {
        if (field.number == number && field.type == 2) return field.bytes;
    }
    return loci_slice_of("", 0);
}

typedef enum scope_kind {
    SCOPE_FILE,
    SCOPE_MESSAGE,
    SCOPE_ENUM,
    SCOPE_SERVICE,
    SCOPE_LEAF
} scope_kind;

/* Which fields of a descriptor declare names, and what of. */
static const struct {
    scope_kind in;
    uint32_t field;
    scope_kind kind;
} declarations[] = {
    {SCOPE_FILE, 4, SCOPE_MESSAGE}, {SCOPE_FILE, 5, SCOPE_ENUM},
    {SCOPE_FILE, 6, SCOPE_SERVICE}, {SCOPE_FILE, 7, SCOPE_LEAF}, /* extensions */
    {SCOPE_MESSAGE, 2, SCOPE_LEAF}, {SCOPE_MESSAGE, 3, SCOPE_MESSAGE},
    {SCOPE_MESSAGE, 4, SCOPE_ENUM}, {SCOPE_MESSAGE, 6, SCOPE_LEAF}, /* extensions */
    {SCOPE_MESSAGE, 8, SCOPE_LEAF},                                 /* oneofs */
    {SCOPE_ENUM, 2, SCOPE_LEAF},    {SCOPE_SERVICE, 2, SCOPE_LEAF},
};

static bool declaration_kind(scope_kind in, uint32_t field, scope_kind *kind) {
    for (size_t i = 0; i < sizeof declarations / sizeof declarations[0]; i++) {
        if (declarations[i].in != in || declarations[i].field != field) continue;
        *kind = declarations[i].kind;
        return true;
    }
    return false;
}

/* Whether the scope declares `symbol` ("Message.Nested.field"). Every step down takes a component
 * of the symbol, so the depth is bounded by its length. */
static bool declares(scope_kind scope, loci_slice descriptor, const char *symbol) {
    loci__wire wire = loci__wire_of(descriptor);
    loci__wire_field field;
    while (loci__wire_next(&wire, &field)) {
        scope_kind kind;
        if (field.type != 2 || !declaration_kind(scope, field.number, &kind)) continue;
        /* The values of an enum are names of the scope around it. */
        if (kind == SCOPE_ENUM && declares(SCOPE_ENUM, field.bytes, symbol)) return true;
        loci_slice name = text_field(field.bytes, NAME);
        if (name.len == 0 || strncmp(symbol, (const char *)name.data, name.len) != 0) continue;
        if (symbol[name.len] == 0) return true;
        if (symbol[name.len] == '.' && kind != SCOPE_LEAF &&
            declares(kind, field.bytes, symbol + name.len + 1)) {
            return true;
        }
    }
    return false;
}

static bool file_declares(loci_slice file, const char *symbol) {
    loci_slice package = text_field(file, FILE_PACKAGE);
    if (package.len) {
        if (strncmp(symbol, (const char *)package.data, package.len) != 0) return false;
        if (symbol[package.len] != '.') return false;
        symbol += package.len + 1;
    }
    return declares(SCOPE_FILE, file, symbol);
}

static int file_by_name(const loci__reflection *reflection, loci_slice name) {
    for (size_t i = 0; i < reflection->file_count; i++) {
        if (loci_slice_equal(text_field(reflection->files[i], NAME), name)) return (int)i;
    }
    return -1;
}

static int file_by_symbol(const loci__reflection *reflection, const char *symbol) {
    if (*symbol == '.') symbol++;
    for (size_t i = 0; i < reflection->file_count; i++) {
        if (file_declares(reflection->files[i], symbol)) return (int)i;
    }
    return -1;
}

/* The file, then all that it imports, each once. */
static size_t with_imports(const loci__reflection *reflection, int file,
                           ProtobufCBinaryData out[static LOCI__FILES_MAX]) {
    int order[LOCI__FILES_MAX] = {file};
    bool seen[LOCI__FILES_MAX] = {false};
    size_t count = 1;
    seen[file] = true;
    for (size_t i = 0; i < count; i++) {
        loci_slice bytes = reflection->files[order[i]];
        out[i] = (ProtobufCBinaryData){bytes.len, (uint8_t *)(uintptr_t)bytes.data};
        loci__wire wire = loci__wire_of(bytes);
        loci__wire_field field;
        while (loci__wire_next(&wire, &field)) {
            if (field.number != FILE_DEPENDENCY || field.type != 2) continue;
            int import = file_by_name(reflection, field.bytes);
            if (import < 0 || seen[import]) continue;
            seen[import] = true;
            order[count++] = import;
        }
    }
    return count;
}

/* ------------------------------------------------------------------ answering */

static loci_status send_error(loci_rpc_call *call, response_message *response, loci_status code,
                              const char *text, loci_error *err) {
    Grpc__Reflection__V1__ErrorResponse error = GRPC__REFLECTION__V1__ERROR_RESPONSE__INIT;
    error.error_code = loci_status_to_grpc(code);
    error.error_message = (char *)(uintptr_t)text;
    response->message_response_case =
        GRPC__REFLECTION__V1__SERVER_REFLECTION_RESPONSE__MESSAGE_RESPONSE_ERROR_RESPONSE;
    response->error_response = &error;
    return loci_rpc_send(call, &response->base, err);
}

static loci_status send_file(loci_rpc_call *call, const loci__reflection *reflection, int file,
                             response_message *response, loci_error *err) {
    if (file < 0) {
        return send_error(call, response, LOCI_E_NOTFOUND, "no such file or symbol", err);
    }
    ProtobufCBinaryData files[LOCI__FILES_MAX];
    Grpc__Reflection__V1__FileDescriptorResponse found =
        GRPC__REFLECTION__V1__FILE_DESCRIPTOR_RESPONSE__INIT;
    found.n_file_descriptor_proto = with_imports(reflection, file, files);
    found.file_descriptor_proto = files;
    response->message_response_case =
        GRPC__REFLECTION__V1__SERVER_REFLECTION_RESPONSE__MESSAGE_RESPONSE_FILE_DESCRIPTOR_RESPONSE;
    response->file_descriptor_response = &found;
    return loci_rpc_send(call, &response->base, err);
}

static loci_status send_services(loci_rpc_call *call, const loci__reflection *reflection,
                                 response_message *response, loci_error *err) {
    Grpc__Reflection__V1__ServiceResponse services[LOCI__SERVICES_MAX];
    Grpc__Reflection__V1__ServiceResponse *list[LOCI__SERVICES_MAX];
    Grpc__Reflection__V1__ListServiceResponse found =
        GRPC__REFLECTION__V1__LIST_SERVICE_RESPONSE__INIT;
    for (size_t i = 0; i < *reflection->service_count; i++) {
        grpc__reflection__v1__service_response__init(&services[i]);
        services[i].name = (char *)(uintptr_t)reflection->services[i].name;
        list[i] = &services[i];
    }
    found.n_service = *reflection->service_count;
    found.service = list;
    response->message_response_case =
        GRPC__REFLECTION__V1__SERVER_REFLECTION_RESPONSE__MESSAGE_RESPONSE_LIST_SERVICES_RESPONSE;
    response->list_services_response = &found;
    return loci_rpc_send(call, &response->base, err);
}

#define ASKED(what) GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_##what

static loci_status answer(loci_rpc_call *call, const loci__reflection *reflection,
                          request_message *request, loci_error *err) {
    response_message response = GRPC__REFLECTION__V1__SERVER_REFLECTION_RESPONSE__INIT;
    response.valid_host = request->host;
    response.original_request = request;
    switch (request->message_request_case) {
    case ASKED(FILE_BY_FILENAME):
        return send_file(call, reflection,
                         file_by_name(reflection, loci_slice_text(request->file_by_filename)),
                         &response, err);
    case ASKED(FILE_CONTAINING_SYMBOL):
        return send_file(call, reflection,
                         file_by_symbol(reflection, request->file_containing_symbol), &response,
                         err);
    case ASKED(LIST_SERVICES): return send_services(call, reflection, &response, err);
    case ASKED(FILE_CONTAINING_EXTENSION):
    case ASKED(ALL_EXTENSION_NUMBERS_OF_TYPE):
        return send_error(call, &response, LOCI_E_NOTFOUND, "no message here has extensions", err);
    default:
        return send_error(call, &response, LOCI_E_INVAL, "the request asks nothing known", err);
    }
}

static loci_status reflect(loci_rpc_call *call, void *service_ctx, loci_error *err) {
    const loci__reflection *reflection = service_ctx;
    for (;;) {
        ProtobufCMessage *message;
        LOCI_TRY(loci_rpc_recv(call, &message, err));
        if (!message) return LOCI_OK;
        LOCI_TRY(answer(call, reflection, (request_message *)message, err));
    }
}

const loci_rpc_method loci__reflection_methods[2] = {
    {"/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", LOCI_RPC_BIDI,
     &grpc__reflection__v1__server_reflection_request__descriptor,
     &grpc__reflection__v1__server_reflection_response__descriptor, reflect, LOCI_RPC_LONG},
    {"/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", LOCI_RPC_BIDI,
     &grpc__reflection__v1__server_reflection_request__descriptor,
     &grpc__reflection__v1__server_reflection_response__descriptor, reflect, LOCI_RPC_LONG},
};
