/*
 * rig: fake SGLang engines and a load generator, to measure the router between them.
 *
 *   rig fakes [--solo]           both engines of a pair; prints {"prefill": PORT, "decode": PORT}, serves until it is ended
 *   rig load --port PORT ...     a closed loop of clients; prints what it measured as one JSON object
 *   rig run --core N COMMAND...  runs COMMAND on one core and lets it die with its parent
 *
 * A router that is fast and wrong is worth nothing, so both ends keep book on the truth:
 *
 *     load                           router                       prefill      decode
 *       | text SEQ … DIGEST filler ---> | the body, and a room ----> |            |
 *       |                               | the body, and a room -----------------> |
 *       | <--- SEQ, 0, 1, 2 … n --------| <-------------------------------------- |
 *
 * - The prompt carries its own size and digest, and what the client wants: how many events, how far apart. The engines
 *   therefore need no settings, and a router has no field that it could lose.
 * - An engine answers only when both legs of a room are there, as in a real handoff. A room serves one handoff, ever.
 * - Each event of the answer carries the request's number, its own number and when it was written (CLOCK_MONOTONIC, which
 *   all processes share), so that a lost, doubled, strayed or late event is seen where it arrives.
 *
 * It is C because of what was measured: minimal Python protocols on uvloop that check nothing sustain 41k requests/s on one
 * core, and a routed request costs that core three of their turns instead of two, before any checking. Routers reach 30k.
 *
 * One thread, one epoll set, and after warm-up no allocation. Mistakes of the machine (no memory, no sockets) end the
 * process with a sentence; mistakes of the router are counted and survived.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define SECOND 1000000000ull
#define READ_SIZE 65536
#define EVENTS_PER_TURN 512
#define LENGTH(array) (sizeof(array) / sizeof((array)[0]))

static int epoll_fd;

static _Noreturn void die(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    fputs("rig: ", stderr);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    exit(2);
}

static uint64_t clock_ns(clockid_t clock)
{
    struct timespec t;
    if (clock_gettime(clock, &t))
        return 0; /* the CPU clock of a process that has ended */
    return (uint64_t)t.tv_sec * SECOND + (uint64_t)t.tv_nsec;
}

static uint64_t now_ns(void)
{
    return clock_ns(CLOCK_MONOTONIC);
}

/* ---- bytes and sockets ------------------------------------------------------------------------------------------- */

struct bytes { /* data[start, end) is what is held */
    char *data;
    size_t start, end, cap;
};

static size_t held(const struct bytes *b)
{
    return b->end - b->start;
}

static char *space_for(struct bytes *b, size_t size)
{
    if (b->start == b->end)
        b->start = b->end = 0;
    if (b->cap - b->end < size && b->start) {
        memmove(b->data, b->data + b->start, held(b));
        b->end -= b->start;
        b->start = 0;
    }
    if (b->cap - b->end < size) {
        b->cap = 2 * (b->end + size);
        if (!(b->data = realloc(b->data, b->cap)))
            die("out of memory");
    }
    return b->data + b->end;
}

static void append(struct bytes *b, const char *at, size_t size)
{
    memcpy(space_for(b, size), at, size);
    b->end += size;
}

/* The start of every object that epoll hands back. */
struct io {
    int fd; /* -1: closed */
    bool listens, wants_out;
    struct bytes in, out;
};

static void io_watch(struct io *io, int operation, bool wants_out)
{
    struct epoll_event event = {.events = wants_out ? EPOLLIN | EPOLLOUT : EPOLLIN, .data.ptr = io};
    if (epoll_ctl(epoll_fd, operation, io->fd, &event))
        die("epoll_ctl: %s", strerror(errno));
    io->wants_out = wants_out;
}

static void io_open(struct io *io, int fd)
{
    int on = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    io->fd = fd;
    io->in.start = io->in.end = io->out.start = io->out.end = 0;
    io_watch(io, EPOLL_CTL_ADD, false);
}

static void io_close(struct io *io)
{
    close(io->fd);
    io->fd = -1;
}

/* 1: bytes came, 0: none yet, -1: the peer has closed. */
static int io_read(struct io *io)
{
    ssize_t got = recv(io->fd, space_for(&io->in, READ_SIZE), READ_SIZE, 0);
    if (got > 0) {
        io->in.end += (size_t)got;
        return 1;
    }
    return got < 0 && (errno == EAGAIN || errno == EINTR) ? 0 : -1;
}

/* Sends what the socket takes and keeps the rest for later. False: the peer is gone. */
static bool io_send(struct io *io, const char *at, size_t size)
{
    ssize_t sent = held(&io->out) ? 0 : send(io->fd, at, size, MSG_NOSIGNAL);
    if (sent < 0) {
        if (errno != EAGAIN)
            return false;
        sent = 0;
    }
    if ((size_t)sent < size) {
        append(&io->out, at + sent, size - (size_t)sent);
        if (!io->wants_out)
            io_watch(io, EPOLL_CTL_MOD, true);
    }
    return true;
}

static bool io_flush(struct io *io)
{
    ssize_t sent = send(io->fd, io->out.data + io->out.start, held(&io->out), MSG_NOSIGNAL);
    if (sent < 0)
        return errno == EAGAIN;
    io->out.start += (size_t)sent;
    if (!held(&io->out))
        io_watch(io, EPOLL_CTL_MOD, false);
    return true;
}

static int wait_for_events(struct epoll_event *events, uint64_t ns)
{
    struct timespec limit = {.tv_sec = (time_t)(ns / SECOND), .tv_nsec = (long)(ns % SECOND)};
    /* epoll_wait would round to milliseconds, and paced events would come in bunches. */
    long count = syscall(SYS_epoll_pwait2, epoll_fd, events, EVENTS_PER_TURN, &limit, NULL, 0);
    if (count < 0 && errno != EINTR)
        die("epoll_pwait2 (Linux 5.11 or later): %s", strerror(errno));
    return count < 0 ? 0 : (int)count;
}

static void start_loop(void)
{
    prctl(PR_SET_TIMERSLACK, 1000, 0, 0, 0); /* ns; the default of 50 µs is more than some routers add */
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    if (epoll_fd < 0)
        die("epoll_create1: %s", strerror(errno));
}

/* ---- HTTP -------------------------------------------------------------------------------------------------------- */

struct head { /* of a request or of an answer */
    const char *start_line;
    size_t start_line_size, size, body_size;
    int status; /* of an answer */
    bool chunked, json, closes;
};

static bool header_is(const char *line, size_t size, const char *name, const char **value)
{
    size_t name_size = strlen(name);
    if (size <= name_size || line[name_size] != ':' || strncasecmp(line, name, name_size))
        return false;
    for (*value = line + name_size + 1; **value == ' '; ++*value)
        ;
    return true;
}

static void read_header(struct head *head, const char *line, size_t size)
{
    const char *value;
    if (header_is(line, size, "content-length", &value))
        head->body_size = strtoull(value, NULL, 10);
    else if (header_is(line, size, "transfer-encoding", &value))
        head->chunked = !strncasecmp(value, "chunked", 7);
    else if (header_is(line, size, "content-type", &value))
        head->json = !strncasecmp(value, "application/json\r", 17);
    else if (header_is(line, size, "connection", &value))
        head->closes = !strncasecmp(value, "close", 5);
}

/* False: it is not all there yet. */
static bool parse_head(const char *at, size_t size, struct head *head)
{
    const char *end = memmem(at, size, "\r\n\r\n", 4);
    if (!end)
        return false;
    *head = (struct head){.start_line = at, .size = (size_t)(end + 4 - at)};
    for (const char *line = at, *next; line < end; line = next) {
        next = (const char *)memmem(line, (size_t)(end + 2 - line), "\r\n", 2) + 2;
        if (line == at)
            head->start_line_size = (size_t)(next - 2 - line);
        else
            read_header(head, line, (size_t)(next - 2 - line));
    }
    if (size > 12 && !memcmp(at, "HTTP/1.", 7))
        head->status = atoi(at + 9);
    return true;
}

/* ---- a text that can prove that it arrived whole ------------------------------------------------------------------- */

/* "rig/1 SEQ CHUNKS PACE SIZE DIGEST filler", the numbers in hex of fixed width, the filler of SIZE bytes. */
#define TEXT_MARK "\"rig/1 "
#define TEXT_MARK_SIZE (sizeof TEXT_MARK - 1)
#define TEXT_HEAD_SIZE (16 + 1 + 4 + 1 + 8 + 1 + 8 + 1 + 16 + 1)
#define TEXT_CHUNKS_AT 17 /* in the head */

struct text {
    uint64_t seq, chunks, pace_us, size, digest;
};

/* "rig/s SEQ NUMBER STAMP": the content of one event. */
#define EVENT_MARK "\"rig/s "
#define EVENT_MARK_SIZE (sizeof EVENT_MARK - 1)
#define EVENT_NUMBER_AT 17
#define EVENT_STAMP_AT 22
#define EVENT_SIZE (16 + 1 + 4 + 1 + 16)

static void put_hex(char *at, int width, uint64_t value)
{
    for (char *digit = at + width; digit-- > at; value >>= 4)
        *digit = "0123456789abcdef"[value & 15];
}

static uint64_t get_hex(const char *at, int width)
{
    uint64_t value = 0;
    for (; width--; at++)
        value = value << 4 | (uint64_t)(*at <= '9' ? *at - '0' : (*at | 32) - 'a' + 10);
    return value;
}

/* Eight bytes at a time: 32 KB must not cost the fakes more than the router. */
static uint64_t digest_of(const char *at, size_t size)
{
    uint64_t sum = size, word;
    for (; size >= sizeof word; at += sizeof word, size -= sizeof word) {
        memcpy(&word, at, sizeof word);
        sum = (sum ^ word) * 0x9e3779b97f4a7c15ull;
        sum ^= sum >> 32;
    }
    for (; size; at++, size--)
        sum = (sum ^ (unsigned char)*at) * 0x100000001b3ull;
    return sum;
}

/* Writes the text without its quotes; returns its end. Its line ends are escaped: real prompts make a router unescape. */
static char *put_text(char *at, struct text text)
{
    static const char words[] = "the quick brown fox jumps over the lazy dog and away\\n";
    char head[TEXT_MARK_SIZE + TEXT_HEAD_SIZE], *filler = at + TEXT_MARK_SIZE - 1 + TEXT_HEAD_SIZE;
    for (size_t i = 0; i < text.size; i++)
        filler[i] = words[i % (sizeof words - 1)];
    if (text.size && filler[text.size - 1] == '\\')
        filler[text.size - 1] = '.';
    snprintf(head, sizeof head, "rig/1 %016jx %04jx %08jx %08jx %016jx", (uintmax_t)text.seq, (uintmax_t)text.chunks,
             (uintmax_t)text.pace_us, (uintmax_t)text.size, (uintmax_t)digest_of(filler, text.size));
    memcpy(at, head, sizeof head - 2);
    filler[-1] = ' ';
    return filler + text.size;
}

/* Where the intact text starts (at its quote) and ends (behind its quote); NULL: there is none. */
static const char *find_text(const char *at, size_t size, struct text *text, const char **end)
{
    const char *start = memmem(at, size, TEXT_MARK, TEXT_MARK_SIZE);
    if (!start || (size_t)(at + size - start) < TEXT_MARK_SIZE + TEXT_HEAD_SIZE)
        return NULL;
    const char *head = start + TEXT_MARK_SIZE, *filler = head + TEXT_HEAD_SIZE;
    *text = (struct text){get_hex(head, 16), get_hex(head + TEXT_CHUNKS_AT, 4), get_hex(head + 22, 8), get_hex(head + 31, 8),
                          get_hex(head + 40, 16)};
    size_t left = (size_t)(at + size - filler);
    if (left <= text->size || filler[text->size] != '"' || digest_of(filler, text->size) != text->digest)
        return NULL;
    *end = filler + text->size + 1;
    return start;
}

/* ---- what is asked and answered ----------------------------------------------------------------------------------------- */

#define ID "5f0c1e7a9b3d4c2e8f6a7b1d0e9c8f2a"
#define CHAT_EVENT(delta, finish)                                                                                             \
    "{\"id\":\"" ID "\",\"object\":\"chat.completion.chunk\",\"created\":1763694000,\"model\":\"fake\",\"choices\":[{"        \
    "\"index\":0,\"delta\":{" delta ",\"reasoning_content\":null,\"tool_calls\":null},\"logprobs\":null,\"finish_reason\":" \
    finish "}],\"usage\":null}"
#define COMPLETION(object, text, finish, usage)                                                                               \
    "{\"id\":\"" ID "\",\"object\":\"" object "\",\"created\":1763694000,\"model\":\"fake\",\"choices\":[{\"index\":0,"       \
    "\"text\":\"" text "\",\"logprobs\":null,\"finish_reason\":" finish "}],\"usage\":" usage "}"
#define GENERATED(text, finish)                                                                                               \
    "{\"text\":\"" text "\",\"output_ids\":[17],\"meta_info\":{\"id\":\"" ID "\",\"finish_reason\":" finish                   \
    ",\"prompt_tokens\":128,\"weight_version\":\"default\",\"cached_tokens\":0,\"completion_tokens\":1}}"
#define USAGE "{\"prompt_tokens\":128,\"total_tokens\":256,\"completion_tokens\":128,\"prompt_tokens_details\":null}"
#define STOPPED "\"stop\",\"matched_stop\":2"

/* The public routes in SGLang's words. Formats: ask takes text, "true" or "false", tokens; whole and event take a text. */
static const struct shape {
    const char *path, *ask, *limit, *new_limit, *whole, *opening, *event, *finish;
} shapes[] = {
    {
        .path = "/v1/chat/completions",
        .ask = "{\"model\":\"fake\",\"messages\":[{\"role\":\"user\",\"content\":\"%s\"}],\"temperature\":0.7,\"stream\":%s,"
               "\"max_tokens\":%4u}",
        .limit = "\"max_tokens\"",
        .new_limit = "\"max_completion_tokens\"", /* what sglang-router makes of it; both mean the same to SGLang */
        .whole = "{\"id\":\"" ID "\",\"object\":\"chat.completion\",\"created\":1763694000,\"model\":\"fake\",\"choices\":[{"
                 "\"index\":0,\"message\":{\"role\":\"assistant\",\"content\":\"%s\",\"reasoning_content\":null,"
                 "\"tool_calls\":null},\"logprobs\":null,\"finish_reason\":" STOPPED "}],\"usage\":" USAGE "}",
        .opening = CHAT_EVENT("\"role\":\"assistant\",\"content\":\"\"", "null"),
        .event = CHAT_EVENT("\"role\":null,\"content\":\"%s\"", "null"),
        .finish = CHAT_EVENT("\"role\":null,\"content\":null", STOPPED),
    },
    {
        .path = "/v1/completions",
        .ask = "{\"model\":\"fake\",\"prompt\":\"%s\",\"temperature\":0.7,\"stream\":%s,\"max_tokens\":%4u}",
        .limit = "\"max_tokens\"",
        .whole = COMPLETION("text_completion", "%s", STOPPED, USAGE),
        .event = COMPLETION("text_completion", "%s", "null", "null"),
        .finish = COMPLETION("text_completion", "", STOPPED, "null"),
    },
    {
        .path = "/generate",
        .ask = "{\"text\":\"%s\",\"stream\":%s,\"sampling_params\":{\"temperature\":0.7,\"max_new_tokens\":%4u}}",
        .limit = "\"max_new_tokens\"",
        .whole = GENERATED("%s", "{\"type\":\"stop\",\"matched\":2}"),
        .event = GENERATED("%s", "null"),
        .finish = GENERATED("", "{\"type\":\"stop\",\"matched\":2}"),
    },
};
#define SHAPES LENGTH(shapes)

/* Prebuilt bytes, and where in them the fields of this request or event go. */
struct blob {
    char *data;
    size_t size, at; /* at: behind the mark */
};

static struct blob blob_of(const char *mark, const char *format, ...)
{
    va_list arguments;
    struct blob blob;
    va_start(arguments, format);
    int size = vasprintf(&blob.data, format, arguments);
    va_end(arguments);
    if (size < 0)
        die("out of memory");
    blob.size = (size_t)size;
    const char *found = mark ? strstr(blob.data, mark) : NULL;
    blob.at = found ? (size_t)(found - blob.data) + strlen(mark) : 0;
    return blob;
}

/* ==== the engines =========================================================================================================== */

#define BOOTSTRAP_PORT 8998
#define PARTNER_LIMIT (8 * SECOND)   /* SGLang waits 300 s; a bench has not that long */
#define KEEP_ALIVE_LIMIT (5 * SECOND) /* as SGLang's HTTP server */
#define ANSWER_SIZE 512              /* of a whole answer's filler, about 128 tokens */

enum role { PREFILL, DECODE };
static const char *const role_names[] = {"prefill", "decode"};

enum fault {
    BAD_FRAMING, NOT_JSON, TEXT_DAMAGED, BODY_CHANGED, NO_BOOTSTRAP, ROOM_REUSED, LEGS_DIFFER, PARTNER_MISSING, LEFT_EARLY, FAULTS
};
static const char *const fault_names[FAULTS] = {
    "bad_framing", "not_json", "text_damaged", "body_changed", "no_bootstrap", "room_reused", "legs_differ", "partner_missing",
    "left_early",
};

/* One connection of a router to an engine, and the request on it. Reused, never freed: epoll and the queues may still point
 * at a closed one. */
struct leg {
    struct io io; /* first: epoll hands this back */
    enum role role;
    enum { IDLE, WAITING, ANSWERING } state;
    bool queued, closes, stream;
    const struct shape *shape;
    struct text text;
    uint64_t room, since, due; /* since: when it came into this state */
    unsigned sent, todo;       /* events */
    struct leg *next_free;
};

/* Where two legs of a room meet. Kept for ever, so that a room's second use is seen. */
struct meeting {
    uint64_t room;
    unsigned came; /* bit per role; 0: an empty slot */
    struct leg *first;
};

static struct {
    bool solo; /* no prefill: the load comes straight to decode */
    uint64_t connections, pairs, answers, unknown, faults[FAULTS];
    char last_unknown[64];
    struct io listeners[2];
    struct leg **legs, *free;
    size_t leg_count;
    struct meeting *meetings;
    size_t meeting_count, meeting_cap;
    struct leg **flood, **flood_next, **paced; /* streams that write at every turn; a heap by due time of those that wait */
    size_t flood_count, paced_count, queue_cap;
    struct blob whole[SHAPES], opening[SHAPES], event[SHAPES], ending[SHAPES];
} engines;

static struct meeting *meeting_of(uint64_t room)
{
    size_t mask = engines.meeting_cap - 1, i = (room * 0x9e3779b97f4a7c15ull >> 20) & mask;
    while (engines.meetings[i].came && engines.meetings[i].room != room)
        i = (i + 1) & mask;
    return &engines.meetings[i];
}

static void grow_meetings(void)
{
    struct meeting *old = engines.meetings;
    size_t old_cap = engines.meeting_cap;
    engines.meeting_cap = old_cap ? 2 * old_cap : 1 << 16;
    if (!(engines.meetings = calloc(engines.meeting_cap, sizeof *old)))
        die("out of memory");
    for (size_t i = 0; i < old_cap; i++)
        if (old[i].came)
            *meeting_of(old[i].room) = old[i];
    free(old);
}

/* ---- when to write ---------------------------------------------------------------------------------------------------- */

static void paced_push(struct leg *leg)
{
    size_t i = engines.paced_count++;
    for (size_t up; i && engines.paced[up = (i - 1) / 2]->due > leg->due; i = up)
        engines.paced[i] = engines.paced[up];
    engines.paced[i] = leg;
}

static struct leg *paced_pop(void)
{
    struct leg **heap = engines.paced, *first = heap[0], *last = heap[--engines.paced_count];
    size_t i = 0, down;
    while ((down = 2 * i + 1) < engines.paced_count) {
        if (down + 1 < engines.paced_count && heap[down + 1]->due < heap[down]->due)
            down++;
        if (heap[down]->due >= last->due)
            break;
        heap[i] = heap[down];
        i = down;
    }
    heap[i] = last;
    return first;
}

static void schedule(struct leg *leg)
{
    if (leg->queued || leg->io.wants_out)
        return; /* a blocked one is scheduled again when its socket has taken everything */
    leg->queued = true;
    if (!leg->text.pace_us) {
        engines.flood_next[engines.flood_count++] = leg;
    } else {
        leg->due = leg->since + leg->sent * leg->text.pace_us * 1000;
        paced_push(leg);
    }
}

/* ---- the life of a leg ------------------------------------------------------------------------------------------------- */

static void hang_up(struct leg *leg)
{
    if (leg->state != IDLE || held(&leg->io.out))
        engines.faults[LEFT_EARLY]++;
    if (leg->state == WAITING)
        meeting_of(leg->room)->first = NULL;
    io_close(&leg->io);
    leg->state = IDLE;
    if (!leg->queued) { /* else whoever takes it from the queue frees it */
        leg->next_free = engines.free;
        engines.free = leg;
    }
}

static void finish(struct leg *leg)
{
    leg->state = IDLE;
    leg->since = now_ns();
    engines.answers++;
    if (leg->closes && !leg->io.wants_out)
        hang_up(leg);
}

/* Writes one event; the first with all that comes before it and the last with all that comes after it, each framed as its own. */
static void step(struct leg *leg)
{
    static char out[4096];
    size_t shape = (size_t)(leg->shape - shapes);
    const struct blob *opening = &engines.opening[shape], *event = &engines.event[shape], *ending = &engines.ending[shape];
    char *end = out, *field;
    if (leg->sent == 0)
        end = mempcpy(end, opening->data, opening->size);
    field = end + event->at;
    end = mempcpy(end, event->data, event->size);
    put_hex(field, 16, leg->text.seq);
    put_hex(field + EVENT_NUMBER_AT, 4, leg->sent);
    bool last = ++leg->sent == leg->todo;
    if (last)
        end = mempcpy(end, ending->data, ending->size);
    put_hex(field + EVENT_STAMP_AT, 16, now_ns());
    if (!io_send(&leg->io, out, (size_t)(end - out)))
        hang_up(leg);
    else if (last)
        finish(leg);
    else
        schedule(leg);
}

static void answer(struct leg *leg)
{
    leg->state = ANSWERING;
    leg->since = now_ns();
    leg->sent = 0;
    if (leg->stream) {
        leg->todo = leg->role == PREFILL ? 1 : (unsigned)leg->text.chunks;
        step(leg);
        return;
    }
    const struct blob *whole = &engines.whole[leg->shape - shapes];
    put_hex(whole->data + whole->at, 16, leg->text.seq);
    if (!io_send(&leg->io, whole->data, whole->size))
        hang_up(leg);
    else
        finish(leg);
}

static void reply(struct leg *leg, const char *status, const char *type, const char *body)
{
    char out[4096];
    int size = snprintf(out, sizeof out, "HTTP/1.1 %s\r\nserver: rig\r\ncontent-type: %s\r\ncontent-length: %zu\r\n\r\n%s", status,
                        type, strlen(body), body);
    leg->state = IDLE;
    leg->since = now_ns();
    if (!io_send(&leg->io, out, (size_t)size) || (leg->closes && !leg->io.wants_out))
        hang_up(leg);
}

static void refuse(struct leg *leg, enum fault fault)
{
    char body[128];
    engines.faults[fault]++;
    snprintf(body, sizeof body, "{\"error\":{\"message\":\"%s\",\"type\":\"rig\",\"code\":400}}", fault_names[fault]);
    reply(leg, fault == PARTNER_MISSING ? "504 Gateway Timeout" : "400 Bad Request", "application/json", body);
}

static void meet(struct leg *leg)
{
    if (2 * engines.meeting_count >= engines.meeting_cap)
        grow_meetings();
    struct meeting *meeting = meeting_of(leg->room);
    struct leg *partner = meeting->first;
    unsigned me = 1u << leg->role;
    if (meeting->came & me) {
        refuse(leg, ROOM_REUSED);
        return;
    }
    if (!meeting->came) {
        *meeting = (struct meeting){.room = leg->room, .came = me, .first = leg};
        engines.meeting_count++;
        leg->state = WAITING;
        leg->since = now_ns();
        return;
    }
    meeting->came |= me;
    meeting->first = NULL;
    if (!partner) { /* it left, or gave up */
        refuse(leg, PARTNER_MISSING);
        return;
    }
    if (memcmp(&leg->text, &partner->text, sizeof leg->text) || leg->shape != partner->shape || leg->stream != partner->stream)
        engines.faults[LEGS_DIFFER]++;
    engines.pairs++;
    answer(partner);
    answer(leg);
}

/* ---- requests ------------------------------------------------------------------------------------------------------------ */

/* A body without its text: 32 KB need not be searched for every field. */
struct fields {
    const char *at[2], *end[2];
};

/* Where the value of a field starts; NULL: there is no such field. */
static const char *field(const struct fields *fields, const char *name, const char **end)
{
    size_t size = strlen(name);
    for (int i = 0; i < 2; i++) {
        const char *at = memmem(fields->at[i], (size_t)(fields->end[i] - fields->at[i]), name, size);
        if (at) {
            *end = fields->end[i];
            for (at += size; at < *end && (*at == ':' || *at == ' '); at++)
                ;
            return at;
        }
    }
    return NULL;
}

static bool number(const struct fields *fields, const char *name, uint64_t *value)
{
    const char *end, *at = field(fields, name, &end);
    if (!at || at == end || !isdigit((unsigned char)*at))
        return false;
    for (*value = 0; at < end && isdigit((unsigned char)*at); at++)
        *value = 10 * *value + (uint64_t)(*at - '0');
    return true;
}

static void take(struct leg *leg, const struct head *head, const char *body)
{
    const char *behind, *before = find_text(body, head->body_size, &leg->text, &behind), *end, *value;
    if (!before && memmem(body, head->body_size, "\"extra_key\"", 11)) { /* no client of ours asks so: a router's own canary */
        reply(leg, "400 Bad Request", "application/json", "{\"error\":{\"message\":\"no text\",\"type\":\"rig\",\"code\":400}}");
        return;
    }
    if (!before) {
        refuse(leg, TEXT_DAMAGED);
        return;
    }
    struct fields fields = {{body, behind}, {before, body + head->body_size}};
    uint64_t limit, port;
    if (!head->json)
        engines.faults[NOT_JSON]++;
    if (!(number(&fields, leg->shape->limit, &limit) || (leg->shape->new_limit && number(&fields, leg->shape->new_limit, &limit)))
        || limit != leg->text.chunks)
        engines.faults[BODY_CHANGED]++;
    value = field(&fields, "\"stream\"", &end);
    leg->stream = value && value < end && *value == 't';
    if (engines.solo)
        answer(leg);
    else if (!number(&fields, "\"bootstrap_room\"", &leg->room) || leg->room >> 63 || !field(&fields, "\"bootstrap_host\"", &end)
             || !number(&fields, "\"bootstrap_port\"", &port) || port != BOOTSTRAP_PORT)
        refuse(leg, NO_BOOTSTRAP);
    else
        meet(leg);
}

static void show_counters(struct leg *leg)
{
    char body[1024];
    int size = snprintf(body, sizeof body, "{\"connections\":%ju,\"pairs\":%ju,\"answers\":%ju,\"unknown\":%ju,"
                        "\"last_unknown\":\"%s\",\"faults\":{", (uintmax_t)engines.connections, (uintmax_t)engines.pairs, (uintmax_t)engines.answers, (uintmax_t)engines.unknown, engines.last_unknown);
    for (int i = 0; i < FAULTS; i++)
        size += snprintf(body + size, sizeof body - (size_t)size, "%s\"%s\":%ju", i ? "," : "", fault_names[i],
                         (uintmax_t)engines.faults[i]);
    snprintf(body + size, sizeof body - (size_t)size, "}}");
    reply(leg, "200 OK", "application/json", body);
}

#define MODEL_INFO "{\"model_path\":\"/fake\",\"tokenizer_path\":\"/fake\",\"is_generation\":true,\"weight_version\":\"default\"}"
#define SERVER_INFO                                                                                                           \
    "{\"model_path\":\"/fake\",\"served_model_name\":\"fake\",\"tokenizer_path\":\"/fake\",\"tp_size\":1,\"dp_size\":1,"         \
    "\"version\":\"0.5.23\",\"disaggregation_mode\":\"%s\",\"max_total_num_tokens\":1048576,\"status\":\"ready\","            \
    "\"internal_states\":[{\"disaggregation_mode\":\"%s\",\"last_gen_throughput\":0.0}]}"
#define LOADS                                                                                                                 \
    "{\"timestamp\":\"2026-11-21T00:00:00Z\",\"version\":\"0.5.23\",\"dp_rank_count\":1,\"loads\":[{\"dp_rank\":0,"           \
    "\"num_running_reqs\":0,\"num_waiting_reqs\":0,\"num_used_tokens\":0,\"num_total_tokens\":0,"                             \
    "\"max_total_num_tokens\":1048576,\"token_usage\":0.0,\"gen_throughput\":0.0,\"cache_hit_rate\":0.0,"                     \
    "\"disaggregation\":{\"mode\":\"%s\"}}]}"

/* What routers ask besides; a format takes the role, maybe twice. */
static const struct {
    const char *path, *type, *format;
} pages[] = {
    {"/health", "text/plain", ""},
    {"/ready", "text/plain", ""},
    {"/health_generate", "text/plain", ""},
    {"/abort_request", "text/plain", ""},
    {"/flush_cache", "text/plain", "Cache flushed.\n"},
    {"/metrics", "text/plain; version=0.0.4", "# TYPE sglang:num_running_reqs gauge\nsglang:num_running_reqs 0\n"},
    {"/v1/models", "application/json", "{\"object\":\"list\",\"data\":[{\"id\":\"fake\",\"object\":\"model\","
                                       "\"owned_by\":\"sglang\",\"root\":\"fake\",\"max_model_len\":1048576}]}"},
    {"/model_info", "application/json", MODEL_INFO},
    {"/get_model_info", "application/json", MODEL_INFO},
    {"/server_info", "application/json", SERVER_INFO},
    {"/get_server_info", "application/json", SERVER_INFO},
    {"/v1/loads", "application/json", LOADS},
};

static void show_page(struct leg *leg, const char *path)
{
    char body[2048];
    if (!strcmp(path, "/rig/counters")) {
        show_counters(leg);
        return;
    }
    for (size_t i = 0; i < LENGTH(pages); i++)
        if (!strcmp(path, pages[i].path)) {
            snprintf(body, sizeof body, pages[i].format, role_names[leg->role], role_names[leg->role]);
            reply(leg, "200 OK", pages[i].type, body);
            return;
        }
    engines.unknown++;
    snprintf(engines.last_unknown, sizeof engines.last_unknown, "%s", path);
    reply(leg, "404 Not Found", "application/json", "{\"detail\":\"Not Found\"}");
}

static void serve(struct leg *leg, const struct head *head, const char *body)
{
    char method[8], path[64];
    leg->closes = head->closes;
    if (sscanf(head->start_line, "%7s %63[^ ?\"\\\r]", method, path) != 2)
        strcpy(path, "?");
    for (leg->shape = shapes; leg->shape < shapes + SHAPES; leg->shape++)
        if (!strcmp(path, leg->shape->path)) {
            take(leg, head, body);
            return;
        }
    show_page(leg, path);
}

/* Serves every request that is all there. Nobody pipelines to an engine, so bytes during an answer are a fault. */
static void serve_all(struct leg *leg)
{
    struct bytes *in = &leg->io.in;
    struct head head;
    while (leg->io.fd >= 0 && held(in)) {
        const char *at = in->data + in->start;
        bool whole = parse_head(at, held(in), &head);
        if (whole && !memcmp(at, "PRI * HTTP/2", 12)) { /* sglang-router tries HTTP/2 and gRPC at the start, as it may */
            hang_up(leg);
            return;
        }
        if (leg->state != IDLE || (whole && head.chunked)) {
            engines.faults[BAD_FRAMING]++;
            hang_up(leg);
            return;
        }
        if (!whole || held(in) < head.size + head.body_size)
            return;
        in->start += head.size + head.body_size;
        serve(leg, &head, at + head.size);
    }
}

/* ---- the engines' loop ------------------------------------------------------------------------------------------------ */

static struct leg *new_leg(void)
{
    struct leg *leg = engines.free;
    if (leg) {
        engines.free = leg->next_free;
        return leg;
    }
    leg = calloc(1, sizeof *leg);
    engines.legs = realloc(engines.legs, (engines.leg_count + 1) * sizeof leg);
    if (!leg || !engines.legs)
        die("out of memory");
    engines.legs[engines.leg_count++] = leg;
    if (engines.leg_count > engines.queue_cap)
        die("more than %zu connections", engines.queue_cap);
    return leg;
}

static void accept_legs(struct io *listener)
{
    for (int fd; (fd = accept4(listener->fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0;) {
        struct leg *leg = new_leg();
        engines.connections++;
        leg->role = listener == &engines.listeners[PREFILL] ? PREFILL : DECODE;
        leg->state = IDLE;
        leg->since = now_ns();
        io_open(&leg->io, fd);
    }
}

static void on_leg(struct leg *leg, uint32_t happened)
{
    if (leg->io.fd >= 0 && happened & EPOLLOUT && leg->io.wants_out) {
        if (!io_flush(&leg->io))
            hang_up(leg);
        else if (!leg->io.wants_out && leg->state == ANSWERING)
            schedule(leg);
        else if (!leg->io.wants_out && leg->closes)
            hang_up(leg);
    }
    if (leg->io.fd >= 0 && happened & ~(uint32_t)EPOLLOUT) {
        int got = io_read(&leg->io);
        if (got < 0)
            hang_up(leg);
        else if (got)
            serve_all(leg);
    }
}

static void step_queued(struct leg *leg)
{
    leg->queued = false;
    if (leg->io.fd >= 0) {
        step(leg);
    } else {
        leg->next_free = engines.free;
        engines.free = leg;
    }
}

/* One event for every stream that is due: as an engine whose step makes a token for each. */
static void step_all(void)
{
    struct leg **flood = engines.flood_next;
    size_t count = engines.flood_count;
    engines.flood_next = engines.flood;
    engines.flood = flood;
    engines.flood_count = 0;
    for (size_t i = 0; i < count; i++)
        step_queued(flood[i]);
    for (uint64_t now = now_ns(); engines.paced_count && engines.paced[0]->due <= now;)
        step_queued(paced_pop());
}

static void sweep(void)
{
    uint64_t now = now_ns();
    for (size_t i = 0; i < engines.leg_count; i++) {
        struct leg *leg = engines.legs[i];
        if (leg->io.fd < 0)
            continue;
        if (leg->state == WAITING && now - leg->since > PARTNER_LIMIT) {
            meeting_of(leg->room)->first = NULL;
            refuse(leg, PARTNER_MISSING);
        } else if (leg->state == IDLE && !held(&leg->io.out) && now - leg->since > KEEP_ALIVE_LIMIT) {
            hang_up(leg);
        }
    }
}

static void listen_as(enum role role)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    struct io *listener = &engines.listeners[role];
    socklen_t size = sizeof address;
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0 || bind(fd, (struct sockaddr *)&address, size) || listen(fd, 1024) ||
        getsockname(fd, (struct sockaddr *)&address, &size))
        die("listen: %s", strerror(errno));
    listener->listens = true;
    io_open(listener, fd);
    printf("%s\"%s\": %d%s", role ? ", " : "{", role_names[role], ntohs(address.sin_port), role ? "}\n" : "");
}

/* An SSE event as one HTTP chunk. */
static char *framed(const char *data)
{
    char *out;
    if (asprintf(&out, "%zx\r\ndata: %s\n\n\r\n", strlen(data) + 8, data) < 0)
        die("out of memory");
    return out;
}

static void prepare_answers(void)
{
    char text[TEXT_HEAD_SIZE + ANSWER_SIZE + 64] = "", event[EVENT_SIZE + 64], body[4096];
    *put_text(text, (struct text){.size = ANSWER_SIZE}) = 0;
    snprintf(event, sizeof event, "rig/s %016x %04x %016x", 0, 0, 0);
    for (size_t i = 0; i < SHAPES; i++) {
        snprintf(body, sizeof body, shapes[i].whole, text);
        engines.whole[i] = blob_of(TEXT_MARK, "HTTP/1.1 200 OK\r\nserver: rig\r\ncontent-length: %zu\r\n"
                                   "content-type: application/json\r\n\r\n%s", strlen(body), body);
        snprintf(body, sizeof body, shapes[i].event, event);
        engines.event[i] = blob_of(EVENT_MARK, "%s", framed(body));
        engines.opening[i] = blob_of(NULL, "HTTP/1.1 200 OK\r\nserver: rig\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
                                     "transfer-encoding: chunked\r\n\r\n%s", shapes[i].opening ? framed(shapes[i].opening) : "");
        engines.ending[i] = blob_of(NULL, "%s%s0\r\n\r\n", framed(shapes[i].finish), framed("[DONE]"));
    }
}

static _Noreturn void fakes(int count, char **arguments)
{
    struct epoll_event events[EVENTS_PER_TURN];
    uint64_t next_sweep = 0;
    engines.solo = count > 0 && !strcmp(arguments[0], "--solo");
    engines.queue_cap = 8192;
    engines.flood = calloc(engines.queue_cap, sizeof(struct leg *));
    engines.flood_next = calloc(engines.queue_cap, sizeof(struct leg *));
    engines.paced = calloc(engines.queue_cap, sizeof(struct leg *));
    start_loop();
    grow_meetings();
    prepare_answers();
    listen_as(PREFILL);
    listen_as(DECODE);
    fflush(stdout);
    for (;;) {
        uint64_t now = now_ns(), due = engines.paced_count ? engines.paced[0]->due : now + SECOND;
        int ready = wait_for_events(events, engines.flood_count || due <= now ? 0 : due - now);
        for (int i = 0; i < ready; i++) {
            struct io *io = events[i].data.ptr;
            if (io->listens)
                accept_legs(io);
            else
                on_leg((struct leg *)io, events[i].events);
        }
        step_all();
        if (now > next_sweep) {
            sweep();
            next_sweep = now + SECOND;
        }
    }
}

/* ==== the load ============================================================================================================== */

#define DRAIN_LIMIT (10 * SECOND) /* for what is under way when the time is up */
#define ERROR_LIMIT 1000          /* a router that only fails would keep the loop spinning */

enum error { STATUS, CLOSED, GARBLED, WRONG_TEXT, OUT_OF_ORDER, INCOMPLETE, ERROR_EVENT, UNFINISHED, ERRORS };
static const char *const error_names[ERRORS] = {
    "status", "closed", "garbled", "wrong_text", "out_of_order", "incomplete", "error_event", "unfinished",
};

/* Counts by value in ns, 128 buckets per power of two: less than 1 % off, however long the tail. */
#define BUCKETS_PER_OCTAVE 128
struct histogram {
    uint64_t count, buckets[58 * BUCKETS_PER_OCTAVE];
};

struct client {
    struct io io; /* first: epoll hands this back */
    unsigned index, serial;
    uint64_t seq, began;
    unsigned want, got; /* events */
    bool busy, in_body, chunked, closes, finished, done;
    enum { CHUNK_SIZE, CHUNK_DATA, CHUNK_END, TRAILER } phase;
    size_t left; /* of the body, or of the current HTTP chunk */
    struct bytes body;
};

static struct {
    unsigned port, connections, chunks, pace_us, prompt_bytes;
    bool stream;
    double warmup_s, seconds;
    const struct shape *shape;
    clockid_t cpus[64]; /* of the processes whose CPU time is wanted, and in the end our own */
    unsigned cpu_count;
    uint64_t cpu_ns[64], opened, closed;
    bool measuring, stopped;
    struct blob ask;
    size_t ask_limit_at;
    struct client *clients;
    unsigned busy;
    uint64_t errors[ERRORS], error_count;
    uint64_t requests, events;
    struct histogram latency, first, event;
} load;

static void record(struct histogram *histogram, uint64_t from, uint64_t to)
{
    uint64_t value = to > from ? to - from : 0;
    int octave = value < BUCKETS_PER_OCTAVE ? 0 : 63 - __builtin_clzll(value) - 7;
    histogram->buckets[(uint64_t)octave * BUCKETS_PER_OCTAVE + (value >> octave)]++;
    histogram->count++;
}

static double quantile_us(const struct histogram *histogram, double q)
{
    uint64_t before = 0, rank = (uint64_t)(q * (double)histogram->count);
    for (uint64_t i = 0; i < LENGTH(histogram->buckets); i++)
        if ((before += histogram->buckets[i]) > rank) {
            uint64_t octave = i < 2 * BUCKETS_PER_OCTAVE ? 0 : i / BUCKETS_PER_OCTAVE - 1;
            return ((double)((i - octave * BUCKETS_PER_OCTAVE) << octave) + (double)(1ull << octave) / 2) / 1000;
        }
    return 0;
}

static void begin(struct client *client, unsigned chunks);

/* Anew, unless nothing more is to be asked. */
static void connect_client(struct client *client)
{
    if (load.stopped)
        return;
    struct sockaddr_in address = {
        .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK), .sin_port = htons((uint16_t)load.port)};
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof address))
        die("connect to port %u: %s", load.port, strerror(errno));
    fcntl(fd, F_SETFL, O_NONBLOCK);
    io_open(&client->io, fd);
}

static void fail(struct client *client, enum error error, const char *detail, size_t size)
{
    load.errors[error]++;
    if (load.error_count++ < 3) /* enough to see what is wrong */
        fprintf(stderr, "rig: %s: %.*s\n", error_names[error], (int)(size < 300 ? size : 300), detail);
    if (load.error_count >= ERROR_LIMIT)
        load.stopped = true;
    io_close(&client->io);
    client->busy = false;
    load.busy--;
    connect_client(client);
    if (!load.stopped)
        begin(client, load.chunks);
}

static void begin(struct client *client, unsigned chunks)
{
    char limit[8], *text = load.ask.data + load.ask.at;
    client->seq = (uint64_t)client->index << 32 | client->serial++;
    client->want = chunks;
    client->got = 0;
    client->in_body = client->finished = client->done = false;
    client->busy = true;
    load.busy++;
    put_hex(text, 16, client->seq);
    put_hex(text + TEXT_CHUNKS_AT, 4, chunks);
    snprintf(limit, sizeof limit, "%4u", chunks);
    memcpy(load.ask.data + load.ask_limit_at, limit, 4);
    client->began = now_ns();
    if (!io_send(&client->io, load.ask.data, load.ask.size))
        fail(client, CLOSED, "while asking", 12);
}

/* ---- reading an answer ------------------------------------------------------------------------------------------------ */

/* Each step takes what it can from the socket's bytes. 1: it got further; 0: it needs more; -1: it has failed. */

static int read_head(struct client *client)
{
    struct bytes *in = &client->io.in;
    struct head head;
    if (!parse_head(in->data + in->start, held(in), &head))
        return 0;
    if (head.status != 200) {
        fail(client, STATUS, in->data + in->start, held(in));
        return -1;
    }
    in->start += head.size;
    client->in_body = true;
    client->chunked = head.chunked;
    client->closes = head.closes;
    client->phase = CHUNK_SIZE;
    client->left = head.body_size;
    client->body.start = client->body.end = 0;
    return 1;
}

static void move_body(struct client *client)
{
    struct bytes *in = &client->io.in;
    size_t size = held(in) < client->left ? held(in) : client->left;
    append(&client->body, in->data + in->start, size);
    in->start += size;
    client->left -= size;
}

/* 1: the line is there, and taken; its first bytes are at *line. */
static int take_line(struct client *client, const char **line)
{
    struct bytes *in = &client->io.in;
    *line = in->data + in->start;
    const char *end = memmem(*line, held(in), "\r\n", 2);
    if (!end)
        return 0;
    in->start += (size_t)(end + 2 - *line);
    return 1;
}

/* Takes off the chunked framing. 1: the last chunk has been read. */
static int dechunk(struct client *client)
{
    const char *line;
    for (;;) {
        switch (client->phase) {
        case CHUNK_DATA:
            move_body(client);
            if (client->left)
                return 0;
            client->phase = CHUNK_END;
            break;
        case CHUNK_END:
            if (!take_line(client, &line))
                return 0;
            if (*line != '\r')
                return -1;
            client->phase = CHUNK_SIZE;
            break;
        case CHUNK_SIZE:
            if (!take_line(client, &line))
                return 0;
            if (!isxdigit((unsigned char)*line))
                return -1;
            client->left = strtoull(line, NULL, 16);
            client->phase = client->left ? CHUNK_DATA : TRAILER;
            break;
        case TRAILER:
            if (!take_line(client, &line))
                return 0;
            if (*line == '\r')
                return 1;
            break;
        }
    }
}

static int read_event(struct client *client, const char *at, size_t size, uint64_t now)
{
    const char *mark = memmem(at, size, EVENT_MARK, EVENT_MARK_SIZE), *finish;
    if (!mark) {
        if (memmem(at, size, "\"error\"", 7)) {
            fail(client, ERROR_EVENT, at, size);
            return -1;
        }
        finish = memmem(at, size, "\"finish_reason\":", 16);
        client->finished |= finish && finish[16] != 'n';
        client->done |= size == 12 && !memcmp(at, "data: [DONE]", 12);
        return 1;
    }
    const char *fields = mark + EVENT_MARK_SIZE;
    if (get_hex(fields, 16) != client->seq || get_hex(fields + EVENT_NUMBER_AT, 4) != client->got || client->finished) {
        fail(client, OUT_OF_ORDER, at, size);
        return -1;
    }
    if (load.measuring) {
        load.events++;
        record(&load.event, get_hex(fields + EVENT_STAMP_AT, 16), now);
        if (!client->got)
            record(&load.first, client->began, now);
    }
    client->got++;
    return 1;
}

static int read_events(struct client *client, uint64_t now)
{
    struct bytes *body = &client->body;
    const char *at, *end;
    while ((end = memmem(at = body->data + body->start, held(body), "\n\n", 2))) {
        body->start += (size_t)(end + 2 - at);
        if (read_event(client, at, (size_t)(end - at), now) < 0)
            return -1;
    }
    return 1;
}

static bool complete(const struct client *client)
{
    const struct bytes *body = &client->body;
    const char *end;
    struct text text;
    if (load.stream)
        return client->got == client->want && client->finished && client->done && !held(body);
    return find_text(body->data, held(body), &text, &end) && text.seq == client->seq && text.size == ANSWER_SIZE
           && body->data[body->end - 1] == '}';
}

static void end_answer(struct client *client, uint64_t now)
{
    if (!complete(client) || held(&client->io.in)) {
        fail(client, load.stream ? INCOMPLETE : WRONG_TEXT, client->body.data, held(&client->body));
        return;
    }
    if (load.measuring) {
        load.requests++;
        record(&load.latency, client->began, now);
    }
    client->busy = false;
    load.busy--;
    if (client->closes) {
        io_close(&client->io);
        connect_client(client);
    }
    if (!load.stopped)
        begin(client, load.chunks);
}

static void on_client(struct client *client, uint32_t happened)
{
    if (happened & EPOLLOUT && !io_flush(&client->io)) {
        fail(client, CLOSED, "while asking", 12);
        return;
    }
    int got = happened & ~(uint32_t)EPOLLOUT ? io_read(&client->io) : 0, ended;
    if (got <= 0) {
        if (got < 0 && client->busy) {
            fail(client, CLOSED, client->in_body ? "in an answer" : "no answer", 12);
        } else if (got < 0) { /* the router tidies up idle connections */
            io_close(&client->io);
            connect_client(client);
        }
        return;
    }
    uint64_t now = now_ns();
    if (!client->in_body && read_head(client) <= 0)
        return;
    if (client->chunked) {
        ended = dechunk(client);
    } else {
        move_body(client);
        ended = !client->left;
    }
    if (ended < 0)
        fail(client, GARBLED, client->io.in.data, client->io.in.end);
    else if ((!load.stream || read_events(client, now) > 0) && ended)
        end_answer(client, now);
}

/* ---- the load's loop ------------------------------------------------------------------------------------------------------ */

static void read_cpus(void)
{
    /* The kernel's clock of another process counts ns, and threads that have ended; utime and stime count 10 ms. The unsigned
     * difference makes the second reading minus the first. */
    for (unsigned i = 0; i < load.cpu_count; i++)
        load.cpu_ns[i] = clock_ns(load.cpus[i]) - load.cpu_ns[i];
}

static void open_window(void)
{
    load.opened = now_ns();
    load.measuring = true;
    read_cpus();
}

static void close_window(void)
{
    read_cpus();
    load.closed = now_ns();
    load.measuring = false;
    load.stopped = true;
}

static void prepare_ask(void)
{
    char *text = malloc(TEXT_HEAD_SIZE + load.prompt_bytes + 64), *body;
    size_t used = strlen(load.shape->ask) + TEXT_HEAD_SIZE;
    size_t filler = load.prompt_bytes > used ? load.prompt_bytes - used : 0;
    if (!text)
        die("out of memory");
    *put_text(text, (struct text){.chunks = load.chunks, .pace_us = load.pace_us, .size = filler}) = 0;
    int size = asprintf(&body, load.shape->ask, text, load.stream ? "true" : "false", load.chunks);
    if (size < 0)
        die("out of memory");
    load.ask = blob_of(TEXT_MARK, "POST %s HTTP/1.1\r\nhost: 127.0.0.1:%u\r\naccept: */*\r\nuser-agent: rig\r\n"
                       "content-type: application/json\r\ncontent-length: %d\r\n\r\n%s", load.shape->path, load.port, size, body);
    const char *limit = strstr(load.ask.data, load.shape->limit) + strlen(load.shape->limit) + 1;
    load.ask_limit_at = (size_t)(limit - load.ask.data);
    free(text);
    free(body);
}

/* Paced streams are spread evenly over a stream's life, as those of independent users, and start in its middle: the first of
 * each client is shorter. All at once they would write, end and begin again in the same millisecond. */
static uint64_t start_of(unsigned index)
{
    return (uint64_t)load.pace_us * 1000 * index / load.connections;
}

static void start_due(unsigned *started, uint64_t elapsed)
{
    for (; *started < load.connections && start_of(*started) <= elapsed; ++*started)
        begin(&load.clients[*started], load.pace_us ? 1 + load.chunks * *started / load.connections : load.chunks);
}

static void run_load(void)
{
    struct epoll_event events[EVENTS_PER_TURN];
    uint64_t begun = now_ns(), open_at = begun + (uint64_t)(load.warmup_s * 1e9);
    uint64_t close_at = open_at + (uint64_t)(load.seconds * 1e9);
    unsigned started = 0;
    for (;;) {
        uint64_t now = now_ns(), next = load.stopped ? close_at + DRAIN_LIMIT : load.measuring ? close_at : open_at;
        if (!load.stopped && load.measuring && now >= close_at)
            close_window();
        else if (!load.stopped && !load.measuring && now >= open_at)
            open_window();
        if (load.stopped && (!load.busy || now >= close_at + DRAIN_LIMIT))
            break;
        if (!load.stopped)
            start_due(&started, now - begun);
        if (!load.stopped && started < load.connections && begun + start_of(started) < next)
            next = begun + start_of(started);
        int ready = wait_for_events(events, next > now ? next - now : 0);
        for (int i = 0; i < ready; i++)
            on_client(events[i].data.ptr, events[i].events);
    }
    load.errors[UNFINISHED] += load.busy;
}

static void print_quantiles(const char *name, const struct histogram *histogram)
{
    printf("\"%s\": {\"count\": %ju, \"p50\": %.1f, \"p99\": %.1f}, ", name, (uintmax_t)histogram->count,
           quantile_us(histogram, 0.5), quantile_us(histogram, 0.99));
}

static void print_load(void)
{
    double seconds = load.closed ? (double)(load.closed - load.opened) / 1e9 : 0; /* 0: it gave up before */
    printf("{\"seconds\": %.6f, \"requests\": %ju, \"events\": %ju, ", seconds, (uintmax_t)load.requests, (uintmax_t)load.events);
    print_quantiles("latency_us", &load.latency);
    print_quantiles("first_us", &load.first);
    print_quantiles("event_us", &load.event);
    printf("\"cpu_s\": [");
    for (unsigned i = 0; i < load.cpu_count; i++)
        printf("%s%.9f", i ? ", " : "", (double)load.cpu_ns[i] / 1e9);
    printf("], \"errors\": {");
    for (int i = 0; i < ERRORS; i++)
        printf("%s\"%s\": %ju", i ? ", " : "", error_names[i], (uintmax_t)load.errors[i]);
    printf("}}\n");
}

static void set_option(const char *name, const char *value)
{
    static const struct {
        const char *name;
        unsigned *at;
    } counts[] = {
        {"--port", &load.port}, {"--connections", &load.connections}, {"--chunks", &load.chunks},
        {"--pace-us", &load.pace_us}, {"--prompt-bytes", &load.prompt_bytes},
    };
    for (size_t i = 0; i < LENGTH(counts); i++)
        if (!strcmp(name, counts[i].name)) {
            *counts[i].at = (unsigned)strtoul(value, NULL, 10);
            return;
        }
    if (!strcmp(name, "--seconds"))
        load.seconds = strtod(value, NULL);
    else if (!strcmp(name, "--warmup"))
        load.warmup_s = strtod(value, NULL);
    else if (!strcmp(name, "--stream"))
        load.stream = !strcmp(value, "yes");
    else if (!strcmp(name, "--cpu-of") && load.cpu_count < LENGTH(load.cpus) - 1)
        clock_getcpuclockid((pid_t)atoi(value), &load.cpus[load.cpu_count++]);
    else if (!strcmp(name, "--path"))
        for (load.shape = shapes; load.shape < shapes + SHAPES && strcmp(load.shape->path, value);)
            load.shape++;
    else
        die("unknown option %s", name);
}

static int run_load_command(int count, char **arguments)
{
    load.connections = 1;
    load.chunks = 128;
    load.prompt_bytes = 512;
    load.seconds = 3;
    load.warmup_s = 1;
    load.shape = shapes;
    for (int i = 0; i + 1 < count; i += 2)
        set_option(arguments[i], arguments[i + 1]);
    if (!load.port || load.port > 65535 || load.connections < 1 || load.connections > 4096 || load.chunks < 1 || load.chunks > 9999
        || load.prompt_bytes > 1 << 24 || load.seconds <= 0 || load.shape == shapes + SHAPES || count % 2)
        die("load --port 1-65535 [--connections 1-4096] [--stream yes] [--chunks 1-9999] [--pace-us N] [--prompt-bytes N] "
            "[--seconds S] [--warmup S] [--path PATH] [--cpu-of PID]...");
    load.cpus[load.cpu_count++] = CLOCK_PROCESS_CPUTIME_ID;
    start_loop();
    prepare_ask();
    if (!(load.clients = calloc(load.connections, sizeof *load.clients)))
        die("out of memory");
    for (unsigned i = 0; i < load.connections; i++) {
        load.clients[i].index = i;
        connect_client(&load.clients[i]);
    }
    run_load();
    print_load();
    return 0;
}

/* ============================================================================================================================ */

static int run_on_core(int count, char **arguments)
{
    cpu_set_t cores;
    if (count < 3 || strcmp(arguments[0], "--core"))
        die("run --core N COMMAND...");
    CPU_ZERO(&cores);
    CPU_SET((size_t)atoi(arguments[1]), &cores);
    if (sched_setaffinity(0, sizeof cores, &cores))
        die("core %s: %s", arguments[1], strerror(errno));
    prctl(PR_SET_PDEATHSIG, SIGKILL); /* nothing outlives the bench, however that ends */
    execvp(arguments[2], arguments + 2);
    die("%s: %s", arguments[2], strerror(errno));
}

int main(int count, char **arguments)
{
    if (count > 1 && !strcmp(arguments[1], "fakes"))
        fakes(count - 2, arguments + 2);
    if (count > 1 && !strcmp(arguments[1], "load"))
        return run_load_command(count - 2, arguments + 2);
    if (count > 1 && !strcmp(arguments[1], "run"))
        return run_on_core(count - 2, arguments + 2);
    die("fakes [--solo] | load --port PORT ... | run --core N COMMAND...");
}
