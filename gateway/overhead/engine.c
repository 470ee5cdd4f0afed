/* An engine that costs next to nothing, for measuring what stands before it: one thread, epoll, any number of connections.

   usage: engine PORT INTERVAL_US FIRST_US

   A POST with "stream":true gets `max_tokens` events (100 if it names none), the first after FIRST_US, the others INTERVAL_US apart, each
   stream by its own clock; then usage and [DONE]. Another POST gets a whole completion at once. A GET gets what routers ask of
   workers. A reader that is slow holds its own stream back and nothing else; nor does a large body, of which only the beginning is kept:
   searching 32 MiB in one go kept all streams waiting for ten milliseconds. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#define TICK_NS 200000
#define READ_BYTES (64u << 10)
#define LARGE_BODY (256u << 10) /* of a longer one with a content-length only LOOKED_AT bytes are looked at, and the rest is thrown away */
#define LOOKED_AT (4u << 10)
#define MOST_IN (64u << 20)

struct conn {
    int fd, slot; /* slot: its place among the streams, -1 if it has none */
    int closing;
    char *in;
    size_t held, room;
    size_t unread; /* of a large body: bytes that are still to come */
    long left; /* events to come, -1: no stream */
    long long due;
    char out[16384];
    size_t out_at, out_end;
};

static struct conn *streams[65536];
static int stream_count, poller;
static long long interval_ns, first_ns;

static const char WHOLE[] =
    "{\"id\":\"chatcmpl-1\",\"object\":\"chat.completion\",\"created\":1,\"model\":\"bench\",\"choices\":[{\"index\":0,\"message\":"
    "{\"role\":\"assistant\",\"content\":\"Sixteen slices went to sea in a sieve, they did.\"},\"logprobs\":null,\"finish_reason\":\"stop\"}],"
    "\"usage\":{\"prompt_tokens\":64,\"completion_tokens\":16,\"total_tokens\":80}}";
static const char EVENT[] =
    "data: {\"id\":\"chatcmpl-1\",\"object\":\"chat.completion.chunk\",\"created\":1,\"model\":\"bench\",\"choices\":[{\"index\":0,"
    "\"delta\":{\"content\":\" sieve\"},\"logprobs\":null,\"finish_reason\":null}]}\n\n";
static const char LAST[] =
    "data: {\"id\":\"chatcmpl-1\",\"object\":\"chat.completion.chunk\",\"created\":1,\"model\":\"bench\",\"choices\":[{\"index\":0,"
    "\"delta\":{},\"logprobs\":null,\"finish_reason\":\"stop\"}]}\n\n"
    "data: {\"id\":\"chatcmpl-1\",\"object\":\"chat.completion.chunk\",\"created\":1,\"model\":\"bench\",\"choices\":[],"
    "\"usage\":{\"prompt_tokens\":64,\"completion_tokens\":16,\"total_tokens\":80}}\n\ndata: [DONE]\n\n";
static const char STREAM_HEAD[] =
    "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n";
static const char MODELS[] =
    "{\"object\":\"list\",\"data\":[{\"id\":\"bench\",\"object\":\"model\",\"created\":1,\"owned_by\":\"vllm\",\"root\":\"bench\","
    "\"max_model_len\":8192}]}";
static const char INFO[] = "{\"model_path\":\"bench\",\"served_model_name\":\"bench\",\"tokenizer_path\":\"\",\"is_generation\":true}";

static long long now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static void watch(struct conn *c, int change, int writing)
{
    struct epoll_event e = {.events = EPOLLIN | (writing ? EPOLLOUT : 0), .data.ptr = c};
    epoll_ctl(poller, change, c->fd, &e);
}

static void flush(struct conn *c)
{
    while (c->out_at < c->out_end) {
        ssize_t sent = write(c->fd, c->out + c->out_at, c->out_end - c->out_at);
        if (sent < 0) {
            if (errno == EAGAIN)
                watch(c, EPOLL_CTL_MOD, 1);
            else
                c->closing = 1;
            return;
        }
        c->out_at += sent;
    }
    c->out_at = c->out_end = 0;
}

static void say(struct conn *c, const char *data, size_t length)
{
    if (c->out_end + length > sizeof c->out) {
        c->closing = 1;
        return;
    }
    memcpy(c->out + c->out_end, data, length);
    c->out_end += length;
}

static void say_chunk(struct conn *c, const char *data, size_t length)
{
    char size[16];
    say(c, size, sprintf(size, "%zx\r\n", length));
    say(c, data, length);
    say(c, "\r\n", 2);
}

static void say_json(struct conn *c, const char *body)
{
    char head[128];
    say(c, head, sprintf(head, "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %zu\r\n\r\n", strlen(body)));
    say(c, body, strlen(body));
}

static void unlist(struct conn *c)
{
    if (c->slot >= 0) {
        streams[c->slot] = streams[--stream_count];
        streams[c->slot]->slot = c->slot;
        c->slot = -1;
    }
    c->left = -1;
}

static void step(struct conn *c, long long now)
{
    while (c->left >= 0 && c->due <= now && c->out_end == 0 && !c->closing) {
        say_chunk(c, EVENT, sizeof EVENT - 1);
        c->due += interval_ns;
        if (--c->left <= 0) {
            say_chunk(c, LAST, sizeof LAST - 1);
            say(c, "0\r\n\r\n", 5);
            unlist(c);
        }
        flush(c);
    }
}

static int has(const char *in, size_t length, const char *what) { return memmem(in, length, what, strlen(what)) != NULL; }

static long number_after(const char *in, size_t length, const char *what, long otherwise)
{
    const char *at = memmem(in, length, what, strlen(what));
    return at ? atol(at + strlen(what)) : otherwise;
}

static void answer(struct conn *c, const char *body, size_t length)
{
    if (!strncmp(c->in, "GET ", 4)) {
        const char *end = strstr(c->in, "\r\n");
        size_t line = end - c->in;
        say_json(c, has(c->in, line, "/models") ? MODELS : has(c->in, line, "info") ? INFO : "{}");
    } else if (has(body, length, "\"stream\":true") || has(body, length, "\"stream\": true")) {
        say(c, STREAM_HEAD, sizeof STREAM_HEAD - 1);
        c->left = number_after(body, length, "\"max_tokens\":", 100);
        c->due = now_ns() + first_ns;
        c->slot = stream_count;
        streams[stream_count++] = c;
    } else
        say_json(c, WHOLE);
    flush(c);
}

/* Bytes of the first request in the buffer, 0 if it is not whole yet. */
static size_t whole_request(struct conn *c, char **body, size_t *length)
{
    char *end = memmem(c->in, c->held, "\r\n\r\n", 4);
    if (!end)
        return 0;
    *body = end + 4;
    size_t head = *body - c->in;
    end[2] = 0; /* the head is text from here on */
    char *field = strcasestr(c->in, "\r\ncontent-length:");
    char *chunked = strcasestr(c->in, "\r\ntransfer-encoding: chunked");
    end[2] = '\r';
    if (chunked) {
        char *last = memmem(*body, c->held - head, "\r\n0\r\n\r\n", 7);
        *length = last ? last + 7 - *body : 0;
        return last ? head + *length : 0;
    }
    *length = field ? strtoul(field + 17, NULL, 10) : 0;
    return c->held >= head + *length ? head + *length : 0;
}

static void drop(struct conn *c)
{
    unlist(c);
    close(c->fd);
    free(c->in);
    free(c);
}

/* Bytes that were read, 0 if there are none; closes what is at its end. */
static size_t read_some(struct conn *c, char *to, size_t most)
{
    ssize_t got = read(c->fd, to, most < READ_BYTES ? most : READ_BYTES);
    if (got > 0)
        return got;
    c->closing = got == 0 || errno != EAGAIN;
    return 0;
}

static void throw_away(struct conn *c)
{
    static char nowhere[READ_BYTES];
    c->unread -= read_some(c, nowhere, c->unread);
    if (!c->unread) {
        char *body = memmem(c->in, c->held, "\r\n\r\n", 4) + 4;
        answer(c, body, LOOKED_AT);
        c->held = 0;
    }
}

static void take(struct conn *c)
{
    if (c->unread) {
        throw_away(c);
        return;
    }
    if (c->room - c->held < READ_BYTES) {
        c->room = c->room ? c->room * 2 : 8192 + READ_BYTES;
        c->in = realloc(c->in, c->room + 1);
    }
    size_t got = read_some(c, c->in + c->held, c->room - c->held);
    if (!got)
        return;
    c->held += got;
    char *body = NULL;
    size_t length = 0, used;
    while (c->held && c->left < 0 && (used = whole_request(c, &body, &length)) > 0) {
        answer(c, body, length);
        c->held -= used;
        memmove(c->in, c->in + used, c->held);
        body = NULL;
    }
    if (body && length > LARGE_BODY && c->left < 0 && c->held >= (size_t)(body - c->in) + LOOKED_AT)
        c->unread = (body - c->in) + length - c->held;
    if (c->held > MOST_IN)
        c->closing = 1;
    if (!c->held && c->room > (1u << 20)) {
        free(c->in);
        c->in = NULL;
        c->room = 0;
    }
}

static void welcome(int listener)
{
    int fd, one = 1;
    while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
        struct conn *c = calloc(1, sizeof *c);
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        c->fd = fd;
        c->slot = -1;
        c->left = -1;
        watch(c, EPOLL_CTL_ADD, 0);
    }
}

int main(int count, char **words)
{
    if (count != 4)
        return fprintf(stderr, "usage: engine PORT INTERVAL_US FIRST_US\n"), 2;
    signal(SIGPIPE, SIG_IGN);
    interval_ns = atoll(words[2]) * 1000;
    first_ns = atoll(words[3]) * 1000;
    int one = 1, listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(atoi(words[1])), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(listener, (void *)&address, sizeof address) || listen(listener, 4096))
        return perror("engine"), 1;
    poller = epoll_create1(0);
    int timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK), ticking = 0;
    struct epoll_event of_listener = {.events = EPOLLIN, .data.ptr = &listener}, of_timer = {.events = EPOLLIN, .data.ptr = &timer};
    epoll_ctl(poller, EPOLL_CTL_ADD, listener, &of_listener);
    epoll_ctl(poller, EPOLL_CTL_ADD, timer, &of_timer);
    struct epoll_event events[256];
    for (;;) {
        int ready = epoll_wait(poller, events, 256, -1);
        for (int i = 0; i < ready; i++) {
            struct conn *c = events[i].data.ptr;
            if (events[i].data.ptr == &listener) {
                welcome(listener);
            } else if (events[i].data.ptr == &timer) {
                unsigned long long ticks;
                (void)!read(timer, &ticks, sizeof ticks);
                long long now = now_ns();
                for (int s = stream_count - 1; s >= 0; s--)
                    step(streams[s], now);
            } else {
                if ((events[i].events & EPOLLOUT) && !c->closing) {
                    watch(c, EPOLL_CTL_MOD, 0);
                    flush(c);
                }
                if (events[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR))
                    take(c);
                if (c->closing)
                    drop(c);
            }
        }
        if (ticking != (stream_count > 0)) {
            ticking = stream_count > 0;
            struct itimerspec every = {.it_interval.tv_nsec = ticking ? TICK_NS : 0, .it_value.tv_nsec = ticking ? TICK_NS : 0};
            timerfd_settime(timer, 0, &every, NULL);
        }
    }
}
