/* SPDX-License-Identifier: Apache-2.0
 *
 * loci, the command line: finds the command, runs it, reports the one line of a failure.
 */
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/log.h"
#include "services/loci/cli.h"

#define COMMANDS (LOCI_CORPUS_COMMANDS + 7)
static const loci_command *commands[COMMANDS];

static void list_commands(void) {
    size_t n = 0;
    for (size_t i = 0; i < LOCI_CORPUS_COMMANDS; i++) commands[n++] = &loci_corpus_commands[i];
    commands[n++] = &loci_register_command;
    for (size_t i = 0; i < 3; i++) commands[n++] = &loci_document_commands[i];
    commands[n++] = &loci_ask_command;
    commands[n++] = &loci_search_command;
    commands[n++] = &loci_status_command;
}

static void print_help(void) {
    printf("usage: loci COMMAND [arguments]\n\n"
           "Registers documents with a Loci daemon and asks them questions.\n\n");
    for (size_t i = 0; i < COMMANDS; i++) {
        char left[64];
        snprintf(left, sizeof left, "%s %s", commands[i]->name, commands[i]->usage);
        printf("  loci %-34s %s\n", left, commands[i]->summary);
    }
    printf("\nEvery command has --help, --json, --address ADDR (LOCI_ADDRESS) and --data DIR.\n"
           "Exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted.\n");
}

/* Finds the command whose words begin the arguments; *words is how many they are. */
static const loci_command *find_command(int argc, char **argv, int *words) {
    for (size_t i = 0; i < COMMANDS; i++) {
        const char *name = commands[i]->name;
        const char *space = strchr(name, ' ');
        size_t first = space ? (size_t)(space - name) : strlen(name);
        if (argc < 2 || strlen(argv[1]) != first || memcmp(argv[1], name, first) != 0) continue;
        *words = space ? 2 : 1;
        if (!space || (argc > 2 && strcmp(argv[2], space + 1) == 0)) return commands[i];
    }
    return NULL;
}

static int unknown_command(int argc, char **argv) {
    bool group = argc > 1 && (strcmp(argv[1], "corpus") == 0 || strcmp(argv[1], "document") == 0);
    if (!group) {
        fprintf(stderr, "loci: unknown command \"%.80s\"; loci --help lists them\n", argv[1]);
        return 2;
    }
    if (argc > 2 && (strcmp(argv[2], "--help") == 0 || strcmp(argv[2], "-h") == 0)) {
        print_help();
        return 0;
    }
    fprintf(stderr, "loci: \"%s\" needs one of %s; loci --help tells more\n", argv[1],
            argv[1][0] == 'c' ? "create, list, show, set, calibrate, reindex, delete"
                              : "list, show, delete");
    return 2;
}

static void on_signal(int number) {
    loci_interrupted = number;
}

static void catch_signals(void) {
    struct sigaction action = {.sa_handler = on_signal};
    sigemptyset(&action.sa_mask);
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
    sigaction(SIGHUP, &action, NULL);
    signal(SIGPIPE, SIG_IGN); /* a closed pipe is seen when output fails */
}

/* One line, whatever names stand in it. */
static void one_line(char *text) {
    for (; *text; text++) {
        if ((unsigned char)*text < 0x20 || *text == 0x7f) *text = '?';
    }
}

static int report(const loci_cli *cli, loci_status status, loci_error *err) {
    if (loci_interrupted) return 128 + loci_interrupted;
    if (status != LOCI_OK && strcmp(err->reason, "CANNOT_CONNECT") == 0) {
        fprintf(
            stderr,
            "loci: no daemon answers at %s; start one with locid --data DIR, or give --data DIR\n",
            cli->address);
        return 1;
    }
    if (status != LOCI_OK) {
        one_line(err->text);
        fprintf(stderr, "loci: %s\n", err->text[0] ? err->text : loci_status_text(status));
        return cli->usage ? 2 : 1;
    }
    if (fflush(stdout) != 0 || ferror(stdout)) {
        if (errno != EPIPE) fprintf(stderr, "loci: output failed: %s\n", strerror(errno));
        return 1;
    }
    return 0;
}

int main(int argc, char **argv) {
    list_commands();
    if (argc < 2 || strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0 ||
        strcmp(argv[1], "help") == 0) {
        print_help();
        return argc < 2 ? 2 : 0;
    }
    if (strcmp(argv[1], "--version") == 0) {
        printf("loci %s\n", LOCI_VERSION);
        return 0;
    }
    int words = 0;
    const loci_command *command = find_command(argc, argv, &words);
    if (!command) return unknown_command(argc, argv);
    loci_log_configure(LOCI_LOG_ERROR, false); /* one line on failure, and that is ours */
    catch_signals();
    loci_cli cli = {0};
    loci_error err = {LOCI_OK, "", ""};
    loci_status status = command->run(&cli, command, argc - words, argv + words, &err);
    loci_cli_disconnect(&cli);
    return report(&cli, status, &err);
}
