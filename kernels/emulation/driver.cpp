// driver CASE RESULT: runs the case's launches once for every seed, each time from the initial contents, and writes
// the output buffers. Anything wrong is said on stderr, with exit status 1. driver --list: the kernels' symbols.
#include "buffer.h"
#include "case_file.h"
#include "emulator.h"
#include "kernels.h"
#include <memory>
#include <stdio.h>
#include <stdlib.h>

namespace {

using Bytes = std::vector<unsigned char>;
using Memory = std::vector<std::unique_ptr<GuardedBuffer>>;

struct Call {
  void (*run)(Params);
  Params params;
};

KernelEntry find_kernel(const std::string& symbol) {
  for (const KernelEntry* entry = kKernels; entry->symbol; entry++) {
    if (symbol == entry->symbol) return *entry;
  }
  throw std::runtime_error("no kernel has this symbol");
}

Params relocate(const CaseLaunch& launch, const Memory& memory) {
  if (launch.params.size() != sizeof(Params) || launch.pointers * sizeof(uint64_t) > sizeof(Params)) {
    throw std::runtime_error("the case's Params are not those of params.cuh");
  }
  Bytes bytes = launch.params;
  for (uint64_t i = 0; i < launch.pointers; i++) {
    uint64_t word;
    memcpy(&word, &bytes[i * sizeof word], sizeof word);
    if (word == 0) continue;
    uint64_t buffer = (word >> 40) - 1, offset = word & ((uint64_t{1} << 40) - 1);
    if (buffer >= memory.size()) throw std::runtime_error("pointer " + std::to_string(i) + " names no buffer");
    word = reinterpret_cast<uint64_t>(memory[buffer]->begin()) + offset;
    memcpy(&bytes[i * sizeof word], &word, sizeof word);
  }
  Params params;
  memcpy(&params, bytes.data(), sizeof params);
  return params;
}

void check_buffer(const CaseBuffer& description, GuardedBuffer& buffer) {
  if (auto at = buffer.broken_guard()) {
    throw std::runtime_error("a write outside " + description.name + ", at byte " + std::to_string(*at) + " of " +
                             std::to_string(buffer.bytes()));
  }
  if (!description.output && memcmp(buffer.begin(), description.contents.data(), buffer.bytes()) != 0) {
    throw std::runtime_error("a write to " + description.name + ", which is an input");
  }
}

void run_launch(const CaseLaunch& launch, const std::vector<CaseBuffer>& buffers, Memory& memory, uint64_t seed) {
  for (size_t i = 0; i < memory.size(); i++) {
    emu::watch_global(memory[i]->begin(), memory[i]->bytes(), buffers[i].name.c_str());
  }
  Call call{find_kernel(launch.symbol).run, relocate(launch, memory)};
  auto body = [](void* argument) {
    const Call& call = *static_cast<const Call*>(argument);
    call.run(call.params);
  };
  emu::launch(launch.shape, seed, body, &call);
  emu::unwatch_all();
  for (size_t i = 0; i < memory.size(); i++) check_buffer(buffers[i], *memory[i]);
}

// The output buffers after each launch; inputs are left empty.
using History = std::vector<std::vector<Bytes>>;

void compare(const std::vector<CaseBuffer>& buffers, const std::vector<Bytes>& first, const std::vector<Bytes>& now) {
  for (size_t i = 0; i < buffers.size(); i++) {
    for (size_t byte = 0; byte < first[i].size(); byte++) {
      if (first[i][byte] != now[i][byte]) {
        throw std::runtime_error("the bits of " + buffers[i].name + " depend on the schedule, first at byte " +
                                 std::to_string(byte));
      }
    }
  }
}

History run_seed(const Case& test, uint64_t seed, const History* first) {
  Memory memory;
  for (const CaseBuffer& buffer : test.buffers) {
    memory.push_back(std::make_unique<GuardedBuffer>(buffer.contents, buffer.offset, seed));
  }
  History history;
  for (size_t step = 0; step < test.launches.size(); step++) {
    const CaseLaunch& launch = test.launches[step];
    try {
      run_launch(launch, test.buffers, memory, seed);
      auto& snapshot = history.emplace_back();
      for (size_t i = 0; i < memory.size(); i++) {
        snapshot.push_back(test.buffers[i].output ? memory[i]->contents() : Bytes());
      }
      if (first) compare(test.buffers, (*first)[step], snapshot);
    } catch (const std::runtime_error& error) {
      throw std::runtime_error("launch " + std::to_string(step) + " (" + launch.symbol + "), seed " +
                               std::to_string(seed) + ": " + error.what());
    }
  }
  return history;
}

void run(const std::string& case_path, const std::string& result_path) {
  Case test = CaseReader(case_path).read();
  if (test.seeds.empty() || test.launches.empty()) throw std::runtime_error("the case has nothing to run");
  History first = run_seed(test, test.seeds[0], nullptr);
  for (size_t i = 1; i < test.seeds.size(); i++) run_seed(test, test.seeds[i], &first);
  std::ofstream result(result_path, std::ios::binary);
  for (size_t i = 0; i < test.buffers.size(); i++) {
    if (!test.buffers[i].output) continue;
    const Bytes& bytes = first.back()[i];
    result.write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
  }
  if (!result.flush()) throw std::runtime_error("cannot write " + result_path);
}

// Whether each path of the kernels was taken, for the test that asks by this variable.
void write_paths() {
  const char* name = getenv("EMULATION_PATHS");
  if (!name) return;
  std::ofstream file(name);
  for (const emu::Path* path = emu::Path::first; path; path = path->next) {
    file << path->taken << '\t' << path->label << '\t' << path->where << '\n';
  }
}

}  // namespace

int main(int count, char** arguments) {
  if (count == 2 && std::string(arguments[1]) == "--list") {
    for (const KernelEntry* entry = kKernels; entry->symbol; entry++) puts(entry->symbol);
    return 0;
  }
  if (count != 3) {
    fprintf(stderr, "usage: driver CASE RESULT\n");
    return 2;
  }
  try {
    run(arguments[1], arguments[2]);
    write_paths();
  } catch (const std::exception& error) {
    fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
