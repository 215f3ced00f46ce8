# SPDX-License-Identifier: Apache-2.0
# Warnings are errors in our own code; headers of others are system headers.
add_library(loci_flags INTERFACE)
set(loci_c_flags -Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wstrict-prototypes
    -Wmissing-prototypes -Wvla -Werror -fno-math-errno)
target_compile_options(loci_flags INTERFACE
    "$<$<COMPILE_LANGUAGE:C>:${loci_c_flags}>"
    "$<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall,-Wextra,-Wshadow,-Werror;-Werror=all-warnings>")
target_compile_definitions(loci_flags INTERFACE _GNU_SOURCE)
target_include_directories(loci_flags INTERFACE ${PROJECT_SOURCE_DIR})
target_link_libraries(loci_flags INTERFACE Threads::Threads m)
if(LOCI_SANITIZE)
    target_compile_options(loci_flags INTERFACE "$<$<COMPILE_LANGUAGE:C>:-fsanitize=${LOCI_SANITIZE};-fno-omit-frame-pointer;-fno-sanitize-recover=all>")
    target_link_options(loci_flags INTERFACE -fsanitize=${LOCI_SANITIZE})
endif()
# The default of cmake's Release is -O3 -DNDEBUG; LOCI_ASSERT does not depend on NDEBUG.
