// Rows of which several ranks have a slice of the vocabulary each: what every rank's forward left of a row is gathered and
// merged in rank order on each of them, to the same bits. A block of one warp a row, whose first thread writes.
#pragma once
#include "distribution.cuh"

template <class Slice> DEVICE Slice slice_of_rank(const Params& p, unsigned rank, uint64_t row) {
  return static_cast<const Slice*>(p.gathered)[rank * p.rows + row];
}

template <bool STATS, bool SOFTCAP> DEVICE void merge_ranks(const Params& p) {
  dev::begin_kernel();
  const uint64_t row = blockIdx.x;
  const RowInputs in = read_inputs(p, row);
  if (in.kind != RowKind::kCounted) return;  // the forward has finished it
  const Transform<SOFTCAP> transform(p);
  Running all = slice_of_rank<Running>(p, 0, row);
  bool alike = true;
  ROLLED for (unsigned rank = 1; rank < p.ranks; rank++) {
    const Running other = slice_of_rank<Running>(p, rank, row);
    alike = alike && other.digest == all.digest;
    all.others = merge<STATS>(all.others, other.others, transform);
    if (all.target_logit != all.target_logit) all.target_logit = other.target_logit;
  }
  if (alike) {
    finish_row<STATS, SOFTCAP>(p, row, in, all.others, all.target_logit, transform, threadIdx.x == 0);
    return;
  }
  PATH("ranks differ");
  report_bad_row(p, row);
  finish_unused_row<STATS>(p, row, NAN);
  // As if no class were masked: a row of masked classes has gradient 0.
  if (p.state && threadIdx.x == 0) static_cast<RowState*>(p.state)[row].classes = p.vocab;
}

template <bool SOFTCAP> DEVICE void merge_distributions(const Params& p) {
  dev::begin_kernel();
  const uint64_t row = blockIdx.x;
  const DistributionInputs in = read_distribution_inputs(p, row);
  if (in.kind != RowKind::kCounted) return;
  const Transform<SOFTCAP> transform(p);
  AllClasses all = slice_of_rank<AllClasses>(p, 0, row);
  bool alike = true;
  ROLLED for (unsigned rank = 1; rank < p.ranks; rank++) {
    const AllClasses other = slice_of_rank<AllClasses>(p, rank, row);
    alike = alike && other.digest == all.digest;
    all = merge(all, other, transform);
  }
  if (threadIdx.x != 0) return;
  if (alike) {
    finish_distribution(p, row, in, all, transform);
    return;
  }
  PATH("ranks differ");
  report_bad_row(p, row);
  finish_unused_distribution(p, row, NAN);
  DistributionState state = {};
  state.bad = 1;
  if (p.state) static_cast<DistributionState*>(p.state)[row] = state;
}
