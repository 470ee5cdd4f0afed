/*
 * An NVML that has no hardware behind it.
 *
 * Built as libnvidia-ml.so.1, this file answers the calls that sliceway, nvidia-ml-py and vLLM make, the way nvml.h
 * documents them and published transcripts show them: MIG mode with a pending state, GPU and compute instances with
 * placement and capacity, MIG device handles, memory, processes, privileges, events. It knows no products: a machine
 * description, written by placement/simulator/machine.py from the catalogue, says everything that is particular.
 *
 * One machine is one state file. Every process maps it and takes an exclusive flock on a descriptor of its own for the
 * length of a call, which keeps processes, threads and forked children apart and dies with whoever holds it.
 *
 * Environment of a process that uses it:
 *   SLICEWAY_NVML_STATE      the state file; without it nvmlInit says that no driver is loaded
 *   SLICEWAY_NVML_PRIVILEGE  root, config (create and destroy), monitor (enumerate all) or none; else the machine's own
 *
 * The sliceway_sim_* functions at the end are not NVML's: they make a machine, put processes on it and break it.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define API __attribute__((visibility("default")))

/* ---------------------------------------------------------------- NVML's vocabulary (nvml.h, by value) */

typedef enum {
    OK = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NO_PERMISSION = 4, NOT_FOUND = 6,
    INSUFFICIENT_SIZE = 7, DRIVER_NOT_LOADED = 9, TIMEOUT = 10, GPU_IS_LOST = 15, RESET_REQUIRED = 16, IN_USE = 19,
    INSUFFICIENT_RESOURCES = 23, ARGUMENT_VERSION_MISMATCH = 25, UNKNOWN = 999
} ret_t;

enum { EVENT_XID = 0x8, EVENT_MIG_CONFIG = 0x100, EVENTS_SUPPORTED = 0x1 | 0x2 | 0x8 | 0x100 };
enum { FIELD_RESETLESS_MIG = 184, FIELD_RECOVERY = 230, RECOVERY_SINCE_DRIVER = 560 };
enum { RECOVERY_NONE, RECOVERY_RESET, RECOVERY_REBOOT };
enum { GI_ENUMS = 0x12, CI_ENUMS = 0x9, NAME_SIZE = 96 };
#define NO_INSTANCE 0xFFFFFFFFu
#define VERSION_OF(type, number) ((unsigned)sizeof(type) | (number) << 24)

typedef struct handle *nvmlDevice_t;
typedef struct handle *nvmlGpuInstance_t;
typedef struct handle *nvmlComputeInstance_t;
typedef struct event_set *nvmlEventSet_t;

typedef struct { unsigned long long total, free, used; } memory_v1;
typedef struct { unsigned version; unsigned long long total, reserved, free, used; } memory_v2;
typedef struct { unsigned start, size; } placement_t;
typedef struct { unsigned pid; unsigned long long memory; unsigned gi, ci; } process_info;
typedef struct { unsigned gpu, memory; } utilization_t;
typedef struct { nvmlDevice_t device; unsigned long long type, data; unsigned gi, ci; } event_data;
typedef struct { nvmlDevice_t device; unsigned id, profile_id; placement_t placement; } gi_info;
typedef struct { nvmlDevice_t device; nvmlGpuInstance_t gi; unsigned id, profile_id; placement_t placement; } ci_info;
typedef struct {
    unsigned id, p2p, slices, instances, sms, copy, decoder, encoder, jpeg, ofa;
    unsigned long long memory_mb;
} gi_profile_v1;
typedef struct {
    unsigned version, id, p2p, slices, instances, sms, copy, decoder, encoder, jpeg, ofa;
    unsigned long long memory_mb;
    char name[NAME_SIZE];
} gi_profile_v2;
typedef struct {
    unsigned version, id, slices, instances, sms, copy, decoder, encoder, jpeg, ofa;
    unsigned long long memory_mb;
    char name[NAME_SIZE];
    unsigned capabilities;
} gi_profile_v3;
typedef struct { unsigned id, slices, instances, sms, copy, decoder, encoder, jpeg, ofa; } ci_profile_v1;
typedef struct {
    unsigned version, id, slices, instances, sms, copy, decoder, encoder, jpeg, ofa;
    char name[NAME_SIZE];
} ci_profile_v2;
typedef struct {
    unsigned version, id, slices, instances, sms, copy, decoder, encoder, jpeg, ofa;
    char name[NAME_SIZE];
    unsigned capabilities;
} ci_profile_v3;
typedef struct {
    unsigned sms, copy, decoder, encoder, jpeg, ofa, gi_slices, ci_slices;
    unsigned long long memory_mb;
} attributes_t;
typedef struct {
    char bus_id_legacy[16];
    unsigned domain, bus, device, pci_device_id, pci_subsystem_id;
    char bus_id[32];
} pci_info;
typedef struct {
    unsigned field, scope;
    long long timestamp, latency;
    unsigned value_type;
    int result;
    union { double d; unsigned u; unsigned long ul; unsigned long long ull; } value;
} field_value;

/* ---------------------------------------------------------------- the machine, as it lies in the state file */

enum {
    MAX_PRODUCTS = 8, MAX_PROFILES = 20, MAX_PLACES = 16, MAX_GPUS = 32, MAX_GIS = 16, MAX_CIS = 8,
    MAX_PROCESSES = 1024, MAX_FAULTS = 64, MAX_EVENTS = 256, CPU_WORDS = 16
};
enum { MEDIA_PLAIN = 0, MEDIA_ME = 1, MEDIA_ALL = 2, MEDIA_NONE = 3 };
enum { PRIVILEGE_NONE, PRIVILEGE_MONITOR, PRIVILEGE_CONFIG, PRIVILEGE_ROOT };
enum { KIND_COMPUTE, KIND_GRAPHICS, KIND_MPS, KIND_CLIENT };
#define MAGIC 0x534c4357u
#define LAYOUT_VERSION 1u
#define MIB (1024ull * 1024ull)

struct place { unsigned start; unsigned long long memory_mb; };
struct profile {
    char name[32];
    unsigned id, nvml_enum, g, size, sms, max, media, copy, decoder, encoder, jpeg, ofa, p2p, gfx;
    unsigned long long memory_mb;
    unsigned places;
    struct place place[MAX_PLACES];   /* in the order in which the driver tries them */
};
struct product {
    char name[NAME_SIZE];
    unsigned pci_device_id, architecture, cc_major, cc_minor, brand, cores;
    unsigned memory_slices, compute_slices, mig, needs_reset;
    unsigned long long memory_mb, reserved_mb, instance_used_mb;
    unsigned profiles;
    struct profile profile[MAX_PROFILES];
};
struct ci { unsigned used, id, slices, start; uint64_t serial; char uuid[48]; };
struct gi { unsigned used, id, profile, place; uint64_t serial; struct ci ci[MAX_CIS]; };
struct gpu {
    char uuid[48], serial_number[32];
    unsigned product, minor, domain, bus, numa, mig_current, mig_pending, lost, persistence, compute_mode, display, ecc;
    unsigned temperature_c, power_mw;
    unsigned long long ecc_corrected, ecc_uncorrected;
    uint64_t cpus[CPU_WORDS];
    unsigned next_gi_id;
    struct gi gi[MAX_GIS];
};
struct process {
    unsigned used, kind, gpu, gi, ci, pid, ghost;
    unsigned long long memory, start_time;
    char name[64];
};
struct fault { unsigned used; int gpu; unsigned skip, times, after, delay_ms; int code; char function[80]; };
struct event { uint64_t sequence; unsigned gpu, gi, ci; unsigned long long type, data; };
struct machine {
    unsigned magic, version, size, privilege, sequential_ids, stable_uuids;
    char driver[80], nvml[80];
    int cuda;
    uint64_t serial, events;
    unsigned products, gpus;
    struct product product[MAX_PRODUCTS];
    struct gpu gpu[MAX_GPUS];
    struct process process[MAX_PROCESSES];
    struct fault fault[MAX_FAULTS];
    struct event event[MAX_EVENTS];
};

/* ---------------------------------------------------------------- this process */

enum { HANDLE_GPU, HANDLE_MIG, HANDLE_GI, HANDLE_CI };
struct handle { unsigned kind, gpu, slot, sub; uint64_t serial; };

/* Handles are addresses in these tables, so that the same device always has the same handle and a MIG handle is its
 * index: after a change it may stand for another device, which nvml.h warns of and callers must survive. */
static struct handle gpu_handles[MAX_GPUS];
static struct handle mig_handles[MAX_GPUS][MAX_GIS * MAX_CIS];
static struct handle gi_handles[MAX_GPUS][MAX_GIS];
static struct handle ci_handles[MAX_GPUS][MAX_GIS][MAX_CIS];

static pthread_mutex_t init_mutex = PTHREAD_MUTEX_INITIALIZER;
static struct machine *machine;
static char state_path[4096];
static unsigned references;
static __thread int lock_descriptor = -1;
static __thread struct fault pending_fault;

struct target { struct gpu *gpu; struct product *product; struct gi *gi; struct ci *ci; unsigned index; };
struct event_set { unsigned long long wanted[MAX_GPUS]; uint64_t cursor; };

static struct machine *map_state(const char *path, int *descriptor)
{
    struct stat status;
    struct machine *mapped = NULL;
    int fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0)
        return NULL;
    if (fstat(fd, &status) == 0 && (size_t)status.st_size == sizeof(struct machine))
        mapped = mmap(NULL, sizeof(struct machine), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (mapped == MAP_FAILED)
        mapped = NULL;
    if (mapped && (mapped->magic != MAGIC || mapped->version != LAYOUT_VERSION || mapped->size != sizeof(struct machine))) {
        munmap(mapped, sizeof(struct machine));
        mapped = NULL;
    }
    if (mapped && descriptor)
        *descriptor = fd;
    else
        close(fd);
    return mapped;
}

static void unlock(void)
{
    if (lock_descriptor >= 0)
        close(lock_descriptor);
    lock_descriptor = -1;
}

static int lock(void)
{
    int fd = open(state_path, O_RDWR | O_CLOEXEC);
    if (fd < 0)
        return -1;
    while (flock(fd, LOCK_EX) != 0)
        if (errno != EINTR) {
            close(fd);
            return -1;
        }
    lock_descriptor = fd;
    return 0;
}

static unsigned privilege(void)
{
    static const char *const names[] = {"none", "monitor", "config", "root"};
    const char *own = getenv("SLICEWAY_NVML_PRIVILEGE");
    for (unsigned level = 0; own && level < 4; level++)
        if (strcmp(own, names[level]) == 0)
            return level;
    return machine->privilege;
}

static void journal(const char *format, ...)
{
    char path[sizeof(state_path) + 16], line[512];
    va_list arguments;
    snprintf(path, sizeof(path), "%s.journal", state_path);
    int fd = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
    if (fd < 0)
        return;
    va_start(arguments, format);
    int length = vsnprintf(line, sizeof(line) - 1, format, arguments);
    va_end(arguments);
    line[length] = '\n';
    if (write(fd, line, (size_t)length + 1) < 0) { /* the journal is a convenience of tests */ }
    close(fd);
}

/* ---------------------------------------------------------------- faults that were ordered */

static int matches(const char *pattern, const char *function)
{
    size_t length = strlen(pattern);
    if (length && pattern[length - 1] == '*')
        return strncmp(pattern, function, length - 1) == 0;
    return strcmp(pattern, function) == 0;
}

static void find_fault(const char *function, int gpu)
{
    memset(&pending_fault, 0, sizeof(pending_fault));
    for (int i = 0; i < MAX_FAULTS; i++) {
        struct fault *f = &machine->fault[i];
        if (!f->used || !matches(f->function, function) || (f->gpu >= 0 && f->gpu != gpu))
            continue;
        if (f->skip) {
            f->skip--;
            continue;
        }
        pending_fault = *f;
        if (f->times && --f->times == 0)
            f->used = 0;
        return;
    }
}

/* Carries out the pending fault; the lock is not held, so a process that dies or sleeps here blocks nobody. */
static ret_t strike(ret_t otherwise)
{
    struct fault f = pending_fault;
    pending_fault.used = 0;
    if (f.delay_ms) {
        struct timespec pause = {f.delay_ms / 1000, (long)(f.delay_ms % 1000) * 1000000};
        nanosleep(&pause, NULL);
    }
    if (f.code < 0)
        kill(getpid(), -f.code);
    return f.code > 0 ? (ret_t)f.code : otherwise;
}

/* Ends a call: every way out of an API function goes through here. */
static ret_t end(ret_t result)
{
    unlock();
    return pending_fault.used && pending_fault.after ? strike(result) : result;
}

/* ---------------------------------------------------------------- finding things */

static struct product *product_of(const struct gpu *gpu) { return &machine->product[gpu->product]; }
static struct profile *profile_of(const struct gpu *gpu, const struct gi *gi) { return &product_of(gpu)->profile[gi->profile]; }
static unsigned gpu_number(const struct gpu *gpu) { return (unsigned)(gpu - machine->gpu); }
static const struct place *place_of(const struct gpu *gpu, const struct gi *gi) { return &profile_of(gpu, gi)->place[gi->place]; }

static struct gi *gi_by_id(struct gpu *gpu, unsigned id)
{
    for (int i = 0; i < MAX_GIS; i++)
        if (gpu->gi[i].used && gpu->gi[i].id == id)
            return &gpu->gi[i];
    return NULL;
}

static struct ci *ci_by_id(struct gi *gi, unsigned id)
{
    for (int i = 0; i < MAX_CIS; i++)
        if (gi->ci[i].used && gi->ci[i].id == id)
            return &gi->ci[i];
    return NULL;
}

static struct gi *gi_after(struct gpu *gpu, int last)
{
    struct gi *next = NULL;
    for (int i = 0; i < MAX_GIS; i++) {
        struct gi *gi = &gpu->gi[i];
        if (gi->used && (int)gi->id > last && (!next || gi->id < next->id))
            next = gi;
    }
    return next;
}

/* MIG devices are numbered by GPU instance id, then compute instance id: the numbers shift when a lower id appears. */
static int mig_device(struct gpu *gpu, unsigned index, struct gi **gi, struct ci **ci)
{
    if (!gpu->mig_current)
        return 0;
    for (*gi = gi_after(gpu, -1); *gi; *gi = gi_after(gpu, (int)(*gi)->id))
        for (unsigned id = 0; id < MAX_CIS; id++) {
            *ci = ci_by_id(*gi, id);
            if (*ci && index-- == 0)
                return 1;
        }
    return 0;
}

static unsigned mig_index(struct gpu *gpu, const struct ci *wanted)
{
    struct gi *gi;
    struct ci *ci;
    for (unsigned index = 0; mig_device(gpu, index, &gi, &ci); index++)
        if (ci == wanted)
            return index;
    return 0;
}

static nvmlDevice_t gpu_handle(const struct gpu *gpu)
{
    struct handle *h = &gpu_handles[gpu_number(gpu)];
    h->kind = HANDLE_GPU;
    h->gpu = gpu_number(gpu);
    return h;
}

static nvmlDevice_t mig_handle(const struct gpu *gpu, unsigned index)
{
    struct handle *h = &mig_handles[gpu_number(gpu)][index];
    h->kind = HANDLE_MIG;
    h->gpu = gpu_number(gpu);
    h->slot = index;
    return h;
}

static nvmlGpuInstance_t gi_handle(const struct gpu *gpu, const struct gi *gi)
{
    unsigned slot = (unsigned)(gi - gpu->gi);
    struct handle *h = &gi_handles[gpu_number(gpu)][slot];
    h->kind = HANDLE_GI;
    h->gpu = gpu_number(gpu);
    h->slot = slot;
    h->serial = gi->serial;
    return h;
}

static nvmlComputeInstance_t ci_handle(const struct gpu *gpu, const struct gi *gi, const struct ci *ci)
{
    unsigned slot = (unsigned)(gi - gpu->gi), sub = (unsigned)(ci - gi->ci);
    struct handle *h = &ci_handles[gpu_number(gpu)][slot][sub];
    h->kind = HANDLE_CI;
    h->gpu = gpu_number(gpu);
    h->slot = slot;
    h->sub = sub;
    h->serial = ci->serial;
    return h;
}

static int is_handle(const struct handle *h)
{
    const char *p = (const char *)h;
#define WITHIN(table) (p >= (const char *)(table) && p < (const char *)(table) + sizeof(table))
    return WITHIN(gpu_handles) || WITHIN(mig_handles) || WITHIN(gi_handles) || WITHIN(ci_handles);
#undef WITHIN
}

static ret_t resolve(const struct handle *h, struct target *t)
{
    memset(t, 0, sizeof(*t));
    if (!is_handle(h) || h->gpu >= machine->gpus)
        return INVALID_ARGUMENT;
    t->gpu = &machine->gpu[h->gpu];
    t->product = product_of(t->gpu);
    t->index = h->slot;
    if (t->gpu->lost)
        return GPU_IS_LOST;
    if (h->kind == HANDLE_MIG)
        return mig_device(t->gpu, h->slot, &t->gi, &t->ci) ? OK : INVALID_ARGUMENT;
    if (h->kind == HANDLE_GI || h->kind == HANDLE_CI) {
        t->gi = &t->gpu->gi[h->slot];
        t->ci = h->kind == HANDLE_CI ? &t->gi->ci[h->sub] : NULL;
        uint64_t serial = t->ci ? t->ci->serial : t->gi->serial;
        if (!t->gi->used || (t->ci && !t->ci->used) || serial != h->serial)
            return INVALID_ARGUMENT;
    }
    return OK;
}

/* Begins a call that concerns no device. */
static ret_t begin_system(const char *function, int gpu)
{
    if (!machine)
        return UNINITIALIZED;
    if (lock() != 0)
        return DRIVER_NOT_LOADED;
    find_fault(function, gpu);
    if (pending_fault.used && !pending_fault.after) {
        unlock();
        ret_t result = strike(OK);
        if (result != OK)
            return result;
        return lock() == 0 ? OK : DRIVER_NOT_LOADED;
    }
    return OK;
}

/* Begins a call on `h`: locks, strikes if a fault was ordered, finds the device. On anything but OK nothing is held. */
static ret_t begin(const char *function, const struct handle *h, struct target *t, unsigned kinds)
{
    ret_t result = begin_system(function, is_handle(h) ? (int)h->gpu : -1);
    if (result != OK)
        return result;
    result = resolve(h, t);
    if (result == OK && !(kinds >> h->kind & 1))
        result = INVALID_ARGUMENT;
    if (result != OK)
        unlock();
    return result;
}

#define ANY_DEVICE (1u << HANDLE_GPU | 1u << HANDLE_MIG)
#define GPU_ONLY (1u << HANDLE_GPU)
#define BEGIN(handle, kinds)                                      \
    struct target t;                                              \
    do {                                                          \
        ret_t begun = begin(__func__, (handle), &t, (kinds));     \
        if (begun != OK)                                          \
            return begun;                                         \
    } while (0)
#define REQUIRE(condition, otherwise) do { if (!(condition)) return end(otherwise); } while (0)

/* ---------------------------------------------------------------- processes */

static unsigned long long start_time_of(unsigned pid, char *state)
{
    char path[64], text[1024];
    snprintf(path, sizeof(path), "/proc/%u/stat", pid);
    FILE *file = fopen(path, "re");
    *state = 0;
    if (!file)
        return 0;
    size_t length = fread(text, 1, sizeof(text) - 1, file);
    fclose(file);
    text[length] = 0;
    /* The command name may hold spaces and brackets: fields are counted from its last bracket. */
    char *field = strrchr(text, ')');
    if (!field)
        return 0;
    field += 2;
    *state = *field;
    for (int number = 3; field && number < 22; number++)
        field = strchr(field, ' ') ? strchr(field, ' ') + 1 : NULL;
    return field ? strtoull(field, NULL, 10) : 0;
}

static int alive(const struct process *p)
{
    char state;
    if (p->ghost)
        return 1;
    unsigned long long started = start_time_of(p->pid, &state);
    return started == p->start_time && state != 0 && state != 'Z' && state != 'X';
}

/* A process that ended has let go of the GPU, whatever ended it. */
static void prune(void)
{
    for (int i = 0; i < MAX_PROCESSES; i++)
        if (machine->process[i].used && !alive(&machine->process[i]))
            machine->process[i].used = 0;
}

static int on(const struct process *p, const struct target *t)
{
    return p->used && p->gpu == gpu_number(t->gpu) && (!t->gi || p->gi == t->gi->id) && (!t->ci || p->ci == t->ci->id);
}

static unsigned count_on(const struct target *t, int clients_too)
{
    unsigned count = 0;
    for (int i = 0; i < MAX_PROCESSES; i++)
        count += on(&machine->process[i], t) && (clients_too || machine->process[i].kind != KIND_CLIENT);
    return count;
}

static ret_t processes(const char *function, nvmlDevice_t device, unsigned kind, unsigned *count, process_info *infos)
{
    struct target t;
    ret_t result = begin(function, device, &t, ANY_DEVICE);
    if (result != OK)
        return result;
    REQUIRE(count && (infos || !*count), INVALID_ARGUMENT);
    REQUIRE(t.gi || !t.gpu->mig_current || privilege() >= PRIVILEGE_MONITOR, NO_PERMISSION);
    prune();
    unsigned found = 0, room = *count;
    for (int i = 0; i < MAX_PROCESSES; i++) {
        const struct process *p = &machine->process[i];
        if (!on(p, &t) || p->kind != kind)
            continue;
        if (found++ < room)
            infos[found - 1] = (process_info){p->pid, p->memory, p->gi, p->ci};
    }
    *count = found;
    return end(found > room ? INSUFFICIENT_SIZE : OK);
}

static unsigned long long memory_used(const struct target *t)
{
    struct target shared = *t;
    unsigned long long used = 0;
    shared.ci = NULL; /* compute instances of one GPU instance share its memory */
    prune();
    for (int i = 0; i < MAX_PROCESSES; i++)
        if (on(&machine->process[i], &shared))
            used += machine->process[i].memory;
    if (t->gi)
        return used + t->product->instance_used_mb * MIB;
    for (int i = 0; i < MAX_GIS; i++)
        used += t->gpu->gi[i].used ? t->product->instance_used_mb * MIB : 0;
    return used;
}

static unsigned long long memory_total(const struct target *t)
{
    return (t->gi ? place_of(t->gpu, t->gi)->memory_mb : t->product->memory_mb) * MIB;
}

static unsigned long long memory_reserved(const struct target *t)
{
    return t->gi ? 0 : t->product->reserved_mb * MIB;
}

/* ---------------------------------------------------------------- what may be created */

static unsigned long long mask(unsigned start, unsigned size) { return ((1ull << size) - 1) << start; }

static int media_conflict(const struct profile *a, const struct profile *b)
{
    int media_a = a->media == MEDIA_ME || a->media == MEDIA_ALL, media_b = b->media == MEDIA_ME || b->media == MEDIA_ALL;
    if (media_a && media_b)
        return 1;
    return (a->media == MEDIA_ALL && b->media != MEDIA_NONE) || (b->media == MEDIA_ALL && a->media != MEDIA_NONE);
}

static int fits(struct gpu *gpu, const struct profile *wanted, const struct place *place)
{
    unsigned g = wanted->g, same = 1;
    for (int i = 0; i < MAX_GIS; i++) {
        if (!gpu->gi[i].used)
            continue;
        const struct profile *other = profile_of(gpu, &gpu->gi[i]);
        if (mask(place->start, wanted->size) & mask(place_of(gpu, &gpu->gi[i])->start, other->size))
            return 0;
        if (media_conflict(wanted, other))
            return 0;
        g += other->g;
        same += other == wanted;
    }
    return g <= product_of(gpu)->compute_slices && same <= wanted->max;
}

static unsigned new_gi_id(struct gpu *gpu, const struct profile *wanted, const struct place *place)
{
    struct product *product = product_of(gpu);
    if (machine->sequential_ids) {
        while (gi_by_id(gpu, gpu->next_gi_id))
            gpu->next_gi_id = (gpu->next_gi_id + 1) % 4096;
        return gpu->next_gi_id++;
    }
    /* Published transcripts number instances like the nodes of a tree: the widest is 0, its halves 1 and 2, and so on. */
    unsigned base = 0;
    for (unsigned size = product->memory_slices; size > wanted->size; size /= 2)
        base += product->memory_slices / size;
    unsigned id = base + place->start / wanted->size;
    while (gi_by_id(gpu, id))
        id++;
    return id;
}

static uint64_t mix(uint64_t value, const char *text)
{
    for (; *text; text++)
        value = (value ^ (unsigned char)*text) * 1099511628211ull;
    value ^= value >> 29;
    return value * 0xbf58476d1ce4e5b9ull;
}

/* Looks like the name-based UUIDs that drivers give; new for each instance unless the machine says otherwise. */
static void new_uuid(char *out, const struct gpu *gpu, unsigned gi, unsigned ci)
{
    char name[128];
    unsigned long long salt = machine->stable_uuids ? 0 : (unsigned long long)machine->serial;
    snprintf(name, sizeof(name), "%s/%u/%u/%llu", gpu->uuid, gi, ci, salt);
    uint64_t high = mix(14695981039346656037ull, name), low = mix(high, name);
    high = (high & ~0xf000ull) | 0x5000ull;
    low = (low & ~(0xc0ull << 56)) | (0x80ull << 56);
    snprintf(out, 48, "MIG-%08x-%04x-%04x-%04x-%012llx", (unsigned)(high >> 32), (unsigned)(high >> 16 & 0xffff),
             (unsigned)(high & 0xffff), (unsigned)(low >> 48), (unsigned long long)(low & 0xffffffffffffull));
}

static void emit(const struct gpu *gpu, unsigned long long type, unsigned long long data, unsigned gi, unsigned ci)
{
    struct event *e = &machine->event[machine->events % MAX_EVENTS];
    *e = (struct event){++machine->events, gpu_number(gpu), gi, ci, type, data};
}

/* What the driver wants done after the GPU's XIDs since its last reset; most concern one application only. */
static unsigned recovery_of(const struct gpu *gpu)
{
    static const unsigned resets[] = {46, 48, 62, 64, 74, 95, 109, 119, 120, 140};
    unsigned wanted = RECOVERY_NONE;
    for (int i = 0; i < MAX_EVENTS; i++) {
        const struct event *e = &machine->event[i];
        if (e->type != EVENT_XID || e->gpu != gpu_number(gpu))
            continue;
        if (e->data == 79)
            return RECOVERY_REBOOT;
        for (size_t k = 0; k < sizeof(resets) / sizeof(resets[0]); k++)
            if (e->data == resets[k])
                wanted = RECOVERY_RESET;
    }
    return wanted;
}

static void forget_xids(const struct gpu *gpu)
{
    for (int i = 0; i < MAX_EVENTS; i++)
        if (machine->event[i].type == EVENT_XID && machine->event[i].gpu == gpu_number(gpu))
            machine->event[i].type = 0;
}

static ret_t create_gi(struct gpu *gpu, struct profile *profile, const struct place *place, nvmlGpuInstance_t *out)
{
    for (int i = 0; i < MAX_GIS; i++) {
        struct gi *gi = &gpu->gi[i];
        if (gi->used)
            continue;
        memset(gi, 0, sizeof(*gi));
        gi->id = new_gi_id(gpu, profile, place);
        gi->used = 1;
        gi->profile = (unsigned)(profile - product_of(gpu)->profile);
        gi->place = (unsigned)(place - profile->place);
        gi->serial = ++machine->serial;
        *out = gi_handle(gpu, gi);
        journal("create-gi gpu=%u gi=%u %s@%u", gpu_number(gpu), gi->id, profile->name, place->start);
        emit(gpu, EVENT_MIG_CONFIG, 0, gi->id, NO_INSTANCE);
        return OK;
    }
    return INSUFFICIENT_RESOURCES;
}

static struct profile *profile_by_id(struct product *product, unsigned id)
{
    for (unsigned i = 0; i < product->profiles; i++)
        if (product->profile[i].id == id)
            return &product->profile[i];
    return NULL;
}

static struct profile *profile_by_enum(struct product *product, unsigned nvml_enum)
{
    for (unsigned i = 0; i < product->profiles; i++)
        if (product->profile[i].nvml_enum == nvml_enum)
            return &product->profile[i];
    return NULL;
}

static unsigned remaining(struct gpu *gpu, struct profile *profile)
{
    struct gpu trial = *gpu;
    unsigned count = 0;
    for (unsigned start = 0; start < 64; start++)
        for (unsigned i = 0; i < profile->places; i++) {
            const struct place *place = &profile->place[i];
            struct gi *slot = NULL;
            for (int j = 0; j < MAX_GIS && !slot; j++)
                slot = trial.gi[j].used ? NULL : &trial.gi[j];
            if (place->start != start || !slot || !fits(&trial, profile, place))
                continue;
            slot->used = 1;
            slot->profile = (unsigned)(profile - product_of(gpu)->profile);
            slot->place = i;
            count++;
        }
    return count;
}

/* Compute instance profiles: the enum is also the id, for 1, 2, 3, 4 and 7 compute slices. */
static unsigned ci_slices(unsigned profile)
{
    static const unsigned slices[] = {1, 2, 3, 4, 7};
    return profile < 5 ? slices[profile] : 0;
}

static unsigned ci_profile(unsigned slices)
{
    for (unsigned profile = 0; profile < 5; profile++)
        if (ci_slices(profile) == slices)
            return profile;
    return 0;
}

static int ci_free(const struct gi *gi, unsigned start, unsigned slices)
{
    for (int i = 0; i < MAX_CIS; i++)
        if (gi->ci[i].used && mask(start, slices) & mask(gi->ci[i].start, gi->ci[i].slices))
            return 0;
    return 1;
}

static unsigned ci_sms(const struct profile *profile, unsigned slices)
{
    return slices == profile->g ? profile->sms : profile->sms * slices / profile->g;
}

static void ci_name(char *out, const struct profile *profile, unsigned slices)
{
    if (slices == profile->g)
        snprintf(out, NAME_SIZE, "%s", profile->name);
    else
        snprintf(out, NAME_SIZE, "%uc.%s", slices, profile->name);
}

static ret_t create_ci(struct target *t, unsigned slices, unsigned start, nvmlComputeInstance_t *out)
{
    for (unsigned id = 0; id < MAX_CIS; id++) {
        if (ci_by_id(t->gi, id))
            continue;
        for (int i = 0; i < MAX_CIS; i++) {
            struct ci *ci = &t->gi->ci[i];
            if (ci->used)
                continue;
            *ci = (struct ci){.used = 1, .id = id, .slices = slices, .start = start, .serial = ++machine->serial};
            new_uuid(ci->uuid, t->gpu, t->gi->id, id);
            *out = ci_handle(t->gpu, t->gi, ci);
            journal("create-ci gpu=%u gi=%u ci=%u %s@%u", gpu_number(t->gpu), t->gi->id, id, profile_of(t->gpu, t->gi)->name,
                    place_of(t->gpu, t->gi)->start);
            emit(t->gpu, EVENT_MIG_CONFIG, 0, t->gi->id, id);
            return OK;
        }
    }
    return INSUFFICIENT_RESOURCES;
}

static ret_t copy_text(char *out, unsigned length, const char *text)
{
    if (!out)
        return INVALID_ARGUMENT;
    if (strlen(text) >= length)
        return INSUFFICIENT_SIZE;
    memcpy(out, text, strlen(text) + 1);
    return OK;
}

/* ---------------------------------------------------------------- NVML: library and system */

API ret_t nvmlShutdown(void)
{
    ret_t result = OK;
    pthread_mutex_lock(&init_mutex);
    if (references == 0)
        result = UNINITIALIZED;
    else if (--references == 0) {
        munmap(machine, sizeof(struct machine));
        machine = NULL;
    }
    pthread_mutex_unlock(&init_mutex);
    return result;
}

API ret_t nvmlInitWithFlags(unsigned flags)
{
    (void)flags;
    ret_t result = OK;
    const char *path = getenv("SLICEWAY_NVML_STATE");
    pthread_mutex_lock(&init_mutex);
    if (references == 0) {
        machine = path && strlen(path) < sizeof(state_path) ? map_state(path, NULL) : NULL;
        if (machine)
            strcpy(state_path, path);
        else
            result = DRIVER_NOT_LOADED;
    }
    if (result == OK)
        references++;
    pthread_mutex_unlock(&init_mutex);
    if (result != OK)
        return result;
    result = begin_system("nvmlInit", -1);
    if (result == OK)
        result = end(OK);
    if (result != OK)
        nvmlShutdown(); /* only what succeeded is to be shut down */
    return result;
}

API ret_t nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
API ret_t nvmlInit(void) { return nvmlInitWithFlags(0); }

API const char *nvmlErrorString(int result)
{
    switch (result) {
    case OK: return "Success";
    case UNINITIALIZED: return "Uninitialized";
    case INVALID_ARGUMENT: return "Invalid Argument";
    case NOT_SUPPORTED: return "Not Supported";
    case NO_PERMISSION: return "Insufficient Permissions";
    case NOT_FOUND: return "Not Found";
    case INSUFFICIENT_SIZE: return "Insufficient Size";
    case DRIVER_NOT_LOADED: return "Driver Not Loaded";
    case TIMEOUT: return "Timeout";
    case GPU_IS_LOST: return "GPU is lost";
    case RESET_REQUIRED: return "GPU requires reset";
    case IN_USE: return "In use by another client";
    case INSUFFICIENT_RESOURCES: return "Insufficient Resources";
    case ARGUMENT_VERSION_MISMATCH: return "Argument version mismatch";
    default: return "Unknown Error";
    }
}

static ret_t system_text(const char *function, char *out, unsigned length, size_t field)
{
    ret_t result = begin_system(function, -1);
    return result == OK ? end(copy_text(out, length, (const char *)machine + field)) : result;
}

API ret_t nvmlSystemGetDriverVersion(char *out, unsigned length)
{
    return system_text(__func__, out, length, offsetof(struct machine, driver));
}

API ret_t nvmlSystemGetNVMLVersion(char *out, unsigned length)
{
    return system_text(__func__, out, length, offsetof(struct machine, nvml));
}

API ret_t nvmlSystemGetCudaDriverVersion_v2(int *version)
{
    ret_t result = begin_system(__func__, -1);
    if (result != OK)
        return result;
    REQUIRE(version, INVALID_ARGUMENT);
    *version = machine->cuda;
    return end(OK);
}

API ret_t nvmlSystemGetCudaDriverVersion(int *version) { return nvmlSystemGetCudaDriverVersion_v2(version); }

API ret_t nvmlSystemGetProcessName(unsigned pid, char *name, unsigned length)
{
    ret_t result = begin_system(__func__, -1);
    if (result != OK)
        return result;
    prune();
    for (int i = 0; i < MAX_PROCESSES; i++)
        if (machine->process[i].used && machine->process[i].pid == pid)
            return end(copy_text(name, length, machine->process[i].name));
    return end(NOT_FOUND);
}

/* ---------------------------------------------------------------- NVML: handles */

API ret_t nvmlDeviceGetCount_v2(unsigned *count)
{
    ret_t result = begin_system(__func__, -1);
    if (result != OK)
        return result;
    REQUIRE(count, INVALID_ARGUMENT);
    *count = machine->gpus;
    return end(OK);
}

API ret_t nvmlDeviceGetCount(unsigned *count) { return nvmlDeviceGetCount_v2(count); }

API ret_t nvmlDeviceGetHandleByIndex_v2(unsigned index, nvmlDevice_t *device)
{
    ret_t result = begin_system(__func__, (int)index);
    if (result != OK)
        return result;
    REQUIRE(device && index < machine->gpus, INVALID_ARGUMENT);
    REQUIRE(!machine->gpu[index].lost, GPU_IS_LOST);
    *device = gpu_handle(&machine->gpu[index]);
    return end(OK);
}

API ret_t nvmlDeviceGetHandleByIndex(unsigned index, nvmlDevice_t *device) { return nvmlDeviceGetHandleByIndex_v2(index, device); }

static ret_t handle_by_uuid(const char *uuid, nvmlDevice_t *device)
{
    char old[128];
    for (unsigned g = 0; g < machine->gpus; g++) {
        struct gpu *gpu = &machine->gpu[g];
        struct gi *gi;
        struct ci *ci;
        if (strcmp(uuid, gpu->uuid) == 0) {
            if (gpu->lost)
                return GPU_IS_LOST;
            *device = gpu_handle(gpu);
            return OK;
        }
        for (unsigned index = 0; mig_device(gpu, index, &gi, &ci); index++) {
            snprintf(old, sizeof(old), "MIG-%s/%u/%u", gpu->uuid, gi->id, ci->id);
            if (strcmp(uuid, ci->uuid) != 0 && strcmp(uuid, old) != 0)
                continue;
            if (gpu->lost)
                return GPU_IS_LOST;
            *device = mig_handle(gpu, index);
            return OK;
        }
    }
    return NOT_FOUND;
}

API ret_t nvmlDeviceGetHandleByUUID(const char *uuid, nvmlDevice_t *device)
{
    ret_t result = begin_system(__func__, -1);
    if (result != OK)
        return result;
    REQUIRE(uuid && device, INVALID_ARGUMENT);
    return end(handle_by_uuid(uuid, device));
}

API ret_t nvmlDeviceGetHandleByPciBusId_v2(const char *bus_id, nvmlDevice_t *device)
{
    unsigned domain, bus;
    ret_t result = begin_system(__func__, -1);
    if (result != OK)
        return result;
    REQUIRE(bus_id && device && sscanf(bus_id, "%x:%x:", &domain, &bus) == 2, INVALID_ARGUMENT);
    for (unsigned g = 0; g < machine->gpus; g++)
        if (machine->gpu[g].domain == domain && machine->gpu[g].bus == bus) {
            REQUIRE(!machine->gpu[g].lost, GPU_IS_LOST);
            *device = gpu_handle(&machine->gpu[g]);
            return end(OK);
        }
    return end(NOT_FOUND);
}

API ret_t nvmlDeviceGetHandleByPciBusId(const char *id, nvmlDevice_t *device) { return nvmlDeviceGetHandleByPciBusId_v2(id, device); }

API ret_t nvmlDeviceIsMigDeviceHandle(nvmlDevice_t device, unsigned *is_mig)
{
    BEGIN(device, ANY_DEVICE);
    REQUIRE(is_mig, INVALID_ARGUMENT);
    *is_mig = t.ci != NULL;
    return end(OK);
}

API ret_t nvmlDeviceGetMaxMigDeviceCount(nvmlDevice_t device, unsigned *count)
{
    BEGIN(device, GPU_ONLY);
    REQUIRE(count, INVALID_ARGUMENT);
    *count = t.gpu->mig_current ? t.product->compute_slices : 0;
    return end(OK);
}

API ret_t nvmlDeviceGetMigDeviceHandleByIndex(nvmlDevice_t device, unsigned index, nvmlDevice_t *mig)
{
    struct gi *gi;
    struct ci *ci;
    BEGIN(device, GPU_ONLY);
    REQUIRE(mig, INVALID_ARGUMENT);
    REQUIRE(t.product->mig, NOT_SUPPORTED);
    REQUIRE(index < t.product->compute_slices, INVALID_ARGUMENT);
    REQUIRE(mig_device(t.gpu, index, &gi, &ci), NOT_FOUND);
    *mig = mig_handle(t.gpu, index);
    return end(OK);
}

API ret_t nvmlDeviceGetDeviceHandleFromMigDeviceHandle(nvmlDevice_t mig, nvmlDevice_t *device)
{
    BEGIN(mig, ANY_DEVICE);
    REQUIRE(device && t.ci, INVALID_ARGUMENT);
    *device = gpu_handle(t.gpu);
    return end(OK);
}

API ret_t nvmlDeviceGetGpuInstanceId(nvmlDevice_t device, unsigned *id)
{
    BEGIN(device, ANY_DEVICE);
    REQUIRE(id && t.ci, INVALID_ARGUMENT);
    *id = t.gi->id;
    return end(OK);
}

API ret_t nvmlDeviceGetComputeInstanceId(nvmlDevice_t device, unsigned *id)
{
    BEGIN(device, ANY_DEVICE);
    REQUIRE(id && t.ci, INVALID_ARGUMENT);
    *id = t.ci->id;
    return end(OK);
}

/* ---------------------------------------------------------------- NVML: what a device is */

API ret_t nvmlDeviceGetName(nvmlDevice_t device, char *name, unsigned length)
{
    char instance[NAME_SIZE], full[2 * NAME_SIZE + 8];
    BEGIN(device, ANY_DEVICE);
    if (!t.ci)
        return end(copy_text(name, length, t.product->name));
    ci_name(instance, profile_of(t.gpu, t.gi), t.ci->slices);
    snprintf(full, sizeof(full), "%s MIG %s", t.product->name, instance);
    return end(copy_text(name, length, full));
}

API ret_t nvmlDeviceGetUUID(nvmlDevice_t device, char *uuid, unsigned length)
{
    BEGIN(device, ANY_DEVICE);
    return end(copy_text(uuid, length, t.ci ? t.ci->uuid : t.gpu->uuid));
}

API ret_t nvmlDeviceGetSerial(nvmlDevice_t device, char *serial, unsigned length)
{
    BEGIN(device, GPU_ONLY);
    return end(copy_text(serial, length, t.gpu->serial_number));
}

/* Within the parent for a MIG device, never a GPU's index. */
API ret_t nvmlDeviceGetIndex(nvmlDevice_t device, unsigned *index)
{
    BEGIN(device, ANY_DEVICE);
    REQUIRE(index, INVALID_ARGUMENT);
    *index = t.ci ? mig_index(t.gpu, t.ci) : gpu_number(t.gpu);
    return end(OK);
}

#define DEVICE_NUMBER(function, type, kinds, condition, otherwise, expression) \
    API ret_t function(nvmlDevice_t device, type *out)                         \
    {                                                                          \
        BEGIN(device, kinds);                                                  \
        REQUIRE(out, INVALID_ARGUMENT);                                        \
        REQUIRE(condition, otherwise);                                         \
        *out = (expression);                                                   \
        return end(OK);                                                        \
    }

DEVICE_NUMBER(nvmlDeviceGetMinorNumber, unsigned, GPU_ONLY, 1, OK, t.gpu->minor)
DEVICE_NUMBER(nvmlDeviceGetBrand, unsigned, ANY_DEVICE, 1, OK, t.product->brand)
DEVICE_NUMBER(nvmlDeviceGetArchitecture, unsigned, ANY_DEVICE, 1, OK, t.product->architecture)
DEVICE_NUMBER(nvmlDeviceGetPersistenceMode, unsigned, GPU_ONLY, 1, OK, t.gpu->persistence)
DEVICE_NUMBER(nvmlDeviceGetComputeMode, unsigned, ANY_DEVICE, t.ci || !t.gpu->mig_current, NOT_SUPPORTED, t.gpu->compute_mode)
DEVICE_NUMBER(nvmlDeviceGetDisplayMode, unsigned, GPU_ONLY, 1, OK, t.gpu->display)
DEVICE_NUMBER(nvmlDeviceGetDisplayActive, unsigned, GPU_ONLY, 1, OK, t.gpu->display)
DEVICE_NUMBER(nvmlDeviceGetPowerUsage, unsigned, GPU_ONLY, 1, OK, t.gpu->power_mw)
DEVICE_NUMBER(nvmlDeviceGetNumGpuCores, unsigned, GPU_ONLY, !t.gpu->mig_current && t.product->cores, NOT_SUPPORTED, t.product->cores)
DEVICE_NUMBER(nvmlDeviceGetNumaNodeId, unsigned, GPU_ONLY, 0, NOT_SUPPORTED, NO_INSTANCE) /* for GPUs that are nodes themselves */
DEVICE_NUMBER(nvmlDeviceGetSupportedEventTypes, unsigned long long, GPU_ONLY, 1, OK, EVENTS_SUPPORTED)

API ret_t nvmlDeviceSetPersistenceMode(nvmlDevice_t device, unsigned mode)
{
    BEGIN(device, GPU_ONLY);
    REQUIRE(mode <= 1, INVALID_ARGUMENT);
    REQUIRE(privilege() == PRIVILEGE_ROOT, NO_PERMISSION);
    t.gpu->persistence = mode;
    return end(OK);
}

API ret_t nvmlDeviceGetTemperature(nvmlDevice_t device, unsigned sensor, unsigned *celsius)
{
    BEGIN(device, GPU_ONLY);
    REQUIRE(celsius && sensor == 0, INVALID_ARGUMENT);
    *celsius = t.gpu->temperature_c;
    return end(OK);
}

API ret_t nvmlDeviceGetCudaComputeCapability(nvmlDevice_t device, int *major, int *minor)
{
    BEGIN(device, ANY_DEVICE);
    REQUIRE(major && minor, INVALID_ARGUMENT);
    *major = (int)t.product->cc_major;
    *minor = (int)t.product->cc_minor;
    return end(OK);
}

API ret_t nvmlDeviceGetEccMode(nvmlDevice_t device, unsigned *current, unsigned *pending)
{
    BEGIN(device, GPU_ONLY);
    REQUIRE(current && pending, INVALID_ARGUMENT);
    *current = *pending = t.gpu->ecc;
    return end(OK);
}

API ret_t nvmlDeviceGetTotalEccErrors(nvmlDevice_t device, unsigned type, unsigned counter, unsigned long long *count)
{
    BEGIN(device, GPU_ONLY);
    REQUIRE(count && type <= 1 && counter <= 1, INVALID_ARGUMENT);
    REQUIRE(t.gpu->ecc, NOT_SUPPORTED);
    *count = type ? t.gpu->ecc_uncorrected : t.gpu->ecc_corrected;
    return end(OK);
}

API ret_t nvmlDeviceGetPciInfo_v3(nvmlDevice_t device, pci_info *pci)
{
    BEGIN(device, ANY_DEVICE);
    REQUIRE(pci, INVALID_ARGUMENT);
    memset(pci, 0, sizeof(*pci));
    pci->domain = t.gpu->domain;
    pci->bus = t.gpu->bus;
    pci->pci_device_id = t.product->pci_device_id;
    snprintf(pci->bus_id_legacy, sizeof(pci->bus_id_legacy), "%04X:%02X:00.0", t.gpu->domain & 0xffff, t.gpu->bus & 0xff);
    snprintf(pci->bus_id, sizeof(pci->bus_id), "%08X:%02X:00.0", t.gpu->domain, t.gpu->bus & 0xff);
    return end(OK);
}

API ret_t nvmlDeviceGetPciInfo_v2(nvmlDevice_t device, pci_info *pci) { return nvmlDeviceGetPciInfo_v3(device, pci); }
API ret_t nvmlDeviceGetPciInfo(nvmlDevice_t device, pci_info *pci) { return nvmlDeviceGetPciInfo_v3(device, pci); }

API ret_t nvmlDeviceGetCpuAffinity(nvmlDevice_t device, unsigned words, unsigned long *set)
{
    BEGIN(device, ANY_DEVICE);
    REQUIRE(set && words, INVALID_ARGUMENT);
    for (unsigned i = 0; i < words; i++)
        set[i] = i < CPU_WORDS ? (unsigned long)t.gpu->cpus[i] : 0;
    return end(OK);
}

/* A node is a socket here, so both scopes have one answer. */
API ret_t nvmlDeviceGetCpuAffinityWithinScope(nvmlDevice_t device, unsigned words, unsigned long *set, unsigned scope)
{
    return scope <= 1 ? nvmlDeviceGetCpuAffinity(device, words, set) : INVALID_ARGUMENT;
}

/* The host's memory node next to the GPU; no GPU here is a node itself. */
API ret_t nvmlDeviceGetMemoryAffinity(nvmlDevice_t device, unsigned words, unsigned long *set, unsigned scope)
{
    BEGIN(device, ANY_DEVICE);
    REQUIRE(set && words && scope <= 1, INVALID_ARGUMENT);
    REQUIRE(t.gpu->numa != NO_INSTANCE, NOT_SUPPORTED);
    REQUIRE(t.gpu->numa / 64 < words, INVALID_ARGUMENT);
    memset(set, 0, words * sizeof(*set));
    set[t.gpu->numa / 64] = 1ul << t.gpu->numa % 64;
    return end(OK);
}

API ret_t nvmlDeviceGetP2PStatus(nvmlDevice_t one, nvmlDevice_t other, unsigned index, unsigned *status)
{
    BEGIN(one, ANY_DEVICE);
    struct target peer;
    ret_t result = resolve(other, &peer);
    REQUIRE(result == OK, result);
    REQUIRE(status && index <= 4, INVALID_ARGUMENT);
    *status = t.gpu->mig_current || peer.gpu->mig_current ? 5 : 0; /* not supported between instances */
    return end(OK);
}

API ret_t nvmlDeviceGetTopologyCommonAncestor(nvmlDevice_t one, nvmlDevice_t other, unsigned *level)
{
    BEGIN(one, GPU_ONLY);
    struct target peer;
    ret_t result = resolve(other, &peer);
    REQUIRE(result == OK, result);
    REQUIRE(level, INVALID_ARGUMENT);
    *level = memcmp(t.gpu->cpus, peer.gpu->cpus, sizeof(t.gpu->cpus)) == 0 ? 40 : 50; /* one NUMA node, or across */
    return end(OK);
}

API ret_t nvmlDeviceGetFieldValues(nvmlDevice_t device, int count, field_value *values)
{
    BEGIN(device, GPU_ONLY);
    REQUIRE(values && count > 0, INVALID_ARGUMENT);
    for (int i = 0; i < count; i++) {
        int recovery = values[i].field == FIELD_RECOVERY && atoi(machine->driver) >= RECOVERY_SINCE_DRIVER;
        int resetless = values[i].field == FIELD_RESETLESS_MIG && t.product->mig;
        values[i].result = recovery || resetless ? OK : NOT_SUPPORTED;
        values[i].value_type = 1;
        values[i].value.ull = recovery ? recovery_of(t.gpu) : resetless ? !t.product->needs_reset : 0;
    }
    return end(OK);
}

API ret_t nvmlDeviceGetUtilizationRates(nvmlDevice_t device, utilization_t *rates)
{
    BEGIN(device, ANY_DEVICE);
    REQUIRE(rates, INVALID_ARGUMENT);
    REQUIRE(!t.gpu->mig_current, NOT_SUPPORTED);
    *rates = (utilization_t){count_on(&t, 0) ? 50 : 0, 0};
    return end(OK);
}

/* ---------------------------------------------------------------- NVML: activity (GPM), from Hopper on
 *
 * A device on which anything runs is half busy, as in nvmlDeviceGetUtilizationRates: nothing is computed here. */

enum { ARCHITECTURE_HOPPER = 9, GPM_VERSION = 1 };
enum { GPM_GRAPHICS = 1, GPM_SM = 2, GPM_OCCUPANCY = 3, GPM_TENSOR = 5, GPM_DRAM = 10 };
struct gpm_sample { int taken; unsigned gpu, gi; double busy_percent; };
typedef struct gpm_sample *nvmlGpmSample_t;
typedef struct { const char *short_name, *long_name, *unit; } gpm_info;
typedef struct { unsigned id; int result; double value; gpm_info info; } gpm_metric;
typedef struct { unsigned version, count; nvmlGpmSample_t sample1, sample2; gpm_metric metrics[]; } gpm_metrics;
typedef struct { unsigned version, supported; } gpm_support;

API ret_t nvmlGpmQueryDeviceSupport(nvmlDevice_t device, gpm_support *support)
{
    BEGIN(device, GPU_ONLY);
    REQUIRE(support, INVALID_ARGUMENT);
    REQUIRE(support->version == GPM_VERSION, ARGUMENT_VERSION_MISMATCH);
    support->supported = t.product->architecture >= ARCHITECTURE_HOPPER;
    return end(OK);
}

API ret_t nvmlGpmSampleAlloc(nvmlGpmSample_t *sample)
{
    ret_t result = begin_system(__func__, -1);
    if (result != OK)
        return result;
    REQUIRE(sample, INVALID_ARGUMENT);
    *sample = calloc(1, sizeof(struct gpm_sample));
    REQUIRE(*sample, UNKNOWN);
    return end(OK);
}

API ret_t nvmlGpmSampleFree(nvmlGpmSample_t sample)
{
    free(sample);
    return OK;
}

API ret_t nvmlGpmSampleGet(nvmlDevice_t device, nvmlGpmSample_t sample)
{
    BEGIN(device, GPU_ONLY);
    REQUIRE(sample, INVALID_ARGUMENT);
    REQUIRE(t.product->architecture >= ARCHITECTURE_HOPPER, NOT_SUPPORTED);
    *sample = (struct gpm_sample){1, gpu_number(t.gpu), NO_INSTANCE, count_on(&t, 0) ? 50 : 0};
    return end(OK);
}

API ret_t nvmlGpmMigSampleGet(nvmlDevice_t device, unsigned gi, nvmlGpmSample_t sample)
{
    BEGIN(device, GPU_ONLY);
    REQUIRE(sample, INVALID_ARGUMENT);
    REQUIRE(t.product->architecture >= ARCHITECTURE_HOPPER, NOT_SUPPORTED);
    t.gi = gi_by_id(t.gpu, gi);
    REQUIRE(t.gi, INVALID_ARGUMENT);
    *sample = (struct gpm_sample){1, gpu_number(t.gpu), gi, count_on(&t, 0) ? 50 : 0};
    return end(OK);
}

API ret_t nvmlGpmMetricsGet(gpm_metrics *asked)
{
    ret_t result = begin_system(__func__, -1);
    if (result != OK)
        return result;
    REQUIRE(asked && asked->sample1 && asked->sample2, INVALID_ARGUMENT);
    REQUIRE(asked->version == GPM_VERSION, ARGUMENT_VERSION_MISMATCH);
    const struct gpm_sample *first = asked->sample1, *second = asked->sample2;
    REQUIRE(first->taken && second->taken && first->gpu == second->gpu && first->gi == second->gi, INVALID_ARGUMENT);
    for (unsigned i = 0; i < asked->count; i++) {
        gpm_metric *one = &asked->metrics[i];
        int known = one->id == GPM_GRAPHICS || one->id == GPM_SM || one->id == GPM_OCCUPANCY || one->id == GPM_TENSOR || one->id == GPM_DRAM;
        one->result = known ? OK : NOT_SUPPORTED;
        one->value = known ? second->busy_percent : 0;
        one->info = (gpm_info){"simulated", "simulated", "%"};
    }
    return end(OK);
}

/* ---------------------------------------------------------------- NVML: memory and processes */

API ret_t nvmlDeviceGetMemoryInfo(nvmlDevice_t device, memory_v1 *memory)
{
    BEGIN(device, ANY_DEVICE);
    REQUIRE(memory, INVALID_ARGUMENT);
    REQUIRE(t.gi || !t.gpu->mig_current || privilege() >= PRIVILEGE_MONITOR, NO_PERMISSION);
    unsigned long long used = memory_used(&t) + memory_reserved(&t), total = memory_total(&t);
    *memory = (memory_v1){total, used > total ? 0 : total - used, used};
    return end(OK);
}

API ret_t nvmlDeviceGetMemoryInfo_v2(nvmlDevice_t device, memory_v2 *memory)
{
    BEGIN(device, ANY_DEVICE);
    REQUIRE(memory, INVALID_ARGUMENT);
    REQUIRE(memory->version == VERSION_OF(memory_v2, 2), ARGUMENT_VERSION_MISMATCH);
    REQUIRE(t.gi || !t.gpu->mig_current || privilege() >= PRIVILEGE_MONITOR, NO_PERMISSION);
    unsigned long long used = memory_used(&t), reserved = memory_reserved(&t), total = memory_total(&t);
    *memory = (memory_v2){memory->version, total, reserved, used + reserved > total ? 0 : total - used - reserved, used};
    return end(OK);
}

API ret_t nvmlDeviceGetBAR1MemoryInfo(nvmlDevice_t device, memory_v1 *memory)
{
    BEGIN(device, ANY_DEVICE);
    REQUIRE(memory, INVALID_ARGUMENT);
    unsigned long long total = memory_total(&t);
    *memory = (memory_v1){total, total, 0};
    return end(OK);
}

#define PROCESS_LIST(function, kind)                                                  \
    API ret_t function(nvmlDevice_t device, unsigned *count, process_info *infos)     \
    {                                                                                 \
        return processes(__func__, device, kind, count, infos);                       \
    }

PROCESS_LIST(nvmlDeviceGetComputeRunningProcesses_v2, KIND_COMPUTE)
PROCESS_LIST(nvmlDeviceGetComputeRunningProcesses_v3, KIND_COMPUTE)
PROCESS_LIST(nvmlDeviceGetGraphicsRunningProcesses_v2, KIND_GRAPHICS)
PROCESS_LIST(nvmlDeviceGetGraphicsRunningProcesses_v3, KIND_GRAPHICS)
PROCESS_LIST(nvmlDeviceGetMPSComputeRunningProcesses_v2, KIND_MPS)
PROCESS_LIST(nvmlDeviceGetMPSComputeRunningProcesses_v3, KIND_MPS)

API ret_t nvmlDeviceGetAttributes_v2(nvmlDevice_t device, attributes_t *out)
{
    BEGIN(device, ANY_DEVICE);
    REQUIRE(out, INVALID_ARGUMENT);
    REQUIRE(t.ci, NOT_SUPPORTED);
    const struct profile *p = profile_of(t.gpu, t.gi);
    *out = (attributes_t){ci_sms(p, t.ci->slices), p->copy, p->decoder, p->encoder, p->jpeg, p->ofa, p->g, t.ci->slices,
                          place_of(t.gpu, t.gi)->memory_mb};
    return end(OK);
}

/* ---------------------------------------------------------------- NVML: MIG mode */

static int mode_is_blocked(const struct target *t)
{
    struct target whole = {.gpu = t->gpu};
    prune();
    for (int i = 0; i < MAX_GIS; i++)
        if (t->gpu->gi[i].used)
            return 1;
    return t->gpu->display || count_on(&whole, 1) > 0;
}

API ret_t nvmlDeviceGetMigMode(nvmlDevice_t device, unsigned *current, unsigned *pending)
{
    BEGIN(device, GPU_ONLY);
    REQUIRE(current && pending, INVALID_ARGUMENT);
    REQUIRE(t.product->mig, NOT_SUPPORTED);
    *current = t.gpu->mig_current;
    *pending = t.gpu->mig_pending;
    return end(OK);
}

API ret_t nvmlDeviceSetMigMode(nvmlDevice_t device, unsigned mode, ret_t *activation)
{
    BEGIN(device, GPU_ONLY);
    REQUIRE(activation && mode <= 1, INVALID_ARGUMENT);
    REQUIRE(t.product->mig, NOT_SUPPORTED);
    REQUIRE(privilege() == PRIVILEGE_ROOT, NO_PERMISSION);
    t.gpu->mig_pending = mode;
    if (mode == t.gpu->mig_current)
        *activation = OK;
    else if (mode_is_blocked(&t))
        *activation = IN_USE;
    else if (t.product->needs_reset)
        *activation = RESET_REQUIRED;
    else {
        t.gpu->mig_current = mode;
        *activation = OK;
    }
    journal("set-mode gpu=%u mode=%u status=%d", gpu_number(t.gpu), mode, *activation);
    return end(OK);
}

/* ---------------------------------------------------------------- NVML: GPU instances */

static ret_t find_profile(const struct target *t, unsigned number, int by_id, struct profile **profile)
{
    if (!t->product->mig)
        return NOT_SUPPORTED;
    if (!by_id && number >= GI_ENUMS)
        return INVALID_ARGUMENT;
    *profile = by_id ? profile_by_id(t->product, number) : profile_by_enum(t->product, number);
    return *profile ? OK : by_id ? INVALID_ARGUMENT : NOT_SUPPORTED;
}

API ret_t nvmlDeviceGetGpuInstanceProfileInfo(nvmlDevice_t device, unsigned number, gi_profile_v1 *info)
{
    struct profile *p;
    BEGIN(device, GPU_ONLY);
    REQUIRE(info, INVALID_ARGUMENT);
    ret_t found = find_profile(&t, number, 0, &p);
    REQUIRE(found == OK, found);
    *info = (gi_profile_v1){p->id, p->p2p, p->g, p->max, p->sms, p->copy, p->decoder, p->encoder, p->jpeg, p->ofa, p->memory_mb};
    return end(OK);
}

static ret_t versioned_profile(const struct profile *p, gi_profile_v2 *info)
{
    char name[NAME_SIZE];
    snprintf(name, sizeof(name), "MIG %s", p->name);
    if (info->version == VERSION_OF(gi_profile_v2, 2)) {
        *info = (gi_profile_v2){info->version, p->id, p->p2p, p->g, p->max, p->sms, p->copy, p->decoder, p->encoder, p->jpeg,
                                p->ofa, p->memory_mb, ""};
        memcpy(info->name, name, sizeof(name));
        return OK;
    }
    if (info->version == VERSION_OF(gi_profile_v3, 3)) {
        gi_profile_v3 *v3 = (gi_profile_v3 *)(void *)info;
        *v3 = (gi_profile_v3){v3->version, p->id, p->g, p->max, p->sms, p->copy, p->decoder, p->encoder, p->jpeg, p->ofa,
                              p->memory_mb, "", p->p2p | p->gfx << 1};
        memcpy(v3->name, name, sizeof(name));
        return OK;
    }
    return ARGUMENT_VERSION_MISMATCH;
}

API ret_t nvmlDeviceGetGpuInstanceProfileInfoV(nvmlDevice_t device, unsigned number, gi_profile_v2 *info)
{
    struct profile *p;
    BEGIN(device, GPU_ONLY);
    REQUIRE(info, INVALID_ARGUMENT);
    ret_t found = find_profile(&t, number, 0, &p);
    REQUIRE(found == OK, found);
    return end(versioned_profile(p, info));
}

API ret_t nvmlDeviceGetGpuInstanceProfileInfoByIdV(nvmlDevice_t device, unsigned id, gi_profile_v2 *info)
{
    struct profile *p;
    BEGIN(device, GPU_ONLY);
    REQUIRE(info, INVALID_ARGUMENT);
    ret_t found = find_profile(&t, id, 1, &p);
    REQUIRE(found == OK, found);
    return end(versioned_profile(p, info));
}

/* All placements in order of their start, whether free or not, and whether MIG is on or off. */
API ret_t nvmlDeviceGetGpuInstancePossiblePlacements_v2(nvmlDevice_t device, unsigned id, placement_t *out, unsigned *count)
{
    struct profile *p;
    unsigned written = 0;
    BEGIN(device, GPU_ONLY);
    REQUIRE(count, INVALID_ARGUMENT);
    REQUIRE(privilege() >= PRIVILEGE_MONITOR, NO_PERMISSION);
    ret_t found = find_profile(&t, id, 1, &p);
    REQUIRE(found == OK, found);
    for (unsigned start = 0; out && start < 64; start++)
        for (unsigned i = 0; i < p->places; i++)
            if (p->place[i].start == start)
                out[written++] = (placement_t){start, p->size};
    *count = p->places;
    return end(OK);
}

API ret_t nvmlDeviceGetGpuInstanceRemainingCapacity(nvmlDevice_t device, unsigned id, unsigned *count)
{
    struct profile *p;
    BEGIN(device, GPU_ONLY);
    REQUIRE(count, INVALID_ARGUMENT);
    REQUIRE(privilege() >= PRIVILEGE_MONITOR, NO_PERMISSION);
    REQUIRE(t.gpu->mig_current, NOT_SUPPORTED);
    ret_t found = find_profile(&t, id, 1, &p);
    REQUIRE(found == OK, found);
    *count = remaining(t.gpu, p);
    return end(OK);
}

/* The driver's own choice looks at this one instance only: it takes the start that fewest placements of any profile
 * overlap. Created as 1g, 1g, 2g, 3g, a layout fails that 3g, 1g, 2g, 1g would give (MIG User Guide). */
API ret_t nvmlDeviceCreateGpuInstance(nvmlDevice_t device, unsigned id, nvmlGpuInstance_t *out)
{
    struct profile *p;
    BEGIN(device, GPU_ONLY);
    REQUIRE(out, INVALID_ARGUMENT);
    REQUIRE(privilege() >= PRIVILEGE_CONFIG, NO_PERMISSION);
    REQUIRE(t.gpu->mig_current, NOT_SUPPORTED);
    ret_t found = find_profile(&t, id, 1, &p);
    REQUIRE(found == OK, found);
    for (unsigned i = 0; i < p->places; i++)
        if (fits(t.gpu, p, &p->place[i]))
            return end(create_gi(t.gpu, p, &p->place[i], out));
    return end(INSUFFICIENT_RESOURCES);
}

API ret_t nvmlDeviceCreateGpuInstanceWithPlacement(nvmlDevice_t device, unsigned id, const placement_t *wanted, nvmlGpuInstance_t *out)
{
    struct profile *p;
    BEGIN(device, GPU_ONLY);
    REQUIRE(out && wanted, INVALID_ARGUMENT);
    REQUIRE(privilege() >= PRIVILEGE_CONFIG, NO_PERMISSION);
    REQUIRE(t.gpu->mig_current, NOT_SUPPORTED);
    ret_t found = find_profile(&t, id, 1, &p);
    REQUIRE(found == OK, found);
    for (unsigned i = 0; i < p->places; i++)
        if (p->place[i].start == wanted->start && p->size == wanted->size)
            return end(fits(t.gpu, p, &p->place[i]) ? create_gi(t.gpu, p, &p->place[i], out) : INSUFFICIENT_RESOURCES);
    return end(INVALID_ARGUMENT);
}

API ret_t nvmlGpuInstanceDestroy(nvmlGpuInstance_t instance)
{
    BEGIN(instance, 1u << HANDLE_GI);
    REQUIRE(privilege() >= PRIVILEGE_CONFIG, NO_PERMISSION);
    prune();
    for (int i = 0; i < MAX_CIS; i++)
        REQUIRE(!t.gi->ci[i].used, IN_USE);
    REQUIRE(count_on(&t, 1) == 0, IN_USE);
    journal("destroy-gi gpu=%u gi=%u %s@%u", gpu_number(t.gpu), t.gi->id, profile_of(t.gpu, t.gi)->name, place_of(t.gpu, t.gi)->start);
    t.gi->used = 0;
    emit(t.gpu, EVENT_MIG_CONFIG, 0, t.gi->id, NO_INSTANCE);
    return end(OK);
}

API ret_t nvmlDeviceGetGpuInstances(nvmlDevice_t device, unsigned id, nvmlGpuInstance_t *out, unsigned *count)
{
    struct profile *p;
    unsigned written = 0;
    BEGIN(device, GPU_ONLY);
    REQUIRE(out && count, INVALID_ARGUMENT);
    REQUIRE(privilege() >= PRIVILEGE_MONITOR, NO_PERMISSION);
    REQUIRE(t.gpu->mig_current, NOT_SUPPORTED);
    ret_t found = find_profile(&t, id, 1, &p);
    REQUIRE(found == OK, found);
    for (int i = 0; i < MAX_GIS; i++)
        if (t.gpu->gi[i].used && profile_of(t.gpu, &t.gpu->gi[i]) == p)
            out[written++] = gi_handle(t.gpu, &t.gpu->gi[i]);
    *count = written;
    return end(OK);
}

API ret_t nvmlDeviceGetGpuInstanceById(nvmlDevice_t device, unsigned id, nvmlGpuInstance_t *out)
{
    BEGIN(device, GPU_ONLY);
    REQUIRE(out, INVALID_ARGUMENT);
    REQUIRE(privilege() >= PRIVILEGE_MONITOR, NO_PERMISSION);
    REQUIRE(t.gpu->mig_current, NOT_SUPPORTED);
    struct gi *gi = gi_by_id(t.gpu, id);
    REQUIRE(gi, NOT_FOUND);
    *out = gi_handle(t.gpu, gi);
    return end(OK);
}

API ret_t nvmlGpuInstanceGetInfo(nvmlGpuInstance_t instance, gi_info *info)
{
    BEGIN(instance, 1u << HANDLE_GI);
    REQUIRE(info, INVALID_ARGUMENT);
    const struct profile *p = profile_of(t.gpu, t.gi);
    *info = (gi_info){gpu_handle(t.gpu), t.gi->id, p->id, {place_of(t.gpu, t.gi)->start, p->size}};
    return end(OK);
}

/* ---------------------------------------------------------------- NVML: compute instances */

static ret_t find_ci_profile(const struct target *t, unsigned number, unsigned engines, unsigned *slices)
{
    if (number >= CI_ENUMS || engines != 0)
        return INVALID_ARGUMENT;
    *slices = ci_slices(number);
    return *slices && *slices <= profile_of(t->gpu, t->gi)->g ? OK : NOT_SUPPORTED;
}

API ret_t nvmlGpuInstanceGetComputeInstanceProfileInfo(nvmlGpuInstance_t instance, unsigned number, unsigned engines, ci_profile_v1 *info)
{
    unsigned slices;
    BEGIN(instance, 1u << HANDLE_GI);
    REQUIRE(info, INVALID_ARGUMENT);
    ret_t found = find_ci_profile(&t, number, engines, &slices);
    REQUIRE(found == OK, found);
    const struct profile *p = profile_of(t.gpu, t.gi);
    *info = (ci_profile_v1){number, slices, p->g / slices, ci_sms(p, slices), p->copy, p->decoder, p->encoder, p->jpeg, p->ofa};
    return end(OK);
}

API ret_t nvmlGpuInstanceGetComputeInstanceProfileInfoV(nvmlGpuInstance_t instance, unsigned number, unsigned engines, ci_profile_v2 *info)
{
    unsigned slices;
    BEGIN(instance, 1u << HANDLE_GI);
    REQUIRE(info, INVALID_ARGUMENT);
    REQUIRE(info->version == VERSION_OF(ci_profile_v2, 2) || info->version == VERSION_OF(ci_profile_v3, 3), ARGUMENT_VERSION_MISMATCH);
    ret_t found = find_ci_profile(&t, number, engines, &slices);
    REQUIRE(found == OK, found);
    const struct profile *p = profile_of(t.gpu, t.gi);
    char name[NAME_SIZE], prefixed[NAME_SIZE + 8];
    ci_name(name, p, slices);
    snprintf(prefixed, sizeof(prefixed), "MIG %s", name);
    *info = (ci_profile_v2){info->version, number, slices, p->g / slices, ci_sms(p, slices), p->copy, p->decoder, p->encoder,
                            p->jpeg, p->ofa, ""};
    memcpy(info->name, prefixed, NAME_SIZE - 1);
    if (info->version == VERSION_OF(ci_profile_v3, 3))
        ((ci_profile_v3 *)(void *)info)->capabilities = p->gfx;
    return end(OK);
}

API ret_t nvmlGpuInstanceGetComputeInstancePossiblePlacements(nvmlGpuInstance_t instance, unsigned id, placement_t *out, unsigned *count)
{
    unsigned slices;
    BEGIN(instance, 1u << HANDLE_GI);
    REQUIRE(count, INVALID_ARGUMENT);
    REQUIRE(privilege() >= PRIVILEGE_MONITOR, NO_PERMISSION);
    ret_t found = find_ci_profile(&t, id, 0, &slices);
    REQUIRE(found == OK, found);
    unsigned places = profile_of(t.gpu, t.gi)->g - slices + 1;
    for (unsigned start = 0; out && start < places; start++)
        out[start] = (placement_t){start, slices};
    *count = places;
    return end(OK);
}

API ret_t nvmlGpuInstanceGetComputeInstanceRemainingCapacity(nvmlGpuInstance_t instance, unsigned id, unsigned *count)
{
    unsigned slices, room = 0;
    BEGIN(instance, 1u << HANDLE_GI);
    REQUIRE(count, INVALID_ARGUMENT);
    REQUIRE(privilege() >= PRIVILEGE_MONITOR, NO_PERMISSION);
    ret_t found = find_ci_profile(&t, id, 0, &slices);
    REQUIRE(found == OK, found);
    for (unsigned start = 0; start + slices <= profile_of(t.gpu, t.gi)->g; start++)
        if (ci_free(t.gi, start, slices)) {
            room++;
            start += slices - 1;
        }
    *count = room;
    return end(OK);
}

static ret_t create_ci_anywhere(const char *function, nvmlGpuInstance_t instance, unsigned id, const placement_t *wanted, nvmlComputeInstance_t *out)
{
    struct target t;
    unsigned slices;
    ret_t result = begin(function, instance, &t, 1u << HANDLE_GI);
    if (result != OK)
        return result;
    REQUIRE(out, INVALID_ARGUMENT);
    REQUIRE(privilege() >= PRIVILEGE_CONFIG, NO_PERMISSION);
    ret_t found = find_ci_profile(&t, id, 0, &slices);
    REQUIRE(found == OK, found);
    unsigned g = profile_of(t.gpu, t.gi)->g;
    REQUIRE(!wanted || (wanted->size == slices && wanted->start + slices <= g), INVALID_ARGUMENT);
    for (unsigned start = wanted ? wanted->start : 0; start + slices <= g; start++) {
        if (ci_free(t.gi, start, slices))
            return end(create_ci(&t, slices, start, out));
        if (wanted)
            break;
    }
    return end(INSUFFICIENT_RESOURCES);
}

API ret_t nvmlGpuInstanceCreateComputeInstance(nvmlGpuInstance_t instance, unsigned id, nvmlComputeInstance_t *out)
{
    return create_ci_anywhere(__func__, instance, id, NULL, out);
}

API ret_t nvmlGpuInstanceCreateComputeInstanceWithPlacement(nvmlGpuInstance_t instance, unsigned id, const placement_t *wanted, nvmlComputeInstance_t *out)
{
    return wanted ? create_ci_anywhere(__func__, instance, id, wanted, out) : INVALID_ARGUMENT;
}

API ret_t nvmlComputeInstanceDestroy(nvmlComputeInstance_t instance)
{
    BEGIN(instance, 1u << HANDLE_CI);
    REQUIRE(privilege() >= PRIVILEGE_CONFIG, NO_PERMISSION);
    prune();
    REQUIRE(count_on(&t, 1) == 0, IN_USE);
    journal("destroy-ci gpu=%u gi=%u ci=%u %s@%u", gpu_number(t.gpu), t.gi->id, t.ci->id, profile_of(t.gpu, t.gi)->name,
            place_of(t.gpu, t.gi)->start);
    t.ci->used = 0;
    emit(t.gpu, EVENT_MIG_CONFIG, 0, t.gi->id, t.ci->id);
    return end(OK);
}

API ret_t nvmlGpuInstanceGetComputeInstances(nvmlGpuInstance_t instance, unsigned id, nvmlComputeInstance_t *out, unsigned *count)
{
    unsigned slices, written = 0;
    BEGIN(instance, 1u << HANDLE_GI);
    REQUIRE(out && count, INVALID_ARGUMENT);
    REQUIRE(privilege() >= PRIVILEGE_MONITOR, NO_PERMISSION);
    ret_t found = find_ci_profile(&t, id, 0, &slices);
    REQUIRE(found == OK, found);
    for (int i = 0; i < MAX_CIS; i++)
        if (t.gi->ci[i].used && t.gi->ci[i].slices == slices)
            out[written++] = ci_handle(t.gpu, t.gi, &t.gi->ci[i]);
    *count = written;
    return end(OK);
}

API ret_t nvmlGpuInstanceGetComputeInstanceById(nvmlGpuInstance_t instance, unsigned id, nvmlComputeInstance_t *out)
{
    BEGIN(instance, 1u << HANDLE_GI);
    REQUIRE(out, INVALID_ARGUMENT);
    REQUIRE(privilege() >= PRIVILEGE_MONITOR, NO_PERMISSION);
    struct ci *ci = ci_by_id(t.gi, id);
    REQUIRE(ci, NOT_FOUND);
    *out = ci_handle(t.gpu, t.gi, ci);
    return end(OK);
}

API ret_t nvmlComputeInstanceGetInfo_v2(nvmlComputeInstance_t instance, ci_info *info)
{
    BEGIN(instance, 1u << HANDLE_CI);
    REQUIRE(info, INVALID_ARGUMENT);
    *info = (ci_info){gpu_handle(t.gpu), gi_handle(t.gpu, t.gi), t.ci->id, ci_profile(t.ci->slices), {t.ci->start, t.ci->slices}};
    return end(OK);
}

/* ---------------------------------------------------------------- NVML: events */

API ret_t nvmlEventSetCreate(nvmlEventSet_t *set)
{
    ret_t result = begin_system(__func__, -1);
    if (result != OK)
        return result;
    REQUIRE(set, INVALID_ARGUMENT);
    *set = calloc(1, sizeof(struct event_set));
    REQUIRE(*set, UNKNOWN);
    (*set)->cursor = machine->events;
    return end(OK);
}

API ret_t nvmlEventSetFree(nvmlEventSet_t set)
{
    free(set);
    return OK;
}

API ret_t nvmlDeviceRegisterEvents(nvmlDevice_t device, unsigned long long types, nvmlEventSet_t set)
{
    BEGIN(device, ANY_DEVICE);
    REQUIRE(set, INVALID_ARGUMENT);
    REQUIRE(!t.ci && !(types & ~(unsigned long long)EVENTS_SUPPORTED), NOT_SUPPORTED);
    set->wanted[gpu_number(t.gpu)] |= types;
    return end(OK);
}

static int next_event(nvmlEventSet_t set, event_data *data)
{
    uint64_t oldest = machine->events > MAX_EVENTS ? machine->events - MAX_EVENTS : 0;
    if (set->cursor < oldest)
        set->cursor = oldest;
    while (set->cursor < machine->events) {
        const struct event *e = &machine->event[set->cursor++ % MAX_EVENTS];
        if (!(set->wanted[e->gpu] & e->type))
            continue;
        if (e->gi != NO_INSTANCE && privilege() < PRIVILEGE_MONITOR)
            continue;
        *data = (event_data){gpu_handle(&machine->gpu[e->gpu]), e->type, e->data, e->gi, e->ci};
        return 1;
    }
    return 0;
}

static uint64_t milliseconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
}

API ret_t nvmlEventSetWait_v2(nvmlEventSet_t set, event_data *data, unsigned timeout_ms)
{
    const struct timespec pause = {0, 2000000};
    const uint64_t until = milliseconds() + timeout_ms;
    if (!set || !data)
        return INVALID_ARGUMENT;
    for (;;) {
        ret_t result = begin_system(__func__, -1);
        if (result != OK)
            return result;
        if (next_event(set, data))
            return end(OK);
        for (unsigned g = 0; g < machine->gpus; g++)
            REQUIRE(!(set->wanted[g] && machine->gpu[g].lost), GPU_IS_LOST);
        unlock();
        if (milliseconds() >= until)
            return TIMEOUT;
        nanosleep(&pause, NULL);
    }
}

API ret_t nvmlEventSetWait(nvmlEventSet_t set, event_data *data, unsigned timeout_ms) { return nvmlEventSetWait_v2(set, data, timeout_ms); }

/* ---------------------------------------------------------------- making a machine */

#define FAIL(...) do { snprintf(error, size, __VA_ARGS__); return -1; } while (0)

static int read_line(struct machine *m, const char *line, char *error, size_t size)
{
    char word[32] = "";
    int at = 0, end_of_numbers = 0;
    struct product *product = m->products ? &m->product[m->products - 1] : NULL;
    struct profile *profile = product && product->profiles ? &product->profile[product->profiles - 1] : NULL;
    struct gpu *gpu = m->gpus ? &m->gpu[m->gpus - 1] : NULL;
    if (sscanf(line, "%31s %n", word, &at) < 1)
        return 0;
    const char *rest = line + at;
    if (strcmp(word, "driver") == 0)
        snprintf(m->driver, sizeof(m->driver), "%s", rest);
    else if (strcmp(word, "nvml") == 0)
        snprintf(m->nvml, sizeof(m->nvml), "%s", rest);
    else if (strcmp(word, "options") == 0) {
        if (sscanf(rest, "%d %u %u %u", &m->cuda, &m->privilege, &m->sequential_ids, &m->stable_uuids) != 4)
            FAIL("bad line: %s", line);
    } else if (strcmp(word, "product") == 0) {
        if (m->products == MAX_PRODUCTS)
            FAIL("more than %d products", MAX_PRODUCTS);
        product = &m->product[m->products++];
        if (sscanf(rest, "%x %u %u %u %u %u %u %u %u %u %llu %llu %llu %n", &product->pci_device_id, &product->architecture,
                   &product->cc_major, &product->cc_minor, &product->brand, &product->cores, &product->memory_slices,
                   &product->compute_slices, &product->mig, &product->needs_reset, &product->memory_mb, &product->reserved_mb,
                   &product->instance_used_mb, &end_of_numbers) != 13 || product->memory_slices > 32 || product->compute_slices > 16)
            FAIL("bad line: %s", line);
        snprintf(product->name, sizeof(product->name), "%s", rest + end_of_numbers);
    } else if (strcmp(word, "profile") == 0) {
        if (!product || product->profiles == MAX_PROFILES)
            FAIL("no product for, or too many profiles at: %s", line);
        profile = &product->profile[product->profiles++];
        if (sscanf(rest, "%u %u %u %u %u %u %u %u %u %u %u %u %u %u %llu %n", &profile->id, &profile->nvml_enum, &profile->g,
                   &profile->size, &profile->sms, &profile->max, &profile->media, &profile->copy, &profile->decoder, &profile->encoder,
                   &profile->jpeg, &profile->ofa, &profile->p2p, &profile->gfx, &profile->memory_mb, &end_of_numbers) != 15)
            FAIL("bad line: %s", line);
        snprintf(profile->name, sizeof(profile->name), "%s", rest + end_of_numbers);
    } else if (strcmp(word, "place") == 0) {
        if (!profile || profile->places == MAX_PLACES)
            FAIL("no profile for, or too many places at: %s", line);
        struct place *place = &profile->place[profile->places++];
        if (sscanf(rest, "%u %llu", &place->start, &place->memory_mb) != 2 || place->start + profile->size > product->memory_slices)
            FAIL("bad line: %s", line);
    } else if (strcmp(word, "gpu") == 0) {
        if (m->gpus == MAX_GPUS)
            FAIL("more than %d GPUs", MAX_GPUS);
        gpu = &m->gpu[m->gpus++];
        if (sscanf(rest, "%u %47s %31s %u %x %x %u %u %u %u %u", &gpu->product, gpu->uuid, gpu->serial_number, &gpu->minor, &gpu->domain,
                   &gpu->bus, &gpu->numa, &gpu->mig_current, &gpu->persistence, &gpu->temperature_c, &gpu->power_mw) != 11 ||
            gpu->product >= m->products)
            FAIL("bad line: %s", line);
        gpu->mig_pending = gpu->mig_current;
        gpu->ecc = 1;
    } else if (strcmp(word, "cpus") == 0) {
        for (unsigned long number; gpu && *rest; rest += strspn(rest, " ")) {
            char *stop;
            number = strtoul(rest, &stop, 10);
            if (stop == rest || number >= 64 * CPU_WORDS)
                FAIL("bad line: %s", line);
            gpu->cpus[number / 64] |= 1ull << number % 64;
            rest = stop;
        }
    } else
        FAIL("unknown word: %s", line);
    return 0;
}

static int read_description(struct machine *m, const char *path, char *error, size_t size)
{
    char line[8192];
    FILE *file = fopen(path, "re");
    int result = file ? 0 : -1;
    if (!file)
        snprintf(error, size, "%s: %s", path, strerror(errno));
    while (result == 0 && fgets(line, sizeof(line), file)) {
        line[strcspn(line, "\n")] = 0;
        result = read_line(m, line, error, size);
    }
    if (file)
        fclose(file);
    return result;
}

/* Writes a new state file at `path` from a description; never over one that is there. -1 and `error` if it cannot. */
API int sliceway_sim_create(const char *description, const char *path, char *error, size_t size)
{
    struct machine *m = calloc(1, sizeof(*m));
    if (!m)
        FAIL("out of memory");
    int result = read_description(m, description, error, size);
    m->magic = MAGIC;
    m->version = LAYOUT_VERSION;
    m->size = sizeof(*m);
    if (result == 0) {
        int fd = open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
        ssize_t written = fd < 0 ? -1 : write(fd, m, sizeof(*m));
        if (written != (ssize_t)sizeof(*m)) {
            snprintf(error, size, "%s: %s", path, strerror(errno));
            result = -1;
        }
        if (fd >= 0)
            close(fd);
    }
    free(m);
    return result;
}

/* ---------------------------------------------------------------- what happens to a machine from outside */

static pthread_mutex_t control_mutex = PTHREAD_MUTEX_INITIALIZER;

static int control_begin(const char *path)
{
    pthread_mutex_lock(&control_mutex);
    if (strlen(path) < sizeof(state_path) && (machine = map_state(path, NULL)) != NULL) {
        strcpy(state_path, path);
        if (lock() == 0)
            return 1;
        munmap(machine, sizeof(struct machine));
    }
    machine = NULL;
    pthread_mutex_unlock(&control_mutex);
    return 0;
}

static int control_end(int result)
{
    unlock();
    munmap(machine, sizeof(struct machine));
    machine = NULL;
    pthread_mutex_unlock(&control_mutex);
    return result;
}

#define CONTROL(path) do { if (!control_begin(path)) return DRIVER_NOT_LOADED; } while (0)
#define CONTROL_GPU(number)                                                       \
    if ((number) >= machine->gpus)                                                \
        return control_end(NOT_FOUND);                                            \
    struct gpu *gpu = &machine->gpu[number]

/* Puts a process on the GPU or MIG device `uuid`; a ghost needs no living process. 20 (memory) if there is no room. */
API int sliceway_sim_attach(const char *path, const char *uuid, unsigned pid, unsigned kind, unsigned long long memory, int ghost, const char *name)
{
    nvmlDevice_t handle;
    struct target t;
    char state;
    CONTROL(path);
    ret_t result = handle_by_uuid(uuid, &handle);
    if (result == OK)
        result = resolve(handle, &t);
    if (result != OK)
        return control_end(result);
    if (kind != KIND_CLIENT && t.gpu->mig_current && !t.ci)
        return control_end(NOT_SUPPORTED); /* CUDA cannot use a GPU in MIG mode as a whole */
    if (memory_used(&t) + memory_reserved(&t) + memory > memory_total(&t))
        return control_end(20);
    for (int i = 0; i < MAX_PROCESSES; i++) {
        struct process *p = &machine->process[i];
        if (p->used)
            continue;
        *p = (struct process){.used = 1, .kind = kind, .gpu = gpu_number(t.gpu), .gi = t.gi ? t.gi->id : NO_INSTANCE,
                              .ci = t.ci ? t.ci->id : NO_INSTANCE, .pid = pid, .ghost = ghost != 0, .memory = memory};
        p->start_time = start_time_of(pid, &state);
        snprintf(p->name, sizeof(p->name), "%s", name);
        return control_end(alive(p) ? OK : (p->used = 0, NOT_FOUND));
    }
    return control_end(INSUFFICIENT_RESOURCES);
}

/* Takes a process off every device. */
API int sliceway_sim_detach(const char *path, unsigned pid)
{
    int result = NOT_FOUND;
    CONTROL(path);
    for (int i = 0; i < MAX_PROCESSES; i++)
        if (machine->process[i].used && machine->process[i].pid == pid) {
            machine->process[i].used = 0;
            result = OK;
        }
    return control_end(result);
}

/* Orders a fault: after `skip` calls of `function` (a trailing * matches more), `times` calls (0: all) answer `code`;
 * a negative code is a signal that the calling process gets. `after` carries the call out first. */
API int sliceway_sim_fault(const char *path, const char *function, int gpu, unsigned skip, unsigned times, int code, int after, unsigned delay_ms)
{
    CONTROL(path);
    for (int i = 0; i < MAX_FAULTS; i++) {
        struct fault *f = &machine->fault[i];
        if (f->used)
            continue;
        *f = (struct fault){.used = 1, .gpu = gpu, .skip = skip, .times = times, .after = after != 0, .delay_ms = delay_ms, .code = code};
        snprintf(f->function, sizeof(f->function), "%s", function);
        return control_end(OK);
    }
    return control_end(INSUFFICIENT_RESOURCES);
}

API int sliceway_sim_clear_faults(const char *path)
{
    CONTROL(path);
    memset(machine->fault, 0, sizeof(machine->fault));
    return control_end(OK);
}

API int sliceway_sim_xid(const char *path, unsigned number, unsigned long long xid, unsigned gi, unsigned ci)
{
    CONTROL(path);
    CONTROL_GPU(number);
    emit(gpu, EVENT_XID, xid, gi, ci);
    return control_end(OK);
}

/* The GPU falls off the bus: XID 79, and every call on it says so from here on. */
API int sliceway_sim_lose(const char *path, unsigned number)
{
    CONTROL(path);
    CONTROL_GPU(number);
    emit(gpu, EVENT_XID, 79, NO_INSTANCE, NO_INSTANCE);
    gpu->lost = 1;
    for (int i = 0; i < MAX_PROCESSES; i++)
        if (machine->process[i].gpu == number)
            machine->process[i].used = 0;
    return control_end(OK);
}

static void clear_instances(struct gpu *gpu)
{
    for (int i = 0; i < MAX_GIS; i++)
        gpu->gi[i].used = 0;
}

/* nvidia-smi --gpu-reset: refused while anything holds the GPU; instances go, a pending mode becomes current. */
API int sliceway_sim_reset(const char *path, unsigned number)
{
    CONTROL(path);
    CONTROL_GPU(number);
    struct target whole = {.gpu = gpu};
    prune();
    if (count_on(&whole, 1) || gpu->display)
        return control_end(IN_USE);
    clear_instances(gpu);
    forget_xids(gpu);
    gpu->mig_current = gpu->mig_pending;
    return control_end(OK);
}

/* Processes and instances are gone; the mode stays where it is a bit on the board (GPUs that need a reset to change it). */
API int sliceway_sim_reboot(const char *path)
{
    CONTROL(path);
    memset(machine->process, 0, sizeof(machine->process));
    for (unsigned g = 0; g < machine->gpus; g++) {
        struct gpu *gpu = &machine->gpu[g];
        clear_instances(gpu);
        forget_xids(gpu);
        gpu->lost = 0;
        gpu->persistence = 0;
        gpu->mig_pending = product_of(gpu)->needs_reset ? gpu->mig_pending : 0;
        gpu->mig_current = gpu->mig_pending;
    }
    return control_end(OK);
}

/* Sets one property: "display", "persistence", "compute-mode", "ecc-uncorrected", "temperature", "privilege" (machine). */
API int sliceway_sim_set(const char *path, unsigned number, const char *property, unsigned value)
{
    CONTROL(path);
    CONTROL_GPU(number);
    if (strcmp(property, "display") == 0)
        gpu->display = value;
    else if (strcmp(property, "persistence") == 0)
        gpu->persistence = value;
    else if (strcmp(property, "compute-mode") == 0)
        gpu->compute_mode = value;
    else if (strcmp(property, "ecc-uncorrected") == 0)
        gpu->ecc_uncorrected = value;
    else if (strcmp(property, "temperature") == 0)
        gpu->temperature_c = value;
    else if (strcmp(property, "privilege") == 0)
        machine->privilege = value;
    else
        return control_end(INVALID_ARGUMENT);
    return control_end(OK);
}
