/* The null GPU: what PyTorch's CUDA build sees as one H100, and computes nothing.
 *
 * Memory is address space that the kernel fills with zeros on first touch; copies are real where a
 * host takes part in them; a kernel launch is a line in a table. This file holds the functions that
 * must do something. All other functions of the CUDA libraries that PyTorch calls are written by
 * run.py, which reads their names from PyTorch itself: most of them say "done".
 *
 * Compiled twice. Without a flag: the CUDA runtime and cuBLAS, preloaded before PyTorch's own. With
 * -DDRIVER: libcuda.so.1, which the library of Triton kernels talks to. Arguments that do not
 * matter are left out of the definitions, which the calling conventions of x86-64 and aarch64
 * permit. Every function returns the library's status, 0 for success. */
#define _GNU_SOURCE
#include <cuda.h>
#include <driver_types.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { INVALID = 1, OUT_OF_MEMORY = 2 };
enum place { ELSEWHERE, HOST, DEVICE }; /* numbered as enum cudaMemoryType */

void null_gpu_note(const char *name, long launches, double bytes, double flops);
enum place null_gpu_place(const void *address);

static int attribute(int which) {
    switch (which) {
    case cudaDevAttrComputeCapabilityMajor: return 9;
    case cudaDevAttrComputeCapabilityMinor: return 0;
    case cudaDevAttrMultiProcessorCount: return 132;
    case cudaDevAttrWarpSize: return 32;
    case cudaDevAttrMaxThreadsPerBlock: return 1024;
    case cudaDevAttrMaxThreadsPerMultiProcessor: return 2048;
    case cudaDevAttrMaxBlocksPerMultiprocessor: return 32;
    case cudaDevAttrMaxSharedMemoryPerBlock: return 48 << 10;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return 227 << 10;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return 228 << 10;
    case cudaDevAttrMaxRegistersPerBlock:
    case cudaDevAttrMaxRegistersPerMultiprocessor: return 65536;
    case cudaDevAttrMaxBlockDimX:
    case cudaDevAttrMaxBlockDimY: return 1024;
    case cudaDevAttrMaxBlockDimZ: return 64;
    case cudaDevAttrMaxGridDimX: return 0x7fffffff;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ: return 65535;
    case cudaDevAttrClockRate: return 1980000;       /* kHz */
    case cudaDevAttrMemoryClockRate: return 2619000; /* kHz */
    case cudaDevAttrGlobalMemoryBusWidth: return 5120;
    case cudaDevAttrL2CacheSize: return 50 << 20;
    default: return 1; /* nearly all of the rest ask whether something is supported */
    }
}

#ifndef DRIVER
/* ---- The table of what was launched --------------------------------------------------------- */
struct row {
    char *name;
    long launches;
    double bytes, flops;
    struct row *next;
};
static struct row *rows[4096];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* backward has threads of its own */

void null_gpu_note(const char *name, long launches, double bytes, double flops) {
    unsigned bucket = 0;
    for (const char *c = name; *c; c++) bucket = bucket * 31 + (unsigned char)*c;
    pthread_mutex_lock(&lock);
    struct row **at = &rows[bucket % 4096];
    while (*at && strcmp((*at)->name, name)) at = &(*at)->next;
    if (!*at) {
        *at = calloc(1, sizeof **at);
        (*at)->name = strdup(name);
    }
    (*at)->launches += launches;
    (*at)->bytes += bytes;
    (*at)->flops += flops;
    pthread_mutex_unlock(&lock);
}

/* All rows as "launches bytes flops name" lines; the caller frees the text. */
char *null_gpu_table(void) {
    char *text;
    size_t length;
    FILE *out = open_memstream(&text, &length);
    pthread_mutex_lock(&lock);
    for (int i = 0; i < 4096; i++)
        for (struct row *r = rows[i]; r; r = r->next)
            if (r->launches) fprintf(out, "%ld %.17g %.17g %s\n", r->launches, r->bytes, r->flops, r->name);
    pthread_mutex_unlock(&lock);
    fclose(out);
    return text;
}

void null_gpu_reset(void) {
    pthread_mutex_lock(&lock);
    for (int i = 0; i < 4096; i++)
        for (struct row *r = rows[i]; r; r = r->next) r->launches = r->bytes = r->flops = 0;
    pthread_mutex_unlock(&lock);
}

/* ---- Memory --------------------------------------------------------------------------------- */
struct range {
    char *begin;
    size_t size;
    enum place place;
    struct range *next;
};
static struct range *ranges;
static size_t used;

static size_t capacity(void) {
    const char *gib = getenv("NULL_GPU_GIB");
    return (size_t)((gib ? atof(gib) : 79.0) * (1 << 30));
}

static void remember(void *begin, size_t size, enum place place) {
    struct range *r = malloc(sizeof *r);
    pthread_mutex_lock(&lock);
    *r = (struct range){begin, size, place, ranges};
    ranges = r;
    if (place == DEVICE) used += size;
    pthread_mutex_unlock(&lock);
}

/* Size of the range that begins here, which is forgotten; 0 when none does. */
static size_t forget(void *begin) {
    size_t size = 0;
    pthread_mutex_lock(&lock);
    for (struct range **at = &ranges; *at; at = &(*at)->next) {
        struct range *r = *at;
        if (r->begin != begin) continue;
        size = r->size;
        if (r->place == DEVICE) used -= size;
        *at = r->next;
        free(r);
        break;
    }
    pthread_mutex_unlock(&lock);
    return size;
}

enum place null_gpu_place(const void *address) {
    enum place place = ELSEWHERE;
    pthread_mutex_lock(&lock);
    for (struct range *r = ranges; r; r = r->next)
        if ((char *)address >= r->begin && (char *)address < r->begin + r->size) place = r->place;
    pthread_mutex_unlock(&lock);
    return place;
}

int cudaMalloc(void **to, size_t size) {
    *to = NULL;
    if (used + size > capacity()) return OUT_OF_MEMORY;
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void *memory = mmap(NULL, size ? size : 1, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (memory == MAP_FAILED) return OUT_OF_MEMORY;
    remember(*to = memory, size, DEVICE);
    return 0;
}

int cudaFree(void *memory) {
    size_t size = memory ? forget(memory) : 0;
    if (memory && !size) return INVALID;
    if (memory) munmap(memory, size);
    return 0;
}

int cudaMemGetInfo(size_t *free_bytes, size_t *total) {
    *total = capacity();
    *free_bytes = *total - used;
    return 0;
}

int cudaHostAlloc(void **to, size_t size) {
    size = (size + 4095) / 4096 * 4096;
    if (!(*to = aligned_alloc(4096, size))) return OUT_OF_MEMORY;
    remember(*to, size, HOST);
    return 0;
}

int cudaFreeHost(void *memory) {
    forget(memory);
    free(memory);
    return 0;
}

int cudaHostRegister(void *memory, size_t size) {
    remember(memory, size, HOST);
    return 0;
}

int cudaHostUnregister(void *memory) { return forget(memory) ? 0 : INVALID; }

int cudaPointerGetAttributes(struct cudaPointerAttributes *found, void *address) {
    enum place place = null_gpu_place(address);
    memset(found, 0, sizeof *found);
    found->type = (enum cudaMemoryType)place;
    found->devicePointer = place == ELSEWHERE ? NULL : address;
    found->hostPointer = place == HOST ? address : NULL;
    return 0;
}

/* Copies are noted by what they mean for the host: a pageable one makes it wait, and so does one
 * that brings a number back. Between two places on the device only small ones (flags, counters) are
 * carried out. */
static int copy(void *to, const void *from, size_t size) {
    int into = null_gpu_place(to) == DEVICE, out_of = null_gpu_place(from) == DEVICE;
    const char *what = "copy on the device";
    if (into && !out_of)
        what = null_gpu_place(from) == HOST ? "copy to the device, pinned" : "copy to the device, pageable";
    else if (!into)
        what = "copy to the host";
    if (!into || !out_of || size <= 1 << 20) memmove(to, from, size);
    null_gpu_note(what, 1, (into + out_of) * (double)size, 0);
    return 0;
}
int cudaMemcpy(void *to, const void *from, size_t size) { return copy(to, from, size); }
int cudaMemcpyAsync(void *to, const void *from, size_t size) { return copy(to, from, size); }
int cudaMemcpy2DAsync(char *to, size_t to_pitch, char *from, size_t from_pitch, size_t width, size_t height) {
    for (size_t i = 0; i < height; i++) memmove(to + i * to_pitch, from + i * from_pitch, width);
    null_gpu_note("copy in two dimensions", 1, 2.0 * width * height, 0);
    return 0;
}

static int fill(void *memory, int value, size_t size) {
    if (size <= 1 << 20) memset(memory, value, size);
    null_gpu_note("fill of memory", 1, size, 0);
    return 0;
}
int cudaMemset(void *memory, int value, size_t size) { return fill(memory, value, size); }
int cudaMemsetAsync(void *memory, int value, size_t size) { return fill(memory, value, size); }

/* ---- The device, its streams and events ----------------------------------------------------- */
int cudaGetDeviceCount(int *count) { return *count = 1, 0; }
int cudaGetDevice(int *device) { return *device = 0, 0; }
int cudaDriverGetVersion(int *version) { return *version = CUDA_VERSION, 0; }
int cudaDeviceGetAttribute(int *value, int which) { return *value = attribute(which), 0; }
int cudaDeviceCanAccessPeer(int *can) { return *can = 0, 0; }
int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { return *least = 0, *greatest = -5, 0; }
int cudaDeviceGetPCIBusId(char *text, int size) { return snprintf(text, size, "0000:00:00.0"), 0; }

int cudaGetDeviceProperties(struct cudaDeviceProp *p) {
    memset(p, 0, sizeof *p);
    strcpy(p->name, "null GPU (as an H100)");
    p->totalGlobalMem = capacity();
    p->major = attribute(cudaDevAttrComputeCapabilityMajor);
    p->multiProcessorCount = attribute(cudaDevAttrMultiProcessorCount);
    p->warpSize = attribute(cudaDevAttrWarpSize);
    p->maxThreadsPerBlock = attribute(cudaDevAttrMaxThreadsPerBlock);
    p->maxThreadsPerMultiProcessor = attribute(cudaDevAttrMaxThreadsPerMultiProcessor);
    p->maxBlocksPerMultiProcessor = attribute(cudaDevAttrMaxBlocksPerMultiprocessor);
    p->sharedMemPerBlock = attribute(cudaDevAttrMaxSharedMemoryPerBlock);
    p->sharedMemPerBlockOptin = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    p->sharedMemPerMultiprocessor = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
    p->reservedSharedMemPerBlock = 1024;
    p->regsPerBlock = p->regsPerMultiprocessor = 65536;
    p->l2CacheSize = attribute(cudaDevAttrL2CacheSize);
    p->memoryBusWidth = attribute(cudaDevAttrGlobalMemoryBusWidth);
    p->totalConstMem = 65536;
    p->textureAlignment = 512;
    p->unifiedAddressing = p->concurrentKernels = p->cooperativeLaunch = p->clusterLaunch = 1;
    for (int i = 0; i < 3; i++) {
        p->maxThreadsDim[i] = attribute(cudaDevAttrMaxBlockDimX + i);
        p->maxGridSize[i] = attribute(cudaDevAttrMaxGridDimX + i);
    }
    return 0;
}
int cudaGetDeviceProperties_v2(struct cudaDeviceProp *p) { return cudaGetDeviceProperties(p); } /* CUDA 12 */

/* What has to be a handle points to its own byte. */
static int handle(void **to) { return *to = calloc(1, 64), 0; }
int cudaStreamCreate(void **stream) { return handle(stream); }
int cudaStreamCreateWithFlags(void **stream) { return handle(stream); }
int cudaStreamCreateWithPriority(void **stream) { return handle(stream); }
int cudaStreamGetPriority(void *stream, int *priority) { return *priority = 0, 0; }
int cudaStreamIsCapturing(void *stream, int *status) { return *status = 0, 0; }
int cudaStreamGetCaptureInfo(void *stream, int *status) { return *status = 0, 0; }
int cudaStreamGetCaptureInfo_v2(void *stream, int *status) { return *status = 0, 0; }
int cudaEventCreate(void **event) { return handle(event); }
int cudaEventCreateWithFlags(void **event) { return handle(event); }
int cudaEventElapsedTime(float *milliseconds) { return *milliseconds = 0.01f, 0; }
int cudaEventElapsedTime_v2(float *milliseconds) { return *milliseconds = 0.01f, 0; }

static int waited(void) { return null_gpu_note("wait of the host", 1, 0, 0), 0; }
int cudaDeviceSynchronize(void) { return waited(); }
int cudaStreamSynchronize(void) { return waited(); }
int cudaEventSynchronize(void) { return waited(); }

/* ---- Kernels of PyTorch --------------------------------------------------------------------- */
/* A program announces each kernel with the address of its host stub: the key of this open hash. */
#define KERNELS (1 << 19)
static struct { const void *stub; const char *name; } kernels[KERNELS];

static size_t slot(const void *stub) {
    size_t i = (size_t)stub * 0x9E3779B97F4A7C15ull >> 45;
    while (kernels[i].stub && kernels[i].stub != stub) i = (i + 1) % KERNELS;
    return i;
}

void **__cudaRegisterFatBinary(void) {
    void *one;
    handle(&one);
    return one;
}
void __cudaRegisterFunction(void **binary, const char *stub, char *symbol, const char *name) {
    size_t i = slot(stub);
    kernels[i].stub = stub;
    kernels[i].name = name;
}

static int launch(const void *stub) {
    const char *name = kernels[slot(stub)].name;
    null_gpu_note(name ? name : "unknown kernel", 1, 0, 0);
    return 0;
}
int __cudaGetKernel(const void **kernel, const void *stub) { return *kernel = stub, 0; }
int __cudaLaunchKernel(const void *kernel) { return launch(kernel); }
int cudaLaunchKernel(const void *stub) { return launch(stub); }
int cudaLaunchKernelExC(const void *configuration, const void *stub) { return launch(stub); }

int cudaFuncGetAttributes(struct cudaFuncAttributes *found) {
    memset(found, 0, sizeof *found);
    found->maxThreadsPerBlock = 1024;
    found->numRegs = 32;
    found->binaryVersion = found->ptxVersion = 90;
    return 0;
}
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks) { return *blocks = 2, 0; }
int cudaGetSymbolAddress(void **to) { return cudaMalloc(to, 4096); }

static int no_such_function(void) { return 801; } /* not supported */
int cudaGetDriverEntryPointByVersion(const char *name, void **to, unsigned version, long flags, int *found) {
    *to = (void *)no_such_function;
    if (found) *found = 0;
    return 0;
}
int cudaGetDriverEntryPoint(const char *name, void **to, long flags, int *found) {
    return cudaGetDriverEntryPointByVersion(name, to, 0, flags, found);
}

/* ---- Matrix products: noted with their size -------------------------------------------------- */
static int width(int type) { /* bytes of a number, by cudaDataType */
    switch (type) {
    case 1: return 8;           /* double */
    case 2: case 14: return 2;  /* half, bfloat16 */
    case 3: case 28: case 29: return 1; /* int8, both fp8 */
    default: return 4;
    }
}

static int product(long m, long n, long k, long batch, int type) {
    char name[96];
    const char *kind = type == 14 ? "bf16" : type == 2 ? "fp16" : type == 1 ? "fp64" : type == 0 ? "fp32" : "8 bit";
    snprintf(name, sizeof name, "product %s %ldx%ldx%ld batch %ld", kind, m, n, k, batch);
    double bytes = (double)batch * (m * k + k * n + m * n) * width(type);
    null_gpu_note(name, 1, bytes, 2.0 * batch * m * n * k);
    return 0;
}

int cublasSgemm_v2(void *h, int ta, int tb, int m, int n, int k) { return product(m, n, k, 1, 0); }
int cublasDgemm_v2(void *h, int ta, int tb, int m, int n, int k) { return product(m, n, k, 1, 1); }
int cublasSgemv_v2(void *h, int ta, int m, int n) { return product(m, 1, n, 1, 0); }
int cublasDgemv_v2(void *h, int ta, int m, int n) { return product(m, 1, n, 1, 1); }
int cublasSgemmEx(void *h, int ta, int tb, int m, int n, int k, void *alpha, void *a, int type) {
    return product(m, n, k, 1, type);
}
int cublasGemmEx(void *h, int ta, int tb, int m, int n, int k, void *alpha, void *a, int type) {
    return product(m, n, k, 1, type);
}
int cublasSgemmStridedBatched(void *h, int ta, int tb, int m, int n, int k, void *alpha, void *a, int lda, long sa,
                              void *b, int ldb, long sb, void *beta, void *c, int ldc, long sc, int batch) {
    return product(m, n, k, batch, 0);
}
int cublasDgemmStridedBatched(void *h, int ta, int tb, int m, int n, int k, void *alpha, void *a, int lda, long sa,
                              void *b, int ldb, long sb, void *beta, void *c, int ldc, long sc, int batch) {
    return product(m, n, k, batch, 1);
}
int cublasGemmStridedBatchedEx(void *h, int ta, int tb, int m, int n, int k, void *alpha, void *a, int type, int lda,
                               long sa, void *b, int bt, int ldb, long sb, void *beta, void *c, int ct, int ldc,
                               long sc, int batch) {
    return product(m, n, k, batch, type);
}
int cublasCreate_v2(void **h) { return handle(h); }
int cublasGetMathMode(void *h, int *mode) { return *mode = 0, 0; }
int cublasGetPointerMode_v2(void *h, int *mode) { return *mode = 0, 0; }

/* cuBLASLt describes a product by objects: their sizes are kept where the handles point. */
struct layout { int type, batch; long rows, columns; };
struct operation { int transposed_a; };

int cublasLtMatrixLayoutCreate(struct layout **to, int type, size_t rows, size_t columns) {
    *to = calloc(1, sizeof **to);
    **to = (struct layout){type, 1, rows, columns};
    return 0;
}
int cublasLtMatrixLayoutSetAttribute(struct layout *of, int which, const int *value) {
    if (which == 5) of->batch = *value; /* CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT */
    return 0;
}
int cublasLtMatrixLayoutDestroy(void *h) { return free(h), 0; }
int cublasLtMatmulDescCreate(struct operation **to) { return handle((void **)to); }
int cublasLtMatmulDescSetAttribute(struct operation *of, int which, const int *value) {
    if (which == 3) of->transposed_a = *value; /* CUBLASLT_MATMUL_DESC_TRANSA */
    return 0;
}
int cublasLtMatmulDescDestroy(void *h) { return free(h), 0; }
int cublasLtMatmulPreferenceCreate(void **to) { return handle(to); }
int cublasLtMatmulPreferenceDestroy(void *h) { return free(h), 0; }
int cublasLtMatmulAlgoGetHeuristic(void *h, void *of, void *a, void *b, void *c, void *d, void *preference, int wanted,
                                   void *results, int *found) {
    return *found = 1, 0;
}
int cublasLtMatmul(void *h, struct operation *of, void *alpha, void *a, struct layout *la, void *b, struct layout *lb,
                   void *beta, void *c, struct layout *lc, void *d, struct layout *ld) {
    return product(ld->rows, ld->columns, of->transposed_a ? la->rows : la->columns, ld->batch, la->type);
}

/* ---- Handles of the other libraries --------------------------------------------------------- */
int cudnnCreate(void **h) { return handle(h); }
int cusolverDnCreate(void **h) { return handle(h); }
int cusolverDnCreateParams(void **h) { return handle(h); }
int cusolverDnCreateGesvdjInfo(void **h) { return handle(h); }

#else
/* ---- The driver: Triton's kernels ----------------------------------------------------------- */
/* A kernel of a module is its name; a module is anything but null. */
CUresult cuInit(unsigned flags) { return 0; }
CUresult cuDriverGetVersion(int *version) { return *version = CUDA_VERSION, 0; }
CUresult cuDeviceGetCount(int *count) { return *count = 1, 0; }
CUresult cuDeviceGet(CUdevice *device, int number) { return *device = number, 0; }
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute which, CUdevice device) { return *value = attribute(which), 0; }
CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) { return *flags = 0, *active = 1, 0; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { return *context = (CUcontext)64, 0; }
CUresult cuCtxGetCurrent(CUcontext *context) { return *context = (CUcontext)64, 0; }
CUresult cuCtxSetCurrent(CUcontext context) { return 0; }
CUresult cuCtxGetDevice(CUdevice *device) { return *device = 0, 0; }
CUresult cuCtxGetLimit(size_t *value, CUlimit which) { return *value = 1 << 20, 0; }
CUresult cuCtxSetLimit(CUlimit which, size_t value) { return 0; }
CUresult cuGetErrorString(CUresult error, const char **text) { return *text = "refused by the null GPU", 0; }

CUresult cuModuleLoad(CUmodule *module, const char *file) { return *module = (CUmodule)64, 0; }
CUresult cuModuleLoadData(CUmodule *module, const void *image) { return *module = (CUmodule)64, 0; }
CUresult cuModuleLoadDataEx(CUmodule *module, const void *image, unsigned n, CUjit_option *names, void **values) {
    return *module = (CUmodule)64, 0;
}
CUresult cuModuleUnload(CUmodule module) { return 0; }
CUresult cuModuleGetFunction(CUfunction *kernel, CUmodule module, const char *name) {
    char *text;
    if (asprintf(&text, "triton %s", name) < 0) return OUT_OF_MEMORY;
    *kernel = (CUfunction)text;
    return 0;
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute which, CUfunction kernel) {
    *value = which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : which == CU_FUNC_ATTRIBUTE_NUM_REGS ? 32 : 0;
    return 0;
}
CUresult cuFuncSetAttribute(CUfunction kernel, CUfunction_attribute which, int value) { return 0; }
CUresult cuFuncSetCacheConfig(CUfunction kernel, CUfunc_cache which) { return 0; }
CUresult cuOccupancyMaxActiveClusters(int *n, CUfunction kernel, const CUlaunchConfig *how) { return *n = 1, 0; }
CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *n, CUfunction kernel, int threads, size_t shared) { return *n = 2, 0; }

/* Triton asks this of every pointer: an address of the host is an error, as on a device. */
CUresult cuPointerGetAttribute(void *value, CUpointer_attribute which, CUdeviceptr address) {
    if (null_gpu_place((void *)address) == ELSEWHERE) return CUDA_ERROR_INVALID_VALUE;
    *(CUdeviceptr *)value = address;
    return 0;
}

static CUresult launch(CUfunction kernel) { return null_gpu_note((const char *)kernel, 1, 0, 0), 0; }
CUresult cuLaunchKernel(CUfunction kernel, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz,
                        unsigned shared, CUstream stream, void **arguments, void **extra) {
    return launch(kernel);
}
CUresult cuLaunchKernelEx(const CUlaunchConfig *how, CUfunction kernel, void **arguments, void **extra) {
    return launch(kernel);
}
CUresult cuLaunchCooperativeKernel(CUfunction kernel, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by,
                                   unsigned bz, unsigned shared, CUstream stream, void **arguments) {
    return launch(kernel);
}

/* Encoders and linkers: the headers rename some of them, so that they are named by hand. */
#define DONE(name) int done_##name(void) __asm__(#name); int done_##name(void) { return 0; }
DONE(cuTensorMapEncodeTiled)
DONE(cuTensorMapEncodeIm2col)
DONE(cuLinkCreate_v2)
DONE(cuLinkAddData_v2)
DONE(cuLinkComplete)
#endif
