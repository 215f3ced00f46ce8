/* SPDX-License-Identifier: Apache-2.0
 *
 * A daemon for one call; see embedded.h.
 */
#include "services/loci/embedded.h"

#include <errno.h>
#include <fcntl.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/clock.h"

#define START_MS 120000u /* loading a model and repairing a store may take this long */
#define STOP_MS 20000u   /* more than the daemon's own drain time */
#define STEP_MS 20u

extern char **environ;

static void path_in(const loci_embedded *embedded, const char *name, char out[100]) {
    snprintf(out, 100, "%s/%s", embedded->dir, name);
}

/* The last line that the daemon wrote, without time and level. */
static void last_words(const loci_embedded *embedded, char out[300]) {
    char path[100], line[1200];
    path_in(embedded, "log", path);
    out[0] = '\0';
    FILE *file = fopen(path, "r");
    if (!file) return;
    while (fgets(line, sizeof line, file)) {
        line[strcspn(line, "\n")] = '\0';
        const char *text = strstr(line, " error ");
        text = text ? text + strlen(" error ") : line;
        if (strncmp(text, "locid: ", 7) == 0) text += 7;
        if (text[0] != '\0') snprintf(out, 300, "%.299s", text);
    }
    fclose(file);
}

static loci_status find_daemon(char out[600], loci_error *err) {
    char self[512];
    ssize_t len = readlink("/proc/self/exe", self, sizeof self - 1);
    self[len > 0 ? len : 0] = '\0';
    char *slash = strrchr(self, '/');
    if (slash) {
        *slash = '\0';
        snprintf(out, 600, "%s/locid", self);
        if (access(out, X_OK) == 0) return LOCI_OK;
    }
    return loci_fail(err, LOCI_E_NOTFOUND, "--data needs the program locid beside loci (%s)",
                     slash ? out : "unknown place");
}

static loci_status make_directory(loci_embedded *embedded, loci_error *err) {
    const char *base = getenv("TMPDIR");
    if (!base || base[0] == '\0' || strlen(base) > 40) base = "/tmp";
    snprintf(embedded->dir, sizeof embedded->dir, "%s/loci-XXXXXX", base);
    if (!mkdtemp(embedded->dir)) {
        embedded->dir[0] = '\0';
        return loci_fail(err, LOCI_E_IO, "no temporary directory in %s: %s", base, strerror(errno));
    }
    snprintf(embedded->address, sizeof embedded->address, "unix:%s/socket", embedded->dir);
    return LOCI_OK;
}

static loci_status spawn(loci_embedded *embedded, const char *data, loci_error *err) {
    char program[600], log_path[100], parent[24];
    LOCI_TRY(find_daemon(program, err));
    LOCI_TRY(make_directory(embedded, err));
    path_in(embedded, "log", log_path);
    snprintf(parent, sizeof parent, "%ld", (long)getpid());
    char *argv[] = {program,
                    (char *)"--data",
                    (char *)(uintptr_t)data,
                    (char *)"--listen",
                    embedded->address,
                    (char *)"--parent",
                    parent,
                    NULL};
    unsetenv("LOCI_LOG_JSON"); /* its last words are read as text */
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_addopen(&actions, 0, "/dev/null", O_RDONLY, 0);
    posix_spawn_file_actions_addopen(&actions, 1, log_path, O_WRONLY | O_CREAT | O_APPEND, 0600);
    posix_spawn_file_actions_adddup2(&actions, 1, 2);
    posix_spawnattr_t attributes;
    posix_spawnattr_init(&attributes);
    sigset_t none;
    sigemptyset(&none);
    posix_spawnattr_setsigmask(&attributes, &none);
    posix_spawnattr_setpgroup(&attributes, 0);
    posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETPGROUP | POSIX_SPAWN_SETSIGMASK);
    int failed = posix_spawn(&embedded->pid, program, &actions, &attributes, argv, environ);
    posix_spawnattr_destroy(&attributes);
    posix_spawn_file_actions_destroy(&actions);
    if (failed == 0) return LOCI_OK;
    embedded->pid = 0;
    return loci_fail(err, LOCI_E_IO, "%s did not start: %s", program, strerror(failed));
}

static bool accepts(const loci_embedded *embedded) {
    struct sockaddr_un to = {.sun_family = AF_UNIX};
    snprintf(to.sun_path, sizeof to.sun_path, "%s", embedded->address + strlen("unix:"));
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0) return false;
    bool connected = connect(fd, (struct sockaddr *)&to, sizeof to) == 0;
    close(fd);
    return connected;
}

static loci_status wait_until_up(loci_embedded *embedded, const atomic_int *interrupt,
                                 loci_error *err) {
    uint64_t until = loci_now_ns() + START_MS * 1000000ull;
    while (!accepts(embedded)) {
        int how = 0;
        if (waitpid(embedded->pid, &how, WNOHANG) == embedded->pid) {
            char words[300];
            last_words(embedded, words);
            embedded->pid = 0;
            if (words[0] == '\0') snprintf(words, sizeof words, "locid ended with status %d", how);
            return loci_fail(err, LOCI_E_UNAVAILABLE, "%s", words);
        }
        if (*interrupt) return loci_fail(err, LOCI_E_CANCELLED, "interrupted");
        if (loci_now_ns() >= until)
            return loci_fail(err, LOCI_E_TIMEOUT, "locid was not ready within %u s",
                             START_MS / 1000);
        loci_sleep_ms(STEP_MS);
    }
    return LOCI_OK;
}

loci_status loci_embedded_start(loci_embedded *embedded, const char *data,
                                const atomic_int *interrupt, loci_error *err) {
    LOCI_TRY(spawn(embedded, data, err));
    return wait_until_up(embedded, interrupt, err);
}

static bool ended_within(pid_t pid, unsigned ms) {
    uint64_t until = loci_now_ns() + ms * 1000000ull;
    while (waitpid(pid, NULL, WNOHANG) == 0) {
        if (loci_now_ns() >= until) return false;
        loci_sleep_ms(STEP_MS);
    }
    return true;
}

void loci_embedded_stop(loci_embedded *embedded) {
    if (embedded->pid > 0) {
        kill(embedded->pid, SIGTERM);
        if (!ended_within(embedded->pid, STOP_MS)) {
            kill(embedded->pid, SIGKILL);
            waitpid(embedded->pid, NULL, 0);
        }
        embedded->pid = 0;
    }
    if (embedded->dir[0] == '\0') return;
    static const char *const names[] = {"socket", "log"};
    for (size_t i = 0; i < 2; i++) {
        char path[100];
        path_in(embedded, names[i], path);
        unlink(path);
    }
    rmdir(embedded->dir);
    embedded->dir[0] = '\0';
}
