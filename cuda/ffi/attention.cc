// XLA FFI handlers: buffers and attributes -> launch calls. The only code that knows XLA.
//
// Python has validated the user's call; ranks, dtypes and sizes are checked again here, because a wrong
// one would be a wild pointer in a kernel. Handlers only enqueue work on the given stream and allocate
// nothing (scratch arrives as results), so they can be recorded into command buffers.
#include "ffi/attention.h"

#include <algorithm>
#include <initializer_list>
#include <string>

#include "launch/attention.h"
#include "xla/ffi/api/ffi.h"

namespace jca {
namespace {

namespace ffi = xla::ffi;

// Absent operands and unused results have no elements.
bool is_absent(const ffi::AnyBuffer& buffer) { return buffer.element_count() == 0; }

std::string shape_text(const ffi::AnyBuffer& buffer) {
  std::string text = "(";
  for (const int64_t d : buffer.dimensions()) {
    text += (text.size() > 1 ? ", " : "") + std::to_string(d);
  }
  return text + ")";
}

// Collects the first mismatch.
class Checker {
 public:
  // dims: -1 = any.
  void shape(const char* name, const ffi::AnyBuffer& buffer, ffi::DataType dtype,
             std::initializer_list<int64_t> dims) {
    const auto actual = buffer.dimensions();
    bool matches = buffer.element_type() == dtype && actual.size() == dims.size();
    size_t i = 0;
    std::string expected;
    for (const int64_t d : dims) {
      expected += (i > 0 ? ", " : "") + (d < 0 ? std::string("any") : std::to_string(d));
      matches = matches && i < actual.size() && (d < 0 || actual[i] == d);
      ++i;
    }
    if (!matches) {
      fail(std::string(name) + ": got dtype " + std::to_string(int(buffer.element_type())) + " " +
           shape_text(buffer) + ", expected dtype " + std::to_string(int(dtype)) + " (" + expected +
           ")");
    }
  }
  void require(bool condition, const std::string& message) {
    if (!condition) fail(message);
  }
  ffi::Error error() const {
    return message_.empty() ? ffi::Error::Success() : ffi::Error::InvalidArgument(message_);
  }
  bool ok() const { return message_.empty(); }

 private:
  void fail(const std::string& message) {
    if (message_.empty()) message_ = "jax_cosine_attn: " + message;
  }
  std::string message_;
};

ffi::Error to_error(const Status& status) {
  return status.ok() ? ffi::Error::Success()
                     : ffi::Error::Internal("jax_cosine_attn: " + status.message);
}

struct Attributes {
  bool heads_first, l2norm_qk, three_passes, unbounded;
  int32_t groups, left, right;
  ffi::Span<const int64_t> div;  // of the data operands, in the order of Operands
};

// What both directions read beside q, k and v, and the scratch of the pre-pass over it.
struct Operands {
  const ffi::AnyBuffer &q, &k, &v, &scale, &bias, &relative_bias, &mask, &q_lengths, &kv_lengths,
      &q_segments, &kv_segments;
  ffi::AnyBuffer &mask_cells, &mask_bits, &mask_keys, &q_ranges, &kv_ranges;
};
enum Field { kQ, kK, kV, kScale, kBias, kRelativeBias, kMask, kQLengths, kKvLengths, kQSegments,
             kKvSegments, kFields };

// The data operands that both directions share, checked; `batch` is that of the results.
struct Inputs {
  Problem problem;
  Arithmetic arithmetic;
  ffi::DataType dtype;
  Rows q, k, v;
};

// [batch, L, heads, H], or [batch, heads, L, H] when heads come first.
Rows rows_of(const ffi::AnyBuffer& buffer, bool heads_first, int64_t div) {
  const auto d = buffer.dimensions();
  Rows rows;
  rows.data = buffer.untyped_data();
  rows.stride_batch = d[1] * d[2] * d[3];
  rows.stride_row = heads_first ? d[3] : d[2] * d[3];
  rows.stride_head = heads_first ? d[2] * d[3] : d[3];
  rows.batch = {std::max<int64_t>(d[0], 1), div};
  return rows;
}

// [batch, heads, L, width] scratch.
Rows packed_rows(const ffi::AnyBuffer& buffer, int64_t div) { return rows_of(buffer, true, div); }

bool arithmetic_of(ffi::DataType dtype, bool three_passes, Arithmetic& arithmetic) {
  switch (dtype) {
    case ffi::F16:
      arithmetic = Arithmetic::kFloat16;
      return true;
    case ffi::BF16:
      arithmetic = Arithmetic::kBfloat16;
      return true;
    case ffi::F32:
      arithmetic = three_passes ? Arithmetic::kThreeTf32 : Arithmetic::kTf32;
      return true;
    default:
      return false;
  }
}

bool float_type_of(ffi::DataType dtype, FloatType& type) {
  switch (dtype) {
    case ffi::F16:
      type = FloatType::kFloat16;
      return true;
    case ffi::BF16:
      type = FloatType::kBfloat16;
      return true;
    case ffi::F32:
      type = FloatType::kFloat32;
      return true;
    default:
      return false;
  }
}

// Strides of a [., 1|N, 1|T, 1|S] buffer: 0 along broadcast axes.
template <class Pairs>
void set_strides(Pairs& pairs, const ffi::AnyBuffer& buffer) {
  const auto d = buffer.dimensions();
  pairs.stride_batch = d[1] * d[2] * d[3];
  pairs.stride_head = d[1] == 1 ? 0 : d[2] * d[3];
  pairs.stride_row = d[2] == 1 ? 0 : d[3];
  pairs.stride_col = d[3] == 1 ? 0 : 1;
}

Inputs read_inputs(Checker& check, const Operands& operands, int64_t batch,
                   const Attributes& attributes) {
  const auto& [q, k, v, scale, bias, relative_bias, mask, q_lengths, kv_lengths, q_segments,
               kv_segments, mask_cells, mask_bits, mask_keys, q_ranges, kv_ranges] =
      operands;
  Inputs in{};
  in.dtype = q.element_type();
  check.require(arithmetic_of(in.dtype, attributes.three_passes, in.arithmetic),
                "dtype " + std::to_string(int(in.dtype)) + " of q is not supported");
  check.shape("q", q, in.dtype, {-1, -1, -1, -1});
  check.shape("k", k, in.dtype, {-1, -1, -1, -1});
  check.require(attributes.div.size() == kFields,
                "div has " + std::to_string(attributes.div.size()) + " entries, expected " +
                    std::to_string(int(kFields)));
  if (!check.ok()) return in;
  for (const int64_t div : attributes.div) check.require(div > 0, "div entries must be positive");

  const bool heads_first = attributes.heads_first;
  const auto dq = q.dimensions(), dk = k.dimensions();
  const int64_t t = dq[heads_first ? 2 : 1], n = dq[heads_first ? 1 : 2], h = dq[3];
  const int64_t s = dk[heads_first ? 2 : 1], kv = dk[heads_first ? 1 : 2];
  check.require(dk[3] == h && h >= 1 && h <= kMaxHeadDim,
                "head dims: got q " + shape_text(q) + ", k " + shape_text(k));
  check.require(kv >= 1 && n % std::max<int64_t>(kv, 1) == 0,
                "heads: got q " + shape_text(q) + ", k " + shape_text(k));
  check.require(attributes.groups >= 1 && h % std::max(attributes.groups, 1) == 0,
                "groups " + std::to_string(attributes.groups) + " do not divide H " +
                    std::to_string(h));
  check.shape("v", v, in.dtype, {-1, dk[1], dk[2], h});
  check.shape("scale", scale, ffi::F32, {-1, -1});
  if (!check.ok()) return in;
  check.require(scale.dimensions()[1] == 1 || scale.dimensions()[1] == n,
                "scale: got " + shape_text(scale) + " for " + std::to_string(n) + " heads");
  check.require(batch >= 1 && dq[0] >= 1 && dk[0] >= 1 && v.dimensions()[0] >= 1 &&
                    scale.dimensions()[0] >= 1,
                "empty batch");
  // [., 1|N, 1|T, 1|S]
  const auto check_pairs = [&](const char* name, const ffi::AnyBuffer& x, ffi::DataType dtype) {
    check.shape(name, x, dtype, {-1, -1, -1, -1});
    if (!check.ok()) return;
    const auto d = x.dimensions();
    check.require((d[1] == 1 || d[1] == n) && (d[2] == 1 || d[2] == t) && (d[3] == 1 || d[3] == s),
                  std::string(name) + ": got " + shape_text(x) + " for " + std::to_string(n) +
                      " heads and " + std::to_string(t) + " x " + std::to_string(s) + " pairs");
  };
  if (!is_absent(mask)) {
    check_pairs("mask", mask, ffi::PRED);
    if (!check.ok()) return in;
    const auto d = mask.dimensions();
    check.shape("mask_cells", mask_cells, ffi::U8,
                {d[0], d[1], ceil_div(d[2], kCellRows), ceil_div(d[3], kCellCols)});
    if (!is_absent(mask_keys)) {
      check.require(d[1] == 1 && d[2] == 1 && d[3] == s && is_absent(bias) && is_absent(relative_bias) &&
                        is_absent(q_segments),
                    "a list of keys for mask " + shape_text(mask));
      check.shape("mask_keys", mask_keys, ffi::S32, {d[0], ceil_div(d[3], kCellCols) + 1 + d[3]});
    }
    check.shape("mask_bits", mask_bits, ffi::U32, {d[0], d[1], ceil_div(d[3], kCellCols), d[2]});
  }
  FloatType bias_type{};
  if (!is_absent(bias)) {
    check.require(float_type_of(bias.element_type(), bias_type),
                  "dtype " + std::to_string(int(bias.element_type())) + " of bias is not supported");
    check_pairs("bias", bias, bias.element_type());
  }
  if (!is_absent(relative_bias)) {
    check.shape("relative_bias", relative_bias, ffi::F32, {-1, -1, t + s - 1});
    if (!check.ok()) return in;
    const int64_t heads = relative_bias.dimensions()[1];
    check.require(heads == 1 || heads == n, "relative_bias: got " + shape_text(relative_bias) +
                                                " for " + std::to_string(n) + " heads");
  }
  check.require(attributes.unbounded || (is_absent(bias) && is_absent(relative_bias)),
                "a bias has no bound");
  check.require(is_absent(q_segments) == is_absent(kv_segments), "segments of one side only");
  const auto check_segments = [&](const char* name, const ffi::AnyBuffer& x, int64_t length,
                                  const ffi::AnyBuffer& ranges, int cell) {
    if (is_absent(x)) return;
    check.shape(name, x, ffi::S32, {-1, length});
    if (check.ok()) check.shape(name, ranges, ffi::S32, {x.dimensions()[0], ceil_div(length, cell), 2});
  };
  check_segments("q_segments", q_segments, t, q_ranges, kCellRows);
  check_segments("kv_segments", kv_segments, s, kv_ranges, kCellCols);
  check.require(attributes.left >= 0 && attributes.left <= kUnlimited && attributes.right >= 0 &&
                    attributes.right <= kUnlimited,
                "window: got " + std::to_string(attributes.left) + " and " +
                    std::to_string(attributes.right));
  if (!is_absent(q_lengths)) check.shape("q_lengths", q_lengths, ffi::S32, {-1});
  if (!is_absent(kv_lengths)) check.shape("kv_lengths", kv_lengths, ffi::S32, {-1});
  constexpr int64_t kMax = kUnlimited;
  check.require(t < kMax && s < kMax && batch < kMax && n * h < kMax,
                "extents beyond 2^30: got q " + shape_text(q) + ", k " + shape_text(k));
  if (!check.ok()) return in;

  Problem& p = in.problem;
  p.batch = static_cast<int>(batch);
  p.seqlen_q = static_cast<int>(t);
  p.seqlen_k = static_cast<int>(s);
  p.num_heads = static_cast<int>(n);
  p.num_heads_kv = static_cast<int>(kv);
  p.head_dim = static_cast<int>(h);
  p.head_dim_padded = static_cast<int>((h + 7) / 8 * 8);
  p.groups = attributes.groups;
  p.left = attributes.left;
  p.right = attributes.right;
  p.l2norm = attributes.l2norm_qk;
  const auto lengths = [](const ffi::AnyBuffer& buffer, int full, int64_t div) {
    Lengths lengths;
    lengths.full = full;
    if (!is_absent(buffer)) {
      lengths.data = static_cast<const int32_t*>(buffer.untyped_data());
      lengths.batch = {buffer.dimensions()[0], div};
    }
    return lengths;
  };
  p.q_lengths = lengths(q_lengths, p.seqlen_q, attributes.div[kQLengths]);
  p.kv_lengths = lengths(kv_lengths, p.seqlen_k, attributes.div[kKvLengths]);
  if (!is_absent(mask)) {
    const auto d = mask.dimensions();
    set_strides(p.mask, mask);
    p.mask.data = static_cast<const uint8_t*>(mask.untyped_data());
    p.mask.batch = {d[0], attributes.div[kMask]};
    p.mask.heads = static_cast<int>(d[1]);
    p.mask.rows = static_cast<int>(d[2]);
    p.mask.cols = static_cast<int>(d[3]);
    p.mask.cells = static_cast<uint8_t*>(mask_cells.untyped_data());
    p.mask.bits = static_cast<uint32_t*>(mask_bits.untyped_data());
    if (!is_absent(mask_keys)) p.mask.keys = static_cast<int32_t*>(mask_keys.untyped_data());
  }
  const auto segments = [](const ffi::AnyBuffer& ids, ffi::AnyBuffer& ranges, int cell, int64_t div) {
    if (is_absent(ids)) return Segments{};
    return Segments{.data = static_cast<const int32_t*>(ids.untyped_data()),
                    .seqlen = static_cast<int>(ids.dimensions()[1]),
                    .cell = cell,
                    .batch = {ids.dimensions()[0], div},
                    .ranges = static_cast<int2*>(ranges.untyped_data())};
  };
  p.q_segments = segments(q_segments, q_ranges, kCellRows, attributes.div[kQSegments]);
  p.kv_segments = segments(kv_segments, kv_ranges, kCellCols, attributes.div[kKvSegments]);
  const auto of_scale = scale.dimensions();
  p.scale = {.data = static_cast<const float*>(scale.untyped_data()),
             .stride_batch = of_scale[1],
             .stride_head = of_scale[1] == 1 ? 0 : 1,
             .batch = {of_scale[0], attributes.div[kScale]}};
  if (!is_absent(bias)) {
    set_strides(p.bias, bias);
    p.bias.data = bias.untyped_data();
    p.bias.type = bias_type;
    p.bias.batch = {bias.dimensions()[0], attributes.div[kBias]};
  }
  if (!is_absent(relative_bias)) {
    const auto d = relative_bias.dimensions();
    p.relative_bias = {.data = static_cast<const float*>(relative_bias.untyped_data()),
                       .stride_batch = d[1] * d[2],
                       .stride_head = d[1] == 1 ? 0 : d[2],
                       .batch = {d[0], attributes.div[kRelativeBias]}};
  }
  in.q = rows_of(q, heads_first, attributes.div[kQ]);
  in.k = rows_of(k, heads_first, attributes.div[kK]);
  in.v = rows_of(v, heads_first, attributes.div[kV]);
  return in;
}

// Entries of k^ and of copies of v: those of k and v, or of the call where its entries have lists of keys of
// their own.
struct KeyCopies {
  bool of_v;
  int64_t k_entries, v_entries, k_div, v_div;

  KeyCopies(const Inputs& in, const ffi::AnyBuffer& k, const ffi::AnyBuffer& v,
            ffi::Span<const int64_t> div, bool decode = false) {
    const Problem& p = in.problem;
    const bool listed = p.mask.keys != nullptr && in.dtype != ffi::F32 && !decode;
    of_v = p.head_dim % 8 != 0 || listed;
    const bool of_call = listed && p.mask.batch.size > 1;
    k_entries = of_call ? p.batch : k.dimensions()[0];
    v_entries = of_call ? p.batch : v.dimensions()[0];
    k_div = of_call ? 1 : div[kK];
    v_div = of_call ? 1 : div[kV];
  }
};

using Result = ffi::Result<ffi::AnyBuffer>;

ffi::Error forward(cudaStream_t stream, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                   ffi::AnyBuffer scale, ffi::AnyBuffer bias, ffi::AnyBuffer relative_bias,
                   ffi::AnyBuffer mask, ffi::AnyBuffer q_lengths, ffi::AnyBuffer kv_lengths,
                   ffi::AnyBuffer q_segments, ffi::AnyBuffer kv_segments, Result out, Result lse,
                   Result lse_low, Result q_hat, Result k_hat, Result v_padded, Result mask_cells,
                   Result mask_bits, Result mask_keys, Result q_ranges, Result kv_ranges,
                   Result counters, Result partials, bool heads_first, bool l2norm_qk,
                   int32_t groups, int32_t left, int32_t right, bool three_passes, bool unbounded,
                   float shift, int32_t splits,
                   ffi::Span<const int64_t> div) {
  Checker check;
  const auto d = out->dimensions();
  check.require(d.size() == 4, "out: got " + shape_text(*out));
  if (!check.ok()) return check.error();
  const Inputs in = read_inputs(
      check,
      {q, k, v, scale, bias, relative_bias, mask, q_lengths, kv_lengths, q_segments, kv_segments,
       *mask_cells, *mask_bits, *mask_keys, *q_ranges, *kv_ranges},
      d[0], {heads_first, l2norm_qk, three_passes, unbounded, groups, left, right, div});
  if (!check.ok()) return check.error();

  const Problem& p = in.problem;
  const int64_t hp = p.head_dim_padded, n = p.num_heads, kv = p.num_heads_kv;
  const bool decode = splits > 0;
  if (decode) {
    const int64_t rows = n / kv * p.seqlen_q;
    check.require(in.dtype != ffi::F32 && p.head_dim % 8 == 0 && rows >= 1 &&
                      rows <= kMaxPackedRows && !unbounded && (groups == 1 || !l2norm_qk),
                  "not a call for decode: got q " + shape_text(q) + ", k " + shape_text(k));
    if (splits > 1) {
      check.shape("partials", *partials, ffi::F32, {p.batch, n, p.seqlen_q, splits, hp + 4});
    }
  }
  const bool half_rows =
      in.dtype == ffi::BF16 && !unbounded && q_hat->element_type() == ffi::F16;
  const ffi::DataType hat = half_rows ? ffi::F16 : in.dtype;
  check.shape("out", *out, in.dtype, {p.batch, q.dimensions()[1], q.dimensions()[2], p.head_dim});
  check.shape("lse", *lse, ffi::F32, {p.batch, n, p.seqlen_q});
  check.shape("lse_low", *lse_low, ffi::F32, {p.batch, n, p.seqlen_q});
  check.shape("q_hat", *q_hat, hat, {p.batch, n, decode ? 0 : p.seqlen_q, hp});
  const KeyCopies copies(in, k, v, div, decode);
  check.shape("k_hat", *k_hat, hat, {copies.k_entries, kv, decode ? 0 : p.seqlen_k, hp});
  check.shape("v_padded", *v_padded, in.dtype,
              {copies.v_entries, kv, copies.of_v ? p.seqlen_k : 0, hp});
  const int64_t counted = decode ? 0 : copies.k_entries * kv * ceil_div(p.seqlen_k, kCountedKeys);
  check.shape("counters", *counters, ffi::S32, {kCounters + counted});
  if (!check.ok()) return check.error();

  return to_error(launch_forward(stream, {.problem = p,
                                          .arithmetic = half_rows && !decode
                                                            ? Arithmetic::kFloat16Bfloat16
                                                            : in.arithmetic,
                                          .shift = shift,
                                          .q = in.q,
                                          .k = in.k,
                                          .v = in.v,
                                          .q_hat = packed_rows(*q_hat, 1),
                                          .k_hat = packed_rows(*k_hat, copies.k_div),
                                          .v_padded = packed_rows(*v_padded, copies.v_div),
                                          .out = rows_of(*out, heads_first, 1),
                                          .lse = lse->typed_data<float>(),
                                          .lse_low = lse_low->typed_data<float>(),
                                          .unbounded = unbounded,
                                          .counters = counters->typed_data<int32_t>(),
                                          .splits = splits,
                                          .partials = partials->typed_data<float>()}));
}

ffi::Error backward(cudaStream_t stream, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                    ffi::AnyBuffer scale, ffi::AnyBuffer bias, ffi::AnyBuffer relative_bias,
                    ffi::AnyBuffer mask, ffi::AnyBuffer q_lengths, ffi::AnyBuffer kv_lengths,
                    ffi::AnyBuffer q_segments, ffi::AnyBuffer kv_segments, ffi::AnyBuffer out,
                    ffi::AnyBuffer lse, ffi::AnyBuffer lse_low, ffi::AnyBuffer dout,
                    ffi::AnyBuffer dlse, Result dq, Result dk, Result dv, Result dscale, Result dbias,
                    Result drelative_bias, Result q_hat, Result k_hat, Result v_padded,
                    Result mask_cells, Result mask_bits, Result mask_keys, Result q_ranges,
                    Result kv_ranges, Result next_tile, Result dout_padded, Result q_inverse_norm,
                    Result k_inverse_norm, Result row_stats, Result row_sums,
                    Result dq_accum, Result dscale_partials, Result dbias_partials,
                    Result diagonal_partials, bool heads_first, bool l2norm_qk, int32_t groups,
                    int32_t left, int32_t right, bool three_passes, bool unbounded, bool deterministic,
                    ffi::Span<const int64_t> div) {
  Checker check;
  const auto d = dq->dimensions();
  check.require(d.size() == 4, "dq: got " + shape_text(*dq));
  if (!check.ok()) return check.error();
  const Inputs in = read_inputs(
      check,
      {q, k, v, scale, bias, relative_bias, mask, q_lengths, kv_lengths, q_segments, kv_segments,
       *mask_cells, *mask_bits, *mask_keys, *q_ranges, *kv_ranges},
      d[0], {heads_first, l2norm_qk, three_passes, unbounded, groups, left, right, div});
  if (!check.ok()) return check.error();

  const Problem& p = in.problem;
  const int64_t hp = p.head_dim_padded, n = p.num_heads, kv = p.num_heads_kv;
  const int64_t t = p.seqlen_q, s = p.seqlen_k, b = p.batch, h = p.head_dim;
  const int64_t padded_t = (t + 127) / 128 * 128;  // a multiple of every query block
  const int64_t q1 = q.dimensions()[1], q2 = q.dimensions()[2];
  const int64_t k1 = k.dimensions()[1], k2 = k.dimensions()[2];
  check.shape("out", out, in.dtype, {b, q1, q2, h});
  check.shape("lse", lse, ffi::F32, {b, n, t});
  check.shape("lse_low", lse_low, ffi::F32, {b, n, t});
  check.shape("dout", dout, in.dtype, {b, q1, q2, h});
  if (!is_absent(dlse)) check.shape("dlse", dlse, ffi::F32, {b, n, t});
  check.shape("dq", *dq, in.dtype, {b, q1, q2, h});
  check.shape("dk", *dk, in.dtype, {b, k1, k2, h});
  check.shape("dv", *dv, in.dtype, {b, k1, k2, h});
  if (!is_absent(*dscale)) check.shape("dscale", *dscale, ffi::F32, {-1, n});
  const KeyCopies copies(in, k, v, div);
  // Nobody needs q^ and k^ where a kernel writes dq and dk, if rows and entries are the same.
  const bool q_in_dq = hp == h, k_in_dk = hp == h && copies.k_entries == b && !p.mask.keys;
  check.shape("q_hat", *q_hat, in.dtype, {b, n, q_in_dq ? 0 : t, hp});
  check.shape("k_hat", *k_hat, in.dtype, {copies.k_entries, kv, k_in_dk ? 0 : s, hp});
  check.shape("v_padded", *v_padded, in.dtype, {copies.v_entries, kv, copies.of_v ? s : 0, hp});
  check.shape("dout_padded", *dout_padded, in.dtype, {b, n, h % 8 != 0 ? t : 0, hp});
  check.shape("q_inverse_norm", *q_inverse_norm, ffi::F32, {b, n, t, groups});
  check.shape("k_inverse_norm", *k_inverse_norm, ffi::F32, {copies.k_entries, kv, s, groups});
  check.shape("row_stats", *row_stats, ffi::F32, {b, n, kRowStats, padded_t});
  if (!is_absent(*dscale)) {
    // Absent where other calls hold keys of the same rows.
    if (!is_absent(*row_sums)) check.shape("row_sums", *row_sums, ffi::F32, {b, n, t, 2});
    check.shape("dscale_partials", *dscale_partials, ffi::F32, {b, n, ceil_div(t, kLeastRowsPerBlock)});
  }
  // Two float32 hold a float64, which JAX does not pass while jax_enable_x64 is off.
  const int64_t accum_width = in.arithmetic == Arithmetic::kThreeTf32 ? 2 * hp : hp;
  check.shape("dq_accum", *dq_accum, ffi::F32, {b, n, DqTiles::padded(t), accum_width});
  check.shape("next_tile", *next_tile, ffi::S32, {1});
  check.require(!deterministic || unbounded, "deterministic sums are those of unbounded logits");
  // Gradients have their operand's shape, and a leading dim of their own.
  BiasGradient dense, relative;
  int64_t slices = 1;
  if (!is_absent(*dbias)) {
    const auto shape = bias.dimensions();
    check.require(shape.size() == 4, "dbias without bias");
    if (check.ok()) check.shape("dbias", *dbias, ffi::F32, {-1, shape[1], shape[2], shape[3]});
    if (!check.ok()) return check.error();
    set_strides(dense, *dbias);
    dense.data = dbias->typed_data<float>();
    dense.batch = dbias->dimensions()[0];
    if (deterministic && !is_absent(*dbias_partials)) {
      slices = dbias_partials->dimensions()[0];
      check.shape("dbias_partials", *dbias_partials, ffi::F32,
                  {-1, dense.batch, shape[1], shape[2], shape[3]});
    }
    // A float64 is two float32 here too.
    if (!deterministic && (shape[2] == 1 || shape[3] == 1)) {
      check.shape("dbias_partials", *dbias_partials, ffi::F32, {2 * int64_t(dbias->element_count())});
      dense.wide = reinterpret_cast<double*>(dbias_partials->untyped_data());
    }
  }
  if (!is_absent(*drelative_bias)) {
    const auto shape = relative_bias.dimensions();
    check.require(shape.size() == 3, "drelative_bias without relative_bias");
    if (check.ok()) check.shape("drelative_bias", *drelative_bias, ffi::F32, {-1, shape[1], shape[2]});
    if (!check.ok()) return check.error();
    relative = {.data = drelative_bias->typed_data<float>(),
                .stride_batch = shape[1] * shape[2],
                .stride_head = shape[1] == 1 ? 0 : shape[2],
                .batch = drelative_bias->dimensions()[0]};
    if (deterministic) {
      check.shape("diagonal_partials", *diagonal_partials, ffi::F32,
                  {b, n, BlockDiagonals(p).count(), 2 * kBiasBlock});
    } else {
      check.shape("diagonal_partials", *diagonal_partials, ffi::F32,
                  {2 * int64_t(drelative_bias->element_count())});
      relative.wide = reinterpret_cast<double*>(diagonal_partials->untyped_data());
    }
  }
  if (!check.ok()) return check.error();

  return to_error(launch_backward(
      stream,
      {.problem = p,
       .arithmetic = in.arithmetic,
       .q = in.q,
       .k = in.k,
       .v = in.v,
       .out = rows_of(out, heads_first, 1),
       .dout = rows_of(dout, heads_first, 1),
       .lse = lse.typed_data<float>(),
       .lse_low = lse_low.typed_data<float>(),
       .dlse = is_absent(dlse) ? nullptr : dlse.typed_data<float>(),
       .q_hat = q_in_dq ? rows_of(*dq, heads_first, 1) : packed_rows(*q_hat, 1),
       .k_hat = k_in_dk ? rows_of(*dk, heads_first, 1) : packed_rows(*k_hat, copies.k_div),
       .v_padded = packed_rows(*v_padded, copies.v_div),
       .dout_padded = packed_rows(*dout_padded, 1),
       .q_inverse_norm = q_inverse_norm->typed_data<float>(),
       .k_inverse_norm = k_inverse_norm->typed_data<float>(),
       .stats = {row_stats->typed_data<float>(), static_cast<int>(padded_t)},
       .dq_accum = dq_accum->untyped_data(),
       .next_tile = next_tile->typed_data<int32_t>(),
       .row_sums = is_absent(*row_sums) ? nullptr
                                        : reinterpret_cast<float2*>(row_sums->typed_data<float>()),
       .dq = rows_of(*dq, heads_first, 1),
       .dk = rows_of(*dk, heads_first, 1),
       .dv = rows_of(*dv, heads_first, 1),
       .dscale = is_absent(*dscale) ? nullptr : dscale->typed_data<float>(),
       .dscale_batch = is_absent(*dscale) ? 1 : static_cast<int>(dscale->dimensions()[0]),
       .dscale_partials = dscale_partials->typed_data<float>(),
       .dbias = dense,
       .drelative_bias = relative,
       .dbias_size = static_cast<int64_t>(dbias->element_count()),
       .drelative_bias_size = static_cast<int64_t>(drelative_bias->element_count()),
       .unbounded = unbounded,
       .deterministic = deterministic,
       .dbias_partials = dbias_partials->typed_data<float>(),
       .dbias_slices = static_cast<int>(slices),
       .diagonal_partials = diagonal_partials->typed_data<float>()}));
}

}  // namespace

using ffi::AnyBuffer;

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_cosine_attn_fwd, forward,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<AnyBuffer>()  // q
                                  .Arg<AnyBuffer>()  // k
                                  .Arg<AnyBuffer>()  // v
                                  .Arg<AnyBuffer>()  // scale
                                  .Arg<AnyBuffer>()  // bias
                                  .Arg<AnyBuffer>()  // relative_bias
                                  .Arg<AnyBuffer>()  // mask
                                  .Arg<AnyBuffer>()  // q_lengths
                                  .Arg<AnyBuffer>()  // kv_lengths
                                  .Arg<AnyBuffer>()  // q_segments
                                  .Arg<AnyBuffer>()  // kv_segments
                                  .Ret<AnyBuffer>()  // out
                                  .Ret<AnyBuffer>()  // lse
                                  .Ret<AnyBuffer>()  // lse_low
                                  .Ret<AnyBuffer>()  // q_hat
                                  .Ret<AnyBuffer>()  // k_hat
                                  .Ret<AnyBuffer>()  // v_padded
                                  .Ret<AnyBuffer>()  // mask_cells
                                  .Ret<AnyBuffer>()  // mask_bits
                                  .Ret<AnyBuffer>()  // mask_keys
                                  .Ret<AnyBuffer>()  // q_ranges
                                  .Ret<AnyBuffer>()  // kv_ranges
                                  .Ret<AnyBuffer>()  // counters
                                  .Ret<AnyBuffer>()  // partials
                                  .Attr<bool>("heads_first")
                                  .Attr<bool>("l2norm_qk")
                                  .Attr<int32_t>("groups")
                                  .Attr<int32_t>("left")
                                  .Attr<int32_t>("right")
                                  .Attr<bool>("three_passes")
                                  .Attr<bool>("unbounded")
                                  .Attr<float>("shift")
                                  .Attr<int32_t>("splits")
                                  .Attr<ffi::Span<const int64_t>>("div"),
                              {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_cosine_attn_bwd, backward,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<AnyBuffer>()  // q
                                  .Arg<AnyBuffer>()  // k
                                  .Arg<AnyBuffer>()  // v
                                  .Arg<AnyBuffer>()  // scale
                                  .Arg<AnyBuffer>()  // bias
                                  .Arg<AnyBuffer>()  // relative_bias
                                  .Arg<AnyBuffer>()  // mask
                                  .Arg<AnyBuffer>()  // q_lengths
                                  .Arg<AnyBuffer>()  // kv_lengths
                                  .Arg<AnyBuffer>()  // q_segments
                                  .Arg<AnyBuffer>()  // kv_segments
                                  .Arg<AnyBuffer>()  // out
                                  .Arg<AnyBuffer>()  // lse
                                  .Arg<AnyBuffer>()  // lse_low
                                  .Arg<AnyBuffer>()  // dout
                                  .Arg<AnyBuffer>()  // dlse
                                  .Ret<AnyBuffer>()  // dq
                                  .Ret<AnyBuffer>()  // dk
                                  .Ret<AnyBuffer>()  // dv
                                  .Ret<AnyBuffer>()  // dscale
                                  .Ret<AnyBuffer>()  // dbias
                                  .Ret<AnyBuffer>()  // drelative_bias
                                  .Ret<AnyBuffer>()  // q_hat
                                  .Ret<AnyBuffer>()  // k_hat
                                  .Ret<AnyBuffer>()  // v_padded
                                  .Ret<AnyBuffer>()  // mask_cells
                                  .Ret<AnyBuffer>()  // mask_bits
                                  .Ret<AnyBuffer>()  // mask_keys
                                  .Ret<AnyBuffer>()  // q_ranges
                                  .Ret<AnyBuffer>()  // kv_ranges
                                  .Ret<AnyBuffer>()  // next_tile
                                  .Ret<AnyBuffer>()  // dout_padded
                                  .Ret<AnyBuffer>()  // q_inverse_norm
                                  .Ret<AnyBuffer>()  // k_inverse_norm
                                  .Ret<AnyBuffer>()  // row_stats
                                  .Ret<AnyBuffer>()  // row_sums
                                  .Ret<AnyBuffer>()  // dq_accum
                                  .Ret<AnyBuffer>()  // dscale_partials
                                  .Ret<AnyBuffer>()  // dbias_partials
                                  .Ret<AnyBuffer>()  // diagonal_partials
                                  .Attr<bool>("heads_first")
                                  .Attr<bool>("l2norm_qk")
                                  .Attr<int32_t>("groups")
                                  .Attr<int32_t>("left")
                                  .Attr<int32_t>("right")
                                  .Attr<bool>("three_passes")
                                  .Attr<bool>("unbounded")
                                  .Attr<bool>("deterministic")
                                  .Attr<ffi::Span<const int64_t>>("div"),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace jca
