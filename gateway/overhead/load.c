/* A client that costs next to nothing, for measuring what it asks: one thread, epoll.

   load closed PORT CONNECTIONS SECONDS REQUEST         every connection asks again as soon as it is answered
   load open PORT PORT REQUEST REQUEST < PLAN           requests at their times, whatever became of those before

   REQUEST is a file with the bytes of one request. A line of PLAN is a time in microseconds and 0 or 1, which of the two it is. `closed` prints one JSON
   object. `open` prints a line per request: its number, 0 or 1, then microseconds: how late it was sent; from its time to the first content; to the end;
   what x-sliceway-overhead-ms says, -1 where it is not there; and every gap between reads that brought events. A request that failed has `error` after its number and way. */
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

#define MOST_GAPS 4096
#define PATIENCE_NS 60000000000LL

struct request {
    char *bytes;
    size_t length;
    int port;
};

struct client {
    int fd, way, number; /* number: of the request under way, -1: none */
    struct client *next; /* the next idle one */
    long long due, sent, first, last;
    int status, chunked, in_head, over;
    long long left; /* of a body with a length, or of a chunk; -1: a chunk's size comes next; -2: its line is being read */
    int matched, said_done, says;
    long size;
    char head[16384];
    int head_length;
    int gap_count;
    int gaps[MOST_GAPS];
};

static struct request requests[2];
static struct client *idle[2];
static int poller, closed_loop, under_way;
static long long end_ns;
static long answered, failed, events_seen, capacity;
static int *firsts, *wholes;

static long long now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static struct request load(const char *path, int port)
{
    struct request r = {.port = port};
    FILE *file = fopen(path, "rb");
    if (!file)
        exit((perror(path), 2));
    fseek(file, 0, SEEK_END);
    r.length = ftell(file);
    rewind(file);
    r.bytes = malloc(r.length);
    if (fread(r.bytes, 1, r.length, file) != r.length)
        exit(2);
    fclose(file);
    return r;
}

static void reconnect(struct client *c)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(requests[c->way].port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int one = 1;
    if (c->fd >= 0)
        close(c->fd);
    c->fd = socket(AF_INET, SOCK_STREAM, 0);
    if (c->fd < 0 || connect(c->fd, (void *)&address, sizeof address))
        exit((perror("connect"), 3));
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    struct epoll_event e = {.events = EPOLLIN, .data.ptr = c};
    epoll_ctl(poller, EPOLL_CTL_ADD, c->fd, &e);
}

static struct client *connected(int way)
{
    struct client *c = calloc(1, sizeof *c);
    c->way = way;
    c->number = c->fd = -1;
    reconnect(c);
    return c;
}

static void ask(struct client *c, int number, long long due)
{
    struct request *r = &requests[c->way];
    c->number = number;
    c->due = due;
    c->sent = now_ns();
    c->first = c->last = 0;
    c->status = c->chunked = c->over = c->matched = c->said_done = c->head_length = c->gap_count = 0;
    c->in_head = 1;
    c->left = 0;
    under_way++;
    for (size_t at = 0; at < r->length;) {
        ssize_t sent = write(c->fd, r->bytes + at, r->length - at);
        if (sent <= 0)
            return; /* the read that follows finds the connection closed */
        at += sent;
    }
}

static void content(struct client *c, const char *data, size_t length, int *seen)
{
    static const char WORD[] = "data: ", DONE[] = "[DONE]";
    for (size_t i = 0; i < length; i++) {
        if (data[i] == WORD[c->matched]) {
            if (!WORD[++c->matched]) {
                c->matched = 0;
                (*seen)++;
            }
        } else
            c->matched = data[i] == WORD[0];
    }
    if (length >= 8 && memmem(data + (length > 64 ? length - 64 : 0), length > 64 ? 64 : length, DONE, 6))
        c->said_done = 1;
}

/* Take what follows the head. */
static void body(struct client *c, const char *data, size_t length, int *seen)
{
    while (length && !c->over) {
        if (c->left > 0) {
            size_t here = (size_t)c->left < length ? (size_t)c->left : length;
            content(c, data, here, seen);
            c->left -= here;
            data += here;
            length -= here;
            if (!c->left && !c->chunked)
                c->over = 1;
            else if (!c->left)
                c->left = -1, c->size = -1;
            continue;
        }
        char byte = *data++;
        length--;
        if (byte == '\n') {
            if (c->size == 0) {
                c->left = -3; /* the empty line after the last chunk */
                c->size = -2;
            } else if (c->size > 0)
                c->left = c->size;
            else if (c->left == -3)
                c->over = 1;
        } else if (byte != '\r' && c->left != -3) {
            int digit = byte <= '9' ? byte - '0' : (byte | 32) - 'a' + 10;
            c->size = (c->size < 0 ? 0 : c->size) * 16 + digit;
        }
    }
}

static int compare(const void *a, const void *b) { return *(const int *)a - *(const int *)b; }

static void note(struct client *c, int good, long long now)
{
    under_way--;
    if (!good) {
        failed++;
        if (!closed_loop)
            printf("%d %d error status %d\n", c->number, c->way, c->status);
        else if (failed == 1)
            fprintf(stderr, "first failure: %.*s\n", c->head_length, c->head);
        return;
    }
    answered++;
    if (!closed_loop) {
        printf("%d %d %lld %lld %lld %d", c->number, c->way, (c->sent - c->due) / 1000, (c->first - c->due) / 1000, (now - c->due) / 1000,
               c->says);
        for (int i = 0; i < c->gap_count; i++)
            printf(" %d", c->gaps[i]);
        putchar('\n');
    } else {
        if (answered > capacity) {
            capacity = capacity ? capacity * 2 : 4096;
            firsts = realloc(firsts, capacity * sizeof *firsts);
            wholes = realloc(wholes, capacity * sizeof *wholes);
        }
        firsts[answered - 1] = (c->first - c->due) / 1000;
        wholes[answered - 1] = (now - c->due) / 1000;
    }
}

static void finish(struct client *c, int good, long long now)
{
    int broken = !good;
    note(c, good, now);
    c->number = -1;
    if (broken)
        reconnect(c);
    if (!closed_loop) {
        c->next = idle[c->way];
        idle[c->way] = c;
    } else if (now < end_ns)
        ask(c, 0, now_ns());
}

static void hear(struct client *c)
{
    static char data[1 << 18];
    ssize_t got = recv(c->fd, data, sizeof data, MSG_DONTWAIT);
    long long now = now_ns();
    if (got < 0 && errno == EAGAIN)
        return;
    if (got <= 0 || c->number < 0) {
        if (c->number >= 0)
            finish(c, 0, now);
        else
            reconnect(c); /* an idle one that was closed */
        return;
    }
    char *rest = data;
    size_t length = got;
    int seen = 0;
    if (c->in_head) {
        size_t room = sizeof c->head - 1 - c->head_length, taken = length < room ? length : room;
        memcpy(c->head + c->head_length, data, taken);
        int before = c->head_length;
        c->head_length += taken;
        c->head[c->head_length] = 0;
        char *end = strstr(c->head, "\r\n\r\n");
        if (!end)
            return;
        c->in_head = 0;
        c->status = atoi(c->head + 9);
        int head = end + 4 - c->head;
        *end = 0;
        char *field = strcasestr(c->head, "\r\ncontent-length:");
        c->chunked = strcasestr(c->head, "\r\ntransfer-encoding: chunked") != NULL;
        char *says = strcasestr(c->head, "\r\nx-sliceway-overhead-ms:");
        c->says = says ? (int)(atof(says + 25) * 1000) : -1;
        *end = '\r';
        c->left = c->chunked ? -1 : field ? atoll(field + 17) : 0;
        c->size = -1;
        c->over = !c->chunked && !c->left;
        rest = data + (head - before);
        length -= head - before;
    }
    body(c, rest, length, &seen);
    events_seen += seen;
    if (length && !c->first)
        c->first = now;
    if (seen && c->last && c->gap_count < MOST_GAPS && !closed_loop)
        c->gaps[c->gap_count++] = (now - c->last) / 1000;
    if (seen)
        c->last = now;
    if (c->over)
        finish(c, c->status == 200 && (!c->chunked || c->said_done), now);
}

static int pump(int timeout_ms)
{
    struct epoll_event ready[512];
    int count = epoll_wait(poller, ready, 512, timeout_ms), timers = 0;
    for (int i = 0; i < count; i++) {
        if (ready[i].data.ptr)
            hear(ready[i].data.ptr);
        else
            timers++;
    }
    return timers;
}

static int closed(int connections, double seconds)
{
    struct client **all = calloc(connections, sizeof *all);
    for (int i = 0; i < connections; i++)
        all[i] = connected(0);
    long long start = now_ns();
    end_ns = start + (long long)(seconds * 1e9);
    for (int i = 0; i < connections; i++)
        ask(all[i], 0, now_ns());
    while (now_ns() < end_ns)
        pump(50);
    double took = (now_ns() - start) / 1e9;
    qsort(firsts, answered, sizeof *firsts, compare);
    qsort(wholes, answered, sizeof *wholes, compare);
#define AT(values, share) (answered ? values[(long)((answered - 1) * (share))] : 0)
    printf("{\"requests\":%ld,\"events\":%ld,\"errors\":%ld,\"seconds\":%.6f,\"first_p50_us\":%d,\"first_p99_us\":%d,\"whole_p50_us\":%d,"
           "\"whole_p99_us\":%d,\"unfinished\":%d}\n",
           answered, events_seen, failed, took, AT(firsts, .5), AT(firsts, .99), AT(wholes, .5), AT(wholes, .99), under_way);
    return 0;
}

static int open_loop(void)
{
    int timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC), way, number = 0, planned = 1;
    struct epoll_event e = {.events = EPOLLIN, .data.ptr = NULL};
    epoll_ctl(poller, EPOLL_CTL_ADD, timer, &e);
    long long at, start = now_ns() + 50000000, last = start;
    planned = scanf("%lld %d", &at, &way) == 2;
    while (planned || under_way) {
        if (planned) {
            long long due = start + at * 1000;
            if (now_ns() >= due) {
                struct client *c = idle[way];
                if (c)
                    idle[way] = c->next;
                else
                    c = connected(way);
                ask(c, number++, due);
                last = due;
                planned = scanf("%lld %d", &at, &way) == 2;
                continue;
            }
            struct itimerspec then = {.it_value = {due / 1000000000, due % 1000000000}};
            timerfd_settime(timer, TFD_TIMER_ABSTIME, &then, NULL);
        }
        if (pump(planned ? -1 : 100)) {
            unsigned long long ticks;
            (void)!read(timer, &ticks, sizeof ticks);
        }
        if (!planned && now_ns() > last + PATIENCE_NS)
            return fprintf(stderr, "%d requests are not answered\n", under_way), 4;
    }
    return 0;
}

int main(int count, char **words)
{
    signal(SIGPIPE, SIG_IGN);
    poller = epoll_create1(0);
    if (count == 6 && !strcmp(words[1], "closed")) {
        closed_loop = 1;
        requests[0] = load(words[5], atoi(words[2]));
        return closed(atoi(words[3]), atof(words[4]));
    }
    if (count == 6 && !strcmp(words[1], "open")) {
        requests[0] = load(words[4], atoi(words[2]));
        requests[1] = load(words[5], atoi(words[3]));
        return open_loop();
    }
    return fprintf(stderr, "usage: load closed PORT CONNECTIONS SECONDS REQUEST | load open PORT PORT REQUEST REQUEST < PLAN\n"), 2;
}
