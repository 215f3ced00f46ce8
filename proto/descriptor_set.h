/* SPDX-License-Identifier: Apache-2.0
 *
 * The descriptors of all public .proto files and what they import, for server reflection.
 */
#ifndef LOCI_PROTO_DESCRIPTOR_SET_H
#define LOCI_PROTO_DESCRIPTOR_SET_H

#include "base/buf.h"

/* A serialised google.protobuf.FileDescriptorSet in static memory. */
loci_slice loci_descriptor_set(void);

#endif
