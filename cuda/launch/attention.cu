#include "launch/attention.h"

#include <algorithm>
#include <climits>
#include <initializer_list>
#include <utility>

#include "kernels/cells.h"
#include "kernels/rows.h"
#include "kernels/splits.h"
#include "kernels/sums.h"
#include "launch/tensor_map.h"

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

// For kernels that may start while the one before still runs: from sm_90 on their code waits for it. Not so
// what a later GPU makes of the PTX of sm_80.
struct EarlyLaunch {
  cudaLaunchAttribute attribute{};
  unsigned count = 0;

  Status init(const void* kernel) {
    cudaFuncAttributes code;
    const Status status = status_of(cudaFuncGetAttributes(&code, kernel), "reading a kernel's attributes");
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    count = status.ok() && code.ptxVersion >= 90 ? 1 : 0;
    return status;
  }
};

// early: as for `launch`.
template <auto kKernel4, auto kKernel8, auto kKernel16, auto kKernel32, class Params>
Status launch_rows(cudaStream_t stream, const char* what, const Params& params, int64_t batch,
                   int heads, int rows, int rows_each = 1, bool early = false) {
  const int lanes = row_lanes(params.problem.head_dim);
  const int64_t blocks = ceil_div(row_blocks(params.problem.head_dim, rows), rows_each) * heads * batch;
  if (blocks == 0) return {};
  if (blocks > INT_MAX) return {std::string(what) + ": too many rows for one launch"};
  const auto kernel = lanes == 4 ? kKernel4 : lanes == 8 ? kKernel8 : lanes == 16 ? kKernel16 : kKernel32;
  EarlyLaunch attribute;
  cudaLaunchConfig_t config{};
  if (early) {
    const Status status = attribute.init(reinterpret_cast<const void*>(kernel));
    if (!status.ok()) return status;
    config.attrs = &attribute.attribute;
    config.numAttrs = attribute.count;
  }
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kRowThreads);
  config.stream = stream;
  return status_of(cudaLaunchKernelEx(&config, kernel, params), what);
}

template <typename T, typename THat>
Status normalize(cudaStream_t stream, const NormParams& params) {
  return launch_rows<normalize_rows<T, THat, 4>, normalize_rows<T, THat, 8>,
                     normalize_rows<T, THat, 16>, normalize_rows<T, THat, 32>>(
      stream, "normalize_rows", params, params.batch, params.num_heads, params.seqlen, kNormRowsEach,
      params.listed);
}

// x as its copy reads it, entry by entry: the copy has as many entries, or one for each of the call.
Rows copied_entries(const Rows& x, const Rows& copy) {
  Rows entries = x;
  if (copy.batch.size == x.batch.size) entries.batch.div = 1;
  return entries;
}

// A copy of x in rows of Hp; listed: of the keys that are listed alone, which entries of the call have, but
// not where the list is a prefix.
template <typename T>
Status copy_rows(cudaStream_t stream, const Problem& problem, const Rows& x, int seqlen, int num_heads,
                 const Rows& copy, bool listed = false) {
  Rows own_copy = copy;
  own_copy.batch.div = 1;
  return normalize<T, T>(stream, {.problem = problem,
                                  .x = copied_entries(x, copy),
                                  .seqlen = seqlen,
                                  .num_heads = num_heads,
                                  .batch = static_cast<int>(copy.batch.size),
                                  .fold = {},
                                  .log2_units = false,
                                  .hat = own_copy,
                                  .inverse_norm = nullptr,
                                  .l2norm = false,
                                  .listed = listed,
                                  .skips_prefix = listed});
}

// q^ of every batch entry of the call; with `folds` it carries the entry's scale.
template <typename T, typename THat>
Status normalize_q(cudaStream_t stream, const Problem& problem, bool folds, bool log2_units, const Rows& q,
                   const Rows& q_hat, float* q_inverse_norm) {
  return normalize<T, THat>(stream, {.problem = problem,
                                     .x = q,
                                     .seqlen = problem.seqlen_q,
                                     .num_heads = problem.num_heads,
                                     .batch = problem.batch,
                                     .fold = folds ? problem.scale : HeadScale{},
                                     .log2_units = log2_units,
                                     .hat = q_hat,
                                     .inverse_norm = q_inverse_norm,
                                     .l2norm = problem.l2norm});
}

// k^ of all keys, or of the listed ones; skips_prefix: nobody reads it where these are a prefix.
template <typename T, typename THat>
Status normalize_k(cudaStream_t stream, const Problem& problem, const Rows& k, const Rows& k_hat,
                   float* k_inverse_norm, bool listed, bool skips_prefix, int* zero = nullptr) {
  Rows own_hat = k_hat;
  own_hat.batch.div = 1;
  return normalize<T, THat>(stream, {.problem = problem,
                                     .x = copied_entries(k, k_hat),
                                     .seqlen = problem.seqlen_k,
                                     .num_heads = problem.num_heads_kv,
                                     .batch = static_cast<int>(k_hat.batch.size),
                                     .fold = {},
                                     .log2_units = false,
                                     .hat = own_hat,
                                     .inverse_norm = k_inverse_norm,
                                     .l2norm = problem.l2norm,
                                     .listed = listed,
                                     .skips_prefix = skips_prefix,
                                     .zero = zero});
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

std::string describe(Direction direction, Arithmetic arithmetic, const Problem& p) {
  return std::string("cosine_attn_") + name(direction) + " " + name(arithmetic) +
         " H=" + std::to_string(p.head_dim);
}

Status no_instance(Direction direction, Arithmetic arithmetic, const Problem& p) {
  return {describe(direction, arithmetic, p) + ": no kernel for the shared memory of this GPU"};
}

// early: the kernel before is one that lets the next start, and this one waits for it.
template <class Params>
Status launch(cudaStream_t stream, const Instance& instance, Params params, int64_t blocks,
              bool early = false) {
  const std::string what = describe(instance.direction, instance.arithmetic, params.problem);
  if (blocks == 0) return {};
  if (blocks > INT_MAX) return {what + ": too many blocks for one launch"};
  Status status = status_of(
      cudaFuncSetAttribute(instance.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           instance.smem_bytes),
      (what + ": " + std::to_string(instance.smem_bytes) + " bytes of shared memory").c_str());
  if (!status.ok()) return status;
  EarlyLaunch attribute;
  cudaLaunchConfig_t config{};
  if (early) {
    status = attribute.init(instance.kernel);
    if (!status.ok()) return status;
    config.attrs = &attribute.attribute;
    config.numAttrs = attribute.count;
  }
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(instance.threads);
  config.dynamicSmemBytes = instance.smem_bytes;
  config.stream = stream;
  void* args[] = {&params};
  return status_of(cudaLaunchKernelExC(&config, instance.kernel, args), what.c_str());
}

// `grid` gives the number of CTAs of an instance.
template <class Params, class Grid>
Status launch_instance(cudaStream_t stream, Direction direction, Arithmetic arithmetic,
                       bool unbounded, const Params& params, Grid grid, int packed_rows = 0) {
  const Problem& p = params.problem;
  const Instance* instance =
      find_instance(direction, arithmetic, unbounded, p.head_dim, packed_rows);
  if (instance == nullptr) return no_instance(direction, arithmetic, p);
  return launch(stream, *instance, params, grid(*instance));
}

// A tensor map to make.
struct TensorMap {
  CUtensorMap* map;
  const char* what;
  const Rows& rows;
  FloatType type;
  int seqlen, heads, box_rows;
};

Status make_tensor_maps(std::initializer_list<TensorMap> maps, int head_dim) {
  for (const TensorMap& m : maps) {
    const Status status =
        make_tensor_map(m.map, m.what, m.rows, m.type, head_dim, m.seqlen, m.heads, m.box_rows);
    if (!status.ok()) return status;
  }
  return {};
}

int multiprocessors() {
  int device = 0, count = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

// Launches a kernel whose CTAs take tiles from a counter.
template <class Params>
Status launch_persistent(cudaStream_t stream, const Instance& instance, const Params& params, int64_t tiles,
                         bool early = false) {
  const int ctas = multiprocessors();
  if (tiles > INT_MAX - 2 * ctas) {
    return {describe(instance.direction, instance.arithmetic, params.problem) + ": too many tiles"};
  }
  return launch(stream, instance, params, std::min<int64_t>(tiles, ctas), early);
}

// Of a kernel that has no other before it.
__global__ void __launch_bounds__(kRowThreads) clear_counters(int* counters, int64_t count) {
  ptx::launch_dependent_grids();
  const int64_t threads = int64_t(gridDim.x) * kRowThreads;
  for (int64_t i = int64_t(blockIdx.x) * kRowThreads + threadIdx.x; i < count; i += threads) counters[i] = 0;
}

// Whether rows see different keys by position, so that some tiles take longer than others.
bool has_window(const Problem& p) { return p.left < kUnlimited || p.right < kUnlimited; }

// The forward on Hopper; q, k, raw or q^, k^, and v as the kernel reads them. own_keys: it makes k^, which it
// reads, beside its products.
Status launch_forward_sm90(cudaStream_t stream, const Instance& instance, const ForwardCall& call,
                           const Rows& q, const Rows& k, const Rows& v, bool own_keys) {
  const Problem& p = call.problem;
  const int64_t blocks = ceil_div(p.seqlen_q, instance.block_m);
  const int64_t tiles = blocks * p.num_heads * p.batch;
  if (tiles == 0) return {};
  const FloatType wide =
      call.arithmetic == Arithmetic::kFloat16 ? FloatType::kFloat16 : FloatType::kBfloat16;
  const FloatType hat =
      call.arithmetic == Arithmetic::kBfloat16 ? FloatType::kBfloat16 : FloatType::kFloat16;
  FwdTmaParams params{.problem = p,
                      .q_batch = q.batch,
                      .k_batch = k.batch,
                      .v_batch = v.batch,
                      .raw_v_batch = call.v.batch,
                      .listed = p.mask.keys != nullptr,
                      .q_is_raw = q.data == call.q.data,
                      .k_is_raw = k.data == call.k.data,
                      .lse = call.lse,
                      .lse_low = call.lse_low,
                      .shift = call.shift,
                      .shift_log2 = call.shift * kLog2e,
                      .section = 1,
                      .next_tile = call.counters,
                      .key_heads = static_cast<int>(call.k_hat.batch.size) * p.num_heads_kv,
                      .heads_kv = Divisor(p.num_heads_kv),
                      .next_box = call.counters + 1,
                      .made = own_keys ? call.counters + kCounters : nullptr};
  Status status = make_tensor_maps(
      {{&params.q_map, "q", q, params.q_is_raw ? wide : hat, p.seqlen_q, p.num_heads, 64},
       {&params.k_map, "k", k, params.k_is_raw ? wide : hat, p.seqlen_k, p.num_heads_kv, instance.block_n},
       {&params.v_map, "v", v, wide, p.seqlen_k, p.num_heads_kv, instance.block_n},
       {&params.raw_v_map, "v", call.v, wide, p.seqlen_k, p.num_heads_kv, instance.block_n},
       {&params.raw_k_map, "k", call.k, wide, p.seqlen_k, p.num_heads_kv, kUnitKeys},
       {&params.unit_k_map, "k^", call.k_hat, hat, p.seqlen_k, p.num_heads_kv, kUnitKeys},
       {&params.out_map, "out", call.out, wide, p.seqlen_q, p.num_heads, 64}},
      p.head_dim);
  if (!status.ok()) return status;
  // Heads taken together balance the tail, at the price of more keys in use at a time.
  if (has_window(p)) params.section = p.head_dim <= 64 ? 32 : 16;
  int64_t counters = params.k_is_raw && tiles > multiprocessors() ? 1 : 0;  // a pass before clears others
  if (own_keys) {
    // Keys of the heads that the first tiles are of come first.
    const int64_t heads = std::max<int64_t>(params.section, ceil_div(multiprocessors(), blocks));
    const int64_t section = std::min<int64_t>(ceil_div(heads * p.num_heads_kv, p.num_heads), params.key_heads);
    const int64_t section_boxes = section * ceil_div(p.seqlen_k, kUnitKeys);
    params.key_section = Divisor(static_cast<unsigned>(section));
    params.section_boxes = Divisor(static_cast<unsigned>(section_boxes));
    params.boxes = static_cast<int>(ceil_div(params.key_heads, section) * section_boxes);
    counters = kCounters + params.key_heads * ceil_div(p.seqlen_k, instance.block_n);
  }
  if (counters > 0) {
    constexpr int64_t kMostBlocks = 64;
    const int64_t clearing = std::min(ceil_div(counters, kRowThreads), kMostBlocks);
    clear_counters<<<static_cast<unsigned>(clearing), kRowThreads, 0, stream>>>(call.counters, counters);
    status = status_of(cudaGetLastError(), "clear_counters");
    if (!status.ok()) return status;
  }
  return launch_persistent(stream, instance, params, tiles, counters > 0 || !params.k_is_raw);
}

// Whether the forward on Hopper can take rows as they are: one norm each or none, and neighbours, which tensor
// copies take.
bool takes_raw_rows(const Problem& p) { return (p.groups == 1 || !p.l2norm) && p.mask.keys == nullptr; }

// Whether fewer than three tiles of queries see a key, by position.
bool few_see_a_key(const Problem& p, const Instance& instance) {
  const int64_t blocks = ceil_div(p.seqlen_q, instance.block_m);
  const int half = p.seqlen_k / 2;
  const int64_t keys =
      std::min(p.seqlen_k, std::min(p.left, half) + std::min(p.right, half) + instance.block_m);
  return blocks * (p.num_heads / p.num_heads_kv) * keys < 3 * int64_t(std::max(p.seqlen_k, 1));
}

// The forward that takes norms of raw keys for every tile again, where that takes less time than to make k^
// first: where few tiles see a key, or in a single wave of short tiles. Null elsewhere. Beside the products of
// H <= 64 norms take too long, and short tiles have few keys.
const Instance* find_raw_instance(const ForwardCall& call) {
  constexpr int kMostKeys = 1024;
  const Problem& p = call.problem;
  if (!p.l2norm || !takes_raw_rows(p) || p.seqlen_k > kMostKeys) return nullptr;
  const Instance* instance =
      find_instance(Direction::kForward, call.arithmetic, call.unbounded, p.head_dim, 0, true);
  if (instance == nullptr) return nullptr;
  const int64_t tiles = ceil_div(p.seqlen_q, instance->block_m) * p.num_heads * p.batch;
  const bool pays = p.head_dim > 64 && few_see_a_key(p, *instance);
  return pays || tiles <= multiprocessors() ? instance : nullptr;
}

// Whether CTAs of the forward on Hopper make k^ beside their products, in place of a pass before: where the
// products take longer than that, because many tiles see a key.
bool makes_keys(const ForwardCall& call, const Instance& instance) {
  const Problem& p = call.problem;
  return instance.makes_keys && p.l2norm && takes_raw_rows(p) && !few_see_a_key(p, instance);
}

template <typename T, typename THat>
Status forward(cudaStream_t stream, const ForwardCall& call) {
  const Problem& p = call.problem;
  Status status = condense(stream, p);
  if (!status.ok()) return status;
  const Instance* const raw = find_raw_instance(call);
  const Instance* const instance =
      raw != nullptr ? raw
                     : find_instance(Direction::kForward, call.arithmetic, call.unbounded, p.head_dim);
  if (instance == nullptr) return no_instance(Direction::kForward, call.arithmetic, p);
  const bool is_sm90 = instance->family == Family::kSm90;
  const bool listed = is_sm90 && p.mask.keys != nullptr;
  const bool q_is_raw = is_sm90 && (p.groups == 1 || !p.l2norm);
  // Without norms k serves as it is too, unless k^ has another type.
  const bool k_is_raw =
      raw != nullptr || (is_sm90 && !p.l2norm && takes_raw_rows(p) && std::is_same_v<T, THat>);
  if (!q_is_raw) {
    const bool folds = !is_sm90 || !std::is_same_v<THat, __nv_bfloat16>;  // sm90::FwdTile::kScaled
    status = normalize_q<T, THat>(stream, p, folds, !call.unbounded, call.q, call.q_hat, nullptr);
    if (!status.ok()) return status;
  }
  const bool own_keys = !k_is_raw && makes_keys(call, *instance);
  if (!k_is_raw && !own_keys) {
    status = normalize_k<T, THat>(stream, p, call.k, call.k_hat, nullptr, listed, false, call.counters);
    if (!status.ok()) return status;
  }
  Rows v = call.v;
  if (p.head_dim % 8 != 0 || listed) {
    status = copy_rows<T>(stream, p, call.v, p.seqlen_k, p.num_heads_kv, call.v_padded, listed);
    if (!status.ok()) return status;
    v = call.v_padded;
  }
  if (is_sm90) {
    return launch_forward_sm90(stream, *instance, call, q_is_raw ? call.q : call.q_hat,
                               k_is_raw ? call.k : call.k_hat, v, own_keys);
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
  return launch(stream, *instance, params,
                ceil_div(p.seqlen_q, instance->block_m) * p.num_heads * p.batch);
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
  EarlyLaunch early;
  status = early.init(reinterpret_cast<const void*>(kernel));
  if (!status.ok()) return status;
  const int chunks = p.head_dim / 4 + 1;
  const int slices = std::min<int>(kSplitThreads / chunks, ceil_div(call.splits, kSplitLoads));
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(p.batch, p.num_heads, p.seqlen_q);
  config.blockDim = dim3(chunks, slices);
  config.stream = stream;
  config.attrs = &early.attribute;
  config.numAttrs = early.count;
  return status_of(cudaLaunchKernelEx(&config, kernel, params), "sum_splits");
}

// Zeros for the gradients of biases, which CTAs of the backward add to by atomics.
Status clear_biases(cudaStream_t stream, const BackwardCall& call) {
  const std::pair<void*, size_t> sums[] = {
      {call.dbias.data, sizeof(float) * call.dbias_size},
      {call.dbias.wide, sizeof(double) * call.dbias_size},
      {call.drelative_bias.wide, sizeof(double) * call.drelative_bias_size}};
  for (const auto& [data, bytes] : sums) {
    if (data == nullptr) continue;
    const Status status =
        status_of(cudaMemsetAsync(data, 0, bytes, stream), "clearing the gradient of a bias");
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

// The backward on Hopper, for the same as `of`.
Status launch_backward_sm90(cudaStream_t stream, Instance instance, const BwdParams& of, bool takes_raw_k,
                            const Rows& raw_v, int* next_tile) {
  const Problem& p = of.problem;
  const FloatType type =
      instance.arithmetic == Arithmetic::kFloat16 ? FloatType::kFloat16 : FloatType::kBfloat16;
  BwdTmaParams params{.problem = p,
                      .k_batch = of.k_hat.batch,
                      .v_batch = of.v.batch,
                      .raw_v_batch = raw_v.batch,
                      .listed = p.mask.keys != nullptr,
                      .takes_raw_k = takes_raw_k,
                      .k_raw = of.k_raw,
                      .k_inverse_norm = of.k_inverse_norm,
                      .stats = of.stats,
                      .dq_accum = static_cast<float*>(of.dq_accum),
                      .row_sums = of.row_sums,
                      .dk = of.dk,
                      .dv = of.dv,
                      .section = 1,
                      .next_tile = next_tile};
  const Status status = make_tensor_maps(
      {{&params.q_map, "q^", of.q_hat, type, p.seqlen_q, p.num_heads, instance.block_m},
       {&params.k_map, "k^", of.k_hat, type, p.seqlen_k, p.num_heads_kv, instance.block_n},
       {&params.raw_k_map, "k", of.k_raw, type, p.seqlen_k, p.num_heads_kv, instance.block_n},
       {&params.v_map, "v", of.v, type, p.seqlen_k, p.num_heads_kv, instance.block_n},
       {&params.raw_v_map, "v", raw_v, type, p.seqlen_k, p.num_heads_kv, instance.block_n},
       {&params.dout_map, "dO", of.dout, type, p.seqlen_q, p.num_heads, instance.block_m}},
      p.head_dim);
  if (!status.ok()) return status;
  // Heads taken together balance the tail, while the sums of all of them stay in the L2 cache.
  if (has_window(p)) {
    constexpr int64_t kSumsInUse = 16 << 20, kMostHeads = 16;
    const int64_t sums = int64_t{4} * p.num_heads / p.num_heads_kv * p.seqlen_q * p.head_dim_padded;
    params.section = static_cast<int>(std::clamp<int64_t>(kSumsInUse / sums, 1, kMostHeads));
  }
  if (of.row_sums != nullptr) instance.kernel = instance.kernel_of_sums;
  return launch_persistent(stream, instance, params,
                           ceil_div(p.seqlen_k, instance.block_n) * p.num_heads_kv * p.batch, true);
}

template <typename T>
Status backward(cudaStream_t stream, const BackwardCall& call) {
  const Problem& p = call.problem;
  const Instance* instance =
      find_instance(Direction::kBackward, call.arithmetic, call.unbounded, p.head_dim);
  const bool is_sm90 = instance != nullptr && instance->family == Family::kSm90;
  const bool listed = is_sm90 && p.mask.keys != nullptr;  // tensor copies take neighbouring rows
  Status status = condense(stream, p);
  if (!status.ok()) return status;
  const bool takes_raw_k = is_sm90 && (p.groups == 1 || !p.l2norm);
  if (listed || !takes_raw_k) {
    status = normalize_k<T, T>(stream, p, call.k, call.k_hat, call.k_inverse_norm, listed, takes_raw_k);
    if (!status.ok()) return status;
  }

  Rows v = call.v, dout = call.dout;
  if (p.head_dim % 8 != 0 || listed) {
    status = copy_rows<T>(stream, p, call.v, p.seqlen_k, p.num_heads_kv, call.v_padded, listed);
    if (!status.ok()) return status;
    v = call.v_padded;
  }
  if (p.head_dim % 8 != 0) {
    status = copy_rows<T>(stream, p, call.dout, p.seqlen_q, p.num_heads, call.dout_padded);
    if (!status.ok()) return status;
    dout = call.dout_padded;
  }

  BwdParams params{.problem = p,
                   .q_hat = call.q_hat,
                   .k_hat = call.k_hat,
                   .v = v,
                   .dout = dout,
                   .k_raw = call.k,
                   .k_inverse_norm = call.k_inverse_norm,
                   .stats = call.stats,
                   .dq_accum = call.dq_accum,
                   .row_sums = call.row_sums,
                   .dbias = call.dbias,
                   .drelative_bias = call.drelative_bias,
                   .dk = call.dk,
                   .dv = call.dv};
  if (!call.deterministic) status = clear_biases(stream, call);
  if (!status.ok()) return status;
  if (p.mask.keys != nullptr) {
    const bool wide = p.head_dim * sizeof(T) % sizeof(uint4) == 0;
    const auto kernel = wide ? clear_unlisted<T, uint4> : clear_unlisted<T, T>;
    const int64_t blocks = int64_t(p.mask.cell_cols()) * p.batch;
    if (blocks > INT_MAX) return {"clearing dk and dv: too many blocks for one launch"};
    kernel<<<static_cast<unsigned>(blocks), kCellThreads, 0, stream>>>(p, call.dk, call.dv, takes_raw_k);
    status = status_of(cudaGetLastError(), "clearing dk and dv");
    if (!status.ok()) return status;
  }
  // The pass over queries comes last: what follows it may start early.
  const int64_t dq_rows = is_sm90 ? DqTiles::padded(p.seqlen_q) : p.seqlen_q;  // of a head
  const int64_t sums = int64_t(p.batch) * p.num_heads * dq_rows * p.head_dim_padded;
  const int64_t sum_bytes = call.arithmetic == Arithmetic::kThreeTf32 ? sizeof(double) : sizeof(float);
  const QueryParams queries{.problem = p,
                            .q = call.q,
                            .out = call.out,
                            .dout = call.dout,
                            .lse = call.lse,
                            .lse_low = call.lse_low,
                            .dlse = call.dlse,
                            .log2_units = !call.unbounded,
                            .q_hat = call.q_hat,
                            .q_inverse_norm = call.q_inverse_norm,
                            .stats = call.stats,
                            .sums = static_cast<uint4*>(call.dq_accum),
                            .zeros = call.deterministic ? 0 : sums * sum_bytes / 16,
                            .row_sums = call.row_sums,
                            .next_tile = call.next_tile};
  status = launch_rows<query_rows<T, 4>, query_rows<T, 8>, query_rows<T, 16>, query_rows<T, 32>>(
      stream, "query_rows", queries, p.batch, p.num_heads, call.stats.seqlen_padded, kQueryRowsEach);
  if (!status.ok()) return status;
  if (call.deterministic) {
    status = ordered_sums(stream, call, params);
    if (!status.ok()) return status;
    params.dq_accum = nullptr;
    params.row_sums = nullptr;
    params.dbias = params.drelative_bias = {};
  }
  if (is_sm90) {
    status = launch_backward_sm90(stream, *instance, params, takes_raw_k, call.v, call.next_tile);
  } else {
    status = launch_instance(stream, Direction::kBackward, call.arithmetic, call.unbounded, params,
                             [&](const Instance& instance) {
                               return ceil_div(p.seqlen_k, instance.block_n) * p.num_heads_kv * p.batch;
                             });
  }
  if (!status.ok()) return status;
  status = round_biases(stream, call);
  if (!status.ok()) return status;

  const DqParams dq{.problem = p,
                    .q_raw = call.q,
                    .q_inverse_norm = call.q_inverse_norm,
                    .stats = call.stats,
                    .dq_accum = call.dq_accum,
                    .tiled = is_sm90,
                    .row_sums = call.row_sums,
                    .log2_units = !call.unbounded,
                    .dlse = call.dlse,
                    .dq = call.dq,
                    .dscale_partials = call.dscale == nullptr ? nullptr : call.dscale_partials};
  const auto finish = [&]<typename Accum>(Accum) {
    return launch_rows<finish_dq<T, Accum, 4>, finish_dq<T, Accum, 8>, finish_dq<T, Accum, 16>,
                       finish_dq<T, Accum, 32>>(stream, "finish_dq", dq, p.batch, p.num_heads,
                                                p.seqlen_q, kDqRowsEach);
  };
  if constexpr (std::is_same_v<T, float>) {
    status = call.arithmetic == Arithmetic::kThreeTf32 ? finish(double{}) : finish(float{});
  } else {
    status = finish(float{});
  }
  if (!status.ok() || call.dscale == nullptr) return status;
  sum_dscale<<<static_cast<unsigned>(call.dscale_batch * p.num_heads), kSumThreads, 0, stream>>>(
      call.dscale_partials, call.dscale, p.batch, call.dscale_batch, p.num_heads,
      static_cast<int>(ceil_div(row_blocks(p.head_dim, p.seqlen_q), kDqRowsEach)));
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
  // bfloat16 rows are read as they are by the kernels that multiply logits instead, by norms or the scale.
  if (call.arithmetic == Arithmetic::kFloat16Bfloat16 && takes_raw_rows(call.problem)) {
    ForwardCall as_it_is = call;
    as_it_is.arithmetic = Arithmetic::kBfloat16;
    const Instance* instance =
        call.problem.l2norm
            ? find_raw_instance(as_it_is)
            : find_instance(Direction::kForward, Arithmetic::kBfloat16, false, call.problem.head_dim);
    if (instance != nullptr && instance->family == Family::kSm90) call = as_it_is;
  }
  return with_dtype(call.arithmetic, [&](auto t) {
    using T = decltype(t);
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      if (call.arithmetic == Arithmetic::kFloat16Bfloat16) return forward<T, __half>(stream, call);
    }
    return forward<T, T>(stream, call);
  });
}

Status launch_backward(cudaStream_t stream, BackwardCall call) {
  call.unbounded |= !fits_bounded(Direction::kBackward, call);
  return with_dtype(call.arithmetic,
                    [&](auto t) { return backward<decltype(t)>(stream, call); });
}

}  // namespace jca
