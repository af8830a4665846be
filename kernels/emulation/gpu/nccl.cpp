// libnccl between threads of one process, as much of it as this crate uses. Ranks meet at each operation, and the last to come
// does its work; what NCCL would not notice, or wait for without end, ends the program.
#include "gpu.h"
#include "number.h"
#include <chrono>
#include <condition_variable>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <vector>

namespace {

struct Id {
  char bytes[128];
};

enum class Operation { kStart, kGather, kSum };

struct Part {
  Operation operation;
  const void* from;
  void* to;
  size_t count;
  int type;  // number::Type
};

struct Group {
  std::mutex mutex;
  std::condition_variable changed;
  std::vector<Part> parts;
  size_t arrived = 0;
  unsigned long round = 0;
};

struct Communicator {
  std::shared_ptr<Group> group;
  size_t rank;
};

std::mutex groups_mutex;
std::map<std::string, std::weak_ptr<Group>> groups;

int number_type(int type) {
  switch (type) {
    case 1: return number::kU8;
    case 3: return number::kU32;
    case 4: return number::kI64;
    case 6: return number::kF16;
    case 7: return number::kF32;
    case 8: return number::kF64;
    case 9: return number::kBf16;
    default: gpu::fail("NCCL's type %d is not known here", type);
  }
}

void combine(const std::vector<Part>& parts) {
  const Part& first = parts[0];
  for (const Part& part : parts) {
    if (part.operation != first.operation || part.count != first.count || part.type != first.type) {
      gpu::fail("ranks call NCCL with different operations, counts or types");
    }
  }
  if (first.operation == Operation::kStart) return;
  const auto lock = gpu::hold();
  const bool gather = first.operation == Operation::kGather;
  const size_t bytes = first.count * number::size(first.type);
  for (const Part& part : parts) {
    gpu::check_memory(part.from, bytes, "what a rank gives NCCL");
    gpu::check_memory(part.to, gather ? parts.size() * bytes : bytes, "what NCCL gives a rank");
  }
  if (gather) {
    for (const Part& part : parts) {
      for (size_t rank = 0; rank < parts.size(); rank++) memcpy(static_cast<char*>(part.to) + rank * bytes, parts[rank].from, bytes);
    }
    return;
  }
  for (size_t i = 0; i < first.count; i++) {
    // Rounded at each addition, as NCCL does it.
    double sum[1];
    memcpy(sum, static_cast<const char*>(first.from) + i * number::size(first.type), number::size(first.type));
    for (size_t rank = 1; rank < parts.size(); rank++) {
      const long double next = number::read(sum, 0, first.type) + number::read(parts[rank].from, i, first.type);
      number::write(sum, 0, first.type, next);
    }
    for (const Part& part : parts) number::write(part.to, i, first.type, number::read(sum, 0, first.type));
  }
}

void meet(const Communicator& communicator, const Part& part) {
  Group& group = *communicator.group;
  std::unique_lock guard(group.mutex);
  group.parts[communicator.rank] = part;
  if (++group.arrived == group.parts.size()) {
    combine(group.parts);
    group.arrived = 0;
    group.round++;
    group.changed.notify_all();
    return;
  }
  const unsigned long round = group.round;
  const bool met = group.changed.wait_for(guard, std::chrono::seconds(60), [&] { return group.round != round; });
  if (!met) gpu::fail("a rank waits for another one in NCCL");
}

int operate(const Communicator* communicator, const Part& part) {
  gpu::submit_unlocked([communicator = *communicator, part] { meet(communicator, part); });
  return 0;
}

}  // namespace

extern "C" {

int ncclGetUniqueId(Id* id) {
  std::random_device random;
  for (char& byte : id->bytes) byte = static_cast<char>(random());
  return 0;
}
int ncclCommInitRank(Communicator** communicator, int size, Id id, int rank) {
  if (rank < 0 || rank >= size) return 4;  // ncclInvalidArgument
  std::shared_ptr<Group> group;
  {
    std::lock_guard guard(groups_mutex);
    std::weak_ptr<Group>& known = groups[std::string(id.bytes, sizeof id.bytes)];
    group = known.lock();
    if (!group) known = group = std::make_shared<Group>();
    group->parts.resize(static_cast<size_t>(size));
  }
  *communicator = new Communicator{group, static_cast<size_t>(rank)};
  meet(**communicator, {Operation::kStart, nullptr, nullptr, static_cast<size_t>(size), 0});
  return 0;
}
int ncclCommDestroy(Communicator* communicator) {
  delete communicator;
  return 0;
}
int ncclCommAbort(Communicator* communicator) { return ncclCommDestroy(communicator); }
int ncclCommGetAsyncError(Communicator*, int* error) {
  *error = 0;
  return 0;
}
const char* ncclGetErrorString(int) { return "an error of the emulated NCCL"; }
const char* ncclGetLastError(Communicator*) { return ""; }
int ncclAllGather(const void* from, void* to, size_t count, int type, Communicator* communicator, void*) {
  return operate(communicator, {Operation::kGather, from, to, count, number_type(type)});
}
int ncclAllReduce(const void* from, void* to, size_t count, int type, int reduction, Communicator* communicator, void*) {
  if (reduction != 0) gpu::fail("NCCL's reduction %d is not known here", reduction);
  return operate(communicator, {Operation::kSum, from, to, count, number_type(type)});
}

}  // extern "C"
