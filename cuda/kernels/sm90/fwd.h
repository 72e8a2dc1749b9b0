// Forward on Hopper (sm_90a: wgmma, TMA, mbarriers), 16-bit inputs and bounded logits.
//
// P = exp(S - c) with a constant c, so O and the row sums are plain sums over blocks of keys in any order.
// In the first warpgroup one warp plans tiles ahead, one has q, k and v brought into rings of tiles, one has
// out stored, and a thread of one has raw keys brought and k^ sent; in the last all take norms and scale rows;
// the others own 64 rows of the query tile each. CTAs are persistent and take tiles from a counter. First come
// the blocks in which some pair is forbidden, then the others. exp(S) of one block runs beside P v of the block
// before; no branch but waits for what products read stands between their start and the wait for them (ptxas
// would serialise wgmma that are in flight across one, note C7514).
//
// q comes a tile ahead, raw where it has one norm a row, and is scaled in place. k is k^, of a pass before or
// of this kernel: all CTAs make k^ for one another, a box of keys at a time, ahead of the tiles that read it.
// Or k comes raw too: then logits are multiplied by the inverse norms of keys.
#pragma once

#include "kernels/lse.h"
#include "kernels/sm80/tile.h"
#include "kernels/sm90/pipeline.h"
#include "ptx/grid.h"

namespace jca::sm90 {

// Warpgroups of consumers, keys of a block, stages of the rings of k and v, and of that of q.
struct FwdShape {
  int consumers, block_n, stages, query_stages;
};

// Those that ship; benchmarks/tune.py times those of launch/instantiate_sm90.h beside them. Logits of raw k
// leave no registers for four warpgroups of consumers.
constexpr FwdShape fwd_shape(int head_dim, bool raw) {
  if (head_dim <= 64) return {raw ? 2 : 4, 64, 8, 2};
  return head_dim <= 128 ? FwdShape{2, 128, 2, 2} : FwdShape{2, 64, 2, 1};
}

// TS: element type of q and k as they are multiplied; TV: of v, P and out. kShifted: c may not be 0. kRaw: k
// comes raw, with one norm a row.
template <class TS_, class TV_, int kHeadDim_, bool kShifted_, bool kRaw_ = false,
          FwdShape kShape = fwd_shape(kHeadDim_, kRaw_)>
struct FwdTile {
  static_assert(!kRaw_ || std::is_same_v<TS_, TV_>);
  using TS = TS_;
  using TV = TV_;
  static constexpr bool kUnbounded = false, kSmall = false, kShifted = kShifted_, kRaw = kRaw_;
  // Logits take the head's scale and the norm of q after the product: bfloat16 has too few digits to round q
  // again with them.
  static constexpr bool kScaled = std::is_same_v<TS, __nv_bfloat16>;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kConsumers = kShape.consumers;
  // Take norms and scale rows, where consumers leave registers for them; elsewhere these scale their queries
  // themselves.
  static constexpr int kRowWarps = kConsumers == 2 && kHeadDim <= 128 ? 4 : 0;
  static constexpr bool kMakesKeys = kRowWarps > 0 && !kRaw;
  static constexpr int kBlockM = 64 * kConsumers, kBlockN = kShape.block_n;
  static constexpr int kStages = kShape.stages, kQueryStages = kShape.query_stages;
  static constexpr int kChunks = (kHeadDim + 63) / 64;  // columns come in chunks of 128 bytes, the swizzle's
  static constexpr int kThreads = 128 * (1 + kConsumers) + 32 * kRowWarps;
  // Of 64 K registers, granted evenly at launch.
  static constexpr int kProducerRegisters = kConsumers == 2 ? 40 : 32;
  static constexpr int kConsumerRegisters =
      kConsumers == 4 ? 112 : kConsumers == 3 ? 160 : kRowWarps == 0 ? 232 : kRaw ? 208 : 216;
  static constexpr int kRowRegisters = kRaw ? 56 : 40;
  static constexpr int kRowsAtOnce = kRowWarps == 0 || kRaw ? 2 : 1;  // of a lane

  // Of boxes of keys, one on its way here and one back beside that at hand; one, unused, without kMakesKeys.
  static constexpr int kUnitStages = kMakesKeys ? 3 : 1;

  static constexpr int kPlans = 3;  // two tiles ahead, whose q comes a tile ahead

  // A tile of queries and the blocks of keys that it needs.
  struct Plan {
    int m_block;  // or -1: no more
    int b, head, head_kv;
    int q_entry, k_entry, v_entry;  // in their batches
    const CUtensorMap* v_map;
    float fold;                     // the head's scale and log2 e, of q^, or of logits with kScaled
    BlockCounts counts;
    int first, last;               // both are among [first, last), and the full ones
    int full_first, full_last;     // among [full_first, full_last): all of these, unless
    bool by_data;                  // masks or segments tell too
    bool has_dead_keys;            // v may hold NaN in keys that no row sees
    Visible visible;
  };
  struct Shared {
    TS q[kQueryStages][kConsumers][kChunks][64][64];  // out goes the same way
    TS k[kStages][kChunks][kBlockN][64];
    TV v[kStages][kChunks][kBlockN][64];
    TS unit_k[kUnitStages][kChunks][kUnitKeys][64];
    // What logits of a key are multiplied by, with kRaw, and those of a row, with kScaled. The former have
    // twice the stages of k, which consumers give up before they read them.
    alignas(16) float k_factor[2][kStages][kBlockN];
    float q_factor[kQueryStages][kBlockM];
    ptx::Mbarrier q_raw[kQueryStages];  // full, but of rows that are not scaled yet
    ptx::Mbarrier q_full[kQueryStages], q_empty[kQueryStages], out_full[kQueryStages];
    ptx::Mbarrier norms_full[kStages], unit_raw[kUnitStages], unit_full[kUnitStages];
    ptx::Mbarrier k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
    ptx::Mbarrier plan_full[kPlans], plan_empty[kPlans];
    Plan plan[kPlans];
    int block[kStages];  // of keys, in stage i of k
    bool has_box[kUnitStages];  // or no more come
    BlockWindow window;
    bool seen[kBlockN];  // by clear_unseen
  };
  static constexpr int kSmemBytes = sizeof(Shared);
};

template <class Tile>
struct FwdKernel {
  using TS = typename Tile::TS;
  using TV = typename Tile::TV;
  using Shared = typename Tile::Shared;
  using Plan = typename Tile::Plan;
  static constexpr int kBlockM = Tile::kBlockM, kBlockN = Tile::kBlockN, kHeadDim = Tile::kHeadDim;
  static constexpr int kN = kBlockN / 8, kNV = kHeadDim / 8;
  static constexpr int kConsumerThreads = 128 * Tile::kConsumers;
  using PlanRing = Ring<Tile::kPlans>;
  using QueryRing = Ring<Tile::kQueryStages>;
  using KeyRing = Ring<Tile::kStages>;
  // Named barriers: all consumers, and from the next on each warpgroup of them.
  enum { kConsumersBarrier = 1, kWarpgroupBarrier = 2 };

  const FwdTmaParams& params;
  const Problem& p;
  Shared& shared;

  __device__ static int tiles(const Problem& p) {
    return (p.seqlen_q + kBlockM - 1) / kBlockM * p.num_heads * p.batch;
  }

  // The blocks with the most keys, of a causal call, come first.
  __device__ void locate(Plan& plan, int tile) const {
    const int blocks = (p.seqlen_q + kBlockM - 1) / kBlockM;
    const TilePlace place(tile, params.section, blocks, p.num_heads * p.batch);
    plan.m_block = blocks - 1 - place.block;
    plan.b = place.head / p.num_heads;
    plan.head = place.head % p.num_heads;
    plan.head_kv = plan.head / (p.num_heads / p.num_heads_kv);
    plan.q_entry = params.q_batch(plan.b);
    plan.k_entry = params.k_batch(plan.b);
  }

  __device__ static int boxes_of(int keys) { return (keys + kUnitKeys - 1) / kUnitKeys; }

  // Rows past the end are not stored: they forbid nothing.
  __device__ BlockKind kind_of(const Plan& plan, int block) const {
    const int m0 = plan.m_block * kBlockM;
    return plan.visible.block(p, plan.head, m0, min(m0 + kBlockM, plan.visible.seqlen_q), block * kBlockN,
                              (block + 1) * kBlockN);
  }

  // ---- The thread that has boxes of raw keys brought, and of k^ sent.

  struct Box {
    int entry, head, key;
    int key_head;  // past the last: none
  };
  __device__ Box box_at(int i) const {
    const int section = params.section_boxes(i), in_section = i - section * params.section_boxes.divisor;
    const int from_last = params.key_section(in_section);
    const int in_row = in_section - from_last * params.key_section.divisor;
    const int key_head = section * params.key_section.divisor + in_row;
    const int entry = params.heads_kv(key_head);
    return {entry, key_head - entry * p.num_heads_kv, (boxes_of(p.seqlen_k) - 1 - from_last) * kUnitKeys,
            key_head};
  }
  __device__ Box bring_box(int i, int stage) {
    const Box box = box_at(i);
    ptx::Mbarrier& raw = shared.unit_raw[stage];
    shared.has_box[stage] = true;
    raw.arrive_and_expect(sizeof(shared.unit_k[0]));
    for (int c = 0; c < Tile::kChunks; ++c) {
      ptx::tensor_load(shared.unit_k[stage][c], params.raw_k_map, raw, 64 * c, box.key, box.head, box.entry);
    }
    return box;
  }

  __device__ void make_keys() {
    ptx::wait_for_prerequisite_grids();  // for the counters
    // All boxes are claimed: those of a CTA that does not run yet would keep others waiting.
    int i = atomicAdd(params.next_box, 2), next = i + 1;
    if (i >= params.boxes) return end_boxes(0);
    Box box = bring_box(i, 0);
    int* sent = nullptr;  // the count that the last box will raise when it is there
    const auto tell = [&] {
      if (sent == nullptr) return;
      ptx::store_wait();
      ptx::red_add_release(sent, 1);
      sent = nullptr;
    };
    for (Ring<Tile::kUnitStages> at; i < params.boxes;) {
      const int after = atomicAdd(params.next_box, 1);
      Ring<Tile::kUnitStages> following = at;
      following.advance();
      Box next_box = box;
      if (next < params.boxes) {
        next_box = bring_box(next, following.stage);
      } else {
        end_boxes(following.stage);
      }
      shared.unit_full[at.stage].wait(at.parity);
      tell();  // before the next one is sent, which a release would wait for
      if (box.key_head < params.key_heads) {
        for (int c = 0; c < Tile::kChunks; ++c) {
          ptx::tensor_store(params.unit_k_map, shared.unit_k[at.stage][c], 64 * c, box.key, box.head,
                            box.entry);
        }
        ptx::store_commit();
        sent = made(box.key_head, box.key / kBlockN);
      }
      i = next;
      next = after;
      box = next_box;
      at = following;
    }
    tell();
  }
  // No more boxes come.
  __device__ void end_boxes(int stage) {
    shared.has_box[stage] = false;
    shared.unit_raw[stage].arrive();
  }

  // ---- The warp that plans.

  __device__ void make_plans() {
    if (params.listed) ptx::wait_for_prerequisite_grids();  // for the list
    const int lane = threadIdx.x % 32;
    int tile = blockIdx.x;
    for (PlanRing at;; at.advance()) {
      Plan& plan = shared.plan[at.stage];
      shared.plan_empty[at.stage].wait(at.parity ^ 1);
      if (tile >= tiles(p)) {
        if (lane == 0) {
          plan.m_block = -1;
          shared.plan_full[at.stage].arrive();
        }
        break;
      }
      if (lane == 0) {
        locate(plan, tile);
        const float scale = p.scale(plan.b, plan.head);  // on its way beside what follows
        plan.visible = Visible(p, plan.b);
        const Visible& visible = plan.visible;
        const bool raw_v = params.listed && visible.keys == nullptr;
        plan.v_map = raw_v ? &params.raw_v_map : &params.v_map;
        plan.v_entry = raw_v ? params.raw_v_batch(plan.b) : params.v_batch(plan.b);
        const int m0 = plan.m_block * kBlockM, m1 = min(m0 + kBlockM, visible.seqlen_q);
        const bool any_row = m0 < m1;
        const auto block_of = [](int key) { return (key + kBlockN - 1) / kBlockN; };
        plan.first = visible.k_begin(m0) / kBlockN;
        plan.last = any_row ? max(plan.first, block_of(visible.end_key(m1 - 1))) : plan.first;
        const int full_first = any_row ? block_of(visible.first_key(m1 - 1)) : 0;
        const int full_last = any_row ? visible.end_key(m0) / kBlockN : 0;
        const bool has_full = full_first < full_last;
        plan.full_first = has_full ? full_first : plan.last;
        plan.full_last = has_full ? full_last : plan.last;
        plan.counts.full = plan.full_last - plan.full_first;
        plan.counts.partial = plan.last - plan.first - plan.counts.full;
        plan.by_data = visible.mask_cells != nullptr || visible.q_ids != nullptr;
        plan.has_dead_keys = p.mask.data != nullptr || p.q_segments.data != nullptr ||
                             visible.first_key(0) > 0 ||
                             visible.end_key(visible.seqlen_q - 1) < p.seqlen_k;
        plan.fold = scale * kLog2e;
      }
      __syncwarp();
      if (plan.by_data) {
        BlockCounts counts;
        counts.add(plan.first, plan.last, [&](int block) { return kind_of(plan, block); });
        __syncwarp();
        if (lane == 0) {
          plan.counts = counts;
          plan.first = counts.first;
          plan.last = counts.last;
        }
      }
      if (lane == 0) {
        shared.plan_full[at.stage].arrive();
        tile = tiles(p);
        if (tile > gridDim.x) {
          ptx::wait_for_prerequisite_grids();  // for the counter
          tile = atomicAdd(params.next_tile, 1) + gridDim.x;
        }
      }
      tile = __shfl_sync(0xffffffff, tile, 0);
    }
  }

  // ---- The warp that loads.

  // How many boxes of this block of keys are made.
  __device__ int* made(int key_head, int block) const {
    return params.made + int64_t(key_head) * ((p.seqlen_k + kBlockN - 1) / kBlockN) + block;
  }
  // Of 32 blocks of a head's keys, which are made.
  struct MadeKeys {
    int key_head = -1, first = 0;
    unsigned blocks = 0;
  };
  __device__ void wait_for_keys(MadeKeys& known, const Plan& plan, int block) const {
    const int key_head = plan.k_entry * p.num_heads_kv + plan.head_kv, bit = block % 32;
    if (key_head != known.key_head || block - bit != known.first) known = {key_head, block - bit, 0};
    if (known.blocks >> bit & 1) return;
    const int mine = known.first + int(threadIdx.x) % 32;
    const int all = boxes_of(min(kBlockN, p.seqlen_k - mine * kBlockN));
    do {
      known.blocks = __ballot_sync(0xffffffff, all <= 0 || ptx::load_acquire(made(key_head, mine)) >= all);
    } while (!(known.blocks >> bit & 1));
    __syncwarp();  // what other lanes acquired the first one may use
    ptx::fence_async_global();
  }

  __device__ void load() {
    const bool leader = threadIdx.x % 32 == 0;
    PlanRing at;
    QueryRing at_q;
    KeyRing at_k, at_v;
    MadeKeys made_keys;
    // q of a plan, if there is one.
    const auto load_q = [&](const PlanRing& of) {
      const Plan& plan = shared.plan[of.stage];
      ptx::Mbarrier& q_raw = shared.q_raw[at_q.stage];
      shared.plan_full[of.stage].wait(of.parity);
      shared.q_empty[at_q.stage].wait(at_q.parity ^ 1);
      if (plan.m_block < 0) {
        if (leader) q_raw.arrive();
        return;
      }
      if (!params.q_is_raw) ptx::wait_for_prerequisite_grids();
      if (leader) {
        q_raw.arrive_and_expect(sizeof(shared.q[0]));
        for (int w = 0; w < Tile::kConsumers; ++w) {
          for (int c = 0; c < Tile::kChunks; ++c) {
            ptx::tensor_load(shared.q[at_q.stage][w][c], params.q_map, q_raw, 64 * c,
                             plan.m_block * kBlockM + 64 * w, plan.head, plan.q_entry);
          }
        }
      }
      __syncwarp();
      at_q.advance();
    };
    load_q(at);
    if (!params.k_is_raw) ptx::wait_for_prerequisite_grids();
    while (shared.plan[at.stage].m_block >= 0) {
      const Plan& plan = shared.plan[at.stage];
      PlanRing next = at;
      next.advance();
      const auto load_v = [&](int block) {
        shared.v_empty[at_v.stage].wait(at_v.parity ^ 1);
        if (leader) {
          ptx::Mbarrier& v_full = shared.v_full[at_v.stage];
          v_full.arrive_and_expect(sizeof(shared.v[0]));
          for (int c = 0; c < Tile::kChunks; ++c) {
            ptx::tensor_load(shared.v[at_v.stage][c], *plan.v_map, v_full, 64 * c, block * kBlockN,
                             plan.head_kv, plan.v_entry);
          }
        }
        __syncwarp();
        at_v.advance();
      };
      // v is needed one block after k, and waits for its stage no earlier.
      int previous = -1;
      // q of the next tile comes as soon as it has a plan and a place, that of the tile before; but with one
      // stage its place is that of this one's.
      bool has_q = Tile::kQueryStages == 1;
      const auto load_block = [&](int block) {
        if (Tile::kMakesKeys && params.made != nullptr) wait_for_keys(made_keys, plan, block);
        shared.k_empty[at_k.stage].wait(at_k.parity ^ 1);
        if (leader) {
          shared.block[at_k.stage] = block;
          ptx::Mbarrier& k_full = shared.k_full[at_k.stage];
          k_full.arrive_and_expect(sizeof(shared.k[0]));
          for (int c = 0; c < Tile::kChunks; ++c) {
            ptx::tensor_load(shared.k[at_k.stage][c], params.k_map, k_full, 64 * c, block * kBlockN,
                             plan.head_kv, plan.k_entry);
          }
        }
        __syncwarp();
        at_k.advance();
        if (previous >= 0) load_v(previous);
        previous = block;
        if (!has_q) {
          const bool ready = shared.plan_full[next.stage].has_passed(next.parity) &&
                             shared.q_empty[at_q.stage].has_passed(at_q.parity ^ 1);
          has_q = __all_sync(0xffffffff, ready);
          if (has_q) load_q(next);
        }
      };
      if (plan.by_data) {
        for (const bool all : {false, true}) {
          if (plan.counts.of(all) == 0) continue;
          for_each_block(shared.window, plan.first, plan.last, all,
                         [&](int block) { return kind_of(plan, block); }, load_block);
        }
      } else {
        // Last keys first, in the order in which they are made.
        const int2 ranges[] = {{plan.full_last, plan.last},
                               {plan.first, plan.full_first},
                               {plan.full_first, plan.full_last}};
#pragma unroll 1
        for (const int2& range : ranges) {
#pragma unroll 1
          for (int block = range.y - 1; block >= range.x; --block) load_block(block);
        }
      }
      if (!has_q) load_q(next);
      if (previous >= 0) load_v(previous);
      if (Tile::kQueryStages == 1) load_q(next);
      shared.plan_empty[at.stage].arrive();
      at = next;
    }
  }

  // ---- The warp that has out stored, so that no consumer waits for it.

  __device__ void store() {
    PlanRing at_plan;
    for (QueryRing at;; at.advance(), at_plan.advance()) {
      wait_for_queries(at);
      const Plan& plan = shared.plan[at_plan.stage];
      if (plan.m_block < 0) break;
      shared.out_full[at.stage].wait(at.parity);
      if (threadIdx.x % 32 == 0) {
        for (int w = 0; w < Tile::kConsumers; ++w) {
          for (int c = 0; c < Tile::kChunks; ++c) {
            ptx::tensor_store(params.out_map, shared.q[at.stage][w][c], 64 * c,
                              plan.m_block * kBlockM + 64 * w, plan.head, plan.b);
          }
        }
        ptx::store_commit();
        ptx::store_wait_read();
        shared.q_empty[at.stage].arrive();
      }
      shared.plan_empty[at_plan.stage].arrive();
    }
    ptx::store_wait();
  }

  __device__ void wait_for_queries(const QueryRing& at) const {
    (Tile::kRowWarps > 0 ? shared.q_full : shared.q_raw)[at.stage].wait(at.parity);
  }

  // What logits of a block of keys are multiplied by, with kRaw: in columns 8 n + 2 (lane % 4) and the next,
  // n ascending. A load brings those of two n, and some are ahead: beside products they take long.
  struct KeyFactors {
    static constexpr int kAhead = 4;
    float4 ahead[kAhead];
    uint32_t from;

    __device__ static int place(int key) { return key / 16 * 16 + key % 8 / 2 * 4 + key / 8 % 2 * 2 + key % 2; }
    __device__ void load(int i) {
      float4& x = ahead[i % kAhead];
      asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                   : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
                   : "r"(from + i * 64));
    }
    __device__ void start(const float (&factors)[kBlockN]) {
      from = ptx::smem_address(factors) + threadIdx.x % 4 * 16;
#pragma unroll
      for (int i = 0; i < kAhead; ++i) load(i);
    }
    __device__ float2 of(int n) {
      const float4 x = ahead[n / 2 % kAhead];
      if (n % 2 == 0) return {x.x, x.y};
      if (n / 2 + kAhead < kN / 2) load(n / 2 + kAhead);
      return {x.z, x.w};
    }
  };

  // ---- The warps that take norms and scale rows.

  // A warp goes over rows of TV of a swizzled tile, as they came; lanes that share one hold 16 bytes of it
  // each time, in an order in which no two want the same bank. factor_of(row, 1 / max(|row|, kMinNorm), whether
  // this is the row's first lane) gives what makes them rows of TS; with kNorms they stay.
  template <bool kNorms = false, int kRows, class FactorOf>
  __device__ static void scale_rows(TS (&tile)[Tile::kChunks][kRows][64], int first, int count,
                                    FactorOf factor_of) {
    constexpr int kLanes = kHeadDim <= 128 ? 4 : 8, kEach = 8 * Tile::kChunks / kLanes;
    const int lane = threadIdx.x % kLanes, of_warp = threadIdx.x % 32 / kLanes;
#pragma unroll Tile::kRowsAtOnce
    for (int before = 0; before < count; before += 32 / kLanes) {
      const int row = first + before + of_warp;
      const auto at = [&](int each) -> uint4& {
        const int column = kLanes == 8 ? lane : (each ^ row) % 2 * 4 + lane;
        return reinterpret_cast<uint4*>(tile[each * kLanes / 8][row])[column];
      };
      uint4 x[kEach];
#pragma unroll
      for (int i = 0; i < kEach; ++i) x[i] = at(i);
      const auto norm = [&](float scale) {
        float sums[2] = {0.f, 0.f};
#pragma unroll
        for (const uint4& eight : x) {
#pragma unroll
          for (const uint32_t pair : {eight.x, eight.y, eight.z, eight.w}) {
            float2 both = sm80::Half16<TV>::unpack(pair);
            if (scale != 1.f) both = {both.x * scale, both.y * scale};
            sums[0] = fmaf(both.x, both.x, sums[0]);
            sums[1] = fmaf(both.y, both.y, sums[1]);
          }
        }
        float sum = sums[0] + sums[1];
#pragma unroll
        for (int d = kLanes / 2; d > 0; d /= 2) sum += __shfl_xor_sync(0xffffffff, sum, d);
        return rsqrtf(sum);
      };
      float inverse = norm(1.f);
      if constexpr (std::is_same_v<TV, __nv_bfloat16>) {
        constexpr float kSmall = 0x1p-80f;
        if (__any_sync(0xffffffff, !(inverse > 1e-15f))) {  // the squares overflow
          const float of_small = norm(kSmall) * kSmall;
          if (!(inverse > 1e-15f)) inverse = of_small;
        }
      }
      const float factor = factor_of(row, fminf(inverse, 1.f / kMinNorm), lane == 0);
      if constexpr (!kNorms) {
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
          const auto scaled = [&](uint32_t pair) {
            const float2 both = sm80::Half16<TV>::unpack(pair);
            return sm80::Half16<TS>::pack(both.x * factor, both.y * factor);
          };
          at(i) = {scaled(x[i].x), scaled(x[i].y), scaled(x[i].z), scaled(x[i].w)};
        }
      }
    }
    ptx::fence_async_shared();  // rows were read and written, and may be refilled
  }

  // Raw rows of q become those of q^ with the fold; or, with kScaled, exact multiples of themselves, so short
  // that products with any k are finite.
  __device__ void scale_queries(int q_stage, int first, int count, float fold) const {
    float* const factors = shared.q_factor[q_stage] + first;
    if (!params.q_is_raw || (Tile::kScaled && !p.l2norm)) {
      if constexpr (Tile::kScaled) {
        for (int i = threadIdx.x % 32; i < count; i += 32) factors[i] = fold;
      }
      return;
    }
    auto& tile = shared.q[q_stage][first / 64];
    scale_rows(tile, first % 64, count, [&](int row, float inverse, bool keeps) {
      if (!p.l2norm) return fold;
      if constexpr (!Tile::kScaled) return inverse * fold;
      const float power = __int_as_float(__float_as_int(inverse) & 0x7f800000);  // of 2, <= inverse
      const float scale = fmaxf(power, 0x1p-133f) * 0x1p-8f;
      if (keeps) factors[row - first % 64] = inverse / scale * fold;
      return scale;
    });
  }

  __device__ void prepare_rows(int warp) {
    PlanRing at_plan;
    KeyRing at;
    Ring<Tile::kUnitStages> at_box;
    bool has_boxes = Tile::kMakesKeys && params.made != nullptr;
    const auto scale_box = [&] {
      constexpr int kRows = kUnitKeys / Tile::kRowWarps;
      has_boxes = shared.has_box[at_box.stage];
      if (!has_boxes) return;
      scale_rows(shared.unit_k[at_box.stage], kRows * warp, kRows,
                 [](int, float inverse, bool) { return inverse; });
      shared.unit_full[at_box.stage].arrive();
      at_box.advance();
    };
    for (QueryRing at_q;; at_q.advance(), at_plan.advance()) {
      ptx::Mbarrier& q_raw = shared.q_raw[at_q.stage];
      while (has_boxes && !__any_sync(0xffffffff, q_raw.has_passed(at_q.parity))) {
        if (__any_sync(0xffffffff, shared.unit_raw[at_box.stage].try_wait(at_box.parity))) {
          shared.unit_raw[at_box.stage].wait(at_box.parity);
          scale_box();
        }
      }
      q_raw.wait(at_q.parity);
      const Plan& plan = shared.plan[at_plan.stage];
      const bool done = plan.m_block < 0;
      const int blocks = plan.counts.partial + plan.counts.full;
      if (!done) {
#pragma unroll 1
        for (int row = 16 * warp; row < kBlockM; row += 16 * Tile::kRowWarps) {
          scale_queries(at_q.stage, row, 16, plan.fold);
        }
      }
      shared.q_full[at_q.stage].arrive();
      if (done) break;
      if constexpr (Tile::kRaw) {
#pragma unroll 1
        for (int i = 0; i < blocks; ++i, at.advance()) {
          shared.k_full[at.stage].wait(at.parity);
          float* const factors = shared.k_factor[at.parity][at.stage];
          constexpr int kKeys = kBlockN / Tile::kRowWarps;
          scale_rows<true>(shared.k[at.stage], kKeys * warp, kKeys, [&](int key, float inverse, bool keeps) {
            if (keeps) factors[KeyFactors::place(key)] = inverse;
            return 0.f;
          });
          shared.norms_full[at.stage].arrive();
          shared.k_empty[at.stage].arrive();
        }
      }
    }
    while (has_boxes) {
      shared.unit_raw[at_box.stage].wait(at_box.parity);
      scale_box();
    }
  }

  // ---- Consumers: 64 rows each.

  struct Rows64 {
    float out[kNV][4];
    float sums[4];  // of rows lane / 4 and lane / 4 + 8, two chains each
    float s[1][kN][4];
    uint32_t weights[kN / 2][4];
    float fold[2];  // of s, with kScaled: in rows lane / 4 and lane / 4 + 8
  };

  __device__ void start_qk(Rows64& rows, int q_stage, int warpgroup, int stage) const {
    const uint64_t q = ptx::matrix_descriptor(ptx::smem_address(shared.q[q_stage][warpgroup]), 1024, 16);
    const uint64_t k = ptx::matrix_descriptor(ptx::smem_address(shared.k[stage]), 1024, 16);
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < kHeadDim / 16; ++i) {
      const uint64_t q_i = q + (i / 4 * sizeof(shared.q[0][0][0]) + i % 4 * 32) / 16;
      const uint64_t k_i = k + (i / 4 * sizeof(shared.k[0][0]) + i % 4 * 32) / 16;
      if (i == 0) {
        ptx::wgmma<TS, false>(rows.s[0], q_i, k_i);
      } else {
        ptx::wgmma<TS, true>(rows.s[0], q_i, k_i);
      }
    }
    ptx::wgmma_commit();
  }

  __device__ void start_pv(Rows64& rows, int stage) const {
    const uint64_t v =
        ptx::matrix_descriptor(ptx::smem_address(shared.v[stage]), 1024, sizeof(shared.v[0][0]));
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < kN / 2; ++i) {
      ptx::wgmma_add<TV>(rows.out, rows.weights[i], v + i * 16 * 128 / 16);
    }
    ptx::wgmma_commit();
  }

  // s in columns 8 n + 2 (lane % 4) and the next become exponents of 2.
  __device__ void take_exponents(Rows64& rows, int n, KeyFactors& factors) const {
    const float shift = Tile::kShifted ? params.shift_log2 : 0.f;
    float2 of_key = {1.f, 1.f};
    if constexpr (Tile::kRaw) of_key = factors.of(n);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      float& s = rows.s[0][n][e];
      if constexpr (Tile::kRaw) s *= e % 2 == 0 ? of_key.x : of_key.y;
      s = Tile::kScaled ? fmaf(s, rows.fold[e / 2], -shift) : s - shift;
    }
  }

  // s, or exponents with kReady, become weights; adds up the rows. A sum follows its exp at a distance, the
  // latency of MUFU.
  template <bool kReady>
  __device__ void take_exp(Rows64& rows, KeyFactors& factors) const {
    constexpr int kDistance = 4;
    const auto add = [&](int n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        asm volatile("add.f32 %0, %0, %1;" : "+f"(rows.sums[e]) : "f"(rows.s[0][n][e]));
      }
    };
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      if constexpr (!kReady) take_exponents(rows, n, factors);
#pragma unroll
      for (int e = 0; e < 4; ++e) asm volatile("ex2.approx.ftz.f32 %0, %0;" : "+f"(rows.s[0][n][e]));
      if (n >= kDistance) add(n - kDistance);
    }
#pragma unroll
    for (int n = kN - kDistance; n < kN; ++n) add(n);
  }

  __device__ static void round_weights(Rows64& rows) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        rows.weights[n / 2][n % 2 * 2 + half] =
            sm80::Half16<TV>::pack(rows.s[0][n][2 * half], rows.s[0][n][2 * half + 1]);
      }
    }
  }

  // Whether v, in one stage, holds a number that is not finite; every consumer looks at a part of it.
  __device__ bool has_nonfinite(int stage) const {
    const uint4* chunks = reinterpret_cast<const uint4*>(shared.v[stage]);
    bool found = false;
    for (int i = threadIdx.x - 128; i < int(sizeof(shared.v[0]) / 16); i += kConsumerThreads) {
      found |= sm90::has_nonfinite<TV>(chunks[i]);
    }
    ptx::fence_async_shared();  // v has been read, and may be refilled
    return ptx::named_barrier_or(kConsumersBarrier, kConsumerThreads, found);
  }

  // Zero rows in v for keys to which no row of the tile gives a weight: they may be dead and hold NaN, and
  // 0 * NaN is NaN.
  __device__ void clear_unseen(const Rows64& rows, int stage) const {
    const int thread = threadIdx.x - 128;
    for (int j = thread; j < kBlockN; j += kConsumerThreads) shared.seen[j] = false;
    ptx::named_barrier(kConsumersBarrier, kConsumerThreads);
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int x = 0; x < 2; ++x) {
        if (rows.s[0][n][x] + rows.s[0][n][2 + x] != 0.f) shared.seen[n * 8 + 2 * (thread % 4) + x] = true;
      }
    }
    ptx::named_barrier(kConsumersBarrier, kConsumerThreads);
    uint4* const chunks = reinterpret_cast<uint4*>(shared.v[stage]);
    for (int i = thread; i < int(sizeof(shared.v[0]) / 16); i += kConsumerThreads) {
      if (!shared.seen[i / 8 % kBlockN]) chunks[i] = {0, 0, 0, 0};  // 8 chunks of 16 bytes a row
    }
    ptx::fence_async_shared();
    ptx::named_barrier(kConsumersBarrier, kConsumerThreads);
  }

  // out and lse of one tile; out goes through the tile's own rows of q^, which have been read.
  __device__ void finish(Rows64& rows, const Plan& plan, int q_stage, int warpgroup) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    float inverse[2];
    bool live[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float l = rows.sums[2 * half] + rows.sums[2 * half + 1];
      l += __shfl_xor_sync(0xffffffff, l, 1);
      l += __shfl_xor_sync(0xffffffff, l, 2);
      const int i = plan.m_block * kBlockM + warpgroup * 64 + warp * 16 + lane / 4 + 8 * half;
      live[half] = l > 0.f && i < plan.visible.seqlen_q;
      inverse[half] = 1.f / l;
      if (lane % 4 == 0 && i < p.seqlen_q) {
        const SplitLog lse =
            live[half] ? log_of_sum(l, params.shift) : SplitLog{-INFINITY, 0.f};
        const int64_t at = (int64_t(plan.b) * p.num_heads + plan.head) * p.seqlen_q + i;
        params.lse[at] = lse.high;
        params.lse_low[at] = lse.low;
      }
    }
    ptx::named_barrier(kWarpgroupBarrier + warpgroup, 128);  // all have read q^
    const auto pack = [&](int n, int half) {
      // A dead row is zero even where a live key of another row holds inf: P = 0 made that NaN.
      const float* const x = rows.out[n] + 2 * half;
      return live[half] ? sm80::Half16<TV>::pack(x[0] * inverse[half], x[1] * inverse[half]) : 0u;
    };
    const int row = warp * 16 + lane % 16;
#pragma unroll
    for (int n = 0; n < kNV; n += 2) {
      TS* const to = shared.q[q_stage][warpgroup][n / 8][row] + ((n % 8 + lane / 16) ^ (row % 8)) * 8;
      ptx::stmatrix_x4(ptx::smem_address(to), pack(n, 0), pack(n, 1), pack(n + 1, 0), pack(n + 1, 1));
    }
    ptx::fence_async_shared();
    shared.out_full[q_stage].arrive();
  }

  __device__ void consume(int warpgroup) {
    PlanRing at_plan;
    KeyRing at;       // the block whose weights are next
    KeyRing pending;  // that of the weights at hand, whose v is next
    Rows64 rows;
    for (QueryRing at_q;; at_q.advance(), at_plan.advance()) {
      wait_for_queries(at_q);
      const Plan& plan = shared.plan[at_plan.stage];
      if (plan.m_block < 0) break;
      const int m0 = plan.m_block * kBlockM + warpgroup * 64;  // of this warpgroup
      if constexpr (Tile::kRowWarps == 0) {
        scale_queries(at_q.stage, 64 * warpgroup + int(threadIdx.x) / 32 % 4 * 16, 16, plan.fold);
        ptx::named_barrier(kWarpgroupBarrier + warpgroup, 128);
      }
      if constexpr (Tile::kScaled) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = int(threadIdx.x - 128) / 32 * 16 + int(threadIdx.x) % 32 / 4 + 8 * half;
          rows.fold[half] = shared.q_factor[at_q.stage][row];
        }
      }
#pragma unroll
      for (int n = 0; n < kNV; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) rows.out[n][e] = 0.f;
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) rows.sums[e] = 0.f;

      // Of the block whose k is next: its first key, which of its pairs are allowed.
      constexpr int kWords = kN / kBlocksPerWord<kN>;
      unsigned words[kWords][1][2];
      int2 ranges[1][2];
      FragmentAt fragment(m0 + int(threadIdx.x) / 32 % 4 * 16, 0);
      const auto first_key = [&] { return shared.block[at.stage] * kBlockN; };
      const auto find_words = [&] {
        fragment = FragmentAt(m0 + int(threadIdx.x) / 32 % 4 * 16, first_key());
#pragma unroll
        for (int w = 0; w < kWords; ++w) {
          find_allowed<kN>(words[w], p, plan.visible, plan.head, fragment, w * kBlocksPerWord<kN>);
        }
      };
      KeyFactors factors;
      const auto load_factors = [&] {
        if constexpr (Tile::kRaw) {
          shared.norms_full[at.stage].wait(at.parity);
          factors.start(shared.k_factor[at.parity][at.stage]);
        }
      };
      const auto hide_words = [&] {
#pragma unroll
        for (int n = 0; n < kN; ++n) take_exponents(rows, n, factors);  // a negative scale would turn -inf
#pragma unroll
        for (int w = 0; w < kWords; ++w) {
          hide(rows.s, words[w], ranges, fragment, w * kBlocksPerWord<kN>);
        }
      };
      const auto took_k = [&] { release(shared.k_empty[at.stage]); };
      const auto took_v = [&] {
        ptx::wgmma_wait<0>();
        release(shared.v_empty[pending.stage]);
      };
      const auto make_weights = [&](auto is_partial) {
        round_weights(rows);
        pending = at;
        at.advance();
        if constexpr (decltype(is_partial)::value) {
          if (plan.has_dead_keys) {
            shared.v_full[pending.stage].wait(pending.parity);
            if (has_nonfinite(pending.stage)) clear_unseen(rows, pending.stage);
          }
        }
      };
      // Weights of the first block.
      const auto start = [&](auto is_partial) {
        constexpr bool kHide = decltype(is_partial)::value;
        shared.k_full[at.stage].wait(at.parity);
        if constexpr (kHide) find_words();
        start_qk(rows, at_q.stage, warpgroup, at.stage);
        load_factors();
        ptx::wgmma_wait<0>();
        pin(rows.s[0]);
        took_k();
        if constexpr (kHide) hide_words();
        take_exp<kHide>(rows, factors);
        make_weights(is_partial);
      };
      // The product of the last weights with v, and the weights of the next block.
      const auto step = [&](auto is_partial) {
        constexpr bool kHide = decltype(is_partial)::value;
        shared.k_full[at.stage].wait(at.parity);
        if constexpr (kHide) find_words();
        start_qk(rows, at_q.stage, warpgroup, at.stage);
        shared.v_full[pending.stage].wait(pending.parity);
        load_factors();
        start_pv(rows, pending.stage);
        ptx::wgmma_wait<1>();
        pin(rows.s[0]);
        took_k();
        if constexpr (kHide) hide_words();
        take_exp<kHide>(rows, factors);
        keep_above(rows);
        took_v();
        make_weights(is_partial);
      };
      // What position tells of this warpgroup's rows.
      const auto kind = [&]() -> BlockKind {
        const Visible& visible = plan.visible;
        const int last = min(m0 + 64, visible.seqlen_q) - 1, n0 = first_key(), n1 = n0 + kBlockN;
        if (m0 > last) return {false, false};
        return {n0 < visible.end_key(last) && n1 > visible.first_key(m0),
                n0 >= visible.first_key(last) && n1 <= visible.end_key(m0)};
      };

      constexpr std::true_type kPartial;
      constexpr std::false_type kFull;
      bool started = false;
      if (plan.counts.partial > 0) find_ranges(ranges, plan.visible, fragment);
#pragma unroll 1
      for (int i = plan.counts.partial; i > 0; --i) {
        shared.k_full[at.stage].wait(at.parity);
        // All consumers look at v where keys may be dead, as masks and segments leave them, and so take
        // every block. Elsewhere a warpgroup that skips one still holds v of the block before.
        static_assert((kBlockM - 64 + kBlockN - 1) / kBlockN < Tile::kStages);
        const BlockKind of_block = plan.has_dead_keys ? BlockKind{true, false} : kind();
        if (of_block.any && !(started && of_block.all)) {
          if (started) {
            step(kPartial);
          } else {
            start(kPartial);
            started = true;
          }
        } else if (of_block.any) {
          step(kFull);
        } else {
          ptx::named_barrier(kWarpgroupBarrier + warpgroup, 128);  // all lanes know which block it was
          took_k();
          shared.v_full[at.stage].wait(at.parity);
          release(shared.v_empty[at.stage]);
          at.advance();
        }
      }
      int full = plan.counts.full;
      if (!started && full > 0) {
        start(kFull);
        started = true;
        --full;
      }
#pragma unroll 1
      for (; full > 0; --full) step(kFull);
      if (started) {
        shared.v_full[pending.stage].wait(pending.parity);
        start_pv(rows, pending.stage);
        took_v();
      }
      pin(rows.out);
      finish(rows, plan, at_q.stage, warpgroup);
    }
  }

  // ptxas would sink most of the exps below the wait that follows, where no product runs beside them. A
  // store that never happens, of what depends on all of them, cannot pass it.
  __device__ void keep_above(const Rows64& rows) const {
    const float sum = (rows.sums[0] + rows.sums[1]) + (rows.sums[2] + rows.sums[3]);
    asm volatile("{.reg .pred p; setp.lt.f32 p, %0, 0fBF800000; @p st.shared.f32 [%1], %0;}" ::"f"(sum),
                 "r"(ptx::smem_address(&shared.seen))
                 : "memory");
  }
};

// Grid: persistent CTAs, at most one per tile.
template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    cosine_attn_fwd_sm90(const __grid_constant__ FwdTmaParams params) {
#if __CUDA_ARCH_FEAT_SM90_ALL
  auto& shared = aligned_shared<typename Tile::Shared>();
  const int warpgroup = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);
  if (threadIdx.x == 0) {
    for (const CUtensorMap* map :
         {&params.q_map, &params.k_map, &params.v_map, &params.raw_v_map, &params.out_map}) {
      ptx::prefetch_tensor_map(*map);
    }
    // Every lane arrives where its accesses, and no product after them, come before: racecheck does not see
    // the lanes meet where ptxas leaves that out. A barrier has one arrival at least, used or not.
    constexpr int kRowLanes = Tile::kRowWarps > 0 ? 32 * Tile::kRowWarps : 1;
    for (int i = 0; i < Tile::kQueryStages; ++i) {
      shared.q_raw[i].init(1);
      shared.q_full[i].init(kRowLanes);
      shared.q_empty[i].init(1);
      shared.out_full[i].init(128 * Tile::kConsumers);
    }
    for (int i = 0; i < Tile::kPlans; ++i) {
      shared.plan_full[i].init(1);
      shared.plan_empty[i].init(2 * 32);  // the warps that load and store
    }
    for (int i = 0; i < Tile::kStages; ++i) {
      shared.k_full[i].init(1);
      shared.norms_full[i].init(kRowLanes);
      shared.v_full[i].init(1);
      shared.k_empty[i].init(4 * Tile::kConsumers + (Tile::kRaw ? kRowLanes : 0));
      shared.v_empty[i].init(4 * Tile::kConsumers);
    }
    for (int i = 0; i < Tile::kUnitStages; ++i) {
      shared.unit_raw[i].init(1);
      shared.unit_full[i].init(kRowLanes);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  FwdKernel<Tile> kernel{params, params.problem, shared};
  if (warpgroup == 0) {
    ptx::fewer_registers<Tile::kProducerRegisters>();
    const int warp = threadIdx.x / 32;
    if (warp == 0) kernel.load();
    if (warp == 1) kernel.make_plans();
    if (warp == 2) kernel.store();
    if constexpr (Tile::kMakesKeys) {
      if (threadIdx.x == 96 && params.made != nullptr) kernel.make_keys();
    }
  } else if (warpgroup > Tile::kConsumers) {
    ptx::fewer_registers<Tile::kRowRegisters>();
    if constexpr (Tile::kRowWarps > 0) kernel.prepare_rows(threadIdx.x / 32 % 4);
  } else {
    ptx::more_registers<Tile::kConsumerRegisters>();
    kernel.consume(warpgroup - 1);
  }
#endif
}

}  // namespace jca::sm90
