# SPDX-License-Identifier: Apache-2.0
# cmake -DIN=x.proto -DOUT=y.proto -P strip_services.cmake: the messages of a .proto file.
# protobuf-c would make stubs for services, which we do not use (services/rpc has tables), and which
# do not compile where a method is called Register. A service holds no braces but its own.
file(READ ${IN} text)
string(REGEX REPLACE "\nservice [A-Za-z0-9_]+ {[^}]*}" "" text "${text}")
file(WRITE ${OUT} "${text}")
