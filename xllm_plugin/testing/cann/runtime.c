/* The part of CANN's runtime that torch_npu and this package call, over host memory.
 *
 * Compiled against the headers in torch_npu's wheel, so a signature that is not CANN's does not
 * compile.  What is not here is absent, as in an older CANN, or answers "not supported"
 * (unsupported.c).
 *
 * Work is done when it is given to a stream.  `emulator_hold` makes the device busy: events
 * recorded from then on, and every wait for a stream, are not done before `emulator_release`.
 *
 * Environment: XLLM_CANN_DEVICES (1), XLLM_CANN_MEMORY_BYTES (4 GiB a device), XLLM_CANN_USED_BYTES
 * (0, what other processes hold of it), XLLM_CANN_BUSY (0; 1: no device can be taken), XLLM_CANN_SOC
 * (Ascend910B3), XLLM_CANN_VERSION (8.5.0).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "acl/acl.h"
#include "acl/acl_op_compiler.h"
#include "acl/acl_rt.h"
#include "acl/error_codes/rt_error_codes.h"

#define MAX_DEVICES 16
#define HUGE_PAGE ((size_t)2 << 20)
#define HEADER 512 /* in front of each allocation; CANN aligns to 512 bytes */

typedef struct stream { int32_t id; int device; } stream_t;
typedef struct event { uint64_t recorded_in_hold; double recorded_s; int recorded; } event_t;
typedef struct context { int device; } context_t;
typedef struct physical { int fd; size_t bytes; int device; int num_mappings; } physical_t;
typedef struct range { char *start; size_t bytes; struct range *next; } range_t;
typedef struct mapping { char *start; size_t bytes; physical_t *page; struct mapping *next; } mapping_t;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t released = PTHREAD_COND_INITIALIZER;
static context_t contexts[MAX_DEVICES];
static __thread context_t *current;
static __thread char last_error[256];
static size_t used_bytes[MAX_DEVICES];
static int32_t num_streams;
static stream_t default_stream = {0, 0};
static range_t *ranges;
static mapping_t *mappings;
static int num_holds;
static uint64_t hold; /* counts the times that the device became busy */

static aclError fail(aclError code, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(last_error, sizeof last_error, format, arguments);
    va_end(arguments);
    return code;
}

static long long setting(const char *name, long long otherwise)
{
    const char *value = getenv(name);
    return value && *value ? atoll(value) : otherwise;
}

static int num_devices(void)
{
    long long count = setting("XLLM_CANN_DEVICES", 1);
    return count < 0 ? 0 : count > MAX_DEVICES ? MAX_DEVICES : (int)count;
}

static size_t capacity_bytes(void)
{
    return (size_t)setting("XLLM_CANN_MEMORY_BYTES", 4LL << 30);
}

static size_t used_by_others_bytes(void)
{
    return (size_t)setting("XLLM_CANN_USED_BYTES", 0);
}

/* The emulator's own calls, for tests. */

void emulator_hold(void)
{
    pthread_mutex_lock(&lock);
    if (num_holds++ == 0) hold++;
    pthread_mutex_unlock(&lock);
}

void emulator_release(void)
{
    pthread_mutex_lock(&lock);
    if (num_holds && --num_holds == 0) pthread_cond_broadcast(&released);
    pthread_mutex_unlock(&lock);
}

static int fail_map_at;

void emulator_fail_map(int at) { fail_map_at = at; }

extern int32_t emulator_capturing;
static int fails_in_capture;

/* The next capture finds no memory. */
void emulator_fail_capture(void) { fails_in_capture = 1; }

static int streams_run_out;

/* The next capture finds no streams. */
void emulator_fail_streams(void) { streams_run_out = 1; }

/* Initialisation and devices. */

aclError aclInit(const char *path) { (void)path; return ACL_SUCCESS; }
aclError aclFinalize(void) { return ACL_SUCCESS; }
const char *aclGetRecentErrMsg(void) { return last_error; }
const char *aclrtGetSocName(void)
{
    const char *name = getenv("XLLM_CANN_SOC");
    return name && *name ? name : "Ascend910B3";
}

/* Declared deprecated in the header, and the only one that every CANN has. */
aclError aclsysGetCANNVersion(aclCANNPackageName name, aclCANNPackageVersion *version)
{
    const char *cann = getenv("XLLM_CANN_VERSION");
    const char *text = name == ACL_PKG_NAME_DRIVER ? "25.2.0" : cann && *cann ? cann : "8.5.0";
    memset(version, 0, sizeof *version);
    if (name != ACL_PKG_NAME_CANN && name != ACL_PKG_NAME_DRIVER)
        return fail(ACL_ERROR_INVALID_FILE, "package %d", (int)name);
    snprintf(version->version, sizeof version->version, "%s", text);
    return ACL_SUCCESS;
}
void aclAppLog(aclLogLevel level, const char *function, const char *file, uint32_t line,
               const char *format, ...)
{
    (void)level, (void)function, (void)file, (void)line, (void)format;
}

aclError aclrtGetDeviceCount(uint32_t *count)
{
    *count = (uint32_t)num_devices();
    return *count ? ACL_SUCCESS : fail(ACL_ERROR_RT_NO_DEVICE, "no device");
}

aclError aclrtSetDevice(int32_t device)
{
    if (device < 0 || device >= num_devices())
        return fail(ACL_ERROR_RT_INVALID_DEVICEID, "device %d of %d", device, num_devices());
    if (setting("XLLM_CANN_BUSY", 0))
        return fail(ACL_ERROR_RT_DEV_SETUP_ERROR, "device %d is set up by another process", device);
    contexts[device].device = device;
    current = &contexts[device];
    return ACL_SUCCESS;
}

aclError aclrtResetDevice(int32_t device) { (void)device; current = NULL; return ACL_SUCCESS; }

aclError aclrtGetDevice(int32_t *device)
{
    if (!current) return fail(ACL_ERROR_RT_CONTEXT_NULL, "no device was set in this thread");
    *device = current->device;
    return ACL_SUCCESS;
}

aclError aclrtGetCurrentContext(aclrtContext *context)
{
    *context = current;
    return current ? ACL_SUCCESS
                   : fail(ACL_ERROR_RT_CONTEXT_NULL, "no device was set in this thread");
}

aclError aclrtSetCurrentContext(aclrtContext context)
{
    if (!context) return fail(ACL_ERROR_RT_PARAM_INVALID, "context is NULL");
    current = context;
    return ACL_SUCCESS;
}

aclError aclrtGetPrimaryCtxState(int32_t device, uint32_t *flags, int32_t *active)
{
    (void)flags;
    *active = current && current->device == device;
    return ACL_SUCCESS;
}

aclError aclrtDeviceCanAccessPeer(int32_t *can, int32_t device, int32_t peer)
{
    (void)device, (void)peer;
    *can = 0;
    return ACL_SUCCESS;
}

aclError aclGetDeviceCapability(uint32_t device, aclDeviceInfo info, int64_t *value)
{
    (void)device, (void)info;
    *value = 0;
    return ACL_SUCCESS;
}

#define NUM_OPTIONS 3

static int64_t options[NUM_OPTIONS]; /* of aclSysParamOpt: deterministic, debug, consistency */

aclError aclrtSetSysParamOpt(aclSysParamOpt option, int64_t value)
{
    if (option < 0 || option >= NUM_OPTIONS)
        return fail(ACL_ERROR_RT_PARAM_INVALID, "option %d", option);
    options[option] = value;
    return ACL_SUCCESS;
}

aclError aclrtCtxSetSysParamOpt(aclSysParamOpt option, int64_t value)
{
    return aclrtSetSysParamOpt(option, value);
}

aclError aclrtGetSysParamOpt(aclSysParamOpt option, int64_t *value)
{
    if (option < 0 || option >= NUM_OPTIONS)
        return fail(ACL_ERROR_RT_PARAM_INVALID, "option %d", option);
    *value = options[option];
    return ACL_SUCCESS;
}

/* How CANN's compiler and its kernels round: nothing here reads it. */
aclError aclSetCompileopt(aclCompileOpt option, const char *value)
{
    (void)option, (void)value;
    return ACL_SUCCESS;
}

aclError aclrtSetDeviceSatMode(aclrtFloatOverflowMode mode) { (void)mode; return ACL_SUCCESS; }

/* Memory.  A device's memory is not zero when it is given out: here it is all ones, which floating
 * point reads as NaN. */

static int take(int device, size_t bytes)
{
    int fits;
    size_t used = used_by_others_bytes();
    pthread_mutex_lock(&lock);
    used += used_bytes[device];
    fits = bytes <= capacity_bytes() && used <= capacity_bytes() - bytes;
    if (fits) used_bytes[device] += bytes;
    pthread_mutex_unlock(&lock);
    return fits;
}

static void give(int device, size_t bytes)
{
    pthread_mutex_lock(&lock);
    used_bytes[device] -= bytes;
    pthread_mutex_unlock(&lock);
}

typedef struct header { size_t bytes; int device; } header_t;

aclError aclrtMalloc(void **address, size_t bytes, aclrtMemMallocPolicy policy)
{
    char *block;
    size_t whole = (bytes + HEADER - 1) / HEADER * HEADER;
    (void)policy;
    if (!current) return fail(ACL_ERROR_RT_CONTEXT_NULL, "no device was set in this thread");
    if (!bytes) return fail(ACL_ERROR_RT_PARAM_INVALID, "size is 0");
    if (fails_in_capture && emulator_capturing)
        return fail(ACL_ERROR_RT_MEMORY_ALLOCATION, "a failure was asked for");
    if (!take(current->device, whole))
        return fail(ACL_ERROR_RT_MEMORY_ALLOCATION, "out of memory: %zu bytes", bytes);
    block = aligned_alloc(HEADER, whole + HEADER);
    if (!block) {
        give(current->device, whole);
        return fail(ACL_ERROR_RT_MEMORY_ALLOCATION, "the host is out of memory");
    }
    *(header_t *)block = (header_t){whole, current->device};
    memset(block + HEADER, 0xff, whole);
    *address = block + HEADER;
    return ACL_SUCCESS;
}

aclError aclrtMallocAlign32(void **address, size_t bytes, aclrtMemMallocPolicy policy)
{
    return aclrtMalloc(address, bytes, policy);
}

aclError aclrtFree(void *address)
{
    header_t *header = (header_t *)((char *)address - HEADER);
    give(header->device, header->bytes);
    free(header);
    return ACL_SUCCESS;
}

aclError aclrtMallocHost(void **address, size_t bytes)
{
    *address = aligned_alloc(HEADER, (bytes + HEADER - 1) / HEADER * HEADER);
    return *address ? ACL_SUCCESS : fail(ACL_ERROR_RT_MEMORY_ALLOCATION, "out of host memory");
}

aclError aclrtFreeHost(void *address) { free(address); return ACL_SUCCESS; }

aclError aclrtGetMemInfo(aclrtMemAttr attribute, size_t *free_bytes, size_t *total_bytes)
{
    (void)attribute;
    size_t used;
    if (!current) return fail(ACL_ERROR_RT_CONTEXT_NULL, "no device was set in this thread");
    pthread_mutex_lock(&lock);
    used = used_by_others_bytes() + used_bytes[current->device];
    *total_bytes = capacity_bytes();
    *free_bytes = used < *total_bytes ? *total_bytes - used : 0;
    pthread_mutex_unlock(&lock);
    return ACL_SUCCESS;
}

aclError aclrtMemcpy(void *to, size_t room, const void *from, size_t bytes, aclrtMemcpyKind kind)
{
    (void)kind;
    if (bytes > room) return fail(ACL_ERROR_RT_PARAM_INVALID, "%zu bytes into %zu", bytes, room);
    memmove(to, from, bytes);
    return ACL_SUCCESS;
}

aclError aclrtMemcpyAsync(void *to, size_t room, const void *from, size_t bytes,
                          aclrtMemcpyKind kind, aclrtStream stream)
{
    (void)stream;
    return aclrtMemcpy(to, room, from, bytes, kind);
}

aclError aclrtMemset(void *to, size_t room, int32_t value, size_t bytes)
{
    if (bytes > room) return fail(ACL_ERROR_RT_PARAM_INVALID, "%zu bytes into %zu", bytes, room);
    memset(to, value, bytes);
    return ACL_SUCCESS;
}

aclError aclrtMemsetAsync(void *to, size_t room, int32_t value, size_t bytes, aclrtStream stream)
{
    (void)stream;
    return aclrtMemset(to, room, value, bytes);
}

/* Streams and events. */

static void wait_until_idle(void)
{
    pthread_mutex_lock(&lock);
    while (num_holds) pthread_cond_wait(&released, &lock);
    pthread_mutex_unlock(&lock);
}

aclError aclrtCreateStream(aclrtStream *stream)
{
    stream_t *made = malloc(sizeof *made);
    if (!current) return free(made), fail(ACL_ERROR_RT_CONTEXT_NULL, "no device was set");
    pthread_mutex_lock(&lock);
    *made = (stream_t){++num_streams, current->device};
    pthread_mutex_unlock(&lock);
    *stream = made;
    return ACL_SUCCESS;
}

aclError aclrtCreateStreamWithConfig(aclrtStream *stream, uint32_t priority, uint32_t flags)
{
    (void)priority, (void)flags;
    return aclrtCreateStream(stream);
}

aclError aclrtDestroyStream(aclrtStream stream) { free(stream); return ACL_SUCCESS; }
aclError aclrtDestroyStreamForce(aclrtStream stream) { return aclrtDestroyStream(stream); }

aclError aclrtStreamGetId(aclrtStream stream, int32_t *id)
{
    *id = (stream ? (stream_t *)stream : &default_stream)->id;
    return ACL_SUCCESS;
}

aclError aclrtStreamQuery(aclrtStream stream, aclrtStreamStatus *status)
{
    (void)stream;
    pthread_mutex_lock(&lock);
    *status = num_holds ? ACL_STREAM_STATUS_NOT_READY : ACL_STREAM_STATUS_COMPLETE;
    pthread_mutex_unlock(&lock);
    return ACL_SUCCESS;
}

aclError aclrtSynchronizeStream(aclrtStream stream)
{
    (void)stream;
    wait_until_idle();
    return ACL_SUCCESS;
}

aclError aclrtSynchronizeStreamWithTimeout(aclrtStream stream, int32_t timeout)
{
    (void)timeout;
    return aclrtSynchronizeStream(stream);
}

aclError aclrtSynchronizeDevice(void) { wait_until_idle(); return ACL_SUCCESS; }
aclError aclrtSynchronizeDeviceWithTimeout(int32_t timeout)
{
    (void)timeout;
    return aclrtSynchronizeDevice();
}

aclError aclrtSetStreamFailureMode(aclrtStream stream, uint64_t mode)
{
    (void)stream, (void)mode;
    return ACL_SUCCESS;
}

aclError aclrtSetOpWaitTimeout(uint32_t timeout) { (void)timeout; return ACL_SUCCESS; }
aclError aclrtSetOpExecuteTimeOut(uint32_t timeout) { (void)timeout; return ACL_SUCCESS; }

aclError aclrtCreateEventWithFlag(aclrtEvent *event, uint32_t flags)
{
    (void)flags;
    *event = calloc(1, sizeof(event_t));
    return ACL_SUCCESS;
}

aclError aclrtCreateEventExWithFlag(aclrtEvent *event, uint32_t flags)
{
    return aclrtCreateEventWithFlag(event, flags);
}

aclError aclrtDestroyEvent(aclrtEvent event) { free(event); return ACL_SUCCESS; }

aclError aclrtRecordEvent(aclrtEvent event, aclrtStream stream)
{
    event_t *recorded = event;
    struct timespec now;
    (void)stream;
    clock_gettime(CLOCK_MONOTONIC, &now);
    pthread_mutex_lock(&lock);
    recorded->recorded = 1;
    recorded->recorded_s = (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
    recorded->recorded_in_hold = num_holds ? hold : 0;
    pthread_mutex_unlock(&lock);
    return ACL_SUCCESS;
}

aclError aclrtResetEvent(aclrtEvent event, aclrtStream stream)
{
    (void)stream;
    ((event_t *)event)->recorded = 0;
    return ACL_SUCCESS;
}

/* With the lock held. */
static int is_pending(const event_t *event)
{
    return event->recorded && num_holds && event->recorded_in_hold == hold;
}

aclError aclrtQueryEventStatus(aclrtEvent event, aclrtEventRecordedStatus *status)
{
    pthread_mutex_lock(&lock);
    *status = is_pending(event) ? ACL_EVENT_RECORDED_STATUS_NOT_READY
                                : ACL_EVENT_RECORDED_STATUS_COMPLETE;
    pthread_mutex_unlock(&lock);
    return ACL_SUCCESS;
}

aclError aclrtQueryEventWaitStatus(aclrtEvent event, aclrtEventWaitStatus *status)
{
    pthread_mutex_lock(&lock);
    *status = is_pending(event) ? ACL_EVENT_WAIT_STATUS_NOT_READY : ACL_EVENT_WAIT_STATUS_COMPLETE;
    pthread_mutex_unlock(&lock);
    return ACL_SUCCESS;
}

aclError aclrtSynchronizeEvent(aclrtEvent event)
{
    pthread_mutex_lock(&lock);
    while (is_pending(event)) pthread_cond_wait(&released, &lock);
    pthread_mutex_unlock(&lock);
    return ACL_SUCCESS;
}

aclError aclrtStreamWaitEvent(aclrtStream stream, aclrtEvent event)
{
    (void)stream, (void)event;
    return ACL_SUCCESS;
}

aclError aclrtEventElapsedTime(float *elapsed_ms, aclrtEvent first, aclrtEvent second)
{
    const event_t *from = first, *to = second;
    if (!from->recorded || !to->recorded)
        return fail(ACL_ERROR_RT_EVENT_TIMESTAMP_INVALID, "an event was never recorded");
    *elapsed_ms = (float)((to->recorded_s - from->recorded_s) * 1e3);
    return ACL_SUCCESS;
}

/* Graph capture.  What operators do while a stream is captured is written down above this library
 * (`device.tape`), which is told of each replay and of each graph's end.
 *
 * `emulator_capturing` is the number of the graph being captured, `emulator_group` that of the task
 * group open in it, and `emulator_updating` that of the group whose task is being replaced; 0: none.
 */
typedef struct model { int32_t number; } model_t;
typedef struct group { int32_t number; } group_t;
typedef void (*told_t)(int32_t number);

int32_t emulator_capturing, emulator_group, emulator_updating;
static aclrtStream captured_stream;
static model_t *captured;
static int32_t num_models, num_groups;
static told_t on_replay, on_destroy;

void emulator_tell(told_t replay, told_t destroy) { on_replay = replay; on_destroy = destroy; }

aclError aclmdlRICaptureBegin(aclrtStream stream, aclmdlRICaptureMode mode)
{
    (void)mode;
    if (captured) return fail(ACL_ERROR_RT_STREAM_CAPTURED, "a stream is being captured");
    if (streams_run_out) {
        streams_run_out = 0;
        return fail(ACL_ERROR_RT_NO_STREAM_RESOURCE, "a failure was asked for");
    }
    captured = malloc(sizeof *captured);
    captured->number = emulator_capturing = ++num_models;
    captured_stream = stream;
    return ACL_SUCCESS;
}

aclError aclmdlRICaptureEnd(aclrtStream stream, aclmdlRI *model)
{
    if (!captured || stream != captured_stream)
        return fail(ACL_ERROR_RT_STREAM_NOT_CAPTURED, "the stream is not being captured");
    *model = captured;
    captured = NULL;
    emulator_capturing = fails_in_capture = 0;
    return ACL_SUCCESS;
}

aclError aclmdlRICaptureGetInfo(aclrtStream stream, aclmdlRICaptureStatus *status, aclmdlRI *model)
{
    int active = captured && stream == captured_stream;
    *status = active ? ACL_MODEL_RI_CAPTURE_STATUS_ACTIVE : ACL_MODEL_RI_CAPTURE_STATUS_NONE;
    if (model) *model = active ? captured : NULL;
    return ACL_SUCCESS;
}

aclError aclmdlRICaptureThreadExchangeMode(aclmdlRICaptureMode *mode)
{
    (void)mode;
    return ACL_SUCCESS;
}

aclError aclmdlRIExecuteAsync(aclmdlRI model, aclrtStream stream)
{
    (void)stream;
    if (captured) return fail(ACL_ERROR_RT_STREAM_CAPTURED, "a stream is being captured");
    if (on_replay) on_replay(((model_t *)model)->number);
    return ACL_SUCCESS;
}

aclError aclmdlRIDestroy(aclmdlRI model)
{
    if (on_destroy) on_destroy(((model_t *)model)->number);
    free(model);
    return ACL_SUCCESS;
}

aclError aclrtSetStreamAttribute(aclrtStream stream, aclrtStreamAttr attribute,
                                 aclrtStreamAttrValue *value)
{
    (void)stream, (void)attribute, (void)value; /* how a captured stream caches shapes */
    return ACL_SUCCESS;
}

aclError aclmdlRICaptureTaskGrpBegin(aclrtStream stream)
{
    if (!captured || stream != captured_stream)
        return fail(ACL_ERROR_RT_STREAM_NOT_CAPTURED, "the stream is not being captured");
    emulator_group = ++num_groups;
    return ACL_SUCCESS;
}

aclError aclmdlRICaptureTaskGrpEnd(aclrtStream stream, aclrtTaskGrp *handle)
{
    group_t *group = malloc(sizeof *group); /* CANN has no call that frees one */
    (void)stream;
    group->number = emulator_group;
    emulator_group = 0;
    *handle = group;
    return ACL_SUCCESS;
}

aclError aclmdlRICaptureTaskUpdateBegin(aclrtStream stream, aclrtTaskGrp handle)
{
    (void)stream;
    emulator_updating = ((group_t *)handle)->number;
    return ACL_SUCCESS;
}

aclError aclmdlRICaptureTaskUpdateEnd(aclrtStream stream)
{
    (void)stream;
    emulator_updating = 0;
    return ACL_SUCCESS;
}

/* Virtual memory: a physical page is a memory file, which can show at several addresses. */

static range_t *range_of(const char *address, size_t bytes)
{
    range_t *range = ranges;
    while (range && (address < range->start || address + bytes > range->start + range->bytes))
        range = range->next;
    return range;
}

aclError aclrtMemGetAllocationGranularity(aclrtPhysicalMemProp *properties,
                                          aclrtMemGranularityOptions option, size_t *bytes)
{
    (void)option;
    if (properties->location.type != ACL_MEM_LOCATION_TYPE_DEVICE ||
        properties->location.id >= (uint32_t)num_devices())
        return fail(ACL_ERROR_RT_PARAM_INVALID, "location is no device");
    *bytes = HUGE_PAGE;
    return ACL_SUCCESS;
}

aclError aclrtReserveMemAddress(void **address, size_t bytes, size_t alignment, void *expected,
                                uint64_t flags)
{
    char *start, *aligned;
    range_t *range;
    if (!current) return fail(ACL_ERROR_RT_CONTEXT_NULL, "no device was set in this thread");
    /* CANN's documentation: alignment is 0, flags name the page (1: huge). */
    if (!bytes || bytes % HUGE_PAGE || alignment || expected || flags > 1)
        return fail(ACL_ERROR_RT_PARAM_INVALID, "size, alignment, address or flags");
    start = mmap(NULL, bytes + HUGE_PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                 -1, 0);
    if (start == MAP_FAILED) return fail(ACL_ERROR_RT_MEMORY_ALLOCATION, "no addresses left");
    aligned = (char *)(((uintptr_t)start + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE);
    if (aligned > start) munmap(start, (size_t)(aligned - start));
    munmap(aligned + bytes, HUGE_PAGE - (size_t)(aligned - start));
    range = malloc(sizeof *range);
    pthread_mutex_lock(&lock);
    *range = (range_t){aligned, bytes, ranges};
    ranges = range;
    pthread_mutex_unlock(&lock);
    *address = aligned;
    return ACL_SUCCESS;
}

aclError aclrtReleaseMemAddress(void *address)
{
    range_t **link, *range;
    aclError code = ACL_SUCCESS;
    pthread_mutex_lock(&lock);
    for (link = &ranges; (range = *link) && range->start != address; link = &range->next) {}
    if (range) {
        for (mapping_t *one = mappings; one && code == ACL_SUCCESS; one = one->next)
            if (one->start >= range->start && one->start < range->start + range->bytes)
                code = fail(ACL_ERROR_RT_PARAM_INVALID, "a page is mapped there");
        if (code == ACL_SUCCESS) {
            *link = range->next;
            munmap(range->start, range->bytes);
            free(range);
        }
    } else
        code = fail(ACL_ERROR_RT_PARAM_INVALID, "%p was not reserved", address);
    pthread_mutex_unlock(&lock);
    return code;
}

aclError aclrtMallocPhysical(aclrtDrvMemHandle *handle, size_t bytes,
                             const aclrtPhysicalMemProp *properties, uint64_t flags)
{
    physical_t *page;
    int device = (int)properties->location.id;
    if (!bytes || bytes % HUGE_PAGE || flags || device >= num_devices() ||
        properties->location.type != ACL_MEM_LOCATION_TYPE_DEVICE ||
        properties->allocationType != ACL_MEM_ALLOCATION_TYPE_PINNED ||
        properties->handleType != ACL_MEM_HANDLE_TYPE_NONE)
        return fail(ACL_ERROR_RT_PARAM_INVALID, "size, properties or flags");
    if (!take(device, bytes))
        return fail(ACL_ERROR_RT_MEMORY_ALLOCATION, "out of memory: %zu bytes", bytes);
    page = malloc(sizeof *page);
    *page = (physical_t){memfd_create("cann-page", MFD_CLOEXEC), bytes, device, 0};
    if (page->fd < 0 || ftruncate(page->fd, (off_t)bytes)) {
        if (page->fd >= 0) close(page->fd);
        free(page);
        give(device, bytes);
        return fail(ACL_ERROR_RT_MEMORY_ALLOCATION, "%s", strerror(errno));
    }
    *handle = page;
    return ACL_SUCCESS;
}

aclError aclrtFreePhysical(aclrtDrvMemHandle handle)
{
    physical_t *page = handle;
    if (page->num_mappings) return fail(ACL_ERROR_RT_PARAM_INVALID, "the page is mapped");
    give(page->device, page->bytes);
    close(page->fd);
    free(page);
    return ACL_SUCCESS;
}

aclError aclrtMapMem(void *address, size_t bytes, size_t offset, aclrtDrvMemHandle handle,
                     uint64_t flags)
{
    physical_t *page = handle;
    mapping_t *mapping;
    aclError code = ACL_SUCCESS;
    if (fail_map_at && --fail_map_at == 0)
        return fail(ACL_ERROR_RT_MEMORY_ALLOCATION, "a failure was asked for");
    pthread_mutex_lock(&lock);
    for (mapping = mappings; mapping && mapping->start != address; mapping = mapping->next) {}
    if (mapping || offset || flags || bytes != page->bytes || !range_of(address, bytes))
        code = fail(ACL_ERROR_RT_PARAM_INVALID, "not reserved, mapped already, or not one page");
    else if (mmap(address, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, page->fd, 0) ==
             MAP_FAILED)
        code = fail(ACL_ERROR_RT_MEMORY_ALLOCATION, "%s", strerror(errno));
    else {
        mapping = malloc(sizeof *mapping);
        *mapping = (mapping_t){address, bytes, page, mappings};
        mappings = mapping;
        page->num_mappings++;
    }
    pthread_mutex_unlock(&lock);
    return code;
}

aclError aclrtUnmapMem(void *address)
{
    mapping_t **link, *mapping;
    aclError code = ACL_SUCCESS;
    pthread_mutex_lock(&lock);
    for (link = &mappings; (mapping = *link) && mapping->start != address; link = &mapping->next) {}
    if (!mapping)
        code = fail(ACL_ERROR_RT_PARAM_INVALID, "nothing is mapped at %p", address);
    else {
        mmap(address, mapping->bytes, PROT_NONE,
             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
        mapping->page->num_mappings--;
        *link = mapping->next;
        free(mapping);
    }
    pthread_mutex_unlock(&lock);
    return code;
}
