//! Kernels broken on purpose: a test suite that passes them would prove nothing.

use std::{fs, path::Path};

use super::{
    build::{Build, kernel_sources, mutant_driver},
    check::check_with,
    distributions,
    problem::{Problem, View},
    ranks,
    rows::{Kind, bad_menu, menu, problem, row},
    short_menu,
};
use crate::kernels::abi::Element;

/// A change to one file of `kernels/`.
struct Mutant {
    name: &'static str,
    file: &'static str,
    find: &'static str,
    replace: &'static str,
    /// How often `find` occurs, so that the list is kept in step with the sources.
    times: usize,
    /// The builds that may find it; one has to.
    builds: &'static [Build],
}

const PLAIN: &[Build] = &[Build::Plain];
const SANITIZED: &[Build] = &[Build::Sanitized];
const RACES: &[Build] = &[Build::Races];

#[rustfmt::skip]
const MUTANTS: &[Mutant] = &[
    Mutant { name: "no barrier before the warps' results are read", file: "partial.cuh", builds: PLAIN, times: 1,
        find: "  dev::sync_block();\n  return threadIdx.x < 32", replace: "  return threadIdx.x < 32" },
    Mutant { name: "no barrier between loss and gradient", file: "cross_entropy.cu", builds: PLAIN, times: 1,
        find: "    dev::sync_block();  // the factors are there; and in place", replace: "    // in place" },
    Mutant { name: "no barrier before a backward's factors are read", file: "cross_entropy.cu", builds: PLAIN, times: 1,
        find: "  dev::sync_block();  // the factors are there\n", replace: "" },
    Mutant { name: "no barrier in the reduction", file: "cross_entropy.cu", builds: PLAIN, times: 1,
        find: "  dev::sync_block();\n  if (threadIdx.x != 0) return;", replace: "  if (threadIdx.x != 0) return;" },
    Mutant { name: "earlier kernels are not waited for", file: "cross_entropy.cu", builds: PLAIN, times: 1,
        find: "row_loss(const Params& p) {\n  dev::begin_kernel();", replace: "row_loss(const Params& p) {" },
    Mutant { name: "earlier kernels are waited for by the first warp", file: "on_chip.cuh", builds: PLAIN, times: 1,
        find: "dev::begin_kernel();", replace: "if (threadIdx.x < 32) dev::begin_kernel();" },
    Mutant { name: "earlier kernels are waited for behind the first read", file: "cross_entropy.cu", builds: RACES, times: 2,
        find: "  dev::begin_kernel();\n  const uint64_t row = p.first_row + blockIdx.x;\n  const Stretch stored = stored_row(p);\n  \
               const RowInputs in = read_inputs(p, row);",
        replace: "  const uint64_t row = p.first_row + blockIdx.x;\n  const Stretch stored = stored_row(p);\n  \
                  const RowInputs in = read_inputs(p, row);\n  dev::begin_kernel();" },
    Mutant { name: "some lanes skip the barrier", file: "partial.cuh", builds: PLAIN, times: 1,
        find: "if (blockDim.x == 32) return a;", replace: "if (blockDim.x == 32 || threadIdx.x % 32 == 31) return a;" },
    Mutant { name: "early return", file: "cross_entropy.cu", builds: PLAIN, times: 1,
        find: "  const int target = in.target - stored.begin;",
        replace: "  if (threadIdx.x >= p.vocab) return;\n  const int target = in.target - stored.begin;" },
    Mutant { name: "every other exponential is left out", file: "partial.cuh", builds: PLAIN, times: 1,
        find: "exp = exps.low + exps.high,", replace: "exp = exps.low," },
    Mutant { name: "both of a pair have the first one's gradient", file: "row.cuh", builds: PLAIN, times: 1,
        find: "g[k + 1] = both.high", replace: "g[k + 1] = both.low" },
    Mutant { name: "half of the lanes are merged", file: "partial.cuh", builds: PLAIN, times: 1,
        find: "int lane = LANES / 2; lane > 0", replace: "int lane = LANES / 4; lane > 0" },
    Mutant { name: "sums stay relative to a lane's own largest", file: "partial.cuh", builds: PLAIN, times: 1,
        find: "  relate<STATS>(a, largest, transform.reference(largest), transform);\n  a.largest = largest;\n  a.at = at;",
        replace: "  a.largest = largest;\n  a.at = at;" },
    Mutant { name: "of equal lanes the last has the column", file: "partial.cuh", builds: PLAIN, times: 1,
        find: "dev::reduce_min(own_largest == largest ? a.at : ~0u)",
        replace: "~dev::reduce_min(~(own_largest == largest ? a.at : 0u))" },
    Mutant { name: "a negative maximum by its bits", file: "partial.cuh", builds: PLAIN, times: 1,
        find: "dev::reduce_max(bits ^ (bits >> 31 & 0x7fffffff))", replace: "dev::reduce_max(bits)" },
    Mutant { name: "lanes that hold the same are counted again", file: "partial.cuh", builds: PLAIN, times: 1,
        find: " / (32 / LANES)", replace: "" },
    Mutant { name: "a target's group without a new maximum keeps it", file: "partial.cuh", builds: PLAIN, times: 1,
        find: "if (has_target || largest > sums.limit) {", replace: "if (largest > sums.limit) {" },
    Mutant { name: "sums are relative to the first largest, however far", file: "partial.cuh", builds: PLAIN, times: 1,
        find: "sums.limit = largest + transform.reach();", replace: "sums.limit = INFINITY;" },
    Mutant { name: "a lane's largest is the one its sums are relative to", file: "partial.cuh", builds: PLAIN, times: 1,
        find: "merge_lanes<STATS, 32>(sums.partial, sums.largest, transform)",
        replace: "merge_lanes<STATS, 32>(sums.partial, sums.partial.largest, transform)" },
    Mutant { name: "a softcap's sums relative to a smaller logit", file: "partial.cuh", builds: PLAIN, times: 1,
        find: "return SOFTCAP ? 0.f : 11.f", replace: "return 11.f" },
    Mutant { name: "the largest is in the first of the groups taken at once", file: "partial.cuh", builds: PLAIN, times: 1,
        find: "if (U == 1 || largest_in", replace: "if (u == 0 || largest_in" },
    Mutant { name: "the last of the groups taken at once has no target", file: "partial.cuh", builds: PLAIN, times: 1,
        find: "static_cast<unsigned>(U * stride)", replace: "static_cast<unsigned>((U == 1 ? 1 : U - 1) * stride)" },
    Mutant { name: "the largest of a pair is its first", file: "partial.cuh", builds: PLAIN, times: 1,
        find: "return dev::max(low, high);", replace: "return low;" },
    Mutant { name: "a group from the wrong words", file: "vector.cuh", builds: PLAIN, times: 1,
        find: "shifted<T>(low.z, low.w, high.x, high.y, high.z, bits)", replace: "shifted<T>(low.z, low.w, high.x, high.y, high.w, bits)" },
    Mutant { name: "elements of an odd phase are not shifted", file: "vector.cuh", builds: PLAIN, times: 1,
        find: "(phase & 2u) * 8u", replace: "(phase & 1u) * 8u" },
    Mutant { name: "of groups at once only the first and not the last is inside", file: "vector.cuh", builds: SANITIZED, times: 1,
        find: "&& reader.template inside<ALIGNED>(last);", replace: ";" },
    Mutant { name: "of groups at once only the last and not the first is inside", file: "vector.cuh", builds: SANITIZED, times: 1,
        find: "all && reader.template inside<ALIGNED>(group) && ", replace: "all && " },
    Mutant { name: "the target's gradient is what the others' is", file: "row.cuh", builds: PLAIN, times: 1,
        find: "if (x_y == -INFINITY) return;\n  PATH", replace: "return;\n  PATH" },
    Mutant { name: "every thread writes the target's gradient", file: "row.cuh", builds: RACES, times: 1,
        find: "is_own(groups - 1 - (target + lead) / kGroup<T>, static_cast<int>(blockDim.x))", replace: "true" },
    Mutant { name: "the target's logit after its gradient is written", file: "row.cuh", builds: PLAIN, times: 1,
        find: "write_target(grad + target, x_y, f, transform);", replace: "write_target(grad + target, has_target ? widen_one(x[target]) : -INFINITY, f, transform);" },
    Mutant { name: "shared memory for one warp only", file: "row.cuh", builds: SANITIZED, times: 1,
        find: "SHARED_ARRAY(Partial, scratch, kMaxWarps)", replace: "SHARED_ARRAY(Partial, scratch, 1)" },
    Mutant { name: "the last element is not read", file: "vector.cuh", builds: PLAIN, times: 1,
        find: "i >= 0 && i < reader.count ?", replace: "i >= 0 && i < reader.count - 1 ?" },
    Mutant { name: "one element too many is read", file: "vector.cuh", builds: SANITIZED, times: 1,
        find: "i >= 0 && i < reader.count ?", replace: "i >= 0 && i <= reader.count ?" },
    Mutant { name: "a vector ends beyond the row", file: "vector.cuh", builds: SANITIZED, times: 1,
        find: "return first >= 0 && first + kGroup<T> <= count;",
        replace: "return first >= 0 && first + kGroup<T> <= count + 1;" },
    Mutant { name: "a word beyond the row is read and not used", file: "vector.cuh", builds: SANITIZED, times: 1,
        find: "first - before + 2 * kGroup<T> <= count", replace: "first - before + kGroup<T> <= count" },
    Mutant { name: "a word before the row is read and not used", file: "vector.cuh", builds: SANITIZED, times: 1,
        find: "first >= before &&", replace: "first >= 0 &&" },
    Mutant { name: "misaligned vectors", file: "vector.cuh", builds: PLAIN, times: 1,
        find: "at -= reader.phase;", replace: ";" },
    Mutant { name: "the last gradient is not written", file: "row.cuh", builds: PLAIN, times: 1,
        find: "if (i >= 0 && i < stretch.width) grad[i]", replace: "if (i >= 0 && i < stretch.width - 1) grad[i]" },
    Mutant { name: "one gradient too many is written", file: "row.cuh", builds: PLAIN, times: 1,
        find: "if (i >= 0 && i < stretch.width) grad[i]", replace: "if (i >= 0 && i <= stretch.width) grad[i]" },
    Mutant { name: "padding is read", file: "row.cuh", builds: PLAIN, times: 1,
        find: "reader(x, stretch.classes, lead)", replace: "reader(x, stretch.width, lead)" },
    Mutant { name: "no smoothing in the loss", file: "row.cuh", builds: PLAIN, times: 1,
        find: "if (in.smoothing != 0.f) {", replace: "if (false) {" },
    Mutant { name: "no smoothing in the gradient", file: "row.cuh", builds: PLAIN, times: 1,
        find: "f.offset = in_range(f.scale * share);", replace: "f.offset = 0.f;" },
    Mutant { name: "another row's smoothing", file: "row.cuh", builds: PLAIN, times: 1,
        find: "row_offset<unsigned>(p.smoothing_rows, row)", replace: "row_offset<unsigned>(p.smoothing_rows, row ? row - 1 : 0)" },
    Mutant { name: "no z-loss", file: "row.cuh", builds: PLAIN, times: 1,
        find: "loss = dev::fma(p.z_loss * lse, lse, loss);", replace: ";" },
    Mutant { name: "no z-loss in the gradient", file: "row.cuh", builds: PLAIN, times: 1,
        find: ": 2.f * p.z_loss", replace: ": 0.f * p.z_loss" },
    Mutant { name: "no weight", file: "row.cuh", builds: PLAIN, times: 1,
        find: "in.weight * loss", replace: "loss" },
    Mutant { name: "no weight in the gradient", file: "row.cuh", builds: PLAIN, times: 1,
        find: "scale * in.weight * (", replace: "scale * (" },
    Mutant { name: "gradient not divided", file: "row.cuh", builds: PLAIN, times: 1,
        find: "scale /= *p.divisor", replace: "scale /= 1.f" },
    Mutant { name: "no slope of the softcap", file: "row.cuh", builds: PLAIN, times: 2,
        find: "*= slope * f.outer", replace: "*= f.outer" },
    Mutant { name: "the maximum starts at 0", file: "partial.cuh", builds: PLAIN, times: 1,
        find: "return {-INFINITY, 0.f,", replace: "return {0.f, 0.f," },
    Mutant { name: "a masked class has a gradient", file: "row.cuh", builds: PLAIN, times: 1,
        find: "if (SPECIAL && x[k] == -INFINITY) g[k] = f.masked_value;", replace: "" },
    Mutant { name: "masked classes are summed", file: "partial.cuh", builds: PLAIN, times: 1,
        find: "if (linear == -INFINITY) {", replace: "if (false) {" },
    Mutant { name: "0 times infinity", file: "partial.cuh", builds: PLAIN, times: 1,
        find: "if (a.classes != 0) {", replace: "{" },
    Mutant { name: "the target is read again when it is overwritten", file: "cross_entropy.cu", builds: PLAIN, times: 1,
        find: "stored, in.target, factors[0], transform);\n  } else",
        replace: "stored, in.target, factors[0], transform);\n    dev::sync_block();\n    \
                  finish_row<STATS, SOFTCAP>(p, row, in, others, widen_one(x[target]), transform, writes);\n  } else" },
    Mutant { name: "p − 1 by a difference", file: "row.cuh", builds: PLAIN, times: 1,
        find: "dev::expm1(kLn2 * log2_p)", replace: "dev::exp2_approx(log2_p) - 1.f" },
    Mutant { name: "a far row as if it were near", file: "partial.cuh", builds: PLAIN, times: 1,
        find: "? shift : INFINITY;", replace: "? shift : shift;" },
    Mutant { name: "a far row's gradient as if it were near", file: "row.cuh", builds: PLAIN, times: 1,
        find: " || (!SOFTCAP && !(f.reference < INFINITY))", replace: "" },
    Mutant { name: "far partial results by their references", file: "partial.cuh", builds: PLAIN, times: 1,
        find: "by = transform.exact(a.largest, largest, INFINITY);", replace: "by = a.reference - reference;" },
    Mutant { name: "a difference that overflows is infinite", file: "partial.cuh", builds: PLAIN, times: 1,
        find: "if (SOFTCAP || d > -INFINITY) return d * kUnit;", replace: "return d * kUnit;" },
    Mutant { name: "sums of differences overflow", file: "partial.cuh", builds: PLAIN, times: 1,
        find: "constexpr float kUnit = 0x1p-40f;", replace: "constexpr float kUnit = 1.f;" },
    Mutant { name: "the loss of a target infinitely far", file: "row.cuh", builds: PLAIN, times: 1,
        find: "if (!SOFTCAP && d_y == -INFINITY) nll =", replace: "if (false) nll =" },
    Mutant { name: "e^y − 1 by a difference", file: "partial.cuh", builds: PLAIN, times: 1,
        find: "return y > -0.5f ? series * y :", replace: "return false ? series * y :" },
    Mutant { name: "the last of equal logits is predicted", file: "partial.cuh", builds: PLAIN, times: 1,
        find: "a.at <= b.at", replace: "a.at >= b.at" },
    Mutant { name: "the wrong stride", file: "row.cuh", builds: PLAIN, times: 1,
        find: "rows.strides[rows.dims - 1]", replace: "rows.strides[0]" },
    Mutant { name: "ignored rows count", file: "row.cuh", builds: PLAIN, times: 1,
        find: "if (target == p.ignore_index) {", replace: "if (false) {" },
    Mutant { name: "a target is not checked", file: "row.cuh", builds: SANITIZED, times: 1,
        find: "target >= 0 && target < static_cast<long long>(p.vocab)", replace: "target >= 0" },
    Mutant { name: "the wrong bad row is reported", file: "row.cuh", builds: PLAIN, times: 1,
        find: "dev::atomic_min(p.first_error, row + 1)", replace: "dev::atomic_min(p.first_error, row)" },
    Mutant { name: "no barrier after mbarriers are initialised", file: "on_chip.cuh", builds: PLAIN, times: 1,
        find: "    dev::sync_block();  // edges", replace: "    // edges" },
    Mutant { name: "blocks that may not have started are written to", file: "on_chip.cuh", builds: PLAIN, times: 1,
        find: "  if (!one_block) dev::cluster_wait();  // the other", replace: "  // the other" },
    Mutant { name: "the blocks' results are not waited for", file: "on_chip.cuh", builds: PLAIN, times: 1,
        find: "dev::mbarrier_wait_cluster(&on_chip->received, 0);", replace: "" },
    Mutant { name: "results are waited for as if no other block had sent them", file: "on_chip.cuh", builds: RACES, times: 1,
        find: "dev::mbarrier_wait_cluster(&on_chip->received, 0);", replace: "dev::mbarrier_wait(&on_chip->received, 0);" },
    Mutant { name: "the result of one block is not waited for", file: "on_chip.cuh", builds: PLAIN, times: 1,
        find: "senders * static_cast", replace: "(senders - 1) * static_cast" },
    Mutant { name: "results are sent to an mbarrier that does not count", file: "on_chip.cuh", builds: PLAIN, times: 1,
        find: "if (senders != 0) dev::mbarrier_init(&on_chip->received, 1);", replace: "" },
    Mutant { name: "results are sent to blocks that may have ended", file: "on_chip.cuh", builds: PLAIN, times: 1,
        find: "const unsigned receivers = GRAD ? p.blocks_per_row : 1;", replace: "const unsigned receivers = p.blocks_per_row;" },
    Mutant { name: "blocks that send nothing to the first", file: "on_chip.cuh", builds: PLAIN, times: 1,
        find: "if (threadIdx.x < receivers) {", replace: "if (threadIdx.x < receivers && (known.rank == 0 || threadIdx.x != 0)) {" },
    Mutant { name: "all blocks' results in one place", file: "on_chip.cuh", builds: PLAIN, times: 1,
        find: "&on_chip->slices[known.rank]", replace: "&on_chip->slices[0]" },
    Mutant { name: "no barrier before a block's warps are merged", file: "on_chip.cuh", builds: PLAIN, times: 1,
        find: "  dev::sync_block();  // the warps' results are there", replace: "" },
    Mutant { name: "no barrier before the gradient's factors are read", file: "on_chip.cuh", builds: PLAIN, times: 1,
        find: "    dev::sync_block();  // the factors are there", replace: "" },
    Mutant { name: "another thread's idea of what is kept", file: "on_chip.cuh", builds: RACES, times: 1,
        find: "    if (threadIdx.x == 0) {\n      const unsigned senders", replace: "    kept[0].row = row;\n    if (threadIdx.x == 0) {\n      const unsigned senders" },
    Mutant { name: "only the first block has the row's results", file: "on_chip.cuh", builds: PLAIN, times: 1,
        find: "const unsigned receivers = GRAD ? p.blocks_per_row : 1;", replace: "const unsigned receivers = 1;" },
    Mutant { name: "only the first block finds the gradient's factors", file: "on_chip.cuh", builds: PLAIN, times: 1,
        find: "if (first_warp && (GRAD || known.rank == 0)) {", replace: "if (first_warp && known.rank == 0) {" },
    Mutant { name: "the last warp is not merged", file: "partial.cuh", builds: PLAIN, times: 1,
        find: "lane < warps ? scratch[lane]", replace: "lane + 1 < warps ? scratch[lane]" },
    Mutant { name: "every block writes the loss", file: "on_chip.cuh", builds: RACES, times: 1,
        find: "known.rank == 0 && threadIdx.x == 0", replace: "threadIdx.x == 0" },
    Mutant { name: "a slice's first elements are not copied", file: "on_chip.cuh", builds: PLAIN, times: 1,
        find: "if (lane < head)", replace: "if (lane < head - 1)" },
    Mutant { name: "a slice's last elements are not copied", file: "on_chip.cuh", builds: PLAIN, times: 1,
        find: "if (lane < tail)", replace: "if (lane < tail - 1)" },
    Mutant { name: "a slice's last group is not filled up", file: "on_chip.cuh", builds: PLAIN, times: 1,
        find: "if (lane < missing)", replace: "if (lane < missing - 1)" },
    Mutant { name: "the last gradient of a slice is not written", file: "on_chip.cuh", builds: PLAIN, times: 1,
        find: "(last < N ? head : count)", replace: "(last < N ? head : count - 1)" },
    Mutant { name: "one gradient too many of a slice is written", file: "on_chip.cuh", builds: RACES, times: 1,
        find: "(last < N ? head : count)", replace: "(last < N ? head : count + 1)" },
    Mutant { name: "the first gradient of a slice is not written", file: "on_chip.cuh", builds: PLAIN, times: 1,
        find: "(last < N ? head : count)", replace: "(last < N ? head - 1 : count)" },
    Mutant { name: "a vector of gradients ends beyond its slice", file: "on_chip.cuh", builds: RACES, times: 1,
        find: "end = (count + lead) / N;", replace: "end = (count + lead + 1) / N;" },
    Mutant { name: "gradients are taken to lie as the image does", file: "on_chip.cuh", builds: PLAIN, times: 1,
        find: "if (!same_words || ", replace: "if (" },
    Mutant { name: "the word before a row is copied", file: "on_chip.cuh", builds: SANITIZED, times: 1,
        find: ": phase == 0 ? 0 : 1;", replace: ": 0;" },
    Mutant { name: "a word that a chunk straddles comes with the next", file: "on_chip.cuh", builds: RACES, times: 1,
        find: "const int limit = chunk_begin<GRAD>(c + 1) + 1,", replace: "const int limit = chunk_begin<GRAD>(c + 1)," },
    Mutant { name: "chunks are not waited for", file: "on_chip.cuh", builds: PLAIN, times: 1,
        find: "dev::mbarrier_wait(&on_chip->filled[c], 0);", replace: "" },
    Mutant { name: "the first chunk is waited for, over and over", file: "on_chip.cuh", builds: PLAIN, times: 1,
        find: "dev::mbarrier_wait(&on_chip->filled[c], 0);", replace: "dev::mbarrier_wait(&on_chip->filled[0], 0);" },
    Mutant { name: "an ignored row is left while its first chunk is on the way", file: "on_chip.cuh", builds: PLAIN, times: 1,
        find: "if (GRAD && groups > 0) dev::mbarrier_wait(&on_chip->filled[0], 0);", replace: "" },
    Mutant { name: "the first chunk is copied twice", file: "on_chip.cuh", builds: PLAIN, times: 1,
        find: "phase, GRAD ? 1 : 0, kMaxChunks);", replace: "phase, 0, kMaxChunks);" },
    Mutant { name: "without a gradient the first chunk is not copied", file: "on_chip.cuh", builds: PLAIN, times: 1,
        find: "phase, GRAD ? 1 : 0, kMaxChunks);", replace: "phase, 1, kMaxChunks);" },
    Mutant { name: "the target's logit is not kept", file: "on_chip.cuh", builds: PLAIN, times: 1,
        find: "kept[0].target_logit = target_logit, ", replace: "" },
    Mutant { name: "the gradient's scale is not kept", file: "on_chip.cuh", builds: PLAIN, times: 1,
        find: ", kept[0].gradient_scale = scale;", replace: ";" },
    Mutant { name: "copies that may not see their mbarrier", file: "on_chip.cuh", builds: PLAIN, times: 1,
        find: "dev::mbarrier_fence_init();", replace: "" },
    Mutant { name: "a block without classes leaves", file: "on_chip.cuh", builds: PLAIN, times: 1,
        find: "const int groups = groups_of<T>(slice);\n    const T* logits",
        replace: "const int groups = groups_of<T>(slice);\n    if (slice.classes == 0) return;\n    const T* logits" },
    Mutant { name: "padding of a cluster's row is left as it is", file: "on_chip.cuh", builds: PLAIN, times: 1,
        find: "last ? static_cast<int>(p.width) - begin : classes", replace: "classes" },
    Mutant { name: "the target's place in the row, not in the slice", file: "on_chip.cuh", builds: PLAIN, times: 1,
        find: "in_slice = in.target - slice.begin;", replace: "in_slice = in.target;" },
    Mutant { name: "the column in the slice, not in the row", file: "row.cuh", builds: PLAIN, times: 1,
        find: "static_cast<unsigned>(stretch.begin + start + k)", replace: "static_cast<unsigned>(start + k)" },
    Mutant { name: "a slice is a group too long", file: "on_chip.cuh", builds: PLAIN, times: 1,
        find: "const int classes = vocab - begin < length ? vocab - begin : length;",
        replace: "const int classes = vocab - begin < length + kGroup<T> ? vocab - begin : length + kGroup<T>;" },
    Mutant { name: "a slice forgets those before it", file: "cross_entropy.cu", builds: PLAIN, times: 1,
        find: "if (slice.begin > static_cast<int>(p.first_class)) {", replace: "if (false) {" },
    Mutant { name: "the first slice reads what was there", file: "cross_entropy.cu", builds: PLAIN, times: 1,
        find: "if (slice.begin > static_cast<int>(p.first_class)) {", replace: "if (true) {" },
    Mutant { name: "the target's logit is forgotten", file: "cross_entropy.cu", builds: PLAIN, times: 1,
        find: "if (!has_target) x_y = running.target_logit;", replace: "" },
    Mutant { name: "a row ends with its target", file: "cross_entropy.cu", builds: PLAIN, times: 1,
        find: "if (p.ranks == 0 && slice.begin + slice.classes == static_cast<int>(p.vocab)) return true;",
        replace: "if (has_target) return true;" },
    Mutant { name: "every thread continues the row", file: "cross_entropy.cu", builds: RACES, times: 1,
        find: "} else if (writes && (", replace: "} else if ((" },
    Mutant { name: "the inputs of another tile's row", file: "cross_entropy.cu", builds: PLAIN, times: 2,
        find: "p.first_row + blockIdx.x", replace: "blockIdx.x" },
    Mutant { name: "a tile's gradient at its place in the whole", file: "row.cuh", builds: PLAIN, times: 1,
        find: "(stretch.begin - static_cast<int>(p.first_column))", replace: "stretch.begin" },
    Mutant { name: "the target's place in the row, not in the tile", file: "cross_entropy.cu", builds: PLAIN, times: 1,
        find: "const int target = in.target - stored.begin;", replace: "const int target = in.target;" },
    Mutant { name: "what a sum lost is forgotten", file: "distribution_sums.cuh", builds: PLAIN, times: 1,
        find: "    lost += (value - (sum - part)) + (x - part);\n", replace: "" },
    Mutant { name: "shares stay relative to a smaller logit", file: "distribution_sums.cuh", builds: PLAIN, times: 1,
        find: "    a.shares_linear = dev::fma(a.shares.total(), units, a.shares_linear);\n", replace: "" },
    Mutant { name: "the target's sum stays relative to a smaller logit", file: "distribution_sums.cuh", builds: PLAIN, times: 1,
        find: "    a.target_linear = dev::fma(a.target.total(), units, a.target_linear);\n", replace: "" },
    Mutant { name: "the weighted target's sum stays relative to a smaller logit", file: "distribution_sums.cuh", builds: PLAIN, times: 1,
        find: "    a.weighted_linear = dev::fma(a.weighted_target.total(), units, a.weighted_linear);\n", replace: "" },
    Mutant { name: "products with the prior stay relative to a smaller logit", file: "distribution_sums.cuh", builds: PLAIN, times: 1,
        find: "    a.prior_exp *= factor;\n", replace: "" },
    Mutant { name: "products with the target stay relative to a smaller logit", file: "distribution_sums.cuh", builds: PLAIN, times: 1,
        find: "    a.target_exp *= factor;\n", replace: "" },
    Mutant { name: "a difference that overflows makes nothing infinite", file: "distribution_sums.cuh", builds: PLAIN, times: 1,
        find: "dev::max(transform.in_units(x, largest, d), -3.4e38f)", replace: "transform.in_units(x, largest, d)" },
    Mutant { name: "a lane that is not the largest leaves its own out", file: "distribution_sums.cuh", builds: PLAIN, times: 1,
        find: "  if (sums.largest != own_largest || a.at != at) add_left_out(a, sums.largest, transform);\n", replace: "" },
    Mutant { name: "of two stretches both leave one out", file: "distribution_sums.cuh", builds: PLAIN, times: 1,
        find: "  add_left_out(other, left_out, transform);\n", replace: "" },
    Mutant { name: "of equal lanes all leave one out", file: "distribution_sums.cuh", builds: PLAIN, times: 1,
        find: "sums.largest != own_largest || a.at != at", replace: "sums.largest != own_largest" },
    Mutant { name: "the largest is counted in the sums", file: "distribution_sums.cuh", builds: PLAIN, times: 1,
        find: "const float rest = k == replaced ? before : d[k];", replace: "const float rest = d[k];" },
    Mutant { name: "a largest class is forgotten once another is", file: "distribution_sums.cuh", builds: PLAIN, times: 1,
        find: "before = dev::max(transform.exact(sums.largest, a.largest, a.reference), kNothing);", replace: "before = kNothing;" },
    Mutant { name: "a warp's sums are relative to its own largest", file: "distribution_sums.cuh", builds: PLAIN, times: 1,
        find: "largest = largest_of_warp(a.largest), own", replace: "largest = largest_of_warp(sums.largest), own" },
    Mutant { name: "a thread's faults are its own", file: "distribution_sums.cuh", builds: PLAIN, times: 1,
        find: "    a.faults |= dev::shuffle_xor(a.faults, lane);\n", replace: "" },
    Mutant { name: "faults of a slice are forgotten", file: "distribution_sums.cuh", builds: PLAIN, times: 1,
        find: "  all.faults |= other.faults;\n", replace: "" },
    Mutant { name: "the prior as it is", file: "distribution_sums.cuh", builds: PLAIN, times: 1,
        find: "u[k] *= prior_scale;", replace: ";" },
    Mutant { name: "beside a prior class weights count nothing", file: "distribution_sums.cuh", builds: PLAIN, times: 1,
        find: "has_prior ? c[k] * u[k] : c[k]", replace: "has_prior ? u[k] : c[k]" },
    Mutant { name: "masked classes have their part of the prior", file: "distribution_sums.cuh", builds: PLAIN, times: 1,
        find: "          u[k] = counts ? u[k] : 0.f;\n", replace: "" },
    Mutant { name: "masked classes have their weights", file: "distribution_sums.cuh", builds: PLAIN, times: 1,
        find: "!counts ? 0.f : has_prior", replace: "has_prior" },
    Mutant { name: "a masked class's probability is within reach", file: "distribution_sums.cuh", builds: PLAIN, times: 1,
        find: "if (SPECIAL && !counts && t[k] > 0.f) a.faults |= kOutOfReach;", replace: "" },
    Mutant { name: "negative probabilities are good", file: "distribution_sums.cuh", builds: PLAIN, times: 1,
        find: "!(least >= 0.f && mass.value < INFINITY)", replace: "!(mass.value < INFINITY)" },
    Mutant { name: "infinite probabilities are good", file: "distribution_sums.cuh", builds: PLAIN, times: 1,
        find: "!(least >= 0.f && mass.value < INFINITY)", replace: "!(least >= 0.f)" },
    Mutant { name: "probabilities are not weighted", file: "distribution_sums.cuh", builds: PLAIN, times: 1,
        find: "const float ct = c[k] * t[k];", replace: "const float ct = t[k];" },
    Mutant { name: "the norm without products of target and prior", file: "distribution_sums.cuh", builds: PLAIN, times: 1,
        find: "dev::fma(t[k], u[k], target_prior)", replace: "target_prior" },
    Mutant { name: "the norm without the target's squares", file: "distribution_sums.cuh", builds: PLAIN, times: 1,
        find: "target_squares = dev::fma(t[k], t[k], target_squares);", replace: "" },
    Mutant { name: "the first four of a word for both", file: "distribution_sums.cuh", builds: PLAIN, times: 1,
        find: "kFours<P> == 1 || four % 2 == 0", replace: "kFours<P> == 1 || four % 2 != 2" },
    Mutant { name: "the second half of a group is the first", file: "distribution_sums.cuh", builds: PLAIN, times: 1,
        find: "        low = v.z, high = v.w;\n", replace: "" },
    Mutant { name: "groups loaded ahead are left over", file: "distribution_sums.cuh", builds: PLAIN, times: 1,
        find: "next - kAhead * threads < groups", replace: "next - (kAhead - 1) * threads < groups" },
    Mutant { name: "what stands beside a straddling group is taken from a boundary", file: "distribution_sums.cuh", builds: PLAIN, times: 1,
        find: "reader.phase == 0 && reader.template inside<true>(group)", replace: "reader.template inside<true>(group)" },
    Mutant { name: "what stands beside the edge is read whole", file: "distribution_sums.cuh", builds: SANITIZED, times: 1,
        find: "reader.phase != 0 && reader.template inside<false>(group)", replace: "reader.phase != 0" },
    Mutant { name: "a slice has the first classes' weights", file: "distribution_sums.cuh", builds: PLAIN, times: 1,
        find: "p.class_weights + stretch.begin", replace: "p.class_weights" },
    Mutant { name: "a slice has the first classes' prior", file: "distribution_sums.cuh", builds: PLAIN, times: 1,
        find: "p.prior + stretch.begin", replace: "p.prior" },
    Mutant { name: "a slice has the first classes' probabilities", file: "distribution_sums.cuh", builds: PLAIN, times: 1,
        find: " + (static_cast<unsigned>(stretch.begin) - p.first_class);", replace: ";" },
    Mutant { name: "absent entries are read", file: "distribution.cuh", builds: PLAIN, times: 1,
        find: "    if (target == p.ignore_index) continue;\n    const float t", replace: "    const float t" },
    Mutant { name: "every eighth entry alone is checked", file: "distribution.cuh", builds: PLAIN, times: 1,
        find: "  found = dev::reduce_max(found);\n", replace: "" },
    Mutant { name: "an entry's class is not checked", file: "distribution.cuh", builds: SANITIZED, times: 1,
        find: "target >= 0 && target < static_cast<long long>(p.vocab) && t >= 0.f", replace: "t >= 0.f" },
    Mutant { name: "an entry's probability is not checked", file: "distribution.cuh", builds: PLAIN, times: 1,
        find: " && t >= 0.f && t < INFINITY;", replace: ";" },
    Mutant { name: "a weight of the entropy is not checked", file: "distribution.cuh", builds: PLAIN, times: 1,
        find: " && entropy_good && classes_good", replace: " && classes_good" },
    Mutant { name: "bad values of classes are not seen", file: "distribution.cuh", builds: PLAIN, times: 1,
        find: " && entropy_good && classes_good", replace: " && entropy_good" },
    Mutant { name: "a named logit beyond a thread's own is not made the largest", file: "distribution.cuh", builds: PLAIN, times: 1,
        find: "      relate(a, x_k, transform.reference(x_k), transform);\n", replace: "" },
    Mutant { name: "a masked class that is named is within reach", file: "distribution.cuh", builds: PLAIN, times: 1,
        find: "      a.faults |= kOutOfReach;\n      continue;", replace: "      continue;" },
    Mutant { name: "a class that is named twice has two squares", file: "distribution.cuh", builds: PLAIN, times: 1,
        find: "if (named_class(p, row, i) == target) all += named_probability(p, row, i);", replace: "if (i == j) all += named_probability(p, row, i);" },
    Mutant { name: "named classes without their weights", file: "distribution.cuh", builds: PLAIN, times: 1,
        find: "a.weighted_linear = dev::fma(c * t, units, a.weighted_linear);", replace: "a.weighted_linear = dev::fma(t, units, a.weighted_linear);" },
    Mutant { name: "the loss without the entropy", file: "distribution.cuh", builds: PLAIN, times: 1,
        find: "  if (in.entropy_weight != 0.f) loss = dev::fma(in.entropy_weight, entropy, loss);\n", replace: "" },
    Mutant { name: "the loss without z-loss", file: "distribution.cuh", builds: PLAIN, times: 1,
        find: "  if (p.z_loss != 0.f) loss = dev::fma(p.z_loss * lse, lse, loss);\n", replace: "" },
    Mutant { name: "smoothing by the sum of u, not of c·u", file: "distribution.cuh", builds: PLAIN, times: 1,
        find: "surprisal(part * shares.total(), part", replace: "surprisal(in.smoothing, part" },
    Mutant { name: "a loss out of reach is finite", file: "distribution.cuh", builds: PLAIN, times: 1,
        find: "if (out_of_reach || empty) loss = INFINITY;", replace: "if (empty) loss = INFINITY;" },
    Mutant { name: "a row of weight 0 hides a bad probability", file: "distribution.cuh", builds: PLAIN, times: 1,
        find: "in.weight == 0.f && !bad", replace: "in.weight == 0.f" },
    Mutant { name: "a bad probability is not reported", file: "distribution.cuh", builds: PLAIN, times: 1,
        find: "  if (bad) report_bad_row(p, row);\n", replace: "" },
    Mutant { name: "the mean of d without the largest", file: "distribution.cuh", builds: PLAIN, times: 1,
        find: "mean_less_top + d_top,", replace: "mean_less_top * 0.5f + d_top," },
    Mutant { name: "the gradient without the entropy's mean", file: "distribution.cuh", builds: PLAIN, times: 1,
        find: " + (beta == 0.f ? 0.f : beta * state.mean)", replace: "" },
    Mutant { name: "the gradient without the entropy's own term", file: "distribution.cuh", builds: PLAIN, times: 1,
        find: "f.entropy = in_range(beta * state.inverse_sum);", replace: "f.entropy = 0.f;" },
    Mutant { name: "gradient without z-loss", file: "distribution.cuh", builds: PLAIN, times: 1,
        find: "(f.mass + f.lse_slope + (beta", replace: "(f.mass + (beta" },
    Mutant { name: "the largest class's gradient without z-loss", file: "distribution.cuh", builds: PLAIN, times: 1,
        find: " + f.lse_slope * p_of_it - e_of_it", replace: " - e_of_it" },
    Mutant { name: "the largest class's gradient without the entropy", file: "distribution.cuh", builds: PLAIN, times: 1,
        find: " + f.lse_slope * p_of_it - e_of_it", replace: " + f.lse_slope * p_of_it" },
    Mutant { name: "the gradient's class weights are left out", file: "distribution.cuh", builds: PLAIN, times: 1,
        find: "UNROLL for (int k = 0; k < kFour; k++) q[k] *= v[k];\n    }\n  }\n\n  DEVICE void operator()", replace: "}\n  }\n\n  DEVICE void operator()" },
    Mutant { name: "the gradient's probabilities are left out", file: "distribution.cuh", builds: PLAIN, times: 1,
        find: "q[k] = dev::fma(f.target, v[k], q[k]);", replace: ";" },
    Mutant { name: "the gradient's values lie as the logits do", file: "distribution.cuh", builds: PLAIN, times: 1,
        find: "const Beside beside(p, row, stretch, lead);", replace: "const Beside beside(p, row, stretch, 0);" },
    Mutant { name: "a masked class has a gradient", file: "distribution.cuh", builds: PLAIN, times: 1,
        find: "if (SPECIAL && x[k] == -INFINITY) g[k] = f.masked_value;", replace: "" },
    Mutant { name: "the last four of a group have the first four's values", file: "distribution.cuh", builds: PLAIN, times: 1,
        find: "subtrahends(group * kFours<T> + i, q", replace: "subtrahends(group * kFours<T>, q" },
    Mutant { name: "every entry of a class writes it", file: "distribution.cuh", builds: RACES, times: 1,
        find: "    if (i < j) return none;\n", replace: "" },
    Mutant { name: "a class that is named twice has the first's probability", file: "distribution.cuh", builds: PLAIN, times: 1,
        find: "    t += named_probability(p, row, i);\n", replace: "    t = t == 0.f ? named_probability(p, row, i) : t;\n" },
    Mutant { name: "an entry writes the largest class too", file: "distribution.cuh", builds: RACES, times: 1,
        find: " || target == f.column || k < 0", replace: " || k < 0" },
    Mutant { name: "no barrier before named logits are written over", file: "distribution.cuh", builds: PLAIN, times: 1,
        find: "  dev::sync_block();  // these logits were read\n", replace: "" },
    Mutant { name: "no barrier before named gradients are written", file: "distribution.cuh", builds: PLAIN, times: 1,
        find: "  dev::sync_block();  // the others' gradients are there\n", replace: "" },
    Mutant { name: "the first lane alone looks for the largest among the entries", file: "distribution.cuh", builds: PLAIN, times: 1,
        find: "  UNROLL for (int lane = 16; lane > 0; lane >>= 1) t += dev::shuffle_xor(t, lane);\n", replace: "" },
    Mutant { name: "a slice forgets those before it", file: "distribution.cuh", builds: PLAIN, times: 1,
        find: "  if (!first) a = merge(running, a, transform);\n", replace: "" },
    Mutant { name: "no barrier between loss and gradient of a distribution", file: "distribution.cuh", builds: PLAIN, times: 1,
        find: "    dev::sync_block();  // the factors are there; and in place", replace: "    // in place" },
    Mutant { name: "no barrier before the warps' results of a distribution are read", file: "distribution_sums.cuh", builds: PLAIN, times: 1,
        find: "  dev::sync_block();\n  if (threadIdx.x >= 32) return all.partial;", replace: "  if (threadIdx.x >= 32) return all.partial;" },
    Mutant { name: "no barrier in the check of the classes", file: "cross_entropy.cu", builds: PLAIN, times: 1,
        find: "  dev::sync_block();\n  if (threadIdx.x >= 32) return;", replace: "  if (threadIdx.x >= 32) return;" },
    Mutant { name: "a prior of zeros is good", file: "cross_entropy.cu", builds: PLAIN, times: 1,
        find: "largest != kBad && largest != 0;", replace: "largest != kBad;" },
    Mutant { name: "bad values of classes are not reported", file: "cross_entropy.cu", builds: PLAIN, times: 1,
        find: "if (!good && p.first_error)", replace: "if (false)" },
    Mutant { name: "a mean without the weights of the classes", file: "cross_entropy.cu", builds: PLAIN, times: 1,
        find: "if (has_weight) w *= p.class_weights[target];", replace: "" },
    Mutant { name: "a mean's class weight of any target", file: "cross_entropy.cu", builds: SANITIZED, times: 1,
        find: " && target >= 0 && target < static_cast<long long>(p.vocab);", replace: ";" },
    Mutant { name: "a mean counts rows without entries", file: "cross_entropy.cu", builds: PLAIN, times: 1,
        find: "if (target != p.ignore_index) return target;", replace: "return 0;" },
    Mutant { name: "the last rank's slice is left out", file: "ranks.cuh", builds: PLAIN, times: 2,
        find: "rank < p.ranks", replace: "rank + 1 < p.ranks" },
    Mutant { name: "ranks that say different things are merged all the same", file: "ranks.cuh", builds: PLAIN, times: 2,
        find: "    alike = alike && other.digest == all.digest;\n", replace: "" },
    Mutant { name: "the target's logit is the first rank's", file: "ranks.cuh", builds: PLAIN, times: 1,
        find: "if (all.target_logit != all.target_logit)", replace: "if (false)" },
    Mutant { name: "the target's logit is the last rank's", file: "ranks.cuh", builds: PLAIN, times: 1,
        find: "if (all.target_logit != all.target_logit)", replace: "" },
    Mutant { name: "rows that differ have a gradient", file: "ranks.cuh", builds: PLAIN, times: 1,
        find: "[row].classes = p.vocab;", replace: "[row].classes = 0u;" },
    Mutant { name: "distributions that differ have a gradient", file: "ranks.cuh", builds: PLAIN, times: 1,
        find: "state.bad = 1;", replace: "" },
    Mutant { name: "rows that differ are not reported", file: "ranks.cuh", builds: PLAIN, times: 2,
        find: "  report_bad_row(p, row);\n", replace: "" },
    Mutant { name: "ranks' slices are read before they are there", file: "ranks.cuh", builds: PLAIN, times: 2,
        find: "  dev::begin_kernel();\n", replace: "" },
    Mutant { name: "all lanes write a merged row", file: "ranks.cuh", builds: RACES, times: 1,
        find: "  if (threadIdx.x != 0) return;\n  if (alike)", replace: "  if (alike)" },
    Mutant { name: "another row's slice", file: "ranks.cuh", builds: PLAIN, times: 1,
        find: "[rank * p.rows + row]", replace: "[rank * p.rows]" },
    Mutant { name: "a rank's first tile is merged with what was in memory", file: "cross_entropy.cu", builds: PLAIN, times: 1,
        find: "if (slice.begin > static_cast<int>(p.first_class)) {", replace: "if (slice.begin > 0) {" },
    Mutant { name: "the rank with the last classes does not wait for the others", file: "cross_entropy.cu", builds: PLAIN, times: 1,
        find: "if (p.ranks == 0 && slice.begin", replace: "if (slice.begin" },
    Mutant { name: "a rank's slice ends with the vocabulary", file: "row.cuh", builds: PLAIN, times: 1,
        find: "static_cast<int>(p.end_class) - begin", replace: "static_cast<int>(p.vocab) - begin" },
    Mutant { name: "a rank's probabilities are the whole vocabulary's", file: "distribution_sums.cuh", builds: PLAIN, times: 1,
        find: "(static_cast<unsigned>(stretch.begin) - p.first_class)", replace: "static_cast<unsigned>(stretch.begin)" },
    Mutant { name: "the largest class's probability of the whole vocabulary's", file: "distribution.cuh", builds: PLAIN, times: 1,
        find: "target_of(column - first)", replace: "target_of(column)" },
    Mutant { name: "a rank's first tile of a distribution is merged with what was in memory", file: "distribution.cuh", builds: PLAIN, times: 1,
        find: "stored.begin == static_cast<int>(p.first_class);", replace: "stored.begin == 0;" },
    Mutant { name: "a rank's last tile of a distribution is that of the vocabulary", file: "distribution.cuh", builds: PLAIN, times: 1,
        find: "stored.begin + stored.classes == static_cast<int>(p.end_class);", replace: "stored.begin + stored.classes == static_cast<int>(p.vocab);" },
    Mutant { name: "a rank does not say its largest class's probability", file: "distribution.cuh", builds: PLAIN, times: 1,
        find: "p.grad_norm_sq ? target_probability(p, row, column) : 0.f;", replace: "p.ranks == 0 ? target_probability(p, row, column) : 0.f;" },
    Mutant { name: "a digest without the target", file: "row.cuh", builds: PLAIN, times: 1,
        find: "digest_with(0u, static_cast<unsigned>(in.target))", replace: "0u" },
    Mutant { name: "a digest without the smoothing", file: "row.cuh", builds: PLAIN, times: 1,
        find: "static_cast<unsigned>(in.target)), in.smoothing)", replace: "static_cast<unsigned>(in.target)), 0.f)" },
    Mutant { name: "a digest without the weight", file: "row.cuh", builds: PLAIN, times: 1,
        find: "in.smoothing), in.weight);\n}\n\n// Columns", replace: "in.smoothing), 0.f);\n}\n\n// Columns" },
    Mutant { name: "a digest without entries", file: "distribution.cuh", builds: PLAIN, times: 1,
        find: "dev::reduce_add(entries)", replace: "0u" },
    Mutant { name: "a digest without probabilities", file: "distribution.cuh", builds: PLAIN, times: 1,
        find: "static_cast<unsigned>(target)), named_probability(p, row, j));", replace: "static_cast<unsigned>(target)), 0.f);" },
    Mutant { name: "a digest without the entropy's weight", file: "distribution.cuh", builds: PLAIN, times: 1,
        find: "digest_with(of_row, in.entropy_weight)", replace: "of_row" },
    Mutant { name: "a digest without the classes' values", file: "distribution.cuh", builds: PLAIN, times: 1,
        find: "p.class_check ? p.class_check->digest : 0u", replace: "0u" },
    Mutant { name: "a digest without the classes' weights", file: "cross_entropy.cu", builds: PLAIN, times: 1,
        find: "digest_with(digest_with(k, c[i]), u[i])", replace: "digest_with(k, u[i])" },
    Mutant { name: "a digest without the prior", file: "cross_entropy.cu", builds: PLAIN, times: 1,
        find: "digest_with(digest_with(k, c[i]), u[i])", replace: "digest_with(k, c[i])" },
    Mutant { name: "a mean over this rank's rows alone", file: "cross_entropy.cu", builds: PLAIN, times: 1,
        find: "if (p.divisor) weight = *p.divisor;", replace: "if (p.divisor) ;" },
];

/// Of every mutant: f16 differs from bf16 in conversions alone, and would take a third of the compiler's time.
const LEFT_OUT: [(&str, &str); 2] = [
    ("cross_entropy.cu", "INSTANTIATE(f16)\n"),
    ("emulation/kernels.cpp", "ENTRIES_FOR(f16), "),
];

/// Enough of the grid to find every mutant of a file, and little.
fn problems(file: &str) -> Vec<Problem> {
    match file {
        "on_chip.cuh" => of_one_class(),
        file if file.starts_with("distribution") => {
            [distributions::for_mutants(), ranks::for_mutants()].concat()
        }
        "ranks.cuh" => ranks::for_mutants(),
        _ => [
            of_one_class(),
            distributions::for_mutants(),
            ranks::for_mutants(),
        ]
        .concat(),
    }
}

fn of_one_class() -> Vec<Problem> {
    let mut small = problem("every rule", Element::BF16, 33, &menu());
    (small.logits_view.offset, small.grad_view.offset) = (10, 10);
    let precise = Problem {
        z_loss: 0.0,
        ..problem("every rule but z-loss", Element::F32, 9, &menu())
    };
    let softcap = Problem {
        softcap: Some(8.0),
        ..problem("softcap", Element::F32, 5, &bad_menu())
    };
    let far = [
        row(Kind::Far(1e10), 0.1, 1.0),
        row(Kind::Far(1e38), 0.0, 1.0),
        row(Kind::Lowest, 0.1, 1.0),
        row(Kind::LowestTarget, 0.1, 1.0),
        row(Kind::AllLowest, 0.1, 1.0),
    ];
    let far = Problem {
        z_loss: 0.0,
        ..problem("far", Element::F32, 33, &far)
    };
    let cap = Problem {
        softcap: Some(1e4),
        z_loss: 0.0,
        ..problem("a large softcap", Element::F32, 9, &menu()[1..5])
    };
    let rows = [
        row(Kind::Shifted(-300.0), 0.1, 1.0),
        row(Kind::Masked, 0.3, 2.0),
    ];
    let warps = Problem {
        mean: true,
        seeds: vec![0, 1, 2, 3],
        logits_view: View {
            offset: 10,
            ..View::contiguous(2, 1501)
        },
        ..problem("several warps", Element::BF16, 1501, &rows)
    };
    let view = View {
        sizes: vec![1, 2],
        strides: vec![7, 80],
        offset: 0,
    };
    let padded = Problem {
        width: 70,
        logits_view: view.clone(),
        grad_view: View { offset: 4, ..view },
        ..problem("strided and padded", Element::F32, 41, &rows)
    };
    // Two chunks, words that groups straddle, and a target in the last of the groups taken at once.
    let rising = row(Kind::Rising, 0.1, 1.0);
    let mut chunks = problem("chunks", Element::F32, 3599, &[rows[0], rising]);
    (chunks.logits_view.offset, chunks.grad_view.offset) = (4, 4);
    chunks.seeds = vec![0, 1, 2, 3];
    let several = Problem {
        softcap: Some(30.0),
        ..problem("several groups, softcap", Element::F32, 1023, &short_menu())
    };
    vec![
        small, precise, softcap, far, cap, warps, padded, chunks, several,
    ]
}

/// The first complaint, if any.
fn verdict(sources: &Path, build: Build, file: &str) -> Option<String> {
    let driver = mutant_driver(sources, build);
    problems(file)
        .iter()
        .find_map(|problem| check_with(problem, &driver).err())
}

fn write_mutant(mutant: &Mutant, folder: &Path) {
    let kernels = kernel_sources();
    for (from, to) in [
        (kernels.clone(), folder.to_path_buf()),
        (kernels.join("emulation"), folder.join("emulation")),
    ] {
        fs::create_dir_all(&to).expect("a writable folder");
        for entry in fs::read_dir(from).expect("the kernels' folder") {
            let path = entry.expect("a readable folder").path();
            if path.is_file() {
                fs::copy(&path, to.join(path.file_name().expect("a file"))).expect("a copy");
            }
        }
    }
    for (file, text) in LEFT_OUT {
        let path = folder.join(file);
        let source = fs::read_to_string(&path).expect("a source");
        assert_eq!(source.matches(text).count(), 1, "`{text}` in {file}");
        fs::write(path, source.replace(text, "")).expect("a writable file");
    }
    let file = folder.join(mutant.file);
    let source = fs::read_to_string(&file).expect("a kernel source");
    let found = source.matches(mutant.find).count();
    assert_eq!(
        found, mutant.times,
        "{}: `{}` occurs so often in {}",
        mutant.name, mutant.find, mutant.file
    );
    fs::write(&file, source.replace(mutant.find, mutant.replace)).expect("a writable file");
}

/// `MUTANTS=part-of-a-name cargo test …` tries those alone.
fn every_mutant_is_found(part: usize) {
    let mut survivors = Vec::new();
    let named = std::env::var("MUTANTS").unwrap_or_default();
    let chosen = MUTANTS.iter().filter(|mutant| mutant.name.contains(&named));
    for mutant in chosen.skip(part).step_by(2) {
        let folder = tempfile::tempdir().expect("a temporary folder");
        write_mutant(mutant, folder.path());
        match mutant
            .builds
            .iter()
            .find_map(|&build| verdict(folder.path(), build, mutant.file).map(|said| (build, said)))
        {
            Some((build, said)) => println!(
                "{}: {build:?}: {}",
                mutant.name,
                said.lines().next().unwrap_or_default()
            ),
            None => survivors.push(mutant.name),
        }
    }
    assert!(survivors.is_empty(), "not found: {survivors:?}");
}

#[test]
fn mutants_of_even_number_are_found() {
    every_mutant_is_found(0);
}

#[test]
fn mutants_of_odd_number_are_found() {
    every_mutant_is_found(1);
}

/// Otherwise finding a mutant would mean nothing.
#[test]
fn the_kernels_pass_what_mutants_fail() {
    for build in [Build::Plain, Build::Sanitized, Build::Races] {
        let all = verdict(&kernel_sources(), build, "all");
        assert_eq!(all, None, "{build:?}");
    }
}
