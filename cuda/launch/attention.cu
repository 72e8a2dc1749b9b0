#include "launch/attention.h"

#include <algorithm>
#include <climits>
#include <utility>

#include "kernels/cells.h"
#include "kernels/rows.h"
#include "kernels/splits.h"
#include "kernels/sums.h"

namespace jca {
namespace {

Status status_of(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return {};
  return {std::string(what) + ": " + cudaGetErrorString(error)};
}

// Calls f with the C++ type of the inputs.
template <class F>
Status with_dtype(Arithmetic arithmetic, F f) {
  switch (arithmetic) {
    case Arithmetic::kFloat16:
      return f(__half{});
    case Arithmetic::kBfloat16:
    case Arithmetic::kFloat16Bfloat16:
      return f(__nv_bfloat16{});
    default:
      return f(float{});
  }
}

// Lanes that hold a row, and rows of a block, in the kernels of rows.h.
int row_lanes(int head_dim) {
  return head_dim <= 32 ? 4 : head_dim <= 64 ? 8 : head_dim <= 128 ? 16 : 32;
}
int64_t row_blocks(int head_dim, int rows) { return ceil_div(rows, kRowThreads / row_lanes(head_dim)); }

template <auto kKernel4, auto kKernel8, auto kKernel16, auto kKernel32, class Params>
Status launch_rows(cudaStream_t stream, const char* what, const Params& params, int64_t batch,
                   int heads, int rows, int rows_each = 1) {
  const int lanes = row_lanes(params.problem.head_dim);
  const int64_t blocks = ceil_div(row_blocks(params.problem.head_dim, rows), rows_each) * heads * batch;
  if (blocks == 0) return {};
  if (blocks > INT_MAX) return {std::string(what) + ": too many rows for one launch"};
  const auto kernel = lanes == 4 ? kKernel4 : lanes == 8 ? kKernel8 : lanes == 16 ? kKernel16 : kKernel32;
  kernel<<<static_cast<unsigned>(blocks), kRowThreads, 0, stream>>>(params);
  return status_of(cudaGetLastError(), what);
}

template <typename T, typename THat>
Status normalize(cudaStream_t stream, const NormParams& params) {
  return launch_rows<normalize_rows<T, THat, 4>, normalize_rows<T, THat, 8>,
                     normalize_rows<T, THat, 16>, normalize_rows<T, THat, 32>>(
      stream, "normalize_rows", params, params.batch, params.num_heads, params.seqlen, kNormRowsEach);
}

// A copy of x in rows of Hp, for rows that 16-byte copies cannot read.
template <typename T>
Status pad_rows(cudaStream_t stream, const Problem& problem, const Rows& x, int seqlen, int num_heads,
                const Rows& padded) {
  return normalize<T, T>(stream, {.problem = problem,
                                  .x = x,
                                  .seqlen = seqlen,
                                  .num_heads = num_heads,
                                  .batch = static_cast<int>(padded.batch.size),
                                  .fold = {},
                                  .log2_units = false,
                                  .hat = padded,
                                  .inverse_norm = nullptr,
                                  .l2norm = false});
}

// q^ of every batch entry of the call: it carries the entry's scale.
template <typename T, typename THat>
Status normalize_q(cudaStream_t stream, const Problem& problem, bool log2_units, const Rows& q,
                   const Rows& q_hat, float* q_inverse_norm) {
  return normalize<T, THat>(stream, {.problem = problem,
                                     .x = q,
                                     .seqlen = problem.seqlen_q,
                                     .num_heads = problem.num_heads,
                                     .batch = problem.batch,
                                     .fold = problem.scale,
                                     .log2_units = log2_units,
                                     .hat = q_hat,
                                     .inverse_norm = q_inverse_norm,
                                     .l2norm = problem.l2norm});
}

// That, and k^ of every entry of k.
template <typename T, typename THat>
Status normalize_qk(cudaStream_t stream, const Problem& problem, bool log2_units, const Rows& q,
                    const Rows& k, const Rows& q_hat, const Rows& k_hat, float* q_inverse_norm,
                    float* k_inverse_norm) {
  const Status status =
      normalize_q<T, THat>(stream, problem, log2_units, q, q_hat, q_inverse_norm);
  if (!status.ok()) return status;
  // k^ is indexed by k's own batch entries, not the call's.
  Rows own = k;
  own.batch = {k.batch.size, 1};
  Rows own_hat = k_hat;
  own_hat.batch = own.batch;
  return normalize<T, THat>(stream, {.problem = problem,
                                     .x = own,
                                     .seqlen = problem.seqlen_k,
                                     .num_heads = problem.num_heads_kv,
                                     .batch = static_cast<int>(k.batch.size),
                                     .fold = {},
                                     .log2_units = false,
                                     .hat = own_hat,
                                     .inverse_norm = k_inverse_norm,
                                     .l2norm = problem.l2norm});
}

// Fills the cells of masks and segments.
Status condense(cudaStream_t stream, const Problem& p) {
  const auto blocks = [](int64_t cells) {
    constexpr int kCells = kCellThreads / 32;
    return static_cast<unsigned>((cells + kCells - 1) / kCells);
  };
  if (p.mask.data != nullptr) {
    const Mask& mask = p.mask;
    if (mask.keys != nullptr) {
      list_keys<<<static_cast<unsigned>(mask.batch.size), kListThreads, 0, stream>>>(mask);
    } else {
      const int64_t cells = mask.batch.size * mask.heads * mask.cell_rows() * mask.cell_cols();
      condense_mask<<<blocks(cells), kCellThreads, 0, stream>>>(mask);
    }
  }
  for (const Segments& segments : {p.q_segments, p.kv_segments}) {
    if (segments.data == nullptr) continue;
    condense_segments<<<blocks(segments.batch.size * segments.cells()), kCellThreads, 0, stream>>>(
        segments);
  }
  return status_of(cudaGetLastError(), "condensing masks and segments");
}

// `grid` gives the number of CTAs of an instance.
template <class Params, class Grid>
Status launch_instance(cudaStream_t stream, Direction direction, Arithmetic arithmetic,
                       bool unbounded, Params params, Grid grid, int packed_rows = 0) {
  const Problem& p = params.problem;
  const Instance* instance =
      find_instance(direction, arithmetic, unbounded, p.head_dim, packed_rows);
  const std::string what = std::string("cosine_attn_") + name(direction) + " " + name(arithmetic) +
                           " H=" + std::to_string(p.head_dim);
  if (instance == nullptr) return {what + ": no kernel for the shared memory of this GPU"};
  const int64_t blocks = grid(*instance);
  if (blocks == 0) return {};
  if (blocks > INT_MAX) return {what + ": too many blocks for one launch"};
  const Status status = status_of(
      cudaFuncSetAttribute(instance->kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           instance->smem_bytes),
      (what + ": " + std::to_string(instance->smem_bytes) + " bytes of shared memory").c_str());
  if (!status.ok()) return status;
  void* args[] = {&params};
  return status_of(cudaLaunchKernel(instance->kernel, dim3(static_cast<unsigned>(blocks)),
                                    dim3(instance->threads), args, instance->smem_bytes, stream),
                   what.c_str());
}

template <typename T>
Status forward(cudaStream_t stream, const ForwardCall& call) {
  const Problem& p = call.problem;
  Status status = condense(stream, p);
  if (!status.ok()) return status;
  auto normalize = normalize_qk<T, T>;
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    if (call.arithmetic == Arithmetic::kFloat16Bfloat16) normalize = normalize_qk<T, __half>;
  }
  status = normalize(stream, p, !call.unbounded, call.q, call.k, call.q_hat, call.k_hat, nullptr,
                     nullptr);
  if (!status.ok()) return status;
  Rows v = call.v;
  if (p.head_dim % 8 != 0) {
    Rows own = call.v, own_padded = call.v_padded;
    own.batch.div = own_padded.batch.div = 1;
    status = pad_rows<T>(stream, p, own, p.seqlen_k, p.num_heads_kv, own_padded);
    if (!status.ok()) return status;
    v = call.v_padded;
  }
  const FwdParams params{.problem = p,
                         .q_hat = call.q_hat,
                         .k_hat = call.k_hat,
                         .v = v,
                         .out = call.out,
                         .lse = call.lse,
                         .lse_low = call.lse_low,
                         .shift = call.shift,
                         .shift_log2 = call.shift * kLog2e};
  return launch_instance(stream, Direction::kForward, call.arithmetic, call.unbounded, params,
                         [&](const Instance& instance) {
                           return ceil_div(p.seqlen_q, instance.block_m) * p.num_heads * p.batch;
                         });
}

Status decode(cudaStream_t stream, const ForwardCall& call) {
  const Problem& p = call.problem;
  Status status = condense(stream, p);
  if (!status.ok()) return status;
  const DecodeParams params{.problem = p,
                            .q = call.q,
                            .k = call.k,
                            .v = call.v,
                            .out = call.out,
                            .lse = call.lse,
                            .lse_low = call.lse_low,
                            .shift = call.shift,
                            .shift_log2 = call.shift * kLog2e,
                            .splits = call.splits,
                            .partials = call.partials};
  status = launch_instance(
      stream, Direction::kDecode, call.arithmetic, false, params,
      [&](const Instance&) { return int64_t(p.num_heads_kv) * call.splits * p.batch; },
      p.num_heads / p.num_heads_kv * p.seqlen_q);
  if (!status.ok() || call.splits == 1 || p.batch == 0) return status;

  const auto kernel =
      call.arithmetic == Arithmetic::kFloat16 ? sum_splits<__half> : sum_splits<__nv_bfloat16>;
  // Code of sm_90 on waits for the decode kernel itself, and so it can be there when that ends. Not so what
  // a later GPU makes of the PTX of sm_80.
  cudaFuncAttributes code;
  status = status_of(cudaFuncGetAttributes(&code, kernel), "sum_splits");
  if (!status.ok()) return status;
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  const int chunks = p.head_dim / 4 + 1;
  const int slices = std::min<int>(kSplitThreads / chunks, ceil_div(call.splits, kSplitLoads));
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(p.batch, p.num_heads, p.seqlen_q);
  config.blockDim = dim3(chunks, slices);
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = code.ptxVersion >= 90 ? 1 : 0;
  return status_of(cudaLaunchKernelEx(&config, kernel, params), "sum_splits");
}

// Zeros for what CTAs of the backward add to by atomics.
Status clear_sums(cudaStream_t stream, const BackwardCall& call) {
  const Problem& p = call.problem;
  const size_t rows = size_t(p.batch) * p.num_heads * p.seqlen_q;
  const size_t accum = call.arithmetic == Arithmetic::kThreeTf32 ? sizeof(double) : sizeof(float);
  const struct {
    void* data;
    size_t bytes;
  } sums[] = {{call.dq_accum, accum * rows * p.head_dim_padded},
              {call.dscale == nullptr ? nullptr : call.row_sums, sizeof(float2) * rows},
              {call.dbias.data, sizeof(float) * call.dbias_size},
              {call.dbias.wide, sizeof(double) * call.dbias_size},
              {call.drelative_bias.wide, sizeof(double) * call.drelative_bias_size}};
  for (const auto& [data, bytes] : sums) {
    if (data == nullptr) continue;
    const Status status =
        status_of(cudaMemsetAsync(data, 0, bytes, stream), "clearing sums of the backward");
    if (!status.ok()) return status;
  }
  return {};
}

// Gradients that were summed in float64.
Status round_biases(cudaStream_t stream, const BackwardCall& call) {
  const std::pair<const BiasGradient*, int64_t> biases[] = {
      {&call.dbias, call.dbias_size}, {&call.drelative_bias, call.drelative_bias_size}};
  for (const auto& [gradient, size] : biases) {
    if (gradient->wide == nullptr) continue;
    round_sums<<<static_cast<unsigned>(ceil_div(size, kSumThreads)), kSumThreads, 0, stream>>>(
        gradient->wide, gradient->data, size);
  }
  return status_of(cudaGetLastError(), "rounding the gradient of a bias");
}

// The same sums, in one order.
Status ordered_sums(cudaStream_t stream, const BackwardCall& call, const BwdParams& params) {
  const Problem& p = call.problem;
  Status status = launch_instance(
      stream, Direction::kDq, call.arithmetic, true, params, [&](const Instance& instance) {
        return ceil_div(p.seqlen_q, instance.block_m) * p.num_heads * p.batch;
      });
  if (!status.ok()) return status;

  const BlockDiagonals blocks(p);
  DbiasParams sum{.problem = p,
                  .q_hat = params.q_hat,
                  .k_hat = params.k_hat,
                  .v = params.v,
                  .dout = params.dout,
                  .stats = params.stats,
                  .partials = nullptr,
                  .diagonals = false,
                  .dbias = call.dbias,
                  .slices = call.dbias_slices};
  const auto launch = [&](int64_t ctas) {
    return launch_instance(stream, Direction::kDbias, call.arithmetic, true, sum,
                           [&](const Instance&) { return ctas; });
  };
  const auto sum_blocks = [](int64_t sums) { return static_cast<unsigned>(ceil_div(sums, kSumThreads)); };
  if (const BiasGradient& dbias = call.dbias; dbias.data != nullptr) {
    sum.partials = call.dbias_slices > 1 ? call.dbias_partials : dbias.data;
    status = launch(dbias.batch * call.dbias_slices * (dbias.stride_head == 0 ? 1 : p.num_heads) *
                    (dbias.stride_row == 0 ? 1 : blocks.rows) * (dbias.stride_col == 0 ? 1 : blocks.cols));
    if (!status.ok()) return status;
    if (call.dbias_slices > 1) {
      sum_slices<<<sum_blocks(call.dbias_size), kSumThreads, 0, stream>>>(
          sum.partials, dbias.data, call.dbias_size, call.dbias_slices);
    }
  }
  if (call.drelative_bias.data != nullptr) {
    sum.partials = call.diagonal_partials;
    sum.diagonals = true;
    status = launch(int64_t(p.batch) * p.num_heads * blocks.count());
    if (!status.ok()) return status;
    sum_diagonals<<<sum_blocks(call.drelative_bias_size), kSumThreads, 0, stream>>>(
        p, sum.partials, call.drelative_bias);
  }
  return status_of(cudaGetLastError(), "summing the gradient of a bias");
}

template <typename T>
Status backward(cudaStream_t stream, const BackwardCall& call) {
  const Problem& p = call.problem;
  Status status = condense(stream, p);
  if (!status.ok()) return status;
  status = normalize_qk<T, T>(stream, p, !call.unbounded, call.q, call.k, call.q_hat, call.k_hat,
                              call.q_inverse_norm, call.k_inverse_norm);
  if (!status.ok()) return status;

  Rows v = call.v, dout = call.dout;
  if (p.head_dim % 8 != 0) {
    Rows own = call.v, own_padded = call.v_padded;
    own.batch.div = own_padded.batch.div = 1;
    status = pad_rows<T>(stream, p, own, p.seqlen_k, p.num_heads_kv, own_padded);
    if (!status.ok()) return status;
    status = pad_rows<T>(stream, p, call.dout, p.seqlen_q, p.num_heads, call.dout_padded);
    if (!status.ok()) return status;
    v = call.v_padded;
    dout = call.dout_padded;
  }

  const DeltaParams delta{.problem = p,
                          .out = call.out,
                          .dout = call.dout,
                          .lse = call.lse,
                          .lse_low = call.lse_low,
                          .dlse = call.dlse,
                          .log2_units = !call.unbounded,
                          .stats = call.stats};
  status = launch_rows<delta_rows<T, 4>, delta_rows<T, 8>, delta_rows<T, 16>, delta_rows<T, 32>>(
      stream, "delta_rows", delta, p.batch, p.num_heads, call.stats.seqlen_padded);
  if (!status.ok()) return status;

  BwdParams params{.problem = p,
                   .q_hat = call.q_hat,
                   .k_hat = call.k_hat,
                   .v = v,
                   .dout = dout,
                   .k_raw = call.k,
                   .k_inverse_norm = call.k_inverse_norm,
                   .stats = call.stats,
                   .dq_accum = call.dq_accum,
                   .row_sums = call.dscale == nullptr ? nullptr : call.row_sums,
                   .dbias = call.dbias,
                   .drelative_bias = call.drelative_bias,
                   .dk = call.dk,
                   .dv = call.dv};
  if (call.deterministic) {
    status = ordered_sums(stream, call, params);
    params.dq_accum = nullptr;
    params.row_sums = nullptr;
    params.dbias = params.drelative_bias = {};
  } else {
    status = clear_sums(stream, call);
  }
  if (!status.ok()) return status;
  if (p.mask.keys != nullptr) {  // keys that are not in a list
    for (const Rows& rows : {call.dk, call.dv}) {
      const size_t bytes = sizeof(T) * p.batch * p.num_heads_kv * size_t(p.seqlen_k) * p.head_dim;
      status = status_of(cudaMemsetAsync(rows.data, 0, bytes, stream), "clearing dk and dv");
      if (!status.ok()) return status;
    }
  }
  status = launch_instance(stream, Direction::kBackward, call.arithmetic, call.unbounded, params,
                           [&](const Instance& instance) {
                             return ceil_div(p.seqlen_k, instance.block_n) * p.num_heads_kv *
                                    p.batch;
                           });
  if (!status.ok()) return status;
  status = round_biases(stream, call);
  if (!status.ok()) return status;

  const DqParams dq{.problem = p,
                    .q_raw = call.q,
                    .q_inverse_norm = call.q_inverse_norm,
                    .stats = call.stats,
                    .dq_accum = call.dq_accum,
                    .row_sums = call.row_sums,
                    .log2_units = !call.unbounded,
                    .dlse = call.dlse,
                    .dq = call.dq,
                    .dscale_partials = call.dscale == nullptr ? nullptr : call.dscale_partials};
  const auto finish = [&]<typename Accum>(Accum) {
    return launch_rows<finish_dq<T, Accum, 4>, finish_dq<T, Accum, 8>, finish_dq<T, Accum, 16>,
                       finish_dq<T, Accum, 32>>(stream, "finish_dq", dq, p.batch, p.num_heads,
                                                p.seqlen_q);
  };
  if constexpr (std::is_same_v<T, float>) {
    status = call.arithmetic == Arithmetic::kThreeTf32 ? finish(double{}) : finish(float{});
  } else {
    status = finish(float{});
  }
  if (!status.ok() || call.dscale == nullptr) return status;
  sum_dscale<<<static_cast<unsigned>(call.dscale_batch * p.num_heads), kSumThreads, 0, stream>>>(
      call.dscale_partials, call.dscale, p.batch, call.dscale_batch, p.num_heads,
      static_cast<int>(row_blocks(p.head_dim, p.seqlen_q)));
  return status_of(cudaGetLastError(), "sum_dscale");
}

template <class Call>
bool fits_bounded(Direction direction, const Call& call) {
  return find_instance(direction, call.arithmetic, false, call.problem.head_dim) != nullptr;
}

}  // namespace

Status launch_forward(cudaStream_t stream, ForwardCall call) {
  if (call.splits > 0) return decode(stream, call);
  call.unbounded |= !fits_bounded(Direction::kForward, call);
  return with_dtype(call.arithmetic,
                    [&](auto t) { return forward<decltype(t)>(stream, call); });
}

Status launch_backward(cudaStream_t stream, BackwardCall call) {
  call.unbounded |= !fits_bounded(Direction::kBackward, call);
  return with_dtype(call.arithmetic,
                    [&](auto t) { return backward<decltype(t)>(stream, call); });
}

}  // namespace jca
