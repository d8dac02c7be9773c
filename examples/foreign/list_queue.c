/*
 * List the messages of a queue and where its subscribers stand, with LMDB alone.
 *
 * Written from docs/format.rst, not from the library: format 2, engine 0.9 of LMDB.
 *
 *     cc -Wall -Wextra -o list_queue list_queue.c -llmdb && ./list_queue QUEUE_DIRECTORY
 *
 * It only reads. Exit codes: 0 done, 1 not a queue of this format or damaged, 2 wrong usage.
 */
#include <fcntl.h>
#include <inttypes.h>
#include <lmdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

static void fail(const char *what, const char *why) {
    fprintf(stderr, "list_queue: %s: %s\n", what, why);
    exit(1);
}

static void check(int code, const char *what) {
    if (code != 0) fail(what, mdb_strerror(code));
}

/* Integers in values are little-endian, numbers in keys big-endian; neither has to be aligned. */
static uint64_t little(const unsigned char *bytes, int count) {
    uint64_t value = 0;
    while (count-- > 0) value = value << 8 | bytes[count];
    return value;
}

static uint64_t big(const unsigned char *bytes, int count) {
    uint64_t value = 0;
    for (int i = 0; i < count; i++) value = value << 8 | bytes[i];
    return value;
}

/* CRC-32 as in zlib, PNG and Ethernet; start with 0. */
static uint32_t crc32(uint32_t crc, const unsigned char *bytes, size_t count) {
    crc = ~crc;
    for (size_t i = 0; i < count; i++) {
        crc ^= bytes[i];
        for (int bit = 0; bit < 8; bit++) crc = crc >> 1 ^ (crc & 1 ? 0xEDB88320u : 0);
    }
    return ~crc;
}

/* LMDB writes its own pages in the byte order of the machine. */
static uint64_t own(const unsigned char *bytes, int count) {
    uint16_t one = 1;
    return *(unsigned char *)&one == 1 ? little(bytes, count) : big(bytes, count);
}

/* LMDB maps a truncated file and dies of SIGBUS: compare its size with the newer meta page. */
static void check_size(const char *directory) {
    char path[4096];
    snprintf(path, sizeof path, "%s/data.mdb", directory);
    int descriptor = open(path, O_RDONLY | O_CLOEXEC);
    if (descriptor < 0) fail(path, "not a queue, or no rights");
    uint64_t page_size = 0, last_page = 0, newest = 0;
    for (int i = 0; i < 2; i++) {
        unsigned char meta[152];
        if (pread(descriptor, meta, sizeof meta, (off_t)(i * page_size)) != sizeof meta)
            fail(path, "truncated");
        if (own(meta + 16, 4) != 0xBEEFC0DEu || own(meta + 20, 4) != 1)
            fail(path, "not a store of LMDB 0.9, or damaged");
        if (i == 0) page_size = own(meta + 40, 4);
        if (own(meta + 144, 8) < newest) continue;
        newest = own(meta + 144, 8);
        last_page = own(meta + 136, 8);
    }
    /* The size last: the file may grow meanwhile. */
    struct stat found;
    if (fstat(descriptor, &found) != 0 || page_size == 0 ||
        (uint64_t)found.st_size / page_size <= last_page)
        fail(path, "truncated");
    close(descriptor);
}

/* After the machine went down, the store is not to be trusted: the journal holds what is safe. */
static void check_mark(const char *directory) {
    char path[4096];
    snprintf(path, sizeof path, "%s/running", directory);
    FILE *file = fopen(path, "rb");
    if (file == NULL) return;
    unsigned char mark[16];
    size_t count = fread(mark, 1, sizeof mark, file);
    fclose(file);
    char text[37] = "";
    file = fopen("/proc/sys/kernel/random/boot_id", "r");
    if (file == NULL || fread(text, 1, 36, file) != 36) fail("boot_id", "no such file");
    fclose(file);
    const char *digits = text;
    for (size_t i = 0; i < sizeof mark; i++) {
        unsigned int byte = 256;
        if (*digits == '-') digits++;
        if (count != sizeof mark || sscanf(digits, "%2x", &byte) != 1 || byte != mark[i])
            fail(path, "of another boot: let the library open the queue first");
        digits += 2;
    }
}

static MDB_cursor *open_cursor(MDB_txn *txn, const char *name) {
    MDB_dbi database;
    MDB_cursor *cursor;
    check(mdb_dbi_open(txn, name, 0, &database), name);
    check(mdb_cursor_open(txn, database, &cursor), name);
    return cursor;
}

/* Only the end is an end; anything else that stops the list is an error. */
static int next(MDB_cursor *cursor, MDB_val *key, MDB_val *value, const char *name) {
    int code = mdb_cursor_get(cursor, key, value, MDB_NEXT);
    if (code != MDB_NOTFOUND) check(code, name);
    return code == 0;
}

static void list_header(MDB_txn *txn) {
    MDB_cursor *cursor = open_cursor(txn, "meta_db");
    MDB_val key = {6, "header"}, value;
    check(mdb_cursor_get(cursor, &key, &value, MDB_SET), "header");
    const unsigned char *header = value.mv_data;
    if (value.mv_size < 16 || memcmp(header, "persipub", 8) != 0) fail("header", "not a queue");
    if (little(header + 8, 4) != 2) fail("header", "a format that this program does not know");
    printf("format 2\n");
}

static void list_subscribers(MDB_txn *txn) {
    MDB_cursor *cursor = open_cursor(txn, "pending_db");
    MDB_val key, value;
    while (next(cursor, &key, &value, "pending_db")) {
        const unsigned char *record = value.mv_data;
        if (value.mv_size < 24) fail("subscriber", "damaged");
        printf("subscriber %.*s: position %" PRIu64 ", acknowledged %" PRIu64 "\n",
               (int)key.mv_size, (char *)key.mv_data, little(record + 8, 8),
               little(record + 16, 8));
    }
}

static void list_block(uint64_t number, const unsigned char *block, size_t size) {
    if (size < 40) fail("block", "damaged");
    uint64_t messages = little(block + 24, 4), audience = little(block + 28, 2);
    size_t totals = 8 * little(block + 30, 2), table = 40 + totals, begin = table + 8 * messages;
    if (size < begin) fail("block", "damaged");
    uint32_t crc = crc32(crc32(0, block, 36), block + 40, totals);
    if (crc != little(block + 36, 4)) fail("block", "its checksum is wrong");
    size_t start = 0;
    for (uint64_t i = 0; i < messages; i++) {
        size_t end = little(block + table + 8 * i, 4);
        if (end < start || begin + end > size) fail("message", "damaged");
        const unsigned char *bytes = block + begin + start;
        int is_sound = crc32(0, bytes, end - start) == little(block + table + 8 * i + 4, 4);
        printf("message %" PRIu64 " for audience %" PRIu64 ", %zu bytes, %s: ", number + i,
               audience, end - start, is_sound ? "sound" : "DAMAGED");
        fwrite(bytes, 1, end - start, stdout); /* not %.*s, which stops at a zero byte */
        putchar('\n');
        start = end;
    }
}

static void list_messages(MDB_txn *txn) {
    MDB_cursor *cursor = open_cursor(txn, "data_db");
    MDB_val key, value;
    while (next(cursor, &key, &value, "data_db")) {
        if (key.mv_size != 8) fail("block", "its key has another length");
        list_block(big(key.mv_data, 8), value.mv_data, value.mv_size);
    }
}

int main(int argc, char **argv) {
    if (argc != 2) {
        fprintf(stderr, "usage: list_queue QUEUE_DIRECTORY\n");
        return 2;
    }
    /* A shared lock on users.lock as long as the store is open: nobody compacts or restores it. */
    char users[4096];
    snprintf(users, sizeof users, "%s/users.lock", argv[1]);
    int descriptor = open(users, O_RDWR | O_CLOEXEC);
    if (descriptor < 0 || flock(descriptor, LOCK_SH) != 0) fail(users, "not a queue, or no rights");

    check_mark(argv[1]);
    check_size(argv[1]);

    MDB_env *environment;
    MDB_txn *txn;
    check(mdb_env_create(&environment), "environment");
    check(mdb_env_set_maxdbs(environment, 16), "environment");
    check(mdb_env_open(environment, argv[1], MDB_RDONLY, 0600), argv[1]);
    check(mdb_txn_begin(environment, NULL, MDB_RDONLY, &txn), "transaction");
    list_header(txn);
    list_subscribers(txn);
    list_messages(txn);
    mdb_txn_abort(txn);
    mdb_env_close(environment);
    return 0;
}
