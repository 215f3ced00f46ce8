#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Style rules that no compiler checks: licence line, width, lengths of functions and files, banned
calls; that kernels which may overlap the one before wait for it.

Prints one line a finding, as FILE:LINE: text, and fails when there is any. Runs from anywhere.
"""
import os
import re
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SKIPPED_FOLDERS = {"build", "data", "default"}  # data: of tests; default: the model
CODE = (".c", ".h", ".cu", ".cuh")
LICENSED = CODE + (".py", ".sh", ".cmake", ".proto", "CMakeLists.txt", "Dockerfile", ".yaml",
                   "loci-dev")
COLUMNS_MAX = 100
FUNCTION_LINES_MAX = 70
FILE_LINES_MAX = 700
BANNED = re.compile(r"(?<![\w.>])(strcpy|strcat|sprintf|vsprintf|gets|atoi|atol|atof|alloca|rand|"
                    r"strtok)\s*\(")


def files():
    for folder, folders, names in os.walk(ROOT):
        folders[:] = sorted(f for f in folders if f not in SKIPPED_FOLDERS and f[0] != ".")
        for name in sorted(names):
            yield os.path.join(folder, name)


def without_text(line):
    """The line without string literals and comments that end in it."""
    line = re.sub(r'"(\\.|[^"\\])*"', '""', line)
    return re.sub(r"/\*.*?\*/", "", line).split("//")[0]


def long_functions(lines):
    """clang-format puts a function's head at column 0 and its last brace alone there."""
    head = None
    for number, line in enumerate(lines, 1):
        if head is None and re.match(r"[A-Za-z_]", line) and not line.startswith(("typedef",)):
            head = number
        if head is not None and line.rstrip().endswith(";"):
            if line[0] not in " }":
                head = None
        if line.startswith("}"):
            if head is not None and line.strip() == "}" and number - head + 1 > FUNCTION_LINES_MAX:
                yield head, number - head + 1
            head = None


def unwaited_kernels(text):
    """Kernels that launch_behind (attention/cuda/launch.cuh) launches and that do not wait."""
    for name in set(re.findall(r"launch_(?:behind|where)\([^;]*?stream,\s*(k_\w+)", text)):
        body = re.search(r"\s%s\([^;{]*\) \{\n(.*?)^\}" % name, text, re.DOTALL | re.MULTILINE)
        if body and not re.search(r"await_previous(_first)?\(\);", body.group(1)):
            yield text.count("\n", 0, body.start(1)), f"{name} does not call await_previous"


def findings(path):
    with open(path, encoding="utf-8", errors="replace") as file:
        lines = file.read().split("\n")
    if path.endswith(LICENSED) and not any("SPDX-License-Identifier: Apache-2.0" in line
                                           for line in lines[:2]):
        yield 1, "no SPDX-License-Identifier in the first two lines"
    if not path.endswith(CODE):
        return
    if len(lines) - 1 > FILE_LINES_MAX:  # the last one is behind the last newline
        yield FILE_LINES_MAX + 1, f"a file of {len(lines) - 1} lines, at most {FILE_LINES_MAX}"
    comment = False
    for number, line in enumerate(lines, 1):
        if len(line) > COLUMNS_MAX:
            yield number, f"{len(line)} columns, at most {COLUMNS_MAX}"
        code = without_text(line)
        if not comment and (match := BANNED.search(code)) and not code.lstrip().startswith("*"):
            yield number, f"{match.group(1)}() is banned"
        if "/*" in code:
            comment = "*/" not in code
        elif "*/" in code:
            comment = False
    if path.endswith((".c", ".cu")):
        yield from unwaited_kernels("\n".join(lines))
        for number, length in long_functions(lines):
            yield number, f"a function of {length} lines, at most {FUNCTION_LINES_MAX}"


def main():
    count = 0
    for path in files():
        if path.endswith(LICENSED) or path.endswith(CODE):
            for number, text in findings(path):
                print(f"{os.path.relpath(path, ROOT)}:{number}: {text}")
                count += 1
    if count:
        print(f"lint: {count} findings", file=sys.stderr)
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main())
