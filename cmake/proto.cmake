# SPDX-License-Identifier: Apache-2.0
# loci_add_protos(target FILES...): generates protobuf-c code for .proto files (paths relative to
# proto/) into the build tree and makes a library of it.
function(loci_add_protos target)
    set(out ${PROJECT_BINARY_DIR}/proto)
    set(sources)
    foreach(file ${ARGN})
        string(REGEX REPLACE "\\.proto$" "" stem ${file})
        add_custom_command(
            OUTPUT ${out}/${stem}.pb-c.c ${out}/${stem}.pb-c.h
            COMMAND ${CMAKE_COMMAND} -DIN=${PROJECT_SOURCE_DIR}/proto/${file}
                -DOUT=${out}/messages/${file} -P ${PROJECT_SOURCE_DIR}/cmake/strip_services.cmake
            COMMAND ${PROTOC_C} --c_out=${out} -I ${out}/messages ${file}
            DEPENDS ${PROJECT_SOURCE_DIR}/proto/${file}
                ${PROJECT_SOURCE_DIR}/cmake/strip_services.cmake
            VERBATIM)
        list(APPEND sources ${out}/${stem}.pb-c.c)
    endforeach()
    add_library(${target} STATIC ${sources})
    target_include_directories(${target} SYSTEM PUBLIC ${out})
    target_link_libraries(${target} PUBLIC loci::protobuf_c)
endfunction()
