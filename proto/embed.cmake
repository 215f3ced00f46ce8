# SPDX-License-Identifier: Apache-2.0
# cmake -DIN=descriptor.fds -DOUT=descriptor_set.c -P embed.cmake: bytes as a C array.
file(READ ${IN} hex HEX)
string(REGEX REPLACE "([0-9a-f][0-9a-f])" "0x\\1," bytes "${hex}")
string(REGEX REPLACE "(0x..,0x..,0x..,0x..,0x..,0x..,0x..,0x..,0x..,0x..,0x..,0x..,)" "\\1\n    "
    bytes "${bytes}")
file(WRITE ${OUT} "/* Generated from the .proto files. */
#include \"proto/descriptor_set.h\"

static const uint8_t bytes[] = {
    ${bytes}
};

loci_slice loci_descriptor_set(void) {
    return loci_slice_of(bytes, sizeof bytes);
}
")
