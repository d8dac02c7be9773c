/*
 * List the messages of a queue and where its subscribers stand, with LMDB alone.
 *
 * Written from docs/format.rst, not from the library: format 2, engine 0.9 of LMDB.
 *
 *     c++ -std=c++17 -Wall -Wextra -o list_queue_cpp list_queue.cpp -llmdb &&
 *         ./list_queue_cpp QUEUE_DIRECTORY
 *
 * It only reads, and says the same as list_queue.c. Exit codes: 0 done, 1 not a queue of this
 * format or damaged, 2 wrong usage.
 */
#include <fcntl.h>
#include <lmdb.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <exception>
#include <fstream>
#include <iostream>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace {

class Failure : public std::runtime_error {
public:
    Failure(const std::string &what, const std::string &why)
        : std::runtime_error(what + ": " + why) {}
};

void check(int code, const std::string &what) {
    if (code != 0) throw Failure(what, mdb_strerror(code));
}

/* Integers in values are little-endian, numbers in keys big-endian; neither has to be aligned. */
std::uint64_t big(std::string_view bytes) {
    std::uint64_t value = 0;
    for (unsigned char byte : bytes) value = value << 8 | byte;
    return value;
}

std::uint64_t little(std::string_view bytes, std::size_t offset, std::size_t count) {
    std::uint64_t value = 0;
    while (count-- > 0) value = value << 8 | static_cast<unsigned char>(bytes.at(offset + count));
    return value;
}

/* CRC-32 as in zlib, PNG and Ethernet; start with 0. */
std::uint32_t crc32(std::uint32_t crc, std::string_view bytes) {
    crc = ~crc;
    for (unsigned char byte : bytes) {
        crc ^= byte;
        for (int bit = 0; bit < 8; bit++) crc = crc >> 1 ^ (crc & 1 ? 0xEDB88320u : 0);
    }
    return ~crc;
}

/* A shared lock on users.lock as long as the store is open: nobody compacts or restores it. */
class UsersLock {
public:
    explicit UsersLock(const std::string &path)
        : descriptor_(open(path.c_str(), O_RDWR | O_CLOEXEC)) {
        if (descriptor_ >= 0 && flock(descriptor_, LOCK_SH) == 0) return;
        if (descriptor_ >= 0) close(descriptor_);
        throw Failure(path, "not a queue, or no rights");
    }
    UsersLock(const UsersLock &) = delete;
    UsersLock &operator=(const UsersLock &) = delete;
    ~UsersLock() { close(descriptor_); }

private:
    int descriptor_;
};

/* LMDB writes its own pages in the byte order of the machine. */
std::uint64_t own(std::string_view bytes, std::size_t offset, std::size_t count) {
    const std::uint16_t one = 1;
    const bool is_little = *reinterpret_cast<const unsigned char *>(&one) == 1;
    return is_little ? little(bytes, offset, count) : big(bytes.substr(offset, count));
}

struct Meta {
    std::uint64_t page_size, last_page, transaction;
};

Meta read_meta(std::ifstream &file, const std::string &path, std::uint64_t offset) {
    std::string page(152, '\0');
    if (!file.seekg(static_cast<std::streamoff>(offset)) ||
        !file.read(page.data(), static_cast<std::streamsize>(page.size())))
        throw Failure(path, "truncated");
    if (own(page, 16, 4) != 0xBEEFC0DEu || own(page, 20, 4) != 1)
        throw Failure(path, "not a store of LMDB 0.9, or damaged");
    return {own(page, 40, 4), own(page, 136, 8), own(page, 144, 8)};
}

/* LMDB maps a truncated file and dies of SIGBUS: compare its size with the newer meta page. */
void check_size(const std::string &path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) throw Failure(path, "not a queue, or no rights");
    Meta first = read_meta(file, path, 0), second = read_meta(file, path, first.page_size);
    Meta newer = second.transaction >= first.transaction ? second : first;
    /* The size last: the file may grow meanwhile. */
    struct stat found;
    if (stat(path.c_str(), &found) != 0 || first.page_size == 0 ||
        static_cast<std::uint64_t>(found.st_size) / first.page_size <= newer.last_page)
        throw Failure(path, "truncated");
}

/* After the machine went down, the store is not to be trusted: the journal holds what is safe. */
void check_mark(const std::string &path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) return;
    std::string mark(16, '\0'), boot, text;
    file.read(mark.data(), static_cast<std::streamsize>(mark.size()));
    std::ifstream("/proc/sys/kernel/random/boot_id") >> text;
    for (std::size_t i = 0; i + 1 < text.size(); i += 2) {
        if (text[i] == '-') i++;
        boot += static_cast<char>(std::stoi(text.substr(i, 2), nullptr, 16));
    }
    if (!file || boot != mark)
        throw Failure(path, "of another boot: let the library open the queue first");
}

struct Closing {
    void operator()(MDB_env *environment) const { mdb_env_close(environment); }
    void operator()(MDB_txn *txn) const { mdb_txn_abort(txn); }
    void operator()(MDB_cursor *cursor) const { mdb_cursor_close(cursor); }
};
using Environment = std::unique_ptr<MDB_env, Closing>;
using Transaction = std::unique_ptr<MDB_txn, Closing>;

Environment open_environment(const std::string &directory) {
    MDB_env *opened = nullptr;
    check(mdb_env_create(&opened), "environment");
    Environment environment(opened);
    check(mdb_env_set_maxdbs(opened, 16), "environment");
    check(mdb_env_open(opened, directory.c_str(), MDB_RDONLY, 0600), directory);
    return environment;
}

Transaction begin_reading(const Environment &environment) {
    MDB_txn *begun = nullptr;
    check(mdb_txn_begin(environment.get(), nullptr, MDB_RDONLY, &begun), "transaction");
    return Transaction(begun);
}

/* The bytes are LMDB's, and there until the transaction ends. */
std::string_view view(const MDB_val &bytes) {
    return {static_cast<const char *>(bytes.mv_data), bytes.mv_size};
}

struct Record {
    std::string_view key, value;
};

class Cursor {
public:
    Cursor(const Transaction &txn, std::string name) : name_(std::move(name)) {
        MDB_dbi database;
        MDB_cursor *opened = nullptr;
        check(mdb_dbi_open(txn.get(), name_.c_str(), 0, &database), name_);
        check(mdb_cursor_open(txn.get(), database, &opened), name_);
        cursor_.reset(opened);
    }

    std::string_view find(const std::string &name) {
        MDB_val key{name.size(), const_cast<char *>(name.data())}, value;
        check(mdb_cursor_get(cursor_.get(), &key, &value, MDB_SET), name);
        return view(value);
    }

    /* Only the end is an end; anything else that stops the list is an error. */
    std::optional<Record> next() {
        MDB_val key, value;
        int code = mdb_cursor_get(cursor_.get(), &key, &value, MDB_NEXT);
        if (code == MDB_NOTFOUND) return std::nullopt;
        check(code, name_);
        return Record{view(key), view(value)};
    }

private:
    std::string name_;
    std::unique_ptr<MDB_cursor, Closing> cursor_;
};

void list_header(const Transaction &txn) {
    std::string_view header = Cursor(txn, "meta_db").find("header");
    if (header.size() < 16 || header.substr(0, 8) != "persipub")
        throw Failure("header", "not a queue");
    if (little(header, 8, 4) != 2)
        throw Failure("header", "a format that this program does not know");
    std::cout << "format 2\n";
}

void list_subscribers(const Transaction &txn) {
    Cursor cursor(txn, "pending_db");
    while (std::optional<Record> record = cursor.next()) {
        if (record->value.size() < 24) throw Failure("subscriber", "damaged");
        std::cout << "subscriber " << record->key << ": position " << little(record->value, 8, 8)
                  << ", acknowledged " << little(record->value, 16, 8) << '\n';
    }
}

struct Entry {
    std::size_t end;  // from the begin of the block's first message
    std::uint32_t crc;
};

void list_block(std::uint64_t number, std::string_view block) {
    if (block.size() < 40) throw Failure("block", "damaged");
    std::size_t messages = little(block, 24, 4), totals = 8 * little(block, 30, 2);
    std::size_t table = 40 + totals, begin = table + 8 * messages;
    if (block.size() < begin) throw Failure("block", "damaged");
    if (crc32(crc32(0, block.substr(0, 36)), block.substr(40, totals)) != little(block, 36, 4))
        throw Failure("block", "its checksum is wrong");

    std::vector<Entry> entries;
    entries.reserve(messages);
    for (std::size_t offset = table; offset < begin; offset += 8)
        entries.push_back({little(block, offset, 4),
                           static_cast<std::uint32_t>(little(block, offset + 4, 4))});

    std::string_view bytes = block.substr(begin);
    std::size_t start = 0;
    for (const Entry &entry : entries) {
        if (entry.end < start || entry.end > bytes.size()) throw Failure("message", "damaged");
        std::string_view message = bytes.substr(start, entry.end - start);
        std::cout << "message " << number++ << " for audience " << little(block, 28, 2) << ", "
                  << message.size() << " bytes, "
                  << (crc32(0, message) == entry.crc ? "sound" : "DAMAGED") << ": " << message
                  << '\n';
        start = entry.end;
    }
}

void list_messages(const Transaction &txn) {
    Cursor cursor(txn, "data_db");
    while (std::optional<Record> record = cursor.next()) {
        if (record->key.size() != 8) throw Failure("block", "its key has another length");
        list_block(big(record->key), record->value);
    }
}

/* Each of the three outlives the one behind it, also if that one fails. */
void list_queue(const std::string &directory) {
    UsersLock users(directory + "/users.lock");
    check_mark(directory + "/running");
    check_size(directory + "/data.mdb");
    Environment environment = open_environment(directory);
    Transaction txn = begin_reading(environment);
    list_header(txn);
    list_subscribers(txn);
    list_messages(txn);
}

}  // namespace

int main(int argc, char **argv) {
    if (argc != 2) {
        std::cerr << "usage: list_queue QUEUE_DIRECTORY\n";
        return 2;
    }
    try {
        list_queue(argv[1]);
    } catch (const std::exception &error) {
        std::cerr << "list_queue: " << error.what() << '\n';
        return 1;
    }
    return 0;
}
