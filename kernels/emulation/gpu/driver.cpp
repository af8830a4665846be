// libcuda.so.1: memory, streams, events, graphs, modules and launches.
#include "../kernels.h"
#include "gpu.h"
#include <cuda.h>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#include <vector>

namespace {

constexpr size_t kPage = 4096;
constexpr size_t kAlignment = 16;  // less than a GPU's 256, so that a guard page is near

std::recursive_mutex lock;
std::map<uintptr_t, size_t> live;
size_t used = 0, most_used = 0;
std::map<std::string, unsigned long> calls;
std::string running = "nothing";

using Graph = std::vector<std::function<void()>>;
thread_local std::shared_ptr<Graph> captured;  // of the thread's stream

struct Counted {
  explicit Counted(const char* name) : guard(lock) { calls[name]++; }
  std::lock_guard<std::recursive_mutex> guard;
};
#define ENTRY Counted counted(__func__)

// A number from the environment, so that a run can be another GPU.
int setting(const char* name, int usual) {
  const char* text = getenv(name);
  return text ? atoi(text) : usual;
}
int capability() { return setting("EMULATED_GPU_SM", 90); }
// What this crate's code was made from.
int ptx_version() { return setting("EMULATED_GPU_PTX", capability()); }

void on_bad_access(int, siginfo_t* info, void*) {
  char text[256];
  int length = snprintf(text, sizeof text, "emulated GPU: access outside memory, at %p, by %s\n", info->si_addr, running.c_str());
  if (write(2, text, static_cast<size_t>(length)) < 0) abort();
  _exit(1);
}

size_t pages(size_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }

void* allocate(size_t bytes) {
  const size_t whole = pages((bytes + kAlignment - 1) / kAlignment * kAlignment);
  void* map = mmap(nullptr, whole + 2 * kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (map == MAP_FAILED) return nullptr;
  unsigned char* first = static_cast<unsigned char*>(map) + kPage;
  if (mprotect(first, whole, PROT_READ | PROT_WRITE) != 0) abort();
  memset(first, 0xff, whole);
  const size_t room = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  unsigned char* begin = first + whole - room;
  live[reinterpret_cast<uintptr_t>(begin)] = bytes;
  used += bytes;
  if (used > most_used) most_used = used;
  return begin;
}

void release(uintptr_t begin) {
  auto found = live.find(begin);
  if (found == live.end()) gpu::fail("memory is freed that is not allocated");
  const size_t bytes = found->second, room = (bytes + kAlignment - 1) / kAlignment * kAlignment, whole = pages(room);
  unsigned char* first = reinterpret_cast<unsigned char*>(begin) + room - whole;
  for (unsigned char* p = first; p < first + whole - room; p++) {
    if (*p != 0xff) gpu::fail("a write before memory of %zu bytes", bytes);
  }
  for (unsigned char* p = first + whole - room + bytes; p < first + whole; p++) {
    if (*p != 0xff) gpu::fail("a write behind memory of %zu bytes", bytes);
  }
  munmap(first - kPage, whole + 2 * kPage);
  used -= bytes;
  live.erase(found);
}

struct Function {
  std::string symbol;
  int shared = 48 * 1024;
};

// Bytes of its own that nvcc gives a kernel, at the most (scripts/check-kernels.sh prints them).
int own_shared(const Function& function) {
  return function.symbol.find("ce_distribution") == 0 ? 1280 : function.symbol.find("ce_") == 0 ? 512 : 0;
}

void run_own(const KernelEntry& entry, emu::LaunchShape shape, Params params) {
  const void* const* words = reinterpret_cast<const void* const*>(&params);
  for (size_t i = 0; i < offsetof(Params, logits_rows) / sizeof(void*); i++) {
    if (words[i]) gpu::check_memory(words[i], 1, entry.symbol);
  }
  struct Call {
    void (*run)(Params);
    Params params;
  } call{entry.run, params};
  auto body = [](void* argument) {
    const Call& call = *static_cast<const Call*>(argument);
    call.run(call.params);
  };
  try {
    emu::launch(shape, static_cast<uint64_t>(setting("EMULATED_GPU_SEED", 1)), body, &call);
  } catch (const std::exception& error) {
    gpu::fail("%s: %s", entry.symbol, error.what());
  }
}

CUresult launch(const Function& function, emu::LaunchShape shape, void** arguments) {
  if (shape.dynamic_shared_bytes > static_cast<size_t>(function.shared)) return CUDA_ERROR_INVALID_VALUE;
  for (const KernelEntry* entry = kKernels; entry->symbol; entry++) {
    if (function.symbol != entry->symbol) continue;
    if (shape.cluster > 1 && capability() < 90) return CUDA_ERROR_INVALID_CLUSTER_SIZE;
    const Params params = *static_cast<Params*>(arguments[0]);
    gpu::submit([entry, shape, params] {
      running = entry->symbol;
      run_own(*entry, shape, params);
      running = "nothing";
    });
    return CUDA_SUCCESS;
  }
  std::function<void()> work = gpu::kernel_of_candle({function.symbol, shape, arguments});
  if (!work) gpu::fail("candle's kernel %s has no twin here (kernels/emulation/gpu/candle.cpp)", function.symbol.c_str());
  const std::string& symbol = function.symbol;
  gpu::submit([symbol, work] {
    running = symbol;
    work();
    running = "nothing";
  });
  return CUDA_SUCCESS;
}

// How often each function of the driver was called, for who counts them.
struct Report {
  ~Report() {
    const char* name = getenv("EMULATED_GPU_CALLS");
    FILE* file = name ? fopen(name, "w") : nullptr;
    if (!file) return;
    for (const auto& [name, count] : calls) fprintf(file, "%s %lu\n", name.c_str(), count);
    fclose(file);
  }
} report;

template <class T> T handle(auto* value) { return reinterpret_cast<T>(value); }

}  // namespace

void gpu::fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  fputs("emulated GPU: ", stderr);
  vfprintf(stderr, format, arguments);
  fputc('\n', stderr);
  _exit(1);
}

std::unique_lock<std::recursive_mutex> gpu::hold() { return std::unique_lock(lock); }

void gpu::submit(std::function<void()> work) {
  submit_unlocked([work = std::move(work)] {
    const auto held = hold();
    work();
  });
}

void gpu::submit_unlocked(std::function<void()> work) {
  if (captured) {
    captured->push_back(std::move(work));
  } else {
    work();
  }
}

void gpu::check_memory(const void* begin, size_t bytes, const char* what) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(begin);
  auto next = live.upper_bound(at);
  const bool good = next != live.begin() && at + bytes <= std::prev(next)->first + std::prev(next)->second;
  if (!good) fail("%s: %zu bytes at %p are not in memory that is allocated", what, bytes, begin);
}

extern "C" {

CUresult cuInit(unsigned) {
  ENTRY;
  static char stack[1 << 16];
  stack_t alternative = {};
  alternative.ss_sp = stack;
  alternative.ss_size = sizeof stack;
  sigaltstack(&alternative, nullptr);
  struct sigaction action = {};
  action.sa_sigaction = on_bad_access;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigaction(SIGSEGV, &action, nullptr);
  sigaction(SIGBUS, &action, nullptr);
  return CUDA_SUCCESS;
}
CUresult cuDriverGetVersion(int* version) {
  *version = CUDA_VERSION;
  return CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult error, const char** text) {
  static char buffer[64];
  snprintf(buffer, sizeof buffer, "error %d of the emulated GPU", static_cast<int>(error));
  *text = buffer;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  *device = ordinal;
  return ordinal < setting("EMULATED_GPU_COUNT", 1) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}
CUresult cuDeviceGetName(char* name, int length, CUdevice) {
  snprintf(name, static_cast<size_t>(length), "emulated sm_%d", capability());
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice) {
  const bool large = capability() >= 80;
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = capability() / 10; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = capability() % 10; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = setting("EMULATED_GPU_MULTIPROCESSORS", 132); break;
    case CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE: *value = 50 << 20; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = (large ? 228 : 64) * 1024; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = (large ? 227 : 64) * 1024; break;
    case CU_DEVICE_ATTRIBUTE_RESERVED_SHARED_MEMORY_PER_BLOCK: *value = large ? 1024 : 0; break;
    case CU_DEVICE_ATTRIBUTE_CLUSTER_LAUNCH: *value = capability() >= 90; break;
    case CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED: *value = 1; break;
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = 1024; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
    default: gpu::fail("attribute %d of a device is not known here", static_cast<int>(attribute));
  }
  return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice) {
  static int one;
  *context = handle<CUcontext>(&one);
  return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRelease_v2(CUdevice) { return CUDA_SUCCESS; }
CUresult cuCtxDestroy_v2(CUcontext) { return CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext) {
  ENTRY;
  return CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext* context) { return cuDevicePrimaryCtxRetain(context, 0); }
CUresult cuCtxSynchronize() {
  ENTRY;
  return captured ? CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED : CUDA_SUCCESS;
}

CUresult cuMemAlloc_v2(CUdeviceptr* address, size_t bytes) {
  ENTRY;
  if (bytes == 0) return CUDA_ERROR_INVALID_VALUE;
  *address = reinterpret_cast<CUdeviceptr>(allocate(bytes));
  return *address ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}
CUresult cuMemAllocAsync(CUdeviceptr* address, size_t bytes, CUstream) { return cuMemAlloc_v2(address, bytes); }
CUresult cuMemFree_v2(CUdeviceptr address) {
  ENTRY;
  release(address);
  return CUDA_SUCCESS;
}
CUresult cuMemFreeAsync(CUdeviceptr address, CUstream) {
  ENTRY;
  if (!captured) release(address);  // a graph keeps what it uses
  return CUDA_SUCCESS;
}
CUresult cuMemGetInfo_v2(size_t* free, size_t* total) {
  const auto held = gpu::hold();
  *total = size_t{80} << 30;
  *free = *total - used;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetDefaultMemPool(CUmemoryPool* pool, CUdevice) {
  static int one;
  *pool = handle<CUmemoryPool>(&one);
  return CUDA_SUCCESS;
}
CUresult cuMemPoolGetAttribute(CUmemoryPool, CUmemPool_attribute attribute, void* value) {
  const auto held = gpu::hold();
  const bool most = attribute == CU_MEMPOOL_ATTR_USED_MEM_HIGH || attribute == CU_MEMPOOL_ATTR_RESERVED_MEM_HIGH;
  *static_cast<uint64_t*>(value) = most ? most_used : used;
  return CUDA_SUCCESS;
}
CUresult cuMemPoolSetAttribute(CUmemoryPool, CUmemPool_attribute, void*) {
  const auto held = gpu::hold();
  most_used = used;
  return CUDA_SUCCESS;
}
CUresult cuMemPoolTrimTo(CUmemoryPool, size_t) { return CUDA_SUCCESS; }

CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void* from, size_t bytes, CUstream) {
  ENTRY;
  if (bytes == 0) return CUDA_SUCCESS;
  void* target = reinterpret_cast<void*>(to);
  gpu::check_memory(target, bytes, "a copy to the device");
  gpu::submit([=] { memcpy(target, from, bytes); });
  return CUDA_SUCCESS;
}
CUresult cuMemcpyDtoHAsync_v2(void* to, CUdeviceptr from, size_t bytes, CUstream) {
  ENTRY;
  if (bytes == 0) return CUDA_SUCCESS;
  const void* source = reinterpret_cast<const void*>(from);
  gpu::check_memory(source, bytes, "a copy from the device");
  gpu::submit([=] { memcpy(to, source, bytes); });
  return CUDA_SUCCESS;
}
CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream) {
  ENTRY;
  if (bytes == 0) return CUDA_SUCCESS;
  void* target = reinterpret_cast<void*>(to);
  const void* source = reinterpret_cast<const void*>(from);
  gpu::check_memory(target, bytes, "a copy on the device");
  gpu::check_memory(source, bytes, "a copy on the device");
  gpu::submit([=] { memmove(target, source, bytes); });
  return CUDA_SUCCESS;
}
CUresult cuMemcpyPeerAsync(CUdeviceptr to, CUcontext, CUdeviceptr from, CUcontext, size_t bytes, CUstream stream) {
  return cuMemcpyDtoDAsync_v2(to, from, bytes, stream);
}
CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t bytes, CUstream) {
  ENTRY;
  if (bytes == 0) return CUDA_SUCCESS;
  void* target = reinterpret_cast<void*>(to);
  gpu::check_memory(target, bytes, "a fill of memory");
  gpu::submit([=] { memset(target, value, bytes); });
  return CUDA_SUCCESS;
}

CUresult cuStreamCreate(CUstream* stream, unsigned) {
  *stream = handle<CUstream>(new int);
  return CUDA_SUCCESS;
}
CUresult cuStreamDestroy_v2(CUstream stream) {
  delete reinterpret_cast<int*>(stream);
  return CUDA_SUCCESS;
}
CUresult cuStreamSynchronize(CUstream) {
  ENTRY;
  return captured ? CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED : CUDA_SUCCESS;
}
CUresult cuStreamWaitEvent(CUstream, CUevent, unsigned) {
  ENTRY;
  return CUDA_SUCCESS;
}
CUresult cuStreamIsCapturing(CUstream, CUstreamCaptureStatus* status) {
  *status = captured ? CU_STREAM_CAPTURE_STATUS_ACTIVE : CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}
CUresult cuStreamBeginCapture_v2(CUstream, CUstreamCaptureMode) {
  captured = std::make_shared<Graph>();
  return CUDA_SUCCESS;
}
CUresult cuStreamEndCapture(CUstream, CUgraph* graph) {
  *graph = handle<CUgraph>(new std::shared_ptr<Graph>(std::move(captured)));
  captured = nullptr;
  return CUDA_SUCCESS;
}
CUresult cuGraphInstantiateWithFlags(CUgraphExec* exec, CUgraph graph, unsigned long long) {
  *exec = handle<CUgraphExec>(new std::shared_ptr<Graph>(*reinterpret_cast<std::shared_ptr<Graph>*>(graph)));
  return CUDA_SUCCESS;
}
CUresult cuGraphLaunch(CUgraphExec exec, CUstream) {
  { ENTRY; }  // work that waits for other threads does so without the lock
  for (const auto& work : **reinterpret_cast<std::shared_ptr<Graph>*>(exec)) work();
  return CUDA_SUCCESS;
}
CUresult cuGraphDestroy(CUgraph graph) {
  delete reinterpret_cast<std::shared_ptr<Graph>*>(graph);
  return CUDA_SUCCESS;
}
CUresult cuGraphExecDestroy(CUgraphExec exec) {
  delete reinterpret_cast<std::shared_ptr<Graph>*>(exec);
  return CUDA_SUCCESS;
}

CUresult cuEventCreate(CUevent* event, unsigned) {
  ENTRY;
  *event = handle<CUevent>(new int);
  return CUDA_SUCCESS;
}
CUresult cuEventDestroy_v2(CUevent event) {
  ENTRY;
  delete reinterpret_cast<int*>(event);
  return CUDA_SUCCESS;
}
CUresult cuEventRecord(CUevent, CUstream) {
  ENTRY;
  return CUDA_SUCCESS;
}
CUresult cuEventSynchronize(CUevent) {
  ENTRY;
  return captured ? CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED : CUDA_SUCCESS;
}
CUresult cuEventElapsedTime_v2(float* milliseconds, CUevent, CUevent) {
  *milliseconds = 1;
  return CUDA_SUCCESS;
}

// What is in a module is not looked at: its kernels are known by their symbols.
CUresult cuModuleLoadData(CUmodule* module, const void*) {
  ENTRY;
  *module = handle<CUmodule>(new int);
  return captured ? CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED : CUDA_SUCCESS;
}
CUresult cuModuleLoad(CUmodule* module, const char*) { return cuModuleLoadData(module, nullptr); }
CUresult cuModuleUnload(CUmodule module) {
  delete reinterpret_cast<int*>(module);
  return CUDA_SUCCESS;
}
CUresult cuModuleGetFunction(CUfunction* function, CUmodule, const char* symbol) {
  ENTRY;
  *function = handle<CUfunction>(new Function{symbol});
  return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction function) {
  switch (attribute) {
    case CU_FUNC_ATTRIBUTE_PTX_VERSION: *value = ptx_version(); break;
    case CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES: *value = own_shared(*reinterpret_cast<Function*>(function)); break;
    default: gpu::fail("attribute %d of a function is not known here", attribute);
  }
  return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  Function& of = *reinterpret_cast<Function*>(function);
  if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) return CUDA_SUCCESS;
  int most = 0;
  cuDeviceGetAttribute(&most, CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, 0);
  if (value < 0 || value + own_shared(of) > most) return CUDA_ERROR_INVALID_VALUE;
  of.shared = value;
  return CUDA_SUCCESS;
}
CUresult cuOccupancyMaxPotentialClusterSize(int* size, CUfunction, const CUlaunchConfig*) {
  *size = 16;
  return CUDA_SUCCESS;
}
CUresult cuOccupancyMaxActiveClusters(int* count, CUfunction, const CUlaunchConfig* config) {
  // Three blocks a multiprocessor, whatever the cluster.
  *count = 3 * setting("EMULATED_GPU_MULTIPROCESSORS", 132) / static_cast<int>(config->attrs[0].value.clusterDim.x);
  return CUDA_SUCCESS;
}
CUresult cuLaunchKernel(CUfunction function, unsigned grid, unsigned grid_y, unsigned grid_z, unsigned block, unsigned block_y,
                        unsigned block_z, unsigned shared, CUstream, void** arguments, void**) {
  ENTRY;
  emu::LaunchShape shape{grid * grid_y * grid_z, block * block_y * block_z, 1, shared};
  return launch(*reinterpret_cast<Function*>(function), shape, arguments);
}
CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** arguments, void**) {
  ENTRY;
  emu::LaunchShape shape{config->gridDimX, config->blockDimX, 1, config->sharedMemBytes};
  for (unsigned i = 0; i < config->numAttrs; i++) {
    const CUlaunchAttribute& attribute = config->attrs[i];
    switch (attribute.id) {
      case CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION: shape.cluster = attribute.value.clusterDim.x; break;
      case CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION:
        // A GPU would start it, and nothing would make it wait.
        if (ptx_version() < 90) gpu::fail("a kernel that overlaps with earlier ones, from code that does not wait for them");
        break;
      default: gpu::fail("attribute %d of a launch is not known here", static_cast<int>(attribute.id));
    }
  }
  return launch(*reinterpret_cast<Function*>(function), shape, arguments);
}

}  // extern "C"
