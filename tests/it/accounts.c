/* Databases of users and groups for tests, in front of the node's: loaded into an agent with LD_PRELOAD.

   In the directory that DURWARD_TEST_ACCOUNTS names: each call adds a line to `calls`. `users` has lines NAME NUMBER.
   While there is a file `hang`, names that begin with "slow" are not answered. A name "broken..." gives EIO as the call's result, and
   leaves errno as it is. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <pwd.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static char *in_dir(char *path, const char *name)
{
    const char *dir = getenv("DURWARD_TEST_ACCOUNTS");
    snprintf(path, 4096, "%s/%s", dir ? dir : "/nonexistent", name);
    return path;
}

static void called(const char *function, const char *name)
{
    char path[4096], line[1024];
    int length = snprintf(line, sizeof line, "%s %s\n", function, name);
    int fd = open(in_dir(path, "calls"), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    if (fd >= 0) {
        if (write(fd, line, length) != length)
            abort();
        close(fd);
    }
    while (strncmp(name, "slow", 4) == 0 && access(in_dir(path, "hang"), F_OK) == 0)
        usleep(20000);
}

/* The number of a user, or -1. */
static long number(const char *wanted)
{
    char path[4096], name[256];
    long number, found = -1;
    FILE *users = fopen(in_dir(path, "users"), "re");
    if (!users)
        return -1;
    while (found < 0 && fscanf(users, "%255s %ld", name, &number) == 2)
        if (strcmp(name, wanted) == 0)
            found = number;
    fclose(users);
    return found;
}

int getpwnam_r(const char *name, struct passwd *user, char *buffer, size_t size, struct passwd **result)
{
    int (*next)(const char *, struct passwd *, char *, size_t, struct passwd **) = dlsym(RTLD_NEXT, "getpwnam_r");
    called("getpwnam_r", name);
    if (strncmp(name, "broken", 6) == 0) {
        *result = NULL;
        return EIO;
    }
    long uid = number(name);
    if (uid < 0)
        return next(name, user, buffer, size, result);
    *result = NULL;
    if (strlen(name) >= size)
        return errno = ERANGE;
    strcpy(buffer, name);
    char *empty = buffer + strlen(name);
    *user = (struct passwd) { buffer, empty, uid, uid, empty, empty, empty };
    *result = user;
    return 0;
}

int getgrnam_r(const char *name, struct group *group, char *buffer, size_t size, struct group **result)
{
    int (*next)(const char *, struct group *, char *, size_t, struct group **) = dlsym(RTLD_NEXT, "getgrnam_r");
    called("getgrnam_r", name);
    return next(name, group, buffer, size, result);
}

int getpwuid_r(uid_t uid, struct passwd *user, char *buffer, size_t size, struct passwd **result)
{
    int (*next)(uid_t, struct passwd *, char *, size_t, struct passwd **) = dlsym(RTLD_NEXT, "getpwuid_r");
    called("getpwuid_r", "number");
    return next(uid, user, buffer, size, result);
}

int getgrgid_r(gid_t gid, struct group *group, char *buffer, size_t size, struct group **result)
{
    int (*next)(gid_t, struct group *, char *, size_t, struct group **) = dlsym(RTLD_NEXT, "getgrgid_r");
    called("getgrgid_r", "number");
    return next(gid, group, buffer, size, result);
}
