// A row on chip (sm_90): each block of a cluster holds a slice of the row in shared memory, so that device memory is
// read once and, for the gradient, written once. src/kernels/select.rs says how many blocks and how much of a row each.
//
// Bulk copies bring a slice in chunks, and sums start with the first. The image of a slice keeps its distance from a
// 16-byte boundary, its phase, so that copies and, later, the gradient's 16-byte stores need no shifting; only sums,
// whose groups are counted from the row's first element, straddle words. Behind its end the image is filled up with
// masked classes, so that loops over groups meet no edge. Each block sends its partial result to the others' shared
// memory, where an mbarrier counts what has arrived.
#pragma once
#include "row.cuh"

constexpr int kMaxBlocksPerRow = 16;
constexpr int kMaxChunks = 15;
// Groups that a thread adds up at once, so that few instructions go to anything but logits: four would be fewer still, and
// took longer on an H200, with 64 registers. With a softcap there are so many that it does not matter.
constexpr int kAtOnce = 2;
// Groups of a chunk that each thread has, multiples of `kAtOnce`, so that what is added up at once depends on the row
// alone. Every chunk is waited for, which costs more than to have the sums begin a little earlier.
constexpr int kChunk = 8;
// The first chunk's where there is a gradient: so much is copied before it is known whether the row is ignored, which
// takes as long as the copy. An ignored row without a gradient takes nothing else, and is better not copied.
constexpr int kEarly = 2;

// Groups of a slice before chunk c.
template <bool GRAD> DEVICE int chunk_begin(int c) {
  return c == 0 ? 0 : ((GRAD ? kEarly : kChunk) + (c - 1) * kChunk) * dev::on_chip_threads();
}

struct alignas(128) OnChip {
  uint64_t filled[kMaxChunks];       // one mbarrier a chunk
  uint64_t received;                 // the mbarrier of `slices`
  Partial slices[kMaxBlocksPerRow];  // the blocks' partial results
};
static_assert(sizeof(OnChip) == 640, "src/kernels/select.rs counts it");

template <class T> DEVICE int groups_of(const Stretch& slice) { return (slice.classes + kGroup<T> - 1) / kGroup<T>; }

// The slice of block `rank`; the last one has the padding.
template <class T> DEVICE Stretch slice_of_row(const Params& p, int rank) {
  const int vocab = static_cast<int>(p.vocab), length = static_cast<int>(p.groups_per_block) * kGroup<T>;
  const long long first = static_cast<long long>(rank) * length;
  const int begin = first < vocab ? static_cast<int>(first) : vocab;
  const int classes = vocab - begin < length ? vocab - begin : length;
  const bool last = rank + 1 == static_cast<int>(p.blocks_per_row);
  return {begin, classes, last ? static_cast<int>(p.width) - begin : classes};
}

// Gets ready for the copies of a slice of `groups`, and for partial results of `senders` blocks. One thread.
template <bool GRAD> DEVICE void init_mbarriers(OnChip* on_chip, int groups, unsigned senders) {
  ROLLED for (int c = 0; chunk_begin<GRAD>(c) < groups; c++) dev::mbarrier_init(&on_chip->filled[c], 1);
  if (senders != 0) dev::mbarrier_init(&on_chip->received, 1);
  dev::mbarrier_fence_init();
  if (senders != 0) dev::mbarrier_arrive_expect(&on_chip->received, senders * static_cast<unsigned>(sizeof(Partial)));
}

// Starts the copies of chunks `c` to `stop` of a slice into `image`, whose first word holds the 16 bytes that the slice
// starts in. One thread.
//
// A chunk brings what its groups need that earlier chunks did not: as a group may straddle two words, the word after
// its last group too. Words that are not wholly in the slice are left out.
template <class T, bool GRAD>
DEVICE void start_copies(OnChip* on_chip, char* image, const T* x, const Stretch& slice, unsigned phase, int c, int stop) {
  const int groups = groups_of<T>(slice);
  const int words = static_cast<int>((phase + slice.classes * sizeof(T)) / 16);
  const char* from = reinterpret_cast<const char*>(x) - phase;
  int begin = c > 0 ? chunk_begin<GRAD>(c) + 1 : phase == 0 ? 0 : 1;
  ROLLED for (; c < stop && chunk_begin<GRAD>(c) < groups; c++) {
    const int limit = chunk_begin<GRAD>(c + 1) + 1, end = limit < words ? limit : words;
    const unsigned bytes = end > begin ? static_cast<unsigned>(end - begin) * 16 : 0;
    dev::mbarrier_arrive_expect(&on_chip->filled[c], bytes);
    if (bytes != 0) dev::bulk_copy(image + begin * 16, from + begin * 16, bytes, &on_chip->filled[c]);
    begin = end > begin ? end : begin;
  }
}

// Copies the elements of the slice that share a word with others, fewer than a word at either end, and fills the
// slice's last group up. One warp.
template <class T> DEVICE void copy_edges(T* image, const T* x, int count, unsigned phase, int lane) {
  const int before = phase == 0 ? 0 : kGroup<T> - static_cast<int>(phase / sizeof(T));
  const int head = before < count ? before : count;
  const int tail = (count - head) % kGroup<T>, missing = (kGroup<T> - count % kGroup<T>) % kGroup<T>;
  if (lane < head) image[lane] = x[lane];
  if (lane < tail) image[count - 1 - lane] = x[count - 1 - lane];
  if (lane < missing) image[count + lane] = narrow_one<T>(-INFINITY);
}

template <class T, bool STATS, bool SOFTCAP, bool ALIGNED, int U>
DEVICE void add_from_image(ThreadSums& sums, const char* image, int group, int target, unsigned phase,
                           const Transform<SOFTCAP>& transform) {
  PATH("sums");
  uint4 v[U];
  const char* at = image + group * 16;
  const auto load = [&](int u, int second) { return dev::load16(at + (u * dev::on_chip_threads() + second) * 16); };
  if constexpr (ALIGNED) {
    UNROLL for (int u = 0; u < U; u++) v[u] = load(u, 0);
  } else {
    load_straddling<T>(v, phase, load);
  }
  add_groups<T, STATS>(sums, v, group, dev::on_chip_threads(), target, transform);
}

// Sums over the classes of a slice as its chunks arrive.
template <class T, bool STATS, bool SOFTCAP, bool GRAD, bool ALIGNED>
DEVICE ThreadSums sum_slice(OnChip* on_chip, const char* image, int groups, int target, unsigned phase,
                            const Transform<SOFTCAP>& transform) {
  ThreadSums sums = empty_sums();
  const int threads = dev::on_chip_threads();
  int group = static_cast<int>(threadIdx.x);
  for (int c = 0; chunk_begin<GRAD>(c) < groups; c++) {
    dev::mbarrier_wait(&on_chip->filled[c], 0);
    const int limit = chunk_begin<GRAD>(c + 1), end = limit < groups ? limit : groups;
    if constexpr (!SOFTCAP) {
      ROLLED for (; group + (kAtOnce - 1) * threads < end; group += kAtOnce * threads) {
        add_from_image<T, STATS, SOFTCAP, ALIGNED, kAtOnce>(sums, image, group, target, phase, transform);
      }
    }
    ROLLED for (; group < end; group += threads) {
      add_from_image<T, STATS, SOFTCAP, ALIGNED, 1>(sums, image, group, target, phase, transform);
    }
  }
  return sums;
}

template <class T, bool SOFTCAP, bool SPECIAL, int U>
DEVICE void write_whole_words(char* grad, const char* image, int word, const GradientFactors& f,
                              const Transform<SOFTCAP>& transform) {
  PATH("whole");
  const char* from = image + word * 16;
  char* to = grad + static_cast<unsigned>(word) * 16u;
  UNROLL for (int u = 0; u < U; u++) {
    const int at = u * dev::on_chip_threads() * 16;
    dev::store16_streaming(to + at, gradient_of_group<T, SOFTCAP, SPECIAL>(dev::load16(from + at), f, transform));
  }
}

// Gradient of the slice's classes where its 16-byte words lie as the image's do.
template <class T, bool SOFTCAP, bool SPECIAL>
DEVICE void write_words(T* grad, const char* image, int count, int target, unsigned phase, const GradientFactors& f,
                        const Transform<SOFTCAP>& transform) {
  constexpr int N = kGroup<T>, U = SOFTCAP || SPECIAL ? 1 : kAtOnce;
  const T* x = reinterpret_cast<const T*>(image + phase);
  const int lead = static_cast<int>(phase / sizeof(T)), threads = dev::on_chip_threads();
  const int first = lead > 0 ? 1 : 0, end = (count + lead) / N;  // words wholly in the slice
  char* words = reinterpret_cast<char*>(grad) - phase;
  int word = first + static_cast<int>(threadIdx.x);
  ROLLED for (; word + (U - 1) * threads < end; word += U * threads) {
    write_whole_words<T, SOFTCAP, SPECIAL, U>(words, image, word, f, transform);
  }
  if constexpr (U > 1) {
    ROLLED for (; word < end; word += threads) write_whole_words<T, SOFTCAP, SPECIAL, 1>(words, image, word, f, transform);
  }
  // Fewer than a word's elements at either end: the last threads.
  const int before = first * N - lead, head = before < count ? before : count;
  const int after = end * N - lead, tail = after > head ? after : head;
  const int last = threads - 1 - static_cast<int>(threadIdx.x);
  const int edge = last < N ? last : tail + last - N;
  const bool at_edge = edge < (last < N ? head : count);
  if (at_edge) {
    PATH("edge");
    grad[edge] = gradient_of_one<T, SOFTCAP, SPECIAL>(x[edge], f, transform);
  }
  const bool in_word = target >= head && target < tail;
  if (in_word ? is_own((target + lead) / N - first, threads) : at_edge && edge == target) write_target(grad + target, widen_one(x[target]), f, transform);
}

// Gradient of a slice from its image.
template <class T, bool SOFTCAP>
DEVICE void write_slice(const Params& p, uint64_t row, const char* image, unsigned phase, const Stretch& slice,
                        int row_target, const GradientFactors& f, const Transform<SOFTCAP>& transform) {
  T* grad = gradient_at<T>(p, row, slice);
  const T* x = reinterpret_cast<const T*>(image + phase);
  const bool same_words = (reinterpret_cast<uintptr_t>(grad) & 15u) == phase;
  if (!same_words || f.way == RowWay::kZero) {
    write_gradient<T, SOFTCAP, true>(p, row, x, slice, row_target, f, transform);
    return;
  }
  const int target = row_target - slice.begin;
  const bool special = f.way == RowWay::kSpecial;
  if (special) write_words<T, SOFTCAP, true>(grad, image, slice.classes, target, phase, f, transform);
  else write_words<T, SOFTCAP, false>(grad, image, slice.classes, target, phase, f, transform);
  const int padding = slice.width - slice.classes;
  if (padding > 0) fill_gradient<T>(p, row, 0.f, {slice.begin + slice.classes, 0, padding});
}

// What is needed again after the sums, which need all registers.
struct alignas(16) Kept {
  RowInputs in;
  Stretch slice;
  float target_logit;
  float gradient_scale;
  int rank;
  unsigned row;
  unsigned phase;
};

template <class T, bool STATS, bool SOFTCAP, bool GRAD> DEVICE void row_on_chip(const Params& p) {
  dev::begin_kernel();
  DYNAMIC_SHARED(memory);
  SHARED_ARRAY(Partial, scratch, kMaxWarps);
  SHARED_ARRAY(GradientFactors, factors, 1);
  SHARED_ARRAY(Kept, kept, 1);
  OnChip* on_chip = reinterpret_cast<OnChip*>(memory);
  char* image = reinterpret_cast<char*>(memory) + sizeof(OnChip);
  const bool one_block = p.blocks_per_row == 1, first_warp = threadIdx.x < 32;
  const Transform<SOFTCAP> transform(p);
  ThreadSums sums;
  float target_logit = 0.f, scale = 0.f;
  {
    const unsigned blocks = static_cast<unsigned>(p.blocks_per_row), row = blockIdx.x / blocks;
    const int rank = static_cast<int>(blockIdx.x % blocks);
    const Stretch slice = slice_of_row<T>(p, rank);
    const int groups = groups_of<T>(slice);
    const T* logits = static_cast<const T*>(p.logits) + row_offset<uint64_t>(p.logits_rows, row);
    const unsigned phase = static_cast<unsigned>(reinterpret_cast<uintptr_t>(logits + slice.begin) & 15u);
    // The two warps do this at once; only the second waits for the memory.
    if (threadIdx.x == 0) {
      const unsigned senders = one_block || (!GRAD && rank != 0) ? 0 : blocks;
      init_mbarriers<GRAD>(on_chip, groups, senders);
      if constexpr (GRAD) start_copies<T, GRAD>(on_chip, image, logits + slice.begin, slice, phase, 0, 1);
    }
    const LoadedInputs loaded = load_inputs(p, row);
    if (threadIdx.x / 32 == 1) {
      T* x = reinterpret_cast<T*>(image + phase);
      copy_edges(x, logits + slice.begin, slice.classes, phase, static_cast<int>(threadIdx.x % 32));
    }
    if (!one_block) dev::cluster_arrive_relaxed();
    dev::sync_block();  // edges and mbarriers are there

    const RowInputs in = check_inputs(p, row, loaded);
    if (in.kind != RowKind::kCounted) {  // the whole cluster
      // No block ends, and in place nothing is overwritten, while a copy is under way.
      if (GRAD && groups > 0) dev::mbarrier_wait(&on_chip->filled[0], 0);
      const float value = in.kind == RowKind::kIgnored ? 0.f : NAN;
      if (rank == 0) finish_unused_row<STATS>(p, row, value);
      if constexpr (GRAD) fill_gradient<T>(p, row, value, slice);
      if (!one_block) dev::cluster_wait();
      return;
    }
    if (threadIdx.x == 0) {
      start_copies<T, GRAD>(on_chip, image, logits + slice.begin, slice, phase, GRAD ? 1 : 0, kMaxChunks);
      kept[0] = {in, slice, 0.f, 0.f, rank, row, phase};
      // Loaded behind the copies' start, and not waited for before the sums.
      target_logit = widen_one(logits[in.target]);
      if constexpr (GRAD) scale = gradient_scale(p, row);
    }
    const int in_slice = in.target - slice.begin;
    const int target = in_slice >= 0 && in_slice < slice.classes && is_own(in_slice / kGroup<T>, dev::on_chip_threads()) ? in_slice : -1;
    sums = phase == 0 ? sum_slice<T, STATS, SOFTCAP, GRAD, true>(on_chip, image, groups, target, phase, transform)
                      : sum_slice<T, STATS, SOFTCAP, GRAD, false>(on_chip, image, groups, target, phase, transform);
  }
  Partial a = merge_warp<STATS>(sums, transform);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = a;
  if (threadIdx.x == 0) kept[0].target_logit = target_logit, kept[0].gradient_scale = scale;
  if (!one_block) dev::cluster_wait();  // the other blocks have started, and their mbarriers count
  dev::sync_block();  // the warps' results are there
  const Kept known = kept[0];
  // What the row as a whole takes is one warp's work; the others wait. Without a gradient it is the first block's.
  const unsigned receivers = GRAD ? p.blocks_per_row : 1;
  if (first_warp) {
    a = merge_warps<STATS>(scratch, transform);
    if (threadIdx.x < receivers) {
      if constexpr (STATS) find_column(a, reinterpret_cast<const T*>(image + known.phase), known.slice);
      if (!one_block) dev::send(&on_chip->slices[known.rank], a, threadIdx.x, &on_chip->received);
    }
  }
  // A block that others send to ends only when all of it is there, and by then the whole row is on chip, so that in place
  // it may be overwritten.
  if (first_warp && (GRAD || known.rank == 0)) {
    if (!one_block) {
      dev::mbarrier_wait_cluster(&on_chip->received, 0);
      const unsigned lane = threadIdx.x % kMaxBlocksPerRow;
      a = lane < p.blocks_per_row ? on_chip->slices[lane] : empty_partial();
      a = merge_lanes<STATS, kMaxBlocksPerRow>(a, a.largest, transform);
    }
    const RowState state = finish_row<STATS, SOFTCAP>(p, known.row, known.in, a, known.target_logit, transform,
                                                      known.rank == 0 && threadIdx.x == 0);
    if constexpr (GRAD) {
      const GradientFactors f = gradient_factors<SOFTCAP>(p, known.in, state, known.gradient_scale, transform);
      if (threadIdx.x == 0) factors[0] = f;
    }
  }
  if constexpr (GRAD) {
    dev::sync_block();  // the factors are there
    write_slice<T, SOFTCAP>(p, known.row, image, known.phase, known.slice, known.in.target, factors[0], transform);
  }
}
